"""GRACE (arXiv 2603.27139), reconstructed: LoRA tuning against adversarial images and weights at once.

The paper's text was not read: the equations are those of two notes on it and of a re-implementation. Reconstructed
are the weights of both terms, the size of the weight perturbation (relative to each layer), the gradient of the
Gram volume (into all three features) and the first estimate of the curvature (at the first step); see
docs/methods.md.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dive_fast.config.section import Decay, NonNegativeFloat, Positive, Section, Share
from dive_fast.data.random_streams import Draw, stream
from dive_fast.kernels import gram_volume
from dive_fast.methods.adversarial import AttackOptions
from dive_fast.methods.method import (
    Group,
    ImageInfo,
    Loss,
    Part,
    Preset,
    Setting,
    Student,
    TeacherOutputs,
    View,
    over_ranks,
    update_average,
)
from dive_fast.methods.tecoa import TeCoA, logits_of
from dive_fast.model.features import Outputs

if TYPE_CHECKING:  # imports open_clip
    from dive_fast.model.adapters import AdaptedLayer
    from dive_fast.model.towers import Towers


class Grace(TeCoA):
    """Cross-entropy of clean images, and of adversarial ones at perturbed weights; volume between features.

    ::

        loss = CE(f(x; W)) + weight_perturbation_weight CE(f(x + delta; W_p)) + gram_weight mean_i V_i
        V_i  = sqrt(det G_i + e^2)                      the volume of three feature vectors, e = 1e-6
        W    = W0 + (alpha / r) B A                     the LoRA factors A, B are trained
        W_p  = W + B_P diag(m) A_P                      |B_P diag(m) A_P| = perturbation_size |W| in each layer
        G_i  = Gram matrix of f(x; W), f(x + delta; W), f(x + delta; W_p)           unit rows, (3, 3)

    delta is that of PGD at W; B_P and A_P rise on CE(f(x + delta; W_p)) from B_P = 0 and random A_P, then they are
    constants. m switches on 4, 2 or 0 of the ranks of a layer, by its place among all layers in an estimate of the
    curvature: h_W = n mean(g * g), g the gradient of the LoRA factors on n clean images. The text tower does not
    run; the class embeddings are frozen.
    """

    name, title = "grace", "GRACE"
    needs_adapters = True
    curvature: Tensor
    perturbed_ranks: Tensor

    class Options(AttackOptions):
        """Options of the attack, the weight perturbation and the curvature estimate."""

        weight_perturbation_weight: NonNegativeFloat = 1.0
        """lambda_LAR, factor on the cross-entropy of adversarial images at perturbed weights; a reconstruction."""
        gram_weight: NonNegativeFloat = 1.0
        """lambda_GV, factor on the Gram volume; a reconstruction."""
        perturbation_rank: Positive = 4
        """Largest rank of the perturbation of a layer's weights; layers of middle curvature have half of it."""
        perturbation_size: NonNegativeFloat = 5e-3
        """rho: Frobenius norm of a layer's perturbation, relative to that of its weights; a reconstruction. Choose
        it so that `perturbation_gain` of metrics.jsonl is 5 to 50 % of the cross-entropy."""
        perturbation_steps: Positive = 1
        """Steps of gradient ascent on the perturbation."""
        curvature_every: Positive = 1000
        """Steps between estimates of the curvature, from the first step on."""
        curvature_decay: Decay = 0.9
        """beta of the moving average of curvature estimates."""
        curvature_low: Share = 0.2
        """Layers whose curvature is below this quantile over layers are not perturbed."""
        curvature_high: Share = 0.8
        """Layers whose curvature is at or above this quantile have the full rank."""
        curvature_labels: Literal["true", "sampled"] = "true"
        """Labels of the gradient that estimates the curvature. `sampled`: drawn from the model's own distribution,
        which makes the estimate that of the Gauss-Newton diagonal."""

    def __init__(self, options: Section, setting: Setting) -> None:
        """Takes the options; the layers follow by :meth:`prepare`."""
        super().__init__(options, setting)
        assert isinstance(options, self.Options)
        self.options, self.seed = options, setting.seed
        self._layers: list[AdaptedLayer] = []
        self._adversarial_loss: Tensor | None = None
        self.register_buffer("curvature", torch.zeros(0))
        self.register_buffer("perturbed_ranks", torch.zeros(0, dtype=torch.int64))

    @property
    def is_adversarial(self) -> bool:
        """Whether any term needs adversarial images; otherwise this is LoRA tuning by the cross-entropy."""
        return bool(self.options.weight_perturbation_weight or self.options.gram_weight)

    def prepare(self, towers: "Towers") -> None:
        """Adds the perturbation to the adapted layers of the image tower."""
        from dive_fast.model.adapters import adapted_layers, add_perturbation

        add_perturbation(towers, self.options.perturbation_rank)
        self._layers = [layer for layer in adapted_layers(towers) if layer.name.startswith("visual.")]
        self.curvature = torch.zeros(len(self._layers))
        self.perturbed_ranks = torch.zeros(len(self._layers), dtype=torch.int64)

    # The half's images stay clean, without a pass over them: adversarial ones are a view.
    change_images = Part.change_images

    def views(self, images: Tensor, student: Student, info: ImageInfo) -> Sequence[View]:
        """The adversarial images at the present weights and at perturbed ones."""
        if not self.is_adversarial:
            return ()
        assert info.labels is not None
        labels, towers, pieces = info.labels, student.towers, student.pieces(len(images))

        def logits(images: Tensor) -> Tensor:
            return logits_of_images(towers, images)

        if self.step % self.options.curvature_every == 0:
            self._estimate_curvature(images, labels, student)
        attacked = torch.cat(
            [
                self._attack(
                    images[piece],
                    logits,
                    info._replace(labels=labels[piece], samples=info.samples[piece]),
                    self.step,
                    self.backend,
                )
                for piece in pieces
            ]
        )
        self._perturb(attacked, labels, student)
        perturbed = View(attacked, lambda: _perturbation(towers))
        return (View(attacked), perturbed) if self.options.gram_weight else (perturbed,)

    def loss(
        self, outputs: Outputs, labels: Tensor, group: Group = None, teacher: TeacherOutputs | None = None
    ) -> Loss:
        """The cross-entropy and the weighted terms."""
        total, metrics = super().loss(outputs, labels, group)
        if not outputs.views:
            return Loss(total, metrics)
        options, perturbed = self.options, outputs.views[-1]
        term = over_ranks(F.cross_entropy(logits_of(perturbed), labels), group)
        total = total + options.weight_perturbation_weight * term
        metrics |= {"perturbed_loss": term.detach()}
        if self._adversarial_loss is not None:
            metrics |= {"perturbation_gain": term.detach() - self._adversarial_loss}
        if options.gram_weight:
            rows = outputs.image, outputs.views[0].image, perturbed.image
            volume = over_ranks(gram_volume(*rows, backend=self.backend), group)
            total, metrics = total + options.gram_weight * volume, metrics | {"gram_volume": volume.detach()}
        return Loss(total, metrics)

    def _estimate_curvature(self, images: Tensor, labels: Tensor, student: Student) -> None:
        """Moves the curvature of each layer towards the present estimate, and sets the ranks of perturbations."""
        factors = [factor for layer in self._layers for factor in (layer.lora_A, layer.lora_B)]
        if self.options.curvature_labels == "sampled":
            labels = self._sample_labels(images, student)
        gradients, _ = _mean_gradient(factors, images, labels, student)
        count = len(images) * (1 if student.group is None else dist.get_world_size(student.group))
        estimate = torch.stack([curvature_of(gradients[i : i + 2], count) for i in range(0, len(gradients), 2)])
        decay = 0.0 if self.step == 0 else self.options.curvature_decay
        update_average(self.curvature, torch.lerp(estimate, self.curvature, decay))
        self.perturbed_ranks.copy_(
            ranks_of(
                self.curvature,
                self.options.perturbation_rank,
                self.options.curvature_low,
                self.options.curvature_high,
            )
        )

    @torch.no_grad()
    def _sample_labels(self, images: Tensor, student: Student) -> Tensor:
        pieces = student.pieces(len(images))
        logits = torch.cat([logits_of_images(student.towers, images[piece]) for piece in pieces])
        first = 0 if student.group is None else dist.get_rank(student.group) * len(images)
        rows = range(first, first + len(images))
        uniform = [stream(self.seed, Draw.CURVATURE_LABEL, self.step, row).random() for row in rows]
        shares = logits.double().softmax(1).cumsum(1)
        drawn = torch.tensor(uniform, device=logits.device)[:, None] > shares
        return drawn.sum(1).clamp(max=logits.shape[1] - 1)

    def _perturb(self, images: Tensor, labels: Tensor, student: Student) -> None:
        """Sets the perturbation of each layer: ascent on the cross-entropy, then the size of the layer's bound."""
        sizes = []
        for number, layer in enumerate(self._layers):
            first, second = _factors(layer)
            noise = stream(self.seed, Draw.PERTURBATION, self.step, number).standard_normal(first.shape)
            switch = torch.arange(len(first), device=first.device) < self.perturbed_ranks[number]
            with torch.no_grad():
                first.copy_(torch.from_numpy(noise).to(first) * switch[:, None])
                second.zero_()
                weight = layer.weight + layer.scaling * (layer.lora_B @ layer.lora_A)
            sizes.append(self.options.perturbation_size * weight.norm())
        for ascent in range(self.options.perturbation_steps):
            factors = [factor for layer in self._layers for factor in _factors(layer)]
            with _perturbation(student.towers):
                gradients, loss = _mean_gradient(factors, images, labels, student)
            if ascent == 0:
                self._adversarial_loss = loss
            for layer, size, rise in zip(self._layers, sizes, _in_pairs(gradients), strict=True):
                rescale(_factors(layer), rise, size)


