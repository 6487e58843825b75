"""CAR-FT (Mao et al. 2022, arXiv 2211.16175), reconstructed: cross-entropy, and kept contexts of images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dive_fast.config.section import NonNegativeFloat, Section
from dive_fast.errors import ConfigError
from dive_fast.kernels.naive import kl_divergence, unit
from dive_fast.kernels.precision import product
from dive_fast.methods.linear_head import CrossEntropy
from dive_fast.methods.method import Group, HeadOptions, Loss, Preset, Setting, Start, TeacherOutputs, over_ranks
from dive_fast.model.features import Outputs


class CarFT(CrossEntropy):
    """Cross-entropy of the head, and the divergence of an image's context distribution from that before training.

    ::

        loss = cross-entropy + distillation_weight mean_i KL(p(s0 f0_i C^T) || p(s0 f_i C^T))
        c_k  = unit(mean over classes of t(template k, class))      the rows of C (K, D)

    f, f0 unit rows of the images by the tuned and the frozen tower; t unit embeddings of prompts by the
    pre-trained model; s0 its logit scale; p the softmax over the K templates, which are the contexts.

    This is a reconstruction from the abstract of the paper: the direction of the divergence, the scale s0, the
    contexts' unit length and the weight 1 are this project's choices.
    """

    name, title = "car_ft", "CAR-FT"
    teacher = "frozen"

    class Options(HeadOptions):
        """Options of the head and of the distillation."""

        distillation_weight: NonNegativeFloat = 1.0
        """Factor on the divergence of context distributions; a reconstruction: the paper's value was not read."""

    def __init__(self, options: Section, setting: Setting) -> None:
        """Takes the weight."""
        super().__init__(options, setting)
        assert isinstance(options, self.Options)
        self.options = options
        self._contexts: Tensor | None = None

    def start(self, start: Start) -> None:
        """Embeds the contexts.

        Raises:
            ConfigError: there is one context, whose probability is always 1.
        """
        if not self.options.distillation_weight:
            return
        if len(start.templates) < 2:
            raise ConfigError(
                "data.target.templates: car_ft distils a distribution over templates and needs at least two; name "
                "a file with several, imagenet or simple"
            )
        means = [
            start.embed_texts([template(name) for name in start.class_names]).mean(0)
            for template in start.templates
        ]
        self._contexts = unit(torch.stack(means))

    def loss(
        self, outputs: Outputs, labels: Tensor, group: Group = None, teacher: TeacherOutputs | None = None
    ) -> Loss:
        """The cross-entropy and the weighted divergence."""
        cross_entropy = super().loss(outputs, labels, group)
        if not self.options.distillation_weight:
            return cross_entropy
        assert teacher is not None
        assert self._contexts is not None, "start comes before the first step"
        contexts = self._contexts
        student, frozen = (
            F.log_softmax(teacher.logit_scale * product(images, contexts), 1)
            for images in (unit(outputs.image), teacher.image)
        )
        loss = over_ranks(kl_divergence(frozen, student), group)
        metrics = {**cross_entropy.metrics, "context_loss": loss.detach()}
        return Loss(cross_entropy.loss + self.options.distillation_weight * loss, metrics)


PRESETS = (
    Preset(
        "car_ft",
        "CAR-FT",
        "Cross-entropy of a linear head + distillation_weight * divergence of the images' distributions over "
        "templates from those of the pre-trained model; a reconstruction (arXiv 2211.16175).",
        "car_ft",
        None,
        "#8a6fc0",
        fixed={"probe": False},
        hidden=("probe_epochs", "probe_learning_rate"),
    ),
)
