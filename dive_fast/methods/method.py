"""The interface of a fine-tuning method: a loss on the target batch, a loss on the reference batch, and hooks.

A method is a pair of parts that are chosen apart: a :class:`TargetLoss` and, in most methods, a
:class:`ReferenceLoss`. Each part is one class in one file of this folder, with its title, needs, options, loss
and hooks. Configs choose parts by the names in :mod:`dive_fast.methods.registry`. A part turns features into a
loss and knows nothing of batches or DeepSpeed. Features are un-normalised; losses are those of the global batch
over ``group`` (see :mod:`dive_fast.kernels`).

The engine calls the hooks at these places of a step; each does nothing unless a part defines it::

    before a run:   start, prepare
    for each half:  change_images, views, change_weights( forward, loss, backward )     penalty: with the last half
                    teacher_texts: texts that the target half's teacher embeds beside the batch
    update:         AdamW, within the config's projection (:mod:`dive_fast.projections`)
    after it:       teacher_rate: the target half's teacher moves; after step 1: check_first_step

``step`` of a part is the number of steps before the present one, also after a resume.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dive_fast.config.section import NonNegativeFloat, Positive, Section
from dive_fast.kernels.backend import Backend
from dive_fast.model.features import Outputs, Pairs

if TYPE_CHECKING:  # these import open_clip, which would take seconds before a mistake in a config is reported
    from dive_fast.data.batch import Text
    from dive_fast.data.prompt_files import Template
    from dive_fast.data.prompts import PooledAt
    from dive_fast.data.text_tokenizer import Tokenizer
    from dive_fast.model.learned_prompts import ClassTokens
    from dive_fast.model.towers import Towers

Group = dist.ProcessGroup | None
Forward = Callable[[Tensor], Outputs]
"""Images of a half -> outputs of the student, differentiable by the images; text features without gradient."""


Teacher = Literal["none", "frozen", "moving"]
"""The copy of both towers that embeds the target batch."""


class Loss(NamedTuple):
    """A loss, ``()``, with gradient, and metrics to log, ``()`` each on the device, without.

    Metrics of both parts have different names, none of them ``loss``.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Setting(NamedTuple):
    """Values other than its options that a part is built from."""

    width: int
    """Elements of an embedding, D."""
    weight: float = 1.0
    """Factor on the reference loss: ``objective.weight`` times ``objective.reference_every``."""
    reference_every: int = 1
    """k, where every k-th step has a reference batch."""
    total_steps: int = 1
    """T, steps of the complete run."""
    steps_per_epoch: int = 1
    """Steps of one pass over the target set."""
    seed: int = 0
    """``train.seed``."""


class Start(NamedTuple):
    """The pre-trained model and the target's classes at the start of a run, for :meth:`Part.start`."""

    embed_texts: Callable[[Sequence[str]], Tensor]
    """Texts -> ``(N, D)`` unit rows of the pre-trained model, on its device."""
    tokenizer: "Tokenizer"
    vocabulary: int
    """Number of different tokens."""
    pooled_at: "PooledAt"
    """The token at which the text tower reads its feature; None: elsewhere."""
    class_names: tuple[str, ...]
    """In label order; empty where the target has prompts and no classes."""
    templates: "tuple[Template, ...]"
    towers: "Towers | None" = None
    """The pre-trained towers, with their head and the adapters that are trained."""


class ImageInfo(NamedTuple):
    """Labels, teacher rows and numbers of the images passed to ``change_images`` and ``views``."""

    labels: Tensor | None
    """``(b,)`` int64, classes of the target half; None on the reference half."""
    teacher: Pairs | None
    """``(b, D)`` unit rows of the frozen model on the reference half; None without a teacher."""
    samples: Tensor
    """``(b,)`` int64: numbers of the samples in their data set."""
    unchanged: Tensor
    """``(b, 3, H, W)``: the images before ``change_images``."""


class View(NamedTuple):
    """Further images of a half, and the weights at which they are encoded."""

    images: Tensor
    """``(B, 3, H, W)``, normalised; one for each image of the half."""
    weights: Callable[[], AbstractContextManager[None]] = nullcontext
    """Returns a context that changes the towers' weights around a forward and its backward."""


class Student(NamedTuple):
    """The towers that are trained, for hooks that run them."""

    towers: "Towers"
    pieces: Callable[[int], Sequence[slice]]
    """Number of images -> the slices of them that fit into memory at once."""
    group: Group
    """None: one rank, no communication."""


