"""Real pictures of 32 x 32, as the engine reads them, and which classes play which part.

=============  ==========================================  =============================================
target         CIFAR-10, train                             what is learned
id             CIFAR-10, test, first half: validation      second half (``id``): what is reported
ood            pictures of ``id``, corrupted               by transforms of torchvision
reference      CIFAR-100, train, every other class         captioned, replayed
zs             CIFAR-100, test, all other classes          never seen in fine-tuning
heldout        CIFAR-100, test, all classes                captioned: the geometry is measured on it
pre-training   CIFAR-100, train, all classes               captions from fine and coarse names
=============  ==========================================  =============================================

The reference and the zero-shot set share no class: what replay keeps of its own classes counts for nothing.
"""

import io
import itertools
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

DATA = Path(os.environ.get("DIVE_TEST_DATA", Path(__file__).parents[3] / "shared/data"))
SHARD = 5000

TEMPLATES = (
    "a photo of a {}",
    "a blurry photo of a {}",
    "a small photo of a {}",
    "a picture of the {}",
    "a photo of one {}",
    "a close photo of a {}",
    "a {}",
)
COARSE_TEMPLATES = ("a photo of some {}", "a picture of {}", "{}")
BOTH_TEMPLATES = ("a photo of a {} among {}", "a {} one of the {}")
CORRUPTIONS: tuple[v2.Transform, ...] = (
    v2.GaussianNoise(sigma=0.1),
    v2.GaussianBlur(5, sigma=1.2),
    v2.ColorJitter(brightness=(1.6, 1.6)),
    v2.ColorJitter(contrast=(0.4, 0.4)),
    v2.JPEG(quality=15),
    v2.RandomRotation((20, 20)),
)
"""Each is applied to every picture of ``ood``."""
CORRUPTED = 1000
"""Pictures of ``id`` that are."""


class Pictures(NamedTuple):
    """A split of a data set."""

    images: NDArray[np.uint8]
    """``(N, 32, 32, 3)``."""
    labels: NDArray[np.int64]
    names: tuple[str, ...]


def names(file: str, kind: str = "class") -> tuple[str, ...]:
    """Of the classes of an ``.npz`` file, or of its superclasses, kind ``coarse``."""
    with np.load(DATA / file) as arrays:
        return tuple(str(name).replace("_", " ").lower() for name in arrays[f"{kind}_names"])


def superclasses(file: str, split: str) -> list[str]:
    """The name of each picture's."""
    with np.load(DATA / file) as arrays:
        labels = arrays[f"{split}_coarse_labels"].tolist()
    known = names(file, "coarse")
    return [known[label] for label in labels]


def load(file: str, split: str) -> Pictures:
    """Reads a split of one of the ``.npz`` files, whose pictures are tiles of larger JPEGs.

    Args:
        file: below :data:`DATA`.
    """
    with np.load(DATA / file) as arrays:
        found = arrays[f"{split}_labels"]
        if f"{split}_images" in arrays.files:
            return Pictures(arrays[f"{split}_images"], found, names(file))
        tile, offsets = int(arrays["tile"]), arrays[f"{split}_offsets"]
        sheets = arrays[f"{split}_jpeg"]
    pieces = []
    for first, last in itertools.pairwise(offsets):
        sheet = np.asarray(Image.open(io.BytesIO(sheets[first:last].tobytes())).convert("RGB"))
        rows, columns = sheet.shape[0] // tile, sheet.shape[1] // tile
        pieces.append(sheet.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3))
    return Pictures(np.concatenate(pieces)[: len(found)], found, names(file))


def cut(pictures: Pictures, first: int, last: int) -> Pictures:
    """Some of them, in order."""
    return pictures._replace(images=pictures.images[first:last], labels=pictures.labels[first:last])


def of_classes(pictures: Pictures, classes: Sequence[int]) -> Pictures:
    """Those of some classes, numbered anew."""
    place = {old: new for new, old in enumerate(classes)}
    kept = np.flatnonzero(np.isin(pictures.labels, classes))
    labels = np.array([place[label] for label in pictures.labels[kept].tolist()], dtype=np.int64)
    return Pictures(pictures.images[kept], labels, tuple(pictures.names[old] for old in classes))


def halves(pictures: Pictures) -> tuple[list[int], list[int]]:
    """Classes of the reference, and those of the zero-shot set."""
    return list(range(0, len(pictures.names), 2)), list(range(1, len(pictures.names), 2))


