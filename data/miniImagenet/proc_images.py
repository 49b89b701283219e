"""Prepares MiniImagenet (Vinyals et al., 2016) in the split of Ravi & Larochelle (2017): 64 / 16 / 20 classes of 600 images.

Put into data/miniImagenet/ one of

    images.zip, or its unpacked folder images/, with train.csv, val.csv and test.csv (columns filename,label); without the
        csv files the classes are told by the images' names (n01532829...jpg) or folders (images/n01532829/...)
    mini-imagenet-cache-train.pkl, mini-imagenet-cache-val.pkl and mini-imagenet-cache-test.pkl

and run, there or anywhere,

    python data/miniImagenet/proc_images.py

It writes data/miniImagenet/{train,val,test}/<label>/, 84x84 pixels. Images of that size are copied byte for byte, others
are resized with a Lanczos filter and kept as PNG. It may be interrupted and run again. The classes of each split are in
data/miniImagenet/classes.csv.
"""
import collections
import csv
import io
import os
import re
import sys

import numpy as np
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from preparation import Class, Picture, Zip, arguments, encode_png, is_plain_name, load_pickle, prepare, \
    read_classes  # noqa: E402

SPLITS = ('train', 'val', 'test')
SIZE = (84, 84)
IMAGES_PER_CLASS = 600
IMAGE = re.compile(r'\.(jpe?g|png)$', re.IGNORECASE)
CLASS = re.compile(r'n\d{8}')


def from_images(source):
    """(pictures, expected images of each class) from images.zip or images/, by the csv files or else by names."""
    files = find_images(source)
    listed = {split: os.path.join(source, split + '.csv') for split in SPLITS}
    missing = [path for path in listed.values() if not os.path.exists(path)]
    if missing:
        print(f'{missing[0]} is not there: classes are told by the names of images and folders')
        rows = rows_from_names(files)
        expected = dict.fromkeys(class_list(), IMAGES_PER_CLASS)
    else:
        rows = [(split, *row) for split, path in listed.items() for row in read_rows(path)]
        check_rows(rows)
        expected = collections.Counter((split, label) for split, _, label in rows)
        absent = [name for _, name, _ in rows if name not in files]
        if len(absent) == len(rows):
            sys.exit(f'none of the {len(rows)} images that the csv files in {source} name is in its images')
    pictures = [picture(f'{split}/{label}', name, files[name]) for split, name, label in rows if name in files]
    return pictures, expected


def find_images(source):
    """{path within images.zip or images/, and its last component: function that returns the file's content}."""
    folder, archive = os.path.join(source, 'images'), os.path.join(source, 'images.zip')
    if os.path.isdir(folder):
        paths = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]
        readers = {os.path.relpath(path, folder).replace(os.sep, '/'): lambda path=path: read_file(path) for path in paths}
    elif os.path.exists(archive):
        members = Zip(archive)
        readers = {name: lambda name=name: members.read(name) for name in members.names()}
    else:
        sys.exit(f'{source} holds neither images.zip, nor a folder images, nor mini-imagenet-cache-train.pkl; put one of '
                 'them there, or name its folder with --source')
    readers = {name: read for name, read in sorted(readers.items()) if IMAGE.search(name)}
    if not readers:
        sys.exit(f'there are no images in {folder if os.path.isdir(folder) else archive}')
    return readers | {name.rsplit('/', 1)[-1]: read for name, read in readers.items()}


def class_list():
    """[(split, label)] of the classes that there should be."""
    return [(row['split'], row['class']) for row in read_classes(os.path.join(HERE, 'classes.csv'))]


def rows_from_names(files):
    """[(split, path, label)]: a class is told by an image's folder, or else by the beginning of its name."""
    split_of = {label: split for split, label in class_list()}
    rows = {}
    for path in sorted(files, key=lambda path: -path.count('/')):  # paths before their last components
        *folders, name = path.split('/')
        label = folders[-1] if folders and folders[-1] in split_of else (CLASS.match(name) or [None])[0]
        if label in split_of:
            rows.setdefault(name, (split_of[label], path, label))
    if not rows:
        sys.exit('neither the names of the images nor their folders tell their classes (like n01532829); '
                 'put train.csv, val.csv and test.csv beside them')
    return sorted(rows.values())


