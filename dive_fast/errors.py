"""What is told to a user."""

LONGEST = 4000
"""Characters of a message; the beginning names the file and the end says what to do, so the middle goes."""


class UserError(ValueError):
    """A mistake that is the user's to mend; the message is one line and says how.

    Whatever a file or a library puts into it: what moves a terminal's cursor or starts a line is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class SharedError(Exception):
    """Ends all ranks of a run after the same step: none has to be told that another has failed."""


def one_line(text: str) -> str:
    """Text that a terminal shows as it stands, in one line of bounded length."""
    line = "".join(map(_shown, " ".join(text.split())))
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 3 // 4]} ... {line[-LONGEST // 4 :]}"


def _shown(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
