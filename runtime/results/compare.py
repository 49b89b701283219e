"""Evaluations of several runs side by side."""
import collections
import itertools
import json
import math
import os
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from runtime.cli.flags import BUILT_IN_NETWORKS, default
from runtime.cli.methods import preset_flags, switches, title
from runtime.results import provenance, render
from runtime.results.collect import RunEntry, choose, describe_tasks, descriptions, differing_parts, read_evaluations, split_name
from runtime.results.statistics import UNITS, difference, holm, number, over_tasks_and_seeds, paired_test, plus_minus, statistics
from runtime.results.store import column_titles
from runtime.system.errors import UserError


def compare(folders: Sequence[str], plot: bool = False, style: str = 'text', plot_format: str = 'png', checkpoints: str = 'all',
            against: str | None = None) -> str:
    """The evaluations of several runs side by side, as far as they were made on the same tasks.

    The difference of two runs is that of their values on each task, averaged. Its interval, and the p-value of a paired test, are
    narrower than those of the runs by themselves, because a task that is hard for one run is hard for the other. Beside each p-value of
    several in a table there is one that Holm's method corrects for their number.

    Args:
        folders: experiment directories, or folders of such at any depth; 'name=folder' says what to call its runs.
        plot: also draw the values against updates, into a new file comparison*.png in the first folder.
        style: 'text', 'csv' or 'latex'.
        checkpoints: of each run, 'all' that were evaluated, the 'newest' or the 'best'.
        against: a flag; the picture shows the values at each method's own number of updates against it.

    Returns the tables; what was left out and what was drawn is added as text, or in the other styles printed to stderr. Raises
    UserError if there are no results, no two evaluations were made on the same tasks, or they do not differ in `against`.
    """
    evaluations, others = choose(read_evaluations(folders), checkpoints)
    texts, groups, groups_of_others = descriptions(evaluations), _on_the_same_tasks(evaluations), _on_the_same_tasks(others)
    single = [group[0] for group in groups.values() if len(group) == 1]
    comparisons = [Comparison(group, texts[key], groups_of_others.get((key, metric), ()))
                   for (key, metric), group in groups.items() if len(group) > 1]
    left_out = '; '.join(f'{evaluation.path} on {texts[evaluation.tasks_key]}' for evaluation in single)
    if not comparisons:
        raise UserError(f'there is only one evaluation, {left_out}; evaluate another run on the same tasks' if len(single) == 1 else
                        f'no two evaluations were made on the same tasks: {left_out}; --across shows models that were evaluated on '
                        'several sources')
    remarks = [f'Left out, because nothing else was evaluated on the same tasks: {left_out}'] if single else []
    if plot:
        remarks += draw(comparisons, os.path.join(split_name(folders[0])[1], 'comparison'), plot_format, against)
    tables = []
    for comparison in comparisons:
        tables += [headline_table(comparison) if style == 'latex' else update_table(comparison)]
        tables += [method_table(comparison)] if comparison.groups else []
    return render.output(style, tables, records(comparisons), remarks)


def _on_the_same_tasks(evaluations):
    """{(key of tasks, metric): evaluations}."""
    groups = {}
    for evaluation in evaluations:
        groups.setdefault((evaluation.tasks_key, evaluation.entry.metric), []).append(evaluation)
    return groups


def draw(comparisons: Sequence['Comparison'], stem: str, plot_format: str, against: str | None) -> list[str]:
    """Draws each into a new file, against updates, or those that differ in a flag against it, and returns lines that say so."""
    from runtime.results import plots  # imported late: matplotlib is slow to import, and only --plot needs it
    pictures = []
    for comparison in comparisons:
        if not against:
            curves, without_updates = curves_of(comparison)
            pictures.append(plots.curves(curves, comparison.metric, comparison.tasks, without_updates))
        elif len({str(swept_value(evaluation, against)) for evaluation in comparison.evaluations}) > 1:
            pictures.append(plots.sweep(sweep_of(comparison, against), against, comparison.metric, comparison.tasks))
    if not pictures:
        raise UserError(f'--against={against}: these runs do not differ in it')
    return [f'Drawn: {plots.save_new(picture, stem, plot_format)}' for picture in pictures]


# What is compared ---------------------------------------------------------------------------------------------------

