"""Shift of sets by a model: embedding, ranks, resuming, reports, and the command."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from distributed import run_ranks, run_script
from PIL import Image
from test_encoders import write_bert, write_vit

from dive_fast.config.schema import EvaluateConfig
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError, DataError
from dive_fast.evaluation.shift import shift_features, shift_sets
from dive_fast.evaluation.shift.correlations import Thresholds
from dive_fast.evaluation.shift.gaussian import FitOptions
from dive_fast.evaluation.shift.measure_shift import Models, ModelShift, ShiftOptions, measure_all
from dive_fast.evaluation.shift.set_accuracy import read_accuracies
from dive_fast.evaluation.shift.shift_report import correlations_of, rows_of
from dive_fast.methods.run_config import RunConfig
from dive_fast.model import towers

ALONE = Ranks(0, 1, torch.device("cpu"))
ROOT = Path(__file__).parents[3]
COUNT, SEVERITIES = 60, range(1, 6)
SHRUNK = ShiftOptions(FitOptions(shrinkage="ledoit-wolf"))
NEEDS = {"image": True, "text": True}
EVALUATE = EvaluateConfig(batch_size=16, workers=0)


def corrupted(seed: int, severity: int) -> bytes:
    """A picture, faded into noise by its severity."""
    pixels = np.asarray(Image.open(io.BytesIO(tiny.jpeg(seed))), np.float64)
    noise = np.random.default_rng(seed).integers(0, 256, pixels.shape)
    share = 0.15 * severity
    content = io.BytesIO()
    Image.fromarray(((1 - share) * pixels + share * noise).astype(np.uint8)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, a tuned model in its run folder, pairs to fit, and the same captions with corrupted images."""
    root = tmp_path_factory.mktemp("shift")
    tree = tiny.write_config(root)
    tree["evaluate"] = {"batch_size": 16, "workers": 0}
    (root / "config.json").write_text(json.dumps(tree))
    for severity in (0, *SEVERITIES):
        samples = {
            f"{i:02d}": {"png": corrupted(i, severity), "txt": f"caption {i} of {'two ' * (i % 7)}things".encode()}
            for i in range(COUNT)
        }
        tiny.write_tar(root / f"severity{severity}/0.tar", samples)
    questions = [{"image": f"{i}.png", "question": f"caption {i}", "question_id": i} for i in range(7)]
    (root / "vqa.json").write_text(json.dumps(questions))
    for i in range(7):
        (root / f"{i}.png").write_bytes(corrupted(i, 0))
    return root


def tuned(folder: Path) -> Path:
    """Weights near the pre-trained ones."""
    path = folder / "run/model.safetensors"
    if not path.exists():
        model = towers.create(config_of(folder).model)
        torch.manual_seed(0)
        moved = {name: value + 0.05 * torch.randn(value.shape) for name, value in model.state_dict().items()}
        path.parent.mkdir(exist_ok=True)
        towers.save(model.export(moved), path)
    return path


def config_of(folder: Path) -> Any:
    return RunConfig.model_validate_json((folder / "config.json").read_text())


def measured(
    folder: Path,
    sets: list[str],
    features: Path,
    ranks: Ranks = ALONE,
    options: ShiftOptions = SHRUNK,
    after: Path | None = None,
) -> list[ModelShift]:
    parsed = shift_sets.parse_all([str(folder / "severity0"), *sets])
    fitted, *others = (shift_sets.open_set(each, None, None, NEEDS, ranks) for each in parsed)
    checkpoints = Models(config_of(folder).model, None, after)
    return measure_all(checkpoints, fitted, None, others, ranks, EVALUATE, features, options)


@pytest.fixture(scope="module")
def shift(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelShift, Path]:
    features = tmp_path_factory.mktemp("features")
    sets = [f"{folder}/severity{severity}" for severity in SEVERITIES]
    (model,) = measured(folder, [*sets, f"again={folder}/severity0", f"{folder}/vqa.json"], features)
    return model, features


def test_made_shift_is_ranked(shift: tuple[ModelShift, Path]) -> None:
    model, features = shift
    means = {part.name: {name: values.mean() for name, values in part.distance.items()} for part in model.sets}
    ladder = [means["again"]["image"], *(means[f"severity{severity}"]["image"] for severity in SEVERITIES)]
    assert ladder == sorted(ladder)
    assert ladder[-1] > 1.2 * ladder[0]
    joint = [means["again"]["joint"], *(means[f"severity{severity}"]["joint"] for severity in SEVERITIES)]
    assert joint == sorted(joint)
    # The captions are the same.
    texts = [part.distance["text"] for part in model.sets[:-1]]
    assert all(np.array_equal(texts[0], other) for other in texts)
    # The set again is the fitted and the held-out part; its features are stored once.
    again = next(part for part in model.sets if part.name == "again")
    parts = np.concatenate([model.fitted.distance["joint"], model.held_out.distance["joint"]])
    assert sorted(again.distance["joint"]) == sorted(parts)
    assert len(model.held_out.sample) == COUNT // 10
    assert len(list(features.glob("*/about.json"))) == len(SEVERITIES) + 2


