"""Kills every part of the program at random moments, and compares what is left with that of undisturbed processes.

    python benchmarks/kills.py --kills 250

The parts are a preparation, the cache of decoded images, trainings of a sinusoid and on images, an evaluation with pictures, and a
comparison. Trainings get SIGKILL or SIGTERM, the others SIGKILL, at a moment drawn between the start of a process and somewhat after
its usual end. After each kill the files of the part are checked, and it is started again where the last one left off. A training that
came to its end is compared with the undisturbed one, bit for bit: variables, record, console lines, summaries, evaluation. Prints how
many kills hit a running process, and ends with status 1 if anything was corrupt but marked complete, or differed.
"""
import argparse
import contextlib
import csv
import glob
import io
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from run_files import MAIN, ROOT

from data.reading import read_classes
from runtime.datasets.class_folders import PREPARATION_RECORD, ClassFolders

SHARES = {'preparation': 0.24, 'cache': 0.16, 'sinusoid': 0.16, 'images': 0.16, 'evaluation': 0.16, 'comparison': 0.12}
SINUSOID = ['--datasource=sinusoid', '--norm=None', '--update_batch_size=10', '--save_interval=500']
IMAGES = ['--datasource=folder', '--image_size=28', '--image_channels=1', '--num_filters=8', '--num_classes=3', '--update_batch_size=1',
          '--meta_batch_size=4', '--update_lr=0.4', '--save_interval=30']
IMAGE_SHAPE = (28, 28, 1)


def write_images(folder: str, classes: int, images: int) -> None:
    """Class folders of noisy random patterns."""
    rng = np.random.default_rng(0)
    for number in range(classes):
        os.makedirs(os.path.join(folder, f'class{number:02d}'))
        pattern = rng.random(IMAGE_SHAPE[:2]) < 0.5
        for image in range(images):
            pixels = 255 * (pattern ^ (rng.random(pattern.shape) < 0.05)).astype(np.uint8)
            Image.fromarray(pixels).save(os.path.join(folder, f'class{number:02d}', f'{image}.png'))


def contents(folder: str, pattern: str) -> dict[str, bytes]:
    """{path below the folder: bytes} of the files that match."""
    return {os.path.relpath(path, folder): path.read_bytes() for path in pathlib.Path(folder).glob(pattern) if path.is_file()}


class Outcome(NamedTuple):
    """The end of a process."""
    number: signal.Signals | None   # that it was sent; None: it ended before
    status: int
    output: str


class Part:
    """A part of the program: `command()` is the next process's, `check(outcome)` asserts that what it left is as it should be."""
    signals: tuple[signal.Signals, ...] = (signal.SIGKILL,)


class Preparation(Part):
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
        run(self.command())
        self.expected = contents(self.destination, '*/*/*.png')

    def command(self) -> list[str]:
        self.runs += 1
        return [os.path.join(ROOT, 'data', 'miniImagenet', 'proc_images.py'), f'--source={self.source}',
                f'--destination={self.destination}', *([] if self.runs % 2 else ['--force'])]

    def check(self, outcome: Outcome) -> None:
        with open(os.path.join(self.destination, PREPARATION_RECORD), encoding='utf-8') as file:
            complete = json.load(file)['complete']
        images = contents(self.destination, '*/*/*.png')
        wrong = [name for name, content in images.items() if self.expected.get(name) != content]
        assert not wrong, f'{len(wrong)} files are wrong, first {wrong[0]}'
        assert len(images) == len(self.expected) or not complete, f'{len(images)} of {len(self.expected)} images, marked complete'


class Cache(Part):
    """The cache of decoded images. A new image is added before each process, so that the cache is rebuilt."""

    def __init__(self, folder: str):
        self.root, self.runs = os.path.join(folder, 'cached'), 0
        write_images(self.root, classes=60, images=30)

    def command(self) -> list[str]:
        self.runs += 1
        pixels = np.random.default_rng(self.runs).integers(0, 256, IMAGE_SHAPE[:2], np.uint8)
        Image.fromarray(pixels).save(os.path.join(self.root, f'class{self.runs % 60:02d}', f'later{self.runs}.png'))
        return ['-c', f'import sys; sys.path.insert(0, {ROOT!r})\nfrom runtime.datasets.class_folders import ClassFolders\n'
                      f'ClassFolders({self.root!r}, split_ratios=(64, 16, 20)).load("train", {IMAGE_SHAPE})']

    def check(self, outcome: Outcome) -> None:
        source = ClassFolders(self.root, split_ratios=(64, 16, 20))
        for _ in range(2):  # from the files of the killed process, and from those of this check
            images = source.load('train', IMAGE_SHAPE)
            for number in range(0, len(images.names), 7):
                path = min(glob.glob(os.path.join(self.root, images.names[number], '*.png')))
                with Image.open(path) as image:
                    assert np.array_equal(np.asarray(image), images.values[images.starts[number]][..., 0]), f'{path} differs from the cache'


