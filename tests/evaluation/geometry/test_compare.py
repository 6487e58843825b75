"""Geometry of two checkpoints on the same pairs: embeddings, report, command and figures."""

import dataclasses
import io
import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
import torch.distributed as dist
from distributed import run_ranks, run_script
from PIL import Image
from torch import Tensor

from dive_fast.config.schema import Config, Loader
from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.data.spread import spread
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError, DataError
from dive_fast.evaluation.datasets import set_loader
from dive_fast.evaluation.geometry import compare, figures, measures
from dive_fast.evaluation.geometry import embed as embed_module
from dive_fast.evaluation.geometry.embed import describe_pairs, embed, open_pairs
from dive_fast.methods.run_config import RunConfig
from dive_fast.model import towers
from dive_fast.model.features import Pairs
from dive_fast.training.forgetting_probe import PairMeasure

ALONE = Ranks(0, 1, torch.device("cpu"))
ROOT = Path(__file__).parents[3]
COUNT, BROKEN = 11, 4
SHARES = [(2, None), (100, None), (3, 5)]
"""Batch sizes and limits."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, a tuned model in its run folder, and pairs with one broken image."""
    root = tmp_path_factory.mktemp("movement")
    tree = tiny.write_config(root)
    tree["evaluate"] = {"batch_size": 4, "workers": 0}
    model = towers.create(RunConfig.model_validate_json(json.dumps(tree)).model)
    torch.manual_seed(0)
    moved = {name: value + 0.05 * torch.randn(value.shape) for name, value in model.state_dict().items()}
    (root / "run").mkdir()
    towers.save(model.export(moved), root / "run/model.safetensors")
    (root / "config.json").write_text(json.dumps(tree))
    samples = {
        f"{i:02d}": {"jpg": tiny.jpeg(i), "txt": f"caption {i}{' and so on' * (i % 3)}".encode()}
        for i in range(COUNT)
    }
    samples[f"{BROKEN:02d}"]["jpg"] = samples[f"{BROKEN:02d}"]["jpg"][:200]
    tiny.write_tar(root / "pairs/0.tar", samples)
    return root


def config_of(folder: Path) -> Config:
    return RunConfig.model_validate_json((folder / "config.json").read_text())


def embedded(folder: Path, ranks: Ranks, batch_size: int, limit: int | None) -> Pairs:
    config = config_of(folder)
    model = towers.create(config.model)
    samples = open_pairs(config.model, describe_pairs(config.data.reference, str(folder / "pairs")), model)
    return embed(model, samples, ranks, batch_size, limit=limit)


def by_open_clip(folder: Path, chosen: list[int]) -> Pairs:
    """The same embeddings by open_clip alone."""
    name = config_of(folder).model.name
    model: Any = open_clip.create_model(name).eval()
    tokenizer, transform = open_clip.get_tokenizer(name), open_clip.image_transform(32, is_train=False)
    images = torch.stack([transform(Image.open(io.BytesIO(tiny.jpeg(i)))) for i in chosen])
    captions = tokenizer([f"caption {i}{' and so on' * (i % 3)}" for i in chosen])
    with torch.no_grad():
        return Pairs(model.encode_image(images, normalize=True), model.encode_text(captions, normalize=True))


def on_each_rank(folder: Path) -> list[tuple[Tensor, Tensor]]:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    return [tuple(embedded(folder, ranks, *share)) for share in [*SHARES, (4, 1)]]  # type: ignore[misc]


def test_embed_is_equal_on_any_number_of_ranks(folder: Path) -> None:
    # The fifth pair has a broken image, and is one of the 5 that are spread over 11.
    chosen = {None: [i for i in range(COUNT) if i != BROKEN], 5: [0, 2, 6, 8], 1: [0]}
    assert spread(COUNT, 5) == [0, 2, 4, 6, 8]
    # With two ranks and one pair, one rank has no pair.
    for results in (
        [[tuple(embedded(folder, ALONE, *share)) for share in SHARES]],
        run_ranks(2, on_each_rank, folder),
    ):
        for on_rank in results:
            for (_, limit), pairs in zip([*SHARES, (4, 1)], on_rank, strict=False):
                for half, expected in zip(pairs, by_open_clip(folder, chosen[limit]), strict=True):
                    assert half.dtype == torch.float32
                    torch.testing.assert_close(half, expected, rtol=0, atol=2e-6)


def test_spread_is_even() -> None:
    assert spread(10, None) == spread(10, 10) == spread(10, 99) == list(range(10))
    assert spread(10, 3) == [0, 3, 6]
    for count, limit in itertools.product((1, 7, 100), (1, 3, 7)):
        indices = spread(count, limit)
        assert len(set(indices)) == len(indices) == min(count, limit)
        assert max(indices) < count
    assert spread(0, 5) == []