def test_distances_follow_their_definition(folder: Path, shift: tuple[ModelShift, Path]) -> None:
    model, features = shift
    stored = [np.load(file) for file in sorted(features.glob("*/0000000.npz"))]
    fitted = next(each for each in stored if each["image"].shape[0] == COUNT and _is_fitted(each, model))
    rows = fitted["image"].astype(np.float64)[model.fitted.sample]
    gaussian = model.gaussians["image"]
    covariance = np.cov(rows.T) * (1 - gaussian.shrinkage)
    covariance += gaussian.shrinkage * np.trace(np.cov(rows.T)) / rows.shape[1] * np.eye(rows.shape[1])
    deviations = rows - rows.mean(0)
    squares = np.einsum("nh,hk,nk->n", deviations, np.linalg.inv(covariance), deviations)
    np.testing.assert_allclose(model.fitted.distance["image"], np.sqrt(squares), rtol=1e-8)


def _is_fitted(stored: Any, model: ModelShift) -> bool:
    rows = stored["image"].astype(np.float64)[model.fitted.sample]
    return bool(np.allclose(rows.mean(0), model.gaussians["image"].mean.numpy(), rtol=1e-9, atol=1e-12))


def test_interrupted_embedding_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: tuple[ModelShift, Path]
) -> None:
    monkeypatch.setattr(shift_features, "BLOCK", 7)
    monkeypatch.setattr(shift_features, "ROWS", 3)
    (first,) = measured(folder, [f"{folder}/severity3"], tmp_path)
    expected = next(part for part in shift[0].sets if part.name == "severity3").distance["joint"]
    np.testing.assert_allclose(first.sets[0].distance["joint"], expected, rtol=1e-5)
    files = sorted(tmp_path.glob("*/*.npz"))
    assert len(files) == 2 * math.ceil(COUNT / 7)
    times = {file: file.stat().st_mtime_ns for file in files}
    files[3].unlink()
    (second,) = measured(folder, [f"{folder}/severity3"], tmp_path)
    assert [file for file in files if file.stat().st_mtime_ns != times[file]] == [files[3]]
    np.testing.assert_allclose(second.sets[0].distance["joint"], first.sets[0].distance["joint"], rtol=1e-5)
    files[3].write_bytes(b"PK")
    with pytest.raises(DataError, match=r"damaged: .*; remove it and restart the same command"):
        measured(folder, [f"{folder}/severity3"], tmp_path)


def on_each_rank(folder: Path, features: Path) -> list[Any]:
    shift_features.BLOCK = 7
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    (model,) = measured(folder, [f"{folder}/severity2"], features, ranks)
    return [model.fitted.sample, *model.sets[0].distance.values()]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_measure_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    # The same stored features, of which each rank reads its blocks.
    (alone,) = run_ranks(1, on_each_rank, folder, tmp_path)
    for of_rank in run_ranks(count, on_each_rank, folder, tmp_path):
        for values, expected in zip(of_rank, alone, strict=True):
            np.testing.assert_allclose(values, expected, rtol=1e-10)
    embedded = run_ranks(count, on_each_rank, folder, tmp_path / "new")
    np.testing.assert_allclose(embedded[0][1], alone[1], rtol=1e-4)


