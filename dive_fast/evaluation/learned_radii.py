"""TPGM (Tian et al. 2023): one projection radius per tensor, learned after training on unseen images.

The weights are projected towards the pre-trained ones, tensor by tensor::

    W~ = W0 + clamp(gamma / (N + 1e-8), 0, 1) (W - W0)

N is the L2 norm of ``W - W0`` (``l2``, as in the authors' ImageNet code), or the L1 norm of each row (``mars``;
a row has all dimensions but the first, a 1-D tensor is one row). gamma begins with ``min(N) / 2``, is clamped to
``[1e-8, max(N)]`` before each use, and is trained by Adam on the loss of a batch at W~::

    dL/dgamma = sum over rows with 0 < gamma / (N + 1e-8) < 1 of <dL/dW~, W - W0> / (N + 1e-8)

With ``l2`` the result is a weight ensemble with an alpha for each tensor.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dive_fast.checkpoint.load_weights import exported, head_of
from dive_fast.config.schema import Config
from dive_fast.data.batch import EvaluationBatch, TargetBatch
from dive_fast.data.loaders.loader import Options, training_batches
from dive_fast.data.prefetch import Prefetcher
from dive_fast.data.prompt_files import Template, read_templates
from dive_fast.data.prompts import PromptTable
from dive_fast.data.sampler import Order
from dive_fast.data.samples import EvaluationSamples, SampleKey, TargetSamples
from dive_fast.data.text_tokenizer import Tokenizer
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError, DataError, StalledError, UserError
from dive_fast.evaluation import plots
from dive_fast.evaluation.classifier import Classifier, first_missing_class, select_head_rows
from dive_fast.evaluation.datasets.resolve import Opened, metric_of, open_sets
from dive_fast.evaluation.results import LOCK
from dive_fast.evaluation.unseen_images import Unseen, open_unseen, shared_with, warn_of_size
from dive_fast.evaluation.weight_ensemble import (
    State,
    head_of_prompts,
    interpolate,
    interpolate_heads,
    write_weights,
)
from dive_fast.evaluation.zero_shot import Measured, measure_sets, report_left_out, values
from dive_fast.io.atomic_files import write_atomic
from dive_fast.locks import file_lock
from dive_fast.methods import registry
from dive_fast.methods.flyp import Contrastive
from dive_fast.methods.linear_head import CrossEntropy
from dive_fast.methods.method import Group, Setting
from dive_fast.model import towers
from dive_fast.model.features import Outputs
from dive_fast.model.head import Head
from dive_fast.model.model_identity import state_digest, weights_digest
from dive_fast.model.towers import HEAD, Towers, unit

logger = logging.getLogger(__name__)

Norm = Literal["l2", "mars"]
EPSILON = 1e-8
"""Added to norms, and the smallest radius."""
LOSS_SCALE = 2.0**16
"""First factor on the loss in fp16; halved while gradients overflow."""
WEIGHTS = "tpgm.safetensors"
PRETRAINED, TUNED, AVERAGED, PROJECTED = "pre-trained", "tuned", "alpha = 0.5", "TPGM"
"""Rows of the table."""
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Settings:
    """Settings of the learning."""

    norm: Norm = "l2"
    iterations: int = 200
    batch_size: int = 64
    """Images of an iteration, over all ranks."""
    learning_rate: float = 1e-2
    """Learning rate of Adam on the radii, in units of the norm."""
    seed: int = 0
    """Seed of the order of images and of the prompts."""


def row_norms(difference: Tensor, norm: Norm) -> Tensor:
    """N of a tensor, ``(R,)`` fp64: its L2 norm (R = 1), or the L1 norm of each row for ``mars``."""
    if norm == "l2":
        return torch.linalg.vector_norm(difference.reshape(1, -1), dim=1, dtype=torch.float64)
    return _rows(difference).abs().sum(1, dtype=torch.float64)


def project(anchor: Tensor, tuned: Tensor, norms: Tensor, radius: Tensor) -> Tensor:
    """The projected tensor W~; equal to ``tuned`` bit for bit where the ratio is 1.

    Args:
        anchor: W0, of any shape.
        tuned: W, of the same shape.
        norms: ``(R,)`` from :func:`row_norms`.
        radius: gamma, ``()``.
    """
    ratio = _ratio(norms, radius).to(tuned.dtype)
    return torch.lerp(anchor, tuned, ratio.reshape(-1, *[1] * (tuned.ndim - 1)) if tuned.ndim else ratio[0])


def radius_gradient(gradient: Tensor, difference: Tensor, norms: Tensor, radius: Tensor) -> Tensor:
    """dL/dgamma, ``()`` fp64: saturated rows contribute 0.

    Args:
        gradient: of the loss by the projected tensor.
        difference: W - W0.
        norms, radius: as for :func:`project`.
    """
    ratio = _ratio(norms, radius)
    product = gradient * difference
    products = (product.reshape(1, -1) if len(norms) == 1 else _rows(product)).sum(1, dtype=torch.float64)
    is_inside = (ratio > 0) & (ratio < 1)
    return torch.where(is_inside, products / (norms + EPSILON), torch.zeros_like(products)).sum()


def _rows(tensor: Tensor) -> Tensor:
    """The rows of a tensor, ``(R, numel / R)``; one row for a tensor of at most one dimension."""
    return tensor.reshape(tensor.shape[0] if tensor.ndim > 1 else 1, -1)


def _ratio(norms: Tensor, radius: Tensor) -> Tensor:
    return (radius / (norms + EPSILON)).clamp(0, 1)


class Radii:
    """The radii of the tensors that differ from their anchors."""

    def __init__(self, anchors: Mapping[str, Tensor], tuned: Mapping[str, Tensor], norm: Norm) -> None:
        """Sets each radius to ``min(N) / 2``.

        Args:
            anchors, tuned: W0 and W by name, on one device; equal tensors have no radius.
        """
        self._endpoints = {
            name: (anchors[name], value) for name, value in tuned.items() if not torch.equal(anchors[name], value)
        }
        self._norms = {name: row_norms(value - anchor, norm) for name, (anchor, value) in self._endpoints.items()}
        self.names = tuple(self._endpoints)
        self.largest = torch.stack([norms.max() for norms in self._norms.values()] or [torch.zeros(())])
        self.values = torch.stack([norms.min() / 2 for norms in self._norms.values()] or [torch.zeros(())])
        """``(P,)`` fp64, in the order of ``names``."""

    def clamp(self) -> None:
        """Clamps each radius to ``[1e-8, max(N)]``."""
        self.values.data.copy_(self.values.detach().clamp(min=EPSILON).minimum(self.largest))

    def projected(self) -> Iterator[tuple[str, Tensor]]:
        """Names and projected tensors, one at a time."""
        for (name, (anchor, tuned)), radius in zip(self._endpoints.items(), self.values.detach(), strict=True):
            yield name, project(anchor, tuned, self._norms[name], radius)

    def gradient(self, gradients: Mapping[str, Tensor | None]) -> Tensor:
        """``(P,)`` fp64: dL/dgamma from the gradients by the projected tensors; 0 for None."""
        parts = []
        for (name, (anchor, tuned)), radius in zip(self._endpoints.items(), self.values.detach(), strict=True):
            gradient = gradients[name]
            parts.append(
                torch.zeros_like(radius)
                if gradient is None
                else radius_gradient(gradient, tuned - anchor, self._norms[name], radius)
            )
        return torch.stack(parts)

    def alphas(self) -> dict[str, float]:
        """The share of its change that each tensor keeps, in [0, 1]; for ``mars`` the mean over its rows."""
        shares = [
            _ratio(norms, radius).mean()
            for norms, radius in zip(self._norms.values(), self.values.detach(), strict=True)
        ]
        return dict(zip(self.names, torch.stack(shares).tolist(), strict=True))


@dataclass
class History:
    """The course of the learning."""

    losses: list[float] = field(default_factory=list)
    """Loss of each iteration; NaN or infinite for skipped ones."""
    skipped: int = 0
    """Iterations whose loss or gradient was not finite, which changed nothing."""
    unreached: tuple[str, ...] = ()
    """Tensors on which the loss does not depend: their radii stay at the start."""


def learn_radii(
    radii: Radii,
    parameters: Mapping[str, nn.Parameter],
    loss_of: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    learning_rate: float,
    group: Group = None,
    loss_scale: float = 1.0,
    after: Callable[[], object] = lambda: None,
) -> History:
    """Learns radii by Adam, one iteration per batch; all ranks of ``group`` must call this.

    Args:
        radii: changed in place.
        parameters: the tensors that ``loss_of`` depends on, by name; they have the projected values at the end.
        loss_of: this rank's batch -> the loss of the global batch, whose gradients are averaged over ranks.
        loss_scale: factor on the loss before the backward, halved while gradients overflow; 1: none.
        after: called after each iteration.
    """
    values, history = nn.Parameter(radii.values), History()
    radii.values = values
    optimizer = torch.optim.Adam([values], lr=learning_rate)
    leaves = [parameters[name] for name in radii.names]
    for batch in batches:
        assign(parameters, radii)
        loss = loss_of(batch)
        history.losses.append(float(loss.detach()))
        scale = loss_scale if math.isfinite(history.losses[-1]) else 0.0
        while scale:
            repeats = scale > 1
            gradients = torch.autograd.grad(loss * scale, leaves, allow_unused=True, retain_graph=repeats)
            values.grad = (
                _over_ranks(radii.gradient(dict(zip(radii.names, gradients, strict=True))), group) / scale
            )
            if bool(values.grad.isfinite().all()):
                optimizer.step()
                loss_scale = scale
                missing = [name for name, each in zip(radii.names, gradients, strict=True) if each is None]
                history.unreached = tuple(missing)
                break
            scale = scale / 2 if repeats else 0.0
        history.skipped += not scale
        after()
    radii.values = values.detach()
    assign(parameters, radii)
    return history


def _over_ranks(gradient: Tensor, group: Group) -> Tensor:
    """The mean of all ranks' gradients, equal on each of them."""
    if group is None:
        return gradient
    dist.all_reduce(gradient, group=group)
    return gradient / dist.get_world_size(group)