class TeacherOutputs(NamedTuple):
    """The target batch embedded by the target half's teacher, without gradient."""

    image: Tensor
    """``(B, D)`` unit rows."""
    text: Tensor | None
    """``(B, D)`` unit rows; None where the part uses no texts."""
    logit_scale: Tensor
    """``(1,)``"""
    second_text: Tensor | None = None
    """``(B, D)`` unit rows of the second prompts; None without them."""
    part_text: Tensor | None = None
    """``(M, D)`` unit rows of :meth:`TargetLoss.teacher_texts`; None without them."""


class FirstStep(NamedTuple):
    """The first step of a run, whose towers were still the pre-trained ones."""

    metrics: Mapping[str, Tensor]
    precision: Literal["fp16", "bf16", "fp32"]
    cache_tolerance: float | None
    """Difference of a unit row that the audit of the teacher cache allows; None: the teacher runs online."""


class Needs(NamedTuple):
    """The requirements of a method on the run."""

    reference: bool
    """A reference batch."""
    reference_teacher: bool
    """Embeddings of the reference batch by the frozen model, from a cache or online."""
    head: bool
    """A linear classifier over the target's classes on top of the image tower."""
    classes: bool
    """Labels that are classes."""
    target_texts: bool
    """The text tower runs on the target half."""
    reference_texts: bool
    """The text tower runs on the reference half."""
    second_prompts: bool
    """A second prompt for each image of the target half."""
    target_teacher: Teacher
    """A copy of both towers that embeds the target batch."""
    sequential: bool
    """Separate forwards of both halves, since a part changes weights for its half alone."""
    run_length: bool
    """The steps of the complete run, which a resumed run cannot change."""
    all_weights: bool
    """All weights on each rank's device, for a hook or a teacher on the target half: no ZeRO-3, no offload."""
    adapters: bool
    """Adapters (`model.lora`) in the image tower."""
    views: bool
    """Further views of images, which are encoded twice and so must have equal features."""
    prompts: bool
    """Learned prompts, which are trained instead of the towers."""

    @property
    def texts(self) -> bool:
        """Whether the text tower runs at all; it is frozen otherwise."""
        return self.target_texts or (self.reference and self.reference_texts)


class Preset(NamedTuple):
    """A named method: a pair of parts, as a paper has it."""

    name: str
    """Name in ``objective.name``."""
    title: str
    """Name in figures and tables."""
    summary: str
    """One sentence for the configuration reference."""
    target: str
    reference: str | None
    colour: str
    """Colour in figures, ``#rrggbb``."""
    fixed: Mapping[str, Any] = {}
    """Values of options that make the method what it is; a config cannot change them."""
    hidden: tuple[str, ...] = ()
    """Options of the parts that have no effect here."""


