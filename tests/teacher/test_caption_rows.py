"""Caches of pairs with several captions: one text row a caption, and the row of the caption that is drawn."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from dive_fast.config.schema import ModelConfig, ReferenceConfig, TeacherConfig
from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.data.open_dataset import open_reference
from dive_fast.data.samples import ReferenceSamples
from dive_fast.distributed import Ranks
from dive_fast.model.towers import Towers, create, tokenizer_of
from dive_fast.teacher import cache_files as store
from dive_fast.teacher import clip_retrieval
from dive_fast.teacher import write_cache as write
from dive_fast.teacher.audit import audit
from dive_fast.teacher.cache_files import CacheError, StaleCacheError
from dive_fast.teacher.fingerprint import fingerprint
from dive_fast.teacher.teacher import CachedTeacher, OnlineTeacher

ALONE = Ranks(0, 1, torch.device("cpu"))
COUNT, SEED = 11, 5
CAPTIONS = [1 + (3 * row) % 4 for row in range(COUNT)]
"""Captions of each image: one to four."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captions")
    tiny.write_model(path / "model")
    write_pairs(path / "pairs")
    return path


def write_pairs(root: Path, broken: int | None = None) -> Path:
    root.mkdir()
    for row, count in enumerate(CAPTIONS):
        (root / f"{row:02d}.jpg").write_bytes(b"broken" if row == broken else tiny.jpeg(row))
        lines = (f"text {number} of image {row}" for number in range(count))
        (root / f"{row:02d}.txt").write_text("\n".join(lines))
    return root


def towers_of(folder: Path) -> Towers:
    return create(ModelConfig(name=f"local-dir:{folder / 'model'}"))


def samples_of(
    folder: Path, captions: Any = "lines", views: Any = "eval", pairs: str = "pairs"
) -> ReferenceSamples:
    config = ReferenceConfig(format="folder", path=str(folder / pairs), captions=captions)
    towers, tokenizer = towers_of(folder), tokenizer_of(ModelConfig(name=f"local-dir:{folder / 'model'}"))
    return ReferenceSamples(
        *(open_reference(config), tokenizer, towers.preprocess, towers.pooled_at, SEED, views),
        draws_captions=captions == "lines",
    )


def make(folder: Path, cache: Path, samples: ReferenceSamples, ranks: Ranks = ALONE) -> CachedTeacher:
    identity = fingerprint(towers_of(folder), samples, None, Options())
    write.write_cache(cache, towers_of(folder), samples, identity, ranks, 3, Options())
    return CachedTeacher(cache, identity)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BLOCK", 4)


@pytest.mark.parametrize("views", ["eval", 2])
def test_cached_rows_are_those_of_the_drawn_captions(folder: Path, tmp_path: Path, views: Any) -> None:
    samples = samples_of(folder, views=views)
    cached, online = make(folder, tmp_path / "cache", samples), OnlineTeacher(towers_of(folder), ALONE)
    assert np.load(tmp_path / "cache/text.npy").shape == (sum(CAPTIONS), 24)
    keys = [(epoch, row) for epoch in range(8) for row in range(COUNT)]
    for batch in batches_of(samples, keys, 16, Options()):
        for actual, expected in zip(cached(batch), online(batch), strict=True):
            assert torch.allclose(actual, expected, atol=1e-6)
    # The captions of an image have different rows, so that a wrong one would be noticed.
    (drawn,) = batches_of(samples, [(epoch, 1) for epoch in range(30)], 30, Options())
    assert set(drawn.caption.tolist()) == set(range(CAPTIONS[1]))
    rows = cached(drawn).text
    for one, caption in zip(rows, drawn.caption.tolist(), strict=True):
        equal = [int(other) for other, row in zip(drawn.caption, rows, strict=True) if torch.equal(row, one)]
        assert set(equal) == {caption}
    result = audit(cached, towers_of(folder), samples, ALONE, 4, Options(), 64)
    assert result.text_max < 1e-5