class Line(NamedTuple):
    """An evaluation, or several that differ by their training's seed only."""
    letters: str                # one for each evaluation, or its number after Z
    label: str
    path: str                   # '' of several
    seed: int | str             # of the training, or text: several
    updates: int                # at which the method is reported
    indices: tuple[int, ...]    # of the evaluations


class LineFigures(NamedTuple):
    """Statistics of a line, and of its difference from the first of its kind; nan if it has not two seeds in common with that."""
    mean: float
    std: float                  # over tasks; of several seeds: of their means (n - 1)
    ci95: float                 # half-width of the interval of the mean
    difference: float
    difference_ci95: float
    p: float
    signed_rank: bool = False   # whether p is that of a signed-rank test
    p_holm: float = math.nan    # corrected for the other p-values of the table

    def cells(self, digits: int, titles: Sequence[str]) -> list[str]:
        """Texts: the mean, the difference, and p-values as `p_titles` says."""
        p, p_holm = ('-' if math.isnan(value) else f'{value:.2g}' for value in (self.p, self.p_holm))
        p_values = [p + ('*' if self.signed_rank else ''), p_holm][:len(titles)]
        return [plus_minus(self.mean, self.ci95, digits), plus_minus(self.difference, self.difference_ci95, digits), *p_values]


def p_titles(figures: Sequence[Sequence[LineFigures]]) -> list[str]:
    """The titles of the p-values of a table, [rows][lines]: there are corrected ones if there are several."""
    return ['p', 'Holm'] if sum(len(row) - 1 for row in figures) > 1 else ['p']


class Comparison:
    """Evaluations on the same tasks.

    Attributes:
        tasks, unit, title: text.
        lines: one for each evaluation.
        groups: one for each two or more evaluations that differ by their training's seed only.
        headline: values of each evaluation, [tasks], at the number of updates at which its method is reported.
        rows: {number of updates that all have: such values}, and 'own': the headline, if these numbers differ.

    `left_out` are those that were not chosen, whose seeds a mean over the best checkpoints may lack.
    """

    def __init__(self, evaluations: Sequence[RunEntry], tasks: str = '', left_out: Sequence[RunEntry] = ()):
        self.evaluations = evaluations
        self.tasks, self.metric = tasks or describe_tasks(evaluations[0].entry.tasks), evaluations[0].entry.metric
        self.unit, self.digits = UNITS[self.metric].title, UNITS[self.metric].digits
        self.title = f'{self.tasks}: {self.unit}'
        letters = [string.ascii_uppercase[number] if number < 26 else str(number) for number in range(len(evaluations))]
        self.lines = [Line(letters[index], label, evaluation.path, evaluation.flag('seed'), evaluation.headline_updates, (index,))
                      for index, (label, evaluation) in enumerate(zip(what_differs(evaluations), evaluations))]
        self.groups = [self._group(indices) for indices in seed_groups(evaluations, left_out)]
        self.headline = [evaluation.headline_values for evaluation in evaluations]
        columns_of_each = [dict(zip(column_titles(evaluation.entry.setting.test_updates), evaluation.values.T))
                           for evaluation in evaluations]
        common = [title for title in columns_of_each[0] if all(title in columns for columns in columns_of_each)]
        self.rows = {title: [columns[title] for columns in columns_of_each] for title in common}
        if len({evaluation.headline_updates for evaluation in evaluations}) > 1:
            self.rows['own'] = self.headline

    def _group(self, indices):
        lines = [self.lines[index] for index in indices]
        return Line(''.join(line.letters for line in lines), group_label(self.evaluations, indices), '',
                    ' '.join(str(line.seed) for line in lines), lines[0].updates, indices)

    def figures(self, lines: Sequence[Line], rows: Iterable[Sequence[np.ndarray]]) -> list[list[LineFigures]]:
        """The statistics of a table, [rows][lines], with the p-values of all lines but the first corrected for their number."""
        figures = [[self._figures_of(line, row) for line in lines] for row in rows]
        p_holm = holm(np.array([[cell.p for cell in row[1:]] for row in figures]))
        return [[*row[:1], *(cell._replace(p_holm=float(p)) for cell, p in zip(row[1:], p_values))]
                for row, p_values in zip(figures, p_holm)]

    def _figures_of(self, line, row):
        if len(line.indices) > 1:
            return self._figures_of_seeds(line, row)
        values = row[line.indices[0]]
        mean_difference, _, half_of_difference = statistics(difference(values, row[0]))
        return LineFigures(*statistics(values), mean_difference, half_of_difference, *paired_test(values, row[0]))

    def _figures_of_seeds(self, line, row):
        values = np.stack([row[index] for index in line.indices])
        mean, half, _ = over_tasks_and_seeds(values)
        with np.errstate(all='ignore'):  # some diverged
            std = np.std(values.mean(axis=1), ddof=1)
        by_seed, by_seed_of_first = ({self.lines[index].seed: index for index in group.indices} for group in (line, self.groups[0]))
        differences = [difference(row[by_seed[seed]], row[by_seed_of_first[seed]]) for seed in by_seed if seed in by_seed_of_first]
        paired = over_tasks_and_seeds(np.stack(differences)) if len(differences) > 1 else [math.nan] * 3
        return LineFigures(mean, std, half, *map(float, paired))


