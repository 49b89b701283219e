"""Writes a large source as packed arrays (runtime/datasets/arrays.py), because listing and decoding class folders would take too long.

A script lists its classes, each with a function that makes an image, and says how many of each class there should be; `pack`
writes one array for each split, checks the counts and prints a summary.
"""
import argparse
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.preparation import Class, deferred_interrupt, describe_classes, differences, run_preparation, summary
from data.reading import DAMAGE
from runtime.datasets.arrays import RECORD, read_packed_record, write_array
from runtime.datasets.images import CHUNK_BYTES
from runtime.datasets.tasks import SPLITS
from runtime.system.files import write_json


class ImageList(NamedTuple):
    """The images of a class, which are made one at a time, by several threads."""
    count: int
    make: Callable[[int], np.ndarray]  # of numbers below `count`: uint8 [height, width, channels]; raises one of DAMAGE


class Damaged(Exception):
    """Images that cannot be made are among those of an array."""


def pack(lists: Mapping[str, ImageList], classes: Mapping[str, Class], shape: tuple[int, int, int], args: argparse.Namespace,
         recipe: str = '', inputs: Sequence[str] = ()) -> None:
    """Writes images, checks them against the known counts, and prints a summary.

    A split that is there already is left as it is, unless it was made by another recipe or of other classes. Each is written
    atomically. An image that cannot be made leaves no array of its split, or with args.allow_missing one without it.
    Raises SystemExit with one sentence for each problem found.

    Args:
        lists, classes: by '<split>/<class>'.
        shape: (height, width, channels) of every image.
        args, recipe, inputs: as for `preparation.prepare`.
    """
    outputs = [RECORD, *(split + '.npy' for split in SPLITS)]

    def write(destination, again):
        if again:
            for name in outputs:
                pathlib.Path(destination, name).unlink(missing_ok=True)
        record, damaged = _earlier(destination), {}
        for split in SPLITS:
            own = {name: lists[name] for name in sorted(lists) if name.split('/')[0] == split}
            if own and record.get(split, {}).get('classes') != {name: images.count for name, images in own.items()}:
                record.pop(split, None)
                entry = write_split(os.path.join(destination, split + '.npy'), own, shape, damaged, args.allow_missing)
                if entry:
                    record[split] = entry
                    write_json(os.path.join(destination, RECORD), record)
        counts = dict.fromkeys(lists, 0) | {name: count for entry in record.values() for name, count in entry['classes'].items()}
        counts = {name: count for name, count in counts.items() if count or name not in classes}  # those left out are missing
        named = [(f'image {number} of {name}', error) for (name, number), error in sorted(damaged.items())]
        sizes = {split: record[split]['bytes'] / 1e6 if split in record else 0.0 for split in SPLITS}
        print(summary(counts, classes, sizes, shape[1::-1]))
        print(describe_classes(counts), 'in', destination, flush=True)
        return differences(counts, classes, named)

    run_preparation(args, recipe, inputs, write, outputs)


def _earlier(destination: str) -> dict[str, dict]:
    """The entries of the splits that an earlier preparation has written and whose files still have the recorded size."""
    try:
        record = read_packed_record(destination)
        return {split: entry for split, entry in record.items()
                if os.path.getsize(os.path.join(destination, split + '.npy')) == entry['bytes']}
    except (OSError, ValueError):
        return {}


def write_split(path: str, lists: Mapping[str, ImageList], shape: tuple[int, int, int],
                damaged: dict[tuple[str, int], Exception], allow_missing: bool) -> dict | None:
    """Writes the images of a split; adds those that cannot be made to `damaged`, {(class, number): error}.

    Returns the split's entry in the record, or None if images cannot be made and that is not allowed.
    """
    while True:
        counts = {name: images.count - sum(other == name for other, _ in damaged) for name, images in lists.items()}
        counts = {name: count for name, count in counts.items() if count}
        if not counts:
            return None
        try:
            total = sum(counts.values())
            parts = functools.partial(make_images, lists, damaged, shape, total, os.path.basename(path))
            return {'classes': counts, **write_array(path, (total, *shape), parts)[1]}
        except Damaged:
            if not allow_missing:
                return None


def make_images(lists: Mapping[str, ImageList], damaged: dict[tuple[str, int], Exception], shape: tuple[int, int, int],
                total: int, label: str) -> Iterator[np.ndarray]:
    """Yields uint8 [count, *shape], class after class except damaged ones, CHUNK_BYTES at a time.

    Raises Damaged at the end if there are more of these, which are added.
    """
    def work(member):
        name, number = member
        try:
            image = lists[name].make(number)
            if image.shape != shape or image.dtype != np.uint8:
                raise ValueError(f'it is {image.dtype} {list(image.shape)}, not {list(shape)}')
            return image
        except MemoryError:
            raise
        except DAMAGE as error:
            damaged[member] = error
            return None

    members = (member for name, images in lists.items() for number in range(images.count)
               if (member := (name, number)) not in damaged)
    per_chunk, before = max(1, CHUNK_BYTES // math.prod(shape)), len(damaged)
    with (deferred_interrupt() as interrupts, ThreadPoolExecutor() as pool,
          tqdm(desc=label, total=total, unit=' images', disable=None) as progress):
        while not interrupts and (chunk := list(itertools.islice(members, per_chunk))):
            images = list(pool.map(work, chunk))
            progress.update(len(chunk))
            if len(damaged) == before:
                yield np.stack(images)
    if len(damaged) > before:
        raise Damaged
