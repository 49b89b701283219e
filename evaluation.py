"""Evaluation of a checkpoint on many tasks of a split."""
import math
import os
import platform
import time

import numpy as np
import tensorflow as tf

import checkpoints
import results
from data_generator import UserError
from maml import MAML

TEST_TASKS, TEST_UPDATES = 600, 10


def evaluate(run, data):
    """Evaluates a checkpoint on --num_test_tasks tasks of data[run.split]; prints a table, and writes what it found to files.

    Args:
        run: a main.Run.

    Raises:
        UserError: there is no such checkpoint, it is damaged or another network's, or the results cannot be written.
    """
    model = MAML(run.model)
    name = f'test_ubs{run.model.update_batch_size}_stepsize{run.model.update_lr}'
    if run.tasks.query_shots != run.source.query_shots(run.model.update_batch_size, train=False):
        name += f'_query{run.tasks.query_shots}'
    if run.num_test_tasks != TEST_TASKS:
        name += f'_tasks{run.num_test_tasks}'
    prefix, iterations = restore(run, model)
    if run.load_from:
        name += f'_{os.path.basename(prefix)}'

    tasks, updates, started = data[run.split], max(run.model.num_updates, TEST_UPDATES), time.perf_counter()
    values = task_scores(evaluate_tasks(model, tasks, run.num_test_tasks, updates))
    seconds = time.perf_counter() - started

    trained = f'{iterations} iterations' if iterations else 'weights of another run'
    print(f'{run.description}, {results.SPLITS[run.split]}, {run.num_test_tasks} tasks\n{prefix} ({trained})\n')
    print(results.table(values, run.score))
    facts = {
        'checkpoint': prefix, 'iterations': iterations, 'score': run.score, 'flags': run.all_flags,
        'tasks': {'datasource': run.datasource, 'split': run.split, 'num_classes': run.tasks.num_classes,
                  'update_batch_size': run.tasks.update_batch_size, 'query_shots': run.tasks.query_shots,
                  'seed': run.tasks.seed, 'count': run.num_test_tasks, 'data': tasks.fingerprint},
        'seconds': seconds, 'tasks_per_second': run.num_test_tasks / seconds,
        'versions': {'python': platform.python_version(), 'tensorflow': tf.__version__, 'numpy': np.__version__}}
    try:
        os.makedirs(run.directory, exist_ok=True)
        results.write(run.directory, name, values, facts)
    except OSError as error:
        raise UserError(f'the results cannot be written to {run.directory}: {error.strerror}') from error
    print(f'\n{run.num_test_tasks / seconds:.3g} tasks a second. Written to {run.directory}: {name}.csv and .pkl, {results.FILE}')
    if run.plot:
        draw(run, model, tasks, values, os.path.join(run.directory, f'{name}_{run.split}'))


def draw(run, model, tasks, values, prefix):
    """Writes pictures of an evaluation: scores against updates, and some tasks before and after adaptation."""
    import pictures

    drawn = {'updates': pictures.curves({run.description: values}, run.score)}
    if run.source.image_shape:
        drawn['task'] = pictures.task_sheet(model, tasks, run.model.num_updates)
    else:
        drawn['tasks'] = pictures.sinusoids(model, tasks)
    for what, figure in drawn.items():
        pictures.save(figure, f'{prefix}_{what}.png')
        print(f'Drawn: {prefix}_{what}.png')


def restore(run, model):
    """Gives the model the checkpoint that the flags ask for; returns its prefix and its iterations, None if not known.

    Raises:
        UserError: as for `evaluate`.
    """
    if run.load_from:
        record = checkpoints.load_weights(run.load_from, {**model.weights, **model.norm_params}, run.network_flags)
        return run.load_from, record.get('iteration')
    checkpoint = checkpoints.find(run.directory, run.checkpoint)
    record = checkpoint.record
    if record['regime'] != run.regime:
        raise UserError(f'the checkpoint {checkpoint.prefix} comes from {record["regime"]}ing, and the flags describe '
                        f'{run.regime}ing; give the flags of its training')
    checkpoints.check_flags(checkpoint.prefix, record['flags'], {**run.network_flags, 'datasource': run.datasource},
                            'give the flags of its training')
    checkpoints.restore(checkpoint, model.state())
    return checkpoint.prefix, record['iteration']


def evaluate_tasks(model, tasks, count, num_updates):
    """Metrics of tasks 0 to count - 1, computed in batches that fit the memory; their size changes no figure."""
    numbers_per_task = (sum(array.size for array in tasks.draw(0, 1))
                        + sum(math.prod(variable.shape) for variable in model.weights.values()))
    largest = min(max(2 ** 24 // numbers_per_task, 1), model.config.task_chunk or count)  # 64 MiB of float32
    size = math.ceil(count / math.ceil(count / largest))
    parts = [model.evaluate(tasks.draw(start, min(size, count - start)), num_updates) for start in range(0, count, size)]
    return type(parts[0])(*(None if part[0] is None else np.concatenate(part, axis=-1) for part in zip(*parts)))


def task_scores(metrics):
    """What is reported of each task: [tasks, 1 + updates], support rows before adaptation, query rows after each update."""
    pre, post = ((metrics.pre_loss, metrics.post_losses) if metrics.pre_accuracy is None else
                 (metrics.pre_accuracy, metrics.post_accuracies))
    return np.concatenate([pre[None], post]).T
