"""The DALI loader: worker processes read the files, DALI decodes, resizes and normalises them, on a GPU if it can.

DALI's own readers shuffle through a buffer and crop by a state of their own. Here a step's samples and crops are
drawn as for every loader and handed in with the bytes, so that a resumed run needs no state of the pipeline.

What DALI would not decode as PIL does (anything but JPEG, CMYK, a cut end) a worker decodes by PIL, and hands over
its finished view: no image ends a run.
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
from dive_fast.data.transforms import Crop, Preprocess, View
from dive_fast.data.workers import in_workers
from dive_fast.errors import DataError

logger = logging.getLogger(__name__)

PREFETCH = 3
"""Batches inside the pipeline at a time."""
READERS = 2
"""Processes that read files: some thousands of images a second each."""


def load(samples: Samples[Batch], batches: Iterable[list[SampleKey]], options: Options) -> Iterator[Batch]:
    """The batches of these places, as ``dive_fast.data.loaders.loader`` describes them; images on ``options.device``.

    Raises:
        DataError: DALI is not installed.
    """
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise DataError(f"DALI cannot be imported ({error}): pip install nvidia-dali-cuda130") from error
    return _load(samples, in_workers(_Read(samples), batches, min(READERS, options.workers)), options)


def _load(samples: Samples[Batch], read: Iterator["_Encoded[Batch]"], options: Options) -> Iterator[Batch]:
    first = next(read, None)
    if first is None:
        return
    read = chain([first], read)
    inside: deque[_Encoded[Batch]] = deque()

    def feed() -> list[Any]:
        encoded = next(read)  # its end ends the pipeline as well
        inside.append(encoded)
        return encoded.inputs()

    pipeline = _pipeline(feed, len(first.places), samples.preprocess, options)
    while True:
        try:
            images = _run(pipeline, options)
        except StopIteration:
            return
        except RuntimeError as error:
            # DALI gives up on the whole pipeline, and does not say for which of its batches.
            cause = str(error).rpartition("encountered:")[2].strip().splitlines()[0]
            logger.warning("DALI gave up (%s), PIL decodes %d batches in its place", cause, len(inside))
            yield from _by_pil(samples, [encoded.places for encoded in inside], options)
            inside.clear()
            pipeline = _pipeline(feed, len(first.places), samples.preprocess, options)
            continue
        yield replace(inside.popleft().batch, images=images)


def _by_pil(samples: Samples[Batch], batches: list[list[SampleKey]], options: Options) -> Iterator[Batch]:
    for batch in plain.load(samples, batches, replace(options, workers=0)):
        yield replace(batch, images=batch.images.to(options.device))


# In the workers


@dataclass(frozen=True)
class _Encoded(Generic[Batch]):
    """A batch whose images are still files."""

    places: list[SampleKey]
    batch: Batch
    """All of it but the images."""
    data: Tensor
    """``(bytes,)`` uint8: the files one after the other, in one piece of shared memory."""
    sizes: list[int]
    views: Tensor
    """``(B, 8)`` fp32: the crop's top, left, height, width; the region's top, left, bottom, right."""

    def inputs(self) -> list[Any]:
        """What the pipeline reads: files, then the four pairs of ``views``."""
        files = [part.numpy() for part in self.data.split(self.sizes)]
        anchor, shape, start, end = (pair.contiguous() for pair in self.views.split(2, dim=1))
        return [files, anchor.int().numpy(), shape.int().numpy(), start.numpy(), end.numpy()]


class _Read:
    """Reads the files of a batch and draws the rest of it."""

    def __init__(self, samples: Samples[Any]) -> None:
        self.samples = samples

    def __call__(self, places: list[SampleKey]) -> _Encoded[Any]:
        found = [self.samples.read_usable(place, self._file) for place in places]
        places = [place for place, _ in found]
        files = [np.frombuffer(file, np.uint8) for _, (file, _) in found]
        views = [(*_numbers(view.crop), *view.region) for _, (_, view) in found]
        return _Encoded(
            places,
            self.samples.batch(places, torch.empty(0)),
            torch.from_numpy(np.concatenate(files)),
            [len(file) for file in files],
            torch.tensor(views),
        )

    def _file(self, place: SampleKey) -> tuple[bytes, View]:
        """A file that DALI decodes, and what to cut out of it."""
        source, preprocess = self.samples.source, self.samples.preprocess
        data = source.read(place[1])
        has_view = preprocess.resize_mode != "longest"
        if has_view and source.sizes is not None:
            return data, self.samples.view(place, tuple(source.sizes[place[1]].tolist()))
        try:
            image = open_image(data)
            if has_view and not unsupported_reason(image, data):
                return data, self.samples.view(place, (image.height, image.width))
            cut = self.samples.transform(place, decode(data))
        except UNDECODABLE as error:
            raise source.samples[place[1]].unusable(
                f"cannot decode the image: {decode_error_message(error)}"
            ) from error
        content = io.BytesIO()
        cut.save(content, "BMP")
        return content.getvalue(), preprocess.train_view(Crop(0, 0, cut.height, cut.width))


def _numbers(crop: Crop) -> tuple[int, int, int, int]:
    return crop.top, crop.left, crop.height, crop.width


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
        files, anchor, shape, start, end = fn.external_source(
            source=feed,
            num_outputs=5,
            dtype=[types.UINT8, types.INT32, types.INT32, types.FLOAT, types.FLOAT],
            ndim=1,
        )
        on_gpu_only: dict[str, Any] = {
            "device": "mixed",
            "hw_decoder_load": options.hw_decoder_load,
            # As libjpeg does, so that the pixels are those of the other loaders.
            "jpeg_fancy_upsampling": True,
        }
        images = fn.decoders.image_slice(
            files,
            start=anchor,
            shape=shape,
            axes=[0, 1],
            output_type=types.RGB,
            adjust_orientation=False,  # open_clip shows the pixels as they are stored
            **on_gpu_only if on_gpu else {},
        )
        images = fn.resize(
            images,
            size=preprocess.size,
            roi_start=start,
            roi_end=end,
            interp_type=types.INTERP_LINEAR if bilinear else types.INTERP_CUBIC,
            antialias=True,
        )
        images = fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT16 if options.dtype == torch.float16 else types.FLOAT,
            output_layout="HWC" if options.channels_last else "CHW",
            mean=[255 * value for value in preprocess.mean],
            std=[255 * value for value in preprocess.std],
        )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _run(pipeline: Any, options: Options) -> Tensor:
    """The images of the next batch, ``(B, 3, H, W)``; a copy, since DALI uses its memory again."""
    if options.device.type == "cuda":
        (found,) = pipeline.run(torch.cuda.current_stream(options.device))
        images = torch.utils.dlpack.from_dlpack(found.as_tensor()).clone()
    else:
        (found,) = pipeline.run()
        images = torch.from_numpy(found.as_array().copy())
    return images.permute(0, 3, 1, 2) if options.channels_last else images