@torch.no_grad()
def assign(parameters: Mapping[str, nn.Parameter], radii: Radii) -> None:
    """Clamps the radii, and copies the projected tensors into parameters."""
    radii.clamp()
    for name, projected in radii.projected():
        parameters[name].copy_(projected)


class Projected(NamedTuple):
    """The projected model, and a report."""

    report: dict[str, Any]
    """Settings and digests that determine the result; ``alphas`` and ``radii`` by tensor; ``accuracies``: rows of
    the pre-trained, the tuned, the averaged and the projected weights, with each set's metric in [0, 1];
    ``not_reported``: the sets that have images of the split, with the reason."""
    weights: State
    """Weights under open_clip's names."""
    head: Head | None
    """The projected head, if the run has trained one."""
    model: Towers
    """The model; its preprocessing is written next to the weights."""


def tpgm(
    config: Config, weights: Path, ranks: Ranks, settings: Settings = Settings(), *, learn_on: str | None = None
) -> Projected:
    """Learns radii on unseen images, and measures the projected model; all ranks must call this.

    The loss is the cross-entropy of the head that was trained with the weights, or without a head the contrastive
    loss of the images and prompts of a batch. Images have their evaluation view.

    Args:
        weights: a checkpoint that :func:`dive_fast.checkpoint.load_weights.load_into` accepts.
        learn_on: labelled evaluation set whose images are used, and which is not reported; None: the held-out part
            of ``data.target``.

    Raises:
        ConfigError: as :func:`dive_fast.evaluation.unseen_images.open_unseen`; or the weights do not fit the
            model, are not finite, equal the pre-trained ones, or have a head without one of the split's classes.
        DataError: a set cannot be opened or measured, or the batch size does not suit the ranks.
    """
    prepared = _prepare(config, weights, ranks, settings, learn_on)
    unseen, model, trained = prepared.unseen, prepared.model, prepared.trained
    not_reported: dict[str, str] = ranks.broadcast(prepared.shared)
    _announce(unseen, not_reported, settings, ranks)
    model.to(ranks.device).eval()
    anchor = None
    if trained is not None and registry.has_head_anchor(config.objective):
        # In fp32, as at the start of training.
        model.load_exported(prepared.pretrained)
        names = trained.class_names
        anchor = head_of_prompts(model, prepared.tokenizer, names, prepared.head_templates, ranks)
        model.load_exported(prepared.tuned)
    elif trained is not None:
        ranks.print("the head started from random weights, so it has no anchor: it stays as it is (alpha = 1)")
    model.set_precision(config.train.precision)
    radii, history, head = _learn(config, prepared, anchor, settings, ranks)
    if ranks.is_main:
        _report_history(history, settings)
    projected = {name: tensor.cpu().clone() for name, tensor in model.export(model.state_dict()).items()}
    middle = interpolate(prepared.pretrained, prepared.tuned, 0.5)
    candidates = {
        PRETRAINED: (prepared.pretrained, anchor),
        TUNED: (prepared.tuned, trained),
        AVERAGED: (middle, trained if anchor is None else interpolate_heads(anchor, trained, 0.5)),
        PROJECTED: (projected, head),
    }
    reported = {name: data for name, data in prepared.opened.items() if name not in not_reported}
    rows: list[dict[str, Any]] = []
    measured: dict[str, Measured] = {}
    with ranks.progress(len(candidates), "evaluation", "model") as bar:
        for name, (state, classes) in candidates.items():
            model.load_exported(state)
            measured = measure_sets(model, prepared.tokenizer, config.evaluate, reported, ranks, classes)
            rows.append({"weights": name} | values(measured, config.evaluate.sets))
            bar.update()
    report_left_out(measured, ranks)
    exported_name = {name: name if name.startswith(HEAD) else model.exported_name(name) for name in radii.names}
    report = {
        **asdict(settings),
        "precision": config.train.precision,
        "loss": "contrastive" if trained is None else "cross-entropy",
        "digests": prepared.digests,
        "split": {
            "name": unseen.name,
            "images": len(unseen.source),
            "classes": unseen.num_classes,
            "content": unseen.source.digest(),
            "templates": [] if trained is not None else [template("{}") for template in unseen.templates],
        },
        "batch_size": prepared.order.batch_size,
        "skipped_iterations": history.skipped,
        "losses": [loss if math.isfinite(loss) else None for loss in history.losses],
        "head": "none" if trained is None else "kept" if anchor is None else "projected",
        "unreached": [exported_name[name] for name in history.unreached],
        "unchanged": len(dict(model.named_parameters())) - sum(not name.startswith(HEAD) for name in radii.names),
        "alphas": {exported_name[name]: alpha for name, alpha in radii.alphas().items()},
        "radii": dict(zip(exported_name.values(), radii.values.tolist(), strict=True)),
        "metrics": {name: metric_of(config.evaluate.sets[name]) for name in reported},
        "samples": {name: result.samples for name, result in measured.items()},
        "left_out": {name: result.left_out for name, result in measured.items() if result.left_out},
        "not_reported": not_reported,
        "accuracies": rows,
    }
    return Projected(report, projected, head, model)


