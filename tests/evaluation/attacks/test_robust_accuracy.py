"""Accuracy under attack: against the package and the plain evaluation, on any number of ranks and in any batch."""

import io
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from distributed import run_ranks
from interrupted_attack import interrupt_at
from torch import Tensor

from dive_fast.attacks.threat import gradient
from dive_fast.config.schema import EvaluationSet, ModelConfig
from dive_fast.data.demo import splits, world
from dive_fast.data.loaders.loader import Options
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError, DataError
from dive_fast.evaluation.attacks.attack_options import AttackOptions, attackable, check_installed
from dive_fast.evaluation.attacks.auto_attack import auto_attack, num_targets
from dive_fast.evaluation.attacks.block_log import BlockLog
from dive_fast.evaluation.attacks.robust_accuracy import (
    Outcome,
    UnderAttack,
    UnitImageModel,
    chosen_samples,
    robust_accuracy,
)
from dive_fast.evaluation.classifier import Classifier
from dive_fast.evaluation.datasets.evaluation_set import Labelled
from dive_fast.evaluation.datasets.resolve import open_evaluation
from dive_fast.evaluation.zero_shot import classifier_for, measure
from dive_fast.model.head import Head
from dive_fast.model.towers import Towers, create, tokenizer_of

ALONE = Ranks(0, 1, torch.device("cpu"))
COUNT, BATCH = 16, 6
DEMO = ModelConfig(name="demo")
STEPS, FEW_STEPS = 8, 3
"""Steps of an attack that falls with the distance, and of one that must only change some predictions."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of the demo, each fifth label wrong, and the same with two broken images."""
    folder = tmp_path_factory.mktemp("pictures")
    samples: dict[str, dict[str, bytes]] = {}
    for index in range(COUNT):
        sample = splits.sample("zs_colour", index)
        content = io.BytesIO()
        sample.image.save(content, "PNG")
        label = (sample.label + (index % 5 == 4)) % len(world.COLOURS)
        samples[f"{index:03d}"] = {"png": content.getvalue(), "cls": str(label).encode()}
    tiny.write_tar(folder / "good/0.tar", samples)
    broken = {key: parts | ({"png": b"broken"} if key in ("001", "008") else {}) for key, parts in samples.items()}
    tiny.write_tar(folder / "broken/0.tar", broken)
    (folder / "names.txt").write_text("\n".join(world.COLOURS) + "\n")
    return folder


def opened(root: Path, kind: str = "good", **more: Any) -> Labelled:
    names, templates = str(root / "names.txt"), world.COLOUR_TEMPLATES[0]
    config = EvaluationSet(
        format="webdataset", path=str(root / kind), class_names=names, templates=templates, **more
    )
    data = open_evaluation(config, "evaluate.sets.mine")
    assert isinstance(data, Labelled)
    return data


def options(eps: float = 4.0, **more: Any) -> AttackOptions:
    return AttackOptions(**({"name": "apgd-ce", "eps": (eps,), "steps": STEPS} | more))


def attacked(
    data: Labelled,
    attack: AttackOptions,
    *,
    ranks: Ranks = ALONE,
    batch_size: int = BATCH,
    log: BlockLog | None = None,
    towers: Towers | None = None,
    head: Head | None = None,
    classes: Classifier | None = None,
) -> UnderAttack:
    towers = create(DEMO).eval() if towers is None else towers
    classes = classes or classifier_for(towers, tokenizer_of(DEMO), data, ranks, head)
    loader = Options(device=ranks.device)
    return robust_accuracy(
        towers, classes, data, ranks, attack, attack.eps[0], batch_size=batch_size, loader=loader, log=log
    )


def plain(data: Labelled, head: Head | None = None) -> float:
    towers, tokenizer = create(DEMO).eval(), tokenizer_of(DEMO)
    return measure(towers, tokenizer, data, ALONE, batch_size=BATCH, workers=0, head=head).scores["top1"]


