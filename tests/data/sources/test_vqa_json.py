"""Questions about images in JSON files of VQAv2 and of sets in its form."""

import json
from pathlib import Path
from typing import Any

import pytest

from dive_fast.data.sources.vqa_json import EMPTY_QUESTION, NO_ANSWER, open_vqa
from dive_fast.errors import DataError

QUESTIONS = [
    {"image_id": 42, "question": "What is this?", "question_id": 42000},
    {"image_id": 42, "question": "Is it red? ", "question_id": 42001},
    {"image_id": 7, "question": " ", "question_id": 7000},
    {"image_id": 7, "question": "How many?", "question_id": 7001},
]
ANNOTATIONS = [
    {"question_id": 42000, "multiple_choice_answer": "net"},
    {"question_id": 42001, "answers": [{"answer": "no"}, {"answer": "yes"}, {"answer": "yes"}]},
    {"question_id": 7000, "multiple_choice_answer": "x"},
]


def write(folder: Path, tree: Any, name: str = "v2_OpenEnded_mscoco_val2014_questions.json") -> str:
    (folder / name).write_text(json.dumps(tree))
    return str(folder / name)


def test_vqav2_questions_and_answers(tmp_path: Path) -> None:
    path = write(tmp_path, {"data_subtype": "val2014", "questions": QUESTIONS})
    write(tmp_path, {"annotations": ANNOTATIONS}, "v2_mscoco_val2014_annotations.json")
    (tmp_path / "val2014").mkdir()
    for image in (42, 7):
        (tmp_path / f"val2014/COCO_val2014_{image:012d}.jpg").touch()
    source = open_vqa(path, None, None, "question", images=True)
    assert [sample.texts for sample in source.samples] == [("What is this?",), ("Is it red?",), ("How many?",)]
    assert [sample.key for sample in source.samples] == ["42000", "42001", "7001"]
    assert source.samples[2].path == tmp_path / "val2014/COCO_val2014_000000000007.jpg"
    assert list(source.skipped) == [("7000", EMPTY_QUESTION)]
    both = open_vqa(path, None, None, "question_answer", images=True)
    assert [sample.texts[0] for sample in both.samples] == ["What is this? : net", "Is it red? : yes"]
    assert [each.reason for each in both.skipped] == [EMPTY_QUESTION, NO_ANSWER]
    answers = open_vqa(path, str(tmp_path / "v2_mscoco_val2014_annotations.json"), None, "answer", images=True)
    assert [sample.texts[0] for sample in answers.samples] == ["net", "yes", "x"]


def test_other_forms(tmp_path: Path) -> None:
    vizwiz = [{"image": "a.jpg", "question": "Q?", "answers": [{"answer": "1"}, {"answer": "2"}, {"answer": "2"}]}]
    (sample,) = open_vqa(write(tmp_path, vizwiz), None, "/photos", "question_answer", images=False).samples
    assert (sample.texts, sample.path) == (("Q? : 2",), Path("/photos/a.jpg"))
    textvqa = {"data": [{"image_id": "0af1", "question": "Q?", "answers": ["b", "a"]}]}
    (sample,) = open_vqa(write(tmp_path, textvqa), None, None, "answer", images=False).samples
    assert (sample.texts, sample.path.name) == (("b",), "0af1.jpg")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"question": []}, r'no list of entries, at the top or as "questions" or "data"'),
        (QUESTIONS[:1] * 2, "duplicate question_id 42000"),
        ([{"image_id": 1, "question": 3}], "entry 0: its question is missing or of a wrong type"),
        ([{"image": "../a.jpg", "question": "Q?"}], "entry 0: .*not the name of a file below"),
        (QUESTIONS[2:3], "no question can be used: its question is empty"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, tree: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_vqa(write(tmp_path, tree), None, None, "question", images=False)


def test_answers_are_joined_by_question_id(tmp_path: Path) -> None:
    path = write(tmp_path, {"questions": QUESTIONS}, "q_questions.json")
    with pytest.raises(
        DataError, match=r"no answer; there is no q_annotations\.json: name the file of the answers"
    ):
        open_vqa(path, None, None, "answer", images=False)
    twice = write(tmp_path, ANNOTATIONS[:2] + ANNOTATIONS[:1], "twice.json")
    with pytest.raises(DataError, match=r"twice\.json: duplicate question_id 42000"):
        open_vqa(path, twice, None, "answer", images=False)
    without = write(tmp_path, [{"answers": ["a"]}], "without.json")
    with pytest.raises(DataError, match="entry 0: its question_id is missing or of a wrong type"):
        open_vqa(path, without, None, "answer", images=False)
    unnamed = write(tmp_path, [{"image_id": 1, "question": "Q?"}], "unnamed.json")
    with pytest.raises(DataError, match="entry 0 has no question_id, by which its answers are joined"):
        open_vqa(unnamed, write(tmp_path, ANNOTATIONS, "a.json"), None, "answer", images=False)
    (tmp_path / "broken.json").write_text('{"questions": [')
    with pytest.raises(DataError, match="cannot read it"):
        open_vqa(str(tmp_path / "broken.json"), None, None, "question", images=False)


def test_missing_images_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"the image of its first question is not in .* name the folder of the images"
    ):
        open_vqa(write(tmp_path, QUESTIONS), None, None, "question", images=True)
    with pytest.raises(DataError, match="no such file"):
        open_vqa(str(tmp_path / "none.json"), None, None, "question", images=False)