class _Prepared(NamedTuple):
    """The model, its weights and the images, before any device is used."""

    opened: Opened
    unseen: Unseen
    shared: dict[str, str]
    """The sets that are not reported, with the reason; empty but on the first rank."""
    samples: TargetSamples | EvaluationSamples
    order: Order
    model: Towers
    """With the tuned weights."""
    tokenizer: Tokenizer
    pretrained: State
    """Weights under open_clip's names, as ``tuned``."""
    tuned: State
    trained: Head | None
    head_rows: list[int]
    """For each class of the split, the row of the head; empty without a head."""
    head_templates: tuple[Template, ...]
    """Templates of the prompts from which the head started; empty without a head."""
    digests: dict[str, str]
    """Digests of the pre-trained and the tuned weights, and of the tuned head."""


def _prepare(config: Config, weights: Path, ranks: Ranks, settings: Settings, learn_on: str | None) -> _Prepared:
    """Everything that may fail on a typo, before steps that take minutes; raises as :func:`tpgm`."""
    opened = open_sets(config.evaluate.sets, ranks)
    with ranks.raise_on_all(UserError):
        unseen = open_unseen(config, learn_on, weights, opened)
        shared = shared_with(unseen, opened) if ranks.is_main else {}
        order = _order(unseen, settings, ranks)
        trained, head_rows = head_of(weights), list[int]()
        templates: tuple[Template, ...] = ()
        if trained is not None:
            head_rows = _head_rows(trained, unseen)
            templates = read_templates(config.data.target.templates, "data.target.templates")
        model = towers.create(config.model)
        tokenizer = towers.tokenizer_of(config.model)
        digests = {"pretrained": weights_digest(model)}
        pretrained = {name: tensor.clone() for name, tensor in model.export(model.state_dict()).items()}
        tuned = exported(model, config.model, weights)
        digests["weights"] = weights_digest(model)
        head = {} if trained is None else {"weight": trained.weight, "bias": trained.bias}
        _require_finite(weights, tuned | {f"{HEAD}{name}": tensor for name, tensor in head.items()})
        if head:
            digests["head"] = state_digest(head)
        samples = _samples(config, unseen, model, settings.seed, has_prompts=trained is None)
        return _Prepared(
            *(opened, unseen, shared, samples, order, model, tokenizer),
            *(pretrained, tuned, trained, head_rows, templates, digests),
        )


