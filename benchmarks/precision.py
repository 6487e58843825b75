"""Measures the effect of rounding on difference vectors and their gradients: ``python benchmarks/precision.py``.

The weights of real towers are changed until the embeddings of reference pairs differ by |u|. Then each precision
and remedy is compared with fp32: the distance of embeddings, and the direction of the gradient of AVL + PVL with
respect to all parameters. Cases in the results file are not run again.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loss_report import REPOSITORY, commit, device_name, slug, write_json
from real_data import DATA
from rounding import REMEDIES, computing
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from dive_fast.config.schema import ModelConfig
from dive_fast.data.batch import ReferenceBatch
from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.data.samples import ReferenceSamples
from dive_fast.data.sources.sample_table import Sample
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.kernels import naive
from dive_fast.model.features import Pairs
from dive_fast.model.towers import Towers, create, tokenizer_of, unit

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
PIECE = 64 if DEVICE.type == "cuda" else 16
"""Pairs embedded at once."""
WEIGHT, LOSS_SCALE = 1000.0, 2.0**16
"""Lambda, and the initial loss scale of fp16; halved when a gradient overflows, as in training."""
TUNING_STEPS, TUNING_RATE = 8, 1e-5
NOISE_PAIRS = 32
NORMS = (1e-3, 3e-3, 1e-2, 3e-2)
FIGURES = ("u", "v", "u_spread", "image_noise", "text_noise", "cosine", "norm_ratio", "loss_ratio")
"""Figures of a case: |u|, |v| and the spread of u around their mean; the distance of embeddings from fp32's; the
gradient's cosine and norm ratio to fp32's; the ratio of AVL + PVL to fp32's."""
Gradient = list[Tensor]


class Case(NamedTuple):
    """One gradient that is compared with fp32's."""

    model: str
    change: str
    """Change of the weights: ``random``, or ``trained`` by a few steps of contrastive fine-tuning."""
    norm: float
    """Mean |u| over pairs after the scaled change."""
    batch: int
    """Number of reference pairs, B'."""
    precision: str
    remedy: str = "none"
    teacher: str = "fp32"
    """``fp32``; ``fp16 cache``: its rows rounded to fp16; ``matched``: computed as the student computes."""
    average: str = "settled"
    """m before the step: ``settled``, the mean difference of the batch, or ``start``, zero."""


def grid(models: Sequence[str], full: bool) -> list[Case]:
    """All cases, the most informative first; without ``full``, a selection for two hours on two CPU cores."""
    first, *larger = models
    hard, small = NORMS[:2], NORMS[1:2]
    half, rounded = ("fp16", "bf16"), ("fp16", "bf16", "tf32")

    def cases(
        model: str,
        change: str,
        norms: Sequence[float],
        batch: int,
        ways: Sequence[str],
        remedies: Sequence[str] = ("none",),
    ) -> list[Case]:
        product = itertools.product([change], norms, [batch], ways, remedies)
        return [Case(model, *values) for values in product]

    def variants(model: str) -> list[Case]:
        base = cases(model, "trained", small, 32, half)
        changes = {"average": "start"}, {"teacher": "matched"}, {"teacher": "fp16 cache"}
        return [case._replace(**change) for change in changes for case in base]

    if full:
        chosen = []
        for model in models:
            for change, batch in itertools.product(("trained", "random"), (32, 128, 512)):
                chosen += cases(model, change, NORMS, batch, rounded)
            chosen += cases(model, "trained", hard, 32, half, REMEDIES[1:]) + variants(model)
        return chosen
    chosen = cases(first, "trained", hard, 32, rounded) + cases(first, "trained", NORMS[2:], 32, half)
    chosen += cases(first, "trained", small, 32, half, REMEDIES[1:]) + variants(first)
    chosen += cases(first, "trained", hard[:1], 32, half[:1], REMEDIES[-2:])
    chosen += cases(first, "random", small, 32, rounded)
    matched = cases(first, "random", small, 32, half) + cases(first, "trained", [1e-3, 1e-2], 32, half)
    chosen += [case._replace(teacher="matched") for case in matched]
    chosen += cases(first, "trained", small, 128, half)
    for model in larger:
        chosen += cases(model, "trained", small, 16, half)
    return chosen + cases(first, "trained", small, 512, half)


