"""Kills every part of the program at random moments, and looks for a state that is corrupt but marked complete.

    python benchmarks/kills.py --kills 200

The parts are a preparation, the cache of decoded images, a training, an evaluation with pictures, and a comparison. Each kill is
SIGKILL, at a moment drawn between the start of a process and somewhat after its usual end. After each, the files of the part are
compared with those of an undisturbed process; then the part is started again where the last one left off. Prints how many kills
hit a running process, and ends with status 1 if anything was corrupt but marked complete.
"""
import argparse
import csv
import glob
import io
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence

import numpy as np
from PIL import Image

from interruptions import ROOT, differences, write_images

sys.path.insert(0, ROOT)
from data.preparation import read_classes  # noqa: E402
from runtime.datasets.class_folders import PREPARATION_RECORD, ClassFolders  # noqa: E402

SHARES = {'preparation': 0.3, 'cache': 0.2, 'training': 0.15, 'evaluation': 0.2, 'comparison': 0.15}
IMAGE_SHAPE = (28, 28, 1)


def contents(folder: str, pattern: str) -> dict[str, bytes]:
    """{path below the folder: bytes} of the files that match."""
    return {os.path.relpath(path, folder): path.read_bytes() for path in pathlib.Path(folder).glob(pattern) if path.is_file()}


class Preparation:
    """MiniImagenet's script on a small archive. Every other process recreates everything, by --force."""

    def __init__(self, folder: str):
        self.source, self.destination, self.runs = os.path.join(folder, 'source'), os.path.join(folder, 'prepared'), 0
        os.makedirs(self.source)
        rng, rows = np.random.default_rng(0), {'train': [], 'val': [], 'test': []}
        with zipfile.ZipFile(os.path.join(self.source, 'images.zip'), 'w') as archive:
            for row in read_classes(os.path.join(ROOT, 'data', 'miniImagenet', 'classes.csv')):
                for number in range(4):
                    name, content = f'{row["class"]}{number:08d}.png', io.BytesIO()
                    Image.fromarray(rng.integers(0, 256, (84, 84, 3), np.uint8)).save(content, 'PNG')
                    archive.writestr(name, content.getvalue())
                    rows[row['split']].append((name, row['class']))
        for split, listed in rows.items():
            with open(os.path.join(self.source, split + '.csv'), 'w', newline='') as file:
                csv.writer(file).writerows([('filename', 'label'), *listed])
        run(self.command(self.destination))
        self.expected = contents(self.destination, '*/*/*.png')

    def command(self, destination: str | None = None) -> list[str]:
        self.runs += 1
        return [os.path.join(ROOT, 'data', 'miniImagenet', 'proc_images.py'), f'--source={self.source}',
                f'--destination={destination or self.destination}', *(['--force'] if self.runs % 2 else [])]

    def check(self) -> None:
        with open(os.path.join(self.destination, PREPARATION_RECORD), encoding='utf-8') as file:
            complete = json.load(file)['complete']
        images = contents(self.destination, '*/*/*.png')
        wrong = [name for name, content in images.items() if self.expected.get(name) != content]
        assert not wrong, f'{len(wrong)} files are wrong, first {wrong[0]}'
        assert len(images) == len(self.expected) or not complete, f'{len(images)} of {len(self.expected)} images, marked complete'


class Cache:
    """The cache of decoded images. A new image is added before each process, so that the cache is rebuilt."""

    def __init__(self, folder: str):
        self.root, self.runs = os.path.join(folder, 'images'), 0
        write_images(self.root, classes=60, images=30)

    def command(self) -> list[str]:
        self.runs += 1
        pixels = np.random.default_rng(self.runs).integers(0, 256, IMAGE_SHAPE[:2], np.uint8)
        Image.fromarray(pixels).save(os.path.join(self.root, f'class{self.runs % 60:02d}', f'later{self.runs}.png'))
        return ['-c', f'import sys; sys.path.insert(0, {ROOT!r})\nfrom runtime.datasets.class_folders import ClassFolders\n'
                      f'ClassFolders({self.root!r}, split_ratios=(64, 16, 20)).load("train", {IMAGE_SHAPE})']

    def check(self) -> None:
        source = ClassFolders(self.root, split_ratios=(64, 16, 20))
        for _ in range(2):  # from the files of the killed process, and from those of this check
            images = source.load('train', IMAGE_SHAPE)
            for number in range(0, len(images.names), 7):
                path = min(glob.glob(os.path.join(self.root, images.names[number], '*.png')))
                with Image.open(path) as image:
                    assert np.array_equal(np.asarray(image), images.values[images.starts[number]][..., 0]), f'{path} differs from the cache'