def _require_finite(weights: Path, tensors: State) -> None:
    """Validates weights that are projected.

    Raises:
        ConfigError: a tensor has an element that is not finite.
    """
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ConfigError(f"{weights}: {name} is not finite; name other weights by --weights")


def _learn(
    config: Config, prepared: _Prepared, anchor: Head | None, settings: Settings, ranks: Ranks
) -> tuple[Radii, History, Head | None]:
    """Learns the radii, and leaves the projected weights in the model; returns the projected head too.

    Args:
        anchor: the head to project towards; None: the head is not projected.
    """
    model, trained = prepared.model, prepared.trained
    head = _head_parameters(trained, ranks.device)
    parameters = dict(model.named_parameters()) | head
    anchors = {
        name: prepared.pretrained[model.exported_name(name)].reshape(each.shape).to(ranks.device)
        for name, each in model.named_parameters()
    }
    anchors |= {name: each.detach() for name, each in _head_parameters(anchor, ranks.device).items()}
    radii = Radii(anchors, {name: parameters[name].detach().clone() for name in anchors}, settings.norm)
    if not radii.names:
        raise ConfigError("--weights: they equal the pre-trained weights, so there is nothing to project")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in radii.names)

    def contrastive(batch: TargetBatch) -> Tensor:
        batch = batch.to(ranks.device)
        outputs = Outputs(*model.encode_pairs(batch.images, batch.text), model.scale())
        return flyp.loss(outputs, batch.labels, ranks.group).loss

    def cross_entropy(batch: EvaluationBatch) -> Tensor:
        batch = batch.to(ranks.device)
        images = model.encode_image(batch.images)
        weight, bias = (head[f"{HEAD}{name}"][prepared.head_rows] for name in ("weight", "bias"))
        outputs = Outputs(images, None, model.scale(), Classifier("head", weight, bias).logits(unit(images)))
        return linear_head.loss(outputs, batch.labels, ranks.group).loss

    setting = Setting(model.width)
    flyp, linear_head = Contrastive(Contrastive.Options(), setting), CrossEntropy(CrossEntropy.Options(), setting)
    loss_of: Callable[[Any], Tensor] = contrastive if trained is None else cross_entropy
    with ranks.progress(settings.iterations, "TPGM", "iteration") as bar:
        history = learn_radii(
            *(radii, parameters, loss_of, _batches(config, prepared, settings, ranks), settings.learning_rate),
            group=ranks.group,
            loss_scale=LOSS_SCALE if model.autocast is torch.float16 else 1.0,
            after=bar.update,
        )
    if trained is None:
        return radii, history, None
    weight, bias = (head[f"{HEAD}{name}"].detach().cpu() for name in ("weight", "bias"))
    return radii, history, Head(weight, bias, trained.class_names)


