"""Tests of the demo's generated world and of the small model that ships with it."""

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dive_fast.data.demo import splits, world
from dive_fast.model.model_names import MODEL_DIR

CAPTIONED = ("reference", "reference_heldout")
EXPECTED_TEXTS = [
    "aqua",
    "rose",
    "water",
    "a neon sign of a brown plain semicircle over bricks",
]
EXPECTED_BRIGHTNESS = [109.11, 63.4, 166.28, 32.33]


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> int:
    """Reduces each split to 5 samples in shards of 3."""
    monkeypatch.setattr(world, "NUM_SAMPLES", dict.fromkeys(world.SPLITS, 5))
    monkeypatch.setattr(splits, "SHARD_SIZE", 3)
    return 5


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def members(folder: Path) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    for shard in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            contents |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return contents


# Samples


def test_world_version_is_bumped_with_the_generator() -> None:
    """Caches are keyed by WORLD_VERSION. If this fails, bump it and put the new numbers here.

    Brightness is compared loosely, as floating point differs a little between machines.
    """
    drawn = [splits.sample(split, 7) for split in ("target", "ood", "zs_backdrop", "reference")]
    assert splits.WORLD_VERSION == "2"
    assert [sample.text for sample in drawn] == EXPECTED_TEXTS
    brightness = [float(np.asarray(sample.image).mean()) for sample in drawn]
    assert brightness == pytest.approx(EXPECTED_BRIGHTNESS, abs=0.5)


@pytest.mark.parametrize("split", world.SPLITS)
def test_sample_is_independent_of_its_neighbours(split: str) -> None:
    forwards = [splits.sample(split, index) for index in (0, 1, 2)]
    again = splits.sample(split, 2)
    assert forwards[2].image.tobytes() == again.image.tobytes()
    assert (forwards[2].text, forwards[2].label) == (again.text, again.label)


def test_splits_share_no_picture() -> None:
    pictures = [splits.sample(split, index).image.tobytes() for split in world.SPLITS for index in range(20)]
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("split", world.TASKS)
def test_labels_match_the_attributes_shown(split: str) -> None:
    task = world.TASKS[split]
    drawn = [splits.sample(split, index) for index in range(200)]
    for sample in drawn:
        assert task.classes[sample.label] == sample.text == getattr(sample.facts, task.attribute)
    assert {sample.label for sample in drawn} == set(range(len(task.classes)))
    assert all(template.count("{}") == 1 for template in task.templates)


def test_ood_split_has_the_same_classes_in_other_styles() -> None:
    styles = {split: {splits.sample(split, i).facts.style for i in range(60)} for split in ("target", "id", "ood")}
    assert styles["target"] == styles["id"] == {"photo"}
    assert styles["ood"] == set(world.STYLES) - {"photo"}
    assert world.TASKS["ood"].classes == world.TASKS["target"].classes


def test_zero_shot_classes_are_no_target_classes() -> None:
    for split, task in world.TASKS.items():
        if split.startswith("zs_"):
            assert not set(task.classes) & set(world.SHADES)


def test_reference_covers_all_attributes_without_labels() -> None:
    drawn = [splits.sample("reference", index) for index in range(400)]
    assert {sample.facts.shape for sample in drawn} == set(world.SHAPES)
    assert {sample.facts.shade for sample in drawn} == set(world.SHADES)
    assert {sample.facts.style for sample in drawn} == set(world.STYLES)
    assert all(sample.label == -1 for sample in drawn)


# Folders


def test_prepare_writes_equal_bytes_in_two_roots(tmp_path: Path, small_world: int) -> None:
    first, second = files(splits.prepare(tmp_path / "a")), files(splits.prepare(tmp_path / "b"))
    assert first == second
    assert {name.split("/")[0] for name in first} == set(world.SPLITS)


def test_prepare_writes_what_loaders_read(tmp_path: Path, small_world: int) -> None:
    root = splits.prepare(tmp_path)
    for split in world.SPLITS:
        contents = members(root / split)
        expected = ("jpg", "txt") if split in CAPTIONED else ("jpg", "cls", "txt")
        assert [name for name in contents] == [f"{i:06d}.{end}" for i in range(small_world) for end in expected]
        assert Image.open(io.BytesIO(contents["000000.jpg"])).size == (world.IMAGE_SIZE, world.IMAGE_SIZE)
        assert (root / split / "classes.txt").exists() == (split not in CAPTIONED)
    names = (root / "id" / "classes.txt").read_text().splitlines()
    contents = members(root / "id")
    for i in range(small_world):
        assert names[int(contents[f"{i:06d}.cls"])] == contents[f"{i:06d}.txt"].decode()


