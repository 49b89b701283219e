"""Prepares CUB-200-2011 (Wah et al., 2011): photographs of 200 birds, 11,788 images of 84x84 pixels.

    python data/cub/proc_images.py --download

fetches CUB_200_2011.tgz (https://data.caltech.edu/records/65de6-vp158) into data/cub/, and writes data/cub/classes/<class>/
and data/cub/splits.csv.

Several splits are published under this name: --split=chen (Chen et al., 2019: 100 / 50 / 50 classes; of torchmeta, too), frn
(Wertheimer et al., 2021: the same rule, but its train classes are exactly chen's val and test classes), feat (Ye et al., 2020),
metadataset (Triantafillou et al., 2020: 140 / 30 / 30) or dn4 (Li et al., 2019: 130 / 20 / 50). --crop crops to the boxes
around the birds, as feat's images are. Both are recorded and appear in the results of evaluations.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
from data import image_sets, preparation  # noqa: E402

if __name__ == '__main__':
    preparation.run_script(lambda: image_sets.main(__doc__, HERE))