def seed_groups(evaluations: Sequence[RunEntry], left_out: Sequence[RunEntry] = ()) -> list[tuple[int, ...]]:
    """Indices of evaluations that differ by their training's seed only, and have one name, for each such group of two or more.

    They are of checkpoints of one iteration, or of each seed's own best or ensemble. Where all are of best checkpoints, they are the
    best of equally long trainings, and all seeds must be there, also those of evaluations that were `left_out`: a mean over some would be
    over seeds that were chosen by chance.
    """
    alike, seeds, known = {}, {}, [*evaluations, *left_out]
    for index, (setting, evaluation) in enumerate(zip(settings(known), known)):
        # Of one training, the newest checkpoint and an ensemble are kinds of their own, and have the seeds in common.
        common = {**setting, 'seed': None, 'checkpoint': None, 'user_label': evaluation.user_label, 'updates': evaluation.headline_updates}
        training, kind = (json.dumps({**common, '': method}, sort_keys=True)
                          for method in (evaluation.entry.training.method, evaluation.method))
        seeds.setdefault(training, set()).add(evaluation.flag('seed'))
        if index >= len(evaluations):
            continue
        alike.setdefault((training, kind, evaluation.entry.checkpoint), []).append(index)
        if evaluation.entry.is_best:
            alike.setdefault((training, kind, 'best', evaluation.newest), []).append(index)
    groups = {}  # a dict keeps the order, and a group of newest checkpoints that are the best, too, is one group
    for (training, *_), group in alike.items():
        seeds_of_group = {evaluations[index].flag('seed') for index in group}
        all_best = all(evaluations[index].entry.is_best for index in group)
        lengths = {evaluations[index].newest for index in group}
        if len(seeds_of_group) == len(group) > 1 and (not all_best or len(lengths) == 1 and seeds_of_group == seeds[training]):
            groups[tuple(group)] = None
    return list(groups)


def curves_of(comparison: Comparison) -> tuple[dict[str, np.ndarray], list[str]]:
    """{label: scores} of what a picture shows: [seeds, tasks, columns] of methods with several seeds, [tasks, columns] of the
    other evaluations; and the labels of those without inner updates."""
    lines = {f'{group.letters}: {group.label}, {len(group.indices)} seeds': group for group in comparison.groups}
    grouped = {index for group in comparison.groups for index in group.indices}
    lines |= {f'{line.letters}: {line.label}': line for line in comparison.lines if line.indices[0] not in grouped}
    entries = {label: [comparison.evaluations[index].entry for index in line.indices] for label, line in lines.items()}
    scores = {label: np.array([entry.scores for entry in alike]) for label, alike in entries.items()}
    return ({label: values if len(values) > 1 else values[0] for label, values in scores.items()},
            [label for label, alike in entries.items() if not alike[0].setting.test_updates])


# The picture of a sweep ---------------------------------------------------------------------------------------------

def swept_value(evaluation: RunEntry, flag: str) -> Any:
    """What a flag was in an evaluation, or else in its training."""
    for part in evaluation.entry.setting, evaluation.entry.training:
        if hasattr(part, flag):
            return getattr(part, flag)
    return evaluation.flag(flag)


