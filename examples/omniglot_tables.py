"""Two tables from the drawings of Omniglot, reduced to 10x10 pixels.

    python examples/omniglot_tables.py data/omniglot_resized FOLDER

FOLDER/glyphs.csv: a drawing a row, its 100 pixels and its character, the class. FOLDER/pixels.csv: a pixel a row, its position and
how much ink it has (0 to 255); a task is the first drawing of a character.
"""
import csv
import glob
import os
import sys

import numpy as np
from PIL import Image


def write_tables(drawings: str, folder: str) -> None:
    """`drawings`: a folder of alphabet/character/drawing.png, as data/omniglot_resized is once it is prepared."""
    characters = sorted(glob.glob(os.path.join(drawings, '*', '*', '')))
    if not characters:
        sys.exit(f'{drawings} has no folders of characters: prepare Omniglot first, see docs/data.md')
    os.makedirs(folder, exist_ok=True)
    with (open(os.path.join(folder, 'glyphs.csv'), 'w', newline='', encoding='ascii') as glyphs_file,
          open(os.path.join(folder, 'pixels.csv'), 'w', newline='', encoding='ascii') as pixels_file):
        glyphs, pixels = csv.writer(glyphs_file), csv.writer(pixels_file)
        glyphs.writerow(['character', *(f'p{pixel}' for pixel in range(100))])
        pixels.writerow(['image', 'row', 'column', 'ink'])
        for number, character in enumerate(characters):
            for drawing, path in enumerate(sorted(glob.glob(os.path.join(character, '*.png')))):
                ink = 255 - np.asarray(Image.open(path).convert('L').resize((10, 10), Image.Resampling.BOX), int)
                glyphs.writerow([number, *ink.ravel()])
                if drawing == 0:
                    pixels.writerows([number, *place, ink[place]] for place in np.ndindex(ink.shape))


if __name__ == '__main__':
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    write_tables(*sys.argv[1:])
