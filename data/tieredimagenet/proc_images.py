"""Prepares tieredImageNet (Ren et al., 2018): 351 / 97 / 160 classes of ImageNet, 779,165 images of 84x84 pixels.

Put into data/tieredimagenet/ one of

    {train,val,test}_images_png.pkl and {train,val,test}_labels.pkl, of Ren's tiered-imagenet.tar
        (https://github.com/renmengye/few-shot-ssl-public), or the same files of https://zenodo.org/record/7978538, whose names begin
        with tiered-imagenet-
    {train,val,test}_images.npz and {train,val,test}_labels.pkl, which others unpacked the former to
    folders {train,val,test}/<wnid>/ of images (as of https://github.com/icoz69/DeepEMD)
    your own ILSVRC2012: a folder train/<wnid>/ of the original images, of which 608 folders are read

and run, there or anywhere,

    python data/tieredimagenet/proc_images.py

These files must be downloaded manually, so --download only prints where they are and checks those present. The script writes the
arrays data/tieredimagenet/{train,val,test}.npy, 16.5 gigabytes in all; run again, it leaves complete splits as they are.
Images of other sizes are resized with a Lanczos filter.
"""
import argparse
import collections
import io
import os
import sys
import zipfile
from typing import IO

import numpy as np
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
from data import download, pickles  # noqa: E402
from data.packing import ImageList, pack  # noqa: E402
from data.preparation import Class, arguments, run_script  # noqa: E402
from data.reading import LARGEST_PICTURE, is_plain_name, load_pickle, read_classes, read_part, read_picture, refusing  # noqa: E402
from runtime.datasets.arrays import map_array  # noqa: E402
from runtime.datasets.images import PREPARED_FORMATS, open_image  # noqa: E402
from runtime.datasets.tasks import SPLITS  # noqa: E402
from runtime.system.files import open_regular  # noqa: E402

SHAPE = (84, 84, 3)
SUFFIXES = ('.jpg', '.jpeg', '.png')
FILES = PICTURES, ARRAY, LABELS = '_images_png.pkl', '_images.npz', '_labels.pkl'  # of a split, after its name
PREFIXES = '', 'tiered-imagenet-'                        # before it; the second is Zenodo's
UNPACKED = 'tiered-imagenet', 'tiered_imagenet'          # the folders in Ren's and DeepEMD's archives
Rows = list[dict[str, str]]    # of classes.csv
Lists = dict[str, ImageList]   # by class


def decode(content: bytes) -> np.ndarray:
    """An image file as uint8 [84, 84, 3], resized if it is of another size; raises one of DAMAGE."""
    with open_image(io.BytesIO(content), PREPARED_FORMATS) as image:
        pixels = image.convert('RGB')
        return np.asarray(pixels if pixels.size == SHAPE[:2] else pixels.resize(SHAPE[:2], Image.Resampling.LANCZOS))


def file_of(source: str, split: str, end: str) -> str:
    """The path of a split's file under the first of the names that it may have and that is there; under its first name if none is."""
    paths = [os.path.join(source, prefix + split + end) for prefix in PREFIXES]
    return next(filter(os.path.exists, paths), paths[0])


# Each of these returns {class: ImageList} of a split, or None where the source has nothing of its kind.

def from_pickle(source: str, split: str, rows: Rows, args: argparse.Namespace) -> Lists | None:
    """Of PNG files in a pickled list, which are read directly from it."""
    path = file_of(source, split, PICTURES)
    if not os.path.exists(path):
        return None
    file = open_regular(path, 'rb')
    with refusing(f'{path} cannot be read as a pickled list of images', pickles.Refused):
        spans = pickles.spans(file)
    return {name: ImageList(len(indices), lambda number, indices=indices: decode(read_span(file, spans[indices[number]])))
            for name, indices in read_labels(source, split, rows, len(spans)).items()}


def read_span(file: IO[bytes], span: pickles.Span) -> bytes:
    """The bytes of a picture within a pickle. Raises ValueError if they are too many for one."""
    if span.length > LARGEST_PICTURE:
        raise ValueError(f'it has {span.length:,} bytes')
    return os.pread(file.fileno(), span.length, span.offset)


def from_npz(source: str, split: str, rows: Rows, args: argparse.Namespace) -> Lists | None:
    """Of an array in an .npz file, which is memory-mapped."""
    path = file_of(source, split, ARRAY)
    if not os.path.exists(path):
        return None
    images = map_npz(path)
    if images.dtype != np.uint8 or images.shape[1:] != SHAPE:
        sys.exit(f'{path} holds {images.dtype} {list(images.shape)} instead of bytes [images, 84, 84, 3]; download it again')
    channels = slice(None, None, -1 if args.channels == 'bgr' else 1)
    return {name: ImageList(len(indices), lambda number, indices=indices: images[indices[number]][..., channels])
            for name, indices in read_labels(source, split, rows, len(images)).items()}


