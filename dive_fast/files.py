"""Files that are whole or not there."""

from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file under another name, and gives it its own when it is whole."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)