class Training(Part):
    """A short training, continued until it ends; then the next begins."""
    signals = signal.SIGKILL, signal.SIGTERM

    def __init__(self, folder: str, flags: Sequence[str], iterations: int):
        self.flags, self.iterations, self.runs, self.output = [*flags, f'--metatrain_iterations={iterations}'], iterations, 0, ''
        self.undisturbed = os.path.join(folder, 'undisturbed')
        self.logdir = self.undisturbed
        self.expected = self.results(run(self.command()))
        self.expected_checkpoints = self.checkpoints()
        self.logdir = os.path.join(folder, 'killed0')

    def command(self) -> list[str]:
        return [MAIN, *self.flags, f'--logdir={self.logdir}']

    def checkpoints(self) -> dict[int, dict[str, np.ndarray]]:
        """{iteration of a checkpoint: its variables and its record}."""
        from runtime.jobs import checkpoints
        directories = glob.glob(os.path.join(glob.escape(self.logdir), 'cls_*'))
        saved = [checkpoints.load(checkpoints.path(directory, iteration))
                 for directory in directories for iteration in checkpoints.iterations(directory)]
        return {checkpoint.record['iteration']: {**checkpoint.arrays, 'record': str(checkpoint.record)} for checkpoint in saved}

    def results(self, output: str) -> dict[str, Any]:
        """What a training that came to its end has printed, and its summaries and its evaluation."""
        import tensorflow as tf
        run([*self.command(), '--train=False'])
        directory, = glob.glob(os.path.join(glob.escape(self.logdir), 'cls_*'))
        with open(os.path.join(directory, 'results.json'), encoding='utf-8') as file:
            entry, = json.load(file)['evaluations']
        with open(os.path.join(directory, 'metrics.csv'), encoding='utf-8') as file:
            metrics = file.read()
        values = {'console': dict(re.findall(r'^(Iteration \d+): (.*)$', output, re.M)), 'summaries': {}, 'evaluation': entry['scores'],
                  'metrics': metrics}
        for path in sorted(glob.glob(os.path.join(glob.escape(directory), 'events*'))):
            with contextlib.suppress(tf.errors.DataLossError):  # a partial record of a killed process
                for event in tf.compat.v1.train.summary_iterator(path):
                    for value in event.summary.value:
                        values['summaries'][value.tag, event.step] = value.tensor.SerializeToString()
        return values

    def check(self, outcome: Outcome) -> None:
        number, status, output = outcome
        # SIGTERM makes a training save and stop; before it begins and after its end there is nothing to save.
        begun, ended = 'Training ' in output and 'iterations/s' in output, 'The last checkpoint is' in output
        assert number != signal.SIGTERM or not begun or ended or (status == 143 and 'Stopped by SIGTERM' in output), 'SIGTERM was ignored'
        self.output += output
        saved = self.checkpoints()
        for iteration in saved.keys() & self.expected_checkpoints:  # others are of SIGTERM
            assert not differences(saved[iteration], self.expected_checkpoints[iteration]), f'checkpoint {iteration} is another'
        if self.iterations in saved:
            differing = differences(self.results(self.output), self.expected)
            assert not differing, f'differs from the undisturbed training: {", ".join(differing)}'
            self.runs, self.output = self.runs + 1, ''
            self.logdir = os.path.join(os.path.dirname(self.logdir), f'killed{self.runs}')


