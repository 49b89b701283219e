"""Prepares Omniglot: 28x28 images of all 1623 characters from the two original archives.

    python data/omniglot_resized/resize_images.py --download

fetches images_background.zip and images_evaluation.zip (https://github.com/brendenlake/omniglot, folder python) into
data/omniglot/. Without --download, it reads the archives or their unpacked folders there. It writes
data/omniglot_resized/<alphabet>/<character>/<drawing>.png and leaves the source as it is. It may be run again at any time.

The originals are 1-bit images, which Pillow resizes by nearest neighbour whatever filter it is given. So did the reference
code, and so does this script; --antialias makes grey images with a real Lanczos filter instead.
"""
import io
import os
import re
import sys
from collections.abc import Callable, Mapping

from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
from data import download  # noqa: E402
from data.preparation import (  # noqa: E402
    PREPARED_FORMATS,
    Class,
    Picture,
    Zip,
    arguments,
    encode,
    is_plain_name,
    prepare,
    read_classes,
    read_picture,
    run_script,
)

PARTS = ('images_background', 'images_evaluation')
SIZE = (28, 28)
DRAWING = re.compile(r'(?P<name>[^/.][^/]*/character\d+/\d+_\d+\.png)$')


def find_drawings(source: str) -> dict[str, Callable[[], bytes]]:
    """Every drawing in the source, archive or folder; ignores other files.

    Args:
        source: the folder that holds images_background and images_evaluation, each as a folder or as a .zip file.

    Returns:
        {'<alphabet>/<character>/<drawing>.png': function that returns the content of the original}
    """
    drawings = {}
    for part in PARTS:
        folder, archive = os.path.join(source, part), os.path.join(source, part + '.zip')
        if os.path.isdir(folder):
            paths = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]
            found = {path.replace(os.sep, '/'): lambda path=path: read_picture(path) for path in paths}
        elif os.path.exists(archive):
            members = Zip(archive)
            found = {name: lambda name=name, members=members: members.read(name) for name in members.names()}
        else:
            sys.exit(f'{source} holds neither {part}.zip nor a folder {part}; put the Omniglot archives there, '
                     'or name their folder with --source')
        matches = [(DRAWING.search(path), read) for path, read in found.items()]
        drawings.update({match['name']: read for match, read in matches
                         if match and all(map(is_plain_name, match['name'].split('/')))})
    return drawings


def resize(original: bytes, antialias: bool) -> bytes:
    """The content of a drawing's small PNG file, from that of the original."""
    with Image.open(io.BytesIO(original), formats=PREPARED_FORMATS) as image:
        return encode(image.convert('L' if antialias else '1').resize(SIZE, Image.Resampling.LANCZOS))


def describe(counts: Mapping[str, int]) -> str:
    """Text: how many alphabets, characters and images there are, from {alphabet/character: images}."""
    alphabets = {name.split('/')[0] for name in counts}
    return f'{len(alphabets)} alphabets / {len(counts)} characters / {sum(counts.values()):,} images'


def main() -> None:
    parser = arguments(__doc__, os.path.join(os.path.dirname(HERE), 'omniglot'), HERE)
    parser.add_argument('--antialias', action='store_true', help='grey images, filtered (unlike the reference)')
    args = parser.parse_args()
    download.fetch('omniglot', args)
    pictures = [Picture(name, lambda read=read: resize(read(), args.antialias))
                for name, read in sorted(find_drawings(args.source).items())]
    classes = {row['class']: Class(row['split'], images=20) for row in read_classes(os.path.join(HERE, 'splits.csv'))}
    prepare(pictures, classes, SIZE, args, recipe=f'antialias={args.antialias}', describe=describe,
            inputs=[os.path.join(args.source, part) for part in PARTS])


if __name__ == '__main__':
    run_script(main)
