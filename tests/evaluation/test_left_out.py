"""Every sample of an evaluation set is measured, or left out and counted if the set allows it."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from distributed import run_ranks
from same_metrics import assert_same_metrics

from dive_fast.config.schema import EvaluateConfig, EvaluationSet, ModelConfig
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError
from dive_fast.evaluation.datasets.resolve import open_evaluation
from dive_fast.evaluation.evaluator import Options, measure_all, open_all
from dive_fast.evaluation.results import Results
from dive_fast.evaluation.zero_shot import evaluate, measure
from dive_fast.methods.run_config import RunConfig
from dive_fast.model.towers import create, tokenizer_of

ALONE = Ranks(0, 1, torch.device("cpu"))
GOOD, BROKEN, LOST = 6, 2, 3
"""Numbers of samples in each set: measurable, with an undecodable image, and without an image or label."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, sets of all formats with samples that cannot be measured, and the same sets without these."""
    folder = tmp_path_factory.mktemp("left_out")
    tiny.write_model(folder / "model")
    (folder / "names.txt").write_text("cat\ndog\nowl\n")
    for kind in ("all", "good"):
        samples: dict[str, dict[str, bytes]] = {}
        for i in range(GOOD + BROKEN if kind == "all" else GOOD):
            image = tiny.jpeg(i) if i < GOOD else tiny.jpeg(i)[:200]
            # The broken ones are in the middle.
            samples[f"{i if i < 2 or i >= GOOD else i + 50:03d}"] = {
                "jpg": image,
                "cls": str(i % 3).encode(),
                "txt": f"caption {i}\nanother {i}".encode(),
            }
        for i in range(LOST if kind == "all" else 0):
            samples[f"lost{i}"] = {"cls": b"0", "txt": b"\xff no text" if i else b"a text"}
        tiny.write_tar(folder / kind / "0.tar", dict(sorted(samples.items())))
        for key, parts in samples.items():
            if "jpg" in parts:
                path = folder / f"{kind} folders" / f"kind {int(parts['cls'])}" / f"{key}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(parts["jpg"])
    return folder


def config_of(root: Path, kind: str, which: str = "all", **more: Any) -> EvaluationSet:
    if kind == "folder":
        return EvaluationSet(format="folder", path=str(root / f"{which} folders"), templates="simple", **more)
    if kind == "retrieval":
        return EvaluationSet(format="webdataset", path=str(root / which), task="retrieval", **more)
    names = str(root / "names.txt")
    return EvaluationSet(
        format="webdataset", path=str(root / which), class_names=names, templates="simple", **more
    )


def measured(root: Path, config: EvaluationSet, ranks: Ranks = ALONE, batch_size: int = 3) -> Any:
    model = ModelConfig(name=f"local-dir:{root / 'model'}")
    data = open_evaluation(config, "evaluate.sets.mine")
    return measure(
        *(create(model).eval(), tokenizer_of(model), data, ranks), batch_size=batch_size, workers=0, name="mine"
    )


@pytest.mark.parametrize("kind", ["webdataset", "retrieval"])
def test_incomplete_set_raises_count_reason_and_remedy(root: Path, kind: str) -> None:
    with pytest.raises(DataError) as refused:
        measured(root, config_of(root, kind))
    message = str(refused.value)
    assert f"{root / 'all'}: {LOST} samples are left out: no image ({LOST}, the first: 0.tar/lost0)" in message
    assert message.endswith("evaluate.sets.mine.on_skipped=report")


