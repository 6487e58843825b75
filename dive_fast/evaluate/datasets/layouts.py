"""The layouts that data sets have on people's disks: each opens what it knows, or says that it is another one.

A layout is given a folder and returns None where nothing there looks like it. What looks like it and is broken is
an error: nothing else must be taken for the data set that someone meant to have.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dive_fast.data.classes import repeated
from dive_fast.data.decode import IMAGE_SUFFIXES
from dive_fast.data.prompts import read_class_names
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.source import Sample, Skipped, Source, summarize_skipped
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.errors import DataError
from dive_fast.evaluate.datasets.class_names import class_names_of, read_lines
from dive_fast.evaluate.datasets.evaluation_set import Captioned, plain_names
from dive_fast.io.safe_read import below, read_json

SHOWN_REASONS = 3
"""Reasons for leaving samples out that a message names."""
Named = tuple[Source, tuple[str, ...]]
"""Images, and the names of their labels."""
Layout = Callable[[Path], Named | None]


def webdataset(root: Path) -> tuple[Source, tuple[str, ...], tuple[str, ...]] | None:
    """CLIP-benchmark's tars: ``test/*.tar``, ``classnames.txt`` and perhaps templates.

    Returns:
        The images, their class names, and the templates, none where the file is missing.
    """
    tars = _tars(root)
    names = root / "classnames.txt"
    if tars is None or not names.is_file():
        return None
    templates = root / "zeroshot_classification_templates.txt"
    source = open_webdataset(str(tars), ".cls")
    _all_there(source, tars)
    # An empty line among class names would shift all behind it.
    return source, read_class_names(str(names)), read_lines(templates) if templates.is_file() else ()


def webdataset_captions(root: Path) -> Captioned | None:
    """CLIP-benchmark's tars with one caption a line in ``.txt``."""
    tars = _tars(root)
    if tars is None:
        return None
    source = open_webdataset(str(tars), ".txt")
    _all_there(source, tars)
    return Captioned(split_captions(source), "webdataset")


def karpathy(root: Path, name: str) -> Captioned | None:
    """CLIP-benchmark's Karpathy test splits: Flickr's ``image,caption`` lines, COCO's JSON of annotations."""
    lines, annotations = root / f"{name}_test_karpathy.txt", root / "coco_test_karpathy.json"
    captions: dict[Path, list[str]] = {}
    if lines.is_file():
        head, *rows = read_lines(lines)
        if head.replace(" ", "").lower() != "image,caption":
            raise DataError(f"{lines}: expected the first line image,caption; found {head[:60]!r}")
        for line in rows:
            file, comma, caption = line.partition(".jpg,")
            if not comma:
                raise DataError(f"{lines}: expected image.jpg,caption; found {line[:60]!r}")
            captions.setdefault(_first_of(root, f"{file}.jpg", f"Images/{file}.jpg"), []).append(caption)
    elif annotations.is_file():
        tree = _json(annotations)
        try:
            files = {image["id"]: image["file_name"] for image in tree["images"]}
            if len(files) < len(tree["images"]):
                raise DataError(f"{annotations}: two images have one id; get the file again")
            for entry in tree["annotations"]:
                file = files[entry["image_id"]]
                captions.setdefault(_first_of(root, f"val2014/{file}", file), []).append(entry["caption"])
            if left := files.keys() - {entry["image_id"] for entry in tree["annotations"]}:
                first = files[min(left, key=str)]
                raise DataError(
                    f"{annotations}: {len(left)} images have no caption, e.g. {first}; get the file again"
                )
            if not all(isinstance(caption, str) for own in captions.values() for caption in own):
                raise TypeError("a caption as text")
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{annotations}: not COCO's captions: {error!r} is not found") from error
    else:
        return None
    blank = next((path for path, own in captions.items() if not all(text.strip() for text in own)), None)
    if blank is not None:
        raise DataError(f"{lines if lines.is_file() else annotations}: a caption of {blank.name} is empty")
    samples = [Sample(path.name, path, texts=tuple(own)) for path, own in captions.items()]
    return Captioned(present(samples), "karpathy")


def captioned(source: Source, layout: str) -> Captioned:
    """A user's images with their captions, the lines of their texts; samples with equal images are one image.

    Known sets are measured as they are published.

    Raises:
        DataError: a sample has no caption, or its bytes cannot be read.
    """
    source = split_captions(source)
    texts: dict[int, list[str]] = {}
    first: dict[int, int] = {}
    images = source.image_ids().tolist()
    counts = Counter(images)
    for at, image in enumerate(images):
        first.setdefault(image, at)
        texts.setdefault(image, []).extend(source.samples[at].texts)
    if len(first) == len(source):
        return Captioned(source, layout)
    samples = [replace(source.samples[at], texts=tuple(texts[image])) for image, at in first.items()]
    hashes = None if source.hashes is None else source.hashes[list(first.values())]
    merged = replace(source, samples=samples, hashes=hashes, sizes=None, beton=None)
    remark = f"{len(source)} samples are {len(first)} distinct images, each with all its captions"
    return Captioned(merged, layout, (remark,), num_samples=tuple(counts[image] for image in first))


