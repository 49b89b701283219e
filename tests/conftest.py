"""What several tests need: the program's modules on the path, a small Omniglot, and main.py in a process of its own."""
import contextlib
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import main  # noqa: E402
from data_generator import UserError  # noqa: E402

main.import_tensorflow()


def run_process(*arguments, cwd=ROOT):
    """Runs main.py as a user does, in a process of its own; returns the finished process."""
    environment = {name: value for name, value in os.environ.items() if name != 'TF_CPP_MIN_LOG_LEVEL'}  # import_tensorflow's
    return subprocess.run([sys.executable, os.path.join(ROOT, 'main.py'), *arguments], cwd=cwd, text=True,
                          capture_output=True, timeout=300, env=environment)


def run_main(*arguments):
    """Runs main.py's main in this process, which saves the seconds that TensorFlow takes to start."""
    main.FLAGS.unparse_flags()
    main.main(['main.py', *arguments])


def run_ok(*arguments):
    """Runs main.py, which must succeed; returns what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run_main(*arguments)
    return printed.getvalue()


def error_of(*arguments):
    """Runs main.py, which must refuse; returns the sentence. That it becomes an exit status of 1: see test_refusal."""
    with pytest.raises((UserError, flags.Error)) as error:
        run_main(*arguments)
    sentence = str(error.value)
    assert '\n' not in sentence
    return sentence


def write_image_tree(root, splits, images, size, seed=0):
    """Writes <root>/alphabet/<class>/<number>.png for classes of the splits, and the manifest <root>/splits.csv.

    A class is a fixed random pattern; its images are that pattern with some pixels flipped, so that it can be learnt.
    """
    rng = np.random.default_rng(seed)
    rows = ['split,class']
    for split, classes in splits.items():
        for number in range(classes):
            name = f'alphabet/{split}{number:02d}'
            os.makedirs(root / name)
            pattern = rng.random(size) < 0.5
            for image in range(images):
                noisy = pattern ^ (rng.random(size) < 0.05)
                Image.fromarray((255 * noisy).astype(np.uint8)).save(root / name / f'{image:02d}.png')
            rows.append(f'{split},{name}')
    (root / 'splits.csv').write_text('\n'.join(rows) + '\n')


@pytest.fixture(scope='session')
def small_omniglot(tmp_path_factory):
    """A folder like data/omniglot_resized with 24 + 21 + 22 classes of 6 images each."""
    root = tmp_path_factory.mktemp('omniglot')
    write_image_tree(root, {'train': 24, 'val': 21, 'test': 22}, images=6, size=(28, 28))
    return root
