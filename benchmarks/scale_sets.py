"""Synthetic data sets of any size, which need little disk space and are made in seconds.

Images are JPEGs of 32 x 32 pixels, 0.7 kB each. Folders hold hard links to :data:`NUM_IMAGES` of them. Sets of
tars hold links to one tar of :data:`SHARD` samples, with the files that img2dataset writes for each: ``.jpg``,
``.json`` and ``.txt``. The CPU has the same work as with a real set of equal length, but the page cache is small.
"""

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

NUM_IMAGES = 1000
"""Number of distinct images; ext4 allows 65,000 links to each."""
SHARD = 10_000
"""Samples in a tar or arrow file."""
NUM_CLASSES = 1000
NUM_TITLES = 80
"""Rows for each image in a CSV file as FLYP writes it: one for each template."""
_TEXT = (
    "a the on of with two small large red blue green old wooden street river table dog cat bird house boat sky "
    "people standing near beside under photo view winter summer evening market field white black"
)


MODIFIED = 1_700_000_000
"""Time of all files: sets that were modified a moment ago may be read with more care."""


class Kind(NamedTuple):
    """A way to store a data set."""

    half: str
    """``target``: labelled images or prompts; ``reference``: captions."""
    make: "Callable[[SyntheticSets], dict[str, Any]]"
    """Makes the set and returns its section of a config."""


