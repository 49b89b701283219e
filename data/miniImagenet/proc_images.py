"""Prepares MiniImagenet (Vinyals et al., 2016) in the split of Ravi & Larochelle (2017): 64 / 16 / 20 classes of 600 images.

Put into data/miniImagenet/ one of

    images.zip, or its unpacked folder images/, with train.csv, val.csv and test.csv (columns filename,label); without the
        csv files the classes are taken from the images' names (n01532829...jpg) or folders (images/n01532829/...)
    folders train, val and test, each with one folder of images per class: in another folder, which --source names
    mini-imagenet-cache-train.pkl, mini-imagenet-cache-val.pkl and mini-imagenet-cache-test.pkl (…-validation.pkl is used only
        if …-val.pkl is absent)

and run, there or anywhere,

    python data/miniImagenet/proc_images.py

It writes data/miniImagenet/{train,val,test}/<label>/, 84x84 pixels. Images of that size are copied byte for byte, others
are resized with a Lanczos filter (JPEG at quality 95).
"""
import argparse
import collections
import csv
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping

import numpy as np
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
from data import download, pickles  # noqa: E402
from data.archives import Archive, Folder, is_there, open_archive  # noqa: E402
from data.preparation import Class, Picture, arguments, prepare, run_script  # noqa: E402
from data.reading import encode, fit, is_plain_name, load_pickle, read_classes, read_part, refusing  # noqa: E402
from runtime.datasets.tasks import SPLITS  # noqa: E402
from runtime.system.files import read_csv  # noqa: E402

SIZE = (84, 84)
IMAGES_PER_CLASS = 600
IMAGE = re.compile(r'\.(jpe?g|png)$', re.IGNORECASE)
CLASS = re.compile(r'n\d{8}')
Contents = tuple[list[Picture], Mapping[tuple[str, str], int], list[str], list[str]]  # see from_images


def from_images(args: argparse.Namespace) -> Contents:
    """From images.zip or images/, by the csv files or else by names: the pictures, {(split, class): expected images}, names of
    missing images, and the paths of what was read."""
    archive = open_originals(args)
    files = sorted(name for name in archive.names() if IMAGE.search(name) and is_plain_name(name.rsplit('/', 1)[-1]))
    if not files:
        sys.exit(f'there are no images in {archive.path}')
    rows, expected, lists = expected_rows(args.source, files)
    same_name, pictures, absent, label_of = collections.defaultdict(list), [], [], {}
    for path in files:
        same_name[os.path.basename(path)].append(path)
    labels = {label for _, label in class_list()}  # `prepare` complains of others
    for split, name, label in rows:
        path = locate(same_name[os.path.basename(name)], name, label, labels)
        if path is None:
            absent.append(name)
        elif label in labels and label_of.setdefault(path, label) != label:
            sys.exit(f'the csv files name {path} as an image of the class {label_of[path]} and of {label}; remove one line')
        else:
            pictures.append(Picture(f'{split}/{label}/{os.path.basename(name)}', lambda path=path: fit(archive.read(path), SIZE)))
    if not pictures:
        sys.exit(f'none of the {len(rows)} images that the csv files in {args.source} name is among its images')
    return pictures, expected, absent, [archive.path, *lists]


def open_originals(args: argparse.Namespace) -> Archive:
    """The images in images.zip or images/, or else in folders train, val and test."""
    folders = [split for split in SPLITS if os.path.isdir(os.path.join(args.source, split))]
    if is_there(args, 'images.zip', 'images') or not folders:
        return open_archive(args, 'images.zip', 'images')
    if os.path.realpath(args.source) == os.path.realpath(args.destination):
        sys.exit(f'{args.source} holds folders {", ".join(folders)}, which this program would write: if their images are originals, move '
                 'them to another folder, and name it with --source; if they are prepared, there is nothing to do')
    return Folder(args.source)


def expected_rows(source: str, files: Iterable[str]) -> tuple[list[tuple[str, str, str]], Mapping[tuple[str, str], int], list[str]]:
    """[(split, image, label)] of the csv files, or else of the names of images; {(split, class): expected images}; the csv files."""
    lists = {split: os.path.join(source, split + '.csv') for split in SPLITS}
    missing = [path for path in lists.values() if not os.path.exists(path)]
    if missing:
        print(f'{missing[0]} is not there: classes are taken from the names of images and folders')
        return rows_from_names(files), dict.fromkeys(class_list(), IMAGES_PER_CLASS), []
    rows = [(split, *row) for split, path in lists.items() for row in read_rows(path)]
    check_rows(rows)
    expected = collections.Counter((split, label) for split, _, label in rows)
    few = {key: count for key, count in expected.items() if count != IMAGES_PER_CLASS}
    if few:
        (split, label), count = min(few.items())
        print(f'The csv files list {count} images of {split}/{label}; the whole of MiniImagenet has {IMAGES_PER_CLASS}')
    return rows, expected, list(lists.values())


def locate(paths: Iterable[str], name: str, label: str, labels: Collection[str]) -> str | None:
    """The path of an image that a csv file calls `name`: in its class's folder, or under that name but in no other class's folder.

    `paths` are those of the same last component, `labels` all classes.
    """
    folders = {path: os.path.basename(os.path.dirname(path)) for path in paths}
    own = [path for path, folder in folders.items() if folder == label]
    named = [path for path, folder in folders.items() if folder not in labels and f'/{path}'.endswith(f'/{name}')]
    matches = own or named or [None]
    if len(matches) > 1:
        sys.exit(f'the images hold {name} more than once: {matches[0]} and {matches[1]}; remove one')
    return matches[0]


