"""Prepares sets of photographs that come as one archive: a table of their properties, and one way to make class folders.

The pictures go to <destination>/classes/<class>/, resized with a Lanczos filter to one size, without keeping the aspect ratio.
The split of each class is written to <destination>/splits.csv. So another --split moves no picture.
"""
import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from data import download
from data.archives import Archive, open_archive, read_text
from data.mat_files import read_array
from data.preparation import Class, Picture, arguments, prepare
from data.reading import MEGABYTE, fit, is_plain_name, read_classes, read_file, refusing
from runtime.datasets.images import PREPARED_FORMATS

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels


class ImageSet(NamedTuple):
    """A set of photographs."""
    archive: str           # its file
    folder: str            # the folder that it unpacks to
    picture: re.Pattern    # of the paths of its pictures: the group `file`, and `class` if there are no labels
    size: int              # pixels, height and width
    formats: tuple[str, ...] = PREPARED_FORMATS
    labels: Callable | None = None  # function of archive and source that returns {file: class}
    boxes: Callable | None = None   # function of the archive that returns {file: Box}
    crop: bool = False     # whether pictures are cropped to the boxes, if no flag says otherwise


def aircraft_labels(archive: Archive, source: str) -> dict[str, str]:
    """Variants; the / in two of their names cannot be in the name of a folder."""
    return {file: variant.replace('/', '_') for part in ('trainval', 'test')
            for file, variant in pairs(read_text(archive, f'data/images_variant_{part}.txt'))}


def aircraft_boxes(archive: Archive) -> dict[str, Box]:
    """Boxes that leave out the banner below each photograph. In the file they count from 1 and include their last pixels."""
    boxes = {file: box_numbers(box) for file, box in pairs(read_text(archive, 'data/images_box.txt'))}
    return {file: (left - 1, upper - 1, right, lower) for file, (left, upper, right, lower) in boxes.items()}


def cub_boxes(archive: Archive) -> dict[str, Box]:
    """{picture: (left, upper, right, lower)} in pixels, of bounding_boxes.txt."""
    paths = dict(pairs(read_text(archive, 'images.txt')))
    sizes = {number: box_numbers(box) for number, box in pairs(read_text(archive, 'bounding_boxes.txt'))}
    boxes = {}
    for number, path in paths.items():
        left, upper, width, height = sizes.get(number, (0, 0, 0, 0))
        boxes[os.path.splitext(path)[0].rsplit('/', 1)[-1]] = left, upper, left + width, upper + height
    return boxes


