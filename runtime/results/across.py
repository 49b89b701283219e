"""A table of models against the sources that they were evaluated on."""
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from runtime.cli.flags import default
from runtime.datasets.tasks import OWN_DATA
from runtime.results import render
from runtime.results.collect import RunEntry, choose, differing_data, differing_parts, read_evaluations, split_name, task_parts
from runtime.results.statistics import UNITS, plus_minus, statistics

OWN_SOURCE = '*'  # marks the source that a model was trained on
KNOWN_CLASSES = '+'  # marks tasks some of whose classes the model was trained on, or those of another source with the names of such
COLUMNS = ['model', 'trained_on', 'datasource', 'known_classes', 'tasks', 'metric', 'updates', 'mean', 'std', 'ci95', 'path']


def across(folders: Sequence[str], plot: bool = False, style: str = 'text', plot_format: str = 'png', checkpoints: str = 'all') -> str:
    """The evaluations of several runs as a table: a row for each model, a column for each source and kind of task.

    Values are those after as many updates as each method is reported at; means over tasks with their 95% intervals. There is a
    table for each kind of score; `plot` also draws it, into a new file across*.png in the first folder. The other arguments are
    those of `compare`. Raises UserError if there are no results.
    """
    matrices, remarks = matrices_of(choose(read_evaluations(folders), checkpoints)[0]), []
    if plot:
        from runtime.results import plots  # imported late: matplotlib is slow to import, and only --plot needs it
        stem = os.path.join(split_name(folders[0])[1], 'across')
        remarks = [f'Drawn: {plots.save_new(plots.matrix(matrix.table(), matrix.means(), matrix.metric), stem, plot_format)}'
                   for matrix in matrices]
    return render.output(style, [matrix.table() for matrix in matrices], records(matrices), remarks)


class ModelKey(NamedTuple):
    """What tells the models of evaluations apart, and the ways to adapt one."""
    name: str           # what the user calls it, or else its method
    directory: str
    details: tuple[str, ...]  # the checkpoint, with its whole path if it was given by --load_from, and how it is adapted
    updates: int


def model_of(evaluation: RunEntry) -> ModelKey:
    setting = evaluation.entry.setting
    members = '+'.join(map(str, evaluation.entry.ensemble))
    checkpoint = setting.load_from or (f'models {members}' if members else evaluation.entry.checkpoint)
    query_norm = '' if setting.query_norm == default('query_norm') else f'query_norm={setting.query_norm}'
    head = '' if setting.head == default('head') else setting.head
    adaptation = setting.adapted_by, f'update_lr={setting.update_lr}', f'inner_batch={setting.inner_batch}'
    details = checkpoint, query_norm, head, setting.orders_text, *adaptation
    return ModelKey(evaluation.user_label or evaluation.method, evaluation.directory, details, evaluation.headline_updates)


