"""Kills training runs at random moments, restarts them, and compares their results with those of an undisturbed run.

    python benchmarks/interruptions.py --kills 50

Half of the kills go to a sinusoid run, half to one on images (small generated ones). Each is SIGKILL or SIGTERM, drawn at random,
at a time between the start of the process and a while after its first iterations. A finished run is compared with the undisturbed
one, bit for bit: variables, record, console lines, summaries, evaluation. Ends with status 1 if anything differs.
"""
import argparse
import glob
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUNS = {
    'sinusoid': (['--datasource=sinusoid', '--norm=None', '--update_batch_size=10', '--save_interval=500'], 12_000),
    'images': (['--datasource=folder', '--image_size=28', '--image_channels=1', '--num_filters=8', '--num_classes=3',
                '--update_batch_size=1', '--meta_batch_size=4', '--update_lr=0.4', '--save_interval=30'], 700),
}


def write_images(folder: str, classes: int = 20, images: int = 4, seed: int = 0) -> None:
    """Class folders of noisy random patterns."""
    rng = np.random.default_rng(seed)
    for number in range(classes):
        os.makedirs(os.path.join(folder, f'class{number:02d}'))
        pattern = rng.random((28, 28)) < 0.5
        for image in range(images):
            pixels = 255 * (pattern ^ (rng.random((28, 28)) < 0.05)).astype(np.uint8)
            Image.fromarray(pixels).save(os.path.join(folder, f'class{number:02d}', f'{image}.png'))


def start(arguments: Sequence[str]) -> subprocess.Popen:
    """A process of main.py."""
    return subprocess.Popen([sys.executable, os.path.join(ROOT, 'main.py'), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, cwd=ROOT)


def run(arguments: Sequence[str]) -> str:
    """The output of main.py; raises SystemExit if it fails."""
    process = start(arguments)
    output, _ = process.communicate(timeout=600)
    if process.returncode:
        raise SystemExit(f'{" ".join(arguments)} failed: {output}')
    return output


def results(logdir: str, output: str, iterations: int, arguments: Sequence[str]) -> dict[str, Any]:
    """The results of a run as one dict of comparable values."""
    import tensorflow as tf
    directory, = glob.glob(os.path.join(logdir, 'cls_*'))
    reader = tf.train.load_checkpoint(os.path.join(directory, f'model{iterations}'))
    values = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    values['console'] = dict(re.findall(r'^(Iteration \d+): (.*)$', output, re.M))
    values['summaries'] = {}
    for path in sorted(glob.glob(os.path.join(directory, 'events*'))):
        try:
            for event in tf.compat.v1.train.summary_iterator(path):
                for value in event.summary.value:
                    values['summaries'][value.tag, event.step] = value.tensor.SerializeToString()
        except tf.errors.DataLossError:
            pass  # a partial record of a killed process
    run([*arguments, '--train=False'])
    with open(os.path.join(directory, 'results.json'), encoding='utf-8') as file:
        entry, = json.load(file)['evaluations']
    values['evaluation'] = entry['scores']
    return values


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of entries that are not the same, bit for bit."""
    def same(a, b):
        return a == b if isinstance(a, (dict, bytes)) else np.array_equal(a, b)
    return [name for name in one.keys() | other.keys()
            if name not in one or name not in other or not same(one[name], other[name])]


def run_and_kill(command: Sequence[str], seconds: float, rng: random.Random) -> tuple[signal.Signals | None, int, str]:
    """Runs a command, and sends it SIGKILL or SIGTERM after some seconds: the signal or None, exit status and output.

    Raises:
        SystemExit: it did not stop and save at SIGTERM.
    """
    process, number = start(command), None
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        process.send_signal(number)
        text, _ = process.communicate(timeout=600)
    status = process.returncode
    # SIGTERM makes a training save and stop; before it begins and after its end there is nothing to save.
    begun, ended = 'Training ' in text and 'iterations/s' in text, 'The last checkpoint is' in text
    if number == signal.SIGTERM and begun and not ended and not (status == 143 and 'Stopped by SIGTERM' in text):
        raise SystemExit(f'SIGTERM was ignored: status {status}\n{text}')
    return number, status, text


def torture(arguments: Sequence[str], iterations: int, kills: int, folder: str, rng: random.Random,
            longest: float = 12.0) -> Iterator[str]:
    """Yields a line of text for each kill and each comparison.

    Args:
        folder: for the log directories.
        longest: seconds from the start of a process after which it is killed at the latest.

    Raises:
        SystemExit: a run differs from the undisturbed one, or a process fails.
    """
    def command(logdir):
        return [*arguments, f'--metatrain_iterations={iterations}', f'--logdir={logdir}']

    undisturbed = os.path.join(folder, 'undisturbed')
    expected = results(undisturbed, run(command(undisturbed)), iterations, command(undisturbed))

    killed, round_number, output, running = 0, 0, '', False
    while killed < kills or running:
        logdir = os.path.join(folder, f'killed{round_number}')
        seconds = rng.uniform(0, longest) if killed < kills else 600
        number, status, text = run_and_kill(command(logdir), seconds, rng)
        output, killed = output + text, killed + bool(number)
        if number:
            saved = [int(name) for name in re.findall(r'model(\d+)\.index', ' '.join(glob.glob(f'{logdir}/*/*.index')))]
            yield f'{number.name} after {seconds:4.1f} s: status {status}, newest checkpoint {max(saved, default="none")}'
        running = bool(number) and status in (-number, 128 + number)
        if running:
            continue
        if status:
            raise SystemExit(f'status {status}: {text}')
        differing = differences(expected, results(logdir, output, iterations, command(logdir)))
        if differing:
            raise SystemExit(f'differs from the undisturbed run after {killed} kills: {", ".join(map(str, differing))}')
        yield f'came to its end, the same as that of the undisturbed run ({killed} kills so far)'
        round_number, output = round_number + 1, ''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0, help='of the moments and signals')
    args = parser.parse_args()
    sys.path.insert(0, ROOT)
    from runtime.cli import startup
    startup.import_tensorflow()
    started, rng = time.monotonic(), random.Random(args.seed)
    for name, (arguments, iterations) in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            if name == 'images':
                write_images(os.path.join(folder, 'data'))
                arguments = [*arguments, f'--data_path={folder}/data']
            for line in torture(arguments, iterations, args.kills // len(RUNS), folder, rng):
                print(f'{name}: {line}', flush=True)
    print(f'{args.kills} kills, all runs the same as undisturbed ones; {time.monotonic() - started:.0f} s')


if __name__ == '__main__':
    main()
