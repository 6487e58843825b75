"""Raw data set -> prepared set: every image decoded once, what is broken left out, what is large made smaller.

A JPEG that every loader reads, and that is small enough, keeps its bytes. All others become JPEGs. Shards are
made in parallel from fixed ranges of samples, each under a temporary name until it is whole; after a kill the same
command goes on with the shards that are missing, and ends with the same bytes as if nothing had happened. The
set is opened by its reader before the manifest is written, which makes it whole.
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
from dive_fast.data import content_hashes as content
from dive_fast.data.prepared import format as prepared
from dive_fast.data.prepared import read
from dive_fast.data.prepared.convert import Options, convert
from dive_fast.data.prepared.format import File, Index, Manifest, Row
from dive_fast.data.prepared.raw import Raw, UnusableError
from dive_fast.data.sources.source import Skipped, Source
from dive_fast.data.workers import FORK, forking
from dive_fast.errors import DataError
from dive_fast.identity import differences
from dive_fast.identity import digest as digest_of
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import forbid_code_execution, read_json

logger = logging.getLogger(__name__)

PARTS = ".parts"
STATE = "state.json"


def prepare(raw: Raw, output: Path, options: Options, workers: int) -> Manifest:
    """Makes a prepared set, or what of it is still missing.

    Args:
        output: the set's folder.
        workers: processes.

    Raises:
        DataError: the folder holds something else, no sample is usable, the tokenizer cannot be loaded, the disk
            is full, or what was written does not read back.
        LockedError: another process prepares a set there.
    """
    raw.check()
    if options.tokenizer is not None:
        _tokenizer(options.tokenizer)
    wanted = asdict(options) | {"source": raw.digest()}
    with locks.folder_lock(output, "prepared set"):
        return _prepare(raw, output, options, wanted, workers)


def _prepare(raw: Raw, output: Path, options: Options, wanted: dict[str, Any], workers: int) -> Manifest:
    if (output / prepared.MANIFEST).is_file():
        manifest = prepared.read_manifest(output)
        _same(manifest.options, wanted, output)
        if manifest.options.get("source_modified") != raw.modified():
            logger.warning(
                "%s: is prepared already; the files of its source were modified or copied since, though what was "
                "looked at is the same. Remove the folder to prepare it again",
                output,
            )
        _tidy(output, manifest)
        return manifest
    parts = output / PARTS
    try:
        identity = _claim(parts, wanted, options, raw, output)
        shards = list(_shards(len(raw), options.shard_samples))
        missing = [shard for shard in shards if not _is_made(parts / f"{shard.name}.json", identity)]
        _make(missing, raw, output, options, identity, workers, sum(len(shard.samples) for shard in shards))
        return _finish(shards, raw, output, options, wanted)
    except OSError as error:
        raise DataError(f"{output}: {error}; what is done stays: run the same command again") from error


class _Shard(NamedTuple):
    name: str
    samples: range


def _shards(count: int, size: int) -> Iterator[_Shard]:
    for number, first in enumerate(range(0, count, size)):
        yield _Shard(f"{number:06d}", range(first, min(first + size, count)))


def _versions(options: Options) -> dict[str, str | None]:
    """Of what decides the bytes of a shard beside its samples and the options."""
    found = {
        "pillow": metadata.version("pillow"),
        "jpeg": features.version("libjpeg_turbo") or features.version("jpg"),
    }
    return found | ({} if options.tokenizer is None else {"open_clip": metadata.version("open_clip_torch")})


def _claim(parts: Path, wanted: dict[str, Any], options: Options, raw: Raw, output: Path) -> str:
    """Starts a set in its folder, or goes on with the same one; returns what its shards are known by."""
    state = wanted | {"source_modified": raw.modified(), "versions": _versions(options)}
    identity = digest_of(state)
    if (parts / STATE).is_file():
        try:
            found = read_json(parts / STATE)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{parts / STATE}: cannot read it: {error}; remove {output}, and begin anew"
            ) from error
        _same(found, wanted, output)
        if found == state:
            return identity
        changed = [name for name in ("source_modified", "versions") if found.get(name) != state[name]]
        logger.warning(
            "%s: %s changed since it was begun; all its shards are made again", output, ", ".join(changed)
        )
    elif output.is_dir() and any(entry.name not in (PARTS, locks.FILE) for entry in output.iterdir()):
        raise DataError(f"{output}: holds something else; name an empty folder or a new one")
    parts.mkdir(parents=True, exist_ok=True)
    write_atomic(parts / STATE, json.dumps(state).encode())
    return identity


def _is_made(note: Path, identity: str) -> bool:
    """Whether a shard was made from these samples, by these options and packages."""
    try:
        found = read_json(note)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("identity") == identity


def _same(found: Any, wanted: dict[str, Any], output: Path) -> None:
    if not isinstance(found, dict):
        raise DataError(f"{output}: holds something else; remove it or name another folder")
    different = [entry for entry in differences(found, wanted) if entry.key in wanted]
    if different:
        names = ", ".join(
            f"{entry.key} {entry.stored!r}, not {entry.current!r}"
            if entry.key != "source"
            else "its source is another one, or was changed"
            for entry in different
        )
        raise DataError(f"{output}: holds a set prepared otherwise ({names}); remove it or name another folder")


# In the workers

_work: tuple[Raw, Path, Options, str, Callable[[list[str]], Tensor] | None]


def _start(raw: Raw, output: Path, options: Options, identity: str) -> None:
    global _work
    # Ctrl-C reaches all processes of a terminal; a shard that is begun is finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tokenizer = None if options.tokenizer is None else _tokenizer(options.tokenizer)
    _work = raw, output, options, identity, tokenizer


def _tokenizer(name: str) -> Callable[[list[str]], Tensor]:
    import open_clip  # takes seconds, and most sets need no tokens

    from dive_fast.data.prompts import quick_bpe

    try:
        with forbid_code_execution():
            tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(name)
    except Exception as error:  # transformers has errors of many kinds
        raise DataError(f"--tokenizer {name}: cannot load it: {error}") from error
    return quick_bpe(tokenizer)


def _make(
    shards: Sequence[_Shard],
    raw: Raw,
    output: Path,
    options: Options,
    identity: str,
    workers: int,
    total: int,
) -> None:
    done = total - sum(len(shard.samples) for shard in shards)
    progress = tqdm(total=total, initial=done, desc="prepare", unit="image")
    try:
        with ProcessPoolExecutor(max(1, workers), FORK, _start, (raw, output, options, identity)) as pool:
            with forking():
                futures: dict[Future[None], _Shard] = {pool.submit(_make_shard, shard): shard for shard in shards}
            try:
                for future in as_completed(futures):
                    future.result()
                    progress.update(len(futures[future].samples))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise OSError("a worker was killed, perhaps for its memory") from error
    finally:
        progress.close()


def _make_shard(shard: _Shard) -> None:
    raw, output, options, identity, tokenizer = _work
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
            # As DALI's `wds2idx` would write it, for DALI's own `fn.readers.webdataset`.
            index.append(
                " ".join(
                    f"{suffix} {offset} {len(data)} {number:09d}.{suffix}"
                    for (suffix, data), offset in zip(parts.items(), offsets, strict=True)
                )
            )
            digest = content.image_hash(image.jpeg)
            tokens = tokenizer(list(sample.texts[:1]))[0] if tokenizer is not None and sample.texts else None
            rows.append(
                Row(
                    *(raw.key(number), 0, offsets[0], len(image.jpeg), image.height, image.width),
                    *(sample.label, sample.texts, digest, tokens),
                )
            )
    file = File(name, len(rows), partial.stat().st_size, prepared.file_hash(partial))
    write_atomic(output / f"{shard.name}.idx", "\n".join([f"v1.2 {len(index)}", *index]).encode())
    partial.rename(output / name)
    if rows:
        write_atomic(output / PARTS / f"{shard.name}.safetensors", save(prepared.index_of(rows)))
    # Written last: with it the shard is done.
    note = {
        "identity": identity,
        "file": asdict(file),
        "skipped": [entry._asdict() for entry in skipped],
        "converted": converted,
    }
    write_atomic(output / PARTS / f"{shard.name}.json", json.dumps(note).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Adds a file; returns where its content begins. No time or owner: the same set has the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return offset


# At the end


def _finish(
    shards: Sequence[_Shard], raw: Raw, output: Path, options: Options, wanted: dict[str, Any]
) -> Manifest:
    parts = output / PARTS
    notes = [_note(parts / f"{shard.name}.json", shard) for shard in shards]
    used = [(shard, note) for shard, note in zip(shards, notes, strict=True) if note["file"]["samples"]]
    skipped = list(raw.skipped) + [Skipped(**entry) for note in notes for entry in note["skipped"]]
    if not used:
        reasons = Counter(reason for _, reason in skipped).most_common()
        raise DataError(f"{output}: no sample is usable: {', '.join(f'{count} {why}' for why, count in reasons)}")
    index = prepared.joined([_part(parts / f"{shard.name}.safetensors") for shard, _ in used])
    files = [File(**note["file"]) for _, note in used]
    if options.container == "beton":
        files, index = _to_beton(files, index, output)
    write_atomic(output / prepared.INDEX, save(index))
    prepared.write_skipped(output / prepared.SKIPPED, skipped)
    manifest = Manifest(
        format=prepared.FORMAT,
        samples=len(index["offset"]),
        content=prepared.content_of(index),
        files=files,
        class_names=list(raw.class_names),
        skipped=dict(Counter(reason for _, reason in skipped)),
        converted=dict(sum((Counter(note["converted"]) for note in notes), Counter[str]())),
        options=wanted | {"source_modified": raw.modified()},
    )
    try:
        read.check_written(output, manifest)
    except DataError as error:
        raise DataError(f"{error} (what was just written does not read back: the disk may be failing)") from error
    prepared.write_manifest(output, manifest)
    _tidy(output, manifest)
    return manifest


def _note(path: Path, shard: _Shard) -> dict[str, Any]:
    """What :func:`_make_shard` has left about a shard; another process may have been the last to write it."""
    try:
        found = read_json(path)
        file, entries = File(**found["file"]), [Skipped(**entry) for entry in found["skipped"]]
        counts = [file.samples, file.bytes, *found["converted"].values()]
        words = [file.name, file.sha256, *(word for entry in entries for word in entry)]
        if not all(type(count) is int for count in counts) or not all(type(word) is str for word in words):
            raise TypeError("a number or a text is something else")
        if file.name != f"{shard.name}.tar":
            raise ValueError(f"it is of {file.name}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not the note of a shard: {error}; remove it and run the same command") from error
    note: dict[str, Any] = found
    return note


def _part(path: Path) -> Index:
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises an error of its own, of no common class
        note = path.with_suffix(".json")
        raise DataError(f"{path}: cannot read it: {error}; remove {note} and run the same command") from error


def _tidy(output: Path, manifest: Manifest) -> None:
    """Removes what a whole set has no more use for: notes, and tars that are empty or have gone into a beton."""
    kept = {Path(file.name).stem for file in manifest.files}
    for path in [*output.glob("*.tar"), *output.glob("*.idx")]:
        if path.stem not in kept:
            path.unlink()
    shutil.rmtree(output / PARTS, ignore_errors=True)


def _to_beton(files: Sequence[File], index: Index, output: Path) -> tuple[list[File], Index]:
    from dive_fast.data.prepared.beton import write_beton

    path = output / prepared.BETON
    partial = path.with_name(f"{prepared.BETON}.partial")
    samples = read.PreparedSamples(index, [output / file.name for file in files])
    sizes = np.stack([index["height"].numpy(), index["width"].numpy()], axis=1)
    source = Source(samples, sizes=sizes, tokens=index.get("tokens"))
    index = index | write_beton(partial, source)
    file = File(prepared.BETON, len(source), partial.stat().st_size, prepared.file_hash(partial))
    partial.rename(path)
    return [file], index
