"""Figures: metrics against updates, functions before and after adaptation, and the images of tasks and predictions."""
from __future__ import annotations

import itertools
import os
import textwrap
import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.special import softmax

from data_generator import ClassTasks, FunctionTasks, ImageSource, TableTasks, class_name
from runtime.cli.run import Evaluation, Training
from runtime.datasets.goals import LARGEST as LARGEST_GOAL
from runtime.datasets.goals import GoalTasks
from runtime.datasets.tasks import TaskBatch, Tasks, UserTask
from runtime.results.render import Table
from runtime.results.statistics import UNITS, number, over_tasks_and_seeds, statistics
from runtime.results.store import SPLIT_TITLES
from runtime.system.errors import UserError, counted
from runtime.system.files import write_atomically

if TYPE_CHECKING:
    from maml import MAML  # which imports TensorFlow; comparisons are drawn without it
    from runtime.jobs.models import Navigator

DPI = 110
# Dashes and markers also distinguish the curves, for colour-blind readers and grey prints.
_COLORS = '#1b3a6b', '#c8553d', '#2e7d5b', '#7b5ea7', '#444444', '#b8860b', '#3a9bc1'
STYLES = [dict(color=_COLORS[number % 7], linestyle=('-', '--', '-.', ':')[number % 4], marker='os^DvP'[number % 6])
          for number in range(7 * 4 * 3)]  # all of them differ
SHOWN_UPDATES, PANELS = 10, 4  # inner updates after which some tasks are shown, and how many tasks
LARGEST = 1e30  # larger values are drawn as this: the axes of matplotlib cannot hold them
DIVERGED = 20   # the axes leave out losses above this many times the largest loss of the middle curve
WIDE = 1000     # the axis of losses is logarithmic if the largest is this many times the median of a curve
SHOWN_EPISODES = 3  # of a goal
PATH_UPDATES = 3    # inner updates after which they are shown at most
SHOWN_CLASSES = 20  # of a task: laying out panels takes time that grows faster than their number


def evaluation_figures(run: Training | Evaluation, model: MAML, tasks: Tasks, split: str, values: dict[str, np.ndarray],
                       updates: int, method: str) -> dict[str, Figure]:
    """{'updates': metrics against updates, 'tasks': some tasks before and after adaptation, but for the classification of
    tables}, of an evaluation with some inner `updates` on a split, whose `values` are {label: metrics of its tasks, [tasks,
    columns]}, a line each; `method` is the name of the one that trained the model."""
    title = f'{method}, {run.description}, {SPLIT_TITLES[split]}'
    figures = {'updates': curves(values, run.metric, title, values if not updates else ())}
    if run.source.image_shape:
        figures['tasks'] = task_sheet(model, tasks, min(run.headline_updates, updates), title)
    elif isinstance(tasks, FunctionTasks):
        figures['tasks'] = functions(model, tasks, min(updates, SHOWN_UPDATES), title)
    elif isinstance(tasks, TableTasks):
        figures['tasks'] = predicted_targets(model, tasks, min(updates, SHOWN_UPDATES), title)
    elif isinstance(tasks, GoalTasks):
        figures['tasks'] = paths(model, tasks, min(updates, PATH_UPDATES), title)
    return figures


