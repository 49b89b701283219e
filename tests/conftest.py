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
from runtime.errors import UserError  # noqa: E402

main.import_tensorflow()
from runtime import evaluation, training  # noqa: E402


def run_process(*arguments, cwd=ROOT):
    """Runs main.py as a user does, in a process of its own; returns the finished process."""
    return subprocess.run([sys.executable, os.path.join(ROOT, 'main.py'), *arguments], cwd=cwd, text=True,
                          capture_output=True, timeout=300)


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


def write_image_tree(root, classes, images, size, seed=0):
    """Writes <root>/<class>/<number>.png for each class.

    A class is a fixed random pattern of one or three channels; its images are that pattern with some values flipped, so that
    it can be learnt.

    Args:
        classes: class folders.
        images: how many of each.
        size: (height, width) or (height, width, 3).
    """
    rng = np.random.default_rng(seed)
    for name in classes:
        os.makedirs(root / name)
        pattern = rng.random(size) < 0.5
        for image in range(images):
            noisy = pattern ^ (rng.random(size) < 0.05)
            Image.fromarray((255 * noisy).astype(np.uint8)).save(root / name / f'{image:02d}.png')


def write_manifest(root, names):
    (root / 'splits.csv').write_text('split,class\n' + ''.join(f'{name.split("/")[1][:-2]},{name}\n' for name in names))


def class_names(train, val, test, pattern='{split}/{split}{number:02d}'):
    counts = {'train': train, 'val': val, 'test': test}
    return [pattern.format(split=split, number=number) for split in counts for number in range(counts[split])]


@pytest.fixture
def few_tasks(monkeypatch):
    """Validation and evaluation look at fewer tasks than they do for users."""
    monkeypatch.setattr(training, 'VALIDATION_TASKS', 10)
    monkeypatch.setattr(evaluation, 'TEST_TASKS', 40)
    monkeypatch.setattr(main.FLAGS['num_test_tasks'], 'default', 40)


@pytest.fixture(scope='session')
def small_data(tmp_path_factory):
    """{source: a small folder of images such as it wants}."""
    root = tmp_path_factory.mktemp('data')
    names = class_names(24, 21, 22, 'alphabet/{split}{number:02d}')
    write_image_tree(root / 'omniglot', names, images=6, size=(28, 28))
    write_manifest(root / 'omniglot', names)
    for source, size in ('miniimagenet', (84, 84, 3)), ('cifarfs', (32, 32, 3)), ('fc100', (32, 32, 3)):
        write_image_tree(root / source, class_names(6, 5, 5), images=20, size=size)
    write_image_tree(root / 'folder', [f'class {number}' for number in range(32)], images=4, size=(40, 30, 3))
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope='session')
def small_omniglot(small_data):
    """A folder like data/omniglot_resized with 24 + 21 + 22 classes of 6 images each."""
    return small_data['omniglot']
