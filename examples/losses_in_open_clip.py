"""DiVE's loss alone in a plain open_clip loop: ``python examples/losses_in_open_clip.py``.

It tunes the demo's small CLIP twice, without and with DiVE's loss, and prints how much of the geometry is kept.
With a model and batches of yours, the part that matters is the function :func:`tune`. It takes seconds on a CPU.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor
from torch.nn.functional import normalize

import dive_fast
from dive_fast import dive_loss
from dive_fast.data.demo import splits

MODEL = f"local-dir:{Path(dive_fast.__file__).parent / 'demo/model'}"
"""For CLIP itself: ``create_model_and_transforms("ViT-B-16-quickgelu", pretrained="openai")``."""
BATCH_SIZE = 32


class Batch(NamedTuple):
    """Images ``(B, 3, H, W)`` and tokens ``(B, context length)``."""

    images: Tensor
    tokens: Tensor


def batches(split: str, first: int, count: int) -> Iterator[Batch]:
    """Batches of the demo's pictures with their texts; a DataLoader in your code."""
    _, _, preprocess = open_clip.create_model_and_transforms(MODEL)
    tokenizer = open_clip.get_tokenizer(MODEL)
    for start in range(first, first + count * BATCH_SIZE, BATCH_SIZE):
        samples = [splits.sample(split, index) for index in range(start, start + BATCH_SIZE)]
        images = torch.stack([preprocess(sample.image) for sample in samples])
        yield Batch(images, tokenizer([sample.text for sample in samples]))


def tune(weight: float, steps: int) -> tuple[Any, Any]:
    """Fine-tunes by ``contrastive_loss(target) + weight * difference_loss(reference)``; returns (before, after).

    Args:
        weight: lambda; 0: plain contrastive fine-tuning (FLYP). For CLIP ViT-B/16 at 1e-5 the paper has 1000.
    """
    torch.manual_seed(0)
    model, *_ = open_clip.create_model_and_transforms(MODEL)
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1)
    average_vector = torch.zeros(model.text_projection.shape[1])
    for target, reference in zip(batches("target", 0, steps), batches("reference", 0, steps)):
        with torch.no_grad():
            image_teacher = frozen.encode_image(reference.images, normalize=True)
            text_teacher = frozen.encode_text(reference.tokens, normalize=True)
        result = dive_loss(
            *(model.encode_image(target.images), model.encode_text(target.tokens), model.logit_scale.exp()),
            *(model.encode_image(reference.images), model.encode_text(reference.tokens)),
            *(image_teacher, text_teacher, average_vector),
            weight=weight,
        )
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        # Of this step, for the next one; it carries no gradient.
        average_vector = result.average_vector
    return frozen, model.eval()


@torch.no_grad()
def geometry_kept(before: Any, after: Any) -> float:
    """RSA: correlation of the distances between embeddings of held-out pairs, before and after."""
    distances = []
    batch = next(batches("reference_heldout", 0, 1))
    for model in (before, after):
        rows = torch.cat([model.encode_image(batch.images), model.encode_text(batch.tokens)])
        similarity = normalize(rows) @ normalize(rows).T
        above = torch.ones_like(similarity, dtype=torch.bool).triu(1)
        distances.append(1 - similarity[above])
    return float(torch.corrcoef(torch.stack(distances))[0, 1])


def main(steps: int = 12) -> dict[str, float]:
    """RSA after both trainings, by the weight."""
    return {f"weight {weight:g}": round(geometry_kept(*tune(weight, steps)), 3) for weight in (0.0, 1.0)}


if __name__ == "__main__":
    print(main())
