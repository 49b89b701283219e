"""Classification of the user's own images by a trained model that is adapted to some of them."""
import csv
import io
import math
import os
from collections.abc import Sequence

import numpy as np
from scipy.special import softmax

from maml import MAML
from runtime.cli.run import Run
from runtime.datasets.tasks import TaskBatch
from runtime.datasets.user_images import UserTask
from runtime.jobs.ensemble import Ensemble
from runtime.jobs.evaluate import restore
from runtime.results import plots
from runtime.system.errors import UserError
from runtime.system.files import write_atomically

QUERIES_AT_A_TIME = 200  # if they do not depend on each other
SHOWN, WIDEST = 10, 60  # predictions on the console, characters of a name there


def predict(run: Run, task: UserTask) -> None:
    """Adapts a trained model to a task's support images, classifies its query images, and writes the predictions.

    predict_<support folder>_<query folder>.csv in the experiment directory has for each image its path, its class if that is
    known, its predicted class, and the probability of each class; the picture of the same name shows them.

    Raises:
        UserError: as for `evaluation.evaluate`, or there are more classes than the network has outputs.
    """
    support_rows, updates = task.batch.support_x.shape[1], run.test_updates
    model, prefix = classifier(run, f'--support_dir={run.flag_values["support_dir"]}', len(task.classes), support_rows)
    probabilities = classify(model, task.batch, updates)
    labels = [int(np.argmax(row)) if row.any() else None for row in task.batch.query_y[0]]
    path = os.path.join(run.directory, file_name(run, 'support_dir', 'query_dir'))
    write_predictions(path + '.csv', task, labels, probabilities)
    picture = f'{path}.{run.plot_format}'
    plots.save(plots.prediction_sheet(task, run.flag_values['query_dir'], run.source, labels, probabilities), picture)
    print(f'{prefix}, adapted to {support_rows} images of {len(task.classes)} classes by {updates} updates\n')
    print_predictions(task, labels, probabilities)
    print(f'\nWritten: {path}.csv and .{run.plot_format}')


def classifier(run: Run, support: str, way: int, support_rows: int) -> tuple[MAML | Ensemble, str]:
    """The trained network, with outputs for as many classes as a task has, and its checkpoint's prefix.

    Args:
        support: the flag that names the support examples.

    Raises:
        UserError: as for `predict`.
    """
    if way > run.num_outputs:
        raise UserError(f'{support} holds {way} classes, and the network has {run.num_outputs} outputs; leave some out, or train with '
                        f'--num_classes={way}')
    trained, prefix, *_ = restore(run)
    # The loss is divided by the shots; if classes have different numbers of them, by the mean.
    return trained.variant(dim_output=way, update_batch_size=support_rows / way, query_norm=run.query_norms[0]), prefix


def file_name(run: Run, support: str, query: str) -> str:
    """The name of a prediction's files, without suffix: the names in two flags, and --query_norm=batch."""
    names = [os.path.basename(os.path.abspath(run.flag_values[name])).removesuffix('.csv') for name in (support, query)]
    return f'predict_{names[0]}_{names[1]}' + ('_querynormbatch' if run.query_norms[0] == 'batch' else '')


def write_predictions(path: str, task: UserTask, labels: list[int | None], probabilities: np.ndarray) -> None:
    """Writes the csv file of a prediction.

    Args:
        labels: of the query images, None if not known.
        probabilities: [query images, classes].

    Raises:
        UserError: it cannot be written.
    """
    rows = [['image', 'class', 'predicted', *task.classes]]
    for image, known, row in zip(task.queries, labels, probabilities):
        predicted = task.classes[np.argmax(row)]
        rows.append([image, '' if known is None else task.classes[known], predicted, *(f'{p:.4f}' for p in row)])
    write_csv(path, rows)


def write_csv(path: str, rows: Sequence[Sequence[str]]) -> None:
    """Writes rows to a csv file; raises UserError if that cannot be done."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
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
    """Probabilities of the classes for a task's query rows, [rows, classes], after num_updates inner updates."""
    return softmax(outputs(model, batch, num_updates), axis=-1)


def outputs(model: MAML, batch: TaskBatch, num_updates: int) -> np.ndarray:
    """The network's outputs for a task's query rows, [rows, dim_output], after num_updates inner updates.

    Args:
        batch: a TaskBatch of one task.
    """
    rows = batch.query_x.shape[1]
    parts = math.ceil(rows / QUERIES_AT_A_TIME) if model.config.query_norm != 'batch' else 1  # else rows are independent
    found = []
    for part in np.array_split(np.arange(rows), parts):
        queries = TaskBatch(batch.support_x, batch.support_y, batch.query_x[:, part], batch.query_y[:, part])
        found.append(model.predict(queries, num_updates).post[-1][0])
    return np.concatenate(found)
