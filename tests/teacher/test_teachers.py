"""The teacher's embeddings: the same rows whether computed online or read from the cache, on one rank or two."""

import errno
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from distributed import run_ranks
from torch import Tensor

from dive_fast.config.schema import ModelConfig
from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.data.open_dataset import open_reference
from dive_fast.data.samples import ReferenceSamples
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.distributed import Ranks, join
from dive_fast.methods.run_config import RunConfig
from dive_fast.model.towers import Towers, create, tokenizer_of
from dive_fast.teacher import build
from dive_fast.teacher import cache_files as store
from dive_fast.teacher import write_cache as write
from dive_fast.teacher.audit import audit, judge
from dive_fast.teacher.cache_files import CacheError, StaleCacheError
from dive_fast.teacher.fingerprint import Fingerprint, fingerprint
from dive_fast.teacher.teacher import CachedTeacher, OnlineTeacher

ALONE = Ranks(0, 1, torch.device("cpu"))
COUNT, VIEWS = 11, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    tiny.write_model(path / "model")
    tiny.write_reference(path / "reference", COUNT)
    return path


def model(folder: Path) -> Towers:
    return create(ModelConfig(name=f"local-dir:{folder / 'model'}"))


def samples(folder: Path, views: Any = VIEWS) -> ReferenceSamples:
    towers, tokenizer = model(folder), tokenizer_of(ModelConfig(name=f"local-dir:{folder / 'model'}"))
    source = open_webdataset(str(folder / "reference"), ".txt")
    return ReferenceSamples(source, tokenizer, towers.preprocess, towers.pooled_at, 5, views)


def print_of(folder: Path, views: Any = VIEWS) -> Fingerprint:
    return fingerprint(model(folder), samples(folder, views), None, Options())


def make(folder: Path, cache: Path, ranks: Ranks = ALONE, views: Any = VIEWS) -> CachedTeacher:
    wanted = print_of(folder, views)
    write.write_cache(cache, model(folder), samples(folder, views), wanted, ranks, 3, Options())
    return CachedTeacher(cache, wanted)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BLOCK", 4)


def rows_of(cache: Path) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.load(cache / "image.npy")), torch.from_numpy(np.load(cache / "text.npy"))


def make_on_rank(folder: Path, cache: Path) -> None:
    store.BLOCK = 4
    make(folder, cache, join())


def test_cached_rows_are_the_online_ones_in_any_order_and_view(folder: Path, tmp_path: Path) -> None:
    cached = make(folder, tmp_path / "cache")
    online = OnlineTeacher(model(folder), ALONE)
    # Epoch e shows view e modulo three; samples come shuffled, and one twice.
    places = [(2, 7), (0, 3), (4, 10), (1, 0), (5, 7), (2, 7)]
    (batch,) = batches_of(samples(folder), places, 16, Options())
    assert batch.view.tolist() == [2, 0, 1, 1, 2, 2]
    for found, expected in zip(cached(batch), online(batch), strict=True):
        assert found.dtype == torch.float32
        assert torch.allclose(found, expected, atol=1e-6)
        assert torch.allclose(found.norm(dim=1), torch.ones(6))
    # Another view is another embedding, of which the cache has its own row.
    rows, _ = rows_of(tmp_path / "cache")
    assert not torch.allclose(rows[7], rows[2 * COUNT + 7], atol=1e-4)