def test_embed_runs_in_fp32_and_restores_towers(folder: Path) -> None:
    config = config_of(folder)
    model = towers.create(config.model).train()
    samples = open_pairs(config.model, describe_pairs(config.data.reference), model)
    exact = embed(model, samples, ALONE, 8)
    model.autocast = torch.bfloat16
    with_autocast = embed(model, samples, ALONE, 8)
    assert torch.equal(exact.image, with_autocast.image)
    assert torch.equal(exact.text, with_autocast.text)
    assert model.autocast == torch.bfloat16
    assert model.training
    assert not exact.image.requires_grad


@pytest.mark.parametrize(("requested", "used"), [("plain", "plain"), ("dali", "dali"), ("ffcv", "plain")])
def test_pairs_are_loaded_as_configured(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    requested: Loader,
    used: Loader,
) -> None:
    loaders = []

    def with_plain(samples: Any, keys: Any, batch_size: int, options: Options) -> Any:
        loaders.append(options.loader)
        return batches_of(samples, keys, batch_size, dataclasses.replace(options, loader="plain"))

    monkeypatch.setattr(embed_module, "batches_of", with_plain)
    monkeypatch.setattr(set_loader, "_is_installed", lambda loader: True)
    config = config_of(folder)
    options = config.evaluate.model_copy(update={"loader": requested})
    data = describe_pairs(config.data.reference)
    compare.embed_both(config.model, options, None, folder / "run/model.safetensors", data, ALONE, 5)
    assert loaders == [used] * 2
    assert ("loader plain instead of ffcv" in capsys.readouterr().out) == (requested != used)
    measure = PairMeasure(
        "probe", open_pairs(config.model, data, model := towers.create(config.model)), 5, ALONE, options
    )
    measure.embed(model)
    assert loaders[2:] == [used]
    assert measure.identity()["loader"] == used


def test_pairs_of_any_format_use_the_evaluation_view(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder)
    assert config.data.reference is not None
    assert describe_pairs(config.data.reference) is config.data.reference
    csv = tmp_path / "pairs.csv"
    csv.write_text("title\tfilepath\n" + "".join(f"caption {i}\t{i}.jpg\n" for i in range(3)))
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / f"images/{i}.jpg").write_bytes(tiny.jpeg(i))
    model = towers.create(config.model)
    listed = describe_pairs(config.data.reference, str(csv), image_root=str(tmp_path / "images"))
    assert listed.format == "csv"
    embedded = embed(model, open_pairs(config.model, listed, model), ALONE, 8)
    torch.testing.assert_close(embedded.image, by_open_clip(folder, [0, 1, 2]).image, rtol=0, atol=2e-6)
    (tmp_path / "manifest.json").touch()
    assert describe_pairs(config.data.reference, str(tmp_path)).format == "prepared"
    assert describe_pairs(config.data.reference, "there/{0..9}.tar").format == "webdataset"
    assert describe_pairs(config.data.reference, str(csv), "webdataset").format == "webdataset"
    crops = config.data.reference.model_copy(update={"views": 3})
    assert open_pairs(config.model, crops, model).views == "eval"
    with pytest.raises(ConfigError, match="--image-root: only csv data has one"):
        describe_pairs(config.data.reference, "there", "webdataset", "images")
    with pytest.raises(ConfigError, match="they describe the set of --pairs"):
        describe_pairs(config.data.reference, None, "csv")
    with pytest.raises(ConfigError, match=r"data\.reference: the config has no pairs .* --pairs"):
        describe_pairs(None)


def test_embed_both_uses_weights_of_each_side(folder: Path) -> None:
    config, tuned = config_of(folder), folder / "run/model.safetensors"
    data = describe_pairs(config.data.reference)
    both = compare.embed_both(config.model, config.evaluate, None, tuned, data, ALONE)
    swapped = compare.embed_both(config.model, config.evaluate, tuned, tuned, data, ALONE, limit=7)
    assert torch.equal(swapped.before.image, swapped.after.image)
    torch.testing.assert_close(swapped.before.text, both.after.text[spread(24, 7)], rtol=0, atol=2e-6)
    model = towers.create(config.model)
    before = embed(model, open_pairs(config.model, data, model), ALONE, 4)
    assert torch.equal(before.image, both.before.image)
    labels = {"model": "tiny", "before": "pre-trained", "after": str(tuned), "pairs": data.path}
    assert both.num_available == swapped.num_available == 24
    report = compare.measure(both, labels)
    assert report == {
        **labels,
        "num_pairs": 24,
        "num_available": 24,
        "num_undecodable": 0,
        "num_skipped": 0,
        "metrics": measures.compare(both.before, both.after),
        "metrics_before": measures.describe(both.before),
    }
    assert 0 < report["metrics"]["rsa"] < 1
    first, second = (Pairs(half.image[:2], half.text[:2]) for half in both[:2])
    two_pairs = compare.Embedded(first, second, 24)
    with pytest.raises(DataError, match=rf"^{data.path}: images and captions: .* at least 3, got 2 and 2$"):
        compare.measure(two_pairs, labels)


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script("launch/geometry.py", "--config", str(folder / "config.json"), *arguments, cwd=ROOT)