class Part(nn.Module):
    """A loss on one half of a step. Buffers are its state: saved in checkpoints, equal on all ranks.

    ``loss`` is a plain method and the part is never called as a module: hooks on modules, such as those of
    :class:`torch.utils.flop_counter.FlopCounterMode`, fail on leaves of :func:`torch.autograd.grad`, by which
    micro-batches differentiate.
    """

    name: ClassVar[str]
    """Name in ``objective.target`` or ``objective.reference``."""
    title: ClassVar[str]
    """Name in figures and tables."""
    needs_texts: ClassVar[bool] = True
    norms: ClassVar[Mapping[str, str]] = {}
    """Logged lengths of difference vectors and their symbols; reports compare them with the rounding of step 1."""
    needs_run_length: ClassVar[bool] = False
    """Whether the loss or the teacher depends on the steps of the complete run or of an epoch."""
    needs_adapters: ClassVar[bool] = False
    """Whether the image tower must have adapters (`model.lora`)."""
    backend: Backend = "auto"
    """Backend of the loss kernels."""
    step: int = 0
    """Number of steps before the present one; set by the engine."""

    class Options(Section):
        """No options."""

    def __init__(self, options: Section, setting: Setting) -> None:
        """Builds the part from its validated options."""
        super().__init__()

    def start(self, start: Start) -> None:
        """Prepares what depends on the pre-trained model or the classes; called before each run, resumed or new.

        Raises:
            ConfigError: the model or the target lacks something that the part needs.
        """

    def prepare(self, towers: "Towers") -> None:
        """Adds modules to the towers, or buffers that depend on them, before the engine is built.

        Parameters that are added must not require gradient: no optimizer or checkpoint has them.
        """

    def change_images(self, images: Tensor, outputs: Forward, info: ImageInfo) -> Tensor:
        """Returns images that replace those of the half before the forward, e.g. adversarial ones.

        Args:
            images: ``(b, 3, H, W)``, normalised: a micro-batch of the half, or all of it.
            outputs: forward of the student, which is in evaluation mode.
            info: labels and teacher rows of these images.
        """
        return images

    def views(self, images: Tensor, student: Student, info: ImageInfo) -> Sequence[View]:
        """Further views of the half's images, which the student encodes after them; their rows enter the loss.

        The loss gets their outputs as ``outputs.views``, in this order. The engine keeps the graph of one view at
        a time: it embeds all views without gradient, differentiates the loss by their rows, and runs each view
        again against its part of that gradient. ``train.schedule = joint`` is refused.

        Args:
            images: ``(B, 3, H, W)``, normalised: all images of the half on this rank, after ``change_images``.
            student: in evaluation mode.
            info: labels and numbers of these images.
        """
        return ()

    def change_weights(self, towers: nn.Module) -> AbstractContextManager[None]:
        """A context around forward and backward of the half: changes weights and restores them after it.

        Only this half sees the changed weights, so ``train.schedule = joint`` is refused. A penalty is computed at
        the weights of the half that runs last.
        """
        return nullcontext()

    def penalty(self, towers: "Towers") -> Tensor | None:
        """A loss, ``()``, on parameters alone, added once a step; None: no penalty.

        Raises:
            ConfigError: the towers lack a parameter that the penalty is of.
        """
        return None

    def tunes(self, parameter: str) -> bool:
        """Whether the parameter of this name is trained."""
        return True

    def check_first_step(self, first: FirstStep) -> None:
        """Validates the metrics of the first step, e.g. against the noise floor.

        Raises:
            ConfigError: the metrics show that the teacher or an option is wrong.
        """


class HeadOptions(Section):
    """Options of the head, for the options of a target loss that needs one."""

    head_start: Literal["zero_shot", "random"] = "zero_shot"
    """The head before training. `zero_shot`: the unit embeddings of the class prompts, times the logit scale.
    `random`: PyTorch's start of a linear layer."""
    probe: bool = False
    """Train the head first, with the tower frozen (linear probing)."""
    probe_epochs: Positive = 10
    """Passes of the probed head over the target set. Images are embedded once, in their evaluation view."""
    probe_learning_rate: NonNegativeFloat = 1e-3
    """Peak learning rate of these passes; no warm-up, cosine decay to zero, `train.weight_decay`."""


class TargetLoss(Part):
    """A loss on the target batch."""

    needs_head: ClassVar[bool] = False
    """A linear head over the classes; its options are those of ``Options`` if it extends :class:`HeadOptions`,
    otherwise their defaults."""
    teacher: ClassVar[Teacher] = "none"
    needs_classes: ClassVar[bool] = False
    """Whether labels are classes; a set of prompts without classes is refused. A head needs classes too."""
    needs_second_prompts: ClassVar[bool] = False
    needs_prompts: ClassVar[bool] = False
    """Class features by learned prompts, ``outputs.classes``; the towers are frozen."""
    classes: "ClassTokens"
    """Tokens of the target's classes, where ``needs_prompts``; set by :meth:`start`."""
    loss_metric: ClassVar[str | None] = None
    """The logged metric that is the loss of this class, not of its subclasses; None where it has further terms."""

    def second_templates(self) -> "tuple[Template, ...]":
        """Templates of second prompts, where ``needs_second_prompts``: sentences with ``{}`` for a prompt.

        Each image's prompt, without its final full stop, is put into one of them, drawn again for every epoch.
        Without templates, batches have no second prompts.

        Raises:
            DataError: they cannot be read.
        """
        raise NotImplementedError

    def teacher_texts(self) -> "Text | None":
        """M texts on the CPU, the same on all ranks, which the teacher embeds at this step; None: none."""
        return None

    def learned_prompts(self, towers: "Towers") -> nn.Module:
        """The prompts to train, a :class:`~dive_fast.model.learned_prompts.LearnedPrompts`; after :meth:`start`.

        They become ``towers.prompts``.

        Raises:
            ConfigError: an option does not fit the text tower.
        """
        raise NotImplementedError

    def loss(
        self, outputs: Outputs, labels: Tensor, group: Group = None, teacher: TeacherOutputs | None = None
    ) -> Loss:
        """Loss of the target half.

        Args:
            labels: ``(B,)`` int64, the class of each pair.
            teacher: the same batch by the teacher; None where the part has none.
        """
        raise NotImplementedError

    def teacher_rate(self, applied: Tensor) -> Tensor | None:
        """Share w of the student, ``()``, in the moved teacher: ``teacher += w (student - teacher)``.

        None: the teacher does not move after this step.

        Args:
            applied: ``()`` fp32, 0 where the update was skipped, otherwise 1. The engine multiplies w by it; a
                schedule that counts updates adds it to its count, a buffer.
        """
        raise NotImplementedError