def test_clean_accuracy_is_that_of_the_evaluation(root: Path) -> None:
    data = opened(root)
    result = attacked(data, options(0.0))
    assert (result.clean, result.robust) == (plain(data),) * 2
    assert 0.5 < result.clean < 1
    assert (result.samples, result.left_out, result.not_finite) == (COUNT, 0, 0)


def test_unit_images_have_the_logits_of_the_evaluation(root: Path) -> None:
    towers, data = create(DEMO).eval(), opened(root)
    classes = classifier_for(towers, tokenizer_of(DEMO), data, ALONE)
    model = UnitImageModel(towers, classes)
    images = torch.stack([tiny.shown(towers.preprocess, data.source.image(row)) for row in range(4)])
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (towers.preprocess.mean, towers.preprocess.std))
    with torch.no_grad():
        expected = classes.logits(torch.nn.functional.normalize(towers.encode_image(images), dim=1))
        logits = model(images * std + mean)
    torch.testing.assert_close(logits, expected * towers.scale(), rtol=0, atol=1e-3)
    assert float(towers.scale()) > 5


def test_accuracy_falls_with_eps(root: Path) -> None:
    data = opened(root)
    for norm, distances in (("linf", (0.0, 4.0, 16.0)), ("l2", (0.0, 128.0, 1024.0))):
        values = [attacked(data, options(eps, norm=norm)).robust for eps in distances]
        assert values[0] > values[1] > values[2] == 0


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_is_within_one_sample_of_the_package(root: Path, norm: str) -> None:
    autopgd = pytest.importorskip("pyautoattack.autopgd_base")
    data, eps = opened(root), {"linf": 2.0, "l2": 64.0}[norm]
    ours = attacked(data, options(eps, norm=norm, steps=100))
    towers = create(DEMO).eval()
    model = UnitImageModel(towers, classifier_for(towers, tokenizer_of(DEMO), data, ALONE)).requires_grad_(False)
    images, labels = unit_images(data, towers)
    attack = autopgd.APGDAttack(
        model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps / 255, seed=0, device="cpu"
    )
    is_right = gradient(model, attack.perturb(images, labels), labels).is_right
    theirs = int(is_right.sum()) / COUNT
    assert ours.robust <= theirs + 1.5 / COUNT
    assert 0 < ours.robust < ours.clean


def unit_images(data: Labelled, towers: Towers) -> tuple[Tensor, Tensor]:
    """The images of a set in [0, 1], and its labels."""
    rows = range(len(data.source))
    images = torch.stack([tiny.shown(towers.preprocess, data.source.image(row)) for row in rows])
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (towers.preprocess.mean, towers.preprocess.std))
    labels = torch.tensor([data.source.sample(row).label for row in rows])
    return (images * std + mean).clamp(0, 1), labels


def outcomes_of(root: Path, folder: Path, ranks: Ranks, batch_size: int, attack: AttackOptions) -> dict[int, int]:
    """Outcomes of all samples in fp64, in which no sample is on the edge of rounding."""
    log = BlockLog(folder / f"{ranks.world_size}-{batch_size}.jsonl")
    attacked(
        opened(root), attack, ranks=ranks, batch_size=batch_size, log=log, towers=create(DEMO).eval().double()
    )
    return log.read(COUNT)


def on_each_rank(root: Path, folder: Path, attack: AttackOptions) -> dict[int, int]:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    result = outcomes_of(root, folder, ranks, 5, attack)
    dist.barrier()
    return result


@pytest.mark.parametrize("samples", [pytest.param(None, marks=pytest.mark.slow), 8])
def test_outcomes_do_not_depend_on_batches_and_ranks(root: Path, tmp_path: Path, samples: int | None) -> None:
    attack = options(2.0, samples=samples, steps=FEW_STEPS)
    alone = outcomes_of(root, tmp_path, ALONE, 4, attack)
    assert len(alone) == (samples or COUNT)
    assert {Outcome.FALLEN, Outcome.ROBUST} <= set(alone.values())
    assert outcomes_of(root, tmp_path, ALONE, 1, attack) == alone
    main, _ = run_ranks(2, on_each_rank, root, tmp_path, attack)
    assert main == alone


