"""Layouts of data sets on disk: each function opens one layout in a folder.

A function returns None where the folder does not have its layout. A folder that has it but is broken is an error:
the search for other layouts must not hide a damaged data set.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dive_fast.data.classes import repeated
from dive_fast.data.decode import IMAGE_SUFFIXES
from dive_fast.data.prompt_files import read_class_names
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.sample_table import Sample, SampleTable
from dive_fast.data.sources.source import Skipped, Source, summarize_skipped
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.errors import DataError
from dive_fast.evaluation.datasets.class_names import class_names_of, read_lines
from dive_fast.evaluation.datasets.evaluation_set import Captioned, plain_names
from dive_fast.io.safe_read import below, read_json

SHOWN_REASONS = 3
"""Number of reasons for skipped samples that a message lists."""
Named = tuple[Source, tuple[str, ...]]
"""Labelled images and the names of their labels."""
Layout = Callable[[Path], Named | None]
"""Opens a folder; None if it does not have this layout."""


def webdataset(root: Path) -> tuple[Source, tuple[str, ...], tuple[str, ...]] | None:
    """CLIP-benchmark's tars: ``test/*.tar``, ``classnames.txt`` and optionally templates.

    Returns:
        The images, their class names, and the templates, empty if there is no such file.
    """
    tars = _tars(root)
    names = root / "classnames.txt"
    if tars is None or not names.is_file():
        return None
    templates = root / "zeroshot_classification_templates.txt"
    source = open_webdataset(str(tars), ".cls")
    _check_complete(source, tars)
    # read_lines would drop an empty line among the class names, and shift the labels after it.
    return source, read_class_names(str(names)), read_lines(templates) if templates.is_file() else ()


def webdataset_captions(root: Path) -> Captioned | None:
    """CLIP-benchmark's tars whose ``.txt`` has one caption per line."""
    tars = _tars(root)
    if tars is None:
        return None
    source = open_webdataset(str(tars), ".txt")
    _check_complete(source, tars)
    return Captioned(split_captions(source), "webdataset")


def karpathy(root: Path, name: str) -> Captioned | None:
    """CLIP-benchmark's Karpathy test splits: Flickr's ``image,caption`` lines, COCO's JSON of annotations."""
    lines, annotations = root / f"{name}_test_karpathy.txt", root / "coco_test_karpathy.json"
    captions: dict[Path, list[str]] = {}
    if lines.is_file():
        header, *rows = read_lines(lines)
        if header.replace(" ", "").lower() != "image,caption":
            raise DataError(f"{lines}: expected the first line image,caption; found {header[:60]!r}")
        for line in rows:
            file, comma, caption = line.partition(".jpg,")
            if not comma:
                raise DataError(f"{lines}: expected image.jpg,caption; found {line[:60]!r}")
            captions.setdefault(_first_existing(root, f"{file}.jpg", f"Images/{file}.jpg"), []).append(caption)
    elif annotations.is_file():
        tree = _json(annotations)
        try:
            files = {image["id"]: image["file_name"] for image in tree["images"]}
            if len(files) < len(tree["images"]):
                raise DataError(f"{annotations}: two images have the same id; get the file again")
            for entry in tree["annotations"]:
                file = files[entry["image_id"]]
                captions.setdefault(_first_existing(root, f"val2014/{file}", file), []).append(entry["caption"])
            if without := files.keys() - {entry["image_id"] for entry in tree["annotations"]}:
                first = files[min(without, key=str)]
                raise DataError(
                    f"{annotations}: {len(without)} images have no caption, e.g. {first}; get the file again"
                )
            if not all(isinstance(caption, str) for texts in captions.values() for caption in texts):
                raise TypeError("a caption is not text")
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{annotations}: not COCO's captions: {error!r}") from error
    else:
        return None
    blank = next((path for path, texts in captions.items() if not all(text.strip() for text in texts)), None)
    if blank is not None:
        raise DataError(f"{lines if lines.is_file() else annotations}: a caption of {blank.name} is empty")
    samples = [Sample(path.name, path, texts=tuple(texts)) for path, texts in captions.items()]
    return Captioned(present(samples), "karpathy")


