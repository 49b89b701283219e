"""Predictions for the user's own images or rows, by a trained model that is adapted to some of them."""
import os
from typing import NamedTuple

import numpy as np

from runtime.cli.run import Trained
from runtime.datasets.tables import Columns
from runtime.datasets.tasks import UserTask
from runtime.jobs.learner import Learner
from runtime.results import plots
from runtime.system.errors import UserError, counted
from runtime.system.files import write_csv

SHOWN, WIDEST = 10, 60  # predictions on the console, characters of a name there


class Predictions(NamedTuple):
    """What is written and printed of a model's answers to the queries of a task."""
    columns: list[str]      # of the csv file
    cells: list[list[str]]  # [queries][columns]
    lines: list[str]        # for the console, one for each query
    summary: str            # how good they are; '' if no answer is known


def predict(run: Trained, task: UserTask) -> None:
    """Adapts a trained model to a task's support examples, predicts for its queries, and writes the predictions.

    predict_<support>_<query>.csv in the experiment directory has for each query what the user gave, followed by the predicted
    class and the probability of each, or by the predicted targets in their own units. Of images, a picture shows them too.

    Raises UserError as `evaluate`, or if there are more classes than the network has outputs.
    """
    way = len(task.classes)
    if way > run.most_outputs:
        raise UserError(f'{task.support} holds {way} classes, and the network has {run.num_outputs} outputs; leave some out, or '
                        f'train with --num_classes={way}')
    learner = Learner(run)
    predictor = learner.adapt_rows(task.batch.support_x[0], task.batch.support_y[0], task.classes or None)
    values = predictor.of_rows(task.batch.query_x[0])
    predictions = class_predictions(task, values) if task.classes else target_predictions(task, values, run.source.files.columns)
    if not np.isfinite(values).all():
        advice = ': lower --update_lr or --test_updates' if run.test_updates and run.model.learn_lr == 'no' else ''
        raise UserError(f'adaptation to {task.support} diverged, so there are no predictions{advice}')
    norm = run.query_norms[0]
    path = os.path.join(run.directory, f'predict_{task.name}' + (f'_querynorm{norm}' if norm != 'support' else ''))
    rows = [[*task.columns, *predictions.columns], *([*given, *answer] for given, answer in zip(task.cells, predictions.cells))]
    written = path + '.csv'
    try:
        os.makedirs(run.directory, exist_ok=True)
        write_csv(written, rows, errors='surrogateescape')
    except OSError as error:
        raise UserError(f'{written} cannot be written: {error.strerror}') from error
    if run.source.image_shape:
        plots.save(plots.prediction_sheet(task, run.source, values), f'{path}.{run.plot_format}')
        written += f' and .{run.plot_format}'
    classes_text = f' of {way} classes' if way else ''
    print(f'{learner.checkpoint}, adapted to {task.batch.support_x.shape[1]} {task.unit}s{classes_text} by {run.test_updates} updates\n')
    width = max(map(len, task.names[:SHOWN]))
    for name, line in list(zip(task.names, predictions.lines))[:SHOWN]:
        print(f'  {name:{width}}  {line}')
    if len(task.names) > SHOWN:
        print(f'  and {len(task.names) - SHOWN} more, all in the csv file')
    print(f'\n{predictions.summary}Written: {written}')


def class_predictions(task: UserTask, probabilities: np.ndarray) -> Predictions:
    """Predictions of classes from their probabilities, [queries, classes]."""
    predicted, lines = np.argmax(probabilities, axis=-1), []
    for label, guess, row in zip(task.labels, predicted, probabilities):
        truth = f', but its class is {task.classes[label][:WIDEST]}' if label not in (None, guess) else ''
        lines.append(f'{task.classes[guess][:WIDEST]} ({row[guess]:.0%}){truth}')
    hits = [label == guess for label, guess in zip(task.labels, predicted) if label is not None]
    return Predictions(
        ['predicted', *(f'probability of {name}' for name in task.classes)],
        [[task.classes[guess], *(f'{p:.4f}' for p in row)] for guess, row in zip(predicted, probabilities)], lines,
        f'{sum(hits)} of {len(hits)} labelled {task.unit}s classified correctly ({sum(hits) / len(hits):.1%})\n' if hits else '')


def target_predictions(task: UserTask, values: np.ndarray, columns: Columns) -> Predictions:
    """Predictions of targets, in their own units, [queries, targets]."""
    summary = ''
    answered = np.asarray(task.has_answer)
    if answered.any():
        errors = np.sqrt(np.mean((values - columns.restore_targets(task.batch.query_y[0].astype(float)))[answered] ** 2, axis=0))
        texts = [f'{name} {error:.6g}' for name, error in zip(columns.targets, errors)]
        rows = '' if answered.all() else f' of the {counted(int(answered.sum()), "row")} with targets'
        summary = f'Root mean squared error{rows}: {", ".join(texts)}\n'
    cells = [[f'{value:.6g}' for value in row] for row in values]
    lines = [', '.join(f'{name} {cell}' for name, cell in zip(columns.targets, row)) for row in cells]
    return Predictions([f'predicted {name}' for name in columns.targets], cells, lines, summary)
