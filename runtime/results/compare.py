"""Evaluations of several runs side by side."""
import collections
import dataclasses
import json
import math
import os
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.cli.methods import switches
from runtime.results import render
from runtime.results.collect import Evaluation, describe_tasks, differing_parts, read_evaluations, split_name, unused_path
from runtime.results.statistics import UNITS, difference, interval, number, over_tasks_and_seeds, p_text, p_value, statistics
from runtime.system.errors import UserError

COLUMNS = ['tasks', 'metric', 'run', 'label', 'path', 'seed', 'updates', 'mean', 'std', 'ci95', 'difference', 'difference_ci95', 'p']


def settings(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """For each evaluation {name: value} of what may distinguish it from others on the same tasks; the method's name is ''."""
    flags = set().union(*(evaluation.entry.training.flags for evaluation in evaluations))
    flags = sorted(flags - {*switches(), 'baseline', 'metatrain_iterations'} | set(_beyond_the_name(evaluations)))
    return [{'': evaluation.method, **{name: evaluation.flag(name) for name in flags},
             'pretrain_iterations': evaluation.entry.training.pretrain_iterations, **_schedule(evaluation), **_adaptation(evaluation),
             'test_updates': evaluation.entry.setting.test_updates, 'query_norm': evaluation.entry.setting.query_norm,
             'checkpoint': evaluation.entry.checkpoint} for evaluation in evaluations]


def _beyond_the_name(evaluations):
    """Switches by which evaluations of one method's name differ."""
    for name in switches():
        values = {(evaluation.method, evaluation.flag(name)) for evaluation in evaluations}
        if len(values) > len({method for method, _ in values}):
            yield name


def _schedule(evaluation):
    """The iterations on which the step sizes of a schedule depend."""
    scheduled = evaluation.flag('meta_lr_schedule') != 'constant'
    return {'metatrain_iterations': evaluation.entry.training.metatrain_iterations} if scheduled else {}


def _adaptation(evaluation):
    """In what the inner loop of the evaluation differs from that of the training, and weights from elsewhere."""
    setting = evaluation.entry.setting
    changed = {f'evaluation {name}': getattr(setting, name) for name in ('update_lr', 'inner_batch')
               if getattr(setting, name) != evaluation.flag(name)}
    return changed | ({'load_from': setting.load_from} if setting.load_from else {})


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
        return describe_tasks(self.evaluations[0].entry.tasks)

    @property
    def title(self) -> str:
        """Text: the tasks, and the unit of the values."""
        return f'{self.tasks}: {UNITS[self.metric][0]}'

    @property
    def metric(self) -> str:
        """The kind of score, a key of UNITS."""
        return self.evaluations[0].entry.metric

    @property
    def letters(self) -> list[str]:
        """A letter for each evaluation, or its number after Z."""
        return [string.ascii_uppercase[number] if number < 26 else str(number) for number in range(len(self.evaluations))]

    @property
    def headline(self) -> Row:
        """Each evaluation at the number of updates at which its method is reported."""
        return Row('own', [evaluation.headline_values for evaluation in self.evaluations])

    def rows(self) -> list[Row]:
        """One for each number of updates that all have, and the headline if the methods are reported at different ones."""
        values_of_each = [evaluation.values for evaluation in self.evaluations]
        rows = [Row(str(updates), [values[:, updates] for values in values_of_each])
                for updates in range(min(values.shape[1] for values in values_of_each))]
        return rows + ([self.headline] if len({evaluation.headline_updates for evaluation in self.evaluations}) > 1 else [])

    def seed_groups(self) -> list[tuple[int, ...]]:
        """Numbers of evaluations that differ by their training's seed only, for each such group of two or more.

        They are of checkpoints of one iteration, or of each seed's own best or ensemble. Where all are of best checkpoints, all seeds must
        be there: a mean over some would be over seeds that were chosen by chance.
        """
        alike, seeds = {}, {}
        for index, (setting, evaluation) in enumerate(zip(settings(self.evaluations), self.evaluations)):
            kind = json.dumps({**setting, 'seed': None, 'checkpoint': None}, sort_keys=True)
            seeds.setdefault(kind, set()).add(evaluation.flag('seed'))
            alike.setdefault((kind, 'checkpoint', evaluation.entry.checkpoint), []).append(index)
            if evaluation.entry.is_best:
                alike.setdefault((kind, 'best', evaluation.entry.training.metatrain_iterations), []).append(index)
        groups = {}  # a dict keeps the order, and a group of newest checkpoints that are the best, too, is one group
        for (kind, _, _), group in alike.items():
            seeds_of_group = {self.evaluations[index].flag('seed') for index in group}
            all_best = all(self.evaluations[index].entry.is_best for index in group)
            if len(seeds_of_group) == len(group) > 1 and (not all_best or seeds_of_group == seeds[kind]):
                groups[tuple(group)] = None
        return list(groups)


def compare(folders: Sequence[str], plot: bool = False, style: str = 'text', plot_format: str = 'png',
            checkpoints: str = 'all') -> str:
    """The evaluations of several runs side by side, as far as they were made on the same tasks.

    The difference of two runs is that of their values on each task, averaged. Its interval, and the p-value of a paired t-test,
    are narrower than those of the runs by themselves, because a task that is hard for one run is hard for the other.

    Args:
        folders: experiment directories, or folders of such at any depth; 'name=folder' says what to call its runs.
        plot: also draw the values against updates, into a new file comparison*.png in the first folder.
        style: 'text', 'csv' or 'latex'.
        checkpoints: of each run, 'all' that were evaluated, the 'newest' or the 'best'.

    Returns:
        The tables. What was left out and what was drawn is added as text, or in the other styles printed to stderr.

    Raises:
        UserError: there are no results, or no two evaluations were made on the same tasks.
    """
    labelled = [split_name(folder) for folder in folders]
    comparisons, single = by_tasks(read_evaluations(labelled, checkpoints))
    left_out = '; '.join(f'{evaluation.path} on {describe_tasks(evaluation.entry.tasks)}' for evaluation in single)
    if not comparisons:
        raise UserError(f'there is only one evaluation, {left_out}; evaluate another run on the same tasks' if len(single) == 1 else
                        f'no two evaluations were made on the same tasks: {left_out}; --across shows models that were evaluated on several sources')
    remarks = [f'Left out, because nothing else was evaluated on the same tasks: {left_out}'] if single else []
    if plot:
        remarks += [f'Drawn: {draw(comparison, labelled[0][1], plot_format)}' for comparison in comparisons]
    tables = []
    for comparison in comparisons:
        tables += [headline_table(comparison) if style == 'latex' else update_table(comparison)]
        tables += [method_table(comparison)] if comparison.seed_groups() else []
    return render.output(style, tables, records(comparisons), remarks)


def by_tasks(evaluations: Sequence[Evaluation]) -> tuple[list[Comparison], list[Evaluation]]:
    """Evaluations on the same tasks together, and those on tasks of which there is no other."""
    groups = {}
    for evaluation in evaluations:
        groups.setdefault((evaluation.tasks_key, evaluation.entry.metric), []).append(evaluation)
    return ([Comparison(group) for group in groups.values() if len(group) > 1],
            [group[0] for group in groups.values() if len(group) == 1])


def draw(comparison: Comparison, folder: str, plot_format: str) -> str:
    """Draws the values against updates, into a new file of a folder; returns its path."""
    from runtime.results import plots  # imported late: matplotlib is slow to import, and only --plot needs it
    path = unused_path(os.path.join(folder, 'comparison'), plot_format)
    plots.save(plots.curves(curves_of(comparison), comparison.metric, comparison.tasks), path)
    return path


def curves_of(comparison: Comparison) -> dict[str, np.ndarray]:
    """{label: scores} of what a picture shows: [seeds, tasks, 1 + updates] of methods with several seeds, [tasks, 1 + updates] of others."""
    scores, groups = [np.array(evaluation.entry.scores) for evaluation in comparison.evaluations], comparison.seed_groups()
    curves = {f'{_group_letters(comparison, group)}: {group_label(comparison.evaluations, group)}, {len(group)} seeds':
              np.stack([scores[index] for index in group]) for group in groups}
    single = [index for index in range(len(scores)) if not any(index in group for group in groups)]
    labels = what_differs(comparison.evaluations)
    return curves | {f'{comparison.letters[index]}: {labels[index]}': scores[index] for index in single}


# Labels -------------------------------------------------------------------------------------------------------------

def what_differs(evaluations: Sequence[Evaluation]) -> list[str]:
    """For each evaluation the name that the user gave it, and the settings in which it differs from others of that name.

    Where these do not tell evaluations apart, those parts of their paths that do are added.
    """
    parts_of_each = _label_parts(evaluations)
    if len({tuple(parts) for parts in parts_of_each}) < len(parts_of_each):
        for parts, path in zip(parts_of_each, differing_parts([evaluation.path for evaluation in evaluations])):
            parts.append(path)
    return [', '.join(parts) or evaluation.method for parts, evaluation in zip(parts_of_each, evaluations)]


def _label_parts(evaluations):
    """For each evaluation the name that the user gave it, and the settings in which it differs from others of that name.

    Where these have different methods, the usual value of another setting is not stated.
    """
    named = list(zip([evaluation.user_label for evaluation in evaluations], settings(evaluations)))
    parts_of_each = []
    for user_label, setting in named:
        alike = [other for label, other in named if label == user_label]
        counts = {name: collections.Counter(str(other.get(name)) for other in alike) for name in setting}
        usual = {name: count.most_common(1)[0][0] for name, count in counts.items() if name not in ('', 'checkpoint', 'seed')}
        differing = [name for name in setting if len(counts[name]) > 1
                     and not (len(counts['']) > 1 and usual.get(name) == str(setting[name]))]
        parts_of_each.append([*filter(None, [user_label, *(_setting_text(user_label, name, setting[name]) for name in differing)])])
    return parts_of_each


def _setting_text(user_label, name, value):
    """Text of a setting in a label; the method without what the user's own name says already."""
    if name == '':
        return re.sub(f'^{re.escape(user_label)}(, |$)', '', value) if user_label else value
    return value if name == 'checkpoint' else f'{name}={value}'


def group_label(evaluations: Sequence[Evaluation], group: Sequence[int]) -> str:
    """The name of a group of evaluations, and what else their labels have in common."""
    parts_of_each, first = _label_parts(evaluations), evaluations[group[0]]
    common = [part for part in parts_of_each[group[0]] if all(part in parts_of_each[index] for index in group)]
    best = ['best checkpoint of each seed'] if len({evaluations[index].entry.checkpoint for index in group}) > 1 else []
    return ', '.join(dict.fromkeys([first.user_label or first.method, *common, *best]))


# Tables -------------------------------------------------------------------------------------------------------------

def update_table(comparison: Comparison) -> render.Table:
    """A row for each number of updates, a column for each evaluation, and for each but the first its difference from the first."""
    evaluations, letters = comparison.evaluations, comparison.letters
    digits, groups = UNITS[comparison.metric][2], comparison.seed_groups()
    legend = [f'{letter}  {evaluation.path}  ({label})' for letter, evaluation, label in zip(letters, evaluations, what_differs(evaluations))]
    columns = ['updates', *letters, *(title for letter in letters[1:] for title in (f'{letter} - A', 'p')),
               *(f'{_group_letters(comparison, group)} over seeds' for group in groups)]
    comparison_rows, rows, notes = comparison.rows(), [], []
    for row in comparison_rows:
        cells = [interval(values, digits) for values in row.values]
        for values in row.values[1:]:
            cells += [interval(difference(values, row.values[0]), digits), p_text(p_value(values, row.values[0]))]
        rows.append([row.title, *cells, *(_mean_and_deviation(row, group, digits) for group in groups)])
    if comparison_rows[-1].title == 'own':
        notes.append('own: each at its own number of updates, '
                     + ', '.join(f'{letter} {evaluation.headline_updates}' for letter, evaluation in zip(letters, evaluations)))
    if groups:
        notes.append('over seeds: the mean of the means of runs that differ by --seed only, and their standard deviation')
    return render.Table(comparison.title, columns, rows, legend, notes)


def headline_table(comparison: Comparison) -> render.Table:
    """A row for each evaluation, at its own number of updates, with its difference from the first."""
    digits, headline, evaluations = UNITS[comparison.metric][2], comparison.headline, comparison.evaluations
    rows = [[label, evaluation.headline_updates, interval(values, digits), interval(difference(values, headline.values[0]), digits),
             p_text(p_value(values, headline.values[0]))] for label, evaluation, values in zip(what_differs(evaluations), evaluations, headline.values)]
    rows[0][3:] = '', ''
    return render.Table(comparison.title, ['run', 'updates', UNITS[comparison.metric][0], 'difference', 'p'], rows)


def method_table(comparison: Comparison) -> render.Table:
    """A row for each method that was trained with several seeds, with its difference from the first, paired by task and seed."""
    evaluations, groups, digits = comparison.evaluations, comparison.seed_groups(), UNITS[comparison.metric][2]
    rows = []
    for group in groups:
        mean, half, _ = _across_seeds(comparison.headline, group)
        mean_difference, half_of_difference, p = _difference_of_groups(comparison, comparison.headline, groups[0], group)
        is_compared = group != groups[0] and not math.isnan(mean_difference)
        rows.append([group_label(evaluations, group), len(group), evaluations[group[0]].headline_updates,
                     f'{number(mean, digits)} ± {number(half, digits)}',
                     f'{number(mean_difference, digits)} ± {number(half_of_difference, digits)}' if is_compared else '',
                     p_text(p) if is_compared else ''])
    return render.Table(f'{comparison.title}, over seeds', ['method', 'seeds', 'updates', UNITS[comparison.metric][0], 'difference', 'p'], rows,
                        notes=['95% intervals that cover other tasks and other seeds; differences from the first, paired by task and seed'])


def _across_seeds(row, group):
    """Mean, half-width and p-value, as of `over_tasks_and_seeds`, of a group of evaluations."""
    return [float(figure[0]) for figure in over_tasks_and_seeds(np.stack([row.values[index] for index in group])[..., None])]


def _difference_of_groups(comparison, row, first, group):
    """Mean, half-width and p-value of a group's difference from the first group; nan if they have fewer than two seeds in common."""
    by_seed, by_seed_of_first = ({comparison.evaluations[index].flag('seed'): index for index in indices} for indices in (group, first))
    pairs = [(by_seed[seed], by_seed_of_first[seed]) for seed in by_seed if seed in by_seed_of_first]
    if len(pairs) < 2:
        return math.nan, math.nan, math.nan
    differences = np.stack([difference(row.values[index], row.values[index_of_first]) for index, index_of_first in pairs])
    return [float(figure[0]) for figure in over_tasks_and_seeds(differences[..., None])]


def records(comparisons: Sequence[Comparison]) -> render.Table:
    """A row for each evaluation and number of updates, and for each group of seeds."""
    rows = []
    for comparison in comparisons:
        tasks, labels, groups = [comparison.tasks, UNITS[comparison.metric][0]], what_differs(comparison.evaluations), comparison.seed_groups()
        for row in comparison.rows():
            for letter, label, evaluation, values in zip(comparison.letters, labels, comparison.evaluations, row.values):
                figures = [float(statistic[0]) for statistic in statistics(values[:, None])]
                mean_difference, _, half = (float(statistic[0]) for statistic in statistics(difference(values, row.values[0])[:, None]))
                rows.append([*tasks, letter, label, evaluation.path, evaluation.flag('seed'), row.title, *figures, mean_difference, half,
                             p_value(values, row.values[0])])
            for group in groups:
                seeds = ' '.join(str(comparison.evaluations[index].flag('seed')) for index in group)
                rows.append([*tasks, _group_letters(comparison, group), group_label(comparison.evaluations, group) + ', over seeds', '', seeds,
                             row.title, *over_seeds(row, group), _across_seeds(row, group)[1],
                             *_difference_of_groups(comparison, row, groups[0], group)])
    return render.Table('', COLUMNS, rows)


def over_seeds(row: Row, group: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) over the runs of a group of their means over tasks."""
    with np.errstate(all='ignore'):  # some diverged
        means = [row.values[index].mean() for index in group]
        return float(np.mean(means)), float(np.std(means, ddof=1))


def _mean_and_deviation(row, group, digits):
    mean, deviation = over_seeds(row, group)
    return f'{number(mean, digits)} ({number(deviation, digits)})'


def _group_letters(comparison, group):
    return ''.join(comparison.letters[index] for index in group)
