"""Decoded images on disk: arrays, memory-mapped, with checksums, and a cache of them with fingerprints of their origin."""
import contextlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable

import numpy as np

from runtime.datasets.images import CHUNK_BYTES
from runtime.system.files import refuse_no_file, remove_stale_parts, write_atomically


def write_array(path: str, shape: tuple[int, ...], parts: Callable[[], Iterable[np.ndarray]]) -> dict[str, int]:
    """Writes a uint8 array to an .npy file.

    Args:
        shape: of the array.
        parts: returns arrays which, concatenated along the first axis, are the array.

    Returns:
        What `is_whole` asks of the file: its CRC-32 (of the numbers alone), its size in bytes, and its time.

    Raises:
        OSError: it cannot be written; and whatever `parts` raises. No part of it is left then.
    """
    def write(file):
        checksum = 0
        np.lib.format.write_array_header_1_0(file, {'descr': '|u1', 'fortran_order': False, 'shape': shape})
        for part in parts():
            checksum = zlib.crc32(part, checksum)
            file.write(part)
        return checksum

    checksum = write_atomically(path, write)
    status = os.stat(path)
    return {'crc32': checksum, 'bytes': status.st_size, 'mtime_ns': status.st_mtime_ns}


def is_whole(path: str, array: np.memmap, facts: dict, verify: bool) -> bool:
    """Whether an .npy file is as `write_array` wrote it.

    A file with the recorded size and time is trusted, unless `verify` asks for its checksum. With another time, as of a copy, its
    checksum is verified: in pieces, to save memory.
    """
    status = os.stat(path)
    if facts.get('bytes', status.st_size) != status.st_size:
        return False
    if facts.get('mtime_ns') == status.st_mtime_ns and not verify:
        return True
    checksum = 0
    with open(path, 'rb') as file:
        file.seek(array.offset)
        while part := file.read(CHUNK_BYTES):
            checksum = zlib.crc32(part, checksum)
    return checksum == facts['crc32']


def cached_array(path: str, fingerprint: str, shape: tuple[int, ...], make: Callable[[], Iterable[np.ndarray]],
                 verify: bool = False) -> tuple[np.ndarray, int]:
    """A uint8 array from <path>.npy, or from make() if that file is missing, damaged or was made from something else.

    Args:
        path: of the cache, without suffix; <path>.json beside it holds the fingerprint and what `is_whole` asks.
        fingerprint: identifies what the array is made from.
        shape: of the array.
        make: returns an iterable of arrays which, concatenated along the first axis, are the array.
        verify: compare the checksum in any case.

    Returns:
        The array, memory-mapped (in memory if the cache cannot be written), and its CRC-32.
    """
    found = _read(path, fingerprint, shape, verify)
    if found:
        return found
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        remove_stale_parts(path + '.npy')
        record = {'fingerprint': fingerprint, **write_array(path + '.npy', shape, make)}
        write_atomically(path + '.json', json.dumps(record).encode())
        return np.load(path + '.npy', mmap_mode='r'), record['crc32']
    except OSError as error:
        print(f'The decoded images could not be kept for the next run: {error}', file=sys.stderr)
        array = np.concatenate(list(make()))
        return array, zlib.crc32(array)


def _read(path: str, fingerprint: str, shape: tuple[int, ...], verify: bool) -> tuple[np.ndarray, int] | None:
    """The array and its checksum, or None."""
    try:
        refuse_no_file(path + '.json')
        refuse_no_file(path + '.npy')
        with open(path + '.json', encoding='utf-8') as file:
            record = json.load(file)
        array = np.load(path + '.npy', mmap_mode='r')
        if array.shape != shape or array.dtype != np.uint8 or record.get('fingerprint') != fingerprint:
            return None
        if not is_whole(path + '.npy', array, record, verify):
            return None
        time = os.stat(path + '.npy').st_mtime_ns
        if record.get('mtime_ns') != time:  # a copy: verified now, it need not be verified again
            with contextlib.suppress(OSError):
                write_atomically(path + '.json', json.dumps(record | {'mtime_ns': time}).encode())
        return array, record['crc32']
    except Exception:  # numpy raises almost any exception on damaged files; an unreadable cache is rebuilt
        return None
