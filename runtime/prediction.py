"""Classification of the user's own images by a trained model that is adapted to some of them."""
import csv
import io
import math
import os

import numpy as np
from scipy.special import softmax

from data_generator import TaskBatch
from maml import MAML
from runtime import plots
from runtime.errors import UserError
from runtime.evaluation import restore
from runtime.files import write_atomically
from runtime.run import Run
from runtime.user_task import UserTask

QUERIES_AT_A_TIME = 200  # if they do not depend on each other
SHOWN, WIDEST = 10, 60  # predictions on the console, characters of a name there


def predict(run: Run, task: UserTask) -> None:
    """Adapts a trained model to a task's support images, classifies its query images, and writes the predictions.

    predict_<support folder>_<query folder>.csv in the experiment directory has for each image its path, its class if that is
    known, its predicted class, and the probability of each class; the .png of the same name shows them.

    Raises:
        UserError: as for `evaluation.evaluate`, or there are more classes than the network has outputs.
    """
    classes, support_rows = task.classes, task.batch.support_x.shape[1]
    if len(classes) > run.num_outputs:
        raise UserError(f'--support_dir={run.flag_values["support_dir"]} holds {len(classes)} classes, and the network has '
                        f'{run.num_outputs} outputs; leave some out, or train with --num_classes={len(classes)}')
    trained, prefix, _ = restore(run)
    # The loss is divided by the shots; if classes have different numbers of them, by the mean.
    model = trained.variant(dim_output=len(classes), update_batch_size=support_rows / len(classes),
                            query_norm=run.query_norms[0])
    updates = run.test_updates
    probabilities = classify(model, task.batch, updates)
    labels = [int(np.argmax(row)) if row.any() else None for row in task.batch.query_y[0]]
    path = os.path.join(run.directory, _file_name(run, model.config.query_norm))
    write_predictions(path + '.csv', task, labels, probabilities)
    picture = f'{path}.{run.plot_format}'
    plots.save(plots.prediction_sheet(task, run.flag_values['query_dir'], run.source, labels, probabilities), picture)
    print(f'{prefix}, adapted to {support_rows} images of {len(classes)} classes by {updates} updates\n')
    print_predictions(task, labels, probabilities)
    print(f'\nWritten: {path}.csv and .{run.plot_format}')


def _file_name(run: Run, query_norm: str) -> str:
    """The name of a prediction's files, without suffix: the names of the two folders, and --query_norm=batch."""
    names = [os.path.basename(os.path.abspath(run.flag_values[name])) for name in ('support_dir', 'query_dir')]
    return f'predict_{names[0]}_{names[1]}' + ('_querynormbatch' if query_norm == 'batch' else '')


def write_predictions(path: str, task: UserTask, labels: list[int | None], probabilities: np.ndarray) -> None:
    """Writes the csv file of a prediction.

    Args:
        labels: of the query images, None if not known.
        probabilities: [query images, classes].

    Raises:
        UserError: it cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(['image', 'class', 'predicted', *task.classes])
    for image, known, row in zip(task.queries, labels, probabilities):
        predicted = task.classes[np.argmax(row)]
        writer.writerow([image, '' if known is None else task.classes[known], predicted, *(f'{p:.4f}' for p in row)])
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_atomically(path, text.getvalue().encode(errors='surrogateescape'))
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror}') from error


def print_predictions(task: UserTask, labels: list[int | None], probabilities: np.ndarray) -> None:
    """Prints the first predictions, and how many are right of those whose class is known."""
    predicted = np.argmax(probabilities, axis=-1)
    width = max(map(len, task.queries[:SHOWN]))
    for image, label, row in list(zip(task.queries, predicted, probabilities))[:SHOWN]:
        line = f'  {image:{width}}  {task.classes[label][:WIDEST]} ({row[label]:.0%})'
        print(line.encode(errors='replace').decode())
    if len(labels) > SHOWN:
        print(f'  and {len(labels) - SHOWN} more, all in the csv file')
    hits = [known == label for known, label in zip(labels, predicted) if known is not None]
    if hits:
        print(f'\nOf {len(hits)} images whose class their folder tells, {sum(hits)} are right ({sum(hits) / len(hits):.1%}).')


def classify(model: MAML, batch: TaskBatch, num_updates: int) -> np.ndarray:
    """Probabilities of the classes for a task's query rows, [rows, classes], after num_updates inner updates.

    Args:
        batch: a TaskBatch of one task.
    """
    rows = batch.query_x.shape[1]
    parts = math.ceil(rows / QUERIES_AT_A_TIME) if model.config.query_norm == 'support' else 1
    logits = []
    for part in np.array_split(np.arange(rows), parts):
        queries = TaskBatch(batch.support_x, batch.support_y, batch.query_x[:, part], batch.query_y[:, part])
        logits.append(model.predict(queries, num_updates).post[-1][0])
    return softmax(np.concatenate(logits), axis=-1)
