"""The index of a tensor bundle, checked before TensorFlow reads it: TensorFlow ends the process where a shape or a type makes no sense.

The index is a sorted table as of LevelDB (table_format.md in its documentation): blocks of entries {name: BundleEntryProto}, then a
block that says where these are, then a footer that says where that is. What it holds is checked; TensorFlow checks its checksums.
"""
import math
import os
import struct
from collections.abc import Iterator

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto, BundleHeaderProto

from runtime.system.files import require_regular_file

_FOOTER_BYTES, _MAGIC = 48, struct.pack('<Q', 0xdb4775248b80fb57)
_MOST_DIMENSIONS = 8
_TYPES = {tf.bool, tf.int32, tf.int64, tf.uint8, tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.string}


def check(index_path: str, data_path: str) -> None:
    """Raises ValueError or IndexError if an index is none, or does not fit its file of data; OSError if a file cannot be read."""
    for path in index_path, data_path:
        require_regular_file(path)
    with open(index_path, 'rb') as file:
        index = file.read()
    data_bytes = os.stat(data_path).st_size
    try:
        for name, value in _entries(index):
            if name:
                _check_entry(name.decode(errors='replace'), BundleEntryProto.FromString(value), data_bytes)
            elif BundleHeaderProto.FromString(value).num_shards != 1:
                raise ValueError('it is not of one piece')
    except DecodeError as error:
        raise ValueError('its index is malformed') from error


def _check_entry(name, entry, data_bytes):
    """Raises ValueError if a tensor has a type or a shape that makes no sense, or does not lie within the data."""
    types = {dtype.as_datatype_enum: dtype for dtype in _TYPES}
    shape = [dimension.size for dimension in entry.shape.dim]
    if entry.dtype not in types or entry.shape.unknown_rank or len(shape) > _MOST_DIMENSIONS or min(shape, default=0) < 0 or entry.slices:
        raise ValueError(f'{name} has the type {entry.dtype} and the shape {shape[:_MOST_DIMENSIONS + 1]}')
    dtype, count = types[entry.dtype], math.prod(shape)
    fits = count <= entry.size if dtype == tf.string else count * dtype.size == entry.size
    if not fits or entry.shard_id or entry.offset < 0 or entry.offset + entry.size > data_bytes:
        raise ValueError(f'{name} has the shape {shape} and {entry.size} bytes from {entry.offset} of {data_bytes}')


def _entries(index: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The names and values of a table."""
    footer = index[-_FOOTER_BYTES:]
    if len(footer) < _FOOTER_BYTES or not footer.endswith(_MAGIC):
        raise ValueError('its index has no end')
    _, position = _handle(footer, 0)
    place, _ = _handle(footer, position)
    for _, handle in _block(index, place):
        yield from _block(index, _handle(handle, 0)[0])


def _block(index, place):
    """The entries of a block, each with its name, of which a part is that of the one before."""
    start, size = place
    block = index[start:start + size]
    if len(block) < size or index[start + size] != 0:
        raise ValueError('its index is cut off or compressed')
    restarts, = struct.unpack('<I', block[-4:].rjust(4, b'\0'))
    end, position, name = size - 4 * (restarts + 1), 0, b''
    while position < end:
        shared, position = _number(block, position)
        added, position = _number(block, position)
        length, position = _number(block, position)
        if shared > len(name) or position + added + length > end:
            raise ValueError('its index is malformed')
        name = name[:shared] + block[position:position + added]
        yield name, block[position + added:position + added + length]
        position += added + length


def _handle(data, position):
    """The place of a block, (start, size), and the position after it."""
    start, position = _number(data, position)
    size, position = _number(data, position)
    return (start, size), position


def _number(data, start):
    """A number in groups of seven bits, the lowest first, and the position after it."""
    value = 0
    for position, shift in enumerate(range(0, 64, 7), start):
        value |= (data[position] & 127) << shift
        if data[position] < 128:
            return value, position + 1
    raise ValueError('its index is malformed')
