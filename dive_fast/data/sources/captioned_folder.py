"""Reads a folder of images with captions in text files next to them."""

from pathlib import Path

from dive_fast.data.content_hashes import map_in_threads
from dive_fast.data.sources.folder import images_below
from dive_fast.data.sources.sample_table import Sample, printable
from dive_fast.data.sources.source import (
    EMPTY_CAPTION,
    Skipped,
    Source,
    locate,
    summarize_skipped,
)
from dive_fast.errors import DataError
from dive_fast.io.safe_read import read_text

NO_TEXT = "no .txt of the same name"
"""Reason for skipping an image without a caption file."""


def open_captioned_folder(path: str) -> Source:
    """Opens a folder of images at any depth, also behind links; ``x.txt`` next to ``x.jpg`` is its text.

    Images without a text, with an empty text or one that is not UTF-8 are skipped.

    Raises:
        DataError: the folder is missing, or no image has a text.
    """
    root = locate(path)
    if not root.is_dir():
        state = "it is a file" if root.exists() else "no such folder"
        raise DataError(f"{path}: expected a folder of images with a .txt next to each, but {state}")
    skipped: list[Skipped] = []
    ignored: list[Skipped] = []
    try:
        files = list(images_below(root, "", skipped, ignored))
    except OSError as error:
        raise DataError(f"{path}: cannot list its images: {error}") from error
    samples: list[Sample] = []
    for (key, file, size), (text, reason) in zip(
        files, map_in_threads(_text, [file for _, file, _ in files]), strict=True
    ):
        if reason:
            skipped.append(Skipped(printable(key), reason))
        else:
            samples.append(Sample(printable(key), file, size=size, texts=(text,)))
    if not samples:
        reasons = f" ({summarize_skipped(skipped)})" if skipped else ""
        hint = "; it holds tars: use format webdataset" if not files and any(root.glob("*.tar")) else ""
        raise DataError(f"{path}: no image has a .txt of the same name next to it{reasons}{hint}")
    return Source.of(samples, skipped=skipped, ignored=ignored)


def _text(image: Path) -> tuple[str, str]:
    """The text of an image, or the reason why it has none."""
    try:
        text = read_text(image.with_suffix(".txt"), "utf-8-sig").strip()
    except FileNotFoundError:
        return "", NO_TEXT
    except UnicodeDecodeError:
        return "", "its caption is not UTF-8"
    except (OSError, ValueError) as error:
        raise DataError(f"{image.with_suffix('.txt')}: cannot read it: {error}") from error
    return text, "" if text else EMPTY_CAPTION
