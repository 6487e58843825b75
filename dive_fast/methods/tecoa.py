"""TeCoA (Mao et al. 2023, arXiv 2212.07016): cross-entropy of adversarial images by the class prompts."""

from torch import Tensor

from dive_fast.config.section import Section
from dive_fast.methods.adversarial import AttackOptions, FrozenHead, ImageAttack
from dive_fast.methods.linear_head import CrossEntropy
from dive_fast.methods.method import (
    Forward,
    Group,
    ImageInfo,
    Loss,
    Preset,
    Setting,
    Start,
    TeacherOutputs,
)
from dive_fast.model.features import Outputs


class TeCoA(FrozenHead, CrossEntropy):
    """Cross-entropy of adversarial images; the class embeddings are those of the pre-trained model.

    ::

        loss = mean_i CE(s f(x_i + delta_i) T^T, y_i),    delta_i by PGD on the same cross-entropy

    f unit rows of the images; T (C, D) unit embeddings of the class prompts, s the pre-trained logit scale: both
    are frozen, as the head of ``vanilla_ft`` at its zero-shot start. The text tower does not run.
    """

    name, title = "tecoa", "TeCoA"
    loss_metric = "cross_entropy"

    class Options(AttackOptions):
        """Options of the attack."""

    def __init__(self, options: Section, setting: Setting) -> None:
        """Takes the attack's options and the seed of its random start."""
        super().__init__(options, setting)
        assert isinstance(options, AttackOptions)
        self._attack = ImageAttack(options, setting.seed)

    def start(self, start: Start) -> None:
        """Takes the normalisation of images."""
        self._attack.start(start)

    def change_images(self, images: Tensor, outputs: Forward, info: ImageInfo) -> Tensor:
        """The adversarial images."""
        return self._attack(images, lambda images: logits_of(outputs(images)), info, self.step, self.backend)

    def loss(
        self, outputs: Outputs, labels: Tensor, group: Group = None, teacher: TeacherOutputs | None = None
    ) -> Loss:
        """The mean cross-entropy of adversarial images over all ranks."""
        cross_entropy = super().loss(outputs, labels, group)
        return Loss(cross_entropy.loss, cross_entropy.metrics | self._attack.metrics(group))


def logits_of(outputs: Outputs) -> Tensor:
    """The head's logits, ``(B, C)``; there must be a head."""
    assert outputs.logits is not None
    return outputs.logits


PRESETS = (
    Preset(
        "tecoa",
        "TeCoA",
        "Cross-entropy of adversarial images, classified by frozen embeddings of the class prompts "
        "(arXiv 2212.07016); the text tower is frozen.",
        "tecoa",
        None,
        "#a0522d",
    ),
)