def test_too_few_samples_and_features_that_are_not_finite(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^severity0, image: 54 samples for a covariance of width 24, of which 480"
    ):
        measured(folder, [f"{folder}/severity1"], tmp_path, options=ShiftOptions())
    with pytest.raises(DataError, match="severity0: fewer than 10 images, of which one would be held out"):
        measured(folder, [f"{folder}/severity1"], tmp_path, options=SHRUNK._replace(limit=3))
    model = towers.create(config_of(folder).model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["visual.ln_post.bias"][0] = math.nan
    towers.save(model.export(state), tmp_path / "nan.safetensors")
    with pytest.raises(DataError, match=r"the image features of 60 samples are not finite, .* 0\.tar/00"):
        measured(folder, [f"{folder}/severity1"], tmp_path, after=tmp_path / "nan.safetensors")


def test_command_compares_models_and_accuracy(folder: Path, tmp_path: Path) -> None:
    accuracy = {f"severity{severity}": 0.9 - 0.1 * severity for severity in (1, 3, 5)} | {"held-out": 0.9}
    (tmp_path / "accuracy.json").write_text(json.dumps({"pre-trained": accuracy, "tuned": accuracy}))
    weights = tuned(folder)
    command = [
        *("launch/shift.py", "--config", str(folder / "config.json"), "--after", str(weights)),
        *("--fit", str(folder / "severity0"), "--shrinkage", "ledoit-wolf", "--far", "1.25"),
        *("--sets", *(str(folder / name) for name in accuracy if name != "held-out")),
        *(f"{folder}/vqa.json,text=question", f"plain={folder}/target,text=none", "data.reference"),
        *("--accuracy", str(tmp_path / "accuracy.json"), "--output", str(tmp_path / "out")),
    ]
    done = run_script(*command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/shift.jsonl").read_text().splitlines()]
    with (tmp_path / "out/shift.csv").open() as file:
        assert [row["set"] for row in csv.DictReader(file)] == [row["set"] for row in rows]
    of = {(row["model"], row["concept"], row["set"]): row for row in rows}
    assert of["tuned", "image", "severity5"]["group"] == "far"
    before, after = (of[label, "joint", "severity3"] for label in ("pre-trained", "tuned"))
    assert after["difference"] == pytest.approx(after["shift_per_root"] - before["shift_per_root"])
    assert ("tuned", "image", "plain") in of
    assert ("tuned", "text", "plain") not in of
    report = json.loads((tmp_path / "out/shift.json").read_text())
    (line,) = [row for row in report["over_sets"] if (row["model"], row["concept"]) == ("tuned", "image")]
    assert line["sets"] == 4
    points = [(of["tuned", "image", name]["shift"], value) for name, value in accuracy.items()]
    assert line["pearson"] == pytest.approx(np.corrcoef(np.array(points).T)[0, 1])
    assert line["pearson"] < 0
    assert "pre-trained image ~ tuned image" in done.stdout
    with (tmp_path / "out/shift_samples/severity1.csv").open() as file:
        samples = list(csv.DictReader(file))
    assert samples[3]["key"] == "0.tar/03"
    assert np.mean([float(row["tuned text"]) for row in samples]) == pytest.approx(
        of["tuned", "text", "severity1"]["shift"], rel=1e-5
    )
    for name in ("shift_distributions.png", "shift_accuracy.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size[0] > 1000


def test_unimodal_encoders_are_another_model(folder: Path, tmp_path: Path) -> None:
    write_vit(tmp_path / "vit")
    (tmp_path / "bert").mkdir()
    write_bert(tmp_path / "bert")
    # Its image cannot be decoded: only the text encoder has a feature of this sample.
    broken = {"b": {"jpg": b"x", "txt": b"a dog"}} | {
        f"{i:02d}": {"png": corrupted(i, 4), "txt": f"caption {i}".encode()} for i in range(9)
    }
    tiny.write_tar(tmp_path / "broken/0.tar", broken)
    (tmp_path / "accuracy.json").write_text(json.dumps({f"severity{i}": 0.9 - 0.1 * i for i in (1, 3, 5)}))
    command = [
        *("launch/shift.py", "--config", str(folder / "config.json"), "--after", str(tuned(folder))),
        *("--fit", str(folder / "severity0"), "--shrinkage", "ledoit-wolf", "--output", str(tmp_path / "out")),
        *("--sets", *(f"{folder}/severity{i}" for i in (1, 3, 5)), str(tmp_path / "broken")),
        *("--accuracy", str(tmp_path / "accuracy.json"), "--text-encoder", str(tmp_path / "bert")),
    ]
    done = run_script(*command, "--image-encoder", str(tmp_path / "vit"), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "LOAD REPORT" not in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/shift.jsonl").read_text().splitlines()]
    of = {(row["model"], row["concept"], row["set"]): row for row in rows}
    assert of["unimodal", "image", "severity5"]["width"] == 24
    assert of["unimodal", "text", "severity5"]["width"] == 16
    assert ("unimodal", "joint", "severity5") not in of
    ladder = [of["unimodal", "image", f"severity{i}"]["shift"] for i in (1, 3, 5)]
    assert ladder == sorted(ladder)
    report = json.loads((tmp_path / "out/shift.json").read_text())
    names = [(row["model"], row["accuracy_of"], row["concept"]) for row in report["over_sets"]]
    assert ("unimodal", "tuned", "image") in names
    pairs = {(row["first"], row["second"]) for row in report["over_samples"]}
    assert {("pre-trained text", "unimodal text"), ("tuned joint", "unimodal image")} <= pairs
    assert ("unimodal image", "unimodal text") in pairs
    assert "| 9 |" in done.stdout
    features = list((tmp_path / "out/shift_features").glob("*/about.json"))
    assert len(features) == 3 * 5
    # Texts alone: the sample without an image has a distance, beside the empty cells of the others.
    done = run_script(*command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "| 9 / 10 |" in done.stdout
    with (tmp_path / "out/shift_samples/broken.csv").open() as file:
        samples = list(csv.DictReader(file))
    assert [bool(row["tuned text"]) for row in samples] == [key["key"] != "0.tar/b" for key in samples]
    assert all(row["unimodal text"] for row in samples)
    with Image.open(tmp_path / "out/shift_joint.png") as picture:
        assert picture.size[0] > 1000


def test_rows_group_sets_and_correlate_samples(shift: tuple[ModelShift, Path]) -> None:
    model, _ = shift
    rows = rows_of([model], Thresholds(1.0, 1.2), {})
    row = next(row for row in rows if (row["concept"], row["set"]) == ("image", "severity5"))
    assert row["ratio"] == pytest.approx(row["shift"] / model.held_out.distance["image"].mean())
    assert row["group"] == "far"
    assert row["shift_per_root"] == pytest.approx(row["shift"] / math.sqrt(24))
    correlations = correlations_of([model], rows)
    assert correlations["over_sets"] == []
    entry = next(each for each in correlations["over_samples"] if each["set"] == "severity5")
    values = model.sets[4].distance
    assert entry["pearson"] == pytest.approx(np.corrcoef(values["image"], values["text"])[0, 1])


def test_overlap_with_the_fitted_set_is_counted(folder: Path, tmp_path: Path) -> None:
    copied = {f"x{i}": {"png": corrupted(i, 0), "txt": b"a copy"} for i in range(3)}
    tiny.write_tar(tmp_path / "copied/0.tar", copied | {"new": {"png": corrupted(0, 5), "txt": b"new"}})
    names = [str(folder / "severity0"), f"again={folder}/severity0/0.tar", f"{folder}/severity2"]
    parsed = shift_sets.parse_all([*names, str(tmp_path / "copied")])
    fitted, *others = (shift_sets.open_set(each, None, None, NEEDS, ALONE) for each in parsed)
    again, copied_line = shift_sets.remarks_on_overlap(fitted, others)
    assert again.startswith(f"again: {COUNT} of its {COUNT} images are images of severity0, to which")
    assert copied_line.startswith("copied: 3 of its 4 images are copies of images of severity0")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a/x", "b/x"], "duplicate name x among the sets; name them by NAME=SET"),
        (["x,text=all"], "text is one of caption, none, question, question_answer, answer"),
        (["x,text=none,text=none"], "a field is written twice"),
        (["x,text=answer"], "questions and answers are those of JSON files; write format=vqa too for a section"),
        (["x.json,text=none"], "the text of a vqa set is one of question"),
        (["/"], r"expected \[NAME=\]SET"),
    ],
)
def test_sets_are_validated(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shift_sets.parse_all(texts)


def test_sets_are_parsed() -> None:
    option = shift_sets.parse("vqa=/a=b/{0,1}.json,images=/coco, all,text=answer")
    expected = ("vqa", "/a=b/{0,1}.json", "/coco, all", "answer", True)
    assert (option.name, option.location, option.images, option.text, option.is_vqa) == expected
    assert shift_sets.parse("there/a=b.csv").name == "a=b"


def test_accuracies_belong_to_models_and_sets(tmp_path: Path) -> None:
    digests, locations = {"pre-trained": "a1", "tuned": "b2"}, {"r": "imagenet-r", "x": "data/x"}
    results = [
        {"set": "imagenet-r", "value": 0.4, "weights_digest": "b2"},
        {"set": "imagenet-r", "value": 0.5, "weights_digest": "b2"},
        {"set": "imagenet-r", "value": 0.1, "weights_digest": "b2", "attack": "pgd"},
        {"set": "x", "value": 0.6, "weights_digest": "c3"},
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in results))
    assert read_accuracies(file, digests, locations) == {"tuned": {"r": 0.5}}
    table = tmp_path / "table.csv"
    table.write_text("set,accuracy,model\nx,0.25,\nr,1,pre-trained\n")
    assert read_accuracies(table, digests, locations) == {"tuned": {"x": 0.25}, "pre-trained": {"r": 1.0}}
    for text, message in (
        ("set,accuracy\nx,7\n", "not between 0 and 1"),
        ("set,value\nx,1\n", "accuracy.* is missing"),
    ):
        table.write_text(text)
        with pytest.raises(DataError, match=message):
            read_accuracies(table, digests, locations)
    table.write_text("set,accuracy\nother,0.5\n")
    with pytest.raises(DataError, match=r"no accuracy of a measured set \(r, x\); it has other"):
        read_accuracies(table, digests, locations)
