"""The end of a run: values before and after, the forgetting probe, the report, and the model card."""

import contextlib
import io
import json
import os
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tiny
import torch
from distributed import run_ranks
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from dive_fast.config.schema import ProjectionConfig
from dive_fast.data.open_dataset import open_reference
from dive_fast.distributed import Ranks, join
from dive_fast.engine.step import Engine
from dive_fast.evaluation.geometry.measures import rsa
from dive_fast.evaluation.zero_shot import evaluate
from dive_fast.methods.method import Part
from dive_fast.methods.run_config import RunConfig
from dive_fast.model.towers import create, tokenizer_of
from dive_fast.projections import rules
from dive_fast.training import loop, run_evaluation
from dive_fast.training.forgetting_probe import PairMeasure
from dive_fast.training.model_card import base_model, write_card
from dive_fast.training.run_report import Report, Row
from dive_fast.training.write_report import write_report

COUNT, HELD_OUT = 500, 50
REPORT = ("report.json", "report.md", "README.md")
ALONE = Ranks(0, 1, torch.device("cpu"))


class KilledError(Exception):
    """Ends a run before its end."""


@contextlib.contextmanager
def recorded_measurements() -> Iterator[list[str]]:
    """Records the names of what is measured."""
    measured: list[str] = []
    sets, embed = run_evaluation.measure_sets, PairMeasure.embed

    def measure_sets(towers: Any, tokenizer: Any, options: Any, opened: Any, *args: Any) -> Any:
        measured.extend(opened)
        return sets(towers, tokenizer, options, opened, *args)

    def embed_pairs(self: PairMeasure, towers: Any) -> Any:
        measured.append(self.name)
        return embed(self, towers)

    with (
        unittest.mock.patch.object(run_evaluation, "measure_sets", measure_sets),
        unittest.mock.patch.object(PairMeasure, "embed", embed_pairs),
    ):
        yield measured


def run(tree: dict[str, Any], output: Path, ranks: Ranks, kill_at: int | None = None) -> dict[str, Any]:
    """Trains; returns the printed lines, the reference samples of each step, and what was measured at the end."""
    trained: list[int] = []
    step = Engine.step

    def recorded(self: Engine, batch: Any) -> Any:
        if batch.reference is not None:
            trained.extend(batch.reference.sample.tolist())
        if kill_at is not None and len(trained) > 0 and self.deepspeed.global_steps == kill_at:
            raise KilledError
        return step(self, batch)

    with (
        recorded_measurements() as measured,
        unittest.mock.patch.object(Engine, "step", recorded),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.suppress(KilledError),
    ):
        loop.train(RunConfig.model_validate_json(json.dumps(tree)), output, ranks)
    ranks.barrier()
    return {"out": out.getvalue(), "trained": trained, "measured": measured}


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in REPORT}


def cases(folder: Path) -> dict[str, Any]:
    ranks, results = join(), {}
    Part.backend = "torch"
    tree = json.loads((folder / "config.json").read_text())
    results["dive"] = run(tree, folder / "dive", ranks)
    results["files"] = files(folder / "dive")
    ranks.barrier()
    results["again"] = run(tree, folder / "dive", ranks)
    results["files again"] = files(folder / "dive")
    ranks.barrier()
    other = json.loads(json.dumps(tree))
    other["evaluate"]["sets"]["zs"]["templates"] = "an image of the {}"
    results["other set"] = run(other, folder / "dive", ranks)
    killed = json.loads(json.dumps(tree))
    killed["train"] |= {"checkpoint_every": 1}
    run(killed, folder / "killed", ranks, kill_at=4)
    results["killed"] = run(killed, folder / "killed", ranks)
    flyp = json.loads(json.dumps(tree))
    flyp |= {"objective": {"name": "flyp"}}
    flyp["deepspeed"]["zero_optimization"]["stage"] = 3
    results["flyp"] = run(flyp, folder / "flyp", ranks)
    head = json.loads(json.dumps(tree)) | {"objective": {"name": "vanilla_ft"}}
    del head["data"]["reference"]
    head["evaluate"] |= {"every_steps": 3, "select": "val"}
    results["head"] = run(head, folder / "head", ranks)
    few = json.loads(json.dumps(tree))
    few["evaluate"] = {"probe": 0}
    results["few"] = run(few, folder / "few", ranks)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    tree = tiny.write_config(path, epochs=3)
    samples = {
        f"{i:04d}": {"jpg": tiny.jpeg(1000 + i, (32, 32)), "txt": f"caption {i % 400}".encode()}
        for i in range(COUNT)
    }
    tiny.write_tar(path / "pairs" / "0.tar", samples)
    # 450 pairs are trained on in nine steps.
    tree["data"]["reference"] |= {"path": str(path / "pairs"), "batch_size": 50}
    sets = {}
    for name, count in (("val", 30), ("zs", 25)):
        options = tiny.write_target(path / name, count)
        sets[name] = {key: options[key] for key in tiny.EVALUATION}
    sets["zs"]["role"] = "zero_shot"
    tree["evaluate"] = {"sets": sets, "workers": 0}
    (path / "config.json").write_text(json.dumps(tree))
    return path


