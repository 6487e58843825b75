"""The teacher's embeddings: the same rows whether computed online or read from the cache, on one rank or two."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from distributed import run_ranks
from torch import Tensor

from dive_fast import teacher
from dive_fast.config import ConfigError, ModelConfig
from dive_fast.data.batch import ReferenceBatch
from dive_fast.data.loader import Options, batches_of
from dive_fast.data.samples import ReferenceSamples
from dive_fast.data.source import open_webdataset
from dive_fast.ranks import Ranks, join
from dive_fast.towers import Towers, create, tokenizer_of

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


def print_of(folder: Path, views: Any = VIEWS) -> teacher.Fingerprint:
    return teacher.fingerprint(model(folder), {"name": "tiny"}, samples(folder, views), None, Options())


def write(folder: Path, cache: Path, ranks: Ranks = ALONE, views: Any = VIEWS) -> None:
    fingerprint = print_of(folder, views)
    teacher.write_cache(cache, model(folder), samples(folder, views), fingerprint, ranks, 4, Options())


def rows_of(cache: Path) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.load(cache / "image.npy")), torch.from_numpy(np.load(cache / "text.npy"))


def write_on_rank(folder: Path, cache: Path) -> None:
    write(folder, cache, join())


def test_cached_rows_are_the_online_ones_in_any_order_and_view(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "cache")
    cached = teacher.CachedTeacher(tmp_path / "cache", print_of(folder))
    online = teacher.OnlineTeacher(model(folder), ALONE)
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
    assert not torch.allclose(rows[7 * VIEWS], rows[7 * VIEWS + 2], atol=1e-4)


def test_two_ranks_write_the_rows_of_one(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "one")
    run_ranks(2, write_on_rank, folder, tmp_path / "two", init=False)
    for one, two in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        assert torch.allclose(one, two, atol=1e-6)
    fingerprints = [json.loads((tmp_path / name / teacher.FINGERPRINT).read_text()) for name in ("one", "two")]
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize(
    "field", ["format", "model", "weights", "data", "preprocess", "views", "crops", "text_length", "loader"]
)
def test_a_cache_that_differs_in_any_field_is_refused_by_name(folder: Path, tmp_path: Path, field: str) -> None:
    write(folder, tmp_path / "cache")
    with pytest.raises(ConfigError, match=f"{field}: the cache has .* this run 'other'") as error:
        teacher.CachedTeacher(tmp_path / "cache", print_of(folder) | {field: "other"})
    others = print_of(folder).keys() - {field}
    assert not any(f"{other}: the cache has" in str(error.value) for other in others)


def test_the_fingerprint_follows_what_it_names(folder: Path, tmp_path: Path) -> None:
    base = print_of(folder)
    towers = model(folder)
    with torch.no_grad():
        towers.logit_scale += 1e-6
    assert teacher.weights_digest(towers) != base["weights"]
    assert {key for key, value in print_of(folder, "eval").items() if value != base[key]} == {"views", "crops"}


def test_an_unfinished_cache_is_not_taken_for_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Iterator[ReferenceBatch]:
        batches = batches_of(*args, **kwargs)
        yield next(batches)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "batches_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(folder, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert not teacher.is_cache(tmp_path / "cache")
    write(folder, tmp_path / "cache")
    assert teacher.is_cache(tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_the_online_teacher_stays_frozen_and_in_fp32(folder: Path) -> None:
    towers = model(folder)
    towers.autocast = torch.bfloat16
    online = teacher.OnlineTeacher(towers, ALONE)
    (batch,) = batches_of(samples(folder), [(0, 0), (0, 1)], 2, Options())
    with torch.autocast("cpu", torch.bfloat16):
        image, text = online(batch)
    assert not image.requires_grad
    assert not any(parameter.requires_grad for parameter in towers.parameters())
    exact = teacher.OnlineTeacher(model(folder), ALONE)(batch)
    assert torch.equal(image, exact.image)
    assert torch.equal(text, exact.text)
