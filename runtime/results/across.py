"""A table of models against the sources that they were evaluated on."""
import dataclasses
import os
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from runtime.results import render
from runtime.results.collect import Evaluation, differing_parts, read_evaluations, split_name, task_parts, unused_path
from runtime.results.statistics import UNITS, interval, statistics

OWN_SOURCE = '*'  # marks the source that a model was trained on
KNOWN_CLASSES = '+'  # marks another source some of whose classes have the names of classes of the training
COLUMNS = ['model', 'trained_on', 'datasource', 'known_classes', 'tasks', 'metric', 'updates', 'mean', 'std', 'ci95', 'path']


class Model(NamedTuple):
    """What tells the models of evaluations apart, and the ways to adapt one."""
    name: str           # what the user calls it, or else its method
    directory: str
    checkpoint: str     # its whole path, if it was given by --load_from
    query_norm: str
    update_lr: str
    inner_batch: str
    updates: int


def model_of(evaluation: Evaluation) -> Model:
    """The model that was evaluated."""
    setting = evaluation.entry.setting
    members = '+'.join(map(str, evaluation.entry.ensemble))
    checkpoint = setting.load_from or (f'models {members}' if members else evaluation.entry.checkpoint)
    return Model(evaluation.user_label or evaluation.method, evaluation.directory, checkpoint, f'--query_norm={setting.query_norm}',
                 f'--update_lr={setting.update_lr}', f'--inner_batch={setting.inner_batch}', evaluation.headline_updates)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Models, the tasks that they were evaluated on, and the evaluations: {(row, column): evaluation}, of one kind of score."""
    models: list[Model]
    labels: list[str]       # of the models
    targets: list[str]
    common: str             # text: what the tasks of all targets have in common
    cells: dict[tuple[int, int], Evaluation]

    @property
    def metric(self) -> str:
        """The kind of score, a key of UNITS."""
        return next(iter(self.cells.values())).entry.metric

    def text(self, row: int, column: int) -> str:
        """Mean and interval, or '' where there is no such evaluation."""
        if (row, column) not in self.cells:
            return ''
        evaluation = self.cells[row, column]
        mark = (KNOWN_CLASSES if evaluation.entry.known_classes else '') if evaluation.is_transfer else OWN_SOURCE
        return interval(evaluation.headline_values, UNITS[self.metric][2]) + mark

    def table(self) -> render.Table:
        """A row for each model, a column for each target."""
        notes = [f'{OWN_SOURCE}: the source that the model was trained on']
        if any(evaluation.entry.known_classes for evaluation in self.cells.values()):
            notes.append(f'{KNOWN_CLASSES}: some classes have the names of classes that the model was trained on')
        rows = [[label, model.updates, *(self.text(row, column) for column in range(len(self.targets)))]
                for row, (label, model) in enumerate(zip(self.labels, self.models))]
        return render.Table(f'{UNITS[self.metric][0]}, with its 95% interval, after the updates of each method'
                            + (f'; {self.common}' if self.common else ''), ['model', 'updates', *self.targets], rows, notes=notes)


def across(folders: Sequence[str], plot: bool = False, style: str = 'text', plot_format: str = 'png',
           checkpoints: str = 'all') -> str:
    """The evaluations of several runs as a table: a row for each model, a column for each source and kind of task.

    Values are those after as many updates as each method is reported at; means over tasks with their 95% intervals.

    Args:
        folders: experiment directories, or folders of such at any depth; 'name=folder' says what to call its runs.
        plot: also draw the table, into a new file across*.png in the first folder.
        style: 'text', 'csv' or 'latex'.
        checkpoints: of each run, 'all' that were evaluated, the 'newest' or the 'best'.

    Returns:
        The tables, one for each kind of score.

    Raises:
        UserError: there are no results.
    """
    labelled = [split_name(folder) for folder in folders]
    matrices = matrices_of(read_evaluations(labelled, checkpoints))
    remarks = [f'Drawn: {draw(matrix, labelled[0][1], plot_format)}' for matrix in matrices] if plot else []
    return render.output(style, [matrix.table() for matrix in matrices], records(matrices), remarks)


def matrices_of(evaluations: Sequence[Evaluation]) -> list[Matrix]:
    """A matrix for each kind of score."""
    metrics = dict.fromkeys(evaluation.entry.metric for evaluation in evaluations)
    return [_matrix([evaluation for evaluation in evaluations if evaluation.entry.metric == metric]) for metric in metrics]


def _matrix(evaluations):
    """Of several evaluations of one model, adapted in one way, on the same tasks, the last counts."""
    parts = {evaluation.tasks_key: task_parts(evaluation.entry.tasks) for evaluation in evaluations}
    keys = sorted(parts, key=lambda key: (parts[key], key))
    models = list(dict.fromkeys(map(model_of, evaluations)))
    cells = {(models.index(model_of(evaluation)), keys.index(evaluation.tasks_key)): evaluation for evaluation in evaluations}
    common = set.intersection(*({*of_target[1:]} for of_target in parts.values()))
    targets = [', '.join([parts[key][0], *(part for part in parts[key][1:] if part not in common)]) for key in keys]
    titles = [target + (f', data or settings {zlib.crc32(key.encode()):08x}' if targets.count(target) > 1 else '')
              for key, target in zip(keys, targets)]
    return Matrix(models, _labels(models), titles, ', '.join(part for part in parts[keys[0]][1:] if part in common), cells)


def _labels(models):
    """For each model its name, what tells its directory from those of the same name, and in what else it differs from others.

    How models are adapted is stated only where those of one directory differ in it.
    """
    def label(model):
        alike = [other.directory for other in models if other.name == model.name]
        place = dict(zip(alike, differing_parts(alike)))[model.directory] if len(set(alike)) > 1 else ''
        same_run = [other for other in models if other.directory == model.directory]
        differing = [*(field for field in ('checkpoint', 'query_norm') if len({getattr(other, field) for other in models}) > 1),
                     *(field for field in ('update_lr', 'inner_batch') if len({getattr(other, field) for other in same_run}) > 1)]
        return ', '.join(filter(None, [model.name, place, *(getattr(model, field) for field in differing)]))

    return list(map(label, models))


def records(matrices: Sequence[Matrix]) -> render.Table:
    """A row for each evaluation."""
    rows = []
    for matrix in matrices:
        for (row, column), evaluation in sorted(matrix.cells.items(), key=lambda item: item[0]):
            mean, std, half = (float(statistic[0]) for statistic in statistics(evaluation.headline_values[:, None]))
            known = len(evaluation.entry.known_classes) if evaluation.is_transfer else ''
            tasks = ', '.join(filter(None, [matrix.targets[column], matrix.common]))
            rows.append([matrix.labels[row], evaluation.trained_on, evaluation.entry.tasks.datasource, known, tasks, UNITS[matrix.metric][0],
                         evaluation.headline_updates, mean, std, half, evaluation.path])
    return render.Table('', COLUMNS, rows)


def draw(matrix: Matrix, folder: str, plot_format: str) -> str:
    """Draws the table into a new file of a folder; returns its path."""
    from runtime.results import plots  # imported late: matplotlib is slow to import, and only --plot needs it
    path = unused_path(os.path.join(folder, 'across'), plot_format)
    means = np.full((len(matrix.models), len(matrix.targets)), np.nan)
    for place, evaluation in matrix.cells.items():
        means[place] = evaluation.headline_values.mean()
    plots.save(plots.matrix(matrix.table(), means, matrix.metric), path)
    return path
