"""Draws the validation accuracy of trainings against iterations, from the console logs in their directories.

    python benchmarks/curves.py docs/images/curves.png MAML=logs/cifarfs1shot ANIL=logs/cifarfs1shot_anil
"""
import argparse
import os
import re
import sys

import numpy as np
import run_files  # noqa: F401  (puts the program on the path)
from matplotlib.figure import Figure

import main  # noqa: F401  (declares the flags)
from data_generator import SOURCES
from runtime.cli import stored_run
from runtime.jobs.journal import CONSOLE
from runtime.results import plots
from runtime.results.collect import result_directories, split_name
from runtime.system.errors import UserError

WINDOW = 5  # validations in a running mean: each is on 100 tasks, or on --validation_tasks where a checkpoint is saved


def validations(text: str, pretrained: int) -> np.ndarray:
    """[[iteration, accuracy after adaptation]] of the console log of a training with so many iterations of pre-training, in order, these
    first; if it went back, without what followed then."""
    accuracies, iteration = {}, 0
    for line in text.splitlines():
        if match := re.match(r'(Pretrain )?Iteration (\d+): ', line):
            iteration = int(match[2]) + (0 if match[1] else pretrained)
            accuracies = {number: accuracy for number, accuracy in accuracies.items() if number <= iteration}
        elif match := re.match(r'Validation (?:results|of model(\d+)): \S+, (\S+)$', line):
            accuracies[int(match[1] or iteration)] = float(match[2])
    return np.array(sorted(accuracies.items())).reshape(-1, 2)


def running_mean(values: np.ndarray) -> np.ndarray:
    """The mean of each value and up to WINDOW - 1 before it."""
    return np.array([values[max(end - WINDOW, 0):end].mean() for end in range(1, len(values) + 1)])


def draw(logs: dict[str, tuple[str, int]], path: str) -> None:
    """Writes the picture of {label: what `console_log` returned}."""
    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.subplots()
    for label, log in logs.items():
        iterations, accuracies = validations(*log).T
        axes.plot(iterations, 100 * running_mean(accuracies), label=label)
    axes.set(xscale='log', xlabel='iterations', ylabel='accuracy in %')
    axes.set_title(f'Meta-validation during training, running mean of {WINDOW} validations', fontsize='small')
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
    plots.save(figure, path)


def console_log(folder: str) -> tuple[str, int]:
    """The text of the only console log in a folder, or below it, and the iterations of pre-training of the run."""
    directories = result_directories(folder, [CONSOLE])
    if len(directories) != 1:
        sys.exit(f'{folder} should hold one {CONSOLE}, and holds {len(directories)}')
    flags = stored_run.read(directories[0])
    if flags['targets'] or flags['datasource'] != 'table' and SOURCES[flags['datasource']].loss != 'xent':
        sys.exit(f'{folder} is not of classification: its validations are no accuracies')
    with open(os.path.join(directories[0], CONSOLE), encoding='utf-8') as file:
        return file.read(), flags['pretrain_iterations']


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('path', help='the picture')
    parser.add_argument('runs', nargs='+', help="run folders, 'name=folder'")
    options = parser.parse_args()
    try:
        draw({label or folder: console_log(folder) for label, folder in map(split_name, options.runs)}, options.path)
    except (UserError, ValueError) as error:  # ValueError: of a suffix that matplotlib does not know
        sys.exit(f'curves.py: {error}')