class SyntheticSets:
    """All sets of one size in a folder; each is made when it is first asked for."""

    def __init__(self, root: Path, count: int, shard: int = SHARD) -> None:
        """Makes nothing yet.

        Args:
            count: number of samples; of rows for ``csv of prompts``.
            shard: samples in a tar or arrow file.
        """
        self.root, self.count = root, count
        self.shard = min(shard, count)
        self.num_classes = min(NUM_CLASSES, max(2, count // 20))
        if count % self.shard:
            raise ValueError(f"{count} samples are not a multiple of {self.shard}, the samples of a tar")
        root.mkdir(parents=True, exist_ok=True)

    def section(self, name: str) -> dict[str, Any]:
        """The section of a config that opens a set, with its half under the key ``half``."""
        kind = KINDS[name]
        section = {"half": kind.half} | kind.make(self)
        _age(Path(section["path"]))
        return section

    @cached_property
    def images(self) -> list[Path]:
        """Files of the distinct images."""
        folder = self.root / "images"
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        files = []
        for number in range(min(NUM_IMAGES, self.count)):
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=75)
            files.append(folder / f"{number}.jpg")
        _age(folder)
        return files

    @cached_property
    def captions(self) -> list[str]:
        """One caption of 6 to 14 words for each distinct image."""
        rng = np.random.default_rng(1)
        return [
            " ".join(rng.choice(_TEXT.split(), rng.integers(6, 15))) + f" {i}" for i in range(len(self.images))
        ]

    @cached_property
    def folder(self) -> Path:
        """A folder for each class with links to images."""
        root = self.root / "folder"
        for sample in range(self.count):
            label, number = sample % self.num_classes, sample // self.num_classes
            if number == 0:
                (root / f"n{label:08d}").mkdir(parents=True)
            os.link(self.images[sample % len(self.images)], root / self.file_name(label, number))
        return root

    @staticmethod
    def file_name(label: int, number: int) -> str:
        """Path of an image below the folder of classes, as long as one of ImageNet."""
        return f"n{label:08d}/n{label:08d}_{number}.JPEG"

    @cached_property
    def folder_of_pairs(self) -> Path:
        """Folders of 1,000 images with a text each."""
        root, texts = self.root / "pairs", self.root / "texts"
        texts.mkdir()
        for number, caption in enumerate(self.captions):
            (texts / f"{number}.txt").write_text(caption)
        _age(texts)
        for sample in range(self.count):
            folder = root / f"{sample // 1000:05d}"
            if sample % 1000 == 0:
                folder.mkdir(parents=True)
            number = sample % len(self.images)
            os.link(self.images[number], folder / f"{sample:09d}.jpg")
            os.link(texts / f"{number}.txt", folder / f"{sample:09d}.txt")
        return root

    def tars(self, suffix: str) -> Path:
        """Links to one tar; its samples have an image, a ``.json`` and a file of the suffix, txt or cls."""
        root = self.root / f"tars-{suffix}"
        if root.is_dir():
            return root
        root.mkdir()
        first = self.root / f"{suffix}.tar"
        with tarfile.open(first, "w") as tar:
            for sample in range(self.shard):
                _add_sample(tar, f"{sample:09d}", list(self._members(sample, suffix)))
        for number in range(self.count // self.shard):
            os.link(first, root / f"{number:05d}.tar")
        return root

    def _members(self, sample: int, suffix: str) -> Iterator[tuple[str, bytes]]:
        number = sample % len(self.images)
        caption = self.captions[number]
        text = caption if suffix == "txt" else str(sample % self.num_classes)
        about = {
            "caption": caption,
            "url": f"https://images.example.com/photos/{sample:09d}.jpg",
            "key": f"{sample:09d}",
            "status": "success",
            "error_message": None,
            "width": 32,
            "height": 32,
            "original_width": 640,
            "original_height": 640,
            "exif": "{}",
            "sha256": f"{sample:064x}",
        }
        yield "jpg", self.images[number].read_bytes()
        yield "json", json.dumps(about, indent=4).encode()
        yield suffix, text.encode()

    @cached_property
    def class_names(self) -> Path:
        """A file with a name for each class."""
        file = self.root / "classes.txt"
        file.write_text("".join(f"class {label}\n" for label in range(self.num_classes)))
        return file

    @cached_property
    def csv_of_pairs(self) -> Path:
        """A row for each image of the folder, with a caption of its own."""
        file = self.root / "pairs.csv"
        with file.open("w", newline="") as lines:
            rows = csv.writer(lines, delimiter="\t")
            rows.writerow(["title", "filepath"])
            for sample in range(self.count):
                caption = f"{self.captions[sample % len(self.images)]} {sample}"
                rows.writerow([caption, self._path_in_csv(sample)])
        return file

    @cached_property
    def csv_of_prompts(self) -> Path:
        """Rows as FLYP writes them: 80 prompts for each image."""
        file = self.root / "prompts.csv"
        images = max(1, self.count // NUM_TITLES)
        titles = [f"a photo in style {template} of class number " for template in range(NUM_TITLES)]
        with file.open("w", newline="") as lines:
            rows = csv.writer(lines, delimiter="\t")
            rows.writerow(["title", "filepath"])
            for sample in range(images):
                label, path = sample % self.num_classes, self._path_in_csv(sample)
                rows.writerows([f"{title}{label}", path] for title in titles[: min(NUM_TITLES, self.count)])
        return file

    def _path_in_csv(self, sample: int) -> str:
        label, number = sample % self.num_classes, sample // self.num_classes
        return str((self.folder / self.file_name(label, number)).relative_to(self.root))

    @cached_property
    def arrow(self) -> Path:
        """A set of Hugging Face's `datasets` with images and labels, whose arrow files are links to one file."""
        import datasets

        root = self.root / "arrow"
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=[f"class {label}" for label in range(self.num_classes)]),
            }
        )
        contents = [file.read_bytes() for file in self.images]
        columns = {
            "image": [{"bytes": contents[sample % len(contents)], "path": None} for sample in range(self.shard)],
            "label": [sample % self.num_classes for sample in range(self.shard)],
        }
        datasets.Dataset.from_dict(columns, features).save_to_disk(str(root), num_shards=1)
        state = json.loads((root / "state.json").read_text())
        (first,) = (root / entry["filename"] for entry in state["_data_files"])
        names = [f"data-{number:05d}.arrow" for number in range(self.count // self.shard)]
        for name in names:
            os.link(first, root / name)
        first.unlink()
        state["_data_files"] = [{"filename": name} for name in names]
        (root / "state.json").write_text(json.dumps(state))
        return root

    def prepared(self, suffix: str) -> Path:
        """A prepared set of the tars: one of them is prepared, and its index repeated for the others."""
        from safetensors.torch import save

        from dive_fast.data.open_dataset import open_reference, open_target
        from dive_fast.data.prepared import convert, format
        from dive_fast.data.prepared.raw import RawSource
        from dive_fast.data.prepared.write import prepare

        root = self.root / f"prepared-{suffix}"
        if root.is_dir():
            return root
        first = str(self.tars(suffix) / "00000.tar")
        if suffix == "cls":
            source = open_target(_config({"half": "target", "format": "webdataset", "path": first}))
        else:
            source = open_reference(_config({"half": "reference", "format": "webdataset", "path": first}))
        manifest = prepare(RawSource(source), root, convert.Options(shard_samples=self.shard), 1)
        (file,) = manifest.files
        index = format.read_index(root, manifest)
        copies = self.count // self.shard
        files = [replace(file, name=f"copy-{number:06d}.tar") for number in range(copies)]
        for each in files:
            os.link(root / file.name, root / each.name)
        index = format.concatenate_indexes([index] * copies)
        (root / format.INDEX).write_bytes(save(index))
        names = [f"class {label}" for label in range(self.num_classes)] if suffix == "cls" else []
        complete = replace(
            manifest,
            samples=len(index["label"]),
            content=format.content_hash(index),
            files=files,
            class_names=names,
        )
        format.write_manifest(root, complete)
        return root


def _config(section: dict[str, Any]) -> Any:
    from dive_fast.config.schema import ReferenceConfig, TargetConfig

    config = TargetConfig if section["half"] == "target" else ReferenceConfig
    return config.model_validate({name: value for name, value in section.items() if name != "half"})


def open_set(section: dict[str, Any], *ranks: Any) -> Any:
    """Opens a set of :data:`KINDS` by the public functions.

    Args:
        ranks: the ranks of a run that open the set together, if any.
    """
    from dive_fast.data.open_dataset import open_reference, open_target

    function = open_target if section["half"] == "target" else open_reference
    return function(_config(section), "", *ranks)


def _age(path: Path) -> None:
    """Dates a file back, or a folder and its entries."""
    for entry in [path, *path.iterdir()] if path.is_dir() else [path]:
        os.utime(entry, (MODIFIED, MODIFIED))


def _add_sample(tar: tarfile.TarFile, key: str, members: list[tuple[str, bytes]]) -> None:
    for suffix, content in members:
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size, member.mode, member.mtime = len(content), 0o444, MODIFIED
        tar.addfile(member, io.BytesIO(content))


def _labelled_tars(sets: SyntheticSets) -> dict[str, Any]:
    return {"format": "webdataset", "path": str(sets.tars("cls")), "class_names": str(sets.class_names)}


FOLDER, PAIRS_FOLDER = "folder", "folder of pairs"
TARS_LABELS, TARS_CAPTIONS = "tars, labels", "tars, captions"
CSV_PAIRS, CSV_PROMPTS = "csv of pairs", "csv, 80 rows an image"
ARROW = "huggingface"
PREPARED, PREPARED_PAIRS = "prepared", "prepared pairs"

KINDS: dict[str, Kind] = {
    FOLDER: Kind("target", lambda sets: {"format": "folder", "path": str(sets.folder)}),
    PAIRS_FOLDER: Kind("reference", lambda sets: {"format": "folder", "path": str(sets.folder_of_pairs)}),
    TARS_LABELS: Kind("target", _labelled_tars),
    TARS_CAPTIONS: Kind("reference", lambda sets: {"format": "webdataset", "path": str(sets.tars("txt"))}),
    CSV_PAIRS: Kind("reference", lambda sets: {"format": "csv", "path": str(sets.csv_of_pairs)}),
    CSV_PROMPTS: Kind("target", lambda sets: {"format": "csv", "path": str(sets.csv_of_prompts)}),
    ARROW: Kind("target", lambda sets: {"format": "huggingface", "path": str(sets.arrow)}),
    PREPARED: Kind("target", lambda sets: {"format": "prepared", "path": str(sets.prepared("cls"))}),
    PREPARED_PAIRS: Kind("reference", lambda sets: {"format": "prepared", "path": str(sets.prepared("txt"))}),
}
"""All ways to store a set, by their names in the report."""
