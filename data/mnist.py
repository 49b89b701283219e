"""Reads MNIST (LeCun et al., 1998), and makes images of several digits of it: DoubleMNIST and TripleMNIST (Sun, 2019).

A class is a number of two or three digits. Each image shows its digits from left to right, each drawn from all of MNIST's
and put at a random place in its own cell, on black, as MultiDigitMNIST's generator does
(github.com/shaohua0116/MultiDigitMNIST). The classes of each split are that generator's. Its images are not: image k of a class
here is a function of (SEED, class, k).
"""
import argparse
import gzip
import io
import math
import os
import sys
import zlib

import numpy as np

from data import download
from data.packing import ImageList, pack
from data.preparation import Class, arguments
from data.reading import read_classes, read_file, refusing

SEED = 123
SIDE = 28
PARTS = {'train': 60_000, 't10k': 10_000}
IMAGES_PER_CLASS = 1000


def read_digits(args: argparse.Namespace) -> tuple[list[np.ndarray], list[str]]:
    """The images of each digit from 0 to 9, of both parts, uint8 [images, 28, 28] each; and the paths of the files.

    Raises SystemExit if a file is missing, damaged, or of other counts.
    """
    images, labels = [], []
    paths = find_idx(args, [f'{part}-{name}-ubyte' for part in PARTS for name in ('images-idx3', 'labels-idx1')])
    for count, images_path, labels_path in zip(PARTS.values(), paths[::2], paths[1::2]):
        images.append(read_idx(images_path, (count, SIDE, SIDE)))
        labels.append(read_idx(labels_path, (count,)))
        if labels[-1].max() > 9:
            sys.exit(f'{labels_path} holds a label {labels[-1].max()}; download MNIST again')
    images, labels = np.concatenate(images), np.concatenate(labels)
    digits = [images[labels == digit] for digit in range(10)]
    if not all(map(len, digits)):
        sys.exit(f'the labels in {args.source} lack the digit {min(digit for digit in range(10) if not len(digits[digit]))}; '
                 'download MNIST again')
    return digits, paths


def find_idx(args: argparse.Namespace, names: list[str]) -> list[str]:
    """The paths of idx files in args.source, or else of <name>.gz; after --download of <name>.gz, which has been checked.

    Raises SystemExit if files are missing.
    """
    endings = ('.gz', '') if args.download else ('', '.gz')
    paths = [next(filter(os.path.exists, (os.path.join(args.source, name + ending) for ending in endings)), None) for name in names]
    missing = [f'neither {name} nor {name}.gz' for name, path in zip(names, paths) if path is None]
    if missing:
        sys.exit(f'{args.source} holds {", ".join(missing)}; fetch MNIST by --download, or name its folder with --source')
    return paths


def read_idx(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of bytes from an idx file, packed (.gz) or not. Raises SystemExit if it is damaged or of another shape."""
    head = bytes([0, 0, 8, len(shape)]) + np.array(shape, '>i4').tobytes()
    size = len(head) + math.prod(shape)
    with refusing(f'{path} is damaged', (OSError, EOFError, zlib.error)):
        content = read_file(path, 2 ** 26)
        if path.endswith('.gz'):
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(size + 1)
    if len(content) != size or not content.startswith(head):
        sys.exit(f'{path} does not hold bytes of shape {list(shape)}; download it again')
    return np.frombuffer(content, np.uint8, offset=len(head)).reshape(shape)


def image_of(digits: list[np.ndarray], number: str, k: int, size: int) -> np.ndarray:
    """Image k of a class, uint8 [size, size, 1].

    Args:
        digits, number: as from `read_digits`, and the class, as text with its leading zeros.
        size: height and width; each digit's cell is size / len(number) wide, which 28 pixels must fit.
    """
    rng = np.random.default_rng([SEED, len(number), int(number), k])
    image, cell = np.zeros([size, size, 1], np.uint8), size // len(number)
    for place, digit in enumerate(map(int, number)):
        drawing = digits[digit][rng.integers(len(digits[digit]))]
        top, left = rng.integers(max(1, size - SIDE)), place * cell + rng.integers(max(1, cell - SIDE))
        image[top:top + SIDE, left:left + SIDE, 0] = drawing
    return image


def main(description: str, folder: str, size: int) -> None:
    """Writes <destination>/{train,val,test}.npy by the list of classes in the script's folder."""
    args = arguments(description, os.path.join(os.path.dirname(folder), 'mnist'), folder).parse_args()
    download.fetch('mnist', args)
    rows = read_classes(os.path.join(folder, 'classes.csv'))
    digits, paths = read_digits(args)
    lists = {f'{row["split"]}/{row["class"]}': ImageList(
        IMAGES_PER_CLASS, lambda k, number=row['class']: image_of(digits, number, k, size)) for row in rows}
    pack(lists, {f'{row["split"]}/{row["class"]}': Class(row['split'], IMAGES_PER_CLASS) for row in rows},
         (size, size, 1), args, inputs=paths)
