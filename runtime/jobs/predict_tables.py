"""Predictions for the user's own rows by a trained model that is adapted to some of them."""
import os

import numpy as np

from runtime.cli.run import Run
from runtime.datasets.user_tables import UserTables
from runtime.jobs.evaluate import restore
from runtime.jobs.predict import SHOWN, classifier, classify, file_name, outputs, write_csv


def predict(run: Run, task: UserTables) -> None:
    """Adapts a trained model to a task's support rows, predicts for its query rows, and writes the predictions.

    predict_<support file>_<query file>.csv in the experiment directory has the query file's columns, followed by the predicted
    targets in their own units, or by the predicted class and the probability of each.

    Raises:
        UserError: as for `evaluation.evaluate`, or there are more classes than the network has outputs.
    """
    support_rows, updates = task.batch.support_x.shape[1], run.test_updates
    path = os.path.join(run.directory, file_name(run, 'support_csv', 'query_csv') + '.csv')
    if task.classes:
        model, prefix = classifier(run, f'--support_csv={run.flag_values["support_csv"]}', len(task.classes), support_rows)
        probabilities = classify(model, task.batch, updates)
        heads = ['predicted', *(f'probability of {name}' for name in task.classes)]
        cells = [[task.classes[np.argmax(row)], *(f'{p:.4f}' for p in row)] for row in probabilities]
        judged = _accuracy(task, probabilities)
    else:
        trained, prefix, *_ = restore(run)
        columns = run.source.files.columns
        found = columns.restore_targets(outputs(trained.variant(query_norm=run.query_norms[0]), task.batch, updates).astype(float))
        heads = [f'predicted {name}' for name in columns.targets]
        cells = [[f'{value:.6g}' for value in row] for row in found]
        judged = _errors(task, found, columns)
    queries = task.queries
    write_csv(path, [[*queries.columns, *heads], *([*row, *more] for row, more in zip(queries.rows, cells))])
    of = f' of {len(task.classes)} classes' if task.classes else ''
    print(f'{prefix}, adapted to {support_rows} rows{of} by {updates} updates\n')
    for number, more in list(zip(queries.lines, cells))[:SHOWN]:
        print(f'  line {number}: ' + (f'{more[0]} ({max(map(float, more[1:])):.0%})' if task.classes else ', '.join(
            f'{head} {value}' for head, value in zip(heads, more))))
    if len(cells) > SHOWN:
        print(f'  and {len(cells) - SHOWN} more, all in the csv file')
    print(f'{judged}\nWritten: {path}')


def _accuracy(task, probabilities):
    """A line on how many predictions are right of those whose class is known; '' if there are none."""
    known = task.batch.query_y[0].any(axis=1)
    right = int((probabilities.argmax(axis=1) == task.batch.query_y[0].argmax(axis=1))[known].sum())
    return f'\nOf {known.sum()} rows whose class is known, {right} are right ({right / known.sum():.1%}).\n' if known.any() else ''


def _errors(task, found, columns):
    """A line on the errors of predictions, if the targets are known."""
    if not task.known:
        return ''
    errors = np.sqrt(np.mean((found - columns.restore_targets(task.batch.query_y[0].astype(float))) ** 2, axis=0))
    return '\nRoot mean squared error: ' + ', '.join(f'{name} {error:.6g}' for name, error in zip(columns.targets, errors)) + '\n'
