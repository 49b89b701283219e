"""Evaluations of several runs side by side."""
import csv
import dataclasses
import io
import json
import os
import re
import string
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.cli.methods import switches
from runtime.results import across
from runtime.results.collect import Evaluation, describe_tasks, differing_parts, free_path, latex, read_evaluations, split_name
from runtime.results.statistics import UNITS, difference, interval, number, p_text, p_value, statistics
from runtime.system.errors import UserError

# Flags that do not influence the figures of an evaluation, or that are compared otherwise: by the tasks, the checkpoint or the
# statistics of batch norm. The switches of methods are in the method's name.
NOT_COMPARED = {'logdir', 'data_path', 'resume', 'log', 'plot', 'plot_format', 'format', 'save_interval', 'skip_nonfinite', 'engine',
                'task_chunk', 'strategy', 'train', 'baseline', 'verify', 'metatrain_iterations', 'run',
                'recompute', 'test_iter', 'test_best', 'test_set', 'test_seed', 'num_test_tasks', 'load_from', 'method',
                'ensemble'}  # the method's name tells of it


def settings(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """For each evaluation {name: value} of what may distinguish it from others on the same tasks; the method's name is ''."""
    flags = set().union(*(one.entry.get('flags', {}) for one in evaluations)) - NOT_COMPARED - set(switches())
    flags = sorted(flags | set(_beyond_the_name(evaluations)))
    return [{'': one.entry.get('method', 'MAML'), **{name: one.flag(name) for name in flags},
             'query_norm': one.entry.get('query_norm'), 'checkpoint': os.path.basename(one.entry['checkpoint'])}
            for one in evaluations]


def _beyond_the_name(evaluations):
    """Switches by which evaluations of one method's name differ, and iterations on which the step sizes of schedules depend."""
    scheduled = [one for one in evaluations if one.flag('meta_lr_schedule') != 'constant']
    for name, those in {**dict.fromkeys(switches(), evaluations), 'metatrain_iterations': scheduled}.items():
        found = {(one.entry.get('method', 'MAML'), one.flag(name)) for one in those}
        if len(found) > len({method for method, _ in found}):
            yield name


@dataclasses.dataclass(frozen=True)
class Row:
    """Some evaluations at one number of updates each."""
    title: str                  # the number of updates, or 'own'
    values: list[np.ndarray]    # of each evaluation, [tasks]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Evaluations on the same tasks."""
    evaluations: list[Evaluation]

    @property
    def tasks(self) -> str:
        """Text: which tasks they have in common."""
        return describe_tasks(self.evaluations[0].entry['tasks'])

    @property
    def title(self) -> str:
        """Text: the tasks, and the unit of the values."""
        return f'{self.tasks}: {UNITS[self.metric][0]}'

    @property
    def metric(self) -> str:
        """The kind of score, a key of UNITS."""
        return self.evaluations[0].entry['score']

    @property
    def letters(self) -> list[str]:
        """A letter for each evaluation, or its number after Z."""
        return [string.ascii_uppercase[number] if number < 26 else str(number) for number in range(len(self.evaluations))]

    def rows(self) -> list[Row]:
        """One for each number of updates that all have, and one at each one's own number if these differ."""
        values_of_each = [evaluation.values for evaluation in self.evaluations]
        own = [evaluation.own_updates for evaluation in self.evaluations]
        rows = [Row(str(updates), [values[:, updates] for values in values_of_each])
                for updates in range(min(values.shape[1] for values in values_of_each))]
        if len(set(own)) > 1:
            rows.append(Row('own', [values[:, updates] for values, updates in zip(values_of_each, own)]))
        return rows

    def seed_groups(self) -> list[list[int]]:
        """Numbers of evaluations that differ by their training's seed only, for each such group of two or more.

        Checkpoints of one iteration, or each seed's own best or ensemble. The latter must be there for all seeds: where the best is the
        newest, it may be there as the newest only, and a mean over the others would be over seeds that were chosen by chance.
        """
        alike, seeds = {}, {}
        for index, (one, evaluation) in enumerate(zip(settings(self.evaluations), self.evaluations)):
            kind = json.dumps({**one, 'seed': None, 'checkpoint': None}, sort_keys=True)
            seeds.setdefault(kind, set()).add(evaluation.flag('seed'))
            for best in evaluation.chosen_as_best:
                of = evaluation.flag('metatrain_iterations') if best else one['checkpoint']
                alike.setdefault((kind, best, of), []).append(index)
        found = {key: {self.evaluations[index].flag('seed') for index in group} for key, group in alike.items()}
        return [group for (kind, best, of), group in alike.items()
                if len(found[kind, best, of]) == len(group) > 1 and (not best or found[kind, best, of] == seeds[kind])]


def compare(folders: Sequence[str], plot: bool = False, style: str = 'text', plot_format: str = 'png') -> str:
    """The evaluations of several runs side by side, as far as they were made on the same tasks.

    Runs that were evaluated on other sources than their own are also put side by side with their own, see `across`.

    The difference of two runs is that of their values on each task, averaged. Its interval, and the p-value of a paired t-test,
    are narrower than those of the runs by themselves, because a task that is hard for one run is hard for the other.

    Args:
        folders: experiment directories, or folders of such at any depth; 'name=folder' says what to call its runs.
        plot: also draw the values against updates, into a new file comparison*.png in the first folder.
        style: 'text', 'csv' or 'latex'.

    Returns:
        The tables. What was left out and what was drawn is added as text, or in the other styles printed to stderr.

    Raises:
        UserError: there are no results, or no two evaluations were made on the same tasks.
    """
    named = [split_name(folder) for folder in folders]
    found = read_evaluations(named)
    comparable, single = by_tasks(found)
    side_by_side = across.tables(across.elsewhere(found))
    left_out = '; '.join(f'{one.path} on {describe_tasks(one.entry["tasks"])}' for one in single)
    if not comparable and side_by_side and style != 'text':
        raise UserError(f'no two evaluations were made on the same tasks; a table of models against sources is what --across --format={style} '
                        'prints')
    if not comparable and not side_by_side:
        raise UserError(f'there is only one evaluation, {left_out}; evaluate another run on the same tasks' if len(single) == 1
                        else f'no two evaluations were made on the same tasks: {left_out}')
    notes = [f'Left out, because nothing else was evaluated on the same tasks: {left_out}'] if single else []
    if plot:
        notes += [f'Drawn: {draw(comparison, named[0][1], plot_format)}' for comparison in comparable]
    if style == 'text':
        return '\n\n'.join([*map(as_text, comparable), *map(across.as_text, side_by_side), *filter(None, ['\n'.join(notes)])])
    print(*notes, sep='\n', end='\n' if notes else '', file=sys.stderr)
    return '\n'.join(map(as_latex, comparable)) if style == 'latex' else as_csv(*comparable)


def by_tasks(evaluations: Sequence[Evaluation]) -> tuple[list[Comparison], list[Evaluation]]:
    """Evaluations on the same tasks together, and those on tasks of which there is no other."""
    groups = {}
    for one in evaluations:
        groups.setdefault((one.tasks_key, one.entry['score']), []).append(one)
    return ([Comparison(group) for group in groups.values() if len(group) > 1],
            [group[0] for group in groups.values() if len(group) == 1])


def draw(comparison: Comparison, folder: str, plot_format: str) -> str:
    """Draws the values against updates, into a new file of a folder; returns its path."""
    from runtime.results import plots  # imported late: matplotlib is slow to import, and only --plot needs it
    path = free_path(os.path.join(folder, 'comparison'), plot_format)
    labels = [f'{letter}: {label}' for letter, label in zip(comparison.letters, what_differs(comparison.evaluations))]
    scores = [np.array(evaluation.entry['scores'], float) for evaluation in comparison.evaluations]
    plots.save(plots.curves(dict(zip(labels, scores)), comparison.metric, comparison.tasks), path)
    return path


def what_differs(evaluations: Sequence[Evaluation]) -> list[str]:
    """For each evaluation the name that the user gave it, and the settings in which it differs from others of that name.

    Where these do not tell evaluations apart, those parts of their paths that do are added.
    """
    named = list(zip([evaluation.given for evaluation in evaluations], settings(evaluations)))
    known = []
    for given, one in named:
        alike = [other for name, other in named if name == given]
        differing = [name for name in one if len({str(other[name]) for other in alike}) > 1]
        known.append([*filter(None, [given, *(_setting_text(given, name, one[name]) for name in differing)])])
    if not _all_different(known):
        for parts, path in zip(known, differing_parts([evaluation.path for evaluation in evaluations])):
            parts.append(path)
    return [', '.join(parts) for parts in known]


def _setting_text(given, name, value):
    """Text of a setting in a label; the method without what the user's own name says already."""
    if name == '':
        return re.sub(f'^{re.escape(given)}(, |$)', '', value) if given else value
    return value if name == 'checkpoint' else f'{name}={value}'


def _all_different(lists):
    return len({tuple(one) for one in lists}) == len(lists)


# The tables ---------------------------------------------------------------------------------------------------------

def as_text(comparison: Comparison) -> str:
    """The table for a terminal."""
    evaluations, letters = comparison.evaluations, comparison.letters
    digits, groups = UNITS[comparison.metric][2], comparison.seed_groups()
    lines = [comparison.title, '']
    lines += [f'  {letter}  {evaluation.path}  ({label})'
              for letter, evaluation, label in zip(letters, evaluations, what_differs(evaluations))]
    table = [['updates', *letters, *(title for letter in letters[1:] for title in (f'{letter} - A', 'p')),
              *(_seeds_title(group, letters) for group in groups)]]
    for row in comparison.rows():
        cells = [interval(values, digits) for values in row.values]
        for values in row.values[1:]:
            cells += [interval(difference(values, row.values[0]), digits), p_text(values, row.values[0])]
        table.append([row.title, *cells, *(_mean_and_deviation(over_seeds(row, group), digits) for group in groups)])
    widths = [max(map(len, column)) for column in zip(*table)]
    lines += ['', *('  ' + '  '.join(cell.rjust(width) for cell, width in zip(row, widths)) for row in table)]
    if table[-1][0] == 'own':
        lines.append('  (own: each at its own number of updates, '
                     + ', '.join(f'{letter} {evaluation.own_updates}' for letter, evaluation in zip(letters, evaluations)) + ')')
    if groups:
        lines.append('  (over seeds: the mean of the means of runs that differ by --seed only, and their standard deviation)')
    return '\n'.join(lines)


def _mean_and_deviation(pair, digits):
    return f'{number(pair[0], digits)} ({number(pair[1], digits)})'


def _seeds_title(group, letters):
    return f'{"".join(letters[number] for number in group)} over seeds'


def over_seeds(row: Row, group: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) over the runs of a group of their means over tasks."""
    with np.errstate(all='ignore'):  # some diverged
        means = [row.values[one].mean() for one in group]
        return float(np.mean(means)), float(np.std(means, ddof=1))


def as_csv(*comparisons: Comparison) -> str:
    """One line for each run and number of updates."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['tasks', 'metric', 'run', 'label', 'path', 'seed', 'updates', 'mean', 'std', 'ci95', 'difference', 'difference_ci95',
                     'p'])
    for comparison in comparisons:
        labels = what_differs(comparison.evaluations)
        for row in comparison.rows():
            for letter, label, evaluation, values in zip(comparison.letters, labels, comparison.evaluations, row.values):
                mean, std, half = (float(column[0]) for column in statistics(values[:, None]))
                apart, _, apart_half = (float(column[0]) for column in statistics(difference(values, row.values[0])[:, None]))
                writer.writerow([comparison.tasks, UNITS[comparison.metric][0], letter, label, evaluation.path, evaluation.flag('seed'), row.title,
                                 mean, std, half, apart, apart_half, float(p_value(values, row.values[0]))])
            for group in comparison.seed_groups():
                writer.writerow([comparison.tasks, UNITS[comparison.metric][0], *_over_seeds_cells(comparison, group), row.title,
                                 *over_seeds(row, group), '', '', '', ''])
    return text.getvalue().rstrip('\n')


