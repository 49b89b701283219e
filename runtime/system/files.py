"""Writing files so that a reader never sees a partial one, and reading only regular files."""
import contextlib
import csv
import errno
import io
import itertools
import json
import os
import pathlib
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, BinaryIO, TextIO, TypeVar

import filelock

PART_SUFFIX = '.part'
STALE_SECONDS = 3600   # a part file not written to for this long belongs to a process that was killed
_PART = re.compile(r'\.\d+' + re.escape(PART_SUFFIX) + '$')  # ends in the number of the write and the suffix
Result = TypeVar('Result')


def write_atomically(path: str | os.PathLike, content: bytes | Callable[[BinaryIO], Result]) -> Result:
    """Writes a file under a temporary name and renames it.

    Each write has a random temporary name, so that no two threads, processes or hosts write to the same file. `content` may be a
    function that writes to a file open for writing; what it returns is returned.

    Raises OSError if the file cannot be written; the old one, if any, is still there and no part is left.
    """
    part = f'{os.fspath(path)}.{secrets.randbelow(10 ** 15):015}{PART_SUFFIX}'
    try:
        with open(part, 'xb') as file:
            result = content(file) if callable(content) else file.write(content)
        os.replace(part, path)
        return result
    except BaseException:
        pathlib.Path(part).unlink(missing_ok=True)
        raise


def write_csv(path: str | os.PathLike, rows: Iterable[Sequence[str]], errors: str = 'strict') -> None:
    """Writes rows to a csv file in UTF-8, atomically; `errors` as of str.encode. Raises OSError or UnicodeEncodeError."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_atomically(path, text.getvalue().encode(errors=errors))


def require_regular_file(path: str | os.PathLike) -> None:
    """Raises OSError if the path is a pipe, a device or a folder, which could block or never end, or if nothing is there.

    So can the kernel's files in /proc and /sys, which look regular.
    """
    if not stat.S_ISREG(os.stat(path).st_mode) or os.path.realpath(path).startswith(('/proc/', '/sys/')):
        raise OSError(errno.EINVAL, 'not a regular file', os.fspath(path))


def open_regular(path: str | os.PathLike, mode: str = 'r', **options: Any) -> IO[Any]:
    """A file opened as by `open`; raises OSError as `require_regular_file`."""
    require_regular_file(path)
    return open(path, mode, **options)


def read_csv(path: str | os.PathLike) -> tuple[list[str], dict[int, dict[str, str | None]]]:
    """The names of the columns of a csv file in UTF-8, and {number of its line, from 1: row}, without empty lines; a cell that a row
    lacks is None. Raises OSError, UnicodeDecodeError or csv.Error, also for a name that two columns have, and more cells than columns."""
    with open_regular(path, newline='', encoding='utf-8-sig') as file:
        reader = csv.reader(file, delimiter=delimiter_of(file), strict=True)
        (_, header), *lines = [(reader.line_num, row) for row in reader if row] or [(0, [])]
    columns = [name.strip() for name in header]
    twice = next((name for name in columns if name and columns.count(name) > 1), None)
    if twice:
        raise csv.Error(f'its first line names the column {twice} twice')
    for number, row in lines:
        if any(cell.strip() for cell in row[len(columns):]):
            raise csv.Error(f'line {number} has {len(row)} cells, and the first line {len(columns)}; put quotes around a cell with a comma')
    return columns, {number: dict(itertools.zip_longest(columns, row[:len(columns)])) for number, row in lines}


def walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` through symbolic links too, each folder once: links may lead round in a circle."""
    visited = set()
    for path, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(path) in visited:
            folders.clear()
        else:
            visited.add(os.path.realpath(path))
            yield path, folders, names


def delimiter_of(file: TextIO) -> str:
    """What separates the cells of a csv file that was just opened: a tab, a semicolon or a comma. Names of columns may have commas in
    them, so the first two lines that are not empty decide, if they have equally many cells; else the first one does."""
    lines = list(itertools.islice((line for line in file if line.strip()), 2))
    file.seek(0)
    cells = {delimiter: [len(row) for row in csv.reader(lines, delimiter=delimiter)] for delimiter in '\t;,'}
    fitting = [delimiter for delimiter, (first, *others) in cells.items() if first > 1 and others == [first]] if lines else []
    return max(fitting or ',;\t', key=lambda delimiter: cells[delimiter][:1])


def read_json(path: str | os.PathLike) -> Any:
    """The value in a json file; raises OSError if it cannot be read, ValueError if it is no json file, or nested too deeply."""
    with open_regular(path, encoding='utf-8') as file:
        try:
            return json.load(file)
        except RecursionError as error:
            raise ValueError('it is malformed: nested too deeply') from error


def write_json(path: str | os.PathLike, value: object) -> None:
    """Writes a value to a json file, atomically; raises OSError if that cannot be done."""
    write_atomically(path, json.dumps(value).encode())


def remove_parts(folder: str, unused_for: float = 0) -> None:
    """Removes the part files that killed processes left in a folder: those to which nobody has written for so many seconds; with 0 all,
    for which the caller must hold a lock that keeps others from writing there."""
    for path in (os.path.join(folder, name) for name in os.listdir(folder) if _PART.search(name)):
        with contextlib.suppress(OSError):
            if not unused_for or time.time() - os.path.getmtime(path) > unused_for:
                os.unlink(path)


@contextlib.contextmanager
def locked(path: str, wait: bool = True) -> Iterator[None]:
    """While entered, holds the lock of a file against other processes. The lock ends with the process, however that ends.
    Raises filelock.Timeout if another process has the lock, and `wait` is False; OSError if the file cannot be made."""
    lock = filelock.FileLock(path)
    with contextlib.suppress(NotImplementedError):  # file systems without locks
        lock.acquire(timeout=-1 if wait else 0)
    try:
        yield
    finally:
        lock.release()