class ReferenceLoss(Part):
    """A loss on the reference batch, its weight included."""

    needs_teacher: ClassVar[bool] = True
    default_weight: ClassVar[float] = 1.0

    def loss(self, outputs: Outputs, teacher: Pairs | None, group: Group = None) -> Loss:
        """Loss of the reference half.

        Args:
            teacher: unit rows of the frozen model; None where the part needs none.
        """
        raise NotImplementedError

    def fused(
        self,
        target_loss: TargetLoss,
        target: Outputs,
        labels: Tensor,
        reference: Outputs,
        teacher: Pairs | None,
        group: Group,
    ) -> Loss | None:
        """Both losses of a joint step in one call of the kernels; None where no kernel fuses them."""
        return None


class Method(nn.Module):
    """The pair of a target loss and an optional reference loss that the engine trains with."""

    def __init__(self, target_loss: TargetLoss, reference_loss: ReferenceLoss | None = None) -> None:
        """Joins two parts.

        Raises:
            ValueError: both parts have a buffer of the same name, or a part has parameters, which are not trained.
        """
        super().__init__()
        self.target_loss, self.reference_loss = target_loss, reference_loss
        self.needs = needs_of(type(target_loss), None if reference_loss is None else type(reference_loss))
        buffers = [name for part in self.parts for name, _ in part.named_buffers()]
        if len(set(buffers)) < len(buffers):
            raise ValueError(f"both parts have a buffer of the same name: {sorted(buffers)}")
        if parameters := [name for name, _ in self.named_parameters()]:
            raise ValueError(f"a part has parameters, which the optimizer does not have: {', '.join(parameters)}")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts, target first."""
        return (self.target_loss,) if self.reference_loss is None else (self.target_loss, self.reference_loss)

    @property
    def norms(self) -> Mapping[str, str]:
        """Metrics that are lengths of difference vectors, and their symbols."""
        return {name: symbol for part in self.parts for name, symbol in part.norms.items()}

    def state(self) -> dict[str, Tensor]:
        """The buffers of both parts by name, which checkpoints hold."""
        return {name: buffer for part in self.parts for name, buffer in part.named_buffers()}

    def target(
        self, outputs: Outputs, labels: Tensor, group: Group = None, teacher: TeacherOutputs | None = None
    ) -> Loss:
        """Loss of the target half; arguments of :meth:`TargetLoss.loss`."""
        return self.target_loss.loss(outputs, labels, group, teacher)

    def reference(self, outputs: Outputs, teacher: Pairs | None, group: Group = None) -> Loss:
        """Weighted loss of the reference half; arguments of :meth:`ReferenceLoss.loss`."""
        assert self.reference_loss is not None
        return self.reference_loss.loss(outputs, teacher, group)

    def joint(
        self,
        target: Outputs,
        labels: Tensor,
        reference: Outputs,
        teacher: Pairs | None,
        group: Group = None,
        target_teacher: TeacherOutputs | None = None,
    ) -> Loss:
        """Losses of both halves; arguments as in :meth:`target` and :meth:`reference`."""
        assert self.reference_loss is not None
        fused = self.reference_loss.fused(self.target_loss, target, labels, reference, teacher, group)
        if fused is not None:
            return fused
        first = self.target(target, labels, group, target_teacher)
        second = self.reference(reference, teacher, group)
        return Loss(first.loss + second.loss, join_metrics(first.metrics, second.metrics))

    @contextmanager
    def change_weights(self, towers: nn.Module, parts: tuple[Part, ...]) -> Iterator[None]:
        """A context around forward and backward that enters ``change_weights`` of these parts."""
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(part.change_weights(towers))
            yield

    def begin_step(self, step: int) -> None:
        """Sets ``step`` of the parts."""
        for part in self.parts:
            part.step = step

    def start(self, start: Start) -> None:
        """Prepares the parts for a run.

        Raises:
            ConfigError: as :meth:`Part.start`.
        """
        for part in self.parts:
            part.start(start)

    def prepare(self, towers: "Towers") -> None:
        """Lets the parts prepare the pre-trained towers."""
        for part in self.parts:
            part.prepare(towers)

    def penalty(self, towers: "Towers") -> Loss | None:
        """The sum of the parts' penalties; None where no part has one.

        Raises:
            ConfigError: as :meth:`Part.penalty`.
        """
        terms = [term for part in self.parts if (term := part.penalty(towers)) is not None]
        if not terms:
            return None
        total = torch.stack(terms).sum()
        return Loss(total, {"penalty": total.detach()})

    def tunes(self, parameter: str) -> bool:
        """Whether all parts train the parameter of this name."""
        return all(part.tunes(parameter) for part in self.parts)

    def check_first_step(self, first: FirstStep) -> None:
        """Runs the parts' checks of the first step.

        Raises:
            ConfigError: as :meth:`Part.check_first_step`.
        """
        for part in self.parts:
            part.check_first_step(first)

    def hooks(self) -> list[str]:
        """The hooks of the parts that need all weights on each rank's device."""
        prompts = ["learned prompts"] if self.needs.prompts else []
        return _weight_hooks(*map(type, self.parts)) + _teachers(self.needs.target_teacher) + prompts


