"""Visual questions by ranking answers, compared with a loop over all questions and answers; training on them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from distributed import run_ranks, run_script

from dive_fast.commands import answers as answers_command
from dive_fast.config.schema import EvaluationSet, ModelConfig
from dive_fast.data.sources.vqa_json import (
    MIN_QUESTIONS,
    Candidates,
    Question,
    frequent_answers,
    open_vqa,
    openings_of,
    read_answers,
    vqa_prompt,
)
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError
from dive_fast.evaluation import visual_questions
from dive_fast.evaluation.datasets.evaluation_set import Asked
from dive_fast.evaluation.datasets.resolve import open_evaluation
from dive_fast.evaluation.evaluator import set_identity
from dive_fast.evaluation.zero_shot import Measured, measure
from dive_fast.methods.run_config import RunConfig
from dive_fast.model.towers import create, tokenizer_of, unit

ALONE = Ranks(0, 1, torch.device("cpu"))
ROOT = Path(__file__).parents[2]
CANDIDATES = ["dog", "cat", "two", "birds", "tree"]
QUESTIONS = ["class of the thing", "number of birds in photo", "is the picture blurry"]
PHOTOS, ASKED = 7, 16


def write_questions(folder: Path, name: str, first_photo: int = 0) -> dict[str, Any]:
    """Questions in VQAv2's form with images; returns the section that names them."""
    rng = np.random.default_rng(first_photo)
    (folder / f"{name}2014").mkdir(parents=True)
    for photo in range(PHOTOS):
        path = folder / f"{name}2014/COCO_{name}2014_{photo:012d}.jpg"
        path.write_bytes(tiny.jpeg(first_photo + photo))
    questions, annotations = [], []
    for number in range(ASKED):
        answered = rng.choice([*CANDIDATES, "Photo", "Cat."], 10, p=[0.25, 0.15, 0.15, 0.1, 0.1, 0.15, 0.1])
        answered = ["none of these"] * 10 if number == 5 else answered.tolist()
        about = {"image_id": number % PHOTOS, "question_id": 100 + number}
        questions.append(about | {"question": QUESTIONS[number % len(QUESTIONS)]})
        annotations.append(about | {"answers": [{"answer": answer} for answer in answered]})
    questions_file = folder / f"v2_OpenEnded_mscoco_{name}2014_questions.json"
    questions_file.write_text(json.dumps({"data_subtype": f"{name}2014", "questions": questions}))
    answers_file = folder / f"v2_mscoco_{name}2014_annotations.json"
    # Joined by question_id, not by order.
    answers_file.write_text(json.dumps({"annotations": annotations[::-1]}))
    return {"format": "vqa", "path": str(questions_file)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and a set of questions with candidate answers."""
    root = tmp_path_factory.mktemp("vqa")
    tiny.write_model(root / "model", tiny.FEW_TOKENS)
    write_questions(root, "val")
    (root / "answers.txt").write_text("\n".join(CANDIDATES) + "\n")
    return root


def section(root: Path, **settings: Any) -> EvaluationSet:
    tree = {"format": "vqa", "task": "vqa", "path": str(root / "v2_OpenEnded_mscoco_val2014_questions.json")}
    return EvaluationSet(**tree | {"answers": str(root / "answers.txt")} | settings)


def opened(root: Path, **settings: Any) -> Asked:
    data = open_evaluation(section(root, **settings))
    assert isinstance(data, Asked)
    return data


def measured(root: Path, data: Asked | None = None, ranks: Ranks = ALONE) -> Measured:
    config = ModelConfig(name=f"local-dir:{root / 'model'}")
    towers, tokenizer = create(config).eval(), tokenizer_of(config)
    return measure(towers, tokenizer, data or opened(root), ranks, batch_size=3, workers=0)


def by_loop(root: Path) -> dict[str, float]:
    """The metrics by a loop over questions and answers, one text at a time."""
    config = ModelConfig(name=f"local-dir:{root / 'model'}")
    towers, tokenizer = create(config).eval(), tokenizer_of(config)
    name = "v2_OpenEnded_mscoco_val2014_questions.json"
    questions = json.loads((root / name).read_text())["questions"]
    entries = json.loads((root / "v2_mscoco_val2014_annotations.json").read_text())["annotations"]
    answers_of = {entry["question_id"]: [each["answer"] for each in entry["answers"]] for entry in entries}
    source = open_vqa(str(root / name), None, None, "question", images=True)
    soft, bound, none = [], [], []
    for row, entry in enumerate(questions):
        image = towers.preprocess.transform(source.image(row), None)
        with torch.no_grad():
            x = unit(towers.encode_image(towers.preprocess.to_tensor(image)[None]))
            texts = [f"question: {entry['question']} answer: {answer}" for answer in CANDIDATES]
            scores = [float(x @ unit(towers.encode_text(tokenizer([text]))).T) for text in texts]
        answered = [answer.lower().rstrip(".") for answer in answers_of[entry["question_id"]]]
        agreement = [min(answered.count(answer) / 3, 1) for answer in CANDIDATES]
        soft.append(agreement[int(np.argmax(scores))])
        bound.append(max(agreement))
        none.append(not any(agreement))
    return {
        "soft_accuracy": float(np.mean(soft)),
        "upper_bound": float(np.mean(bound)),
        "unanswerable": float(np.mean(none)),
    }


def test_ranked_answers_equal_a_loop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, expected = measured(folder), by_loop(folder)
    assert result.scores == pytest.approx(expected)
    assert 0 < expected["soft_accuracy"] < expected["upper_bound"] < 1
    assert (result.classifier, result.samples, result.left_out) == ("ranked answers", ASKED, 0)
    # Fewer texts in memory than those of one question.
    monkeypatch.setattr(visual_questions, "TEXTS_AT_ONCE", 3)
    assert measured(folder).scores == pytest.approx(expected)


def on_each_rank(root: Path) -> dict[str, float]:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    data = open_evaluation(section(root), "", ranks)
    assert isinstance(data, Asked)
    return measured(root, data, ranks).scores


@pytest.mark.slow
def test_ranks_answer_the_same(folder: Path) -> None:
    for scores in run_ranks(3, on_each_rank, folder):
        assert scores == pytest.approx(by_loop(folder))


def test_broken_and_missing_images_are_counted(folder: Path, tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model", tiny.FEW_TOKENS)
    write_questions(tmp_path, "val")
    (tmp_path / "answers.txt").write_text("dog\ncat\n")
    (tmp_path / "val2014/COCO_val2014_000000000003.jpg").unlink()
    with pytest.raises(DataError, match="no such file"):
        opened(tmp_path)
    (tmp_path / "val2014/COCO_val2014_000000000002.jpg").write_bytes(b"x")
    result = measured(tmp_path, opened(tmp_path, on_skipped="report"))
    # 2 questions about each, of 16 about 7 images: 3, 10; 2, 9.
    assert (result.samples, result.left_out) == (ASKED - 4, 4)


def test_identity_holds_answers_and_candidates(folder: Path, tmp_path: Path) -> None:
    first = set_identity(opened(folder), None, 1.0)
    assert set_identity(opened(folder), None, 1.0) == first
    (tmp_path / "answers.txt").write_text("\n".join(CANDIDATES[::-1]))
    other = set_identity(opened(folder, answers=str(tmp_path / "answers.txt")), None, 1.0)
    assert other["classes"] != first["classes"]
    assert other["data"] == first["data"]
    part = opened(folder, questions=5)
    assert [part.source.samples.key(row) for row in range(5)] == ["100", "103", "106", "109", "112"]
    assert set_identity(part, None, 1.0)["data"] != first["data"]


def test_answers_command_writes_frequent_answers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [
        {"question": "q", "question_id": number, "image_id": 1, "answers": [{"answer": answer}]}
        for number, answer in enumerate(["b", "B.", "c", "a", " "])
    ]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    command = [str(tmp_path / "train.json"), "--count", "2", "--output", str(tmp_path / "new/answers.txt")]
    assert answers_command.main(command) == 0
    assert read_answers(str(tmp_path / "new/answers.txt")) == Candidates(("b", "a"), {})
    out = capsys.readouterr().out
    assert "2 of 3 answers, the most frequent ones of 3 of 4 questions (75.0 %)" in out
    assert "1 questions were left out: no answer (the first: 4)" in out
    assert answers_command.main([str(tmp_path / "none.json"), "--output", str(tmp_path / "a.txt")]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n\nb\n", "answer 2 is empty"),
        ("a\nb\nA.\n", "answer 3 repeats 'a', answer 1"),
        ("a\n", "1 answers; ranking needs at least 2"),
        ('{"answers": ["a", "b"]}', "cannot read answers: 'openings'"),
        ('{"answers": ["a", "b"], "openings": {"is it": [0, 2]}}', "the opening 'is it' has no list of numbers"),
    ],
)
def test_invalid_candidates_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "answers.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_answers(str(tmp_path / "answers.txt"))
    with pytest.raises(DataError, match="no such file; dive-fast answers writes it"):
        read_answers(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": {"name": "vanilla_ft"}}, "data.target.format = vqa has prompts and no classes"),
        ({"data": {"target": {"shots": 4}}}, "shots: vqa data has prompts and no classes"),
        ({"data": {"target": {"format": "csv"}}}, "data.target.annotations: only vqa data has them"),
        ({"evaluate": {"task": "classification"}}, "format = vqa and task = vqa go together"),
        ({"evaluate": {"answers": None}}, r"answers is missing: .* write it by dive-fast answers"),
        ({"evaluate": {"metric": "top1"}}, "metric: top1 is not a vqa metric"),
        ({"evaluate": {"templates": "imagenet"}}, "templates: vqa has no classes"),
        ({"evaluate": {"holdout": 0.1}}, "holdout"),
    ],
)
def test_options_that_questions_lack_are_refused(change: dict[str, Any], message: str) -> None:
    target = {"format": "vqa", "path": "q.json", "annotations": "a.json"} | change.get("data", {}).get(
        "target", {}
    )
    questions = {"format": "vqa", "task": "vqa", "path": "q.json", "answers": "a.txt"} | change.get("evaluate", {})
    tree = {
        "model": {"name": "demo"},
        "data": {"target": target, "reference": {"format": "webdataset", "path": "r.tar"}},
        "evaluate": {"sets": {"vqa": questions}},
    } | {key: value for key, value in change.items() if key == "objective"}
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(tree)


def test_openings_limit_candidates(folder: Path, tmp_path: Path) -> None:
    assert openings_of("What colour IS the dog?") == [
        "what colour is the",
        "what colour is",
        "what colour",
        "what",
    ]
    colours = [
        Question(str(i), "", "What colour is it?", ("red", "blue")[i % 2], {}) for i in range(MIN_QUESTIONS)
    ]
    rare = [Question(str(i), "", "What is it?", "dog", {}) for i in range(MIN_QUESTIONS - 1)]
    candidates = frequent_answers([*colours, *rare], 3).candidates
    assert candidates.answers == ("dog", "blue", "red")
    assert candidates.possible("What colour is the cat?") == (1, 2)
    assert candidates.possible("What is that?") == (0, 1, 2)  # of "what"
    assert candidates.possible("Who?") == (0, 1, 2)
    tree = {"answers": CANDIDATES, "openings": {"is": [0, 4], "class of": [2]}}
    (tmp_path / "answers.json").write_text(json.dumps(tree))
    data = opened(folder, answers=str(tmp_path / "answers.json"))
    assert data.possible == ((2,), (0, 1, 2, 3, 4), (0, 4))
    limited, free = measured(folder, data).scores, measured(folder).scores
    assert limited["upper_bound"] < free["upper_bound"]
    assert limited["unanswerable"] > free["unanswerable"]
    assert "5 of 5 candidates" in opened(folder).remarks[0]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["flyp", "dive"])
def test_questions_are_trained_on_and_measured(tmp_path: Path, objective: str) -> None:
    tree = tiny.write_config(tmp_path, epochs=2)
    tree["data"]["target"] = write_questions(tmp_path, "train", 50) | {"batch_size": 8, "workers": 0}
    questions = write_questions(tmp_path, "val") | {"task": "vqa", "answers": str(tmp_path / "answers.txt")}
    (tmp_path / "answers.txt").write_text("\n".join(CANDIDATES))
    tree["evaluate"] = {"sets": {"vqa": questions}, "workers": 0, "probe": 0}
    tree["objective"] = {"name": objective}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    done = run_script("launch/train.py", "--config", str(tmp_path / "config.json"), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "vqa (soft accuracy)" in done.stdout
    done = run_script("launch/evaluate.py", "--config", str(tmp_path / "config.json"), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "5 candidates, which allow" in done.stdout
    assert "## Visual questions" in done.stdout
    (row,) = [json.loads(line) for line in (tmp_path / "run/results.jsonl").read_text().splitlines()]
    assert row["value"] == row["soft_accuracy"] <= row["upper_bound"]
    assert row["identity"]["prompt"] == vqa_prompt("{question}", "{answer}")
    shift = ["launch/shift.py", "--config", str(tmp_path / "config.json"), "--fit", "data.target", "--sets", "vqa"]
    options = ["--shrinkage", "0.5", "--hold-out-every", "4", "--accuracy"]
    done = run_script(*shift, *options, str(tmp_path / "run/results.jsonl"), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/shift.jsonl").read_text().splitlines()]
    (line,) = [each for each in rows if (each["model"], each["concept"], each["set"]) == ("tuned", "text", "vqa")]
    assert line["accuracy"] == row["value"]


def test_prompts_are_the_most_frequent_answers(folder: Path) -> None:
    name = str(folder / "v2_OpenEnded_mscoco_val2014_questions.json")
    source = open_vqa(name, None, None, "prompt", images=True)
    assert source.samples.texts(5)[0] == "question: is the picture blurry answer: none of these"
    assert (source.samples.sizes > 0).all()