def curves(runs: dict[str, np.ndarray], metric: str, heading: str, without_updates: Collection[str] = ()) -> Figure:
    """A metric of query rows against the number of updates, with bands of the 95% interval of the mean, like figures 3 and 4 of the paper.

    If the first column of the values is another quantity, of support rows before adaptation, it is a separate mark at 0. It may lie outside
    the axes, so its value is in the legend.

    Args:
        runs: {label: values [tasks, 1 + updates], or [seeds, tasks, 1 + updates], whose bands cover seeds too}.
        metric: one of statistics.UNITS.
        heading: what was evaluated.
        without_updates: the labels of runs whose second column is of query rows without an inner update: a filled mark at 0.
    """
    unit = UNITS[metric]
    first = int(unit.starts_with_support)
    figure = Figure(figsize=(6, 3.8 + 0.22 * len(runs)), layout='constrained')
    axes, drawn, bounds, marks = figure.subplots(), [], [], []
    for (label, values), style in zip(runs.items(), itertools.cycle(STYLES)):
        mean, half = _mean_and_half(values * unit.factor, values.ndim == 3)
        updates, low, high = np.arange(len(mean)) - first * (label in without_updates), mean - half, mean + half
        drawn += axes.plot(updates[first:], mean[first:], markersize=4, zorder=3,
                           label=f'{_plain(label)} (before adaptation: {number(mean[0], unit.digits)})', **style)
        axes.fill_between(updates[first:], low[first:], high[first:], color=style['color'], alpha=0.2,
                          linewidth=2 * (label in without_updates))
        if first:
            axes.errorbar(0, mean[0], half[0], markersize=5, markerfacecolor='none', **{**style, 'linestyle': 'none'})
        bounds.append(np.array([low, high])[:, 1:])
        marks.append(mean[0])
    _limit(axes, unit, drawn, bounds)
    longest = max(values.shape[-1] - 1 - first * (label in without_updates) for label, values in runs.items())
    bottom, top = axes.get_ylim()
    has_mark = first and any(bottom <= mark <= top for mark in marks)
    remark = f'; the {"open " if without_updates else ""}mark at 0 is of support examples, before adaptation' if has_mark else ''
    axes.set(xlabel='inner updates' + remark, xticks=range(0, longest + 1, 1 if longest <= 20 else 5 * -(-longest // 100)),
             ylabel=f'{"query " if first else ""}{unit.title}\n(band: 95% interval)',
             xlim=(-0.3 * max(1, longest / 10), longest + 0.3 * max(1, longest / 10)))
    _finish(figure, axes, heading, runs)
    return figure


def sweep(lines: dict[str, dict[Any, np.ndarray]], flag: str, metric: str, heading: str) -> Figure:
    """A metric of query rows, with its 95% interval, against a flag: {label: {value of the flag: values [seeds, tasks] in the
    unit that is shown}}. Intervals of several seeds cover seeds too. Metric and heading are as for `curves`."""
    figure = Figure(figsize=(6, 3.8 + 0.22 * len(lines)), layout='constrained')
    axes, drawn, bounds = figure.subplots(), [], []
    positions = _place(axes, {value for points in lines.values() for value in points})
    for (label, points), style in zip(lines.items(), itertools.cycle(STYLES)):
        places, values_of_each = zip(*sorted((positions[value], values) for value, values in points.items()))
        mean, half = np.array([_mean_and_half(values if len(values) > 1 else values[0], len(values) > 1) for values in values_of_each]).T
        counts = sorted({len(values) for values in values_of_each})
        seeds = f', {" to ".join(map(str, counts))} seeds' if counts[-1] > 1 else ''
        drawn.append(axes.errorbar(places, mean, half, markersize=4, capsize=2, label=_plain(label) + seeds, **style))
        bounds.append(np.array([mean - half, mean + half]))
    _limit(axes, UNITS[metric], drawn, bounds)
    axes.set(xlabel=f'--{flag}', ylabel=f'query {UNITS[metric].title}\n(bars: 95% interval)')
    _finish(figure, axes, heading, lines)
    return figure


def _place(axes, swept):
    """{value of a flag: its place on the axis}, which gets a tick for each: numbers at their values, others in the order of their names."""
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in swept)
    ordered = sorted(swept) if numeric else sorted(swept, key=str)
    places = ordered if numeric else range(len(ordered))
    if numeric and ordered[0] > 0 and ordered[-1] >= 10 * ordered[0]:
        axes.set_xscale('log')
    axes.set_xticks(places, [f'{value:g}' if numeric else _plain(str(value)) for value in ordered], minor=False)
    axes.set_xticks([], minor=True)
    return dict(zip(ordered, places))


def _finish(figure, axes, heading, labels):
    axes.set_title(_plain(heading), fontsize='small')
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', fontsize='small' if max(map(len, labels)) < 60 else 'x-small', frameon=False)


def _mean_and_half(values, has_seeds):
    """Mean, and half-width of its interval, of values [tasks, ...], or [seeds, tasks, ...]; as axes can hold them. What is not
    finite stays, and is not drawn. The interval of one task, which has none, is 0."""
    mean, half = over_tasks_and_seeds(values)[:2] if has_seeds else statistics(values)[::2]
    half = np.where(np.isfinite(mean) & np.isnan(half), 0.0, half)
    return [np.where(np.isfinite(numbers), np.clip(numbers, -LARGEST, LARGEST), numbers) for numbers in (mean, half)]


def matrix(table: Table, values: np.ndarray, metric: str) -> Figure:
    """A table, whose first column holds models and its last ones tasks, coloured within each column by the means, `values`
    [models, tasks]; white where there is none, nan."""
    names, targets = [row[0] for row in table.rows], table.columns[-values.shape[1]:]
    models = [_clipped(name, 48) + (f', {counted(row[1], "update")}' if names.count(name) > 1 else '')
              for name, row in zip(names, table.rows)]
    low, high = (function(np.where(np.isfinite(values), values, fill), axis=0) for function, fill in ((np.min, np.inf), (np.max, -np.inf)))
    with np.errstate(invalid='ignore', divide='ignore'):
        shade = np.where(high > low, (values - low) / (high - low), np.where(np.isfinite(values), 0.5, np.nan))
    figure = Figure(figsize=(4.5 + 1.5 * len(targets), 1.7 + 0.45 * len(models)), layout='constrained')
    axes = figure.subplots()
    axes.imshow(shade if UNITS[metric].higher_is_better else 1 - shade, cmap='Blues', vmin=-0.1, vmax=1.7, aspect='auto')
    for row, cells in enumerate(table.rows):
        for column, text in enumerate(cells[-len(targets):]):
            axes.text(column, row, text, ha='center', va='center', fontsize='small')
    axes.set_yticks(range(len(models)), models, fontsize='small')
    wrapped = [_plain(', '.join(target.split(', ')[:1]) + '\n' + '\n'.join(target.split(', ')[1:])) for target in targets]
    axes.set_xticks(range(len(targets)), wrapped, fontsize='x-small')
    axes.xaxis.tick_top()
    caption = [*table.title.split('; '), 'darker is better within a column', *table.notes]
    axes.set_xlabel('\n'.join(caption), fontsize='x-small')
    return figure


def _limit(axes, unit, drawn, bounds):
    """Sets the range of y so that the intervals can be seen, whose ends are [2, points] for each curve, and says in the legend
    which curves leave the axes."""
    if not unit.limits:
        return
    finite = [ends[np.isfinite(ends)] for ends in bounds]
    highest = [values.max(initial=-np.inf) for values in finite]
    positive = sorted(high for high in highest if high > 0)
    top = DIVERGED * positive[(len(positive) - 1) // 2] if positive else np.inf  # curves that diverged must not squash the others
    for line, high, ends in zip(drawn, highest, bounds):
        if unit.limits[1] is None and (high > top or not np.isfinite(ends).all()):
            line.set_label(line.get_label() + ', leaves the axes')
    shown = [values for values, high in zip(finite, highest) if high <= top and values.size]
    if shown:
        _set_range(axes, unit.limits, shown)


def _set_range(axes, limits, shown):
    """Sets the range of y for the ends of intervals, an array for each curve."""
    low, high = min(values.min() for values in shown), max(values.max() for values in shown)
    lowest, highest = limits
    if highest is not None:
        margin = 0.15 * max(high - low, 1.0)
        axes.set_ylim(max(low - margin, lowest), min(high + margin, highest + margin / 3))
    elif high > WIDE * max(min(np.percentile(values, 50, method='lower') for values in shown), 1e-9):
        axes.set_yscale('log', nonpositive='clip')  # nothing would be seen of the smaller values on a linear axis
        axes.set_ylim(top=2 * high)
    else:
        axes.set_ylim(lowest, 1.05 * high if high > 0 else None)


def functions(model: MAML, tasks: FunctionTasks, updates: int, heading: str) -> Figure:
    """The first tasks' curves, their support points, and the network's outputs before and after some inner updates, like figure 2 of the
    paper."""
    support, grid = tasks.draw(0, PANELS), tasks.grid(0, PANELS)
    outputs = _before_and_after(model, TaskBatch(support.support_x, support.support_y, *grid), sorted({1, updates}) if updates else [])
    figure, panels = _four_panels(heading, 2.6, sharex=bool(np.ptp(grid[0][:, 0, 0]) == 0))
    for task, axes in enumerate(panels):
        x = grid[0][task, :, 0]
        axes.plot(x, grid[1][task, :, 0], color='#999999', linewidth=4, alpha=0.6, label='true curve')
        for (label, values), style in zip(outputs.items(), (STYLES[3], STYLES[1], STYLES[0])):
            axes.plot(x, values[task, :, 0], label=label, **{**style, 'marker': None})
        axes.plot(support.support_x[task, :, 0], support.support_y[task, :, 0], 'k^', markersize=5, label='support examples')
        axes.set_title(tasks.family.describe(tasks.parameters(task, 1)), fontsize='small')
    _label_panels(figure, panels, 'x', 'y', 5)
    return figure


def predicted_targets(model: MAML, tasks: TableTasks, updates: int, heading: str) -> Figure:
    """The first tasks' query rows: predictions of the first target against its true values, before and after some inner updates."""
    batch, columns = tasks.draw(0, PANELS), tasks.source.files.columns
    outputs = _before_and_after(model, batch, [updates] if updates else [])
    figure, panels = _four_panels(heading, 2.9)
    for task, axes in enumerate(panels):
        true = columns.restore_targets(batch.query_y[task].astype(float))[:, 0]
        for (label, values), style in zip(outputs.items(), (STYLES[3], STYLES[0])):
            predicted = columns.restore_targets(values[task].astype(float))[:, 0]
            axes.plot(true, predicted, label=label, markersize=4, **{**style, 'linestyle': 'none'})
        axes.axline((true[0], true[0]), slope=1, color='#999999', linewidth=1, label='no error')
        axes.set_aspect('equal', adjustable='datalim')
        axes.set_title(_clipped(tasks.class_names(task)[0]), fontsize='small')
    name = _clipped(next(iter(columns.targets)))
    _label_panels(figure, panels, name, f'predicted {name}', 3)
    return figure


def paths(model: Navigator, tasks: GoalTasks, updates: int, heading: str) -> Figure:
    """Some episodes to the first goals, before adaptation and after the first and the last of some inner updates, like figure 4 of the
    paper, on the right."""
    batch = tasks.draw(0, PANELS)
    walked = model.paths(batch, updates, SHOWN_EPISODES)
    figure, panels = _four_panels(heading, 3.4, sharex=True, sharey=True)
    for task, axes in enumerate(panels):
        for taken, style in zip(sorted({0, min(1, updates), updates}), (STYLES[3], STYLES[1], STYLES[0])):
            label = f'after {counted(taken, "update")}' if taken else 'before adaptation'
            for episode, positions in enumerate(walked[taken][task]):
                axes.plot(positions[:, 0], positions[:, 1], label=None if episode else label, **{**style, 'marker': None, 'linewidth': 0.8})
        axes.plot(0, 0, 'ks', markersize=5, label='start')
        axes.plot(*batch.goals[task], 'k*', markersize=12, label='goal')
        axes.set(xlim=(-1.4 * LARGEST_GOAL, 1.4 * LARGEST_GOAL), ylim=(-1.4 * LARGEST_GOAL, 1.4 * LARGEST_GOAL), aspect='equal')
    _label_panels(figure, panels, 'x', 'y', 5)
    return figure


def _before_and_after(model, batch, shown):
    """{label: outputs for query rows, [tasks, rows, dim_output]}, before adaptation and after each number of updates that is shown."""
    after = model.predict(batch, max(shown)).post if shown else ()
    return {'before adaptation': np.asarray(model.predict(batch, 0).post[0]),
            **{f'after {counted(updates, "update")}': np.asarray(after[updates - 1]) for updates in shown}}


def _four_panels(heading, height, **options):
    figure = Figure(figsize=(8, 2 * height + 0.3), layout='constrained')
    figure.suptitle(_plain(heading), fontsize='small')
    return figure, figure.subplots(2, PANELS // 2, **options).ravel()


def _label_panels(figure, panels, xlabel, ylabel, legend_columns):
    for axes in panels:
        axes.grid(alpha=0.3)
    for axes in panels[-2:]:
        axes.set_xlabel(xlabel)
    for axes in panels[::2]:
        axes.set_ylabel(ylabel)
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=legend_columns, fontsize='small', frameon=False)


def task_sheet(model: MAML, tasks: ClassTasks, num_updates: int, heading: str) -> Figure:
    """The images of the first task, one row for each of the first SHOWN_CLASSES: support images, then query images with the
    classes predicted after `num_updates` inner updates, of which none is right if the adaptation diverged."""
    batch, names = tasks.draw(0, 1), [_clipped(class_name(name)) for name in tasks.class_names(0)]
    probabilities = softmax(np.asarray(model.predict(batch, num_updates).post[-1][0]), axis=-1)
    diverged = not np.isfinite(probabilities).all()
    after = np.full(len(probabilities), -1) if diverged else np.argmax(probabilities, axis=-1)
    before = np.argmax(model.predict(batch, 0).post[0][0], axis=-1)
    support_rows, query_rows = ([np.flatnonzero(column) for column in labels[0].T] for labels in (batch.support_y, batch.query_y))
    shots, queries, total = min(len(support_rows[0]), 5), min(len(query_rows[0]), 4), len(after)
    right = np.sum(after == np.argmax(batch.query_y[0], axis=-1))
    shown = names[:SHOWN_CLASSES]
    figure = Figure(figsize=(1.25 * (shots + queries) + 0.8, 1.5 * len(shown) + 1.3), layout='constrained')
    text = (f'{heading}: its first task{_first_classes(len(names))}. Left: support images. Right: {queries * len(shown)} of {total} query '
            f'images, with the class predicted before → after adaptation ({counted(num_updates, "update")}) and its probability; '
            f'{"adaptation diverged" if diverged else f"{right} of {total} are right"}')
    figure.suptitle(_plain('\n'.join(textwrap.wrap(text, int(16 * figure.get_figwidth())))), fontsize='small')
    panels = figure.subplots(len(shown), shots + queries, squeeze=False)
    for label, name in enumerate(shown):
        for axes, row in zip(panels[label, :shots], support_rows[label]):
            _show(axes, batch.support_x[0, row], tasks.source)
        for axes, row in zip(panels[label, shots:], query_rows[label]):
            _show(axes, batch.query_x[0, row], tasks.source)
            correct = after[row] == label
            mark = '✓' if correct else '✗'
            outcome = 'diverged' if diverged else f'{after[row] + 1} {mark} {probabilities[row, after[row]]:.0%}'
            axes.set_title(f'{before[row] + 1} → {outcome}', fontsize='small')
            for spine in axes.spines.values():
                spine.set(color='#2e7d5b' if correct else '#c8553d', linewidth=2, linestyle='-' if correct else '--')
        panels[label, 0].set_ylabel(f'{label + 1}: {name}', fontsize='x-small')
    return figure


def _first_classes(count):
    """The part of a title that says that not all classes are shown."""
    return f', the first {SHOWN_CLASSES} of {count} classes' if count > SHOWN_CLASSES else ''


def prediction_sheet(task: UserTask, source: ImageSource, probabilities: np.ndarray) -> Figure:
    """The images that a model was adapted to, of the first SHOWN_CLASSES, and those that it classified, with the predictions,
    whose probabilities are [query images, classes]."""
    classes, batch, columns, shown_query = task.classes, task.batch, 6, 36
    support_labels, predicted = np.argmax(batch.support_y[0], axis=-1), np.argmax(probabilities, axis=-1)
    marks = [_mark(label, guess, classes) for label, guess in zip(task.labels, predicted)]
    support = [(image, _clipped(classes[label]), '') for label in range(len(classes[:SHOWN_CLASSES]))
               for image in batch.support_x[0][support_labels == label][:columns]]
    query = [(image, f'{_clipped(classes[label])}\n{row[label]:.0%}{mark}', _clipped(name))
             for image, label, row, mark, name in zip(batch.query_x[0], predicted, probabilities, marks, task.names)][:shown_query]
    rows = [-(-len(tiles) // columns) for tiles in (support, query)]
    heights = [1.45 * rows[0] + 0.4, 1.8 * rows[1] + 0.4]
    figure = Figure(figsize=(1.35 * columns, sum(heights)), layout='constrained')
    more = f' (the first {shown_query} of {len(task.names)})' if len(task.names) > shown_query else ''
    titles = [f'support: what the model was adapted to{_first_classes(len(classes))}',
              f'query: the class predicted, and its probability{more}']
    for part, title, tiles, count in zip(figure.subfigures(2, 1, height_ratios=heights), titles, (support, query), rows):
        part.suptitle(title, fontsize='medium')
        panels = part.subplots(count, columns, squeeze=False).ravel()
        for axes, (image, above, below) in zip(panels, tiles):
            _show(axes, image, source)
            axes.set_title(above, fontsize='x-small')
            axes.set_xlabel(below, fontsize='xx-small')
        for axes in panels[len(tiles):]:
            axes.axis('off')
    return figure


def _mark(label, guess, classes):
    """What is written behind a prediction: whether it is right, if the label is known."""
    if label is None:
        return ''
    return ' ✓' if label == guess else f' ✗ {_clipped(classes[label], 12)}'


def _show(axes, image, source):
    """Draws an image [dim_input] as it was before preprocessing."""
    image = image.reshape(source.image_shape)
    image = image[..., 0] if image.shape[-1] == 1 else image
    axes.imshow(1 - image if source.invert else image, cmap='gray', vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])


def _clipped(name, length=18):
    """A long name without its middle: its ends distinguish it."""
    return _plain(name if len(name) <= length else f'{name[:length // 2]}…{name[1 + length // 2 - length:]}')


def _plain(name):
    """A name as matplotlib can draw it: no formulas, printable."""
    return name.encode(errors='replace').decode().replace('$', r'\$')


def pixels(figure: Figure) -> np.ndarray:
    """A Figure as pixels, uint8 [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def save(figure: Figure, path: str) -> None:
    """Writes a Figure to a file; raises UserError if it cannot."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Glyph .* missing from')  # drawn as boxes: names may be in any script
            write_atomically(path, lambda file: figure.savefig(file, dpi=DPI, format=os.path.splitext(path)[1][1:]))
    except OSError as error:
        raise UserError(f'the picture {path} cannot be written: {error.strerror}') from error


def save_new(figure: Figure, stem: str, suffix: str) -> str:
    """Writes a Figure to a file that does not exist yet, <stem>.<suffix>, or <stem>-2.<suffix> and so on; returns its path."""
    path, number = f'{stem}.{suffix}', 2
    while os.path.exists(path):
        path, number = f'{stem}-{number}.{suffix}', number + 1
    save(figure, path)
    return path