WEIGHT_HOOKS = ("change_images", "views", "change_weights", "penalty")
SEQUENTIAL_HOOKS = ("views", "change_weights")
"""Hooks that need a forward for each half."""


def overrides(part: Part | type[Part], hook: str) -> bool:
    """Whether a part, or a class of parts, overrides a hook of :class:`Part`."""
    kind = part if isinstance(part, type) else type(part)
    return getattr(kind, hook) is not getattr(Part, hook)


def _weight_hooks(*parts: type[Part]) -> list[str]:
    return [name for name in WEIGHT_HOOKS if any(overrides(part, name) for part in parts)]


def _teachers(kind: str) -> list[str]:
    return [] if kind == "none" else ["a teacher on the target half"]


def needs_of(target: type[TargetLoss], reference: type[ReferenceLoss] | None) -> Needs:
    """The requirements of a pair of parts."""
    return Needs(
        reference=reference is not None,
        reference_teacher=reference is not None and reference.needs_teacher,
        head=target.needs_head,
        classes=target.needs_classes or target.needs_head,
        target_texts=target.needs_texts,
        reference_texts=reference is not None and reference.needs_texts,
        second_prompts=target.needs_second_prompts,
        target_teacher=target.teacher,
        sequential=reference is not None
        and any(overrides(part, hook) for part in (target, reference) for hook in SEQUENTIAL_HOOKS),
        run_length=target.needs_run_length or (reference is not None and reference.needs_run_length),
        adapters=any(part is not None and part.needs_adapters for part in (target, reference)),
        views=any(part is not None and overrides(part, "views") for part in (target, reference)),
        all_weights=bool(
            _weight_hooks(*filter(None, (target, reference))) or _teachers(target.teacher) or target.needs_prompts
        ),
        prompts=target.needs_prompts,
    )


def over_ranks(mean: Tensor, group: Group) -> Tensor:
    """The mean over all ranks' rows, with the gradient of this rank's rows.

    Averaging gradients over ranks, as DeepSpeed does, then gives the gradient of the global mean.

    Args:
        mean: over this rank's rows; ranks have equally many.
    """
    if group is None:
        return mean
    total = mean.detach().clone()
    dist.all_reduce(total, group=group)
    return mean + (total / dist.get_world_size(group) - mean.detach())


def join_metrics(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Joins the metrics of two losses.

    Raises:
        ValueError: both have a metric of the same name.
    """
    if both := first.keys() & second.keys():
        raise ValueError(f"two losses log a metric of the same name: {', '.join(sorted(both))}")
    return first | second


def update_average(average: Tensor, new: Tensor) -> None:
    """Sets a moving average, unless the new value is not finite.

    The step of a batch with a NaN is skipped, but the NaN would stay in the average.
    """
    is_finite = torch.isfinite(new).all()
    average.copy_(torch.where(is_finite, new, average))
