"""Converts a raw data set to a prepared set: decodes every image, leaves out broken ones, shrinks large ones.

A JPEG that every loader reads and that is small enough keeps its bytes; all other images become JPEGs. Shards are
written in parallel from fixed ranges of samples, under temporary names until they are complete. After a kill, the
same command writes the missing shards and ends with the same bytes as an uninterrupted run. The set is read back
before its manifest is written, which marks it as complete.
"""

import io
import json
import logging
import shutil
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import features
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from dive_fast import locks
from dive_fast.data.content_hashes import image_hash
from dive_fast.data.prepared.convert import Options, convert
from dive_fast.data.prepared.format import (
    BETON,
    INDEX,
    MANIFEST,
    SKIPPED,
    File,
    Index,
    Manifest,
    Row,
    build_index,
    concatenate_indexes,
    content_hash,
    file_hash,
    format_of,
    read_manifest,
    write_manifest,
    write_skipped,
)
from dive_fast.data.prepared.raw import Raw, UnusableError
from dive_fast.data.prepared.read import check_written, samples_of
from dive_fast.data.sources.source import Skipped, Source
from dive_fast.data.workers import FORK, forking
from dive_fast.errors import DataError
from dive_fast.identity import differences, digest
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import forbid_code_execution, read_json

logger = logging.getLogger(__name__)

PARTS = ".parts"
"""Folder of an unfinished set with a note and an index for each shard."""
STATE = "state.json"
"""File in :data:`PARTS` that says what the shards are made from."""


def prepare(raw: Raw, output: Path, options: Options, workers: int) -> Manifest:
    """Makes a prepared set, or completes an interrupted one.

    Args:
        output: folder of the prepared set.
        workers: number of processes.

    Raises:
        DataError: the folder holds other data, no sample is usable, the tokenizer cannot be loaded, the disk is
            full, or the new set cannot be read back.
        LockedError: another process prepares a set in the folder.
    """
    raw.check()
    if options.tokenizer is not None:
        _load_tokenizer(options.tokenizer)
    settings = asdict(options) | {"source": raw.digest()}
    with locks.folder_lock(output, "prepared set"):
        return _prepare(raw, output, options, settings, workers)


def _prepare(raw: Raw, output: Path, options: Options, settings: dict[str, Any], workers: int) -> Manifest:
    if (output / MANIFEST).is_file():
        manifest = read_manifest(output)
        _check_settings(manifest.options, settings, output)
        if manifest.options.get("source_modified") != raw.modified():
            logger.warning(
                "%s: already prepared; its source files were modified or copied since, but the contents that were "
                "compared are equal. Remove the folder to prepare it again",
                output,
            )
        _remove_leftovers(output, manifest)
        return manifest
    parts = output / PARTS
    try:
        identity = _start_or_resume(parts, settings, options, raw, output)
        shards = list(_shards(len(raw), options.shard_samples))
        missing = [shard for shard in shards if not _is_complete(parts / f"{shard.name}.json", identity)]
        _write_shards(
            missing, raw, output, options, identity, workers, sum(len(shard.samples) for shard in shards)
        )
        return _finish(shards, raw, output, options, settings)
    except OSError as error:
        raise DataError(f"{output}: {error}; finished shards are kept: run the same command again") from error


class _Shard(NamedTuple):
    name: str
    samples: range


def _shards(count: int, size: int) -> Iterator[_Shard]:
    for number, first in enumerate(range(0, count, size)):
        yield _Shard(f"{number:06d}", range(first, min(first + size, count)))


def _versions(options: Options) -> dict[str, str | None]:
    """Versions of the packages that decide the bytes of a shard, besides its samples and the options."""
    versions = {
        "pillow": metadata.version("pillow"),
        "jpeg": features.version("libjpeg_turbo") or features.version("jpg"),
    }
    return versions | ({} if options.tokenizer is None else {"open_clip": metadata.version("open_clip_torch")})


def _start_or_resume(parts: Path, settings: dict[str, Any], options: Options, raw: Raw, output: Path) -> str:
    """Starts a set or resumes an interrupted one; returns the identity that its shards are marked with."""
    state = settings | {"source_modified": raw.modified(), "versions": _versions(options)}
    identity = digest(state)
    if (parts / STATE).is_file():
        try:
            stored = read_json(parts / STATE)
        except (OSError, ValueError) as error:
            raise DataError(f"{parts / STATE}: cannot read it: {error}; remove {output} and start over") from error
        _check_settings(stored, settings, output)
        if stored == state:
            return identity
        changed = [name for name in ("source_modified", "versions") if stored.get(name) != state[name]]
        logger.warning(
            "%s: %s changed since the preparation started; all shards are made again", output, ", ".join(changed)
        )
    elif output.is_dir() and any(entry.name not in (PARTS, locks.FILE) for entry in output.iterdir()):
        raise DataError(f"{output}: holds other data; choose an empty or new folder")
    parts.mkdir(parents=True, exist_ok=True)
    write_atomic(parts / STATE, json.dumps(state).encode())
    return identity