def test_interrupted_set_resumes_after_its_blocks(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, attack, log = opened(root), options(2.0, steps=FEW_STEPS), BlockLog(tmp_path / "log/a.jsonl")
    complete = attacked(data, attack)
    batches = interrupt_at(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        attacked(data, attack, log=log)
    with (tmp_path / "log/a.jsonl").open("a") as file:
        file.write('{"positions": [12, 1')  # a process that was killed while it wrote
    assert sorted(log.read(COUNT)) == list(range(2 * BATCH))
    # Another batch size, as after a change of the machine.
    assert attacked(data, attack, log=log, batch_size=4) == complete
    assert [number for numbers in batches[3:] for number in numbers] == list(range(2 * BATCH, COUNT))
    assert len(log.read(COUNT)) == COUNT
    log.remove()
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    "line", ["no json", '{"positions": [99], "outcomes": "1"}', '{"positions": [1], "outcomes": "11"}', "[1]"]
)
def test_invalid_log_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{line}\n")
    with pytest.raises(DataError, match=r"a\.jsonl: line 1 is not a block: .*; remove the file"):
        BlockLog(tmp_path / "a.jsonl").read(COUNT)


def test_broken_images_are_left_out_or_an_error(root: Path) -> None:
    with pytest.raises(DataError, match="on_skipped=report"):
        attacked(opened(root, "broken"), options())
    data = opened(root, "broken", on_skipped="report")
    result = attacked(data, options(2.0, steps=FEW_STEPS))
    assert (result.samples, result.left_out) == (COUNT - 2, 2)
    assert result.clean == plain(data)


def test_head_and_members_classify_as_in_the_evaluation(root: Path) -> None:
    data = opened(root)
    towers = create(DEMO).eval()
    prompts = classifier_for(towers, tokenizer_of(DEMO), data, ALONE)
    count = len(world.COLOURS)
    head = Head(prompts.weight * prompts.scale, torch.zeros(count), tuple(world.COLOURS))
    attack = options(2.0, steps=FEW_STEPS)
    by_head, by_prompts = attacked(data, attack, head=head), attacked(data, attack)
    assert by_head.clean == plain(data, head)
    assert by_head == by_prompts
    # Each label has its class and, as a second one, a class that is never the largest: nothing changes.
    doubled = torch.cat([prompts.weight, prompts.weight - prompts.weight.sum(0) * 10])
    members = tuple((label, count + label) for label in range(count))
    several = Classifier("prompts", doubled, None, members, prompts.scale)
    assert torch.equal(
        several.logits(prompts.weight).argmax(1), prompts._replace(members=None).logits(prompts.weight).argmax(1)
    )
    assert attacked(data, attack, classes=several) == by_prompts


def test_gradient_through_members_is_that_of_the_largest() -> None:
    classes = Classifier("prompts", torch.eye(4), None, ((0, 2), (1,), (3,)))
    features = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    (by_features,) = torch.autograd.grad(classes.logits(features)[0, 0], features)
    assert by_features.tolist() == [[0, 0, 1, 0]]


def test_parameters_stay_as_they_were(root: Path) -> None:
    towers = create(DEMO).train()
    towers.logit_scale.requires_grad_(False)
    before = [parameter.requires_grad for parameter in towers.parameters()]
    attacked(opened(root), options(2.0, samples=4, steps=FEW_STEPS), towers=towers)
    assert [parameter.requires_grad for parameter in towers.parameters()] == before
    assert all(parameter.grad is None for parameter in towers.parameters())
    assert towers.training


def test_samples_without_finite_gradient_are_counted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = UnitImageModel.forward

    def forward(model: UnitImageModel, images: Tensor) -> Tensor:
        logits = original(model, images)
        return torch.where(logits.amax(1, keepdim=True) > 20, logits * torch.nan, logits)

    monkeypatch.setattr(UnitImageModel, "forward", forward)
    result = attacked(opened(root), options(0.01, steps=2))
    assert result.not_finite > 0
    assert result.robust <= result.clean - result.not_finite / COUNT + 1e-9


def test_chosen_samples_are_fixed_and_nested() -> None:
    few, many = (chosen_samples(100, options(samples=count)) for count in (10, 40))
    assert few == chosen_samples(100, options(samples=10)) == sorted(few)
    assert set(few) < set(many)
    assert few != chosen_samples(100, options(samples=10, seed=1))
    assert chosen_samples(5, options(samples=9)) == chosen_samples(5, options()) == list(range(5))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eps": (-1.0,)}, "eps = -1: expected a finite number of at least 0"),
        ({"eps": (float("nan"),)}, "eps = nan"),
        ({"eps": (4.0, 256.0)}, "eps = 256: any image is within 255/255 in linf; use at most 255"),
        ({"eps": ()}, "name at least one distance"),
        ({"name": "fgsm"}, "attack = 'fgsm': expected one of apgd-ce, pgd, autoattack"),
        ({"norm": "l1"}, "norm = 'l1': expected one of linf, l2"),
        ({"steps": 0}, "attack steps = 0"),
        ({"samples": 0}, "attack samples = 0"),
        ({"name": "autoattack"}, "AutoAttack's numbers of steps are fixed"),
    ],
)
def test_impossible_options_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttackOptions(**({"name": "apgd-ce", "eps": (4.0,), "steps": STEPS} | wrong))