def _head_rows(head: Head, unseen: Unseen) -> list[int]:
    """The head's row of each class of the split.

    Raises:
        ConfigError: the head lacks a class, or two classes share a name.
    """
    numbers = torch.arange(len(head.class_names))
    rows = select_head_rows(head._replace(bias=numbers), unseen.class_names, unseen.imagenet_rows)
    if rows is None:
        name = first_missing_class(head, unseen.class_names)
        raise ConfigError(f"{unseen.name}: the head has no class {name!r}: learn on images of its classes")
    return rows.bias.tolist()


def _head_parameters(head: Head | None, device: torch.device) -> dict[str, nn.Parameter]:
    """Weight and bias of a head as parameters on a device; none without a head."""
    if head is None:
        return {}
    return {
        f"{HEAD}{name}": nn.Parameter(getattr(head, name).detach().to(device, copy=True))
        for name in ("weight", "bias")
    }


def _order(unseen: Unseen, settings: Settings, ranks: Ranks) -> Order:
    """Shuffled epochs over the split; a split of fewer images than a batch is one batch."""
    count = len(unseen.source)
    size = settings.batch_size if count >= settings.batch_size else count - count % ranks.world_size
    if not size:
        raise DataError(f"{unseen.name}: {count} images are less than one for each of {ranks.world_size} ranks")
    return Order(count, size, ranks.rank, ranks.world_size, settings.seed, "--batch-size")