def sweep_of(comparison: Comparison, flag: str) -> dict[str, dict[Any, np.ndarray]]:
    """{line: {value of a flag: values [seeds, tasks] at the line's own number of updates}}, a line for each method, or for
    whatever else evaluations differ in beside the flag and their training's seed; raises UserError if several are of one line,
    value and seed."""
    evaluations = comparison.evaluations
    described = [{name: value for name, value in setting.items() if name not in (flag, f'evaluation {flag}', 'seed', 'checkpoint')}
                 | {'': method_without(evaluation, flag)}
                 | ({} if flag in ('num_updates', 'test_updates') else {'updates': evaluation.headline_updates})
                 for evaluation, setting in zip(evaluations, settings(evaluations))]
    labels = [', '.join(parts) for parts in _label_parts(evaluations, described)]
    seeds: dict[str, dict[Any, dict[Any, np.ndarray]]] = {}
    for evaluation, label, setting, values in zip(evaluations, labels, described, comparison.headline):
        values_by_seed = seeds.setdefault(label or setting[''], {}).setdefault(swept_value(evaluation, flag), {})
        if evaluation.flag('seed') in values_by_seed:
            raise UserError(f'--against={flag}: {evaluation.directory} has several evaluations, or another run differs from it in nothing '
                            f'but its name; add --checkpoints=newest or best, or name fewer runs')
        values_by_seed[evaluation.flag('seed')] = values
    return {label: {value: np.stack([*by_seed.values()]) for value, by_seed in points.items()} for label, points in seeds.items()}


def method_without(evaluation: RunEntry, flag: str) -> str:
    """The name of an evaluation's method without what a flag adds to it, such as 'with inner_batch=5'."""
    if flag not in switches():
        return evaluation.method
    return title({name: evaluation.flag(name) for name in [*switches(), 'num_updates']} | {flag: default(flag)})


# Labels -------------------------------------------------------------------------------------------------------------

def settings(evaluations: Sequence[RunEntry]) -> list[dict[str, Any]]:
    """For each evaluation {name: value} of what may distinguish it from others on the same tasks; the method's name is ''."""
    flags = set().union(*(evaluation.entry.training.flags for evaluation in evaluations))
    flags = sorted(flags - {*switches(), 'baseline', 'metatrain_iterations'} | set(_differing_switches(evaluations)))
    return [{'': evaluation.method,
             **{name: evaluation.flag(name) for name in flags if not (name in BUILT_IN_NETWORKS and evaluation.flag('network'))},
             **identity, **_settings_beside_flags(evaluation)} for evaluation, identity in zip(evaluations, _identities(evaluations))]


def _identities(evaluations):
    """For each evaluation {what it was trained from: which}. What is not known of one is taken to be what it is of all others, if they
    agree."""
    identities = [provenance.identity(evaluation.entry.training.provenance) for evaluation in evaluations]
    values = {name: {identity[name] for identity in identities} - {None} for name in identities[0]}
    return [{name: facts.copy().pop() if len(facts) == 1 else identity[name] or 'not known' for name, facts in values.items()}
            if any(values.values()) else {} for identity in identities]


def arithmetic_note(evaluations: Sequence[RunEntry]) -> list[str]:
    """A note if the trainings of the evaluated models differ in what decides how numbers are rounded; else []."""
    trainings = [evaluation.entry.training.provenance for evaluation in evaluations]
    kinds = [part for training in trainings for part in (training.arithmetic if training else [])]
    names = provenance.differing(kinds)
    return [f'trained with different {", ".join(names)}: numbers are rounded differently, as if by another seed'] if names else []


def _differing_switches(evaluations):
    """Switches by which evaluations of one method's name differ."""
    for name in switches():
        values = {(evaluation.method, evaluation.flag(name)) for evaluation in evaluations}
        if len(values) > len({method for method, _ in values}):
            yield name


