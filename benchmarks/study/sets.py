"""Real pictures of 32 x 32, as the engine reads them, and which classes play which part.

CIFAR-10:

=============  ==========================================  =============================================
target         CIFAR-10, train                             what is learned
validation     CIFAR-10, test, first half                  what settings are chosen on
id             CIFAR-10, test, second half                 what is reported
ood            pictures of ``id``, corrupted               by transforms of torchvision
reference      CIFAR-100, train, every other class         captioned, replayed
zs             CIFAR-100, test, all other classes          never seen in fine-tuning
tiny           Tiny-ImageNet, some classes                 the same, from another source of pictures
heldout        CIFAR-100, test, all classes                captioned: the geometry is measured on it
pre-training   CIFAR-100, train, all classes               captions from fine and coarse names
=============  ==========================================  =============================================

PACS: target, validation and id are photos; art, cartoon and sketch are ``ood``; the rest is the same, but for the
classes of ``zs`` and ``tiny`` that PACS has, which are left out.

The reference and a zero-shot set share no class: what replay keeps of its own classes counts for nothing.
Classes of Tiny-ImageNet were decided one by one (``tinyimagenet.tsv``): out is what CIFAR-10 or the reference has,
kinds of it and, in doubt, what is near it. Of the others the small model can read those that CIFAR-100's zero-shot
half has a name for: words that pre-training never saw are noise to it, before fine-tuning and after. No picture of
``heldout`` is trained on in fine-tuning or pre-training; its classes are those of the reference and others.
"""

import csv
import io
import itertools
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from real_data import DATA
from torchvision.transforms import v2

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
"""Pictures of ``id`` that are, at most."""
PACS, CIFAR10, CIFAR100 = "pacs32/pacs32.npz", "cifar10/cifar10.npz", "cifar100/cifar100.npz"
TINY = "zeroshot/tinyimagenet_val.npz"
DOMAINS = ("art_painting", "cartoon", "sketch")
PHOTOS = {"target": (0, 1000), "validation": (1000, 1300), "id": (1300, 1670)}
"""Row ranges of PACS after shuffling: its file begins with equally many of each class and ends with persons."""
IN_PACS = frozenset({"elephant", "house", "boy", "girl"})
"""Classes of CIFAR-100's zero-shot half that PACS has, or a kind of (person)."""
DECISIONS = Path(__file__).with_name("tinyimagenet.tsv")


class Pictures(NamedTuple):
    """A split of a data set."""

    images: NDArray[np.uint8]
    """``(N, 32, 32, 3)``."""
    labels: NDArray[np.int64]
    names: tuple[str, ...]


def names(file: str, kind: str = "class") -> tuple[str, ...]:
    """Names of the classes of an ``.npz`` file, or of its superclasses (``coarse``)."""
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


def shuffled(pictures: Pictures, seed: int = 0) -> Pictures:
    """All of them in another order, always the same."""
    order = np.random.default_rng(seed).permutation(len(pictures.images))
    return pictures._replace(images=pictures.images[order], labels=pictures.labels[order])


def of_classes(pictures: Pictures, classes: Sequence[int]) -> Pictures:
    """Those of some classes, renumbered."""
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
    """The caption of a pre-training image: mostly its class, sometimes its superclass, sometimes both."""
    kind = random.random()
    if kind < 0.7:
        return str(random.choice(TEMPLATES)).format(fine)
    if kind < 0.85:
        return str(random.choice(COARSE_TEMPLATES)).format(coarse)
    return str(random.choice(BOTH_TEMPLATES)).format(fine, coarse)


def vocabulary() -> set[str]:
    """All words of names and templates."""
    classes = names(CIFAR10) + names(CIFAR100) + names(CIFAR100, "coarse")
    forms = (*TEMPLATES, *COARSE_TEMPLATES, *BOTH_TEMPLATES)
    return {word for text in (*classes, *(form.replace("{}", "") for form in forms)) for word in text.split()}


def evaluated(world: str) -> tuple[str, ...]:
    """Names of the labelled sets that a world's runs are measured on."""
    shifted = DOMAINS if world == "pacs" else ("ood",)
    return ("validation", "id", *shifted, "zs", "tiny")


class Decision(NamedTuple):
    """Whether a class of Tiny-ImageNet is used, and for what."""

    wnid: str
    name: str
    collides_with: str
    """A class of CIFAR-10 or of the reference, or nothing."""
    read_as: str
    """The class of CIFAR-100's zero-shot half that it is a kind of, or nothing."""


