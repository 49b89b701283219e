"""Prepares DTD, the Describable Textures Dataset (Cimpoi et al., 2014): 47 textures of 120 images, 84x84 pixels, in the split of
Meta-Dataset.

    python data/dtd/proc_images.py --download

fetches dtd-r1.0.1.tar.gz (https://www.robots.ox.ac.uk/~vgg/data/dtd/) into data/dtd/, and writes data/dtd/classes/<class>/ and
data/dtd/splits.csv.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
from data import image_sets, preparation  # noqa: E402

if __name__ == '__main__':
    preparation.run_script(lambda: image_sets.main(__doc__, HERE))
