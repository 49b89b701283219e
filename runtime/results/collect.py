"""The evaluations of several runs, as their results.json files have them."""
import dataclasses
import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.cli.flags import default
from runtime.results.statistics import UNITS
from runtime.results.store import FILE, SHIPPED_FILE, SPLIT_TITLES, Entry, EvaluationTasks, entries_of
from runtime.system.errors import UserError
from runtime.system.files import walk


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An entry of a results.json, and where it is."""
    directory: str
    user_label: str | None  # what the user calls the run: --compare user_label=DIR
    entry: Entry

    @property
    def path(self) -> str:
        """Text: the checkpoint, with its directory."""
        return self.entry.setting.load_from or os.path.join(self.directory, self.entry.checkpoint)

    @property
    def method(self) -> str:
        """Its name, and of how many checkpoints together."""
        members = len(self.entry.ensemble)
        return self.entry.training.method + (f', ensemble of {members}' if members else '')

    @property
    def tasks_key(self) -> str:
        """Equal for evaluations on the same tasks: all that draws them."""
        return json.dumps(vars(self.entry.tasks), sort_keys=True)

    @property
    def values(self) -> np.ndarray:
        """[tasks, columns], in the unit that is shown."""
        return np.array(self.entry.scores) * UNITS[self.entry.metric].factor

    @property
    def headline_updates(self) -> int:
        """The number of updates at which the method is reported."""
        return self.entry.setting.headline_updates

    @property
    def headline_values(self) -> np.ndarray:
        """[tasks], after as many updates as the method is reported at."""
        return self.values[:, self.entry.headline_column]

    @property
    def newest(self) -> int:
        """The iterations of the run's newest checkpoint then; where that is not known, those that the training was asked for."""
        training = self.entry.training
        return training.newest or training.pretrain_iterations + training.metatrain_iterations

    @property
    def trained_on(self) -> str:
        """The source that the model was trained on."""
        return self.flag('datasource')

    def flag(self, name: str) -> Any:
        """What a flag was in the training; where that is older than the flag, its default."""
        return self.entry.training.flags.get(name, default(name))


def read_evaluations(folders: Sequence[str], checkpoints: str = 'all') -> list[Evaluation]:
    """The evaluations in some folders, those of each run once: of 'all' its checkpoints that were evaluated, the 'newest' or the
    'best'. 'name=folder' says what the user calls its runs. Raises UserError if a folder does not exist, or none has any."""
    evaluations, without = {}, []
    absent = [folder for _, folder in map(split_name, folders) if not os.path.isdir(folder)]
    if absent:
        raise UserError(f'there is no folder {", ".join(absent)}')
    for user_label, folder in map(split_name, folders):
        directories = result_directories(folder)
        without += [] if directories else [folder]
        for directory in directories:
            evaluations.setdefault(os.path.realpath(directory),
                                   [Evaluation(directory, user_label, entry) for entry in entries_of(directory)])
    if without:
        missing = f'there is no {FILE} in {", ".join(without)} or a folder in it; evaluate first, with --train=False'
        if len(without) == len(folders):
            raise UserError(missing)
        print(f'Warning: {missing}', file=sys.stderr)
    chosen = [evaluation for run_evaluations in evaluations.values() for evaluation in _chosen(run_evaluations, checkpoints)]
    if not chosen:
        raise UserError(f'--checkpoints={checkpoints}: no such checkpoint was evaluated; evaluate one, with --train=False')
    return chosen


def _chosen(evaluations, checkpoints):
    """Of the evaluations of a run all, or those of its newest checkpoint that was evaluated (of the latest ensemble, if there are only
    ensembles), or of the one that was the best last. Weights of other runs are neither."""
    if checkpoints == 'all':
        return evaluations
    own = [evaluation for evaluation in evaluations if not evaluation.entry.setting.load_from]
    if checkpoints == 'best':
        return _with_largest([evaluation for evaluation in own if evaluation.entry.is_best], lambda entry: entry.training.newest or 0)
    single = [evaluation for evaluation in own if not evaluation.entry.ensemble]
    return _with_largest(single, lambda entry: entry.iterations or 0) or _with_largest(own, lambda entry: entry.training.newest or 0)


def _with_largest(evaluations, quantity):
    """The evaluations with the largest quantity of their entries."""
    largest = max((quantity(evaluation.entry) for evaluation in evaluations), default=None)
    return [evaluation for evaluation in evaluations if quantity(evaluation.entry) == largest]


def result_directories(folder: str, names: Sequence[str] = (FILE, SHIPPED_FILE)) -> list[str]:
    """The folder, and folders below it at any depth, that hold results, or another of some files; without what --resume=False and
    --test_iter moved aside."""
    directories = []
    for directory, below, files in walk(folder):
        below[:] = sorted(name for name in below if not re.fullmatch(r'earlier\d+', name))
        directories += [directory] if set(names).intersection(files) else []
    return directories


def task_parts(tasks: EvaluationTasks) -> list[str]:
    """Which tasks these are, in parts of a sentence; the first is the source."""
    return [tasks.datasource, SPLIT_TITLES[tasks.split], *([f'{tasks.num_classes}-way'] if tasks.num_classes else []),
            f'{tasks.update_batch_size}-shot', f'{tasks.query_shots} query', f'{tasks.count} tasks', f'seed {tasks.seed}']


def describe_tasks(tasks: EvaluationTasks) -> str:
    """Text: which tasks these are."""
    source, split, *way_and_shots, query, count, seed = task_parts(tasks)
    return f'{count} of {source}, {split}, {" ".join(way_and_shots)}, {query}, {seed}'


def differing_parts(paths: Sequence[str]) -> list[str]:
    """The components of each path in which it differs from another, compared from the end."""
    columns = list(itertools.zip_longest(*(os.path.normpath(path).split(os.sep)[::-1] for path in paths), fillvalue=''))[::-1]
    parts = list(zip(*(column for column in columns if len(set(column)) > 1))) or list(zip(*columns))
    return [os.sep.join(filter(None, components)) for components in parts]


def split_name(argument: str) -> tuple[str | None, str]:
    """'name=folder' -> (name, folder); 'folder' -> (None, folder)."""
    name, equals, folder = argument.partition('=')
    return (name, folder) if equals and name and not os.path.exists(argument) else (None, argument)
