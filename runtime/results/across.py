"""A table of models against the sources that they were evaluated on."""
import csv
import dataclasses
import io
import os
import re
import sys
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from runtime.results.collect import Evaluation, describe_tasks, differing_parts, free_path, latex, read_evaluations, split_name
from runtime.results.statistics import UNITS, interval, statistics

OWN_SOURCE = '*'  # marks the source that a model was trained on
KNOWN_CLASSES = '+'  # marks another source some of whose classes have the names of classes of the training


class Model(NamedTuple):
    """What tells the models of evaluations apart, and the ways to adapt one."""
    given: str | None   # what the user calls it
    directory: str
    checkpoint: str     # its whole path, if it was given by --load_from
    query_norm: str
    ensemble: str
    update_lr: str
    inner_batch: str
    updates: str

    @classmethod
    def of(cls, evaluation: Evaluation) -> 'Model':
        """The model that was evaluated."""
        entry = evaluation.entry
        checkpoint = entry['checkpoint'] if evaluation.flag('load_from') else os.path.basename(entry['checkpoint'])
        return cls(evaluation.given, evaluation.directory, checkpoint, entry.get('query_norm') or '', str(entry.get('ensemble', '')),
                   *(f'--{name}={evaluation.flag(name)}' for name in ('update_lr', 'inner_batch')), f'{evaluation.own_updates} updates')


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Models, the tasks that they were evaluated on, and the evaluations: {(row, column): evaluation}, of one kind of score."""
    models: list[str]
    targets: list[str]
    cells: dict[tuple[int, int], Evaluation]

    @property
    def metric(self) -> str:
        """The kind of score, a key of UNITS."""
        return next(iter(self.cells.values())).entry['score']

    @property
    def notes(self) -> list[str]:
        """What the marks in the texts mean."""
        known = any(one.entry.get('known_classes') for one in self.cells.values())
        return [f'{OWN_SOURCE}: the source that the model was trained on',
                *([f'{KNOWN_CLASSES}: some classes have the names of classes that the model was trained on'] if known else [])]

    def text(self, row: int, column: int) -> str:
        """Mean and interval, or '' where there is no such evaluation."""
        if (row, column) not in self.cells:
            return ''
        evaluation = self.cells[row, column]
        mark = (KNOWN_CLASSES if evaluation.entry.get('known_classes') else '') if evaluation.elsewhere else OWN_SOURCE
        return interval(own_values(evaluation), UNITS[self.metric][2]) + mark


def own_values(evaluation: Evaluation):
    """The values after as many updates as the method is meant for, [tasks]."""
    return evaluation.values[:, evaluation.own_updates]


def across(folders: Sequence[str], plot: bool = False, style: str = 'text', plot_format: str = 'png') -> str:
    """The evaluations of several runs as a table: a row for each model, a column for each source and kind of task.

    Values are those after as many updates as each method is meant for; means over tasks with their 95% intervals.

    Args:
        folders: experiment directories, or folders of such at any depth; 'name=folder' says what to call its runs.
        plot: also draw the table, into a new file across*.png in the first folder.
        style: 'text', 'csv' or 'latex'.

    Returns:
        The tables, one for each kind of score.

    Raises:
        UserError: there are no results.
    """
    named = [split_name(folder) for folder in folders]
    matrices = tables(read_evaluations(named))
    notes = [f'Drawn: {draw(one, named[0][1], plot_format)}' for one in matrices] if plot else []
    if style == 'text':
        return '\n\n'.join([*map(as_text, matrices), *(['\n'.join(notes)] if notes else [])])
    print(*notes, sep='\n', end='\n' if notes else '', file=sys.stderr)
    return as_csv(matrices) if style == 'csv' else '\n\n'.join(map(as_latex, matrices))


def elsewhere(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The evaluations of those runs that were also evaluated on another source than the training's."""
    directories = {one.directory for one in evaluations if one.elsewhere}
    return [one for one in evaluations if one.directory in directories]


def tables(evaluations: Sequence[Evaluation]) -> list[Matrix]:
    """A table for each kind of score."""
    scores = dict.fromkeys(one.entry['score'] for one in evaluations)
    return [_table([one for one in evaluations if one.entry['score'] == score]) for score in scores]