def captioned(source: Source, layout: str) -> Captioned:
    """The user's images with their captions, one per line of text; samples with equal images become one image.

    Known sets are not merged: they are measured as published.

    Raises:
        DataError: a sample has no caption, or its bytes cannot be read.
    """
    source = split_captions(source)
    texts: dict[int, list[str]] = {}
    first: dict[int, int] = {}
    images = source.image_ids().tolist()
    counts = Counter(images)
    for index, image in enumerate(images):
        first.setdefault(image, index)
        texts.setdefault(image, []).extend(source.samples.texts(index))
    if len(first) == len(source):
        return Captioned(source, layout)
    samples = [replace(source.samples[index], texts=tuple(texts[image])) for image, index in first.items()]
    hashes = None if source.hashes is None else source.hashes[list(first.values())]
    merged = replace(source, samples=SampleTable.of(samples), hashes=hashes, sizes=None, beton=None)
    remark = f"{len(source)} samples are {len(first)} distinct images, each with all its captions"
    return Captioned(merged, layout, (remark,), num_samples=tuple(counts[image] for image in first))


def split_captions(source: Source) -> Source:
    """The source with each non-empty line of a sample's text as a caption.

    Raises:
        DataError: a sample has no such line.
    """
    samples = [
        replace(sample, texts=tuple(line for text in sample.texts for line in text.splitlines() if line.strip()))
        for sample in source.samples
    ]
    empty = next((sample for sample in samples if not sample.texts), None)
    if empty is not None:
        raise empty.unusable("it has no caption")
    return replace(source, samples=SampleTable.of(samples), tokens=None)


def coop(root: Path, split: str, images: Sequence[str]) -> Named | None:
    """CoOp's splits: ``split_zhou_<name>.json`` with ``[file, label, class name]`` for each test image.

    Args:
        split: name of the JSON file.
        images: folders that file paths may be relative to.
    """
    file = root / split
    if not file.is_file():
        return None
    tree = _json(file)
    try:
        entries = [(str(path), int(label), str(name)) for path, label, name in tree["test"]]
        pairs = {(int(label), str(name)) for part in tree.values() for _, label, name in part}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{file}: expected [file, label, class name] under test: {error!r}") from error
    name_of = dict(pairs)
    if len(name_of) < len(pairs):
        label = next(label for label, name in pairs if name_of[label] != name)
        names = sorted(name for other, name in pairs if other == label)
        raise DataError(f"{file}: label {label} is called both {names[0]!r} and {names[1]!r}; get the file again")
    if not entries or sorted(name_of) != list(range(len(name_of))):
        raise DataError(f"{file}: no test image, or its labels are not 0, 1, 2, ...")
    base = next((root / folder for folder in images if _below(root / folder, entries[0][0]).is_file()), None)
    if base is None:
        raise DataError(f"{root}: {entries[0][0]} of {split} is in none of {', '.join(images) or '.'}")
    samples = [Sample(path, _below(base, path), label=label) for path, label, _ in entries]
    return present(samples), plain_names([name_of[label] for label in range(len(name_of))])


def torchvision(root: Path, folder: str, kind: str, names: str | None = None, **options: Any) -> Named | None:
    """A data set in torchvision's layout, read by torchvision's class.

    Args:
        folder: folder that the class expects in its root; ``root`` may be its root, this folder, or one between.
        kind: name of the class.
        names: data set whose class names replace those of the class; required if it has none.
        options: arguments of the class.
    """
    base_root = _torchvision_root(root, folder)
    if base_root is None:
        return None
    import torchvision.datasets

    try:
        # This loader returns the path instead of decoding the image.
        dataset = getattr(torchvision.datasets, kind)(str(base_root), download=False, loader=str, **options)
        entries = [dataset[i] for i in range(len(dataset))]
    except ImportError as error:
        raise DataError(f"{base_root / folder}: torchvision reads it with scipy: pip install scipy") from error
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise DataError(f"{base_root / folder}: torchvision's {kind} cannot read it: {error}") from error
    # SUN397 comes in the file system's order.
    samples = sorted(
        (Sample(str(Path(path).relative_to(base_root)), Path(path), label=int(label)) for path, label in entries),
        key=lambda sample: sample.key,
    )
    if not samples:
        raise DataError(f"{base_root / folder}: torchvision's {kind} finds no image there")
    class_names = plain_names([name.replace("/", " ") for name in getattr(dataset, "classes", ())])
    return present(samples), _replace_names(names, class_names)


