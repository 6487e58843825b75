"""Prepares a data set: ``python launch/prepare.py --format folder --input imagenet/train --output ready``."""

import argparse
import inspect
import os
import sys
from pathlib import Path
from typing import Any

from dive_fast.data.prepared import convert


def main(arguments: list[str] | None = None) -> int:
    """Parses, calls, and turns a user's mistake into one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--format",
        choices=["folder", "csv", "webdataset", "torchvision", "wilds"],
        help="of the raw set: one folder a class; FLYP's tab-separated title and filepath; tars (img2dataset's "
        "too); a data set of torchvision or WILDS",
    )
    parser.add_argument("--input", help="folder, CSV file, tars, or root folder of the torchvision or WILDS set")
    parser.add_argument("--name", help="torchvision: the class, e.g. Flowers102; wilds: the data set, e.g. fmow")
    parser.add_argument("--split", help="torchvision and wilds: which part, if not train")
    parser.add_argument("--text", choices=["cls", "txt"], default="cls", help="webdataset: labels or captions")
    parser.add_argument(
        "--pairs", action="store_true", help="csv: every row is a pair of its own (a reference set)"
    )
    parser.add_argument("--image-root", help="csv: where relative file paths start, if not at the CSV file")
    parser.add_argument("--output", help="the prepared set's folder; killed, the same command goes on")
    parser.add_argument("--container", choices=["tar", "beton"], default="tar", help="beton: for loader ffcv")
    parser.add_argument("--max-side", type=int, default=512, help="longest shorter side in pixels; 0 resizes none")
    parser.add_argument("--min-side", type=int, default=8, help="images with a shorter side are left out")
    parser.add_argument("--quality", type=int, default=95, help="of JPEGs that are encoded anew")
    parser.add_argument("--shard-samples", type=int, default=2000, help="samples a shard is made from")
    parser.add_argument("--tokenizer", help="open_clip model whose tokens of the captions are stored")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--verify", metavar="FOLDER", help="only hold a prepared set to its hashes")
    options = parser.parse_args(arguments)
    if options.verify is None and not (options.format and options.input and options.output):
        parser.error("--format, --input and --output are needed, or --verify")
    if (
        options.quality not in range(1, 101)
        or options.max_side < 0
        or min(options.min_side, options.shard_samples) < 1
    ):
        parser.error("--quality is 1 to 100, --max-side at least 0, --min-side and --shard-samples at least 1")
    for option, value, formats in (
        ("--pairs", options.pairs, ("csv",)),
        ("--image-root", options.image_root, ("csv",)),
        ("--name", options.name, ("torchvision", "wilds")),
        ("--split", options.split, ("torchvision", "wilds")),
    ):
        if value and options.verify is None and options.format not in formats:
            parser.error(f"{option} is for --format {' and '.join(formats)}; remove it")
    for option in ("input", "output", "image_root", "verify"):
        if getattr(options, option) is not None:
            setattr(options, option, os.path.expanduser(getattr(options, option)))

    if options.verify is None and options.format == "folder":
        inside, output = os.path.realpath(options.input), os.path.realpath(options.output)
        if os.path.commonpath([inside, output]) == inside:
            parser.error("--output lies in --input, where it would be a class; name another folder")

    from dive_fast.data.prepared import write as prepare
    from dive_fast.data.prepared.format import MANIFEST, SKIPPED
    from dive_fast.data.prepared.read import verify
    from dive_fast.errors import UserError

    try:
        if options.verify is not None:
            manifest, state = verify(options.verify), ", as their hashes say"
        else:
            wanted = convert.Options(
                options.container,
                options.max_side or None,
                options.min_side,
                options.quality,
                options.shard_samples,
                options.tokenizer,
            )
            raw, output = _raw(options), Path(options.output)
            raw.report()
            state = ", prepared before" if (output / MANIFEST).is_file() else ""
            manifest = prepare.prepare(raw, output, wanted, options.workers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the shards that are missing", file=sys.stderr)
        return 130
    folder = options.verify or options.output
    print(f"{folder}: {manifest.samples} samples in {len(manifest.files)} files{state}")
    for reason, count in sorted(manifest.converted.items()):
        print(f"  encoded anew: {count} ({reason})")
    for reason, count in sorted(manifest.skipped.items()):
        print(f"  left out: {count} ({reason})")
    if manifest.skipped:
        print(f"  each one is named in {Path(folder) / SKIPPED}")
    return 0


def _raw(options: argparse.Namespace) -> Any:
    """The raw set that the options name."""
    from dive_fast.data.prepared.raw import RawDataset, RawSource
    from dive_fast.data.sources.csv_table import open_csv
    from dive_fast.data.sources.folder import open_folder
    from dive_fast.data.sources.webdataset import open_webdataset
    from dive_fast.errors import DataError

    if options.format == "folder":
        return RawSource(open_folder(options.input))
    if options.format == "csv":
        return RawSource(open_csv(options.input, options.image_root, group=not options.pairs))
    if options.format == "webdataset":
        try:
            return RawSource(open_webdataset(options.input, f".{options.text}", strict=False))
        except DataError as error:
            hint = "; captions are read by --text txt" if "no .cls" in str(error) else ""
            raise DataError(f"{error}{hint}") from error
    if options.name is None:
        raise DataError(f"--format {options.format} needs --name")
    try:
        # Whatever is raised: the classes are somebody else's.
        dataset = _torchvision(options) if options.format == "torchvision" else _wilds(options)
    except DataError as error:
        raise DataError(f"--format {options.format} --name {options.name}: {error}") from error
    except ModuleNotFoundError as error:
        raise DataError(f"--format {options.format}: {error}; pip install {error.name}") from error
    except Exception as error:
        raise DataError(
            f"--format {options.format} --name {options.name}: {type(error).__name__}: {error}"
        ) from error
    return RawDataset(dataset, f"{options.name}/{options.split or 'train'}")


def _wilds(options: argparse.Namespace) -> Any:
    from wilds import get_dataset

    from dive_fast.io.safe_read import forbid_code_execution

    with forbid_code_execution():
        dataset = get_dataset(options.name, root_dir=options.input, download=False)
    return dataset.get_subset(options.split or "train")


def _torchvision(options: argparse.Namespace) -> Any:
    from PIL import EpsImagePlugin
    from torchvision import datasets

    from dive_fast.errors import DataError
    from dive_fast.io.safe_read import forbid_code_execution

    if not inspect.isclass(getattr(datasets, options.name, None)):
        raise DataError("torchvision has no such data set")
    kind: Any = getattr(datasets, options.name)
    if options.name.startswith("LSUN"):
        raise DataError("torchvision reads it by a pickle that lies beside the data; prepare it as a folder")
    # Its own loader would give PostScript that is called .jpg to Ghostscript, a program.
    EpsImagePlugin.gs_binary = False
    known = inspect.signature(kind).parameters
    if next(iter(known), None) != "root":
        raise DataError("it is not read from a folder")
    # Some download by default.
    chosen: dict[str, Any] = {"download": False} if "download" in known else {}
    part = next((name for name in ("split", "image_set", "train") if name in known), None)
    if part is None and options.split is not None:
        raise DataError("it has no parts; remove --split")
    if part == "train" and options.split not in (None, "train", "test"):
        raise DataError(f"--split {options.split}: it has train and test")
    if part is not None:
        chosen[part] = (options.split or "train") == "train" if part == "train" else options.split or "train"
    with forbid_code_execution():
        return kind(options.input, **chosen)


if __name__ == "__main__":
    sys.exit(main())
