"""Prepares DoubleMNIST: numbers of two digits of MNIST, 64 / 16 / 20 classes of 1000 images of 64x64 pixels.

    python data/doublemnist/proc_images.py --download

fetches MNIST's four idx files into data/mnist/, and writes the arrays data/doublemnist/{train,val,test}.npy, half a gigabyte in
all.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
from data import mnist, preparation  # noqa: E402

if __name__ == '__main__':
    preparation.run_script(lambda: mnist.main(__doc__, HERE, 64))