def _settings_beside_flags(evaluation):
    """Iterations, in what the inner loop of the evaluation differs from that of the training, and which weights it is of."""
    training, setting = evaluation.entry.training, evaluation.entry.setting
    values = {'pretrain_iterations': training.pretrain_iterations}
    if evaluation.flag('meta_lr_schedule') != 'constant':  # step sizes depend on the number of iterations
        values['metatrain_iterations'] = training.metatrain_iterations
    for name in 'update_lr', 'inner_batch':
        if getattr(setting, name) != evaluation.flag(name):
            values[f'evaluation {name}'] = getattr(setting, name)
    if setting.load_from:
        values['load_from'] = setting.load_from
    return {**values, 'head': setting.head, 'labels': setting.orders_text, 'adapted_by': setting.adapted_by,
            'test_updates': setting.test_updates, 'query_norm': setting.query_norm, 'checkpoint': evaluation.entry.checkpoint}


def what_differs(evaluations: Sequence[RunEntry]) -> list[str]:
    """For each evaluation its label: as `_label_parts`, and where these do not tell evaluations apart, the parts of their paths that do."""
    parts_of_each = _label_parts(evaluations, settings(evaluations))
    if len({tuple(parts) for parts in parts_of_each}) < len(parts_of_each):
        for parts, path in zip(parts_of_each, differing_parts([evaluation.path for evaluation in evaluations])):
            parts.append(path)
    return [', '.join(parts) or evaluation.method for parts, evaluation in zip(parts_of_each, evaluations)]


def _label_parts(evaluations, settings_of_each):
    """For each evaluation the name that the user gave it, and those of its settings in which it differs from others of that name.

    Where these have different methods, the usual value of another setting is not stated, and not what the name of its method says.
    """
    named = [(evaluation.user_label, setting) for evaluation, setting in zip(evaluations, settings_of_each)]
    parts_of_each = []
    for user_label, setting in named:
        alike = [other for label, other in named if label == user_label]
        unstated = _unstated(setting, alike) if _differ(alike, '') else {}
        differing = [name for name in setting if _differ(alike, name) and str(setting[name]) not in unstated.get(name, ())]
        parts_of_each.append([*filter(None, [user_label, *(_setting_text(user_label, name, setting[name]) for name in differing)])])
    return parts_of_each


def _differ(settings_of_each, name):
    return len({str(setting.get(name)) for setting in settings_of_each if name in setting or name not in BUILT_IN_NETWORKS}) > 1


def _unstated(setting, alike):
    """{name: texts} of the values that a label of a setting need not state: the usual one of all that are `alike`, and that of its method's
    preset, if all evaluations of the method have one value."""
    unstated = {name: {collections.Counter(str(other.get(name)) for other in alike).most_common(1)[0][0]}
                for name in setting if name not in ('', 'checkpoint', 'seed')}
    same_method = [other for other in alike if other[''] == setting['']]
    for name, value in preset_flags(setting['']).items():
        if name in unstated and not _differ(same_method, name):
            unstated[name].add(str(value))
    return unstated


def _setting_text(user_label, name, value):
    """Text of a setting in a label; the method without what the user's own name says already."""
    if name == '':
        return re.sub(f'^{re.escape(user_label)}(, |$)', '', value) if user_label else value
    return value if name == 'checkpoint' else f'{name}={value}'


def group_label(evaluations: Sequence[RunEntry], group: Sequence[int]) -> str:
    """The name of a group of evaluations, and what else their labels have in common."""
    parts_of_each = _label_parts(evaluations, settings(evaluations))
    first = evaluations[group[0]]
    common = [part for part in parts_of_each[group[0]] if all(part in parts_of_each[index] for index in group)]
    best = ['best checkpoint of each seed'] if len({evaluations[index].entry.checkpoint for index in group}) > 1 else []
    return ', '.join(dict.fromkeys([first.user_label or first.method, *common, *best]))


# Tables -------------------------------------------------------------------------------------------------------------