def split_captions(source: Source) -> Source:
    """With a sample's lines as its captions.

    Raises:
        DataError: a sample has none.
    """
    samples = [
        replace(sample, texts=tuple(line for text in sample.texts for line in text.splitlines() if line.strip()))
        for sample in source.samples
    ]
    empty = next((sample for sample in samples if not sample.texts), None)
    if empty is not None:
        raise empty.unusable("it has no caption")
    return replace(source, samples=samples, tokens=None)


def coop(root: Path, split: str, images: Sequence[str]) -> Named | None:
    """CoOp's: ``split_zhou_<name>.json`` with ``[file, label, class name]`` for every test image.

    Args:
        split: the JSON's name.
        images: folders that the files may start from.
    """
    file = root / split
    if not file.is_file():
        return None
    tree = _json(file)
    try:
        entries = [(str(path), int(label), str(name)) for path, label, name in tree["test"]]
        called = {(int(label), str(name)) for part in tree.values() for _, label, name in part}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{file}: expected [file, label, class name] under test: {error!r}") from error
    everyone = dict(called)
    if len(everyone) < len(called):
        label = next(label for label, name in called if everyone[label] != name)
        names = sorted(name for other, name in called if other == label)
        raise DataError(f"{file}: label {label} is called both {names[0]!r} and {names[1]!r}; get the file again")
    if not entries or sorted(everyone) != list(range(len(everyone))):
        raise DataError(f"{file}: no test image, or labels that do not count from 0")
    base = next((root / folder for folder in images if _below(root / folder, entries[0][0]).is_file()), None)
    if base is None:
        raise DataError(f"{root}: {entries[0][0]} of {split} is in none of {', '.join(images) or '.'}")
    samples = [Sample(path, _below(base, path), label=label) for path, label, _ in entries]
    return present(samples), plain_names([everyone[label] for label in range(len(everyone))])


def torchvision(root: Path, folder: str, kind: str, names: str | None = None, **options: Any) -> Named | None:
    """A data set as torchvision's class of that name reads it.

    Args:
        folder: what the class looks for below its root; ``root`` may be on the way down to it.
        kind: the class.
        names: whose class names stand for those of the class, which may have none.
    """
    above = _above(root, folder)
    if above is None:
        return None
    import torchvision.datasets

    try:
        # Its own loader would decode; ours reads by path.
        found = getattr(torchvision.datasets, kind)(str(above), download=False, loader=_path, **options)
        entries = [found[i] for i in range(len(found))]
    except ImportError as error:
        raise DataError(f"{above / folder}: torchvision reads it with scipy: pip install scipy") from error
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise DataError(f"{above / folder}: torchvision's {kind} cannot read it: {error}") from error
    base = above / folder
    # SUN397 comes in the order of the disk.
    samples = sorted(
        (Sample(str(Path(path).relative_to(above)), Path(path), label=int(label)) for path, label in entries),
        key=lambda sample: sample.key,
    )
    if not samples:
        raise DataError(f"{base}: torchvision's {kind} finds no image there")
    return present(samples), _names(
        names, plain_names([n.replace("/", " ") for n in getattr(found, "classes", ())])
    )


def aircraft(root: Path) -> Named | None:
    """FGVC-Aircraft's own tables, wherever they were moved."""
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
                    raise DataError(f"{data / 'variants.txt'}: no variant {name!r}, which image {image} has")
                samples.append(Sample(image, _below(data, f"images/{image}.jpg"), label=label_of[name]))
            return present(samples), names
    return None


def pets(root: Path) -> Named | None:
    """Oxford-IIIT Pet's own list of test images."""
    for data in (root, root / "oxford-iiit-pet"):
        listed = data / "annotations/test.txt"
        if listed.is_file():
            rows = [line.split() for line in read_lines(listed)]
            try:
                labels = {row[0]: int(row[1]) - 1 for row in rows}
            except (IndexError, ValueError) as error:
                raise DataError(f"{listed}: expected image, class and more on each line: {error}") from error
            called = {(label, image.rpartition("_")[0]) for image, label in labels.items()}
            breeds = dict(called)
            if len(breeds) < len(called) or len(labels) < len(rows):
                raise DataError(f"{listed}: a class has images of two breeds, or an image is listed twice")
            if sorted(breeds) != list(range(len(breeds))):
                raise DataError(f"{listed}: its classes do not count from 1")
            samples = [
                Sample(image, _below(data, f"images/{image}.jpg"), label=label) for image, label in labels.items()
            ]
            names = [" ".join(word.title() for word in breeds[label].split("_")) for label in sorted(breeds)]
            return present(samples), tuple(names)
    return None


