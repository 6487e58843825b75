"""The DALI loader: worker processes read files; DALI decodes and resizes them, on a GPU if possible.

DALI's readers shuffle through a buffer and crop with internal random state. This loader draws samples and crops as
every loader does and passes them in with the bytes, so that a resumed run needs no state of the pipeline.

Workers decode with PIL what DALI would decode differently or not at all (formats other than JPEG, CMYK, truncated
files) and pass the finished view, so that no image ends a run.
"""

import io
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Generic

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dive_fast.data.decode import UNDECODABLE, decode, decode_error_message, open_image, unsupported_reason
from dive_fast.data.loaders import plain
from dive_fast.data.loaders.loader import Options
from dive_fast.data.samples import Batch, SampleKey, Samples
from dive_fast.data.sources.source import Images, Source
from dive_fast.data.transforms import Crop, Preprocess, View
from dive_fast.data.worker_memory import FILE_BYTES, batch_bytes, batches_ahead, largest_batch, processes
from dive_fast.data.workers import in_workers
from dive_fast.errors import DataError

logger = logging.getLogger(__name__)

PREFETCH = 3
"""Batches in the pipeline at a time."""


def load(samples: Samples[Batch], batches: Iterable[list[SampleKey]], options: Options) -> Iterator[Batch]:
    """The batches of these sample keys, with pixels on ``options.device``.

    Raises:
        DataError: DALI is not installed.
    """
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise DataError(f"DALI cannot be imported ({error}): pip install nvidia-dali-cuda130") from error
    images, batches = largest_batch(batches)
    readers = processes("dali", options.workers)
    batch = batch_bytes("dali", images, samples.preprocess.size, _mean_file_bytes(samples.images))
    ahead = batches_ahead(batch, readers)
    return _load(samples, in_workers(_Read(samples), batches, readers, ahead=ahead), options)


