"""Known evaluation sets of several ranks: one of them lists the files, and all have the same set."""

from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from distributed import run_ranks

from dive_fast.config.schema import EvaluationSet
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError
from dive_fast.evaluation.datasets import resolve
from dive_fast.evaluation.datasets.evaluation_set import Captioned


def _open(path: str, missing: str) -> tuple[int, list[str], list[list[str]], str]:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    calls, open_known = [], resolve.open_known

    def counted(*arguments: str | None) -> object:
        calls.append(arguments)
        return open_known(*arguments)  # type: ignore[arg-type]

    resolve.open_known = counted  # type: ignore[assignment]
    data = resolve.open_evaluation(EvaluationSet(dataset="flickr8k", path=path), "evaluate.sets.a", ranks)
    assert isinstance(data, Captioned)
    samples = [sample.key for sample in data.source.samples]
    assert all(data.source.image(row).size[0] > 0 for row in range(len(data.source)))
    num_calls = len(calls)
    with pytest.raises(DataError, match=r"evaluate\.sets\.b.*no flickr8k found"):
        resolve.open_evaluation(EvaluationSet(dataset="flickr8k", path=missing), "evaluate.sets.b", ranks)
    return num_calls, samples, [list(texts) for texts in data.captions()], data.source.digest()


def test_one_rank_lists_a_known_set(tmp_path: Path) -> None:
    samples = {f"{i}": {"jpg": tiny.jpeg(i), "txt": f"one {i}\ntwo {i}".encode()} for i in range(3)}
    tiny.write_tar(tmp_path / "wds_flickr8k/test/0.tar", samples)
    (tmp_path / "empty").mkdir()
    first, second = run_ranks(2, _open, str(tmp_path), str(tmp_path / "empty"))
    assert [first[0], second[0]] == [1, 0]
    assert first[1:] == second[1:]
    assert first[2] == [[f"one {i}", f"two {i}"] for i in range(3)]