def read_rows(path):
    """[(filename, label)] of a csv file."""
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        sys.exit(f'{path} cannot be read: {error}')
    if not rows:
        sys.exit(f'{path} names no images; its first line is filename,label and then comes a line for each image')
    for number, row in enumerate(rows, start=2):
        name, label = (row.get('filename') or '').strip(), (row.get('label') or '').strip()
        if not name or not label:
            sys.exit(f'line {number} of {path} has no filename or no label; its first line must be filename,label')
        if not is_plain_name(label) or not all(map(is_plain_name, name.split('/'))):
            sys.exit(f'line {number} of {path} has the filename {name!r} and the label {label!r}, which cannot be names of '
                     'a file and a folder')
        yield name, label


def check_rows(rows):
    """Refuses an image that is listed twice and a class in two splits."""
    seen, split_of = {}, {}
    for split, name, label in rows:
        if (label, os.path.basename(name)) in seen:
            sys.exit(f'{name} of class {label} is listed twice, in {seen[label, os.path.basename(name)]}.csv and {split}.csv')
        seen[label, os.path.basename(name)] = split
        if split_of.setdefault(label, split) != split:
            sys.exit(f'the class {label} is in {split_of[label]}.csv and in {split}.csv; a class belongs to one split')


def read_file(path):
    with open(path, 'rb') as file:
        return file.read()


def picture(folder, name, read):
    """The Picture of an image file; named .png where it must be resized, which is known once it is read."""
    return Picture(f'{folder}/{os.path.basename(name)}', lambda: fit(read()))


def fit(content):
    """An image file's content, if it is 84x84 and can be decoded; else that of a PNG of it at that size."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        return content if image.size == SIZE else encode_png(image.convert('RGB').resize(SIZE, Image.Resampling.LANCZOS))


def from_pickles(source):
    """(pictures, expected images of each class) from the three cached pickles."""
    pictures = []
    for split in SPLITS:
        path = os.path.join(source, f'mini-imagenet-cache-{split}.pkl')
        if not os.path.exists(path):
            sys.exit(f'{path} is missing')
        data = load_pickle(read_file(path), path)
        images, members = np.asarray(data.get('image_data')), data.get('class_dict')
        if images.dtype != np.uint8 or images.shape[1:] != (*SIZE, 3) or not isinstance(members, dict):
            sys.exit(f'{path} does not hold image_data, bytes of shape [images, 84, 84, 3], and class_dict; download it again')
        for label, indices in sorted(members.items()):
            label = label.decode() if isinstance(label, bytes) else str(label)
            if not is_plain_name(label) or not all(0 <= index < len(images) for index in indices):
                sys.exit(f'the class {label!r} in {path} has a name or indices that cannot be; download it again')
            pictures += [Picture(f'{split}/{label}/{label}{number:08d}.png', lambda image=images[index]: encode_png(image))
                         for number, index in enumerate(indices)]
    return pictures, dict.fromkeys(class_list(), IMAGES_PER_CLASS)


def main():
    args = arguments(__doc__, HERE, HERE).parse_args()
    has_images = any(os.path.exists(os.path.join(args.source, name)) for name in ('images', 'images.zip'))
    has_pickles = any(os.path.exists(os.path.join(args.source, f'mini-imagenet-cache-{split}.pkl')) for split in SPLITS)
    pictures, expected = (from_pickles if has_pickles and not has_images else from_images)(args.source)
    classes = {f'{split}/{label}': Class(split, expected.get((split, label), IMAGES_PER_CLASS))
               for split, label in class_list()}
    prepare(pictures, classes, SIZE, args, inputs=[os.path.join(args.source, 'images')])


if __name__ == '__main__':
    main()
