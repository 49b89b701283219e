"""Prepares FGVC-Aircraft (Maji et al., 2013): 100 variants of 100 images, 84x84 pixels.

    python data/aircraft/proc_images.py --download

fetches fgvc-aircraft-2013b.tar.gz (https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/) into data/aircraft/, and writes
data/aircraft/classes/<class>/ and data/aircraft/splits.csv.

The photographs are cropped to the boxes around the aircraft, as others do, because a banner below each names its owner; --no-crop
leaves them whole. --split=metadataset has 70 / 15 / 15 classes, frn (Wertheimer et al., 2021) 50 / 25 / 25.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
from data import image_sets, preparation  # noqa: E402

if __name__ == '__main__':
    preparation.run_script(lambda: image_sets.main(__doc__, HERE))