def aircraft(root: Path) -> Named | None:
    """FGVC-Aircraft in its original layout: ``images_variant_test.txt``, ``variants.txt`` and ``images/``."""
    for data in (root, root / "data", root / "fgvc-aircraft-2013b/data"):
        if (data / "images_variant_test.txt").is_file():
            names = read_lines(data / "variants.txt")
            label_of = {name: label for label, name in enumerate(names)}
            if len(label_of) < len(names):
                raise DataError(f"{data / 'variants.txt'}: {next(iter(repeated(names)))!r} is listed twice")
            samples = []
            for line in read_lines(data / "images_variant_test.txt"):
                image, _, name = line.partition(" ")
                if name not in label_of:
                    raise DataError(f"{data / 'variants.txt'}: no variant {name!r}, the class of image {image}")
                samples.append(Sample(image, _below(data, f"images/{image}.jpg"), label=label_of[name]))
            return present(samples), names
    return None


def pets(root: Path) -> Named | None:
    """Oxford-IIIT Pet in its original layout: ``annotations/test.txt`` and ``images/``."""
    for data in (root, root / "oxford-iiit-pet"):
        list_file = data / "annotations/test.txt"
        if list_file.is_file():
            rows = [line.split() for line in read_lines(list_file)]
            try:
                labels = {row[0]: int(row[1]) - 1 for row in rows}
            except (IndexError, ValueError) as error:
                raise DataError(f"{list_file}: expected image and class first on each line: {error}") from error
            pairs = {(label, image.rpartition("_")[0]) for image, label in labels.items()}
            breeds = dict(pairs)
            if len(breeds) < len(pairs) or len(labels) < len(rows):
                raise DataError(f"{list_file}: a class has images of two breeds, or an image is listed twice")
            if sorted(breeds) != list(range(len(breeds))):
                raise DataError(f"{list_file}: its classes are not numbered 1, 2, 3, ...")
            samples = [
                Sample(image, _below(data, f"images/{image}.jpg"), label=label) for image, label in labels.items()
            ]
            names = [" ".join(word.title() for word in breeds[label].split("_")) for label in sorted(breeds)]
            return present(samples), tuple(names)
    return None


def class_folders(
    root: Path, inside: Sequence[str] = (), names: str | None = None, exclude: Sequence[str] = ()
) -> Named | None:
    """Class folders in one of ``inside``, in ``test``, in ``val`` or in the root itself.

    Args:
        names: data set whose class names replace those of the folders; there must be as many.
        exclude: folders that are not classes.
    """
    for folder in (*inside, "test", "val", ""):
        parent = root / folder
        if not _has_class_folders(parent):
            continue
        source = complete(open_folder(str(parent)), parent)
        kept = [name for name in source.class_names if name not in exclude]
        label_of = {name: label for label, name in enumerate(kept)}
        labels = [label_of.get(name, -1) for name in source.class_names]
        return relabelled(source, labels), _replace_names(names, plain_names(kept))
    return None


def relabelled(source: Source, labels: Sequence[int]) -> Source:
    """The source with label i replaced by ``labels[i]``; samples whose new label is -1 are left out."""
    samples = source.samples.with_labels(np.array(labels)[source.samples.labels])
    return Source(samples.select(np.flatnonzero(samples.labels >= 0)))