def class_folders(
    root: Path, inside: Sequence[str] = (), names: str | None = None, without: Sequence[str] = ()
) -> Named | None:
    """One folder a class, below ``test``, ``val``, the root itself or one of ``inside``.

    Args:
        names: whose class names stand for those of the folders; there must be as many.
        without: folders that are no class.
    """
    for folder in (*inside, "test", "val", ""):
        below = root / folder
        if not _holds_classes(below):
            continue
        source = complete(open_folder(str(below)), below)
        kept = [name for name in source.class_names if name not in without]
        label_of = {name: label for label, name in enumerate(kept)}
        place = [label_of.get(name, -1) for name in source.class_names]
        samples = [replace(sample, label=place[sample.label]) for sample in source.samples]
        return Source([sample for sample in samples if sample.label >= 0]), _names(names, plain_names(kept))
    return None


def _above(root: Path, folder: str) -> Path | None:
    """What ``folder`` lies in, where ``root`` is that, or some way down to it."""
    root, parts = root.resolve(), Path(folder).parts
    for depth in range(len(parts) + 1):
        passed = root.parts[len(root.parts) - depth :] == parts[:depth]
        if passed and root.joinpath(*parts[depth:]).is_dir():
            return root.parents[depth - 1] if depth else root
    return None


def _path(path: Any) -> str:
    return str(path)


def _names(name: str | None, own: tuple[str, ...]) -> tuple[str, ...]:
    if name is None:
        return own
    found = class_names_of(name)
    if own and len(found) != len(own):
        raise DataError(f"{len(own)} classes lie there, but {name} has {len(found)} class names")
    return found


def _holds_classes(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    below = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return bool(below) and all(any(_is_image(file) for file in entry.iterdir()) for entry in below)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _tars(root: Path) -> Path | None:
    return next((root / split for split in ("test", "val", "") if any((root / split).glob("*.tar"))), None)


def _all_there(source: Source, tars: Path) -> None:
    """Holds the tars to ``nshards.txt``, and every sample to be whole: what is skipped is not measured."""
    count = tars / "nshards.txt"
    found = len(list(tars.glob("*.tar")))
    if count.is_file() and (wanted := "".join(read_lines(count))) != str(found):
        raise DataError(f"{tars}: {found} tars, but nshards.txt says {wanted}; get the others")
    complete(source, tars)


def complete(source: Source, path: Path) -> Source:
    """The source itself, if no sample of it was left out: what is left out would not be measured.

    Raises:
        DataError: samples were left out; names the first.
    """
    if source.skipped:
        raise DataError(f"{path}: {skipped_in_words(source.skipped)}; get the data set again, or remove these")
    return source


def remarks_on_files(source: Source) -> list[str]:
    """What a user should know of samples and files that a set does not hold, a line each."""
    found = [skipped_in_words(source.skipped)] if source.skipped else []
    if source.ignored:
        found.append(f"{len(source.ignored)} files ignored: {summarize_skipped(source.ignored)}")
    if source.prepared_without:
        reasons = ", ".join(f"{count} {reason}" for reason, count in source.prepared_without.items())
        found.append(f"was prepared without these samples: {reasons} (skipped.jsonl)")
    return found


def skipped_in_words(skipped: Sequence[Skipped]) -> str:
    """How many samples were left out, and for each reason how many and the first."""
    reasons = Counter(reason for _, reason in skipped).most_common()
    parts = []
    for reason, count in reasons[:SHOWN_REASONS]:
        first = next(key for key, other in skipped if other == reason)
        parts.append(f"{reason} ({count}, the first: {first})")
    more = f", and {len(reasons) - SHOWN_REASONS} other reasons" if len(reasons) > SHOWN_REASONS else ""
    samples = "1 sample is" if len(skipped) == 1 else f"{len(skipped)} samples are"
    return f"{samples} left out: {', '.join(parts)}{more}"


def present(samples: list[Sample]) -> Source:
    """The samples as a data set, with the size of each file.

    Raises:
        DataError: a file is missing.
    """
    missing = [sample for sample in samples if not sample.path.is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(samples)} images are missing, e.g. {missing[0].path}")
    return Source([replace(sample, size=sample.path.stat().st_size) for sample in samples])


def _first_of(root: Path, *files: str) -> Path:
    places = [_below(root, file) for file in files]
    return next((place for place in places if place.is_file()), places[0])


def _below(root: Path, file: str) -> Path:
    try:
        return below(root, file)
    except (ValueError, TypeError) as error:
        raise DataError(f"{root}: a list there names a file elsewhere: {error}; get the data set anew") from error


def _json(file: Path) -> Any:
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot read it: {error}") from error
