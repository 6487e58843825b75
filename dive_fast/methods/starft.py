"""StarFT (IJCAI 2025, arXiv 2505.13232): contrastive, and kept similarities to prompts with backgrounds."""

import math
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from dive_fast.config.section import NonNegativeFloat, PathText, Section
from dive_fast.data.prompt_files import Template, read_templates
from dive_fast.errors import ConfigError, warn_on_main_rank
from dive_fast.kernels.naive import gather_rows, kl_divergence, unit
from dive_fast.kernels.precision import product
from dive_fast.methods.flyp import Contrastive
from dive_fast.methods.method import Group, Loss, Preset, Setting, Start, TeacherOutputs
from dive_fast.model.features import Outputs

BACKGROUNDS = Path(__file__).with_name("starft_backgrounds.txt")
"""58 backgrounds, as many as the authors generated with a language model; the sentences are this project's."""
MASKED = -1e8
"""Logit of a pair of equal classes: its probability is 0, and in a row of such pairs all are equal."""


class StarFT(Contrastive):
    """The contrastive loss, and a distillation from images to other classes' prompts with backgrounds.

    ::

        loss = contrastive + distillation_weight (1 - (e + 1) / E) mean_i KL(p(l0_i) || p(l_i))
        l = s0 f g'^T,  l0 = s0 f0 g0'^T      (B, B) over all ranks; entries of equal classes are left out of both

    f, g' unit rows of the images and of their second prompts, f0, g0' those of the frozen model; s0 its logit
    scale; p the softmax of a row; e the epoch, from 0, of E: the last one has no distillation. A row counts 0
    where all prompts of the batch are of the image's class. A second prompt is the image's prompt, without its
    final full stop, in a background such as "{} at the bottom of a dry well.".
    """

    name, title = "starft", "StarFT"
    teacher = "frozen"
    needs_classes = True
    needs_second_prompts = True
    needs_run_length = True

    class Options(Section):
        """Options of the distillation."""

        distillation_weight: NonNegativeFloat = 0.5
        """Factor on the distillation in a run of many epochs; falls to 0 in the last epoch."""
        backgrounds: PathText | None = None
        """Text file with a background a line; `{}` stands for the prompt without its final full stop. Default: 58
        sentences of this project, since the authors' are not known."""

    def __init__(self, options: Section, setting: Setting) -> None:
        """Takes the weight and the number of epochs."""
        super().__init__(options, setting)
        assert isinstance(options, self.Options)
        self.options, self.steps_per_epoch = options, setting.steps_per_epoch
        self.epochs = math.ceil(setting.total_steps / setting.steps_per_epoch)

    def start(self, start: Start) -> None:
        """Validates that the target set has classes; warns of a run without distillation."""
        if self.epochs == 1 and self.options.distillation_weight:
            warn_on_main_rank(
                "train.epochs, train.max_steps: the run ends within one epoch, and starft's last epoch has no "
                "distillation, so that it trains as flyp; train for two epochs or more"
            )
        if not start.class_names:
            raise ConfigError(
                "data.target: it has prompts and no classes, which starft needs to leave out pairs of equal "
                "classes; take a set with classes"
            )

    def second_templates(self) -> tuple[Template, ...]:
        """The backgrounds; none without distillation, so that second prompts cost nothing."""
        if not self.options.distillation_weight:
            return ()
        path = str(BACKGROUNDS) if self.options.backgrounds is None else self.options.backgrounds
        return read_templates(path, "objective.backgrounds", "the prompt")

    def present_weight(self) -> float:
        """Factor on the distillation at this step."""
        epoch = self.step // self.steps_per_epoch
        return self.options.distillation_weight * max(0.0, 1 - (epoch + 1) / self.epochs)

    def loss(
        self, outputs: Outputs, labels: Tensor, group: Group = None, teacher: TeacherOutputs | None = None
    ) -> Loss:
        """The contrastive loss and the weighted distillation."""
        contrastive = super().loss(outputs, labels, group)
        if not self.options.distillation_weight:
            return contrastive
        assert outputs.second_text is not None and teacher is not None and teacher.second_text is not None
        rows = (unit(outputs.image), unit(outputs.second_text), teacher.image, teacher.second_text, labels)
        # All ranks compute all rows, as the gradient of gather_rows requires.
        f, g, frozen_f, frozen_g, classes = (gather_rows(each, group) for each in rows)
        is_equal, scale = classes[:, None] == classes, teacher.logit_scale
        student = _log_probabilities(f, g, scale, is_equal)
        frozen = _log_probabilities(frozen_f, frozen_g, scale, is_equal)
        loss = kl_divergence(frozen, student)
        total = contrastive.loss + self.present_weight() * loss
        return Loss(total, {**contrastive.metrics, "second_prompt_loss": loss.detach()})


def _log_probabilities(images: Tensor, texts: Tensor, scale: Tensor, is_left_out: Tensor) -> Tensor:
    """Logarithms of the rows' softmax of ``scale images texts^T``, without the entries that are left out."""
    return F.log_softmax((scale * product(images, texts)).masked_fill(is_left_out, MASKED), 1)


PRESETS = (
    Preset(
        "starft",
        "StarFT",
        "Contrastive loss + distillation_weight * distillation from images to other classes' prompts with "
        "backgrounds, which falls to 0 in the last epoch (arXiv 2505.13232).",
        "starft",
        None,
        "#7d8f3c",
    ),
)