def class_list() -> list[tuple[str, str]]:
    """[(split, label)] of the expected classes."""
    return [(row['split'], row['class']) for row in read_classes(os.path.join(HERE, 'classes.csv'))]


def rows_from_names(files: Iterable[str]) -> list[tuple[str, str, str]]:
    """[(split, path, label)]: the class is an image's folder, or else the beginning of its name."""
    split_of, rows = {label: split for split, label in class_list()}, []
    for path in files:
        *folders, name = path.split('/')
        label = folders[-1] if folders and folders[-1] in split_of else (CLASS.match(name) or [None])[0]
        if label in split_of:
            rows.append((split_of[label], path, label))
    if not rows:
        sys.exit('neither the names of the images nor their folders tell their classes (like n01532829); '
                 'put train.csv, val.csv and test.csv beside them')
    return sorted(rows)


def read_rows(path: str) -> Iterator[tuple[str, str]]:
    """Yields (filename, label) of each row of a csv file."""
    try:
        _, rows = read_csv(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        sys.exit(f'{path} cannot be read: {error}')
    if not rows:
        sys.exit(f'{path} names no images; its first line is filename,label and then comes a line for each image')
    for number, row in rows.items():
        name, label = (row.get('filename') or '').strip(), (row.get('label') or '').strip()
        if not name or not label:
            sys.exit(f'line {number} of {path} has no filename or no label; its first line must be filename,label')
        if not is_plain_name(label) or not all(map(is_plain_name, name.split('/'))):
            sys.exit(f'line {number} of {path} has the filename {name!r} and the label {label!r}, which cannot be names of '
                     'a file and a folder')
        yield name, label


def check_rows(rows: Iterable[tuple[str, str, str]]) -> None:
    """Refuses an image that is listed twice and a class in two splits."""
    seen, split_of = {}, {}
    for split, name, label in rows:
        if (label, os.path.basename(name)) in seen:
            sys.exit(f'{name} of class {label} is listed twice, in {seen[label, os.path.basename(name)]}.csv and {split}.csv')
        seen[label, os.path.basename(name)] = split
        if split_of.setdefault(label, split) != split:
            sys.exit(f'the class {label} is in {split_of[label]}.csv and in {split}.csv; a class belongs to one split')


def find_pickle(source: str, split: str) -> str | None:
    """The path of a split's cached pickle, or None."""
    names = [f'mini-imagenet-cache-{name}.pkl' for name in ([split, 'validation'] if split == 'val' else [split])]
    return next((path for path in (os.path.join(source, name) for name in names) if os.path.exists(path)), None)


def from_pickles(args: argparse.Namespace) -> Contents:
    """Pictures from the three cached pickles; returns as `from_images`."""
    pictures, paths = [], {split: find_pickle(args.source, split) for split in SPLITS}
    missing = [f'mini-imagenet-cache-{split}.pkl' for split, path in paths.items() if path is None]
    if missing:
        sys.exit(f'{args.source} lacks {", ".join(missing)}: put all three there; --download says where they are')
    for split, path in paths.items():
        images, members = read_pickle(path)
        pictures += [Picture(f'{split}/{label}/{label}{number:08d}.png',
                             lambda image=images[index]: encode(Image.fromarray(image)))
                     for label, indices in sorted(members.items()) for number, index in enumerate(indices)]
    return pictures, dict.fromkeys(class_list(), IMAGES_PER_CLASS), [], list(paths.values())


def read_pickle(path: str) -> tuple[np.ndarray, dict[str, list[int]]]:
    """The images of a cached pickle, uint8 [images, 84, 84, 3], and {class: indices of its images}.

    Raises SystemExit if it is not such a pickle; or an image belongs to two classes, or twice to one.
    """
    data = load_pickle(read_part(path), path)
    images, classes = data.get('image_data'), data.get('class_dict')
    if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == (*SIZE, 3) and
            isinstance(classes, dict)):
        sys.exit(f'{path} does not hold image_data, bytes of shape [images, 84, 84, 3], and class_dict; download it again')
    seen = set()
    with refusing(f'class_dict in {path} cannot be used', pickles.Refused):
        members = pickles.with_text_keys(classes)
        for label, indices in members.items():
            members[label] = indices = pickles.integers(indices, most=len(images))
            if not is_plain_name(label) or not all(0 <= index < len(images) for index in indices):
                sys.exit(f'the class {label!r} in {path} has a name or indices that cannot be; download it again')
            if len(set(indices)) < len(indices) or not seen.isdisjoint(indices):
                sys.exit(f'the class {label!r} in {path} lists an image that is listed already; download it again')
            seen.update(indices)
    return images, members


def main() -> None:
    args = arguments(__doc__, HERE, HERE).parse_args()
    download.fetch('miniimagenet', args)
    has_images = any(os.path.exists(os.path.join(args.source, name)) for name in ('images', 'images.zip'))
    has_pickles = any(find_pickle(args.source, split) for split in SPLITS)
    pictures, expected, absent, inputs = (from_pickles if has_pickles and not has_images else from_images)(args)
    classes = {f'{split}/{label}': Class(split, expected.get((split, label), IMAGES_PER_CLASS)) for split, label in class_list()}
    prepare(pictures, classes, SIZE, args, inputs=inputs, absent=absent)


if __name__ == '__main__':
    run_script(main)