class Training:
    """A short training of a sinusoid, continued until it ends; then the next begins."""
    ITERATIONS = 3000

    def __init__(self, folder: str):
        self.logdir, self.number = os.path.join(folder, 'training'), 0
        run(self.command(self.logdir + '_undisturbed'))
        self.expected = self.checkpoints(self.logdir + '_undisturbed')

    def command(self, logdir: str | None = None) -> list[str]:
        return [os.path.join(ROOT, 'main.py'), '--norm=None', '--update_batch_size=10', f'--metatrain_iterations={self.ITERATIONS}',
                '--save_interval=500', f'--logdir={logdir or self.logdir + str(self.number)}']

    def checkpoints(self, logdir: str) -> dict[int, dict[str, np.ndarray]]:
        """{iteration of a checkpoint: its variables}, of those that can be found."""
        from runtime.jobs import checkpoints
        return {iteration: checkpoints.load(checkpoints.path(directory, iteration)).arrays
                for directory in glob.glob(os.path.join(glob.escape(logdir), 'cls_*')) for iteration in checkpoints.iterations(directory)}

    def check(self) -> None:
        saved = self.checkpoints(self.logdir + str(self.number))
        for iteration, arrays in saved.items():
            assert not differences(arrays, self.expected[iteration]), f'checkpoint {iteration} is not that of an undisturbed run'
        self.number += self.ITERATIONS in saved


class Evaluation:
    """An evaluation with pictures, of a trained sinusoid. Each starts without results, or with those of the one before."""
    FLAGS = ['--train=False', '--plot']

    def __init__(self, folder: str, training: Training):
        self.training, self.logdir, self.runs = training, training.logdir + '_undisturbed', 0
        run(self.command())
        self.directory, = glob.glob(os.path.join(glob.escape(self.logdir), 'cls_*'))
        self.expected, self.scores = self.files(), self.results()

    def command(self) -> list[str]:
        self.runs += 1
        return [*self.training.command(self.logdir), *self.FLAGS, f'--test_seed={self.runs % 3}']

    def files(self) -> dict[str, bytes]:
        """{name: content} of the files of evaluations."""
        return contents(self.directory, 'test_*.*') | contents(self.directory, 'evaluation_*.*')

    def results(self) -> dict[str, list]:
        path = os.path.join(self.directory, 'results.json')
        if not os.path.exists(path):
            return {}
        with open(path, encoding='utf-8') as file:
            return {str([entry['checkpoint'], entry['tasks']]): entry['scores'] for entry in json.load(file)['evaluations']}

    def check(self) -> None:
        for name, scores in self.results().items():
            assert self.scores.setdefault(name, scores) == scores and len(scores) == 600, f'{name} in results.json has changed'
        for name, content in self.files().items():
            if name.endswith('.png'):
                Image.open(io.BytesIO(content)).load()  # raises for half a picture
            else:
                assert self.expected.setdefault(name, content) == content, f'{name} has changed'


class Comparison:
    """A comparison with its picture."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation = evaluation

    def command(self) -> list[str]:
        return [os.path.join(ROOT, 'main.py'), '--compare', self.evaluation.logdir, self.evaluation.logdir + '2', '--plot']

    def check(self) -> None:
        self.evaluation.check()
        for picture in contents(self.evaluation.logdir, 'comparison*.png').values():
            Image.open(io.BytesIO(picture)).load()


def run(command: Sequence[str]) -> float:
    """A Python process that must succeed; returns its seconds."""
    started = time.monotonic()
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT, capture_output=True)
    return time.monotonic() - started


def kill_at(command: Sequence[str], seconds: float) -> bool:
    """Starts a process and kills it after some seconds; returns whether it was still running."""
    try:
        subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=seconds)
        return False
    except subprocess.TimeoutExpired:  # run has killed it
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=200)
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    rng, wrong = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        training = Training(folder)
        evaluation = Evaluation(folder, training)
        other = evaluation.logdir + '2'  # something to compare with
        run([*training.command(other), '--seed=1'])
        run([*training.command(other), '--seed=1', *Evaluation.FLAGS])
        parts = {'preparation': Preparation(folder), 'cache': Cache(folder), 'training': training, 'evaluation': evaluation,
                 'comparison': Comparison(evaluation)}
        for name, part in parts.items():
            usual, met = max(run(part.command()) for _ in range(2)), 0  # two, because every other one does more
            kills = round(options.kills * SHARES[name])
            for _ in range(kills):
                met += kill_at(part.command(), rng.uniform(0, 1.1 * usual))
                try:
                    part.check()
                except Exception as error:  # an unreadable file is as wrong as a changed one
                    wrong += 1
                    print(f'{name}: {type(error).__name__}: {error}', flush=True)
            run(part.command())  # whatever was left, the next one must succeed
            part.check()
            print(f'{name}: {kills} kills, {met} of a running process (which usually takes {usual:.1f} s)', flush=True)
    print(f'{wrong} states were corrupt but marked complete')
    sys.exit(bool(wrong))


if __name__ == '__main__':
    main()
