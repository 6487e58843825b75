"""TPGM: projections and their gradients, the learning of radii, and the command on a run with held-out images."""

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
import torch.distributed as dist
from distributed import run_ranks, run_script
from safetensors.torch import load_file
from torch import Tensor, nn

from dive_fast.distributed import Ranks, join
from dive_fast.errors import ConfigError
from dive_fast.evaluation import learned_radii
from dive_fast.evaluation.datasets.resolve import open_sets
from dive_fast.evaluation.learned_radii import Radii, Settings, learn_radii, project, radius_gradient, row_norms
from dive_fast.evaluation.unseen_images import Unseen, open_unseen, shared_with, warn_of_size
from dive_fast.methods.method import Part
from dive_fast.methods.run_config import RunConfig
from dive_fast.model import head as heads
from dive_fast.model import towers
from dive_fast.training import loop

ALONE = Ranks(0, 1, torch.device("cpu"))
ROOT = Path(__file__).parents[2]
SHAPES = ((4, 3), (5,), (1,), (3, 2, 2, 2))
NAMES = tuple(f"class number {i}" for i in range(5))


# Projections and gradients


def test_projection_equals_reference_numbers() -> None:
    anchor = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    change = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    norms, radius = row_norms(change, "l2"), torch.tensor(2.5, dtype=torch.float64)
    assert norms.tolist() == [5]
    torch.testing.assert_close(
        project(anchor, anchor + change, norms, radius) - anchor, change / 2, atol=1e-6, rtol=0
    )
    gradient = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    assert float(radius_gradient(gradient, change, norms, radius)) == pytest.approx(-1, abs=1e-6)
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    norms = row_norms(rows, "mars")
    assert norms.tolist() == [3, 7]
    projected = project(torch.zeros(2, 2), rows, norms, torch.tensor(3.5))
    torch.testing.assert_close(projected, torch.tensor([[1.0, 2.0], [1.5, 2.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["l2", "mars"])
@pytest.mark.parametrize("shape", SHAPES)
def test_radius_gradient_equals_autograd(norm: learned_radii.Norm, shape: tuple[int, ...]) -> None:
    anchor, change = torch.randn(2, *shape, dtype=torch.float64)
    norms = row_norms(change, norm)
    largest = float(norms.max())
    # Inside, with saturated rows, and with all rows saturated.
    for radius in (0.3 * float(norms.min()), float(norms.median()) * 1.001, 2 * largest):
        leaf = torch.tensor(radius, dtype=torch.float64, requires_grad=True)
        ratio = (leaf / (norms + 1e-8)).clamp(0, 1).reshape(-1, *[1] * (len(shape) - 1))
        projected = anchor + ratio * change
        (expected,) = torch.autograd.grad(projected.sin().sum() * 3, leaf)
        found = project(anchor, anchor + change, norms, leaf.detach())
        torch.testing.assert_close(found, projected.detach())
        torch.testing.assert_close(radius_gradient(3 * found.cos(), change, norms, leaf.detach()), expected)
        assert radius <= largest or expected == 0


def endpoints(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    anchors = {str(shape): torch.randn(shape, generator=generator) for shape in SHAPES}
    tuned = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in anchors.items()}
    return anchors | {"equal": torch.ones(3)}, tuned | {"equal": torch.ones(3)}


def test_radii_start_at_half_and_leave_equal_tensors_out() -> None:
    anchors, tuned = endpoints()
    radii = Radii(anchors, tuned, "l2")
    assert "equal" not in radii.names
    assert radii.alphas() == pytest.approx(dict.fromkeys(map(str, SHAPES), 0.5), abs=1e-6)
    rows = Radii(anchors, tuned, "mars")
    for name, value in zip(rows.names, rows.values, strict=True):
        change = (tuned[name] - anchors[name]).double()
        norms = change.abs().flatten(1).sum(1) if change.ndim > 1 else change.abs().sum()[None]
        torch.testing.assert_close(value, norms.min() / 2)
    # All the way: bit for bit the tuned tensors, where rows are saturated.
    rows.values = rows.values + 100
    assert all(torch.equal(projected, tuned[name]) for name, projected in rows.projected())
    rows.clamp()
    assert torch.equal(rows.values, rows.largest)
    rows.values = rows.values * -1
    rows.clamp()
    assert rows.values.tolist() == [1e-8] * len(SHAPES)


# Learning


def learned(
    norm: learned_radii.Norm, goal: float, **options: Any
) -> tuple[Radii, dict[str, nn.Parameter], learned_radii.History]:
    """Radii learned on the squared distance to the point at ``goal`` between both ends."""
    anchors, tuned = endpoints()
    radii = Radii(anchors, tuned, norm)
    parameters = {name: nn.Parameter(value.clone()) for name, value in tuned.items()}
    points = {name: torch.lerp(anchors[name], tuned[name], goal) for name in tuned}

    def loss(_: int) -> Tensor:
        return torch.stack([(parameters[name] - points[name]).square().sum() for name in points]).sum()

    history = learn_radii(radii, parameters, loss, range(150), 1e-2, **options)
    return radii, parameters, history


@pytest.mark.parametrize("norm", ["l2", "mars"])
def test_alphas_follow_the_better_end(norm: learned_radii.Norm) -> None:
    anchors, tuned = endpoints()
    for goal, end in ((1.5, tuned), (-0.5, anchors)):
        radii, parameters, history = learned(norm, goal)
        assert min(radii.alphas().values()) > 0.99 if goal > 1 else max(radii.alphas().values()) < 0.01
        for name in radii.names:
            torch.testing.assert_close(parameters[name].data, end[name], atol=2e-3, rtol=0)
        assert history.losses[-1] < history.losses[0]
        assert not history.skipped
        assert not history.unreached


def test_iterations_that_are_not_finite_change_nothing() -> None:
    anchors, tuned = endpoints()
    radii = Radii(anchors, tuned, "l2")
    parameters = {name: nn.Parameter(value.clone()) for name, value in tuned.items()}
    used, unused = radii.names[0], radii.names[1]

    def loss(factor: float) -> Tensor:
        return (parameters[used] * factor).sum()

    history = learn_radii(radii, parameters, loss, [float("nan"), float("inf")], 1e-2)
    assert history.skipped == 2
    assert radii.alphas() == pytest.approx(dict.fromkeys(radii.names, 0.5), abs=1e-6)
    # 3e34 times the scale of 2^16 is not finite in fp32, the gradient itself is.
    history = learn_radii(radii, parameters, loss, [3e34], 1e-2, loss_scale=learned_radii.LOSS_SCALE)
    assert history.skipped == 0
    assert radii.alphas()[used] != pytest.approx(0.5, abs=1e-6)
    assert radii.alphas()[unused] == pytest.approx(0.5, abs=1e-6)
    assert history.unreached == radii.names[1:]


# A run with held-out images


def with_set(tree: dict[str, Any], **sets: dict[str, Any] | None) -> RunConfig:
    """The config of a run with further evaluation sets, or without those that are None."""
    evaluate = tree["evaluate"] | {"sets": tree["evaluate"]["sets"] | sets}
    return RunConfig.model_validate_json(json.dumps(tree | {"evaluate": evaluate}))


def changed(tree: dict[str, Any], **target: Any) -> RunConfig:
    """The config with other keys of ``data.target``."""
    return with_set(tree | {"data": {"target": tree["data"]["target"] | target}}, val=None)


def train(tree: dict[str, Any]) -> None:
    Part.backend = "torch"
    config = RunConfig.model_validate_json(json.dumps(tree))
    loop.train(config, Path(tree["train"]["output"]), join())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config of a FLYP run that holds out 10 of 40 images, with its folder; ``val`` measures them."""
    folder = tmp_path_factory.mktemp("tpgm")
    tree = tiny.write_config(folder, max_steps=3, fast_blocks=False, learning_rate=1e-2)
    tree["data"] = {"target": tiny.write_target(folder / "target", count=40) | {"holdout": 0.25}}
    tree["objective"] = {"name": "flyp"}
    other = tiny.write_target(folder / "other", count=15)
    images = {f"{i:04d}": {"jpg": tiny.jpeg(700 + i), "cls": str(i % 5).encode()} for i in range(15)}
    tiny.write_tar(folder / "other/shard-00000.tar", images)
    target = tree["data"]["target"]
    sets = {
        "val": {key: target[key] for key in tiny.EVALUATION} | {"holdout": 0.25},
        "other": {key: other[key] for key in tiny.EVALUATION},
    }
    tree["evaluate"] = {"sets": sets, "workers": 0, "baseline": False}
    (folder / "config.json").write_text(json.dumps(tree))
    run_ranks(1, train, tree, init=False)
    return tree


@pytest.fixture(scope="module")
def weights(tree: dict[str, Any]) -> Path:
    return Path(tree["train"]["output"]) / "model.safetensors"


def chosen(config: RunConfig, weights: Path, learn_on: str | None = None) -> tuple[Unseen, dict[str, str]]:
    """The split, and the sets that are not reported."""
    opened = open_sets(config.evaluate.sets, ALONE)
    unseen = open_unseen(config, learn_on, weights, opened)
    return unseen, shared_with(unseen, opened)


def test_held_out_images_are_never_reported(tree: dict[str, Any], weights: Path) -> None:
    folder = weights.parents[1]
    (folder / "link").symlink_to("target")
    shutil.copytree(folder / "target", folder / "copied")
    val, other = tree["evaluate"]["sets"]["val"], tree["evaluate"]["sets"]["other"]
    complete = {key: val[key] for key in tiny.EVALUATION}
    config = with_set(
        tree,
        link=complete | {"path": str(folder / "link")},
        copied=complete | {"path": str(folder / "copied")},
    )
    unseen, shared = chosen(config, weights)
    assert unseen.name == "data.target.holdout = 0.25"
    assert len(unseen.source) == 10
    assert unseen.class_names == NAMES
    assert shared == {
        "val": "the radii are learned on 10 of its 10 images",
        "link": "the radii are learned on 10 of its 40 images",
        "copied": "the radii are learned on copies of 10 of its 40 images",
    }
    unseen, shared = chosen(with_set(tree, again=other), weights, "other")
    assert unseen.name == "evaluate.sets.other"
    assert shared == {
        "other": "the radii are learned on it",
        "again": "the radii are learned on 15 of its 15 images",
    }


def test_split_without_unseen_images_is_refused(
    tree: dict[str, Any], weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = tiny.write_reference(weights.parents[1] / "pairs")
    pairs = {"format": "webdataset", "path": reference["path"], "task": "retrieval"}
    for config, learn_on, message in (
        (changed(tree, holdout=None), None, r"holdout is not set, so .* --learn-on SET \(other\)"),
        (
            changed(tree, holdout=0.5),
            None,
            r"^data\.target\.holdout = 0\.5, but .* was trained with 0\.25: it may",
        ),
        (with_set(tree), "vall", r"evaluate\.sets has val, other; did you mean val\?"),
        (with_set(tree, pairs=pairs), "pairs", r"^--learn-on pairs: it has no labels"),
        (
            with_set(
                changed(tree, holdout=None).model_dump(), all={**tree["evaluate"]["sets"]["val"], "holdout": None}
            ),
            "all",
            r"^evaluate\.sets\.all: 40 of its 40 images are training images",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            chosen(config, weights, learn_on)
    # The images have changed since the run.
    target = tiny.write_target(weights.parents[1] / "larger", count=45) | {"holdout": 0.25}
    with pytest.raises(ConfigError, match=r"^data\.target: .* was trained on other images, or they have changed"):
        chosen(changed(tree, **target), weights)
    caplog.clear()
    chosen(changed(tree, **target), weights, "other")
    assert "whether it was trained on images of evaluate.sets.other is not known" in caplog.text


def test_copies_of_training_images_are_refused_unless_they_are_few(
    tree: dict[str, Any], weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    section = tree["evaluate"]["sets"]["other"]

    def of(name: str, seeds: Iterable[int]) -> dict[str, Any]:
        """A set of pictures by their seeds; those of the run are 0 to 39."""
        images = {f"{i:04d}": {"jpg": tiny.jpeg(seed), "cls": str(i % 5).encode()} for i, seed in enumerate(seeds)}
        tiny.write_tar(tmp_path / name / "0.tar", images)
        return section | {"path": str(tmp_path / name)}

    config = with_set(tree, same=of("same", range(40)), near=of("near", [*range(800, 820), 0]))
    message = r"^evaluate\.sets\.same: at least 30 of its 40 images are copies of .*; learn on other images$"
    with pytest.raises(ConfigError, match=message):
        chosen(config, weights, "same")
    caplog.clear()
    assert len(chosen(config, weights, "near")[0].source) == 21
    assert "evaluate.sets.near: at least 1 of its 21 images are copies of training images" in caplog.text
    # Pairs of equal images in the data that were trained on.
    twice = changed(tree, path=of("twice", [i // 2 for i in range(40)])["path"])
    with pytest.raises(
        ConfigError, match=r"^data\.target\.holdout = 0\.25: at least \d+ of its 10 images are copies"
    ):
        chosen(twice, tmp_path / "model.safetensors")


def test_run_is_known_by_its_checkpoint_and_by_its_folder(
    tree: dict[str, Any], weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = weights.parent / "checkpoints/step00000003"
    assert len(chosen(with_set(tree), checkpoint)[0].source) == 10
    with pytest.raises(ConfigError, match=r"step00000003 was trained with 0\.25"):
        chosen(changed(tree, holdout=0.5), checkpoint)
    # Trained on all images.
    record = json.loads((weights.parent / "config.json").read_text())
    del record["identity"]["data"]["target"]["holdout"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"^data\.target\.holdout = 0\.25, but .* was trained without it"):
        chosen(with_set(tree), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert "is not known" not in caplog.text
    assert len(chosen(with_set(tree), tmp_path / "model.safetensors")[0].source) == 10
    assert "whether it was trained on its held-out images is not known" in caplog.text


def test_few_images_are_reported(tree: dict[str, Any], weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    unseen, _ = chosen(with_set(tree), weights)
    caplog.clear()
    warn_of_size(unseen, 4)
    warn_of_size(unseen, 64)
    first, second = (record.message for record in caplog.records)
    assert first.startswith(
        "data.target.holdout = 0.25: 10 images of 5 classes are less than 10 per class: the radii"
    )
    assert second.startswith("data.target.holdout = 0.25: 10 images are less than a batch of 64: the radii fit")


def with_head(run: Path, folder: Path) -> Path:
    """The weights of a run with a head next to them."""
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "open_clip_config.json"):
        shutil.copy(run / name, folder)
    torch.manual_seed(1)
    heads.save(heads.Head(torch.randn(5, 24), torch.randn(5), NAMES), folder / "head.safetensors")
    return folder / "model.safetensors"


@pytest.fixture(autouse=True)
def _plain_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Part, "backend", "torch")


def results(tree: dict[str, Any], paths: list[Path], seed: int = 0) -> list[learned_radii.Projected]:
    ranks = ALONE
    if dist.is_initialized():
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    settings = Settings(iterations=4, batch_size=6, seed=seed)
    return [learned_radii.tpgm(with_set(tree), path, ranks, settings) for path in paths]


def reports(tree: dict[str, Any], paths: list[Path]) -> list[dict[str, Any]]:
    Part.backend = "torch"  # on a rank, whose process no fixture changes
    return [result.report for result in results(tree, paths)]


def test_alphas_are_equal_on_two_ranks(tree: dict[str, Any], weights: Path, tmp_path: Path) -> None:
    paths = [weights, with_head(weights.parent, tmp_path / "head")]
    alone = reports(tree, paths)
    assert [report["loss"] for report in alone] == ["contrastive", "cross-entropy"]
    shared, again = run_ranks(2, reports, tree, paths)
    for one, two in zip(alone, shared, strict=True):
        assert two["alphas"] == pytest.approx(one["alphas"], abs=1e-4)
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert len({round(alpha, 3) for alpha in one["alphas"].values()}) > 10
    assert [report["alphas"] for report in shared] == [report["alphas"] for report in again]
    # The same seed, the same alphas; another order of images gives others.
    assert reports(tree, paths[:1])[0]["alphas"] == alone[0]["alphas"]
    (other,) = results(tree, paths[:1], seed=1)
    assert other.report["alphas"] != alone[0]["alphas"]


def test_projected_weights_lie_between_both_ends(tree: dict[str, Any], weights: Path, tmp_path: Path) -> None:
    path = with_head(weights.parent, tmp_path / "head")
    (result,) = results(tree, [path])
    model = towers.create(with_set(tree).model)
    before, after = model.export(model.state_dict()), load_file(path)
    report = result.report
    for name, alpha in report["alphas"].items():
        if not name.startswith("head."):
            torch.testing.assert_close(result.weights[name], torch.lerp(before[name], after[name], alpha))
    assert report["head"] == "projected"
    assert result.head is not None
    trained = heads.load(path.parent / "head.safetensors")
    share = (result.head.bias / trained.bias).mean()  # the anchor's is 0
    assert float(share) == pytest.approx(report["alphas"]["head.bias"], abs=1e-5)
    # Nothing in the text tower moves the loss of the head.
    assert "token_embedding.weight" in report["unreached"]
    assert report["alphas"]["token_embedding.weight"] == pytest.approx(0.5, abs=1e-6)
    random = with_set(tree | {"objective": {"name": "vanilla_ft", "head_start": "random"}})
    kept = learned_radii.tpgm(random, path, ALONE, Settings(iterations=1, batch_size=6))
    assert kept.head is not None
    assert torch.equal(kept.head.weight, trained.weight)
    assert kept.report["head"] == "kept"
    assert not any(name.startswith("head.") for name in kept.report["alphas"])


def test_weights_that_cannot_be_projected_are_refused(tree: dict[str, Any], weights: Path, tmp_path: Path) -> None:
    path = with_head(weights.parent, tmp_path / "head")
    heads.save(heads.Head(torch.randn(4, 24), torch.randn(4), NAMES[:4]), path.parent / "head.safetensors")
    with pytest.raises(ConfigError, match=r"the head has no class 'class number 4'"):
        results(tree, [path])
    path.with_name("head.safetensors").unlink()
    model = towers.create(with_set(tree).model)
    towers.save(model.export(model.state_dict()), path)
    with pytest.raises(ConfigError, match=r"they equal the pre-trained weights"):
        results(tree, [path])
    state = model.export(model.state_dict())
    state["visual.proj"][0, 0] = math.nan
    towers.save(state, path)
    with pytest.raises(ConfigError, match=r"model\.safetensors: visual\.proj is not finite; name other weights"):
        results(tree, [path])


def test_tpgm_command_writes_model_report_and_figure(tree: dict[str, Any], weights: Path, tmp_path: Path) -> None:
    options = ("--iterations", "3", "--batch-size", "8", "--norm", "mars", "--output", str(tmp_path / "out"))
    done = run_script("launch/tpgm.py", "--config", str(weights.parent), *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "val is not reported: the radii are learned on 10 of its 10 images\n" in done.stdout
    assert "data.target.holdout = 0.25: the radii are learned on 10 images of 5 classes\n" in done.stdout
    lines = done.stdout.splitlines()
    start = lines.index("weights      other")
    report = json.loads((tmp_path / "out/tpgm.json").read_text())
    for line, row in zip(lines[start + 1 :], report["accuracies"], strict=False):
        assert line == f"{row['weights']:11}  {100 * row['other']:5.1f}"
    assert [row["weights"] for row in report["accuracies"]] == ["pre-trained", "tuned", "alpha = 0.5", "TPGM"]
    assert (report["norm"], report["iterations"], report["batch_size"], report["seed"]) == ("mars", 3, 8, 0)
    assert (report["split"]["images"], len(report["losses"])) == (10, 3)
    assert (tmp_path / "out/tpgm.png").read_bytes().startswith(b"\x89PNG")
    model = open_clip.create_model(tree["model"]["name"], load_weights=False)
    open_clip.load_checkpoint(model, str(tmp_path / "out/tpgm.safetensors"))
    assert not torch.equal(model.state_dict()["visual.proj"], load_file(weights)["visual.proj"])
    refused = run_script(
        "launch/tpgm.py",
        "--config",
        str(weights.parent),
        "data.target.holdout=0.5",
        "evaluate.sets.val.holdout=0.5",
        "--output",
        str(tmp_path / "none"),
        cwd=ROOT,
    )
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "was trained with 0.25" in line
    assert not (tmp_path / "none").exists()
