"""Prepares Omniglot: 28x28 images of all 1623 characters from the two original archives.

Put images_background.zip and images_evaluation.zip (https://github.com/brendenlake/omniglot, folder python), or their
unpacked folders, into data/omniglot/, and run

    python data/omniglot_resized/resize_images.py

It writes data/omniglot_resized/<alphabet>/<character>/<drawing>.png and leaves the source as it is. It may be run again
at any time.

The originals are 1-bit images, which Pillow resizes by nearest neighbour whatever filter it is asked for. So did the
reference code, and so does this script; --antialias makes grey images with a real Lanczos filter instead.
"""
import argparse
import csv
import os
import re
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
PARTS = ('images_background', 'images_evaluation')
SIZE = (28, 28)
ALPHABETS, CHARACTERS, IMAGES = 50, 1623, 32460
DRAWING = re.compile(r'(?P<alphabet>[^/]+)/(?P<character>character\d+)/(?P<drawing>\d+_\d+\.png)$')


def find_drawings(source):
    """Every drawing in the source, archive or folder.

    Args:
        source: the folder that holds images_background and images_evaluation, each as a folder or as a .zip file.

    Returns:
        {'<alphabet>/<character>/<drawing>.png': function that opens the original as a binary file}
    """
    drawings = {}
    for part in PARTS:
        folder, archive = os.path.join(source, part), os.path.join(source, part + '.zip')
        if os.path.isdir(folder):
            for parent, _, names in os.walk(folder):
                for name in names:
                    path = os.path.join(parent, name)
                    add(drawings, path.replace(os.sep, '/'), lambda path=path: open(path, 'rb'))
        elif os.path.exists(archive):
            try:
                members = zipfile.ZipFile(archive)
            except zipfile.BadZipFile as error:
                sys.exit(f'{archive} is damaged ({error}); download it again')
            for name in members.namelist():
                add(drawings, name, lambda name=name, members=members: members.open(name))
        else:
            sys.exit(f'{source} holds neither {part}.zip nor a folder {part}; put the Omniglot archives there, '
                     'or name their folder with --source')
    return drawings


def add(drawings, path, opener):
    """Enters a drawing under its alphabet, character and name; passes over anything else that archives contain."""
    match = DRAWING.search(path)
    if match and not path.startswith('__MACOSX') and match['alphabet'] not in ('.', '..'):
        drawings['{alphabet}/{character}/{drawing}'.format(**match.groupdict())] = opener


def resize(opener, destination, antialias):
    """Writes one drawing in its small size; a file under its final name is always whole."""
    with opener() as file, Image.open(file) as image:
        small = (image.convert('L') if antialias else image.convert('1')).resize(SIZE, Image.Resampling.LANCZOS)
    small.save(destination + '.part', 'PNG')
    os.replace(destination + '.part', destination)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--source', default=os.path.join(HERE, os.pardir, 'omniglot'),
                        help='folder with the two archives or their unpacked folders (default: data/omniglot)')
    parser.add_argument('--destination', default=HERE,
                        help='folder to write to (default: data/omniglot_resized)')
    parser.add_argument('--antialias', action='store_true', help='grey images, really filtered (not as the reference)')
    args = parser.parse_args()
    source, destination = os.path.realpath(args.source), os.path.realpath(args.destination)

    for part in PARTS:
        original = os.path.join(source, part)
        if os.path.isdir(original) and os.path.commonpath([original, destination]) == original:
            sys.exit(f'the destination {destination} lies within the originals in {original}; name another folder with '
                     '--destination')

    drawings = find_drawings(source)
    damaged = []

    def work(name):
        try:
            resize(drawings[name], os.path.join(destination, name), args.antialias)
        except (SyntaxError, ValueError, zipfile.BadZipFile, zlib.error, Image.UnidentifiedImageError) as error:
            damaged.append((name, error))

    try:
        for folder in {os.path.dirname(name) for name in drawings}:
            os.makedirs(os.path.join(destination, folder), exist_ok=True)
        with ThreadPoolExecutor() as pool:
            for _ in tqdm(pool.map(work, sorted(drawings)), total=len(drawings), unit=' images', disable=None):
                pass
    except OSError as error:
        sys.exit(f'writing to {destination} failed: {error}')

    written = sorted(set(drawings) - {name for name, _ in damaged})
    characters = sorted({os.path.dirname(name) for name in written})
    alphabets = {os.path.dirname(name) for name in characters}
    print(f'{len(alphabets)} alphabets / {len(characters)} characters / {len(written):,} images in {destination}')
    complaints = [f'{name} cannot be decoded ({error})' for name, error in sorted(damaged)]
    if (len(alphabets), len(characters), len(written)) != (ALPHABETS, CHARACTERS, IMAGES):
        complaints.append(f'the whole of Omniglot is {ALPHABETS} alphabets / {CHARACTERS} characters / {IMAGES:,} images')
    known = {row['class'] for row in read_csv(os.path.join(HERE, 'splits.csv'))}
    missing, unknown = sorted(known - set(characters)), sorted(set(characters) - known)
    if missing:
        complaints.append(f'{len(missing)} characters are missing, first {missing[0]}')
    if unknown:
        complaints.append(f'{len(unknown)} characters are not known, first {unknown[0]}')
    if complaints:
        sys.exit('Not as it should be:\n' + '\n'.join('  ' + line for line in complaints)
                 + f'\nDownload the archives again into {source} and repeat this command.')


def read_csv(path):
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


if __name__ == '__main__':
    main()
