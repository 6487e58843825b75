"""Where the values of a config come from: a line of a file, the command line, or a default."""

from collections.abc import Iterable, Mapping


class Origins:
    """The origin of each dotted key that a file or an override sets; the others are defaults.

    Any two are equal: configs are compared by their values.
    """

    def __init__(self) -> None:
        """Starts without keys."""
        self._origins: dict[str, str] = {}
        self._is_read = False
        self.is_run = False
        """Whether the config is that of a run."""
        self.remarks: list[str] = []
        """Lines about the files that the user should know."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origins)

    __hash__ = None  # type: ignore[assignment]

    def set_in_file(self, keys: Iterable[str], file: str, lines: Mapping[str, int]) -> None:
        """Records the keys of a file, by its path and the lines that are known."""
        self._is_read = True
        self._origins |= {key: f"{file}:{lines[key]}" if key in lines else file for key in keys}

    def set_by_override(self, keys: Iterable[str], override: str) -> None:
        """Records the keys of an override, quoted and shortened."""
        self._origins |= dict.fromkeys(keys, f"command line ({override})")

    def keep(self, keys: Iterable[str]) -> None:
        """Forgets all other keys: they were removed, and have their defaults."""
        kept = set(keys)
        self._origins = {key: origin for key, origin in self._origins.items() if key in kept}

    def __contains__(self, key: str) -> bool:
        return key in self._origins

    def nearest(self, key: str) -> str | None:
        """The origin of a key or, where it is missing, of the section around it: to begin a message with."""
        while key and key not in self._origins:
            key = key.rpartition(".")[0]
        return self._origins.get(key)

    def of(self, key: str) -> str:
        """The origin of a key: ``set in mine.yaml:12``, ``set on the command line`` or ``the default``.

        ``config in Python`` for every key of a config that is not read from files.
        """
        if not self._is_read:
            return "config in Python"
        origin = self._origins.get(key)
        if origin is None:
            return "the default"
        return "set on the command line" if origin.startswith("command line (") else f"set in {origin}"
