"""Pictures of what adaptation does: errors against updates, fitted sinusoids, and the images of a task with their labels."""
import os
import re
import warnings

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from data_generator import TaskBatch, UserError
from results import UNITS, statistics

DPI = 110
# Told apart by dashes and marks as well, for prints in grey.
STYLES = [dict(color=color, linestyle=line, marker=marker) for color, line, marker in (
    ('#1b3a6b', '-', 'o'), ('#c8553d', '--', 's'), ('#2e7d5b', '-.', '^'), ('#7b5ea7', ':', 'D'), ('#444444', '-', 'v'))]
SHOWN_UPDATES = (0, 1, 10)


def of_model(run, model, tasks, values):
    """Pictures of what a model does with a split's tasks.

    Args:
        run: a main.Run.
        model: a maml.MAML.
        tasks: SinusoidTasks or ImageTasks, of data_generator.
        values: the scores of some of them, [tasks, 1 + updates].

    Returns:
        {'updates': scores against updates, 'tasks': some tasks before and after adaptation}, matplotlib Figures.
    """
    some = task_sheet(model, tasks, run.model.num_updates) if run.source.image_shape else sinusoids(model, tasks)
    return {'updates': curves({run.description: values}, run.score), 'tasks': some}


def curves(runs, score):
    """Scores against the number of updates, with bands of the 95% interval of the mean (figure 3 of the paper).

    Args:
        runs: {label: scores [tasks, 1 + updates]}. The first column is of support rows, which before adaptation are as new to
            the model as query rows are.
        score: one of results.UNITS.

    Returns:
        A matplotlib Figure.
    """
    title, factor, _ = UNITS[score]
    figure = Figure(figsize=(6, 3.6 + 0.22 * (len(runs) > 1) * len(runs)), layout='constrained')
    axes = figure.subplots()
    for (label, scores), style in zip(runs.items(), STYLES * len(runs)):
        mean, _, half = (statistic * factor for statistic in statistics(scores))
        updates = np.arange(len(mean))
        axes.plot(updates, mean, label=_plain(label), markersize=4, clip_on=False, **style)  # marks on the axis are whole
        axes.fill_between(updates, mean - half, mean + half, color=style['color'], alpha=0.2, linewidth=0)
    axes.set(xlabel='inner updates (gradient steps; 0: before adaptation)', ylabel=f'{title} (band: 95% interval)',
             xticks=updates)
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
    batch = TaskBatch(support.support_x, support.support_y, *grid)
    outputs = model.predict(batch, max(SHOWN_UPDATES))
    answers = {0: model.predict_unadapted(batch), **{updates: outputs.post[updates - 1] for updates in SHOWN_UPDATES if updates}}

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
    batch, names = tasks.draw(0, 1), [_clipped(re.sub('^(train|val|test)/', '', name)) for name in tasks.class_names(0)]
    after = np.argmax(model.predict(batch, num_updates).post[-1][0], axis=-1)
    before = np.argmax(model.predict_unadapted(batch)[0], axis=-1)
    labels = {'support': np.argmax(batch.support_y[0], axis=-1), 'query': np.argmax(batch.query_y[0], axis=-1)}
    rows = {part: [np.flatnonzero(labels[part] == label) for label in range(len(names))] for part in labels}
    shots, queries = (min(len(rows[part][0]), limit) for part, limit in (('support', 5), ('query', shown_query)))

    figure = Figure(figsize=(max(1.25 * (shots + queries) + 1.2, 4.4), 1.5 * len(names) + 0.7), layout='constrained')
    figure.suptitle(f'left: support images; right: query images,\nand the class predicted before → after adaptation '
                    f'({num_updates} update{"s" if num_updates > 1 else ""})', fontsize='small')
    panels = figure.subplots(len(names), shots + queries, squeeze=False)
    for label, name in enumerate(names):
        for column, axes in enumerate(panels[label]):
            part, index = ('support', column) if column < shots else ('query', column - shots)
            row = rows[part][label][index]
            image = (batch.support_x if part == 'support' else batch.query_x)[0, row]
            _show(axes, image, tasks.source)
            if part == 'query':
                right = after[row] == label
                axes.set_title(f'{before[row] + 1} → {after[row] + 1} {"✓" if right else "✗"}', fontsize='small')
                for spine in axes.spines.values():
                    spine.set(color='#2e7d5b' if right else '#c8553d', linewidth=2, linestyle='-' if right else '--')
        panels[label, 0].set_ylabel(f'{label + 1}: {name}', fontsize='x-small')
    return figure


def prediction_sheet(task, query_dir, source, labels, probabilities, columns=6, shown_support=6, shown_query=36):
    """The images that a model was adapted to, a row for each class, and those that it classified, with its answers.

    Args:
        task: a data_generator.OwnTask.
        query_dir: what the names of query images are shown relative to.
        source: an entry of data_generator.SOURCES.
        labels: of the query images, None where not known.
        probabilities: [query images, classes].
        shown_support, shown_query: images shown at the most, of each class and in all.

    Returns:
        A matplotlib Figure.
    """
    classes, batch = task.classes, task.batch
    support_labels, predicted = np.argmax(batch.support_y[0], axis=-1), np.argmax(probabilities, axis=-1)
    marks = ['' if label is None else ' ✓' if label == answer else ' ✗' for label, answer in zip(labels, predicted)]
    support = [(image, _clipped(classes[label]), '') for label in range(len(classes))
               for image in batch.support_x[0][support_labels == label][:shown_support]]
    query = [(image, f'{_clipped(classes[answer])}\n{row[answer]:.0%}{mark}', _clipped(os.path.relpath(path, query_dir)))
             for image, answer, row, mark, path
             in zip(batch.query_x[0], predicted, probabilities, marks, task.queries)][:shown_query]
    rows = [-(-len(tiles) // columns) for tiles in (support, query)]
    heights = [1.45 * rows[0] + 0.4, 1.8 * rows[1] + 0.4]
    figure = Figure(figsize=(1.35 * columns, sum(heights)), layout='constrained')
    more = f' (the first {shown_query} of {len(labels)})' if len(labels) > shown_query else ''
    titles = ['support: what the model was adapted to', f'query: the class predicted, and its probability{more}']
    for part, title, tiles in zip(figure.subfigures(2, 1, height_ratios=heights), titles, (support, query)):
        part.suptitle(title, fontsize='medium')
        panels = part.subplots(-(-len(tiles) // columns), columns, squeeze=False).ravel()
        for axes, (image, above, below) in zip(panels, tiles):
            _show(axes, image, source)
            axes.set_title(above, fontsize='x-small')
            axes.set_xlabel(below, fontsize='xx-small')
        for axes in panels[len(tiles):]:
            axes.axis('off')
    return figure


def _show(axes, image, source):
    """Draws an image [dim_input] as it was before the network saw it."""
    image = image.reshape(source.image_shape)
    axes.imshow(1 - image[..., 0] if source.invert else image.squeeze(), cmap='gray', vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])


def _clipped(name, length=18):
    """A name without its middle, where it is long: its ends tell it apart."""
    return _plain(name if len(name) <= length else f'{name[:length // 2]}…{name[1 + length // 2 - length:]}')


def _plain(name):
    """A name as matplotlib can draw it: no formulas, nothing that is not text."""
    return name.encode(errors='replace').decode().replace('$', r'\$')


def pixels(figure):
    """A Figure as an array of colours, uint8 [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def save(figure, path):
    """Writes a Figure; raises UserError where that is not possible."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Glyph .* missing from')  # drawn as boxes; names may be in any script
            figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise UserError(f'the picture {path} cannot be written: {error.strerror}') from error