def _is_complete(note: Path, identity: str) -> bool:
    """Whether a shard was completed with the same samples, options and package versions."""
    try:
        content = read_json(note)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("identity") == identity


def _check_settings(stored: Any, settings: dict[str, Any], output: Path) -> None:
    """Compares the settings of an existing set with the current ones.

    Raises:
        DataError: they differ.
    """
    if not isinstance(stored, dict):
        raise DataError(f"{output}: holds other data; remove it or choose another folder")
    different = [entry for entry in differences(stored, settings) if entry.key in settings]
    if different:
        details = ", ".join(
            f"{entry.key} {entry.stored!r}, not {entry.current!r}"
            if entry.key != "source"
            else "another source, or the source has changed"
            for entry in different
        )
        raise DataError(
            f"{output}: holds a set prepared with other settings ({details}); remove it or choose another folder"
        )


# In the workers

_worker_state: tuple[Raw, Path, Options, str, Callable[[list[str]], Tensor] | None]


def _initialize_worker(raw: Raw, output: Path, options: Options, identity: str) -> None:
    global _worker_state
    # Ctrl-C reaches all processes of a terminal; a started shard is finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tokenizer = None if options.tokenizer is None else _load_tokenizer(options.tokenizer)
    _worker_state = raw, output, options, identity, tokenizer


def _load_tokenizer(name: str) -> Callable[[list[str]], Tensor]:
    import open_clip  # takes seconds; most sets need no tokens

    from dive_fast.data.text_tokenizer import quick_bpe

    # open_clip gives the tokenizer of CLIP to names that it does not know.
    if not name.startswith(("hf-hub:", "local-dir:")) and name not in open_clip.list_models():
        raise DataError(
            f"--tokenizer {name}: open_clip has no such model; without --tokenizer, texts are tokenised when they "
            "are read, by the tokenizer of any model"
        )
    try:
        with forbid_code_execution():
            tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(name)
    except Exception as error:  # transformers raises exceptions of many classes
        raise DataError(f"--tokenizer {name}: cannot load it: {error}") from error
    return quick_bpe(tokenizer)


def _write_shards(
    shards: Sequence[_Shard],
    raw: Raw,
    output: Path,
    options: Options,
    identity: str,
    workers: int,
    total: int,
) -> None:
    num_done = total - sum(len(shard.samples) for shard in shards)
    progress = tqdm(total=total, initial=num_done, desc="prepare", unit="image")
    try:
        with ProcessPoolExecutor(
            max(1, workers), FORK, _initialize_worker, (raw, output, options, identity)
        ) as pool:
            with forking():
                futures: dict[Future[None], _Shard] = {pool.submit(_write_shard, shard): shard for shard in shards}
            try:
                for future in as_completed(futures):
                    future.result()
                    progress.update(len(futures[future].samples))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise OSError("a worker was killed, possibly for lack of memory") from error
    finally:
        progress.close()


