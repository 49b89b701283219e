"""Prepares CIFAR-FS from CIFAR-100, 600 images of each class.

CIFAR-FS (Bertinetto et al., arXiv:1805.08136): the 100 fine classes split 64 / 16 / 20.

    python data/cifarfs/proc_images.py --download

fetches cifar-100-python.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html) into data/cifar100/, and writes
data/cifarfs/{train,val,test}/<class>/*.png.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
from data import cifar100, preparation  # noqa: E402

if __name__ == '__main__':
    preparation.run_script(lambda: cifar100.main(__doc__, HERE))
