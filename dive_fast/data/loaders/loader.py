"""The contract of all loaders: places in, batches out.

A place is (epoch, sample). Which places a step has is :mod:`dive_fast.data.sampler`'s; their crops and texts are
:mod:`dive_fast.data.samples`'. A loader only decodes: whichever it is, a step has the same samples with the same
crops and texts, in the same order, whatever the number of workers, and a resumed run goes on as it would have.
"""

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from dive_fast.config.schema import Config, Loader, ReferenceConfig, TargetConfig
from dive_fast.data.prefetch import Prefetcher
from dive_fast.data.sampler import Order
from dive_fast.data.samples import Batch, SampleKey, Samples
from dive_fast.distributed import Ranks


@dataclass(frozen=True)
class Options:
    """How batches are loaded; none of it changes what is in them, but for the rounding of ``dtype``."""

    loader: Loader = "plain"
    workers: int = 0
    """`plain`: processes that decode. `dali` and `ffcv`: threads that decode. 0: the calling thread does all."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where batches are wanted. Images of `plain` stay on the CPU, in page-locked memory if this is a GPU."""
    dtype: torch.dtype = torch.float32
    """Of the images: float32 or float16."""
    channels_last: bool = False
    """Images in NHWC memory; their shape is ``(B, 3, H, W)`` either way."""
    hw_decoder_load: float = 0.65
    """`dali` on a GPU: the share of JPEGs that its hardware decoder takes."""

    timeout: float = 600.0
    """Seconds without a batch until :func:`batches_of` gives up."""

    @property
    def layout(self) -> torch.memory_format:
        """The same as ``channels_last``, in torch's words."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


def load(samples: Samples[Batch], batches: Iterable[list[SampleKey]], options: Options) -> Iterator[Batch]:
    """The batches of these places, in order. Worker processes start at once, where this is called.

    Raises:
        DataError: the loader is not installed, or cannot read this data; the message says what to do.
    """
    # Only the one that is asked for: dali and ffcv are optional.
    module = importlib.import_module(f"dive_fast.data.loaders.{options.loader}")
    loaded: Iterator[Batch] = module.load(samples, batches, options)
    return loaded


def training_batches(samples: Samples[Batch], order: Order, steps: range, options: Options) -> Iterator[Batch]:
    """This rank's batches of the given steps of a run, epochs apart or not."""
    return load(samples, _places(order, steps), options)


def batches_of(
    samples: Samples[Batch], places: list[SampleKey], batch_size: int, options: Options
) -> Iterator[Batch]:
    """The given places in order, batch by batch; the last batch may be smaller.

    Raises:
        StalledError: no batch has come for ``options.timeout`` seconds; a line says so every half minute before.
    """
    loaded = load(samples, [places[i : i + batch_size] for i in range(0, len(places), batch_size)], options)
    # On the CPU: whoever takes a batch moves it.
    ahead = Prefetcher(loaded, _as_it_is, torch.device("cpu"), limit=options.timeout)
    try:
        yield from ahead
    finally:
        ahead.close()


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _places(order: Order, steps: range) -> Iterator[list[SampleKey]]:
    for step in steps:
        epoch, samples = order.at(step)
        yield [(epoch, sample) for sample in samples.tolist()]


def loader_options(config: Config, data: TargetConfig | ReferenceConfig, ranks: Ranks) -> Options:
    """How the training batches of a half are loaded."""
    # Autocast would round the images to fp16 at once. Not for an online teacher, who sees them in fp32.
    rounds = config.train.precision == "fp16" and config.teacher.mode == "cache" and ranks.device.type == "cuda"
    return Options(
        data.loader,
        data.workers,
        ranks.device,
        torch.float16 if rounds else torch.float32,
        hw_decoder_load=data.hw_decoder_load,
        timeout=config.train.rank_timeout,
    )
