"""Packed images: one array per split, which the preparation of a large source writes instead of class folders.

<folder>/<split>.npy is uint8 [images, height, width, channels], class after class. <folder>/packed.json has for each split the
number of images of each class, in their order, and the size, time and checksum of the array.
"""
import contextlib
import json
import os

import numpy as np

from runtime.datasets.image_cache import is_whole
from runtime.system.errors import UserError
from runtime.system.files import refuse_no_file, write_atomically

RECORD = 'packed.json'


def is_packed(root: str) -> bool:
    """Whether a data folder holds packed images."""
    return os.path.lexists(os.path.join(root, RECORD))


def read_record(root: str) -> dict[str, dict]:
    """{split: {'classes': {class: images}, 'crc32': ..., 'bytes': ..., 'mtime_ns': ...}}.

    Raises:
        OSError, ValueError: it cannot be read, or is malformed.
    """
    path = os.path.join(root, RECORD)
    refuse_no_file(path)
    try:
        with open(path, encoding='utf-8') as file:
            record = json.load(file)
        numbers = [entry[name] for entry in record.values() for name in ('crc32', 'bytes', 'mtime_ns')]
        numbers += [count for entry in record.values() for count in entry['classes'].values()]
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError('it is malformed') from error
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError('it is malformed')
    return record


def write_record(root: str, record: dict[str, dict]) -> None:
    """Writes the record of a folder of packed arrays, atomically."""
    write_atomically(os.path.join(root, RECORD), json.dumps(record).encode())


def class_counts(root: str, split: str, script: str) -> dict[str, int]:
    """{class: images} of a split, in the order of its array; {} if there is no such split.

    Raises:
        UserError: the record cannot be read.
    """
    return _record(root, script).get(split, {'classes': {}})['classes']


def load(root: str, split: str, image_shape: tuple[int, int, int], script: str, verify: bool) -> tuple[np.ndarray, int]:
    """The images of a split, memory-mapped, and their CRC-32. They are read only if `verify` asks for it or the time of their
    file has changed, as of a copy; then the new time is recorded, so that they need not be read again.

    Raises:
        UserError: they are not there, of another shape, or damaged.
    """
    record, path = _record(root, script), os.path.join(root, split + '.npy')
    facts = record[split]
    try:
        refuse_no_file(path)
        images = np.load(path, mmap_mode='r')
        if images.shape != (sum(facts['classes'].values()), *image_shape) or images.dtype != np.uint8:
            raise ValueError(f'it holds {images.dtype} {list(images.shape)}')
        if not is_whole(path, images, facts, verify):
            raise ValueError('its size or its checksum is wrong')
    except Exception as error:  # numpy raises almost any exception on damaged files
        raise UserError(f'{path} is damaged ({" ".join(str(error).split())}); make it again: python {script} --force') from error
    time = os.stat(path).st_mtime_ns
    if facts['mtime_ns'] != time:
        facts['mtime_ns'] = time
        with contextlib.suppress(OSError):
            write_record(root, record)
    return images, facts['crc32']


def _record(root, script):
    try:
        return read_record(root)
    except (OSError, ValueError) as error:
        raise UserError(f'{os.path.join(root, RECORD)} cannot be read ({error}); make it again: python {script} --force') from error
