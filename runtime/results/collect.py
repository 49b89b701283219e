"""The evaluations of several runs, as their results.json files have them."""
import dataclasses
import itertools
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.cli.flags import default
from runtime.results.statistics import UNITS
from runtime.results.store import FILE, SHIPPED_FILE, SPLIT_TITLES, Entry, EvaluationTasks, entries_of
from runtime.system.errors import UserError
from runtime.system.files import walk


@dataclasses.dataclass(frozen=True)
class RunEntry:
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


def read_evaluations(folders: Sequence[str]) -> list[RunEntry]:
    """The evaluations in some folders, those of each run once. 'name=folder' says what the user calls its runs. Raises UserError if
    folders do not exist, none has any, or files cannot be read."""
    evaluations: dict[str, list[RunEntry]] = {}
    without, problems = [], []
    absent = [folder or argument for argument, (_, folder) in zip(folders, map(split_name, folders)) if not os.path.isdir(folder)]
    if absent:
        raise UserError(f'there is no folder {", ".join(absent)}')
    for user_label, folder in map(split_name, folders):
        directories = result_directories(folder)
        without += [] if directories else [folder]
        for run, directory in zip(map(os.path.realpath, directories), directories):
            if user_label or run not in evaluations:
                evaluations[run] = _evaluations_of(directory, user_label, problems)
    if problems:
        raise UserError('; '.join(dict.fromkeys(problems)))
    if without:
        missing = f'there is no {FILE} in {", ".join(without)} or a folder in it; evaluate first, with --train=False'
        if len(without) == len(folders):
            raise UserError(missing)
        print(f'Warning: {missing}', file=sys.stderr)
    return [evaluation for run_evaluations in evaluations.values() for evaluation in run_evaluations]


def _evaluations_of(directory, user_label, problems):
    """The evaluations of a run; if they cannot be read, the reason is added to the problems."""
    try:
        return [RunEntry(directory, user_label, entry) for entry in entries_of(directory)]
    except UserError as error:
        problems.append(str(error))
        return []


def choose(evaluations: Sequence[RunEntry], checkpoints: str) -> tuple[list[RunEntry], list[RunEntry]]:
    """Of each run the evaluations of 'all' its checkpoints, of the 'newest' that was evaluated, or of the 'best'; and those that are left.
    A warning names the runs that have no such one. Raises UserError if none has."""
    runs: dict[str, list[RunEntry]] = {}
    for evaluation in evaluations:
        runs.setdefault(evaluation.directory, []).append(evaluation)
    chosen = {directory: _chosen(run_evaluations, checkpoints) for directory, run_evaluations in runs.items()}
    without = [directory for directory, run_evaluations in chosen.items() if not run_evaluations]
    if len(without) == len(runs):
        raise UserError(f'--checkpoints={checkpoints}: no such checkpoint was evaluated; evaluate one, with --train=False')
    if without:
        print(f'Warning: no evaluation of such a checkpoint (--checkpoints={checkpoints}) is in {", ".join(without)}, which is left out',
              file=sys.stderr)
    shown = [*itertools.chain(*chosen.values())]
    ids = set(map(id, shown))
    return shown, [evaluation for evaluation in evaluations if id(evaluation) not in ids]


def _chosen(evaluations, checkpoints):
    """The evaluations of a run that --checkpoints asks for: 'all'; or of its own weights, those of the 'newest' checkpoint that was
    evaluated (if there are only ensembles, of the latest), or of the checkpoint, and of the ensemble, that was the 'best' last."""
    if checkpoints == 'all':
        return evaluations
    own = [evaluation for evaluation in evaluations if not evaluation.entry.setting.load_from]
    single = [evaluation for evaluation in own if not evaluation.entry.ensemble]
    ensembles = [evaluation for evaluation in own if evaluation.entry.ensemble]
    if checkpoints == 'newest':
        return _of_last(single, lambda entry: entry.iterations or 0) or _of_last(ensembles, _newest_then)
    best_single, best_ensembles = ([evaluation for evaluation in kind if evaluation.entry.is_best] for kind in (single, ensembles))
    return _of_last(best_single, _newest_then) + _of_last(best_ensembles, _newest_then)


def _newest_then(entry):
    return entry.training.newest or 0


def _of_last(evaluations, time):
    """The evaluations of that checkpoint, or ensemble, of which there is an entry with the largest `time`."""
    last = max((evaluation.entry for evaluation in evaluations), key=time, default=None)
    return [evaluation for evaluation in evaluations
            if (evaluation.entry.checkpoint, evaluation.entry.ensemble) == (last.checkpoint, last.ensemble)]


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


def descriptions(evaluations: Sequence[RunEntry]) -> dict[str, str]:
    """{key of tasks: text}: which tasks each evaluation is on, and what else differs between tasks that are described alike."""
    described = {evaluation.tasks_key: (describe_tasks(evaluation.entry.tasks), evaluation.entry) for evaluation in evaluations}
    differing = differing_data(described)
    return {key: ', '.join([text, *differing[key]]) for key, (text, _) in described.items()}


def differing_data(described: Mapping[str, tuple[str, Entry]]) -> dict[str, list[str]]:
    """{key of tasks: texts}: in which data and settings of their source tasks of one description differ, given {key of tasks:
    (description, an evaluation on them)}."""
    differing = {}
    for key, (text, entry) in described.items():
        alike = [_data_of(other) for other_text, other in described.values() if other_text == text]
        differing[key] = [f'{name} {value}' for name, value in _data_of(entry).items()
                          if any(other.get(name) != value for other in alike)]
    return differing


def _data_of(entry):
    """{what: text} of the data and settings of an evaluation's source."""
    data = ' '.join(filter(None, [entry.data_path, f'{entry.tasks.data or 0:08x}']))
    return {**{name: json.dumps(value) for name, value in sorted(entry.tasks.facts.items())}, 'data': data}


def differing_parts(paths: Sequence[str]) -> list[str]:
    """The components of each path in which it differs from another, compared from the end."""
    columns = list(itertools.zip_longest(*(os.path.normpath(path).split(os.sep)[::-1] for path in paths), fillvalue=''))[::-1]
    parts = list(zip(*(column for column in columns if len(set(column)) > 1))) or list(zip(*columns))
    return [os.sep.join(filter(None, components)) for components in parts]


def split_name(argument: str) -> tuple[str | None, str]:
    """'name=folder' -> (name, folder); 'folder' -> (None, folder). A name has no slash, so that a folder may have a = in it."""
    name, equals, folder = argument.partition('=')
    is_name = equals and name and os.sep not in name and not os.path.exists(argument)
    return (name, os.path.expanduser(folder)) if is_name else (None, os.path.expanduser(argument))
