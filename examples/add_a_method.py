"""Adds a method and trains by it: SnD on both towers, ``python examples/add_a_method.py [section.key=value ...]``.

A method is one class for its loss, with options, and a preset that names it. In the project this is one file in
``dive_fast/methods``, which is found by itself; outside of it, :func:`dive_fast.methods.registry.add` takes the
module. Everything else (cache, micro-batches, ZeRO, ranks, resume, planner, figures) follows from the class.
"""

import sys
from pathlib import Path

from torch import Tensor

from dive_fast.config.section import Section, Share
from dive_fast.distributed import join
from dive_fast.errors import UserError
from dive_fast.kernels.naive import unit
from dive_fast.methods import registry
from dive_fast.methods.method import FirstStep, Group, Loss, Preset, ReferenceLoss, Setting, over_ranks
from dive_fast.methods.noise_floor import check_noise_floor
from dive_fast.methods.run_config import load_run_config
from dive_fast.model.features import Outputs, Pairs
from dive_fast.training.loop import train

CONFIGS = Path(__file__).parents[1] / "launch/configs"


class BothTowers(ReferenceLoss):
    """Mean squared length of the difference vectors of images and texts, times the weight."""

    name, title = "both_towers", "SnD, both towers"
    default_weight = 10.0
    norms = {"image_norm": "|u|", "text_norm": "|v|"}

    class Options(Section):
        """Options of ``objective.name = both_towers``; their docstrings are their documentation."""

        text_share: Share = 0.5
        """Share of the texts' difference vectors in the loss."""

    def __init__(self, options: Section, setting: Setting) -> None:
        """Takes validated options and the weight of the reference loss."""
        super().__init__(options, setting)
        self.text_share, self.weight = options.model_dump()["text_share"], setting.weight

    def loss(self, outputs: Outputs, teacher: Pairs | None, group: Group = None) -> Loss:
        """(1 - share) mean |u|^2 + share mean |v|^2 over all ranks' rows."""
        assert teacher is not None
        u, v = ((unit(ours) - frozen).square().sum(1) for ours, frozen in zip(outputs.pairs, teacher, strict=True))
        loss: Tensor = over_ranks(((1 - self.text_share) * u + self.text_share * v).mean(), group)
        norms = {name: over_ranks(each.detach().sqrt().mean(), group) for name, each in zip(self.norms, (u, v))}
        return Loss(self.weight * loss, {"distillation_loss": loss.detach(), **norms})

    def check_first_step(self, first: FirstStep) -> None:
        """Before the first update the difference vectors are rounding alone: longer ones mean a wrong cache."""
        check_noise_floor(first, self.norms)


PRESETS = (
    Preset(
        *("both_towers", "SnD, both towers", "Contrastive loss + weight * distillation of both towers."),
        *("contrastive", "both_towers", "#336699"),
    ),
)


def main(overrides: list[str]) -> dict[str, float]:
    """Fine-tunes the demo's model by the method."""
    registry.add(sys.modules[__name__])
    chosen = ["objective.name=both_towers", "objective.weight=10", "train.output=runs/add_a_method"]
    config = load_run_config("demo.json", [*chosen, *overrides], CONFIGS)
    return train(config, Path(config.train.output or "."), join())


if __name__ == "__main__":
    try:
        print({name: round(value, 3) for name, value in main(sys.argv[1:]).items()})
    except UserError as error:
        sys.exit(f"error: {error}")