def decisions() -> list[Decision]:
    """One for each class, in the order of the labels."""
    with DECISIONS.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t"))
    return [Decision(*("" if cell == "-" else cell for cell in row)) for row in rows[1:]]


def tiny(without: frozenset[str] = frozenset()) -> Pictures:
    """Tiny-ImageNet's pictures of classes that no training has, under names that the small model can read.

    Args:
        without: names to leave out.
    """
    found = load(TINY, "test")
    said = [decision.read_as for decision in decisions()]
    known = tuple(sorted(set(said) - {""} - without))
    kept = np.array([row for row, label in enumerate(found.labels) if said[label] in known])
    labels = np.array([known.index(said[label]) for label in found.labels[kept]], dtype=np.int64)
    return Pictures(found.images[kept], labels, known)


def labelled_sets(world: str, target: int, tested: int, corruptions: int) -> dict[str, Pictures]:
    """Every labelled set of a world, ``cifar10`` or ``pacs``, by name; arguments as :func:`write` takes them."""
    hundred = load(CIFAR100, "test")
    taken = IN_PACS if world == "pacs" else frozenset[str]()
    zero_shot = [label for label in halves(hundred)[1] if hundred.names[label] not in taken]
    away = {"zs": cut(of_classes(hundred, zero_shot), 0, tested), "tiny": cut(tiny(taken), 0, tested)}
    if world == "pacs":
        photos = shuffled(load(PACS, "photo"))
        near = {name: cut(photos, *places) for name, places in PHOTOS.items()}
        return near | {domain: cut(load(PACS, domain), 0, tested // 4) for domain in DOMAINS} | away
    test = load(CIFAR10, "test")
    near = {
        "target": cut(load(CIFAR10, "train"), 0, target),
        "validation": cut(test, 0, min(5000, tested)),
        "id": cut(test, 5000, 5000 + min(5000, tested)),
        "ood": corrupted(cut(test, 5000, 5000 + min(corruptions, tested))),
    }
    return near | away


def write(
    folder: Path,
    target: int = 50_000,
    reference: int = 25_000,
    tested: int = 5_000,
    *,
    corruptions: int = CORRUPTED,
    references: Sequence[int] = (),
    worlds: Sequence[str] = ("cifar10",),
) -> Path:
    """Writes every set as webdataset tars below ``folder``, unless they are there; PACS's below ``pacs``.

    Args:
        target: pictures of the target set at most.
        reference: pairs of the reference set at most.
        tested: pictures at most of each set that is evaluated on.
        corruptions: pictures that are corrupted, each in every way.
        references: sizes of further reference sets, ``reference-<size>``: the first so many pairs.
    """
    counts = [target, reference, tested, *([] if corruptions == CORRUPTED else [corruptions])]
    for world in worlds:
        words = ["whole", *counts, *references, *([] if world == "cifar10" else [world])]
        mark = folder / "-".join(map(str, words))
        if mark.exists():
            continue
        place = folder if world == "cifar10" else folder / world
        for name, pictures in labelled_sets(world, target, tested, corruptions).items():
            write_labelled(place / name, pictures)
        if world == "cifar10":
            _write_pairs(folder, reference, references, tested)
        mark.touch()
    return folder


def _write_pairs(folder: Path, reference: int, references: Sequence[int], tested: int) -> None:
    train = load(CIFAR100, "train")
    kept = np.flatnonzero(np.isin(train.labels, halves(train)[0]))
    write_captioned(folder / "reference", train, "train", kept[:reference])
    for size in references:
        write_captioned(folder / f"reference-{size}", train, "train", kept[:size])
    write_captioned(folder / "heldout", load(CIFAR100, "test"), "test", np.arange(min(1000, tested)))


def write_labelled(folder: Path, pictures: Pictures, templates: Sequence[str] = TEMPLATES) -> None:
    """Writes a labelled set as webdataset tars, with its class names and templates."""
    _write_tars(folder, pictures.images, ".cls", [str(label) for label in pictures.labels])
    (folder / "classes.txt").write_text("".join(f"{one}\n" for one in pictures.names))
    (folder / "templates.txt").write_text("".join(f"{one}\n" for one in templates))


def write_captioned(folder: Path, fine: Pictures, split: str, rows: NDArray[np.int64]) -> None:
    """Writes some pictures of CIFAR-100 with captions as webdataset tars.

    Args:
        fine: the pictures of ``split``, in the order of the file.
    """
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