def _over_seeds_cells(comparison, group):
    """What the columns run, label, path and seed hold in a line of csv about runs that differ by seed only."""
    seeds = ' '.join(str(comparison.evaluations[number].flag('seed')) for number in group)
    return ''.join(comparison.letters[number] for number in group), 'over seeds: mean, and deviation of the means', '', seeds


def as_latex(comparison: Comparison) -> str:
    """A tabular environment: one row for each run, with its difference from the first at its own number of updates."""
    digits = UNITS[comparison.metric][2]
    own = Row('own', [evaluation.values[:, evaluation.own_updates] for evaluation in comparison.evaluations])
    lines = [f'% {comparison.title}', r'\begin{tabular}{lrrrr}', r'\hline',
             rf'run & updates & {latex(UNITS[comparison.metric][0])} & difference & $p$ \\', r'\hline']
    for label, evaluation, values in zip(what_differs(comparison.evaluations), comparison.evaluations, own.values):
        apart = ['', ''] if values is own.values[0] else [
            interval(difference(values, own.values[0]), digits), p_text(values, own.values[0])]
        cells = [latex(label), str(evaluation.own_updates), *(f'${cell.replace("±", chr(92) + "pm")}$' if cell else ''
                                                                for cell in (interval(values, digits), *apart))]
        lines.append(' & '.join(cells) + r' \\')
    for group in comparison.seed_groups():
        mean, std = over_seeds(own, group)
        lines.append(rf'mean over {len(group)} seeds & {comparison.evaluations[group[0]].own_updates} & '
                     rf'${number(mean, digits)}$ (std ${number(std, digits)}$) & & \\')
    return '\n'.join([*lines, r'\hline', r'\end{tabular}'])
