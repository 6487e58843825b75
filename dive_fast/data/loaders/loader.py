"""The contract of all loaders: sample keys in, batches of normalised images out.

A sample key is (epoch, sample). :mod:`dive_fast.data.sampler` chooses the keys of a step, and
:mod:`dive_fast.data.samples` draws their crops and texts; a loader only decodes. Samples, crops, texts and their
order are therefore equal for every loader, for any number of workers, and after a resume.

Images travel as 8-bit pixels, which take a quarter of the memory of fp32, and are normalised on their device, here
and nowhere else.
"""

import importlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch

from dive_fast.config.schema import Config, Loader, ReferenceConfig, TargetConfig
from dive_fast.data.prefetch import Prefetcher
from dive_fast.data.sampler import StepOrder
from dive_fast.data.samples import Batch, SampleKey, Samples
from dive_fast.data.transforms import Preprocess
from dive_fast.distributed import Ranks
from dive_fast.kernels import normalise_images
from dive_fast.kernels.backend import Backend


@dataclass(frozen=True)
class Options:
    """Settings of a loader; only ``dtype`` changes the values in a batch, by rounding."""

    loader: Loader = "plain"
    workers: int = 0
    """Decoding processes (`plain`) or threads (`dali`, `ffcv`); 0: the calling thread does all work."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device of the images; the other tensors of a batch stay on the CPU."""
    dtype: torch.dtype = torch.float32
    """Data type of the images: float32 or float16."""
    channels_last: bool = False
    """Whether images have NHWC memory; their shape is ``(B, 3, H, W)`` in both cases."""
    hw_decoder_load: float = 0.65
    """Fraction of JPEGs that the GPU's hardware decoder takes, with `dali`."""
    timeout: float = 600.0
    """Seconds without a batch after which :func:`batches_of` fails."""

    @property
    def layout(self) -> torch.memory_format:
        """The memory format of the images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


def load(samples: Samples[Batch], batches: Iterable[list[SampleKey]], options: Options) -> Iterator[Batch]:
    """The batches of these sample keys, in order, with images on ``options.device``, normalised for the model.

    Worker processes start when this function is called.

    Raises:
        DataError: the loader is not installed or cannot read this data; the message says what to do.
    """
    return _normalised(load_pixels(samples, batches, options), samples.preprocess, options)


def load_pixels(samples: Samples[Batch], batches: Iterable[list[SampleKey]], options: Options) -> Iterator[Batch]:
    """The batches of :func:`load` before their images are normalised.

    Their images are pixels, ``(B, H, W, 3)`` uint8, on the CPU or on ``options.device``. They are valid until the
    next batch is requested; copies to a device that have been started by then are waited for.
    """
    # Imports only the chosen module, since dali and ffcv are optional.
    module = importlib.import_module(f"dive_fast.data.loaders.{options.loader}")
    loaded: Iterator[Batch] = module.load(samples, batches, options)
    return loaded


def _normalised(batches: Iterator[Batch], preprocess: Preprocess, options: Options) -> Iterator[Batch]:
    # The interpreter of Triton, for which "auto" chooses the kernel too, takes seconds for a batch.
    backend: Backend = "auto" if options.device.type == "cuda" else "torch"
    for batch in batches:
        pixels = batch.images.to(options.device, non_blocking=True)
        images = normalise_images(
            pixels, preprocess.mean, preprocess.std, options.dtype, options.channels_last, backend
        )
        del pixels
        yield replace(batch, images=images)


def training_batches(samples: Samples[Batch], order: StepOrder, steps: range, options: Options) -> Iterator[Batch]:
    """This rank's batches of a range of training steps, which may span epochs."""
    return _closing(load(samples, order.keys_of_steps(steps), options), order)


def _closing(batches: Iterator[Batch], order: StepOrder) -> Iterator[Batch]:
    try:
        yield from batches
    finally:
        order.close()


def batches_of(
    samples: Samples[Batch], sample_keys: list[SampleKey], batch_size: int, options: Options
) -> Generator[Batch, None, None]:
    """The batches of these sample keys, in order; the last batch may be smaller.

    Raises:
        StalledError: no batch arrived for ``options.timeout`` seconds; a line reports the wait every half minute.
    """
    batches = [sample_keys[i : i + batch_size] for i in range(0, len(sample_keys), batch_size)]
    # Only images are on the device: the caller moves the other tensors that it needs there.
    prefetcher = Prefetcher(load(samples, batches, options), _identity, options.device, limit=options.timeout)
    try:
        yield from prefetcher
    finally:
        prefetcher.close()


def _identity(batch: Batch) -> Batch:
    return batch


def loader_options(config: Config, data: TargetConfig | ReferenceConfig, ranks: Ranks) -> Options:
    """Loader options for the training batches of the target or reference half."""
    # Autocast would round the images to fp16 first. An online teacher needs them in fp32.
    is_half = config.train.precision == "fp16" and config.teacher.mode == "cache" and ranks.device.type == "cuda"
    return Options(
        data.loader,
        data.workers,
        ranks.device,
        torch.float16 if is_half else torch.float32,
        hw_decoder_load=data.hw_decoder_load,
        timeout=config.train.rank_timeout,
    )
