"""Teachers: equal rows online and from a cache, on one rank and two; fingerprints, interruptions and audits."""

import errno
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from distributed import context, run_ranks
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
from dive_fast.teacher.audit import audit, check_audit
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
    identity = print_of(folder, views)
    write.write_cache(cache, model(folder), samples(folder, views), identity, ranks, 3, Options())
    return CachedTeacher(cache, identity)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BLOCK", 4)


def rows_of(cache: Path) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.load(cache / "image.npy")), torch.from_numpy(np.load(cache / "text.npy"))


def make_on_rank(folder: Path, cache: Path) -> None:
    store.BLOCK = 4
    make(folder, cache, join())


def test_cached_rows_match_online_rows_in_any_order_and_view(folder: Path, tmp_path: Path) -> None:
    cached = make(folder, tmp_path / "cache")
    online = OnlineTeacher(model(folder), ALONE)
    # Epoch e uses view e modulo three; samples are shuffled, and one is repeated.
    keys = [(2, 7), (0, 3), (4, 10), (1, 0), (5, 7), (2, 7)]
    (batch,) = batches_of(samples(folder), keys, 16, Options())
    assert batch.view.tolist() == [2, 0, 1, 1, 2, 2]
    for actual, expected in zip(cached(batch), online(batch), strict=True):
        assert actual.dtype == torch.float32
        assert torch.allclose(actual, expected, atol=1e-6)
        assert torch.allclose(actual.norm(dim=1), torch.ones(6))
    # Each view has its own embedding and row.
    rows, _ = rows_of(tmp_path / "cache")
    assert not torch.allclose(rows[7], rows[2 * COUNT + 7], atol=1e-4)