def flowers_labels(archive: Archive, source: str) -> dict[str, str]:
    """Numbers from 001 to 102, of imagelabels.mat beside the archive: there are no official names."""
    path = os.path.join(source, 'imagelabels.mat')
    with refusing(f'{path} cannot be read', advice='fetch it by --download'):
        labels = read_array(read_file(path, MEGABYTE // 16), 'labels')
        return {f'image_{number:05d}': f'{int(label):03d}' for number, label in enumerate(labels, start=1)}


def pairs(lines: Sequence[list[str]]) -> list[tuple[str, str]]:
    """Lines of two parts. Raises SystemExit if one is not."""
    bad = next((line for line in lines if len(line) != 2), None)
    if bad:
        sys.exit(f'the download has a line {" ".join(bad)[:50]!r} where there should be two parts; download it again')
    return [(first, second.strip()) for first, second in lines]


def box_numbers(text: str) -> Box:
    """Four numbers. Raises SystemExit if it is anything else."""
    try:
        left, upper, right, lower = map(float, text.split())
        return left, upper, right, lower
    except ValueError:
        sys.exit(f'the download has a box {text[:50]!r} instead of four numbers; download it again')


SETS = {
    'cub': ImageSet('CUB_200_2011.tgz', 'CUB_200_2011', re.compile(r'(?:^|/)images/(?P<class>\d{3}\.[^/]+)/(?P<file>[^/]+)\.jpg$'),
                    84, boxes=cub_boxes),
    'flowers': ImageSet('102flowers.tgz', 'jpg', re.compile(r'(?:^|/)(?P<file>image_\d{5})\.jpg$'), 84, labels=flowers_labels),
    'aircraft': ImageSet('fgvc-aircraft-2013b.tar.gz', 'fgvc-aircraft-2013b',
                         re.compile(r'(?:^|/)data/images/(?P<file>\d{7})\.jpg$'), 84, labels=aircraft_labels,
                         boxes=aircraft_boxes, crop=True),
    'dtd': ImageSet('dtd-r1.0.1.tar.gz', 'dtd', re.compile(r'(?:^|/)images/(?P<class>[a-z-]+)/(?P<file>[^/]+)\.jpg$'), 84),
    'gtsrb': ImageSet('GTSRB_Final_Training_Images.zip', 'GTSRB',
                      re.compile(r'(?:^|/)Images/(?P<class>\d{5})/(?P<file>\d{5}_\d{5})\.ppm$'), 32, formats=('PPM',)),
}


def find_pictures(image_set: ImageSet, archive: Archive, source: str, crop: bool) -> list[Picture]:
    """The pictures of a set, in the order of its archive."""
    labels = image_set.labels(archive, source) if image_set.labels else {}
    boxes = image_set.boxes(archive) if crop else None
    hostile = next((label for label in labels.values() if not is_plain_name(label)), None)
    if hostile:
        sys.exit(f'the download names a class {hostile[:50]!r}, which cannot be the name of a folder; download it again')
    pictures = []
    for name in archive.names():
        match = image_set.picture.search(name)
        if match and all(map(is_plain_name, match.groupdict().values())):
            label = match['class'] if not image_set.labels else labels.get(match['file'], 'unknown')
            path = f'classes/{label}/{match["file"]}{".jpg" if "JPEG" in image_set.formats else ".png"}'
            pictures.append(Picture(path, lambda name=name, file=match['file']: encode(archive, name, file, image_set, boxes)))
    if not pictures:
        sys.exit(f'there are no pictures like those of {image_set.archive} in {source}; download it again')
    return pictures


def encode(archive: Archive, name: str, file: str, image_set: ImageSet, boxes: Mapping[str, Box] | None) -> bytes:
    """The content of a picture's file; raises one of DAMAGE."""
    if boxes is not None and file not in boxes:
        raise ValueError('it has no box')
    return fit(archive.read(name), (image_set.size, image_set.size), boxes and boxes[file], image_set.formats)


def main(description: str, folder: str) -> None:
    """Prepares the set that is called like the script's folder, by the list of classes there.

    classes.csv has a column `class`, `images` (how many), and `split`, or one column for each of several published splits, the
    first of them being the default.
    """
    name = os.path.basename(folder)
    image_set, rows = SETS[name], read_classes(os.path.join(folder, 'classes.csv'))
    splits = [column for column in rows[0] if column not in ('class', 'images', 'name')]
    parser = arguments(description, folder, folder)
    if len(splits) > 1:
        parser.add_argument('--split', choices=splits, default=splits[0], help='which published split (default: %(default)s)')
    if image_set.boxes:
        parser.add_argument('--crop', action=argparse.BooleanOptionalAction, default=image_set.crop,
                            help='crop the pictures to the boxes around their objects (default: %(default)s)')
    args = parser.parse_args()
    facts = {flag: vars(args)[flag] for flag in ('split', 'crop') if flag in vars(args)}
    recipe = f'crop={facts["crop"]}' if image_set.boxes else ''
    download.fetch(name, args, recipe, facts)
    classes = {f'classes/{row["class"]}': Class(row[facts.get('split', 'split')], int(row['images'])) for row in rows}
    archive = open_archive(args, image_set.archive, image_set.folder)
    prepare(find_pictures(image_set, archive, args.source, facts.get('crop', False)), classes, (image_set.size, image_set.size), args,
            recipe, inputs=[archive.path], facts=facts, manifest=True)