def test_two_ranks_write_the_bits_of_one(folder: Path, tmp_path: Path) -> None:
    make(folder, tmp_path / "one")
    run_ranks(2, make_on_rank, folder, tmp_path / "two", init=False)
    for name in ("image.npy", "text.npy", "checksums.npy", "cache.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.parametrize("count", [1, 3])
def test_the_smallest_reference_sets_have_a_cache(folder: Path, tmp_path: Path, count: int) -> None:
    tiny.write_model(tmp_path / "model")
    tiny.write_reference(tmp_path / "reference", count)
    cached = make(tmp_path, tmp_path / "cache", views="eval")
    (batch,) = batches_of(samples(tmp_path, "eval"), [(0, sample) for sample in range(count)], 4, Options())
    for found, expected in zip(cached(batch), OnlineTeacher(model(tmp_path), ALONE)(batch), strict=True):
        assert torch.allclose(found, expected, atol=1e-6)


def test_half_the_disk_costs_half_precision(folder: Path, tmp_path: Path) -> None:
    wanted = fingerprint(model(folder), samples(folder), None, Options(), "float16")
    write.write_cache(tmp_path / "cache", model(folder), samples(folder), wanted, ALONE, 3, Options())
    cached = CachedTeacher(tmp_path / "cache", wanted)
    (batch,) = batches_of(samples(folder), [(0, sample) for sample in range(COUNT)], 16, Options())
    for found, expected in zip(cached(batch), OnlineTeacher(model(folder), ALONE)(batch), strict=True):
        assert found.dtype == torch.float32
        assert 1e-5 < float((found - expected).norm(dim=1).max()) < 1e-3
    assert audit(cached, model(folder), samples(folder), ALONE, 4, Options(), 64).image_max < 1e-3


# What it was made from

FIELDS = ["architecture", "weights", "tokenizer", "preprocess", "views", "crops", "text_length", "loader", "dtype"]
FIELDS += ["data", "tf32"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_cache_that_differs_in_any_field_is_refused_by_name(folder: Path, tmp_path: Path, field: str) -> None:
    wanted = make(folder, tmp_path / "cache").store.fingerprint
    assert set(wanted) == set(FIELDS)
    message = f'{field}: the cache has .* this run "other".*rebuild it$'
    with pytest.raises(StaleCacheError, match=message) as error:
        CachedTeacher(tmp_path / "cache", wanted | {field: "other"})
    others = wanted.keys() - {field}
    assert not any(f"{other}: the cache has" in str(error.value) for other in others)


def test_the_fingerprint_follows_what_it_names(folder: Path, tmp_path: Path) -> None:
    base = print_of(folder)

    def changed(other: Fingerprint) -> set[str]:
        return {name for name in base if other[name] != base[name]}

    towers = model(folder)
    with torch.no_grad():
        towers.logit_scale += 1e-6
    assert changed(fingerprint(towers, samples(folder), None, Options())) == {"weights"}
    assert changed(print_of(folder, "eval")) == {"views", "crops"}
    other = samples(folder)
    other.tokenizer = lambda texts: torch.zeros(len(texts), 77, dtype=torch.long)
    assert changed(fingerprint(model(folder), other, None, Options())) == {"tokenizer"}
    for loader in ("dali", "ffcv"):
        options = Options(loader)  # type: ignore[arg-type]
        assert changed(fingerprint(model(folder), samples(folder), None, options)) == {"loader"}


def test_the_models_own_text_length_needs_no_other_cache(tmp_path: Path) -> None:
    tree, lengths = tiny.write_config(tmp_path), []
    for length in (None, 77, 20):
        tree["data"]["reference"]["text_length"] = length
        config = RunConfig.model_validate(tree)
        assert config.data.reference is not None
        towers = create(config.model)
        samples_of_config = build.reference_samples(config, open_reference(config.data.reference), towers)
        lengths.append(build._wanted(config, towers, samples_of_config, ALONE)[0])
    assert lengths[0] == lengths[1] != lengths[2]


# Interrupted


def test_a_cache_killed_at_any_moment_is_finished_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    make(folder, tmp_path / "whole")
    partial = store.partial_name(tmp_path / "cache")
    for blocks in (1, 5):
        process = torch.multiprocessing.get_context("spawn").Process(
            target=make_in_pieces, args=(folder, tmp_path / "cache")
        )
        process.start()
        while process.is_alive() and len(store.done(partial)) < blocks:
            time.sleep(0.001)
        assert process.is_alive()
        process.kill()
        process.join()
        assert blocks <= len(store.done(partial)) < 9
        assert not store.is_there(tmp_path / "cache")
    make(folder, tmp_path / "cache")
    for name in ("image.npy", "text.npy", "checksums.npy", "cache.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cache" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "whole"]


def make_in_pieces(folder: Path, cache: Path) -> None:
    """With a pause behind each block, to be killed in."""
    torch.set_num_threads(1)  # as here; with another number sums come out in another order
    store.BLOCK = 4
    write_block = store.Writer.write

    def pause(*arguments: Any) -> None:
        write_block(*arguments)
        time.sleep(0.3)

    store.Writer.write = pause  # type: ignore[method-assign]
    make(folder, cache)


def test_a_full_disk_is_told_in_one_line_and_loses_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_block, left = store.Writer.write, [3]

    def full(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_block(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "write", full)
        with pytest.raises(CacheError, match=r"No space left on device; what is written stays") as error:
            make(folder, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert len(store.done(store.partial_name(tmp_path / "cache"))) == 3
    make(folder, tmp_path / "cache")


def test_what_was_begun_as_another_cache_is_neither_continued_nor_removed(folder: Path, tmp_path: Path) -> None:
    partial = store.partial_name(tmp_path / "cache")
    store.create(partial, store.Layout(COUNT, VIEWS, 24, "float32"), print_of(folder) | {"weights": "other"})
    with pytest.raises(
        CacheError, match=r'was begun as the cache of something else \(weights: the cache has "other"'
    ):
        make(folder, tmp_path / "cache")
    assert store.is_there(partial)
    write.remove(tmp_path / "cache")
    make(folder, tmp_path / "cache")


# Audit


def test_an_audit_of_a_good_cache_finds_rounding(folder: Path, tmp_path: Path) -> None:
    cached = make(folder, tmp_path / "cache")
    for pairs, expected in ((5, 5), (1000, COUNT * VIEWS)):
        found = audit(cached, model(folder), samples(folder), ALONE, 4, Options(), pairs)
        assert found.pairs == expected
        assert 0 <= found.image_mean <= found.image_max < 1e-5
        assert 0 <= found.text_mean <= found.text_max < 1e-5
    assert str(found).startswith(f"{COUNT * VIEWS} pairs embedded again: image rows differ by ")


@pytest.mark.parametrize(
    ("halves", "cause"),
    [
        (["image"], "the image files or their decoder"),
        (["text"], "the captions or the tokenizer"),
        (["image", "text"], "the weights or the order of the samples"),
    ],
)
def test_an_audit_refuses_rows_of_something_else_and_says_of_what(
    folder: Path, tmp_path: Path, halves: list[str], cause: str
) -> None:
    wanted = make(folder, tmp_path / "cache").store.fingerprint
    for half in halves:
        rows = np.load(tmp_path / "cache" / f"{half}.npy")
        np.save(tmp_path / "cache" / f"{half}.npy", np.roll(rows, 1, axis=0))
    cached = CachedTeacher(tmp_path / "cache", wanted, verify=False)
    message = f"teacher.tolerance allows 1e-04. Most likely {cause} .*; rebuild it$"
    with pytest.raises(StaleCacheError, match=message):
        judge(audit(cached, model(folder), samples(folder), ALONE, 4, Options(), 8), cached)
    found = audit(cached, model(folder), samples(folder), ALONE, 4, Options(), 8)
    judge(found, cached, tolerance=2.0)
    assert found.pairs == 8
    # With checksums it does not come to that.
    with pytest.raises(CacheError, match="have changed since they were written"):
        audit(CachedTeacher(tmp_path / "cache", wanted), model(folder), samples(folder), ALONE, 4, Options(), 64)


def test_the_online_teacher_stays_frozen_and_in_fp32(folder: Path) -> None:
    towers = model(folder)
    towers.autocast = torch.bfloat16
    online = OnlineTeacher(towers, ALONE)
    (batch,) = batches_of(samples(folder), [(0, 0), (0, 1)], 2, Options())
    with torch.autocast("cpu", torch.bfloat16):
        image, text = online(batch)
    assert not image.requires_grad
    assert not any(parameter.requires_grad for parameter in towers.parameters())
    exact = OnlineTeacher(model(folder), ALONE)(batch)
    assert torch.equal(image, exact.image)
    assert torch.equal(text, exact.text)
