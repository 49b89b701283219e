"""Reads an array of numbers from a MATLAB 5 file (MathWorks, MAT-File Format).

scipy's reader is not used: its C code looks up kinds of data by numbers from the file, and a damaged one makes it crash.
"""
import struct
import zlib
from collections.abc import Iterator

import numpy as np

NUMBERS = {1: 'i1', 2: 'u1', 3: 'i2', 4: 'u2', 5: 'i4', 6: 'u4', 7: 'f4', 9: 'f8', 12: 'i8', 13: 'u8'}  # {kind: dtype}
MATRIX, COMPRESSED = 14, 15
HEADER = 128        # bytes
LARGEST = 2 ** 20   # bytes of an array


def read_array(content: bytes, name: str) -> np.ndarray:
    """The numbers of the array of a name, in the order of the file.

    Raises ValueError, struct.error or zlib.error if it is not there, or the file is damaged.
    """
    if content[HEADER - 2:HEADER] != b'IM':
        raise ValueError('it is not a little-endian MATLAB 5 file')
    for kind, data in elements(content[HEADER:]):
        if kind == COMPRESSED:
            kind, data = next(elements(zlib.decompressobj().decompress(data, LARGEST)), (None, b''))
        parts = list(elements(data)) if kind == MATRIX else []  # flags, sizes, name, numbers
        if len(parts) > 3 and parts[2][1] == name.encode():
            kind, numbers = parts[3]
            if kind not in NUMBERS:
                raise ValueError(f'{name} does not hold numbers')
            return np.frombuffer(numbers, '<' + NUMBERS[kind])
    raise ValueError(f'there is no array {name}')


def elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(kind, data) of each data element."""
    position = 0
    while position < len(content):
        kind, size = struct.unpack_from('<II', content, position)
        start = position + 8
        if kind >> 16:  # a small one: its size is in the upper half, and its data take the place of the size
            kind, size, start = kind & 0xffff, kind >> 16, position + 4
            position += 8
        else:
            position = start + size + (0 if kind == COMPRESSED else -size % 8)
        if start + size > min(position, len(content)):
            raise ValueError('it is cut off')
        yield kind, content[start:start + size]