@pytest.fixture(scope="module")
def by_rank(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(2, cases, folder, init=False, timeout=400)


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((folder / "report.json").read_text())["rows"]}


def test_held_out_pairs_are_never_trained_on_and_all_others_are(by_rank: list[Any]) -> None:
    trained = [sample for rank in by_rank for sample in rank["dive"]["trained"]]
    assert len(trained) == len(set(trained)) == COUNT - HELD_OUT
    assert set(range(COUNT)) - set(trained) == {index * COUNT // HELD_OUT for index in range(HELD_OUT)}


def measured_alone(folder: Path, weights: Path | None) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """Accuracies, and embeddings of the held-out pairs, of new towers with a file's weights."""
    config = RunConfig.model_validate_json((folder / "config.json").read_text())
    towers = create(config.model).eval()
    if weights is not None:
        towers.load_exported(load_file(weights))
    tokenizer = tokenizer_of(config.model)
    accuracies = evaluate(towers, tokenizer, config.evaluate, ALONE)
    assert config.data.reference is not None
    source = open_reference(config.data.reference)
    held = [index * COUNT // HELD_OUT for index in range(HELD_OUT)]
    transform = open_clip.image_transform(32, is_train=False)
    with torch.no_grad():
        images = towers.encode_image(torch.stack([transform(source.image(row)) for row in held]))
        texts = towers.encode_text(tokenizer([source.samples[row].texts[0] for row in held]))
    unit = torch.nn.functional.normalize
    return accuracies, unit(images), unit(texts)


def test_values_equal_those_of_new_towers(by_rank: list[Any], folder: Path) -> None:
    rows = rows_of(folder / "killed")
    before, after = (measured_alone(folder, path) for path in (None, folder / "killed/model.safetensors"))
    for name in ("val", "zs"):
        assert (rows[name]["before"], rows[name]["after"]) == (before[0][name], after[0][name])
    for which, (_, images, texts) in (("before", before), ("after", after)):
        right = torch.arange(HELD_OUT)
        recall = float(((images @ texts.T).argmax(1) == right).double().mean())
        assert rows["probe/image_to_text_r1"][which] == pytest.approx(recall, abs=1.5 / HELD_OUT)
        recall = float(((images @ texts.T).argmax(0) == right).double().mean())
        assert rows["probe/text_to_image_r1"][which] == pytest.approx(recall, abs=1.5 / HELD_OUT)
    expected = rsa(torch.cat(before[1:]), torch.cat(after[1:]))
    assert rows["probe/rsa"]["after"] == pytest.approx(expected, abs=1e-5)
    assert 0 < rows["probe/rsa"]["after"] < 0.9999
    assert [rows[name]["samples"] for name in ("val", "zs", "probe/rsa")] == [30, 25, HELD_OUT]
    assert all(len(row["data"]) == 64 for row in rows.values())
    assert len({row["data"] for row in rows.values()}) == 3
    assert [rows[name]["kind"] for name in ("val", "zs", "probe/rsa")] == ["other", "zero_shot", "probe"]


def test_report_is_the_same_on_stdout_and_in_the_folder(by_rank: list[Any]) -> None:
    printed, written = by_rank[0]["dive"]["out"], by_rank[0]["files"]["report.md"].decode()
    table = [line for line in written.splitlines() if line.startswith("|")]
    assert len(table) == 7
    assert "\n".join(table) in printed
    assert "weights of step 9 of 9, the last" in printed
    assert printed.index("pre-trained: val") < printed.index("## DiVE")
    assert by_rank[1]["dive"]["out"] == ""
    report = json.loads(by_rank[0]["files"]["report.json"])
    assert {key: report[key] for key in ("run", "weights_step", "steps", "method", "weight", "seed")} == {
        "run": "dive",
        "weights_step": 9,
        "steps": 9,
        "method": "dive",
        "weight": 1000.0,
        "seed": 0,
    }


def test_complete_run_rewrites_its_report_without_measuring(by_rank: list[Any]) -> None:
    assert by_rank[0]["dive"]["measured"] == ["val", "zs", "probe", "val", "zs", "probe"]
    assert by_rank[0]["again"]["measured"] == by_rank[1]["again"]["measured"] == []
    assert by_rank[0]["files again"] == by_rank[0]["files"]
    assert "already complete" in by_rank[0]["again"]["out"]


def test_set_with_another_identity_is_measured_again(by_rank: list[Any]) -> None:
    assert by_rank[0]["other set"]["measured"] == ["zs", "zs"]


def test_killed_run_ends_with_the_report_of_an_unbroken_one(by_rank: list[Any], folder: Path) -> None:
    # Pairs are embedded again, the values of the sets before training are stored.
    assert by_rank[0]["killed"]["measured"] == ["probe", "val", "zs", "probe"]
    assert 0 < len(by_rank[0]["killed"]["trained"]) < 9 * 25
    reports = (
        json.loads(text) for text in (by_rank[0]["files"]["report.json"], files(folder / "killed")["report.json"])
    )
    unbroken, killed = (report["rows"] for report in reports)
    assert killed == unbroken


def test_probe_is_measured_for_methods_that_do_not_use_the_reference(by_rank: list[Any], folder: Path) -> None:
    assert by_rank[0]["flyp"]["trained"] == []
    rows, dive = rows_of(folder / "flyp"), rows_of(folder / "killed")
    assert rows.keys() == dive.keys()
    assert {name: row["before"] for name, row in rows.items()} == {
        name: row["before"] for name, row in dive.items()
    }


def test_head_and_selected_weights_are_named(by_rank: list[Any], folder: Path) -> None:
    printed = by_rank[0]["head"]["out"]
    assert "step 3 of 9: val " in printed
    assert "% (best so far), zs " in printed
    report = json.loads((folder / "head/report.json").read_text())
    assert f"weights of step {report['weights_step']} of 9, best on val" in printed
    assert report["selected_on"] == "val"
    assert report["rows"][0]["kind"] == "id"
    assert "Before: zero-shot, by class prompts; after: by the trained head" in printed
    assert "No forgetting probe: it needs image-caption pairs, set data.reference." in printed
    assert report["weight"] is None


def test_run_without_sets_says_so(by_rank: list[Any], folder: Path) -> None:
    printed = by_rank[0]["few"]["out"]
    assert "DiVE: weights of step 9 of 9, the last; nothing is measured without sets." in printed
    assert json.loads((folder / "few/report.json").read_text())["rows"] == []
    assert not (folder / "few/report.png").exists()
    assert not (folder / "few/measurements.json").exists()


def test_all_files_of_a_run_follow_the_umask(by_rank: list[Any], folder: Path) -> None:
    os.umask(mask := os.umask(0))
    paths = [path for name in ("dive", "head") for path in (folder / name).rglob("*") if path.is_file()]
    assert {str(path): mode for path in paths if (mode := path.stat().st_mode & 0o777) != 0o666 & ~mask} == {}
    names = {str(path.relative_to(folder)) for path in paths}
    assert {"head/head.safetensors", "head/best/model.safetensors", "dive/teacher/image.npy"} <= names
    assert {f"dive/{name}" for name in (*REPORT, "report.png", "measurements.json")} <= names


def test_model_card_has_front_matter_and_no_paths(by_rank: list[Any], folder: Path) -> None:
    text = by_rank[0]["files"]["README.md"].decode()
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "library_name": "open_clip",
        "license": "unknown",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "dive_fast"],
    }
    assert str(folder) not in text
    assert "`pairs`, 500 image-caption pairs, of which 50 were held out" in text
    assert "`class number 0`" in text
    assert "| probe (RSA)" in text
    code = text.partition("```python\n")[2].partition("```")[0]
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "picture.jpg")
    code = code.replace("local-dir:path/to/this/folder", f"local-dir:{folder / 'dive'}")
    code = code.replace("picture.jpg", str(folder / "picture.jpg"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    assert printed.getvalue() in ("a photo of a cat\n", "a photo of a dog\n")


def test_edited_model_card_is_kept(by_rank: list[Any], folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "few/README.md"
    path.write_text(path.read_text() + "My own words.\n")
    edited, run = path.read_text(), unittest.mock.Mock(folder=folder / "few")
    write_card(unittest.mock.Mock(), run)
    assert path.read_text() == edited
    assert "was edited and is kept" in caplog.text


@pytest.mark.parametrize(
    ("name", "pretrained", "expected"),
    [
        ("ViT-B-16-quickgelu", "openai", "timm/vit_base_patch16_clip_224.openai"),
        ("hf-hub:someone/some-clip", None, "someone/some-clip"),
        ("hf:openai/clip-vit-base-patch32", None, "openai/clip-vit-base-patch32"),
        ("hf:/home/someone/model", None, None),
        ("local-dir:/home/someone/model", None, None),
        ("ViT-B-16", "/home/someone/weights.pt", None),
        ("demo", None, None),
    ],
)
def test_base_model_is_its_name_on_the_hub(name: str, pretrained: str | None, expected: str | None) -> None:
    model = RunConfig.model_fields["model"].annotation(name=name, pretrained=pretrained)  # type: ignore[misc]
    assert base_model(model) == expected


METRICS = ("omega", "triggered", "applied", "distance", "relative_distance")


def test_report_message_and_rounding(tmp_path: Path) -> None:
    rows = (
        Row("val", "id", "top1", 0.743, 0.842, 1200, 3),
        Row("zs_colour", "zero_shot", "mean_class_recall", 0.909, 0.858, 300),
        Row("ood", "ood", "top1", 0.50001, 0.5, 10),
        Row("probe/rsa", "probe", "rsa", 1.0, 0.8804, 480),
    )
    report = Report("mine", 90, 180, "dive", 1000.0, 0, rows, "DiVE", "val")
    assert report.message() == "val +9.9, zs_colour (mean class recall) -5.1 points"
    table = report.table()
    assert "weights of step 90 of 180, best on val" in table
    for cells in (
        ("val", "74.3", "84.2", "+9.9", "1200 (3 left out)", "ID"),
        ("zs_colour (mean class recall)", "90.9", "85.8", "-5.1", "300", "zero-shot"),
        ("ood", "50.0", "50.0", "+0.0", "10", "OOD"),
        ("probe (RSA)", "1.000", "0.880", "-0.120", "480", "probe"),
    ):
        assert cells in [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in table.splitlines()]
    write_report(report, tmp_path)
    with Image.open(tmp_path / "report.png") as image:
        assert image.width >= 830
    assert not (tmp_path / "projection.png").exists()
    lines = [{"step": step} | {f"projection/{name}": 0.1 * step for name in METRICS} for step in (1, 2, 3)]
    broken = '{"step": 4, "projection/dist'
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + broken)
    write_report(report, tmp_path, rules.create(ProjectionConfig(name="digrap")))
    with Image.open(tmp_path / "projection.png") as image:
        assert image.width >= 830
    assert "![DiGraP over the steps](projection.png)" in (tmp_path / "report.md").read_text()
    unknown = Report("mine", 1, 1, "flyp", None, 0, (Row("val", "id", "top1", None, 0.5, 10),), "FLYP")
    assert unknown.message() == "val 50.0 %"
    assert "|      - |  50.0 |      - |" in unknown.table()
    write_report(unknown, tmp_path)
    assert not (tmp_path / "projection.png").exists()
    assert not (tmp_path / "report.png").exists()
