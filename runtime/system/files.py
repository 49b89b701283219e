"""Writing files so that a reader never sees a partial one, and reading only regular files."""
import contextlib
import errno
import glob
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

import filelock

PART_SUFFIX = '.part'
STALE_SECONDS = 3600   # a part file not written to for this long belongs to a process that was killed
_PART = re.compile(r'\.\d+' + re.escape(PART_SUFFIX) + '$')  # ends in the process number and the suffix
Result = TypeVar('Result')


def write_atomically(path: str | os.PathLike, content: bytes | Callable[[BinaryIO], Result]) -> Result:
    """Writes a file under a temporary name and renames it.

    The temporary name holds the host and the process number, so that two processes do not write to the same file.

    Args:
        path: where the file should be.
        content: the bytes, or a function that writes them to a file open for writing.

    Returns:
        What `content` returns, if it is a function.

    Raises:
        OSError: the file cannot be written; the old one, if any, is still there and no part is left.
    """
    part = f'{os.fspath(path)}.{socket.gethostname()}.{os.getpid()}{PART_SUFFIX}'
    try:
        with open(part, 'wb') as file:
            result = content(file) if callable(content) else file.write(content)
        os.replace(part, path)
        return result
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise


def refuse_no_file(path: str | os.PathLike) -> None:
    """Raises OSError for a pipe, a device or a folder: reading it could block, never end or fail."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, 'it is not a file', os.fspath(path))


def remove_stale_parts(path: str) -> None:
    """Removes the part files of `path` that killed processes left: those not written to for STALE_SECONDS."""
    for part in glob.glob(f'{glob.escape(path)}.*{PART_SUFFIX}'):
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(part) > STALE_SECONDS:
                os.unlink(part)


def remove_parts(folder: str) -> None:
    """Removes all part files in a folder, for use under a lock that keeps others from writing there."""
    for name in os.listdir(folder):
        if _PART.search(name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))


@contextlib.contextmanager
def locked(path: str, wait: bool = True) -> Iterator[None]:
    """While entered, holds the lock of a file against other processes. The lock ends with the process, however that ends.

    Args:
        path: the lock file, an empty one, which is created if it is missing.
        wait: whether to wait for the lock.

    Raises:
        filelock.Timeout: another process has the lock, and `wait` is False.
        OSError: the file cannot be made.
    """
    lock = filelock.FileLock(path)
    with contextlib.suppress(NotImplementedError):  # file systems without locks
        lock.acquire(timeout=-1 if wait else 0)
    try:
        yield
    finally:
        lock.release()