@pytest.mark.parametrize("kind", ["webdataset", "retrieval", "folder"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_on_skipped_report_measures_remaining_samples(root: Path, kind: str, batch_size: int) -> None:
    result = measured(root, config_of(root, kind, on_skipped="report"), batch_size=batch_size)
    lost = (
        LOST
        if kind != "folder"
        else len(open_evaluation(config_of(root, kind, on_skipped="report")).source.skipped)
    )
    assert (result.samples, result.left_out) == (GOOD, BROKEN + lost)
    good = measured(root, config_of(root, kind, "good"))
    assert_same_metrics(result.scores, good.scores)
    if kind != "retrieval":
        assert result.reliability.samples == good.reliability.samples
    assert (good.samples, good.left_out) == (GOOD, 0)


def test_undecodable_image_is_named_in_plain_words(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "set/a/broken.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"<html>not found</html>")
    (tmp_path / "set/a/good.jpg").write_bytes(tiny.jpeg(0))
    with pytest.raises(DataError) as refused:
        measured(root, EvaluationSet(format="folder", path=str(tmp_path / "set"), templates="simple"))
    assert "a/broken.jpg: cannot decode the image" in str(refused.value)
    assert str(refused.value).endswith("or accept results without it by evaluate.sets.mine.on_skipped=report")
    assert "BytesIO" not in str(refused.value)
    (tmp_path / "set/a/good.jpg").unlink()
    only = EvaluationSet(format="folder", path=str(tmp_path / "set"), templates="simple", on_skipped="report")
    with pytest.raises(DataError, match="16 samples in a row are unusable"):
        measured(root, only)


def on_each_rank(root: Path) -> list[Any]:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    kinds = ("webdataset", "retrieval")
    return [tuple(measured(root, config_of(root, kind, on_skipped="report"), ranks)) for kind in kinds]


def test_left_out_samples_are_counted_over_ranks(root: Path) -> None:
    for results in run_ranks(3, on_each_rank, root):
        for kind, result in zip(("webdataset", "retrieval"), results, strict=True):
            alone = measured(root, config_of(root, kind, on_skipped="report"))
            assert_same_metrics(result[0], alone.scores)
            assert result[1:4] == tuple(alone[1:4])


def test_left_out_count_is_in_rows_tables_and_logs(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = ModelConfig(name=f"local-dir:{root / 'model'}")
    towers, tokenizer = create(model).eval(), tokenizer_of(model)
    tree = {
        "mine": json.loads(
            config_of(root, "webdataset", on_skipped="report", metric="macro_f1").model_dump_json()
        ),
        "captions": json.loads(config_of(root, "retrieval", on_skipped="report").model_dump_json()),
    }
    config = EvaluateConfig.model_validate_json(json.dumps({"sets": tree, "workers": 0}))
    for _ in range(2):
        opened, options = open_all(config.sets, ALONE), Options("run", "fp32", 4, 0)
        results = Results(tmp_path)
        with results.writing_tables():
            rows = measure_all(*(towers, tokenizer, config.sets, opened, ALONE, results, options, {}))
        assert [(row["samples"], row["left_out"]) for row in rows] == [(GOOD, BROKEN + LOST)] * 2
        out = capsys.readouterr().out
        assert f"mine: {LOST} samples are left out: no image" in out
        assert f"% of {GOOD} samples, {BROKEN + LOST} left out" in out
        table = (tmp_path / "results.md").read_text()
        assert "| mine (macro F1) |" in table
        assert table.count(f"({BROKEN + LOST} left out)") == 3  # retrieval, accuracy and calibration
        assert "captions: 8 samples are 7 distinct images" in out  # the broken images have the same bytes
    caplog.clear()
    evaluate(towers, tokenizer, config, ALONE)
    assert f"mine: {GOOD} samples are measured, {BROKEN + LOST} are left out" in caplog.text


def test_known_sets_refuse_on_skipped(tmp_path: Path) -> None:
    tree = tiny.write_config(tmp_path)
    tree["evaluate"] = {"sets": {"pets": {"dataset": "pets", "path": "/data", "on_skipped": "report"}}}
    with pytest.raises(ValueError, match=r"evaluate.sets.pets.on_skipped: a known dataset is measured completely"):
        RunConfig.model_validate_json(json.dumps(tree))