class Evaluation(Part):
    """An evaluation with pictures, of a trained sinusoid. Each starts without results, or with those of the one before."""

    def __init__(self, training: Training):
        self.logdir, self.flags, self.runs = training.undisturbed, [*training.flags, '--train=False', '--plot'], 0
        run(self.command())
        self.directory, = glob.glob(os.path.join(glob.escape(self.logdir), 'cls_*'))
        self.expected, self.scores = self.files(), self.results()

    def command(self) -> list[str]:
        self.runs += 1
        return [MAIN, *self.flags, f'--logdir={self.logdir}', f'--test_seed={self.runs % 3}']

    def files(self) -> dict[str, bytes]:
        """{name: content} of the files of evaluations."""
        return contents(self.directory, 'test_*.*') | contents(self.directory, 'evaluation_*.*')

    def results(self) -> dict[str, list]:
        path = os.path.join(self.directory, 'results.json')
        if not os.path.exists(path):
            return {}
        with open(path, encoding='utf-8') as file:
            return {str([entry['checkpoint'], entry['tasks']]): entry['scores'] for entry in json.load(file)['evaluations']}

    def check(self, outcome: Outcome) -> None:
        for name, scores in self.results().items():
            assert self.scores.setdefault(name, scores) == scores and len(scores) == 600, f'{name} in results.json has changed'
        for name, content in self.files().items():
            if name.endswith('.png'):
                Image.open(io.BytesIO(content)).load()  # raises for half a picture
            else:
                assert self.expected.setdefault(name, content) == content, f'{name} has changed'


class Comparison(Part):
    """A comparison with its picture."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation, self.other = evaluation, evaluation.logdir + '2'
        training = [*evaluation.flags, f'--logdir={self.other}', '--seed=1']
        run([MAIN, *training, '--train=True'])
        run([MAIN, *training])

    def command(self) -> list[str]:
        return [MAIN, '--compare', self.evaluation.logdir, self.other, '--plot']

    def check(self, outcome: Outcome) -> None:
        self.evaluation.check(outcome)
        for picture in contents(self.evaluation.logdir, 'comparison*.png').values():
            Image.open(io.BytesIO(picture)).load()


def differences(values: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The names of entries that are not the same, bit for bit."""
    return [name for name in values.keys() | expected.keys()
            if name not in values or name not in expected or not np.array_equal(values[name], expected[name])]


def run(command: Sequence[str]) -> str:
    """The output of a Python process that must succeed."""
    outcome = run_and_kill(command, 600, signal.SIGKILL)
    if outcome.status:
        raise SystemExit(f'{" ".join(command)} failed: {outcome.output}')
    return outcome.output


def run_and_kill(command: Sequence[str], seconds: float, number: signal.Signals) -> Outcome:
    """A Python process that gets a signal after some seconds."""
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
            return Outcome(None, process.returncode, output)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            output, _ = process.communicate(timeout=600)
            return Outcome(number, process.returncode, output)


def kill_repeatedly(part: Part, kills: int, rng: random.Random) -> tuple[int, list[str]]:
    """Kills processes of a part: how many were running, and what was wrong afterwards. Then it is run to its end, which must succeed."""
    def run_to_end():
        started = time.monotonic()
        output = run(part.command())
        seconds = time.monotonic() - started
        part.check(Outcome(None, 0, output))
        return seconds

    usual, met, failures = run_to_end(), 0, []
    for _ in range(kills):
        outcome = run_and_kill(part.command(), rng.uniform(0, 1.1 * usual), rng.choice(part.signals))
        met += outcome.number is not None
        try:
            assert outcome.number or not outcome.status, outcome.output
            part.check(outcome)
        except Exception as error:  # an unreadable file is as wrong as a changed one
            failures.append(f'{type(error).__name__}: {error}')
    run_to_end()
    return met, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=250)
    parser.add_argument('--seed', type=int, default=0, help='of the moments and signals')
    options = parser.parse_args()
    from runtime.cli.startup import import_tensorflow
    import_tensorflow()
    rng, wrong = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        write_images(os.path.join(folder, 'data'), classes=20, images=4)
        sinusoid = Training(os.path.join(folder, 'sinusoid'), SINUSOID, 12_000)
        evaluation = Evaluation(sinusoid)
        parts = {'preparation': Preparation(folder), 'cache': Cache(folder), 'sinusoid': sinusoid,
                 'images': Training(os.path.join(folder, 'images'), [*IMAGES, f'--data_path={folder}/data'], 700),
                 'evaluation': evaluation, 'comparison': Comparison(evaluation)}
        for name, part in parts.items():
            kills = round(options.kills * SHARES[name])
            met, failures = kill_repeatedly(part, kills, rng)
            wrong += len(failures)
            print(f'{name}: {kills} kills, {met} of a running process', *failures, sep='\n  ', flush=True)
    print(f'{wrong} states were wrong')
    sys.exit(bool(wrong))


if __name__ == '__main__':
    main()
