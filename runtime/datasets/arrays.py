"""Decoded images on disk: memory-mapped .npy files of bytes, each with a record by which damage is noticed.

There are two kinds. The preparation of a large source packs each split: <folder>/<split>.npy, class after class, and
<folder>/packed.json with the number of images of each class. Images of class folders are cached: <path>.npy, and <path>.json with
a fingerprint of the image files.
"""
import contextlib
import os
import sys
import zlib
from collections.abc import Callable, Iterable
from typing import IO, TypedDict

import numpy as np

from runtime.datasets.images import CHUNK_BYTES
from runtime.system.files import STALE_SECONDS, open_regular, read_json, remove_parts, write_atomically, write_json
from runtime.system.schema import checked

RECORD = 'packed.json'


def write_array(path: str, shape: tuple[int, ...], parts: Callable[[], Iterable[np.ndarray]]) -> tuple[np.memmap, dict[str, int]]:
    """Writes a uint8 array to an .npy file: that of which `parts` returns pieces along the first axis.

    Returns the array, memory-mapped, and what `read_array` checks: the CRC-32 (of the numbers alone), the size in bytes, and the time
    of the very file that was written, even if another process has replaced it meanwhile.

    Raises OSError if it cannot be written; and whatever `parts` raises. No part of it is left then.
    """
    def write(file):
        checksum = 0
        np.lib.format.write_array_header_1_0(file, {'descr': '|u1', 'fortran_order': False, 'shape': shape})
        for part in parts():
            checksum = zlib.crc32(part, checksum)
            file.write(part)
        file.flush()
        status = os.fstat(file.fileno())
        with open(file.name, 'rb') as written:
            return map_array(written), {'crc32': checksum, 'bytes': status.st_size, 'mtime_ns': status.st_mtime_ns}

    return write_atomically(path, write)


def map_array(file: IO[bytes]) -> np.memmap:
    """The array in .npy format that begins at a file's position, memory-mapped. Raises ValueError if there is none of numbers."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError('it holds objects')
    return np.memmap(file, dtype, 'r', file.tell(), shape, 'F' if columns_first else 'C')


def read_array(path: str, shape: tuple[int, ...], record: dict, verify: bool, update: Callable[[], object]) -> np.memmap:
    """A uint8 array from the .npy file that `write_array` wrote, memory-mapped.

    A file with the recorded size and time is trusted, unless `verify` asks for its checksum. With another time, as of a copy, its
    checksum is verified, and the new time is put into the record, which `update` writes, so that this need not be done again.

    Raises Exception if the file is not there, of another shape, or damaged; numpy raises almost any exception then.
    """
    with open_regular(path, 'rb') as file:
        array, status = map_array(file), os.fstat(file.fileno())
        if array.shape != shape or array.dtype != np.uint8:
            raise ValueError(f'it holds {array.dtype} {list(array.shape)}')
        same_time = record.get('mtime_ns') == status.st_mtime_ns
        if record.get('bytes', status.st_size) != status.st_size or (
                (verify or not same_time) and file_checksum(file, array.offset) != record['crc32']):
            raise ValueError('its size or its checksum is wrong')
    if not same_time:
        record['mtime_ns'] = status.st_mtime_ns
        with contextlib.suppress(OSError):
            update()
    return array


def file_checksum(file: IO[bytes], start: int = 0) -> int:
    """CRC-32 of a file from a position on, read in pieces to save memory."""
    checksum = 0
    file.seek(start)
    while part := file.read(CHUNK_BYTES):
        checksum = zlib.crc32(part, checksum)
    return checksum


def cached_array(path: str, fingerprint: str, shape: tuple[int, ...], make: Callable[[], Iterable[np.ndarray]],
                 verify: bool = False) -> tuple[np.ndarray, int]:
    """A uint8 array, memory-mapped (in memory if the cache cannot be written), and its CRC-32.

    It is read from <path>.npy, or made if that file is missing, damaged or was made from something else.

    Args:
        fingerprint: identifies what the array is made from.
        make: returns pieces of the array along the first axis.
        verify: compare the checksum in any case.
    """
    with contextlib.suppress(Exception):  # an unreadable cache is made again
        record = read_json(path + '.json')
        if record['fingerprint'] == fingerprint:
            return read_array(path + '.npy', shape, record, verify, lambda: write_json(path + '.json', record)), record['crc32']
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        remove_parts(os.path.dirname(path), STALE_SECONDS)
        array, facts = write_array(path + '.npy', shape, make)
        write_json(path + '.json', {'fingerprint': fingerprint, **facts})
        return array, facts['crc32']
    except OSError as error:
        print(f'The decoded images could not be kept for the next run: {error}', file=sys.stderr)
        array = np.concatenate(list(make()))
        return array, zlib.crc32(array)


class PackedSplit(TypedDict):
    """What the record says of a split: its classes, and what `write_array` returned."""
    classes: dict[str, int]  # {class: its images}
    crc32: int
    bytes: int
    mtime_ns: int


def read_packed_record(root: str) -> dict[str, PackedSplit]:
    """{split: what is recorded of it}; raises OSError or ValueError if it cannot be read, or is malformed."""
    content = read_json(os.path.join(root, RECORD))
    try:
        record = checked(dict[str, PackedSplit], content, RECORD)
    except ValueError as error:
        raise ValueError(f'it is malformed: {error}') from error
    if any(count < 0 for entry in record.values() for count in entry['classes'].values()):
        raise ValueError('it is malformed: a number of images is negative')
    return record
