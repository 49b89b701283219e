"""Reads CIFAR-100 (Krizhevsky, 2009), of which CIFAR-FS and FC100 are two splits, and prepares either."""
import os
import sys

import numpy as np
from PIL import Image

from data import download, pickles
from data.archives import find_archive, read_tar_members
from data.preparation import Class, Picture, arguments, prepare
from data.reading import MEGABYTE, encode, is_plain_name, load_pickle, read_classes, read_part, refusing

ARCHIVE, FOLDER, PARTS = 'cifar-100-python.tar.gz', 'cifar-100-python', ('train', 'test', 'meta')
SIZE = (32, 32)
IMAGES_PER_CLASS = 600  # 500 of the training part, 100 of the test part
IMAGES = 60_000


def read_parts(path: str) -> dict[str, tuple[str, dict]]:
    """{'train' | 'test' | 'meta': (its name in messages, dict)} of the archive or its unpacked folder."""
    if os.path.isdir(path):
        contents = {name: read_part(os.path.join(path, name)) for name in PARTS if os.path.exists(os.path.join(path, name))}
    else:
        contents = read_tar_members(path, PARTS, limit=512 * MEGABYTE)
    missing = [name for name in PARTS if name not in contents]
    if missing:
        sys.exit(f'{path} has no file {", ".join(missing)}; download CIFAR-100 again')
    return {name: (f'{name} in {path}', load_pickle(contents[name], f'{name} in {path}')) for name in PARTS}


def read_images(path: str) -> list[tuple[str, str, np.ndarray]]:
    """[(class, file name, uint8 [32, 32, 3])] of both parts; the names are the archive's, unique within a class."""
    parts = read_parts(path)
    where, meta = parts.pop('meta')
    labels = _entry(meta, 'fine_label_names', where, pickles.texts)
    if len(set(labels)) < len(labels):
        sys.exit(f'{where} gives two classes the same name; download CIFAR-100 again')
    images = []
    for where, part in parts.values():
        data = _entry(part, 'data', where, lambda values: values)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
            array = isinstance(data, np.ndarray)
            kind = f'shape {list(data.shape)} and type {data.dtype}' if array else f'type {type(data).__name__}'
            sys.exit(f'{where} holds data of {kind} instead of rows of 3072 bytes; download CIFAR-100 again')
        names = _entry(part, 'filenames', where, pickles.texts)
        numbers = _entry(part, 'fine_labels', where, lambda values: pickles.integers(values, IMAGES))
        if not len(data) == len(numbers) == len(names) or not set(numbers) <= set(range(len(labels))):
            sys.exit(f'the labels or names in {where} do not fit its {len(data)} images; download CIFAR-100 again')
        pixels = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        images += [(labels[number], name, image) for number, name, image in zip(numbers, names, pixels)]
    hostile = [name for label, name, _ in images if not is_plain_name(name) or not is_plain_name(label)]
    if hostile:
        sys.exit(f'{path} names an image {hostile[0]!r}, which cannot be the name of a file; download CIFAR-100 again')
    return images


def _entry(part, name, where, read):
    """An entry as `read`, a function that may raise pickles.Refused, returns it."""
    if name not in part:
        sys.exit(f'{where} has no entry {name}; download CIFAR-100 again')
    with refusing(f'the entry {name} of {where} cannot be used', pickles.Refused, 'download CIFAR-100 again'):
        return read(part[name])


def main(description: str, folder: str) -> None:
    """Writes <destination>/{train,val,test}/<class>/*.png by the list of classes in the script's folder."""
    args = arguments(description, os.path.join(os.path.dirname(folder), 'cifar100'), folder).parse_args()
    download.fetch('cifar100', args)
    split_of = {row['class']: row['split'] for row in read_classes(os.path.join(folder, 'classes.csv'))}
    source = find_archive(args, ARCHIVE, FOLDER)
    pictures = [Picture(f'{split_of.get(label, "unknown")}/{label}/{os.path.splitext(name)[0]}.png',
                        lambda image=image: encode(Image.fromarray(image)))
                for label, name, image in read_images(source)]
    classes = {f'{split}/{label}': Class(split, IMAGES_PER_CLASS) for label, split in split_of.items()}
    prepare(pictures, classes, SIZE, args, inputs=[source])
