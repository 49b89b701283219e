"""Pictures of what adaptation does: errors against updates, fitted sinusoids, and the images of a task with their labels."""
import os

import numpy as np
from matplotlib.figure import Figure

from data_generator import TaskBatch, UserError
from results import UNITS, statistics

DPI = 110
# Told apart by dashes and marks as well, for prints in grey.
STYLES = [dict(color=color, linestyle=line, marker=marker) for color, line, marker in (
    ('#1b3a6b', '-', 'o'), ('#c8553d', '--', 's'), ('#2e7d5b', '-.', '^'), ('#7b5ea7', ':', 'D'), ('#444444', '-', 'v'))]
SHOWN_UPDATES = (0, 1, 10)


def curves(runs, score):
    """Scores against the number of updates, with bands of the 95% interval of the mean (figure 3 of the paper).

    Args:
        runs: {label: scores [tasks, 1 + updates]}; the first column, of support rows before adaptation, is not drawn.
        score: one of results.UNITS.

    Returns:
        A matplotlib Figure.
    """
    title, factor, _ = UNITS[score]
    figure = Figure(figsize=(6, 3.6 + 0.22 * (len(runs) > 1) * len(runs)), layout='constrained')
    axes = figure.subplots()
    for (label, scores), style in zip(runs.items(), STYLES * len(runs)):
        mean, _, half = (statistic[1:] * factor for statistic in statistics(scores))
        updates = np.arange(1, len(mean) + 1)
        axes.plot(updates, mean, label=label, markersize=4, **style)
        axes.fill_between(updates, mean - half, mean + half, color=style['color'], alpha=0.2, linewidth=0)
    axes.set(xlabel='inner updates (gradient steps)', ylabel=f'{title}, query examples', xticks=updates)
    if score == 'loss':
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(runs) > 1:
        figure.legend(loc='outside lower center', fontsize='small', frameon=False)
    return figure


def sinusoids(model, tasks, count=4):
    """The first tasks' curves, the support points, and what the network says of all inputs before and after adaptation.

    Like figure 2 of the paper.

    Args:
        model: a maml.MAML.
        tasks: a data_generator.SinusoidTasks.

    Returns:
        A matplotlib Figure.
    """
    support, grid = tasks.draw(0, count), tasks.grid(0, count)
    outputs = model.predict(TaskBatch(support.support_x, support.support_y, *grid), max(SHOWN_UPDATES))
    # `predict` answers for query rows after updates; before them, the shared weights answer.
    before = model.predict(TaskBatch(*grid, *grid), 1).pre
    answers = {0: before, **{updates: outputs.post[updates - 1] for updates in SHOWN_UPDATES if updates}}

    figure = Figure(figsize=(8, 2.6 * -(-count // 2)), layout='constrained')
    panels = figure.subplots(-(-count // 2), 2, sharex=True, squeeze=False).ravel()
    names = {0: 'before adaptation', 1: 'after 1 update', 10: 'after 10 updates'}
    for task, axes in enumerate(panels[:count]):
        x = grid[0][task, :, 0]
        axes.plot(x, grid[1][task, :, 0], color='#999999', linewidth=4, alpha=0.6, label='true curve')
        for (updates, answer), style in zip(answers.items(), (STYLES[3], STYLES[1], STYLES[0])):
            axes.plot(x, np.asarray(answer)[task, :, 0], color=style['color'], linestyle=style['linestyle'], label=names[updates])
        axes.plot(support.support_x[task, :, 0], support.support_y[task, :, 0], 'k^', markersize=5, label='support examples')
        amplitude, phase = tasks.parameters(task, 1)
        axes.set_title(f'amplitude {amplitude.item():.2f}, phase {phase.item():.2f} rad', fontsize='small')
        axes.grid(alpha=0.3)
    for axes in panels[count - 2:count]:
        axes.set_xlabel('x (rad)')
    for axes in panels[::2]:
        axes.set_ylabel('y')
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=5, fontsize='small', frameon=False)
    return figure


def task_sheet(model, tasks, num_updates, shown_query=4):
    """A task's images: in a row for each class its support, then query images with what they are taken for.

    Args:
        model: a maml.MAML.
        tasks: a data_generator.ImageTasks; its first task is shown.
        num_updates: inner updates after which query images are classified.
        shown_query: of each class, at the most.

    Returns:
        A matplotlib Figure.
    """
    batch, names = tasks.draw(0, 1), [os.path.basename(name) for name in tasks.class_names(0)]
    after = np.argmax(model.predict(batch, num_updates).post[-1][0], axis=-1)
    before = np.argmax(model.predict(TaskBatch(batch.query_x, batch.query_y, batch.query_x, batch.query_y), 1).pre[0], axis=-1)
    labels = {'support': np.argmax(batch.support_y[0], axis=-1), 'query': np.argmax(batch.query_y[0], axis=-1)}
    rows = {part: [np.flatnonzero(labels[part] == label) for label in range(len(names))] for part in labels}
    shots, queries = (min(len(rows[part][0]), limit) for part, limit in (('support', 5), ('query', shown_query)))

    figure = Figure(figsize=(max(1.25 * (shots + queries) + 1.2, 4.4), 1.5 * len(names) + 0.7), layout='constrained')
    figure.suptitle(f'left: support; right: query, and the class each is taken for\nbefore → after adaptation '
                    f'({num_updates} update{"s" if num_updates > 1 else ""})', fontsize='small')
    panels = figure.subplots(len(names), shots + queries, squeeze=False)
    for label, name in enumerate(names):
        for column, axes in enumerate(panels[label]):
            part, index = ('support', column) if column < shots else ('query', column - shots)
            row = rows[part][label][index]
            image = (batch.support_x if part == 'support' else batch.query_x)[0, row].reshape(tasks.source.image_shape)
            axes.imshow(1 - image[..., 0] if tasks.source.invert else image.squeeze(), cmap='gray', vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            if part == 'query':
                right = after[row] == label
                axes.set_title(f'{before[row] + 1} → {after[row] + 1} {"✓" if right else "✗"}', fontsize='small')
                for spine in axes.spines.values():
                    spine.set(color='#2e7d5b' if right else '#c8553d', linewidth=2, linestyle='-' if right else '--')
        panels[label, 0].set_ylabel(f'{label + 1}: {name}', fontsize='x-small')
    return figure


def save(figure, path):
    """Writes a Figure; raises UserError where that is not possible."""
    try:
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise UserError(f'the picture {path} cannot be written: {error.strerror}') from error