def test_prepare_keeps_existing_and_restores_missing_splits(tmp_path: Path, small_world: int) -> None:
    root = splits.prepare(tmp_path)
    (root / "id" / "mark").touch()
    shards = files(root / "ood")
    for path in (root / "ood").iterdir():
        path.unlink()
    (root / "ood").rmdir()
    splits.prepare(tmp_path)
    assert (root / "id" / "mark").exists()
    assert files(root / "ood") == shards


def test_prepare_failure_leaves_no_split(
    tmp_path: Path, small_world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(splits, "_members", fail)
        with pytest.raises(OSError, match="disk full"):
            splits.prepare(tmp_path)
    assert list((tmp_path / f"demo-{splits.WORLD_VERSION}").iterdir()) == []


def test_prepare_concurrent_calls(tmp_path: Path, small_world: int) -> None:
    """Threads compete for the same renames as processes do."""
    with ThreadPoolExecutor(3) as pool:
        (folder,) = set(pool.map(splits.prepare, [tmp_path] * 3))
    assert {path.name for path in folder.iterdir()} == set(world.SPLITS)
    assert len(files(folder)) == len(files(splits.prepare(tmp_path / "alone")))


def test_resolve_returns_paths_of_the_cache(
    tmp_path: Path, small_world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIVE_FAST_CACHE", str(tmp_path))
    root = tmp_path / f"demo-{splits.WORLD_VERSION}"
    assert splits.resolve("demo:target") == root / "target"
    assert splits.resolve("demo:target/classes.txt").read_text().splitlines() == list(world.SHADES)


@pytest.mark.parametrize("path", ["demo:nonsense", "demo:", "target", "other:target"])
def test_resolve_error_lists_the_splits(path: str) -> None:
    with pytest.raises(ValueError, match="demo:reference_heldout"):
        splits.resolve(path)


# Model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return open_clip.get_tokenizer(f"local-dir:{MODEL_DIR}")


@pytest.mark.parametrize("force_custom_text", [False, True])
def test_demo_model_loads_in_fp32_and_is_small(force_custom_text: bool) -> None:
    model = open_clip.create_model(f"local-dir:{MODEL_DIR}", force_custom_text=force_custom_text)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) < 6_000_000


def test_demo_tokenizer_has_the_highest_id_at_the_end(tokenizer: Any) -> None:
    inner = tokenizer.tokenizer
    assert inner.pad_token_id == 0
    assert inner.eos_token_id == len(inner) - 1 == max(inner.get_vocab().values())
    ids = tokenizer(["a photo of a CRIMSON", "a photo of a gramophone"])
    assert ids[0].tolist()[5] == inner.convert_tokens_to_ids("crimson")
    assert ids[0].argmax() == 6
    assert ids[0, 7:].sum() == 0
    assert inner.unk_token_id in ids[1]


def test_demo_tokenizer_knows_all_words_and_truncates_none(tokenizer: Any) -> None:
    rng = np.random.default_rng(0)
    texts = [world.caption(world.draw_facts("reference", rng), rng) for _ in range(3000)]
    for task in world.TASKS.values():
        texts += [template.format(name) for template in task.templates for name in task.classes]
    ids = tokenizer(texts)
    assert not (ids == tokenizer.tokenizer.unk_token_id).any()
    assert (ids == tokenizer.tokenizer.eos_token_id).any(dim=1).all()
    words = tokenizer(world.vocabulary())
    assert not (words == tokenizer.tokenizer.unk_token_id).any()


@torch.no_grad()
@pytest.mark.parametrize(
    ("split", "least"), [("id", 3.0), ("ood", 3.0), ("zs_colour", 4.0), ("zs_backdrop", 4.0), ("zs_style", 2.5)]
)
def test_demo_model_is_better_than_chance(split: str, least: float, tokenizer: Any) -> None:
    """Accuracy on 100 samples of the split is at least ``least`` times chance."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{MODEL_DIR}")
    task = world.TASKS[split]
    prompts = [template.format(name) for name in task.classes for template in task.templates]
    per_prompt = F.normalize(model.eval().encode_text(tokenizer(prompts)), dim=-1)
    per_class = F.normalize(per_prompt.unflatten(0, (len(task.classes), -1)).mean(1), dim=-1)
    drawn = [splits.sample(split, index) for index in range(100)]
    images = torch.stack([preprocess(sample.image) for sample in drawn])
    predicted = (model.encode_image(images) @ per_class.T).argmax(1)
    accuracy = float((predicted == torch.tensor([sample.label for sample in drawn])).float().mean())
    assert accuracy >= least / len(task.classes)
