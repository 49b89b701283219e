"""Prepares TripleMNIST: numbers of three digits of MNIST, 640 / 160 / 200 classes of 1000 images of 84x84 pixels.

    python data/triplemnist/proc_images.py --download

fetches MNIST's four idx files into data/mnist/, and writes the arrays data/triplemnist/{train,val,test}.npy, 7 gigabytes in all.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
from data import mnist, preparation  # noqa: E402

if __name__ == '__main__':
    preparation.run_script(lambda: mnist.main(__doc__, HERE, 84))
