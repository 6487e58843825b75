"""The head of a target loss that is not this project's own cross-entropy."""

from pathlib import Path

import tiny
import torch
from distributed import run_ranks

from dive_fast.config.section import Section
from dive_fast.data.open_dataset import open_target
from dive_fast.distributed import Ranks
from dive_fast.methods import registry
from dive_fast.methods.method import HeadOptions, TargetLoss
from dive_fast.methods.run_config import RunConfig
from dive_fast.model.towers import create
from dive_fast.training.linear_probe import make_head


class Plain(TargetLoss):
    """A loss on a head, without options of its own."""

    name, title = "plain", "plain"
    needs_head = True

    class Options(Section):
        """No options."""


class Smoothed(Plain):
    """A loss with the head's options and one more."""

    name = "smoothed"

    class Options(HeadOptions):
        """The head's and one more."""

        smoothing: float = 0.1


def heads_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of new heads of both losses, and of cross-entropy."""
    registry.table().targets.update(plain=Plain, smoothed=Smoothed)
    found = {}
    for key, target in (
        ("cross_entropy", "cross_entropy"),
        ("plain", "plain"),
        ("smoothed", {"name": "smoothed", "smoothing": 0.2, "head_start": "random"}),
    ):
        tree = tiny.write_config(folder) | {"objective": {"name": None, "target": target, "reference": "none"}}
        config = RunConfig.model_validate(tree)
        source = open_target(config.data.target)
        names = [f"class number {index}" for index in range(5)]
        head = make_head(
            config, create(config.model), source, names, Ranks(0, 1, torch.device("cpu")), is_trained=False
        )
        found[key] = head.weight.detach()
    return found


def test_head_of_another_loss_starts_by_its_options(tmp_path: Path) -> None:
    (found,) = run_ranks(1, heads_of, tmp_path)
    assert torch.equal(found["plain"], found["cross_entropy"])
    assert found["smoothed"].shape == found["plain"].shape
    assert not torch.equal(found["smoothed"], found["plain"])
