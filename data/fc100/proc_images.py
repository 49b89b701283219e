"""Prepares FC100 from CIFAR-100, 600 images of each class.

FC100 (Oreshkin et al., TADAM, arXiv:1805.10123): 60 / 20 / 20 classes, no superclass in two splits.

    python data/fc100/proc_images.py --download

fetches cifar-100-python.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html) into data/cifar100/, and writes
data/fc100/{train,val,test}/<class>/*.png.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
from data import cifar100, preparation  # noqa: E402

if __name__ == '__main__':
    preparation.run_script(lambda: cifar100.main(__doc__, HERE))
