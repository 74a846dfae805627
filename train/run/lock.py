"""The lock on a run directory: one process at a time trains there."""

import errno
import fcntl
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.errors import UserError
from train.files import remove_leftovers

LOCK_FILE = ".lock"


@contextmanager
def locked(run: Path) -> Iterator[Path]:
    """Hold the directory ``run``, and clear it of what dead processes left half written.

    The system releases the lock when the process dies, however it does; RUN/.lock says which
    process holds it. Raises :class:`UserError` that names the other process if there is one, and
    for a directory that cannot be written to.
    """
    path = run / LOCK_FILE
    try:
        descriptor = _acquire(path)
    except OSError as error:
        raise UserError(f"{run}: cannot write to this run directory ({error.strerror})") from None
    try:
        remove_leftovers(run)
        yield run
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """Lock the file ``path`` and write this process's name into it; return its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, path.parent)
            # the holder removes the file as it ends: a lock on the removed one excludes nobody
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, run: Path) -> None:
    # lockf and not flock, whose lock would pass to the loader's workers and outlive this process
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = os.read(descriptor, 300).decode(errors="replace") or "another process"
            raise UserError(
                f"{run}: {holder} is training there; wait for it or stop it, "
                "or choose another directory with --out"
            ) from None
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        print(f"{run}: this file system has no locks; train one process there", file=sys.stderr)