def map_npz(path: str) -> np.memmap:
    """The array `images` of an .npz file, memory-mapped. Raises SystemExit if it is not there, or compressed."""
    with refusing(f'{path} cannot be used'):
        with open_regular(path, 'rb') as file, zipfile.ZipFile(file) as archive:
            member = archive.getinfo('images.npy')
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError('it is compressed; write it again by numpy.savez')
            file.seek(member.header_offset + 26)  # of the local header: the lengths of the name and of what comes after it
            lengths = file.read(4)
            file.seek(int.from_bytes(lengths[:2], 'little') + int.from_bytes(lengths[2:], 'little'), os.SEEK_CUR)
            return map_array(file)


def read_labels(source: str, split: str, rows: Rows, count: int) -> dict[str, list[int]]:
    """{class: indices of its images} from a split's pickle of labels: indices of names, whose classes are in classes.csv."""
    path = file_of(source, split, LABELS)
    entries = load_pickle(read_part(path), path)
    wnids = {row['name']: row['class'] for row in rows} | {row['class']: row['class'] for row in rows}
    with refusing(f'label_specific or label_specific_str in {path} cannot be used', pickles.Refused):
        labels, names = pickles.integers(entries.get('label_specific'), count), pickles.texts(entries.get('label_specific_str'))
    if len(labels) != count or not all(0 <= label < len(names) for label in set(labels)):
        sys.exit(f'the labels in {path} do not fit its {count} images and {len(names)} names; download it again')
    hostile = [name for name in names if not is_plain_name(name)]
    if hostile:
        sys.exit(f'{path} names a class {hostile[0][:50]!r}, which cannot be the name of a folder; download it again')
    indices = collections.defaultdict(list)
    for index, label in enumerate(labels):
        indices[wnids.get(names[label], names[label])].append(index)
    return indices


def from_folders(source: str, split: str, rows: Rows, args: argparse.Namespace) -> Lists | None:
    """Of images in <split>/<wnid>/, train/<wnid>/ (of ILSVRC2012) or <wnid>/."""
    images = {}
    for row in [row for row in rows if row['split'] == split]:
        folders = [os.path.join(source, *parts, row['class']) for parts in ([split], ['train'], [])]
        lists = [sorted(entry.path for entry in os.scandir(folder) if entry.name.lower().endswith(SUFFIXES))
                 for folder in folders if os.path.isdir(folder)]
        if lists:
            # ILSVRC2012's own val, sorted into folders, has 50 pictures of each class, which are none of tieredImageNet.
            paths = next((paths for paths in lists if len(paths) == int(row['images'])), max(lists, key=len))
            images[row['class']] = ImageList(len(paths), lambda number, paths=paths: decode(read_picture(paths[number])))
    return images or None


def main() -> None:
    parser = arguments(__doc__, HERE, HERE)
    parser.add_argument('--channels', choices=['bgr', 'rgb'], default='bgr',
                        help='order of the colours in .npz files: most were unpacked by OpenCV, blue first (default: %(default)s)')
    args = parser.parse_args()
    recipe = f'channels={args.channels}'
    download.fetch('tieredimagenet', args, recipe)
    source = next(filter(os.path.isdir, (os.path.join(args.source, name) for name in UNPACKED)), args.source)
    rows = read_classes(os.path.join(HERE, 'classes.csv'))
    lists = {}
    for split in SPLITS:
        images = (from_pickle(source, split, rows, args) or from_npz(source, split, rows, args)
                  or from_folders(source, split, rows, args) or {})
        lists |= {f'{split}/{name}': class_images for name, class_images in images.items() if class_images.count}
    if not lists:
        sys.exit(f'{source} holds neither train_images_png.pkl nor train_images.npz nor folders of images like '
                 'train/n01530575; put them there (a .tar must be unpacked), or name their folder with --source')
    inputs = [file_of(source, split, end) for split in SPLITS for end in (*FILES, '')]
    elsewhere = [] if os.path.realpath(source) == os.path.realpath(args.destination) else [source]
    pack(lists, {f'{row["split"]}/{row["class"]}': Class(row['split'], int(row['images'])) for row in rows}, SHAPE, args,
         recipe=recipe, inputs=list(filter(os.path.exists, inputs)) or elsewhere)


if __name__ == '__main__':
    run_script(main)