def test_write_cache_on_two_ranks_equals_one(folder: Path, tmp_path: Path) -> None:
    make(folder, tmp_path / "one")
    run_ranks(2, make_on_rank, folder, tmp_path / "two", init=False)
    for name in ("image.npy", "text.npy", "checksums.npy", "cache.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.parametrize("count", [1, 3])
def test_write_cache_of_smallest_reference_sets(folder: Path, tmp_path: Path, count: int) -> None:
    tiny.write_model(tmp_path / "model")
    tiny.write_reference(tmp_path / "reference", count)
    cached = make(tmp_path, tmp_path / "cache", views="eval")
    (batch,) = batches_of(samples(tmp_path, "eval"), [(0, sample) for sample in range(count)], 4, Options())
    for actual, expected in zip(cached(batch), OnlineTeacher(model(tmp_path), ALONE)(batch), strict=True):
        assert torch.allclose(actual, expected, atol=1e-6)


def test_float16_cache_rounds_to_half_precision(folder: Path, tmp_path: Path) -> None:
    identity = fingerprint(model(folder), samples(folder), None, Options(), "float16")
    write.write_cache(tmp_path / "cache", model(folder), samples(folder), identity, ALONE, 3, Options())
    cached = CachedTeacher(tmp_path / "cache", identity)
    (batch,) = batches_of(samples(folder), [(0, sample) for sample in range(COUNT)], 16, Options())
    for actual, expected in zip(cached(batch), OnlineTeacher(model(folder), ALONE)(batch), strict=True):
        assert actual.dtype == torch.float32
        assert 1e-5 < float((actual - expected).norm(dim=1).max()) < 1e-3
    assert audit(cached, model(folder), samples(folder), ALONE, 4, Options(), 64).image_max < 1e-3


# Fingerprint

FIELDS = ["architecture", "weights", "tokenizer", "preprocess", "views", "crops", "text_length", "loader", "dtype"]
FIELDS += ["data", "tf32"]


@pytest.mark.parametrize("field", FIELDS)
def test_cached_teacher_names_each_different_field(folder: Path, tmp_path: Path, field: str) -> None:
    identity = make(folder, tmp_path / "cache").store.fingerprint
    assert set(identity) == set(FIELDS)
    message = f'{field}: the cache has .* this run "other".*rebuild it$'
    with pytest.raises(StaleCacheError, match=message) as error:
        CachedTeacher(tmp_path / "cache", identity | {field: "other"})
    others = identity.keys() - {field}
    assert not any(f"{other}: the cache has" in str(error.value) for other in others)


def test_fingerprint_field_changes_with_its_subject(folder: Path, tmp_path: Path) -> None:
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


def test_fingerprint_equal_for_default_and_explicit_text_length(tmp_path: Path) -> None:
    tree, lengths = tiny.write_config(tmp_path), []
    for length in (None, 77, 20):
        tree["data"]["reference"]["text_length"] = length
        config = RunConfig.model_validate(tree)
        assert config.data.reference is not None
        towers = create(config.model)
        samples_of_config = build.reference_samples(config, open_reference(config.data.reference), towers)
        lengths.append(build._fingerprint_and_loader(config, towers, samples_of_config, ALONE)[0])
    assert lengths[0] == lengths[1] != lengths[2]


# Interrupted


def test_write_cache_resumes_to_equal_bits_after_kill(folder: Path, tmp_path: Path) -> None:
    make(folder, tmp_path / "uninterrupted")
    partial = store.partial_name(tmp_path / "cache")
    for blocks in (1, 5):
        process = context().Process(  # type: ignore[attr-defined]
            target=make_in_pieces, args=(folder, tmp_path / "cache")
        )
        process.start()
        while process.is_alive() and len(store.finished_blocks(partial)) < blocks:
            time.sleep(0.001)
        assert process.is_alive()
        process.kill()
        process.join()
        assert blocks <= len(store.finished_blocks(partial)) < 9
        assert not store.is_there(tmp_path / "cache")
    make(folder, tmp_path / "cache")
    for name in ("image.npy", "text.npy", "checksums.npy", "cache.json"):
        assert (tmp_path / "uninterrupted" / name).read_bytes() == (tmp_path / "cache" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "uninterrupted"]


def make_in_pieces(folder: Path, cache: Path) -> None:
    """Writes a cache with a pause after each block, in which the test kills the process."""
    torch.set_num_threads(1)  # as in this process; the order of sums depends on it
    store.BLOCK = 4
    write_block = store.Writer.write

    def pause(*arguments: Any) -> None:
        write_block(*arguments)
        time.sleep(0.3)

    store.Writer.write = pause  # type: ignore[method-assign]
    make(folder, cache)


def test_full_disk_is_reported_and_finished_blocks_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_block, remaining = store.Writer.write, [3]

    def full(*arguments: Any) -> None:
        remaining[0] -= 1
        if remaining[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_block(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "write", full)
        with pytest.raises(CacheError, match=r"No space left on device; finished blocks are kept") as error:
            make(folder, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert len(store.finished_blocks(store.partial_name(tmp_path / "cache"))) == 3
    make(folder, tmp_path / "cache")


def test_unfinished_cache_of_other_configuration_is_kept(folder: Path, tmp_path: Path) -> None:
    partial = store.partial_name(tmp_path / "cache")
    store.create(partial, store.Layout(COUNT, VIEWS, 24, "float32"), print_of(folder) | {"weights": "other"})
    with pytest.raises(
        CacheError, match=r'is unfinished and belongs to another configuration \(weights: the cache has "other"'
    ):
        make(folder, tmp_path / "cache")
    assert store.is_there(partial)
    write.remove(tmp_path / "cache")
    make(folder, tmp_path / "cache")


# Audit


def test_audit_of_valid_cache_finds_rounding(folder: Path, tmp_path: Path) -> None:
    cached = make(folder, tmp_path / "cache")
    for pairs, expected in ((5, 5), (1000, COUNT * VIEWS)):
        result = audit(cached, model(folder), samples(folder), ALONE, 4, Options(), pairs)
        assert result.pairs == expected
        assert 0 <= result.image_mean <= result.image_max < 1e-5
        assert 0 <= result.text_mean <= result.text_max < 1e-5
    assert str(result).startswith(f"{COUNT * VIEWS} pairs embedded again differ by at most ")


@pytest.mark.parametrize(
    ("halves", "cause"),
    [
        (["image"], "the image files or their decoder"),
        (["text"], "the captions or the tokenizer"),
        (["image", "text"], "the weights or the order of the samples"),
    ],
)
def test_check_audit_rejects_other_rows_with_likely_cause(
    folder: Path, tmp_path: Path, halves: list[str], cause: str
) -> None:
    identity = make(folder, tmp_path / "cache").store.fingerprint
    for half in halves:
        rows = np.load(tmp_path / "cache" / f"{half}.npy")
        np.save(tmp_path / "cache" / f"{half}.npy", np.roll(rows, 1, axis=0))
    cached = CachedTeacher(tmp_path / "cache", identity, verify=False)
    message = f"teacher.tolerance allows 1e-04. Most likely {cause} .*; rebuild it$"
    with pytest.raises(StaleCacheError, match=message):
        check_audit(audit(cached, model(folder), samples(folder), ALONE, 4, Options(), 8), cached)
    result = audit(cached, model(folder), samples(folder), ALONE, 4, Options(), 8)
    check_audit(result, cached, tolerance=2.0)
    assert result.pairs == 8
    # Checksums detect the change first.
    with pytest.raises(CacheError, match="have changed since they were written"):
        audit(CachedTeacher(tmp_path / "cache", identity), model(folder), samples(folder), ALONE, 4, Options(), 64)


def test_online_teacher_is_frozen_and_fp32(folder: Path) -> None:
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
