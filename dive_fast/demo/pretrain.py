"""Pre-trains the demo's model: a small CLIP, trained on the demo's world from random weights.

``python -m dive_fast.demo.pretrain`` writes the folder that ships as dive_fast/demo/model.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor

from dive_fast.data.demo import splits, world
from dive_fast.kernels import contrastive_loss
from dive_fast.model.model_names import MODEL_DIR

CONTEXT = 20
"""Number of tokens of the longest caption, with its start and end tokens."""
MEAN_AND_STD = 0.5


def write_tokenizer(folder: Path, vocabulary: Iterable[str], context: int) -> int:
    """Writes a word-level tokenizer; returns the size of its vocabulary, special tokens included.

    The end token has the highest id, since open_clip pools a causal text tower at the largest id.
    """
    words = ["<pad>", "<unk>", "<start>", *sorted(set(vocabulary)), "<end>"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", len(words) - 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<start>",
        "eos_token": "<end>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": context,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return len(words)


def write_config(folder: Path, vocabulary: int) -> None:
    """Writes the model's shape and preprocessing, as open_clip reads them from a ``local-dir``."""
    vision = {"image_size": world.IMAGE_SIZE, "patch_size": 14, "width": 128, "head_width": 32, "layers": 4}
    text = {
        "context_length": CONTEXT,
        "vocab_size": vocabulary,
        "hf_tokenizer_name": "demo",
        "width": 96,
        "heads": 3,
        "layers": 2,
    }
    config = {
        "model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"size": world.IMAGE_SIZE, "mean": [MEAN_AND_STD] * 3, "std": [MEAN_AND_STD] * 3},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def draw(indices: range) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], list[world.Facts]]:
    """Images ``(len, H, W, 3)`` of the pre-training stream, and the facts that they show."""
    samples = [splits.sample("pretrain", index) for index in indices]
    return np.stack([np.asarray(sample.image) for sample in samples]), [sample.facts for sample in samples]


def pretraining_set(count: int, processes: int) -> tuple[Tensor, list[world.Facts]]:
    """Images ``(count, 3, H, W)`` uint8 for pre-training, and the facts that each shows."""
    chunks = [range(first, min(first + 500, count)) for first in range(0, count, 500)]
    with ProcessPoolExecutor(processes) as pool:
        drawn = list(pool.map(draw, chunks))
    images = torch.from_numpy(np.concatenate([pixels for pixels, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    return images, [facts for _, chunk in drawn for facts in chunk]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts images ``(B, 3, H, W)`` uint8 by up to 3 pixels per batch, scales each, and normalizes them."""
    dy, dx = torch.randint(-3, 4, (2,), generator=generator).tolist()
    pixels = torch.roll(images, (dy, dx), (2, 3)).float() / 255
    gain = 1 + 0.1 * torch.randn(len(images), 1, 1, 1, generator=generator)
    return (pixels * gain - MEAN_AND_STD) / MEAN_AND_STD


def fit(
    folder: Path,
    images: Tensor,
    caption: Callable[[int, np.random.Generator], str],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: str = "cpu",
) -> Any:
    """Trains the model of ``folder`` from random weights with the contrastive loss; returns it on the CPU.

    Args:
        images: ``(N, 3, H, W)`` uint8.
        caption: draws a caption of the image in a row.
    """
    torch.manual_seed(seed)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    started = time.perf_counter()
    model: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False, force_custom_text=True)
    model.to(device).train()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(images), generator=generator)
        rows, order = order[:batch_size], order[batch_size:]
        captions = [caption(row, rng) for row in rows.tolist()]
        rate = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        features = model(augment(images[rows], generator).to(device), tokenizer(captions).to(device))
        loss = contrastive_loss(features[0], features[1], model.logit_scale.exp().clamp(max=100))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    return model.cpu().eval()


def save(model: Any, folder: Path) -> None:
    """Writes the weights next to the config, under open_clip's names, in which the text tower has no prefix."""
    state = {name.removeprefix("text."): value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


@torch.no_grad()
def zero_shot_accuracy(model: Any, folder: Path, split: str) -> float:
    """Zero-shot accuracy of the model on a split of the demo's world."""
    tokenizer, task = open_clip.get_tokenizer(f"local-dir:{folder}"), world.TASKS[split]
    rows = []
    for name in task.classes:
        prompts = F.normalize(
            model.encode_text(tokenizer([template.format(name) for template in task.templates])), dim=-1
        )
        rows.append(F.normalize(prompts.mean(0), dim=-1))
    samples = [splits.sample(split, index) for index in range(world.NUM_SAMPLES[split])]
    pixels = torch.from_numpy(np.stack([np.asarray(sample.image) for sample in samples])).permute(0, 3, 1, 2)
    features = torch.cat([model.encode_image((chunk / 255 - 0.5) / 0.5) for chunk in pixels.split(200)])
    labels = torch.tensor([sample.label for sample in samples])
    return float(((features @ torch.stack(rows).T).argmax(1) == labels).float().mean())


def main() -> None:
    """Parses the arguments, trains, writes the folder when all of it is there, and prints zero-shot accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--images", type=int, default=24_000)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent) as name:
        folder = Path(name)
        write_config(folder, write_tokenizer(folder, world.vocabulary(), CONTEXT))
        started = time.perf_counter()
        images, facts = pretraining_set(options.images, processes=len(os.sched_getaffinity(0)))
        print(f"{options.images} images drawn in {time.perf_counter() - started:.0f} s", flush=True)
        # Matrices this small gain nothing from a second thread, and one thread gives the same sums on any machine.
        torch.set_num_threads(1)
        model = fit(
            folder,
            images,
            lambda row, rng: world.caption(facts[row], rng),
            steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            seed=options.seed,
        )
        save(model, folder)
        options.out.mkdir(exist_ok=True)
        for file in folder.iterdir():
            file.chmod(0o644)
            file.replace(options.out / file.name)
    for split in world.TASKS:
        if split != "target":
            print(f"{split:12s} {zero_shot_accuracy(model, options.out, split):.3f}")


if __name__ == "__main__":
    main()
