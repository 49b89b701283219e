"""Reads the pictures of zip and tar files and of unpacked folders one by one; nothing is ever unpacked.

All three have `path`, names(), the paths of their files in an order in which they are read fast, and read(name), which returns a
file's content or raises one of DAMAGE. SystemExit is raised of an archive that is missing or damaged, or that holds two files of one
path: which of them is read would depend on who reads it.
"""
import argparse
import collections
import os
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data.reading import LARGEST_PICTURE, MEGABYTE, read_picture, refusing
from runtime.system.files import require_regular_file, walk

STASH_BYTES = 256 * MEGABYTE
TEXT_BYTES, LONGEST_TEXT = 64 * MEGABYTE, 4 * MEGABYTE  # of the text files of a tar file that are kept in memory: of all, of each


class Folder(NamedTuple):
    """The files of a folder."""
    path: str

    def names(self) -> list[str]:
        paths = [os.path.join(parent, name) for parent, _, names in walk(self.path) for name in names]
        return sorted(os.path.relpath(path, self.path).replace(os.sep, '/') for path in paths)

    def read(self, name: str) -> bytes:
        return read_picture(os.path.join(self.path, name))


class Zip:
    """A zip file."""

    def __init__(self, path: str):
        with refusing(f'{path} is damaged'):
            require_regular_file(path)
            self.path, self._file, self._lock = path, zipfile.ZipFile(path), threading.Lock()
        refuse_twice(path, self._file.namelist())

    def names(self) -> list[str]:
        return [name for name in self._file.namelist() if not name.endswith('/') and not name.startswith('__MACOSX/')]

    def read(self, name: str) -> bytes:
        if self._file.getinfo(name).file_size > LARGEST_PICTURE:
            raise ValueError(f'it would unpack to more than {LARGEST_PICTURE // MEGABYTE} MB')
        with self._lock, self._file.open(name) as file:
            return file.read(LARGEST_PICTURE)


class Tar:
    """A tar file, compressed or not.

    It is read sequentially: once for the names, and for the first text files in it, then for the pictures on request. Images read
    ahead are kept in a small buffer, for threads that ask for them in about the order of names(). Asking for an earlier one is
    possible, but means reading from the beginning again.
    """

    def __init__(self, path: str):
        self.path, self._lock, self._texts, names, room = path, threading.Lock(), {}, [], TEXT_BYTES
        with refusing(f'{path} is damaged'):
            for member, archive in tar_members(path):
                names.append(member.name)
                if member.name.endswith('.txt') and member.size <= min(room, LONGEST_TEXT):
                    self._texts[member.name] = archive.extractfile(member).read()
                    room -= member.size
        refuse_twice(path, names)
        self._order = {name: index for index, name in enumerate(names)}
        self._start()

    def names(self) -> list[str]:
        return list(self._order)

    def read(self, name: str) -> bytes:
        if name in self._texts:
            return self._texts[name]
        with self._lock:
            if name not in self._stash and self._order[name] < self._next:
                self._start()
            while name not in self._stash:
                self._read_next()
            content = self._stash.pop(name)
        if content is None:
            raise ValueError(f'it would unpack to more than {LARGEST_PICTURE // MEGABYTE} MB')
        return content

    def _start(self):
        self._stream, self._next, self._stash = tar_members(self.path), 0, {}

    def _read_next(self):
        try:
            member, archive = next(self._stream)
        except StopIteration:
            raise ValueError('the archive has changed') from None
        self._next = max(self._next, self._order.get(member.name, 0) + 1)
        self._stash[member.name] = archive.extractfile(member).read() if member.size <= LARGEST_PICTURE else None
        while sum(len(content or b'') for content in self._stash.values()) > STASH_BYTES and len(self._stash) > 1:
            del self._stash[next(iter(self._stash))]


def tar_members(path: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yields the regular files in a tar file, each with the open archive; raises one of DAMAGE."""
    require_regular_file(path)
    with tarfile.open(path) as archive:
        for member in archive:
            if member.size < 0:  # some versions of tarfile would loop forever
                raise tarfile.ReadError('a member has a negative size')
            if member.isreg():
                yield member, archive


def read_tar_members(path: str, names: Sequence[str], limit: int) -> dict[str, bytes]:
    """{name: content} of those members of a tar file, found by their last component, that are there.

    Raises SystemExit if the file is missing or damaged, a member is there twice, or one is larger than the limit in bytes.
    """
    contents = {}
    with refusing(f'{path} is damaged'):
        for member, archive in tar_members(path):
            name = member.name.rsplit('/', 1)[-1]
            if name not in names:
                continue
            refuse_twice(path, [*contents, name])
            if member.size > limit:
                sys.exit(f'{name} in {path} would unpack to {member.size // MEGABYTE} MB, which is more than it should; '
                         'download it again')
            contents[name] = archive.extractfile(member).read()
    return contents


def refuse_twice(path: str, names: Sequence[str]) -> None:
    """Raises SystemExit if an archive holds a file twice."""
    for name, count in collections.Counter(names).most_common(1):
        if count > 1:
            sys.exit(f'{path} holds {name[:100]!r} {count} times instead of once; download it again')


Archive = Folder | Tar | Zip


def find_archive(args: argparse.Namespace, archive: str, folder: str) -> str:
    """The path of an unpacked folder in args.source, or else of the archive there.

    After --download the archive comes first: it is what has been checked. Raises SystemExit if there is neither.
    """
    unpacked, packed = os.path.join(args.source, folder), os.path.join(args.source, archive)
    if os.path.exists(packed) and (args.download or not os.path.isdir(unpacked)):
        return packed
    if os.path.isdir(unpacked):
        return unpacked
    sys.exit(f'{args.source} holds neither {archive} nor a folder {folder}; --download fetches it or says where to get it; or name its '
             'folder with --source')


def is_there(args: argparse.Namespace, archive: str, folder: str) -> bool:
    """Whether args.source holds the archive or its unpacked folder."""
    return any(os.path.exists(os.path.join(args.source, name)) for name in (archive, folder))


def open_archive(args: argparse.Namespace, archive: str, folder: str) -> Archive:
    """The files in args.source that an archive, .zip or tar, holds; see `find_archive`."""
    path = find_archive(args, archive, folder)
    if os.path.isdir(path):
        return Folder(path)
    return Zip(path) if archive.endswith('.zip') else Tar(path)


def read_text(archive: Archive, end: str) -> list[list[str]]:
    """The lines of a text file in an archive, split at the first blank, by its path's end. Raises SystemExit if it is missing."""
    paths = [name for name in archive.names() if ('/' + name).endswith('/' + end)]
    if len(paths) != 1:
        sys.exit(f'the download holds {end} {len(paths)} times instead of once; download it again')
    with refusing(f'{paths[0]} in the download cannot be read'):
        return [line.split(maxsplit=1) for line in archive.read(paths[0]).decode().splitlines() if line.strip()]
