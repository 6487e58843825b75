"""Batches on a GPU: copies from page-locked memory that workers write, and normalisation by the kernel."""

import itertools
from pathlib import Path

import pytest
import tiny
import torch

from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.data.samples import EvaluationSamples
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.data.transforms import Preprocess

PREPROCESS = Preprocess((224, 224), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "bicubic", "shortest")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_in_flight_equal_those_of_the_cpu(tmp_path: Path) -> None:
    """The device is kept busy, so that copies are late and slots of memory are written while they run."""
    source = open_webdataset(str(tiny.write_shards(tmp_path, 20)), ".cls")
    samples, keys = EvaluationSamples(source, PREPROCESS), [(0, sample % 20) for sample in range(2000)]
    device, work = torch.device("cuda", 0), torch.randn(4096, 4096, device="cuda")
    for workers, dtype in itertools.product((0, 2), (torch.float32, torch.float16)):
        expected = batches_of(samples, keys, 40, Options(dtype=dtype))
        for batch, same in zip(
            batches_of(samples, keys, 40, Options("plain", workers, device, dtype)), expected, strict=True
        ):
            assert batch.images.device == device
            for _ in range(5):
                work = work @ work / 64
            assert torch.equal(batch.images.cpu(), same.images)
            assert torch.equal(batch.labels, same.labels)