def _write_shard(shard: _Shard) -> None:
    raw, output, options, identity, tokenizer = _worker_state
    name, partial = f"{shard.name}.tar", output / f"{shard.name}.tar.partial"
    rows: list[Row] = []
    skipped: list[Skipped] = []
    converted: Counter[str] = Counter()
    index: list[str] = []
    partial.unlink(missing_ok=True)
    with tarfile.open(partial, "x", format=tarfile.USTAR_FORMAT) as tar:
        for number in shard.samples:
            try:
                sample = raw.read(number)
                image = convert(sample.image, options)
            except UnusableError as reason:
                skipped.append(Skipped(raw.key(number), str(reason)))
                continue
            if image.reason:
                converted[image.reason] += 1
            parts = {"jpg": image.jpeg}
            if sample.label >= 0:
                parts["cls"] = str(sample.label).encode()
            if sample.texts:
                parts["txt"] = sample.texts[0].encode()
            offsets = [_add(tar, f"{number:09d}.{suffix}", data) for suffix, data in parts.items()]
            # The format of DALI's `wds2idx`, for DALI's `fn.readers.webdataset`.
            index.append(
                " ".join(
                    f"{suffix} {offset} {len(data)} {number:09d}.{suffix}"
                    for (suffix, data), offset in zip(parts.items(), offsets, strict=True)
                )
            )
            tokens = tokenizer(list(sample.texts[:1]))[0] if tokenizer is not None and sample.texts else None
            rows.append(
                Row(
                    *(raw.key(number), 0, offsets[0], len(image.jpeg), image.height, image.width),
                    *(sample.label, sample.texts, image_hash(image.jpeg), tokens),
                )
            )
    file = File(name, len(rows), partial.stat().st_size, file_hash(partial))
    write_atomic(output / f"{shard.name}.idx", "\n".join([f"v1.2 {len(index)}", *index]).encode())
    partial.rename(output / name)
    if rows:
        write_atomic(output / PARTS / f"{shard.name}.safetensors", save(build_index(rows)))
    # Written last: it marks the shard as complete.
    note = {
        "identity": identity,
        "file": asdict(file),
        "skipped": [entry._asdict() for entry in skipped],
        "converted": converted,
    }
    write_atomic(output / PARTS / f"{shard.name}.json", json.dumps(note).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Adds a file and returns the offset of its contents; without time and owner, equal sets have equal bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return offset


# Completion


def _finish(
    shards: Sequence[_Shard], raw: Raw, output: Path, options: Options, settings: dict[str, Any]
) -> Manifest:
    parts = output / PARTS
    notes = [_read_note(parts / f"{shard.name}.json", shard) for shard in shards]
    used = [(shard, note) for shard, note in zip(shards, notes, strict=True) if note["file"]["samples"]]
    skipped = list(raw.skipped) + [Skipped(**entry) for note in notes for entry in note["skipped"]]
    if not used:
        reasons = Counter(reason for _, reason in skipped).most_common()
        raise DataError(
            f"{output}: no sample is usable: {', '.join(f'{count} {reason}' for reason, count in reasons)}"
        )
    index = concatenate_indexes([_read_part(parts / f"{shard.name}.safetensors") for shard, _ in used])
    files = [File(**note["file"]) for _, note in used]
    if options.container == "beton":
        files, index = _to_beton(files, index, output)
    write_atomic(output / INDEX, save(index))
    write_skipped(output / SKIPPED, skipped)
    manifest = Manifest(
        format=format_of(index),
        samples=len(index["offset"]),
        content=content_hash(index),
        files=files,
        class_names=list(raw.class_names),
        skipped=dict(Counter(reason for _, reason in skipped)),
        converted=dict(sum((Counter(note["converted"]) for note in notes), Counter[str]())),
        options=settings | {"source_modified": raw.modified()},
    )
    try:
        check_written(output, manifest)
    except DataError as error:
        raise DataError(f"{error} (the new set cannot be read back: the disk may be failing)") from error
    write_manifest(output, manifest)
    _remove_leftovers(output, manifest)
    return manifest


def _read_note(path: Path, shard: _Shard) -> dict[str, Any]:
    """Reads and validates the note that :func:`_write_shard` left about a shard."""
    try:
        content = read_json(path)
        file, entries = File(**content["file"]), [Skipped(**entry) for entry in content["skipped"]]
        counts = [file.samples, file.bytes, *content["converted"].values()]
        strings = [file.name, file.sha256, *(string for entry in entries for string in entry)]
        if not all(type(count) is int for count in counts) or not all(type(string) is str for string in strings):
            raise TypeError("a value has the wrong type")
        if file.name != f"{shard.name}.tar":
            raise ValueError(f"it describes {file.name}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: invalid note of a shard: {error}; remove it and run the same command") from error
    note: dict[str, Any] = content
    return note


def _read_part(path: Path) -> Index:
    """Reads the index of a shard."""
    try:
        return load_file(path)
    except Exception as error:  # safetensors has an exception class of its own
        note = path.with_suffix(".json")
        raise DataError(f"{path}: cannot read it: {error}; remove {note} and run the same command") from error


def _remove_leftovers(output: Path, manifest: Manifest) -> None:
    """Removes what a complete set does not need: notes, and tars that are empty or were merged into a beton."""
    kept = {Path(file.name).stem for file in manifest.files}
    for path in [*output.glob("*.tar"), *output.glob("*.idx")]:
        if path.stem not in kept:
            path.unlink()
    shutil.rmtree(output / PARTS, ignore_errors=True)


def _to_beton(files: Sequence[File], index: Index, output: Path) -> tuple[list[File], Index]:
    from dive_fast.data.prepared.beton import write_beton

    path = output / BETON
    partial = path.with_name(f"{BETON}.partial")
    samples = samples_of(index, output, files)
    sizes = np.stack([index["height"].numpy(), index["width"].numpy()], axis=1)
    source = Source(samples, sizes=sizes, tokens=index.get("tokens"))
    index = index | write_beton(partial, source)
    # Not while it is written: the table of locations precedes the images, and is known last.
    file = File(BETON, len(source), partial.stat().st_size, file_hash(partial))
    partial.rename(path)
    return [file], index
