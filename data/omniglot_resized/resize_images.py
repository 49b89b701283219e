"""Prepares Omniglot: 28x28 images of all 1623 characters from the two original archives.

    python data/omniglot_resized/resize_images.py --download

fetches images_background.zip and images_evaluation.zip (https://github.com/brendenlake/omniglot, folder python) into
data/omniglot/, and writes data/omniglot_resized/<alphabet>/<character>/<drawing>.png.

The originals are 1-bit images, which Pillow resizes by nearest neighbour whatever filter it is given. So did the reference
code, and so does this script; --antialias makes grey images with a real Lanczos filter instead.
"""
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence

from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
from data import download  # noqa: E402
from data.archives import Archive, is_there, open_archive  # noqa: E402
from data.preparation import Class, Picture, arguments, prepare, run_script  # noqa: E402
from data.reading import encode, is_plain_name, read_classes  # noqa: E402
from runtime.datasets.images import PREPARED_FORMATS, open_image  # noqa: E402

PARTS = ('images_background', 'images_evaluation')
SIZE = (28, 28)
DRAWING = re.compile(r'(?P<name>[^/.][^/]*/character\d+/\d+_\d+\.png)$')


def find_drawings(archives: Sequence[Archive], antialias: bool) -> list[Picture]:
    """Every drawing in the archives or folders, sorted by name; ignores other files."""
    matches = [(match['name'], archive, name) for archive in archives for name in archive.names() if (match := DRAWING.search(name))]
    return [Picture(drawing, lambda archive=archive, name=name: resize(archive.read(name), antialias))
            for drawing, archive, name in sorted(matches, key=lambda match: match[0]) if all(map(is_plain_name, drawing.split('/')))]


def resize(original: bytes, antialias: bool) -> bytes:
    """The content of a drawing's small PNG file, from that of the original."""
    with open_image(io.BytesIO(original), PREPARED_FORMATS) as image:
        return encode(image.convert('L' if antialias else '1').resize(SIZE, Image.Resampling.LANCZOS))


def describe(counts: Mapping[str, int]) -> str:
    """Text: how many alphabets, characters and images there are, from {alphabet/character: images}."""
    alphabets = {name.split('/')[0] for name in counts}
    return f'{len(alphabets)} alphabets / {len(counts)} characters / {sum(counts.values()):,} images'


def main() -> None:
    parser = arguments(__doc__, os.path.join(os.path.dirname(HERE), 'omniglot'), HERE)
    parser.add_argument('--antialias', action='store_true', help='grey images, filtered (unlike the reference)')
    args = parser.parse_args()
    recipe = f'antialias={args.antialias}'
    download.fetch('omniglot', args, recipe)
    parts = [part for part in PARTS if is_there(args, part + '.zip', part)] if args.allow_missing else []
    archives = [open_archive(args, part + '.zip', part) for part in parts or PARTS]
    classes = {row['class']: Class(row['split'], images=20) for row in read_classes(os.path.join(HERE, 'splits.csv'))}
    prepare(find_drawings(archives, args.antialias), classes, SIZE, args, recipe, describe=describe,
            inputs=[archive.path for archive in archives])


if __name__ == '__main__':
    run_script(main)