class Subject:
    """A model with its pairs and the changes of its weights."""

    def __init__(self, name: str, pretrained: str | None, tuned: Path | None) -> None:
        torch.manual_seed(0)
        self.config, self._tuned = ModelConfig(name=name, pretrained=pretrained), tuned
        self.towers = create(self.config).to(DEVICE).eval()
        self._frozen = [parameter.detach().clone() for parameter in self.parameters]
        captions = [open_webdataset(str(tar), ".txt") for tar in sorted((DATA / "captions").glob("*.tar"))]
        classes = open_webdataset(str(DATA / "imagenet_samples"), ".txt")
        # Class names stand in for captions where COCO's photos end.
        pairs = [sample for source in (*captions, classes) for sample in source.samples]
        self.reference, self._target = self._samples(pairs), self._samples(classes.samples)
        self._directions: dict[str, Gradient] = {}
        self._scales: dict[tuple[str, float], float] = {}
        self.loss_scale = LOSS_SCALE

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All that is tuned; the logit scale has no part in AVL and PVL."""
        return [p for name, p in self.towers.named_parameters() if not name.startswith("logit")]

    def pairs(self, count: int) -> list[ReferenceBatch]:
        """The first ``count`` pairs in batches of PIECE."""
        return batches(self.reference, range(count), PIECE)

    def move(self, change: str, norm: float) -> None:
        """Applies a change of the weights, scaled so that |u| in fp32 is ``norm``; 0 restores the weights."""
        if norm == 0:
            return self._shift(None, 0.0)
        if change not in self._directions:
            self._directions[change] = self._random() if change == "random" else self._trained()
        direction = self._directions[change]
        if (change, norm) not in self._scales:
            self._scales[change, norm] = self._scale_of(direction, norm)
        self._shift(direction, self._scales[change, norm])

    def _scale_of(self, direction: Gradient, norm: float) -> float:
        pieces = self.pairs(NOISE_PAIRS)
        self._shift(None, 0.0)
        frozen = embed(self.towers, pieces)
        scale = 1e-2
        for _ in range(12):
            self._shift(direction, scale)
            actual = _lengths(embed(self.towers, pieces), frozen)[0]
            if abs(actual / norm - 1) < 0.03:
                break
            # |u| is nearly proportional to small changes only, so the factor is bounded.
            scale *= min(max(norm / actual, 0.05), 20.0)
        return scale

    @torch.no_grad()
    def _shift(self, direction: Gradient | None, scale: float) -> None:
        for index, (parameter, frozen) in enumerate(zip(self.parameters, self._frozen, strict=True)):
            parameter.copy_(frozen if direction is None else frozen + scale * direction[index])

    def _random(self) -> Gradient:
        generator = torch.Generator(DEVICE).manual_seed(1)
        noise = [torch.randn(frozen.shape, generator=generator, device=DEVICE) for frozen in self._frozen]
        return [frozen.square().mean().sqrt() * one for frozen, one in zip(self._frozen, noise, strict=True)]

    def _trained(self) -> Gradient:
        """Tuned weights, read from a file or trained for a few contrastive steps, minus the frozen weights."""
        self._shift(None, 0.0)
        if self._tuned is not None:
            self.towers.load_exported(load_file(self._tuned, device=str(DEVICE)))
        else:
            optimizer = torch.optim.AdamW(self.parameters, TUNING_RATE, weight_decay=0.1)
            rows = torch.randperm(1000, generator=torch.Generator().manual_seed(2)).tolist()
            for step in range(TUNING_STEPS):
                (batch,) = batches(self._target, rows[step * PIECE : (step + 1) * PIECE], PIECE)
                image, text = self.towers.encode_pairs(batch.images, batch.text)
                optimizer.zero_grad()
                naive.contrastive_loss(image, text, self.towers.scale().detach()).backward()
                optimizer.step()
            optimizer.zero_grad()
        tuned = [parameter.detach().clone() for parameter in self.parameters]
        self._shift(None, 0.0)
        return [after - before for after, before in zip(tuned, self._frozen, strict=True)]

    def _samples(self, samples: Sequence[Sample]) -> ReferenceSamples:
        source, tokenizer = Source.of(samples), tokenizer_of(self.config)
        return ReferenceSamples(source, tokenizer, self.towers.preprocess, self.towers.pooled_at, 0)


def batches(samples: ReferenceSamples, rows: Sequence[int], size: int) -> list[ReferenceBatch]:
    keys = [(0, row) for row in rows]
    return [batch.to(DEVICE) for batch in batches_of(samples, keys, size, Options(workers=0))]


@torch.no_grad()
def features(towers: Towers, pieces: Sequence[ReferenceBatch]) -> Pairs:
    """Features of all pairs in fp32, not normalized."""
    parts = [towers.encode_pairs(piece.images, piece.text) for piece in pieces]
    return Pairs(*(torch.cat(half).float() for half in zip(*parts, strict=True)))


def embed(towers: Towers, pieces: Sequence[ReferenceBatch]) -> Pairs:
    """Unit rows of all pairs."""
    return Pairs(*map(unit, features(towers, pieces)))


def parameter_gradient(
    subject: Subject, pieces: Sequence[ReferenceBatch], teacher: Pairs, average: Tensor
) -> tuple[float, Gradient]:
    """AVL + PVL and its gradient, by micro-batches and loss scaling as in the engine.

    Args:
        average: m before the step.
    """
    leaves = Pairs(*(half.requires_grad_() for half in features(subject.towers, pieces)))
    loss = naive.difference_loss(*leaves, *teacher, average).loss
    upstream = torch.autograd.grad(WEIGHT * loss, leaves)
    sizes = [len(piece.images) for piece in pieces]
    while True:
        total = [torch.zeros_like(parameter) for parameter in subject.parameters]
        scale = subject.loss_scale if subject.towers.autocast is torch.float16 else 1.0
        for piece, *rows in zip(pieces, *(half.split(sizes) for half in upstream), strict=True):
            outputs = subject.towers.encode_pairs(piece.images, piece.text)
            surrogate = sum((half.float() * row).sum() for half, row in zip(outputs, rows, strict=True))
            torch._foreach_add_(total, torch.autograd.grad(scale * surrogate, subject.parameters))
        if all(torch.isfinite(gradient).all() for gradient in total):
            torch._foreach_mul_(total, 1 / (scale * WEIGHT))
            return loss.item(), total
        subject.loss_scale /= 2


class Truth(NamedTuple):
    """Results in fp32 with an fp32 teacher."""

    frozen: Pairs
    moved: Pairs
    average: Tensor
    loss: float
    gradient: Gradient


def true_gradient(subject: Subject, case: Case) -> Truth:
    """Computes the fp32 results for the weights, pairs and m of a case."""
    pieces = subject.pairs(case.batch)
    with computing(subject.towers, "fp32"):
        subject.move(case.change, 0.0)
        frozen = embed(subject.towers, pieces)
        subject.move(case.change, case.norm)
        moved = embed(subject.towers, pieces)
        differences = [after - before for after, before in zip(moved, frozen, strict=True)]
        average = torch.stack(differences).mean((0, 1)) * (case.average == "settled")
        loss, gradient = parameter_gradient(subject, pieces, frozen, average)
    return Truth(frozen, moved, average, loss, gradient)


def compare(subject: Subject, case: Case, truth: Truth) -> dict[str, float]:
    """The figures of one case."""
    pieces, teacher = subject.pairs(case.batch), truth.frozen
    if case.teacher == "matched":
        subject.move(case.change, 0.0)
        with computing(subject.towers, case.precision, case.remedy):
            teacher = embed(subject.towers, pieces)
    elif case.teacher == "fp16 cache":
        teacher = Pairs(*(half.half().float() for half in teacher))
    subject.move(case.change, case.norm)
    with computing(subject.towers, case.precision, case.remedy):
        moved = embed(subject.towers, pieces)
        loss, gradient = parameter_gradient(subject, pieces, teacher, truth.average)
    u, v = (after - before for after, before in zip(truth.moved, truth.frozen, strict=True))
    image_noise, text_noise = _lengths(moved, truth.moved)
    cosine, norm_ratio = _compared(gradient, truth.gradient)
    return {
        "u": u.norm(dim=1).mean().item(),
        "v": v.norm(dim=1).mean().item(),
        "u_spread": (u - u.mean(0)).norm(dim=1).mean().item(),
        "image_noise": image_noise,
        "text_noise": text_noise,
        "cosine": cosine,
        "norm_ratio": norm_ratio,
        "loss_ratio": loss / truth.loss,
    }


def noise_floor(subject: Subject) -> list[dict[str, Any]]:
    """|u| and |v| due to rounding alone at the frozen weights, for every precision and remedy."""
    subject.move("random", 0.0)
    pieces, rows = subject.pairs(NOISE_PAIRS), []
    with computing(subject.towers, "fp32"):
        exact = embed(subject.towers, pieces)
    for precision, remedy in (("tf32", "none"), *itertools.product(("fp16", "bf16"), REMEDIES)):
        with computing(subject.towers, precision, remedy):
            image, text = _lengths(embed(subject.towers, pieces), exact)
        rows.append({"precision": precision, "remedy": remedy, "image_noise": image, "text_noise": text})
    return rows


def _lengths(one: Pairs, other: Pairs) -> tuple[float, float]:
    """Mean length of the differences of images and of texts."""
    image, text = ((a - b).norm(dim=1).mean().item() for a, b in zip(one, other, strict=True))
    return image, text


def _compared(gradient: Gradient, truth: Gradient) -> tuple[float, float]:
    """Cosine of the gradients and ratio of their norms."""
    dot = square = true_square = 0.0
    for one, other in zip(gradient, truth, strict=True):
        dot += (one * other).sum().item()
        square += one.square().sum().item()
        true_square += other.square().sum().item()
    return dot / (square * true_square) ** 0.5, (square / true_square) ** 0.5


class Results:
    """The results file: settings of the run, noise of each model, and figures of every case."""

    def __init__(self, path: Path) -> None:
        self.path = path
        tree = json.loads(path.read_text()) if path.exists() else {}
        self.noise: dict[str, list[dict[str, Any]]] = tree.get("noise", {})
        self.cases: list[dict[str, Any]] = tree.get("cases", [])

    def has(self, case: Case) -> bool:
        """Whether the file has the case."""
        return any(entry.items() >= case._asdict().items() for entry in self.cases)

    def write(self) -> None:
        """Writes all figures so far."""
        about = {"device": device_name(), "torch": torch.__version__, "commit": commit()}
        write_json(self.path, {**about, "noise": self.noise, "cases": self.cases})

    def tables(self) -> str:
        """Markdown tables of noise and cases."""
        lines = ["| model | precision | in fp32 | noise of u | of v |", "|---|---|---|---|---|"]
        for model, rows in self.noise.items():
            for row in rows:
                noise = f"{row['image_noise']:.1e} | {row['text_noise']:.1e}"
                lines.append(f"| {model} | {row['precision']} | {row['remedy']} | {noise} |")
        lines += ["", "| " + " | ".join((*Case._fields, *FIGURES)) + " |"]
        lines.append("|---" * (len(Case._fields) + len(FIGURES)) + "|")
        for entry in self.cases:
            cells = [f"{entry[name]:g}" if name == "norm" else str(entry[name]) for name in Case._fields]
            cells += [f"{entry[name]:.3g}" for name in FIGURES]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def main() -> None:
    """Runs the missing cases and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "ViT-B-16", "ViT-L-14"])
    parser.add_argument("--pretrained", help="open_clip's tag, such as openai; default: random weights")
    parser.add_argument(
        "--tuned", type=Path, help="a fine-tuned model.safetensors: the trained change of the weights"
    )
    parser.add_argument(
        "--full", action="store_true", default=DEVICE.type == "cuda", help="run all cases; the default on a GPU"
    )
    parser.add_argument("--results", type=Path, help="file; default: results/<device>-precision.json")
    options = parser.parse_args()
    results = Results(options.results or REPOSITORY / f"benchmarks/results/{slug(device_name())}-precision.json")
    cases = [case for case in grid(options.models, options.full) if not results.has(case)]
    progress = tqdm(total=len(cases), unit="case")
    # Consecutive cases share weights, pairs and m, and so the gradient in fp32.
    for model, of_model in itertools.groupby(cases, lambda case: case.model):
        subject = Subject(model, options.pretrained, options.tuned)
        if model not in results.noise:
            results.noise[model] = noise_floor(subject)
        for _, group in itertools.groupby(
            of_model, lambda case: (case.change, case.norm, case.batch, case.average)
        ):
            truth = None
            for case in group:
                truth = truth or true_gradient(subject, case)
                begin = time.perf_counter()
                figures = compare(subject, case, truth)
                results.cases.append({**case._asdict(), **figures, "seconds": time.perf_counter() - begin})
                results.write()
                progress.update()
    progress.close()
    print(results.tables())


if __name__ == "__main__":
    main()