def update_table(comparison: Comparison) -> render.Table:
    """A row for each number of updates, a column for each evaluation, and for each but the first its difference from the first."""
    lines, groups, notes = comparison.lines, comparison.groups, []
    figures, figures_of_groups = (comparison.figures(each, comparison.rows.values()) for each in (lines, groups))
    titles = p_titles(figures)
    columns = ['updates', *(line.letters for line in lines),
               *(title for line in lines[1:] for title in (f'{line.letters} - A', *titles)),
               *(f'{group.letters} over seeds' for group in groups)]
    rows = [[updates, *_update_cells(line_figures, group_figures, comparison.digits, titles)]
            for updates, line_figures, group_figures in zip(comparison.rows, figures, figures_of_groups)]
    if 'own' in comparison.rows:
        notes.append('own: each at its own number of updates, ' + ', '.join(f'{line.letters} {line.updates}' for line in lines))
    if groups:
        notes.append('over seeds: the mean of the means of runs that differ by --seed only, and their standard deviation')
    notes.append(test_note(figures))
    notes += arithmetic_note(comparison.evaluations)
    legend = [f'{line.letters}  {line.path}  ({line.label})' for line in lines]
    return render.Table(comparison.title, columns, rows, legend, notes)


def test_note(figures: Sequence[Sequence[LineFigures]]) -> str:
    """Text: where the p-values of a table, [rows][lines], come from."""
    counted = [cell for row in figures for cell in row[1:] if not math.isnan(cell.p)]
    ranks = ', or with * a signed-rank test, where differences are far from normal' if any(each.signed_rank for each in counted) else ''
    return f'p: a paired t-test{ranks}' + (f"; Holm: corrected for the table's {len(counted)} tests" if len(p_titles(figures)) > 1 else '')


def _update_cells(line_figures, group_figures, digits, titles):
    cells = [figures.cells(digits, titles) for figures in line_figures]
    return [*(mean for mean, *_ in cells), *(cell for _, *differences in cells[1:] for cell in differences),
            *(f'{number(figures.mean, digits)} ({number(figures.std, digits)})' for figures in group_figures)]


def headline_table(comparison: Comparison) -> render.Table:
    """A row for each evaluation, at its own number of updates, with its difference from the first."""
    figures = comparison.figures(comparison.lines, [comparison.headline])
    titles = ['difference', *p_titles(figures)]
    rows = [[line.label, line.updates, *cell.cells(comparison.digits, titles[1:])]
            for line, cell in zip(comparison.lines, figures[0])]
    rows[0][-len(titles):] = [''] * len(titles)
    return render.Table(comparison.title, ['run', 'updates', comparison.unit, *titles], rows, notes=[test_note(figures)])


def method_table(comparison: Comparison) -> render.Table:
    """A row for each method that was trained with several seeds, with its difference from the first, paired by task and seed."""
    rows, figures = [], comparison.figures(comparison.groups, [comparison.headline])
    titles, notes = ['difference', *p_titles(figures)], []
    seeds_of_each = [{comparison.lines[index].seed for index in group.indices} for group in comparison.groups]
    for group, seeds, group_figures in zip(comparison.groups, seeds_of_each, figures[0]):
        if seeds != seeds_of_each[0]:
            both = len(seeds & seeds_of_each[0])
            notes.append(f'{group.label}: ' + (f'the difference is over the {both} seeds that both have' if both > 1 else
                                               f'no difference, which needs two seeds that both have, and there is {both or "none"}'))
        mean, *difference_and_p = group_figures.cells(comparison.digits, titles[1:])
        if group == comparison.groups[0] or math.isnan(group_figures.difference):
            difference_and_p = [''] * len(titles)
        rows.append([group.label, len(group.indices), group.updates, mean, *difference_and_p])
    return render.Table(f'{comparison.title}, over seeds', ['method', 'seeds', 'updates', comparison.unit, *titles], rows,
                        notes=['95% intervals that cover other tasks and other seeds; differences from the first, paired by task and seed',
                               *notes])


def records(comparisons: Sequence[Comparison]) -> render.Table:
    """A row for each evaluation and number of updates, and for each group of seeds; of each kind the p-values are corrected together."""
    rows = []
    for comparison in comparisons:
        lines, groups = comparison.lines, comparison.groups
        line_figures, group_figures = (comparison.figures(each, comparison.rows.values()) for each in (lines, groups))
        for updates, *figures in zip(comparison.rows, line_figures, group_figures):
            for line, cell in zip([*lines, *groups], itertools.chain(*figures)):
                label = f'{line.label}, over seeds' if line in groups else line.label
                rows.append([comparison.tasks, comparison.unit, line.letters, label, line.path, line.seed, updates, *cell])
    return render.Table('', ['tasks', 'metric', 'run', 'label', 'path', 'seed', 'updates', *LineFigures._fields], rows)