class Matrix:
    """Models, and the tasks that they were evaluated on, of evaluations of one metric.

    Of several evaluations of one model, adapted in one way, on the same tasks, the last counts.

    Attributes:
        models, labels: of the rows.
        targets: text: the tasks of the columns.
        common: text: what the tasks of all columns have in common.
        cells: {(row, column): evaluation}.
        statistics: {(row, column): its mean, standard deviation and half-width of the interval}.
    """

    def __init__(self, evaluations: Sequence[RunEntry]):
        entries = {evaluation.tasks_key: evaluation.entry for evaluation in evaluations}
        parts = {key: task_parts(entry.tasks) for key, entry in entries.items()}
        keys = sorted(parts, key=lambda key: (parts[key], key))
        common = set.intersection(*({*target_parts[1:]} for target_parts in parts.values()))
        targets = [', '.join([parts[key][0], *(part for part in parts[key][1:] if part not in common)]) for key in keys]
        differing = differing_data({key: (target, entries[key]) for key, target in zip(keys, targets)})
        self.targets = [', '.join([target, *differing[key]]) for key, target in zip(keys, targets)]
        self.common = ', '.join(part for part in parts[keys[0]][1:] if part in common)
        self.metric = evaluations[0].entry.metric
        self.models = list(dict.fromkeys(map(model_of, evaluations)))
        self.labels = _labels(self.models)
        self.cells = {(self.models.index(model_of(evaluation)), keys.index(evaluation.tasks_key)): evaluation for evaluation in evaluations}
        self.statistics = {place: statistics(evaluation.headline_values) for place, evaluation in self.cells.items()}

    def text(self, row: int, column: int) -> str:
        """Mean and interval, or '' where there is no such evaluation."""
        if (row, column) not in self.cells:
            return ''
        evaluation = self.cells[row, column]
        mark = OWN_SOURCE if _is_of_own_source(evaluation) else ''
        mark += KNOWN_CLASSES if evaluation.entry.known_classes else ''
        mean, _, half = self.statistics[row, column]
        return plus_minus(mean, half, UNITS[self.metric].digits) + mark

    def means(self) -> np.ndarray:
        """[models, targets]; nan where there is no evaluation."""
        means = np.full((len(self.models), len(self.targets)), np.nan)
        for place, (mean, _, _) in self.statistics.items():
            means[place] = mean
        return means

    def table(self) -> render.Table:
        """A row for each model, a column for each target."""
        notes = [f'{OWN_SOURCE}: the source that the model was trained on'] if any(map(_is_of_own_source, self.cells.values())) else []
        if any(evaluation.entry.known_classes for evaluation in self.cells.values()):
            notes.append(f'{KNOWN_CLASSES}: some of the classes, or classes of the same names, were seen in training')
        rows = [[label, model.updates, *(self.text(row, column) for column in range(len(self.targets)))]
                for row, (label, model) in enumerate(zip(self.labels, self.models))]
        return render.Table(f'{UNITS[self.metric].title}, with its 95% interval, after the updates of each method'
                            + (f'; {self.common}' if self.common else ''), ['model', 'updates', *self.targets], rows, notes=notes)


def _is_of_own_source(evaluation):
    """Whether an evaluation is on the source of the training, as far as that is known."""
    datasource = evaluation.entry.tasks.datasource
    return evaluation.trained_on == datasource and datasource not in OWN_DATA


def matrices_of(evaluations: Sequence[RunEntry]) -> list[Matrix]:
    """A matrix for each kind of score."""
    metrics = dict.fromkeys(evaluation.entry.metric for evaluation in evaluations)
    return [Matrix([evaluation for evaluation in evaluations if evaluation.entry.metric == metric]) for metric in metrics]


def _labels(models):
    """For each model its name, what tells its directory from those of the same name, and in what else it differs from others.
    Checkpoints, and how they are adapted, are stated only where those of one directory and method differ in it."""
    def label(model):
        alike = [other.directory for other in models if other.name == model.name]
        place = dict(zip(alike, differing_parts(alike)))[model.directory] if len(set(alike)) > 1 else ''
        same_run = [other.details for other in models if (other.directory, other.name) == (model.directory, model.name)]
        differing = [detail for detail, values in zip(model.details, zip(*same_run)) if len(set(values)) > 1]
        return ', '.join(filter(None, [model.name, place, *differing]))

    return list(map(label, models))


def records(matrices: Sequence[Matrix]) -> render.Table:
    """A row for each evaluation."""
    rows = []
    for matrix in matrices:
        for (row, column), evaluation in sorted(matrix.cells.items(), key=lambda item: item[0]):
            num_known = len(evaluation.entry.known_classes)
            tasks = ', '.join(filter(None, [matrix.targets[column], matrix.common]))
            rows.append([matrix.labels[row], evaluation.trained_on, evaluation.entry.tasks.datasource, num_known, tasks,
                         UNITS[matrix.metric].title, evaluation.headline_updates, *matrix.statistics[row, column], evaluation.path])
    return render.Table('', COLUMNS, rows)
