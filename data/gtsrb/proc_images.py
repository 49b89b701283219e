"""Prepares GTSRB (Stallkamp et al., 2012): 43 German traffic signs, 39,209 images of 32x32 pixels, all of them for meta-test.

    python data/gtsrb/proc_images.py --download

fetches GTSRB_Final_Training_Images.zip (https://benchmark.ini.rub.de/gtsrb_dataset.html) into data/gtsrb/, and writes
data/gtsrb/classes/<class>/ and data/gtsrb/splits.csv.

Each track has 30 nearly identical images of one sign, taken as a car approaches it. Support and query examples of a task may
come from the same track, as in Meta-Dataset.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
from data import image_sets, preparation  # noqa: E402

if __name__ == '__main__':
    preparation.run_script(lambda: image_sets.main(__doc__, HERE))
