"""Classification of somebody's own images by a trained model that has been adapted to some others of them."""
import csv
import io
import math
import os

import numpy as np

import pictures
from data_generator import TaskBatch, UserError, write_aside
from evaluation import TEST_UPDATES, restore

QUERIES_AT_A_TIME = 200  # where they do not depend on each other
SHOWN, WIDEST = 10, 60  # answers on the console, characters of a name there


def predict(run, task):
    """Adapts a trained model to a task's support images, classifies its query images, and writes what it takes them for.

    predict_<support folder>_<query folder>.csv in the experiment directory has for each image its path, its predicted class, the
    probability of each class, and its class where that is known; the .png of the same name shows them.

    Args:
        run: a main.Run.
        task: a data_generator.OwnTask.

    Raises:
        UserError: as for `evaluation.evaluate`, or there are more classes than the network has outputs.
    """
    classes, support_rows = task.classes, task.batch.support_x.shape[1]
    if len(classes) > run.num_outputs:
        raise UserError(f'--support_dir={run.all_flags["support_dir"]} holds {len(classes)} classes, and the network has '
                        f'{run.num_outputs} outputs; leave some out, or train with --num_classes={len(classes)}')
    trained, prefix, _ = restore(run)
    # The loss is divided by the shots; where classes have more or less, by their mean number.
    model = trained.variant(dim_output=len(classes), update_batch_size=support_rows / len(classes),
                            query_norm=run.query_norms[0])
    updates = max(run.model.num_updates, TEST_UPDATES)
    probabilities = classify(model, task.batch, updates)
    labels = [int(np.argmax(row)) if row.any() else None for row in task.batch.query_y[0]]
    predicted = np.argmax(probabilities, axis=-1)

    support_dir, query_dir = (run.all_flags[name] for name in ('support_dir', 'query_dir'))
    names = [os.path.basename(os.path.abspath(folder)) for folder in (support_dir, query_dir)]
    norm = '_querynormbatch' if model.config.query_norm == 'batch' else ''
    path = os.path.join(run.directory, f'predict_{names[0]}_{names[1]}{norm}')
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(['image', 'class', 'predicted', *classes])
    writer.writerows([image, '' if label is None else classes[label], classes[answer], *(f'{p:.4f}' for p in row)]
                     for image, label, answer, row in zip(task.queries, labels, predicted, probabilities))
    try:
        os.makedirs(run.directory, exist_ok=True)
        write_aside(path + '.csv', lambda file: file.write(text.getvalue().encode(errors='surrogateescape')))
    except OSError as error:
        raise UserError(f'{path}.csv cannot be written: {error.strerror}') from error
    pictures.save(pictures.prediction_sheet(task, query_dir, run.source, labels, probabilities), path + '.png')

    print(f'{prefix}, adapted to {support_rows} images of {len(classes)} classes by {updates} updates\n')
    width = max(map(len, task.queries[:SHOWN]))
    for image, answer, row in list(zip(task.queries, predicted, probabilities))[:SHOWN]:
        line = f'  {image:{width}}  {classes[answer][:WIDEST]} ({row[answer]:.0%})'
        print(line.encode(errors='replace').decode())
    if len(labels) > SHOWN:
        print(f'  and {len(labels) - SHOWN} more, all in the csv file')
    known = [label == answer for label, answer in zip(labels, predicted) if label is not None]
    if known:
        print(f'\nOf {len(known)} images whose class their folder tells, {sum(known)} are right ({sum(known) / len(known):.1%}).')
    print(f'\nWritten: {path}.csv and .png')


def classify(model, batch, num_updates):
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
    exponentials = np.exp(np.concatenate(logits) - np.max(np.concatenate(logits), axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
