"""A cache of decoded images: one array on disk, memory-mapped, with a checksum and a fingerprint of what it was made from."""
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable

import numpy as np

from runtime.files import refuse_no_file, remove_stale_parts, write_atomically
from runtime.images import CHUNK_BYTES


def cached_array(path: str, fingerprint: str, shape: tuple[int, ...],
                 make: Callable[[], Iterable[np.ndarray]]) -> tuple[np.ndarray, int]:
    """A uint8 array from <path>.npy, or from make() if that file is missing, damaged or was made from something else.

    Args:
        path: of the cache, without suffix; <path>.json beside it holds the fingerprint and the checksum.
        fingerprint: identifies what the array is made from.
        shape: of the array.
        make: returns an iterable of arrays which, concatenated along the first axis, are the array.

    Returns:
        The array, memory-mapped (in memory if the cache cannot be written), and its CRC-32.
    """
    found = _read(path, fingerprint, shape)
    if found:
        return found

    def write(file):
        checksum = 0
        np.lib.format.write_array_header_1_0(file, {'descr': '|u1', 'fortran_order': False, 'shape': shape})
        for part in make():
            checksum = zlib.crc32(part, checksum)
            file.write(part)
        return checksum

    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        remove_stale_parts(path + '.npy')
        record = {'fingerprint': fingerprint, 'crc32': write_atomically(path + '.npy', write)}
        write_atomically(path + '.json', json.dumps(record).encode())
        return np.load(path + '.npy', mmap_mode='r'), record['crc32']
    except OSError as error:
        print(f'The decoded images could not be kept for the next run: {error}', file=sys.stderr)
        array = np.concatenate(list(make()))
        return array, zlib.crc32(array)


def _read(path: str, fingerprint: str, shape: tuple[int, ...]) -> tuple[np.ndarray, int] | None:
    """The array and its checksum, or None. The file is read in pieces for its checksum, to save memory."""
    try:
        refuse_no_file(path + '.json')
        refuse_no_file(path + '.npy')
        with open(path + '.json', encoding='utf-8') as file:
            record = json.load(file)
        array = np.load(path + '.npy', mmap_mode='r')
        if array.shape != shape or array.dtype != np.uint8 or record.get('fingerprint') != fingerprint:
            return None
        checksum = 0
        with open(path + '.npy', 'rb') as file:
            file.seek(array.offset)
            while part := file.read(CHUNK_BYTES):
                checksum = zlib.crc32(part, checksum)
        return (array, checksum) if checksum == record.get('crc32') else None
    except Exception:  # numpy raises almost any exception on damaged files; an unreadable cache is made again
        return None
