"""Files that appear whole or not at all."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: The names that :func:`replacing` gives; the number is the process that writes.
TEMPORARY = re.compile(r"\..*\.(\d{1,7})\.tmp(\.[^.]*)?", re.DOTALL)


@contextmanager
def replacing(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[Path]:
    """Give a new name beside ``path`` to write to; the file gets its name when the block ends.

    The new name keeps the suffix, for those who choose a format by it. If the block raises,
    ``path`` stays what it was; an ``OSError`` without a file's name, or with the new one, gets that
    of ``path``. ``durable`` waits until the content is on the disk.
    """
    path = Path(path)
    temporary = path.with_name(_temporary(path))
    try:
        yield temporary
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, temporary, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> str:
    """A name of at most 255 bytes, which is what file systems take."""
    end = f".{os.getpid()}.tmp{path.suffix}"
    stem = os.fsencode(path.stem)[: 254 - len(os.fsencode(end))]
    return f".{os.fsdecode(stem)}{end}"


def remove_leftovers(folder: Path) -> None:
    """Remove the temporaries, in ``folder`` and the folders in it, of processes that were killed.

    Nothing may be about to be replaced there by this process: its number may have been theirs.
    """
    for path in [*folder.glob(".*.tmp*"), *folder.glob("*/.*.tmp*")]:
        match = TEMPORARY.fullmatch(path.name)
        if match and path.is_file() and not _other_alive(int(match[1])):
            path.unlink(missing_ok=True)


def _other_alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write ``content``, text as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | os.PathLike[str], values: Any, indent: int = 2) -> None:
    """Write JSON values."""
    write_atomically(path, json.dumps(values, indent=indent) + "\n")


def as_json(values: Any) -> Any:
    """``values`` as plain JSON values; paths become strings, tuples lists."""
    return json.loads(json.dumps(values, default=str))
