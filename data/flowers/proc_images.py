"""Prepares VGG Flowers (Nilsback & Zisserman, 2008): 102 kinds, 8,189 images of 84x84 pixels, in the split of Meta-Dataset.

    python data/flowers/proc_images.py --download

fetches 102flowers.tgz and imagelabels.mat (https://www.robots.ox.ac.uk/~vgg/data/flowers/102/) into data/flowers/, and writes
data/flowers/classes/<class>/ and data/flowers/splits.csv.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
from data import image_sets, preparation  # noqa: E402

if __name__ == '__main__':
    preparation.run_script(lambda: image_sets.main(__doc__, HERE))
