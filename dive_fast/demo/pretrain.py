"""Pre-train the demo's small CLIP from scratch on generated pictures: plain symmetric contrastive loss.

    python -m dive_fast.demo.pretrain --out /tmp/model

writes an open_clip "local-dir" model (config, weights, tokenizer). The one in MODEL_DIR was made
with the default arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from dive_fast.demo import world

CONTEXT_LENGTH = 24
IMAGE_SIZE = 48
Tokenize = Callable[[Sequence[str]], Tensor]  # texts -> (n, CONTEXT_LENGTH) int64


def main() -> None:
    """Parse the command line, pre-train, save, and print zero-shot accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=world.MODEL_DIR, help="folder to write, replaced if it exists")
    parser.add_argument(
        "--images", type=int, default=40_000, help="pictures generated; captions are redrawn each time"
    )
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    tokenizer = build_tokenizer()
    config = model_config(len(tokenizer))
    model = open_clip.CLIP(**config["model_cfg"])
    pretrain(
        model,
        lambda texts: tokenize(tokenizer, texts),
        num_images=args.images,
        num_steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
    )
    save_model(args.out, model, tokenizer, config)
    for split, accuracy in zero_shot_accuracies(args.out).items():
        print(f"{split:<12} {100 * accuracy:5.1f} %")


def pretrain(
    model: nn.Module,
    tokenize: Tokenize,
    *,
    num_images: int,
    num_steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    warmup: int = 100,
    weight_decay: float = 0.1,
) -> None:
    """Train `model` in place with the symmetric contrastive loss on the stream "pretrain" of the world."""
    started = time.perf_counter()
    pictures = np.empty((num_images, world.IMAGE_SIZE, world.IMAGE_SIZE, 3), dtype=np.uint8)
    facts = []
    for index in range(num_images):
        drawn = world.sample("pretrain", index)
        pictures[index] = drawn.image
        facts.append(drawn.facts)
    print(f"{num_images} pictures in {time.perf_counter() - started:.0f} s", flush=True)

    decayed = [p for p in model.parameters() if p.ndim >= 2]
    kept = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)

    def schedule(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / num_steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    rng = np.random.default_rng(seed)
    labels = torch.arange(batch_size)
    batches_per_epoch = num_images // batch_size
    model.train()
    for step in range(num_steps):
        if step % batches_per_epoch == 0:
            order = rng.permutation(num_images)
        start = step % batches_per_epoch * batch_size
        rows = order[start : start + batch_size]
        texts = tokenize([world.caption(facts[row], rng) for row in rows])
        images = random_view(pictures[rows], rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            image_features = F.normalize(model.encode_image(images).float(), dim=-1)
            text_features = F.normalize(model.encode_text(texts).float(), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * image_features @ text_features.T
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 99:
            seconds = time.perf_counter() - started
            scale = float(model.logit_scale.exp())
            print(f"step {step + 1:5d}  loss {loss.item():.3f}  scale {scale:.1f}  {seconds:.0f} s", flush=True)


def random_view(pictures: np.ndarray, rng: np.random.Generator) -> Tensor:
    """(n, h, w, 3) uint8 -> (n, 3, IMAGE_SIZE, IMAGE_SIZE) normalised; one random square crop for all."""
    side = int(rng.integers(IMAGE_SIZE, pictures.shape[1] + 1))
    top, left = rng.integers(0, pictures.shape[1] - side + 1, size=2)
    crop = torch.from_numpy(pictures[:, top : top + side, left : left + side]).permute(0, 3, 1, 2).float()
    crop = F.interpolate(crop, size=IMAGE_SIZE, mode="bicubic", antialias=True).clamp(0, 255) / 255
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    return (crop - mean) / std


# ------------------------------------------------------------------------------- model


def model_config(vocab_size: int) -> dict[str, Any]:
    """The contents of open_clip_config.json."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": 8, "width": 128, "head_width": 32, "layers": 4},
            "text_cfg": {
                "context_length": CONTEXT_LENGTH,
                "vocab_size": vocab_size,
                "hf_tokenizer_name": "local-dir",  # open_clip reads the tokenizer from the model's own folder
                "width": 96,
                "heads": 3,
                "layers": 3,
            },
        },
        "preprocess_cfg": {
            "mean": list(open_clip.OPENAI_DATASET_MEAN),
            "std": list(open_clip.OPENAI_DATASET_STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: <pad> = 0, <bos>, <unk>, the world's words, and <eot> with the highest id,
    where CLIP's text tower looks for it.
    """
    words = ["<pad>", "<bos>", "<unk>", *world.vocabulary(), "<eot>"]
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eot>", special_tokens=[("<bos>", ids["<bos>"]), ("<eot>", ids["<eot>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        eos_token="<eot>",
        model_max_length=CONTEXT_LENGTH,
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """texts -> (n, CONTEXT_LENGTH) int64 token ids, padded and cut."""
    encoded = tokenizer(
        list(texts), return_tensors="pt", padding="max_length", truncation=True, max_length=CONTEXT_LENGTH
    )
    return encoded.input_ids


def save_model(out: Path, model: nn.Module, tokenizer: PreTrainedTokenizerFast, config: dict[str, Any]) -> None:
    """Write the model folder whole, then swap it in, so that a reader never finds half of one.

    Weights are stored in fp16 (half the size); open_clip loads them into fp32 parameters.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    unfinished.chmod(0o755)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, unfinished / "open_clip_model.safetensors")
    if out.exists():
        shutil.rmtree(out)
    unfinished.rename(out)


# -------------------------------------------------------------------------- evaluation


@torch.no_grad()
def zero_shot_accuracies(model_dir: Path, num_samples: int | None = None) -> dict[str, float]:
    """Top-1 zero-shot accuracy, 0..1, on every evaluation split (its first `num_samples` pictures);
    class embeddings are averaged over templates.
    """
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model_dir}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model_dir}")
    accuracies = {}
    for split, task in world.TASKS.items():
        if split == "target":
            continue
        prompts = [template.format(name) for name in task.classes for template in task.templates]
        text_features = F.normalize(model.encode_text(tokenizer(prompts)), dim=-1)
        text_features = text_features.view(len(task.classes), len(task.templates), -1).mean(dim=1)
        text_features = F.normalize(text_features, dim=-1)
        samples = [world.sample(split, index) for index in range(num_samples or world.NUM_SAMPLES[split])]
        images = torch.stack([preprocess(drawn.image) for drawn in samples])
        predicted = (model.encode_image(images) @ text_features.T).argmax(dim=1)
        labels = torch.tensor([drawn.label for drawn in samples])
        accuracies[split] = float((predicted == labels).float().mean())
    return accuracies


if __name__ == "__main__":
    main()