def _table(evaluations):
    """Of several evaluations of one model, adapted in one way, on the same tasks, the last in its file counts."""
    keys, tasks = [Model.of(one) for one in evaluations], [one.tasks_key for one in evaluations]
    described = {key: describe_tasks(one.entry['tasks']) for key, one in zip(tasks, evaluations)}
    models, targets = list(dict.fromkeys(keys)), sorted(described, key=lambda key: (described[key], key))
    cells = {(models.index(key), targets.index(target)): one for key, target, one in zip(keys, tasks, evaluations)}
    texts = list(described.values())
    titles = [described[key] + (f', data or settings {zlib.crc32(key.encode()):08x}' if texts.count(described[key]) > 1 else '')
              for key in targets]
    return Matrix(_labels(models), titles, cells)


def _labels(models):
    """For each model its name, what tells its directory from the others', and in what else it differs from others.

    How models are adapted is stated only where those of one directory differ in it.
    """
    directories = [model.directory for model in models]
    names = differing_parts(directories) if len(set(directories)) > 1 else directories

    def label(model, name):
        alike = [other for other in models if other.given == model.given]
        several = len({other.directory for other in alike}) > 1
        here = [other for other in models if other.directory == model.directory]
        differing = [*(field for field in ('checkpoint', 'query_norm', 'ensemble') if len({getattr(other, field) for other in models}) > 1),
                     *(field for field in ('update_lr', 'inner_batch', 'updates') if len({getattr(other, field) for other in here}) > 1)]
        return ', '.join(filter(None, [model.given, name if several or not model.given else '',
                                       *(getattr(model, field) for field in differing)]))

    return list(map(label, models, names))


def as_text(table: Matrix) -> str:
    """For a terminal: the columns are numbered, and listed above."""
    lines = [f'{UNITS[table.metric][0]}, with its 95% interval, of models (rows) on tasks (columns)', '']
    lines += [f'  {number}  {target}' for number, target in enumerate(table.targets, start=1)]
    rows = [['', *map(str, range(1, len(table.targets) + 1))]]
    rows += [[model, *(table.text(row, column) or '-' for column in range(len(table.targets)))] for row, model in enumerate(table.models)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines += ['', *('  ' + '  '.join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
                    for row in rows)]
    return '\n'.join([*lines, *(f'  ({note})' for note in table.notes)])


def as_csv(tables: Sequence[Matrix]) -> str:
    """One line for each evaluation."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['model', 'trained_on', 'datasource', 'known_classes', 'tasks', 'metric', 'updates', 'mean', 'std', 'ci95', 'path'])
    for table in tables:
        for (row, column), one in sorted(table.cells.items(), key=lambda item: item[0]):
            mean, std, half = (float(values[0]) for values in statistics(own_values(one)[:, None]))
            source = one.entry['tasks']['datasource']
            known = len(one.entry.get('known_classes', [])) if one.elsewhere else ''
            writer.writerow([table.models[row], one.trained_on, source, known, table.targets[column],
                             UNITS[table.metric][0], one.own_updates, mean, std, half, one.path])
    return text.getvalue().rstrip('\n')


def as_latex(table: Matrix) -> str:
    """A tabular environment, with a line of comment for each column."""
    lines = [f'% {number}: {target}' for number, target in enumerate(table.targets, start=1)] + [f'% {note}' for note in table.notes]
    lines += [rf'\begin{{tabular}}{{l{"r" * len(table.targets)}}}', r'\hline',
              ' & '.join([latex(UNITS[table.metric][0]), *map(str, range(1, len(table.targets) + 1))]) + r' \\', r'\hline']
    for row, model in enumerate(table.models):
        cells = [re.sub(f'([{OWN_SOURCE}{KNOWN_CLASSES}])$', r'^\1', table.text(row, column).replace('±', r'\pm'))
                 for column in range(len(table.targets))]
        lines.append(' & '.join([latex(model), *(f'${cell}$' if cell else '' for cell in cells)]) + r' \\')
    return '\n'.join([*lines, r'\hline', r'\end{tabular}'])


def draw(table: Matrix, folder: str, plot_format: str) -> str:
    """Draws the table into a new file of a folder; returns its path."""
    from runtime.results import plots  # imported late: matplotlib is slow to import, and only --plot needs it
    path = free_path(os.path.join(folder, 'across'), plot_format)
    plots.save(plots.matrix(table.models, table.targets, {place: float(own_values(one).mean()) for place, one in table.cells.items()},
                            {place: table.text(*place) for place in table.cells}, table.metric, table.notes), path)
    return path