def test_interrupted_cache_resumes_to_equal_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(folder, tmp_path / "one", samples_of(folder))
    write_block, remaining = store.Writer.write, [2]

    def interrupted(*arguments: Any) -> None:
        remaining[0] -= 1
        if remaining[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_block(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "write", interrupted)
        with pytest.raises(CacheError, match="No space left"):
            make(folder, tmp_path / "two", samples_of(folder))
    make(folder, tmp_path / "two", samples_of(folder))
    for name in ("image.npy", "text.npy", "captions.npy", "checksums.npy", "cache.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_cache_of_single_captions_is_the_same_for_both_settings(folder: Path, tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "pairs")
    for text in root.glob("*.txt"):
        text.write_text(f"the text of {text.stem}")
    for name in ("one", "lines"):
        config = ReferenceConfig(format="folder", path=str(root), captions=name)  # type: ignore[arg-type]
        samples = samples_of(folder)
        samples = ReferenceSamples(
            *(open_reference(config), samples.tokenizer, samples.preprocess, samples.pooled_at, SEED),
            draws_captions=name == "lines",
        )
        cached = make(folder, tmp_path / name, samples)
        assert "captions" not in cached.store.fingerprint
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["cache.json", "checksums.npy", "image.npy", "text.npy"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "lines" / name).read_bytes(), name


def test_cache_is_refused_for_the_other_setting(folder: Path, tmp_path: Path) -> None:
    make(folder, tmp_path / "cache", samples_of(folder))
    other = fingerprint(towers_of(folder), samples_of(folder, "one"), None, Options())
    with pytest.raises(StaleCacheError, match=r"captions: the cache has .*, this run nothing"):
        CachedTeacher(tmp_path / "cache", other)


@pytest.mark.parametrize("swap", [(0, 1), (4, 8)])
def test_changed_counts_are_refused(folder: Path, tmp_path: Path, swap: tuple[int, int]) -> None:
    cached = make(folder, tmp_path / "cache", samples_of(folder))
    counts = np.load(tmp_path / "cache/captions.npy")
    assert counts.tolist() == CAPTIONS
    counts[list(swap)] += [1, -1]
    np.save(tmp_path / "cache/captions.npy", counts)
    with pytest.raises(StaleCacheError, match=r"captions\.npy has changed since it was written; rebuild it"):
        CachedTeacher(tmp_path / "cache", cached.store.fingerprint)
    (tmp_path / "cache/captions.npy").unlink()
    with pytest.raises(StaleCacheError, match="rebuild it"):
        CachedTeacher(tmp_path / "cache", cached.store.fingerprint)


def test_broken_image_among_others_with_more_captions(folder: Path, tmp_path: Path) -> None:
    # The row of a broken image is that of the next one, whose number of captions is another.
    assert len({CAPTIONS[3], CAPTIONS[4], CAPTIONS[COUNT - 1], CAPTIONS[0]}) > 1
    for broken in (3, COUNT - 1):
        write_pairs(folder / f"broken{broken}", broken)
        samples = samples_of(folder, pairs=f"broken{broken}")
        cached = make(folder, tmp_path / f"cache{broken}", samples)
        online = OnlineTeacher(towers_of(folder), ALONE)
        keys = [(epoch, row) for epoch in range(5) for row in range(COUNT)]
        (batch,) = batches_of(samples, keys, len(keys), Options())
        assert broken not in batch.sample.tolist()
        for actual, expected in zip(cached(batch), online(batch), strict=True):
            assert torch.allclose(actual, expected, atol=1e-6)


def test_clip_retrieval_files_need_one_caption() -> None:
    config = ReferenceConfig(format="folder", path="-", captions="lines")
    with pytest.raises(
        CacheError, match=r"^data\.reference\.captions = lines: clip-retrieval's files contain one"
    ):
        clip_retrieval.check(config, TeacherConfig(), adopt=True)
