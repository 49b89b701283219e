"""Reads the pictures of tar files and of unpacked folders one by one, as `Zip` of preparation.py does those of zip files.

All three have names(), the paths of their files in an order in which they are read fast, and read(name).
"""
import os
import sys
import threading

from data.preparation import DAMAGE, LARGEST_PICTURE, MEGABYTE, Zip, read_picture, reason, tar_members

STASH_BYTES = 256 * MEGABYTE


class Folder:
    """The files of a folder."""

    def __init__(self, path: str):
        self._path = path

    def names(self) -> list[str]:
        """The paths of its files, sorted."""
        paths = [os.path.join(parent, name) for parent, _, names in os.walk(self._path) for name in names]
        return sorted(os.path.relpath(path, self._path).replace(os.sep, '/') for path in paths)

    def read(self, name: str) -> bytes:
        """A file's content; raises one of DAMAGE."""
        return read_picture(os.path.join(self._path, name))


class Tar:
    """A tar file, compressed or not, that is never unpacked.

    It is read sequentially: once for the names, and for the text files in it, then for the pictures on request. Images read
    ahead are kept in a small buffer, for threads that ask for them in about the order of names(). Asking for an earlier one is
    possible, but means reading from the beginning again.
    """

    def __init__(self, path: str):
        """Raises SystemExit if it is missing or damaged."""
        self._path, self._lock, self._order, self._texts = path, threading.Lock(), {}, {}
        try:
            for member, archive in tar_members(path):
                self._order.setdefault(member.name, len(self._order))
                if member.name.endswith('.txt') and member.size <= LARGEST_PICTURE:
                    self._texts[member.name] = archive.extractfile(member).read()
        except DAMAGE as error:
            sys.exit(f'{path} is damaged ({reason(error)}); download it again')
        self._start()

    def names(self) -> list[str]:
        """The paths of its files, in their order in the archive."""
        return list(self._order)

    def read(self, name: str) -> bytes:
        """A member's content; raises one of DAMAGE."""
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
        self._stream, self._next, self._stash = tar_members(self._path), 0, {}

    def _read_next(self):
        try:
            member, archive = next(self._stream)
        except StopIteration:
            raise ValueError('the archive has changed') from None
        self._next = max(self._next, self._order.get(member.name, 0) + 1)
        self._stash[member.name] = archive.extractfile(member).read() if member.size <= LARGEST_PICTURE else None
        while sum(len(content or b'') for content in self._stash.values()) > STASH_BYTES and len(self._stash) > 1:
            del self._stash[next(iter(self._stash))]


def open_archive(source: str, archive: str, folder: str) -> Folder | Tar | Zip:
    """The unpacked folder in a source, or else the archive there, .zip or tar. Raises SystemExit if it has neither."""
    unpacked, packed = os.path.join(source, folder), os.path.join(source, archive)
    if os.path.isdir(unpacked):
        return Folder(unpacked)
    if os.path.exists(packed):
        return (Zip if archive.endswith('.zip') else Tar)(packed)
    sys.exit(f'{source} holds neither {archive} nor a folder {folder}; fetch it by --download, or name its folder with --source')


def read_text(archive: Folder | Tar | Zip, end: str) -> list[list[str]]:
    """The lines of a text file in an archive, split at the first blank, by its path's end. Raises SystemExit if it is missing."""
    found = [name for name in archive.names() if ('/' + name).endswith('/' + end)]
    if len(found) != 1:
        sys.exit(f'the download holds {end} {len(found)} times instead of once; download it again')
    try:
        return [line.split(maxsplit=1) for line in archive.read(found[0]).decode().splitlines() if line.strip()]
    except DAMAGE as error:
        sys.exit(f'{found[0]} in the download cannot be read ({reason(error)}); download it again')