def _torchvision_root(root: Path, folder: str) -> Path | None:
    """The parent of ``folder``, where ``root`` is this parent, the folder itself, or one between."""
    root, parts = root.resolve(), Path(folder).parts
    for depth in range(len(parts) + 1):
        is_inside = root.parts[len(root.parts) - depth :] == parts[:depth]
        if is_inside and root.joinpath(*parts[depth:]).is_dir():
            return root.parents[depth - 1] if depth else root
    return None


def _replace_names(name: str | None, defaults: tuple[str, ...]) -> tuple[str, ...]:
    """Class names of the data set ``name``; None keeps the defaults."""
    if name is None:
        return defaults
    names = class_names_of(name)
    if defaults and len(names) != len(defaults):
        raise DataError(f"the folder has {len(defaults)} classes, but {name} has {len(names)} class names")
    return names


def _has_class_folders(folder: Path) -> bool:
    """Whether the folder has subfolders, and each of them contains an image."""
    if not folder.is_dir():
        return False
    subfolders = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return bool(subfolders) and all(any(_is_image(file) for file in entry.iterdir()) for entry in subfolders)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _tars(root: Path) -> Path | None:
    return next((root / split for split in ("test", "val", "") if any((root / split).glob("*.tar"))), None)


def _check_complete(source: Source, tars: Path) -> None:
    """Checks the number of tars against ``nshards.txt``, and that no sample was skipped."""
    count_file = tars / "nshards.txt"
    count = len(list(tars.glob("*.tar")))
    if count_file.is_file() and (expected := "".join(read_lines(count_file))) != str(count):
        raise DataError(f"{tars}: {count} tars, but nshards.txt says {expected}; get the others")
    complete(source, tars)


def complete(source: Source, path: Path) -> Source:
    """The source itself, after a check that no sample was skipped: skipped samples would not be measured.

    Raises:
        DataError: samples were skipped; the message names the first.
    """
    if source.skipped:
        raise DataError(f"{path}: {describe_skipped(source.skipped)}; get the data set again, or remove these")
    return source


def remarks_on_files(source: Source) -> list[str]:
    """Lines about the samples and files of a folder that are not part of the set."""
    lines = [describe_skipped(source.skipped)] if source.skipped else []
    if source.ignored:
        lines.append(f"{len(source.ignored)} files ignored: {summarize_skipped(source.ignored)}")
    if source.prepared_without:
        reasons = ", ".join(f"{count} {reason}" for reason, count in source.prepared_without.items())
        lines.append(f"was prepared without these samples: {reasons} (skipped.jsonl)")
    return lines


def describe_skipped(skipped: Sequence[Skipped]) -> str:
    """One line with the number of skipped samples, and for each reason the number and the first key."""
    reasons = Counter(reason for _, reason in skipped).most_common()
    parts = []
    for reason, count in reasons[:SHOWN_REASONS]:
        first = next(key for key, other in skipped if other == reason)
        parts.append(f"{reason} ({count}, the first: {first})")
    more = f", and {len(reasons) - SHOWN_REASONS} other reasons" if len(reasons) > SHOWN_REASONS else ""
    samples = "1 sample is" if len(skipped) == 1 else f"{len(skipped)} samples are"
    return f"{samples} left out: {', '.join(parts)}{more}"


def present(samples: list[Sample]) -> Source:
    """A source of these samples, with the size of each file.

    Raises:
        DataError: a file is missing.
    """
    missing = [sample for sample in samples if not sample.path.is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(samples)} images are missing, e.g. {missing[0].path}")
    return Source.of(replace(sample, size=sample.path.stat().st_size) for sample in samples)


def _first_existing(root: Path, *files: str) -> Path:
    """The first of the files that exists; the first of all if none does."""
    paths = [_below(root, file) for file in files]
    return next((path for path in paths if path.is_file()), paths[0])


def _below(root: Path, file: str) -> Path:
    try:
        return below(root, file)
    except (ValueError, TypeError) as error:
        raise DataError(f"{root}: a list there names a file elsewhere: {error}; get the data set again") from error


def _json(file: Path) -> Any:
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot read it: {error}") from error