def test_attackable_refuses_sets_without_enough_classes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(root)
    assert attackable({"mine": data}, "autoattack") == {"mine": data}
    three = Labelled(data.source, data.class_names, data.templates, members=((0,), (1,), (2,)))
    with pytest.raises(ConfigError, match="few has 3 classes, and the targeted attack needs 4"):
        attackable({"few": three}, "autoattack")
    assert attackable({"few": three}, "apgd-ce") == {"few": three}
    with pytest.raises(ConfigError, match="attack = pgd: none of the sets has labels"):
        attackable({}, "pgd")
    monkeypatch.setattr("dive_fast.evaluation.attacks.attack_options.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dive_fast\[attacks\]'"):
        check_installed("autoattack")


@pytest.mark.slow
def test_pgd_is_no_stronger_than_apgd(root: Path) -> None:
    data = opened(root)
    by_pgd, by_apgd = attacked(data, options(2.0, name="pgd", steps=10)), attacked(data, options(2.0, steps=100))
    assert by_apgd.robust <= by_pgd.robust < by_pgd.clean


class Brightest(torch.nn.Module):
    """Classifies an image by the row of pixels with the largest sum."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: Tensor) -> Tensor:
        return 5 * images[:, :, : self.classes].mean((1, 3))


@pytest.mark.slow
def test_auto_attack_breaks_exactly_what_can_be_broken() -> None:
    pytest.importorskip("pyautoattack")
    # The label's row is brighter by this margin; an attack that changes each value by eps closes 2 eps.
    margins = (0.02, 0.05, 0.1, 0.3)
    images, labels = torch.full((len(margins), 3, 8, 8), 0.5), torch.arange(len(margins))
    for row, margin in enumerate(margins):
        images[row, :, row] += margin
    from dive_fast.attacks.threat import Threat

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    model, threat = Brightest(5), Threat("linf", 0.04)
    is_robust, is_finite = auto_attack(model, images, labels, threat, 0, num_targets(5))
    assert is_robust.tolist() == [False, False, True, True]
    assert is_finite.all()
    assert torch.equal(state, torch.random.get_rng_state())


def test_num_targets_are_those_of_the_standard_version() -> None:
    assert [num_targets(count) for count in (4, 9, 10, 1000)] == [3, 8, 9, 9]