class _Prompted(TargetSamples):
    """Images in the evaluation view, with prompts that are drawn again for every epoch."""

    def crop(self, sample_key: SampleKey, size: tuple[int, int]) -> None:  # type: ignore[override]
        """None: always the evaluation view."""


def _samples(
    config: Config, unseen: Unseen, model: Towers, seed: int, has_prompts: bool
) -> TargetSamples | EvaluationSamples:
    if not has_prompts:
        return EvaluationSamples(unseen.source, model.preprocess)
    tokenizer = towers.tokenizer_of(config.model, config.data.target.text_length)
    prompts = PromptTable(unseen.source, unseen.class_names, unseen.templates, tokenizer)
    return _Prompted(unseen.source, prompts, model.preprocess, model.pooled_at, seed)


def _batches(config: Config, prepared: _Prepared, settings: Settings, ranks: Ranks) -> Iterator[Any]:
    """This rank's batches of all iterations; an error of one rank is raised on all."""
    options = Options(workers=config.evaluate.workers, device=ranks.device)
    steps = range(settings.iterations)
    loaded: Iterator[Any] = training_batches(prepared.samples, prepared.order, steps, options)
    batches = Prefetcher(loaded, lambda batch: batch, torch.device("cpu"), limit=options.timeout)
    try:
        for _ in steps:
            with ranks.raise_on_all(DataError, StalledError):
                batch = next(batches)
            yield batch
    finally:
        batches.close()


def _announce(unseen: Unseen, not_reported: Mapping[str, str], settings: Settings, ranks: Ranks) -> None:
    for name, reason in not_reported.items():
        ranks.print(f"{name} is not reported: {reason}")
    count, classes = len(unseen.source), unseen.num_classes
    ranks.print(f"{unseen.name}: the radii are learned on {count:,} images of {classes} classes")
    if ranks.is_main:
        warn_of_size(unseen, settings.batch_size)


def _report_history(history: History, settings: Settings) -> None:
    if history.skipped:
        logger.warning(
            "%d of %d iterations are skipped: their loss or gradient is not finite",
            *(history.skipped, settings.iterations),
        )
    if history.unreached:
        logger.warning(
            "the loss does not depend on %d tensors, e.g. %s: their radii stay at the start",
            *(len(history.unreached), history.unreached[0]),
        )


def write(result: Projected, folder: Path) -> None:
    """Writes :data:`WEIGHTS` for open_clip, the head if there is one, ``tpgm.json`` and its figure."""
    with file_lock(folder / LOCK, f"results folder {folder}", wait=True):
        write_weights(result.weights, result.head, result.model, folder / WEIGHTS)
        write_atomic(folder / "tpgm.json", (json.dumps(result.report, indent=2) + "\n").encode())
        plots.alphas(result.report, folder / "tpgm.png")


def summarize(report: Mapping[str, Any]) -> str:
    """The split and the range of the alphas in one line."""
    alphas = list(report["alphas"].values())
    split = report["split"]
    return (
        f"alpha {min(alphas):.2f} to {max(alphas):.2f}, mean {sum(alphas) / len(alphas):.2f}, of {len(alphas)} "
        f"tensors, learned on {split['images']:,} images ({split['name']})"
    )


def table(report: Mapping[str, Any]) -> str:
    """The accuracies of a report as lines of text, in percent; a line if no set is reported."""
    metrics = report["metrics"]
    titles = {name: name if metric == "top1" else f"{name} ({metric})" for name, metric in metrics.items()}
    if not titles:
        return "no set is reported: add one of other images to evaluate.sets"
    width = max(len(row["weights"]) for row in report["accuracies"])
    lines = [f"{'weights':{width}}  " + "  ".join(f"{title:>5}" for title in titles.values())]
    for row in report["accuracies"]:
        cells = "  ".join(f"{100 * row[name]:{max(len(title), 5)}.1f}" for name, title in titles.items())
        lines.append(f"{row['weights']:{width}}  {cells}")
    return "\n".join(lines)
