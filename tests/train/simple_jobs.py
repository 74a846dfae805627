"""Work for child processes in tests, in a file that takes no time to import there."""

from pathlib import Path

from train.errors import UserError


def write_text(path: str, text: str) -> None:
    Path(path).write_text(text)


def fail() -> None:
    raise UserError("--this is not possible")