def corrupted(pictures: Pictures) -> Pictures:
    """Each picture under each of :data:`CORRUPTIONS`."""
    torch.manual_seed(0)
    images = torch.from_numpy(pictures.images).permute(0, 3, 1, 2)
    to_float, to_bytes = v2.ToDtype(torch.float32, scale=True), v2.ToDtype(torch.uint8, scale=True)
    found = []
    for corruption in CORRUPTIONS:
        is_of_bytes = isinstance(corruption, v2.JPEG)
        made = corruption(images) if is_of_bytes else to_bytes(corruption(to_float(images)).clamp(0, 1))
        found.append(made.permute(0, 2, 3, 1).numpy())
    labels = np.tile(pictures.labels, len(CORRUPTIONS))
    return Pictures(np.concatenate(found), labels, pictures.names)


def caption(fine: str, coarse: str, random: np.random.Generator) -> str:
    """What a pre-training picture is said to show: mostly its class, sometimes its superclass, sometimes both."""
    kind = random.random()
    if kind < 0.7:
        return str(random.choice(TEMPLATES)).format(fine)
    if kind < 0.85:
        return str(random.choice(COARSE_TEMPLATES)).format(coarse)
    return str(random.choice(BOTH_TEMPLATES)).format(fine, coarse)


def vocabulary() -> set[str]:
    """All words of names and templates."""
    classes = (
        names("cifar10/cifar10.npz") + names("cifar100/cifar100.npz") + names("cifar100/cifar100.npz", "coarse")
    )
    forms = (*TEMPLATES, *COARSE_TEMPLATES, *BOTH_TEMPLATES)
    return {word for text in (*classes, *(form.replace("{}", "") for form in forms)) for word in text.split()}


def write(folder: Path, target: int = 50_000, reference: int = 25_000, tested: int = 5_000) -> Path:
    """Writes every set as webdataset tars below ``folder``, unless they are there.

    Args:
        target: pictures of the target set at most.
        reference: pairs of the reference set at most.
        tested: pictures at most of each set that is evaluated on.
    """
    mark = folder / f"whole-{target}-{reference}-{tested}"
    if mark.exists():
        return folder
    ten, hundred = (load(f"cifar{n}/cifar{n}.npz", "train") for n in (10, 100))
    ten_test, hundred_test = (load(f"cifar{n}/cifar{n}.npz", "test") for n in (10, 100))
    reference_classes, zero_shot_classes = halves(hundred)
    labelled = {
        "target": cut(ten, 0, target),
        "validation": cut(ten_test, 0, min(5000, tested)),
        "id": cut(ten_test, 5000, 5000 + min(5000, tested)),
        "ood": corrupted(cut(ten_test, 5000, 5000 + min(CORRUPTED, tested))),
        "zs": cut(of_classes(hundred_test, zero_shot_classes), 0, tested),
    }
    for name, pictures in labelled.items():
        place = folder / name
        _write_tars(place, pictures.images, ".cls", [str(label) for label in pictures.labels])
        (place / "classes.txt").write_text("".join(f"{one}\n" for one in pictures.names))
        (place / "templates.txt").write_text("".join(f"{one}\n" for one in TEMPLATES))
    kept = np.flatnonzero(np.isin(hundred.labels, reference_classes))
    _write_captioned(folder / "reference", hundred, "train", kept[:reference])
    _write_captioned(folder / "heldout", hundred_test, "test", np.arange(min(1000, tested)))
    mark.touch()
    return folder


def _write_captioned(folder: Path, fine: Pictures, split: str, rows: NDArray[np.int64]) -> None:
    random, coarse = np.random.default_rng(0), superclasses("cifar100/cifar100.npz", split)
    said = [caption(fine.names[fine.labels[row]], coarse[row], random) for row in rows]
    _write_tars(folder, fine.images[rows], ".txt", said)


def _write_tars(folder: Path, images: NDArray[np.uint8], ending: str, texts: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(images), SHARD):
        with tarfile.open(folder / f"{first // SHARD:05d}.tar", "w") as tar:
            for row in range(first, min(first + SHARD, len(images))):
                picture = io.BytesIO()
                Image.fromarray(images[row]).save(picture, "png")
                _add(tar, f"{row:06d}.png", picture.getvalue())
                _add(tar, f"{row:06d}{ending}", texts[row].encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
