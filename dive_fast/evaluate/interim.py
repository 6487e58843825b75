"""What data sets will answer themselves."""

import hashlib

from dive_fast.data.source import Source


def content(source: Source) -> str:
    if source.content:
        return source.content
    d = hashlib.sha256()
    for i, s in enumerate(source.samples):
        d.update(repr((s.key, s.label, s.texts)).encode() + source.read(i))
    return d.hexdigest()


def modified(source: Source) -> str:
    return hashlib.sha256(
        repr([p.stat().st_mtime_ns for p in {s.path for s in source.samples}]).encode()
    ).hexdigest()


def image_ids(source: Source) -> list[int]:
    known: dict[bytes, int] = {}
    return [known.setdefault(hashlib.sha256(source.read(i)).digest(), i) for i in range(len(source))]