def curvature_of(gradients: Sequence[Tensor], count: int) -> Tensor:
    """The curvature estimate of a layer, ``()``: ``n mean(g * g)`` over all entries of its factors.

    Args:
        gradients: of the mean cross-entropy over ``count`` images by the factors.
    """
    return count * torch.cat([gradient.flatten() for gradient in gradients]).square().mean()


def ranks_of(curvature: Tensor, rank: int, low: float, high: float) -> Tensor:
    """The rank of each layer's perturbation, ``(L,)`` int64: ``rank``, half of it, or 0.

    Args:
        curvature: ``(L,)``.
        low, high: quantiles over layers, below which the rank is 0, and from which on it is ``rank``.
    """
    bounds = torch.quantile(curvature, curvature.new_tensor([low, high]))
    return torch.where(curvature >= bounds[1], rank, torch.where(curvature >= bounds[0], rank // 2, 0))


@torch.no_grad()
def rescale(factors: tuple[Tensor, Tensor], rise: tuple[Tensor, Tensor], size: Tensor) -> None:
    """One step of ascent on a layer's perturbation ``B_P A_P``, then ``|B_P A_P| = size``.

    From B_P = 0, B_P becomes its gradient; later each factor rises by its own length along its gradient.

    Args:
        factors: A_P and B_P, changed in place.
        rise: gradients of the loss by them.
        size: ``()``.
    """
    first, second = factors
    length = second.norm()
    is_first = length == 0
    for factor, gradient in zip(factors, rise, strict=True):
        unit = gradient / gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)
        factor.add_(torch.where(is_first, 1.0, factor.norm()) * unit)
    change = (second @ first).norm()
    second.mul_(torch.where(change > 0, size / change, 0.0))


def logits_of_images(towers: "Towers", images: Tensor) -> Tensor:
    """The head's logits of normalised images, ``(B, C)`` fp32."""
    logits = towers(images).logits
    assert logits is not None
    return logits.float()


def _mean_gradient(
    parameters: Sequence[Tensor], images: Tensor, labels: Tensor, student: Student
) -> tuple[list[Tensor], Tensor]:
    """Gradient of the mean cross-entropy over all ranks' images, and that mean; equal on all ranks.

    Images run in pieces. ``torch.autograd.grad`` leaves ``grad`` and DeepSpeed's hooks alone.
    """
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    total = torch.zeros((), device=images.device)
    with _differentiated(parameters), torch.enable_grad():
        for piece in student.pieces(len(images)):
            # A sum, since a mean's gradient would underflow in fp16.
            loss = F.cross_entropy(logits_of_images(student.towers, images[piece]), labels[piece], reduction="sum")
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for each, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    each += gradient
            total += loss.detach()
    flat = torch.cat([*(each.flatten() for each in sums), total[None]]) / len(images)
    if student.group is not None:
        dist.all_reduce(flat, group=student.group)
        flat /= dist.get_world_size(student.group)
    *parts, mean = flat.split([*(each.numel() for each in sums), 1])
    return [part.view_as(each) for part, each in zip(parts, sums, strict=True)], mean.squeeze(0)


@contextmanager
def _differentiated(parameters: Sequence[Tensor]) -> Iterator[None]:
    """A context in which these parameters require gradient."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)


def _factors(layer: "AdaptedLayer") -> tuple[Tensor, Tensor]:
    """A_P and B_P of a layer."""
    assert layer.perturbation_A is not None and layer.perturbation_B is not None
    return layer.perturbation_A, layer.perturbation_B


def _in_pairs(gradients: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(gradients[::2], gradients[1::2], strict=True))


def _perturbation(towers: "Towers") -> AbstractContextManager[None]:
    """A context in which the weights are perturbed."""
    from dive_fast.model.adapters import perturbation

    return perturbation(towers)


PRESETS = (
    Preset(
        "grace",
        "GRACE",
        "Cross-entropy of clean images + weight_perturbation_weight * that of adversarial images at perturbed "
        "weights + gram_weight * Gram volume of clean, adversarial and perturbed features, by LoRA; a "
        "reconstruction (arXiv 2603.27139).",
        "grace",
        None,
        "#5b7f95",
    ),
)