def _mean_file_bytes(images: Images) -> float:
    """Mean size of an image's file, from up to 1,000 of them."""
    if not isinstance(images, Source):
        return FILE_BYTES
    source = images
    sizes = source.samples.sizes[:: max(1, len(source) // 1000)]
    return float(sizes.mean()) if len(sizes) and sizes.min() > 0 else FILE_BYTES


def _load(samples: Samples[Batch], read: Iterator["_Encoded[Batch]"], options: Options) -> Iterator[Batch]:
    first = next(read, None)
    if first is None:
        return
    read = chain([first], read)
    in_flight: deque[_Encoded[Batch]] = deque()

    def feed() -> list[Any]:
        encoded = next(read)  # StopIteration ends the pipeline too
        in_flight.append(encoded)
        return encoded.inputs()

    pipeline = _pipeline(feed, len(first.sample_keys), samples.preprocess, options)
    while True:
        try:
            images = _run(pipeline, options)
        except StopIteration:
            return
        except RuntimeError as error:
            # DALI stops the complete pipeline and does not report which of its batches failed.
            cause = str(error).rpartition("encountered:")[2].strip().splitlines()[0]
            logger.warning("DALI failed (%s), PIL decodes %d batches instead", cause, len(in_flight))
            failed = [encoded.sample_keys for encoded in in_flight]
            yield from plain.load(samples, failed, replace(options, workers=0))
            in_flight.clear()
            pipeline = _pipeline(feed, len(first.sample_keys), samples.preprocess, options)
            continue
        yield replace(in_flight.popleft().batch, images=images)


# In the workers


@dataclass(frozen=True)
class _Encoded(Generic[Batch]):
    """A batch whose images are encoded files."""

    sample_keys: list[SampleKey]
    batch: Batch
    """The batch without images."""
    data: Tensor
    """``(bytes,)`` uint8: the concatenated files, in one block of shared memory."""
    sizes: list[int]
    views: Tensor
    """``(B, 9)`` fp32: top, left, height, width of the crop; top, left, bottom, right of the region; flipped."""

    def inputs(self) -> list[Any]:
        """The inputs of the pipeline: files, the four column pairs of ``views``, and its last column."""
        files = [part.numpy() for part in self.data.split(self.sizes)]
        anchor, shape, start, end, flips = (part.contiguous() for part in self.views.split(2, dim=1))
        rectangles: list[Any] = [anchor.int().numpy(), shape.int().numpy(), start.numpy(), end.numpy()]
        return [files, *rectangles, flips.int().numpy()]


class _Read:
    """Reads the files of a batch and draws its crops and texts."""

    def __init__(self, samples: Samples[Any]) -> None:
        self.samples = samples

    def __call__(self, sample_keys: list[SampleKey]) -> _Encoded[Any]:
        self.samples.draw_crops(sample_keys)
        results = [self.samples.read_usable(key, self._file) for key in sample_keys]
        usable_keys = [key for key, _ in results]
        files = [np.frombuffer(file, np.uint8) for _, (file, _) in results]
        views = [_numbers(view) for _, (_, view) in results]
        return _Encoded(
            usable_keys,
            self.samples.batch(usable_keys, torch.empty(0)),
            torch.from_numpy(np.concatenate(files)),
            [len(file) for file in files],
            torch.tensor(views),
        )

    def _file(self, sample_key: SampleKey) -> tuple[bytes, View]:
        """A file that DALI can decode, and its view."""
        images, preprocess = self.samples.images, self.samples.preprocess
        data = images.read(sample_key[1])
        has_view = _has_views(preprocess)
        if has_view and images.sizes is not None:
            return data, self.samples.view(sample_key, tuple(images.sizes[sample_key[1]].tolist()))
        try:
            image = open_image(data)
            if has_view and not unsupported_reason(image, data):
                return data, self.samples.view(sample_key, (image.height, image.width))
            transformed = self.samples.transform(sample_key, decode(data))
        except UNDECODABLE as error:
            raise images.sample(sample_key[1]).unusable(
                f"cannot decode the image: {decode_error_message(error)}"
            ) from error
        content = io.BytesIO()
        transformed.save(content, "BMP")
        return content.getvalue(), preprocess.train_view(Crop(0, 0, transformed.height, transformed.width))


def _has_views(preprocess: Preprocess) -> bool:
    """Whether the pipeline can make all views of this preprocessing: without borders, and with one filter."""
    return preprocess.resize_mode != "longest" and preprocess.eval_view((1, 1)).resampling == preprocess.resampling


def _numbers(view: View) -> tuple[float, ...]:
    crop = view.crop
    return (crop.top, crop.left, crop.height, crop.width, *view.region, float(crop.is_flipped))


# The pipeline


def _pipeline(feed: Callable[[], list[Any]], batch_size: int, preprocess: Preprocess, options: Options) -> Any:
    from nvidia.dali import Pipeline, fn, types

    on_gpu = options.device.type == "cuda"
    bilinear = preprocess.resampling == Image.Resampling.BILINEAR
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=max(1, options.workers),
        device_id=(options.device.index or 0) if on_gpu else None,
        prefetch_queue_depth=PREFETCH,
    )
    with pipeline:
        files, anchor, shape, start, end, flips = fn.external_source(
            source=feed,
            num_outputs=6,
            dtype=[types.UINT8, types.INT32, types.INT32, types.FLOAT, types.FLOAT, types.INT32],
            ndim=1,
        )
        gpu_arguments: dict[str, Any] = {
            "device": "mixed",
            "hw_decoder_load": options.hw_decoder_load,
            # libjpeg's upsampling, for the same pixels as the other loaders.
            "jpeg_fancy_upsampling": True,
        }
        images = fn.decoders.image_slice(
            files,
            start=anchor,
            shape=shape,
            axes=[0, 1],
            output_type=types.RGB,
            adjust_orientation=False,  # open_clip ignores EXIF orientation
            **gpu_arguments if on_gpu else {},
        )
        images = fn.resize(
            images,
            size=preprocess.size,
            roi_start=start,
            roi_end=end,
            interp_type=types.INTERP_LINEAR if bilinear else types.INTERP_CUBIC,
            antialias=True,
        )
        images = fn.flip(images, horizontal=fn.squeeze(flips, axes=[0]))
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _run(pipeline: Any, options: Options) -> Tensor:
    """The pixels of the next batch, ``(B, H, W, 3)``; a copy, since DALI reuses its memory."""
    if options.device.type == "cuda":
        (output,) = pipeline.run(torch.cuda.current_stream(options.device))
        return torch.utils.dlpack.from_dlpack(output.as_tensor()).clone()
    (output,) = pipeline.run()
    return torch.from_numpy(output.as_array().copy())