def test_geometry_command_writes_report_and_figures(folder: Path, tmp_path: Path) -> None:
    lines = [{"step": step, "image_norm": 0.1 * step, "rsa": None} for step in (1, 2, 3)]
    (folder / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "out"
    done = call(folder, "--pairs", str(folder / "pairs"), "--limit", "9", "--output", str(output))
    assert done.returncode == 0, done.stderr
    report = json.loads((output / "geometry.json").read_text())
    assert report["num_pairs"] == 9 - 1
    assert report["num_available"] == COUNT
    assert report["before"] == "pre-trained"
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("RSA")]
    assert row.split()[1:] == [f"{report['metrics'][f'rsa{half}']:.4f}" for half in ("_image", "_text", "")]
    figure_files = sorted(path.name for path in output.glob("*.png"))
    assert figure_files == ["geometry_course.png", "geometry_differences.png", "geometry_rsa.png"]
    assert all(str(output / name) in done.stdout for name in figure_files)
    assert not list(output.glob(".*"))


def test_geometry_command_reports_error_in_one_line(folder: Path, tmp_path: Path) -> None:
    refused = call(folder, "--after", str(tmp_path / "nowhere.safetensors"))
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "nowhere.safetensors: no such file or folder" in line
    assert "Traceback" not in refused.stderr


def test_embed_both_rejects_weights_of_another_model(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder)
    towers.save({"some": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"other\.safetensors: not weights of local-dir:"):
        compare.embed_both(
            config.model,
            config.evaluate,
            None,
            tmp_path / "other.safetensors",
            describe_pairs(config.data.reference),
            ALONE,
        )


# Figures


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert len(set(picture.convert("L").getdata())) > 10
        return picture.size


def test_figures_of_unchanged_models_and_few_pairs(folder: Path, tmp_path: Path) -> None:
    model = embedded(folder, ALONE, 4, 3)
    figures.draw_differences(model, model, tmp_path / "a.png")
    figures.draw_rsa(model, model, measures.compare(model, model), tmp_path / "b.png")
    assert size(tmp_path / "a.png")[0] > 1000
    assert size(tmp_path / "b.png")[0] > 1000


def test_principal_axes_hold_most_squared_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "BLOCK", 7)
    rows = torch.zeros(40, 5)
    rows[:, 3] = -2.0  # shared by all rows: the first axis, although nothing varies along it
    rows[:, 1] = torch.linspace(-1, 1.5, 40)
    rows[::2, 0] = 0.1
    halves = Pairs(rows[:20], rows[20:])
    vectors = measures.differences(Pairs(*map(torch.zeros_like, halves)), halves)
    axes, shares = figures._principal_axes(vectors)
    assert [tuple(half.shape) for half in figures._per_block(vectors, measures.lengths_of)] == [(20,), (20,)]
    assert axes[:, 0].abs().argmax() == 3
    assert axes[:, 1].abs().argmax() == 1
    # The mean of the rows is on the positive side of each axis.
    assert bool(((rows.double() @ axes).mean(0) > 0).all())
    squares = rows.double().square().sum()
    assert shares == pytest.approx([float((rows.double() @ axis).square().sum() / squares) for axis in axes.T])


def test_course_draws_the_metrics_that_exist(tmp_path: Path) -> None:
    plain = [{"step": step, "loss": 1.0, "image_norm": None} for step in range(5)]
    assert not figures.has_course(plain)
    batches = [{"step": step, "image_norm": 0.1 * step, "text_norm": 0.0} for step in (1, 10, 20)]
    figures.draw_course(batches, tmp_path / "one.png")
    measured = [{"step": 10 * k, "geometry/rsa": 1 - 0.1 * k, "geometry/average_loss": 1e-6 * k} for k in range(3)]
    figures.draw_course(batches + measured, tmp_path / "three.png")
    assert size(tmp_path / "three.png")[0] == pytest.approx(3 * size(tmp_path / "one.png")[0], abs=2)
    # Before the first update difference vectors are only rounding, and RSA is 1.
    assert not figures.has_course(batches[:1])
    assert figures._points(batches, "image_norm") == [(10, 1.0), (20, 2.0)]
    assert figures._points(measured, "geometry/rsa")[0] == (0, 1)
