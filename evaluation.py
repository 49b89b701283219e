"""Evaluation of a checkpoint on many tasks of a split."""
import math
import os

import numpy as np

import checkpoints
from data_generator import UserError
from maml import MAML
from reports import table, write_results

TEST_TASKS, TEST_UPDATES = 600, 10


def evaluate(run, data):
    """Evaluates a checkpoint on 600 tasks of data[run.split]; prints a table, writes the reference's csv and pickle.

    Args:
        run: a main.Run.

    Raises:
        UserError: there is no such checkpoint, it is damaged or another network's, or the results cannot be written.
    """
    model = MAML(run.model)
    output = os.path.join(run.directory, f'test_ubs{run.model.update_batch_size}_stepsize{run.model.update_lr}')
    if run.tasks.query_shots != run.source.query_shots(run.model.update_batch_size, train=False):
        output += f'_query{run.tasks.query_shots}'
    if run.load_from:
        prefix, trained = run.load_from, 'weights of another run'
        record = checkpoints.load_weights(prefix, {**model.weights, **model.norm_params})
        checkpoints.check_flags(prefix, record.get('flags', {}), run.network_flags, 'give the same')
        output += f'_{os.path.basename(prefix)}'
    else:
        checkpoint = checkpoints.find(run.directory, run.checkpoint)
        prefix, trained = checkpoint.prefix, f'{checkpoint.record["iteration"]} iterations'
        if checkpoint.record['regime'] != run.regime:
            raise UserError(f'the checkpoint {prefix} comes from {checkpoint.record["regime"]}ing, and the flags describe '
                            f'{run.regime}ing; give the flags of its training')
        checkpoints.check_flags(prefix, checkpoint.record['flags'], {**run.network_flags, 'datasource': run.datasource},
                                'give the flags of its training')
        checkpoints.restore(checkpoint, model.state())
    updates = max(run.model.num_updates, TEST_UPDATES)
    values = task_scores(evaluate_tasks(model, data[run.split], TEST_TASKS, updates))

    splits = {'val': 'meta-validation', 'test': 'meta-test'}
    print(f'{run.description}, {splits[run.split]}, {TEST_TASKS} tasks\n{prefix} ({trained})\n')
    print(table(values, run.score))
    try:
        os.makedirs(run.directory, exist_ok=True)
        write_results(output, values)
    except OSError as error:
        raise UserError(f'the results cannot be written to {output}.csv and .pkl: {error.strerror}') from error
    print(f'\nWritten to {output}.csv and .pkl')


def evaluate_tasks(model, tasks, count, num_updates):
    """Metrics of tasks 0 to count - 1, computed in batches that fit the memory; their size changes no figure."""
    numbers_per_task = (sum(array.size for array in tasks.draw(0, 1))
                        + sum(math.prod(variable.shape) for variable in model.weights.values()))
    largest = min(max(2 ** 24 // numbers_per_task, 1), model.config.task_chunk or count)  # 64 MiB of float32
    size = max(size for size in range(1, largest + 1) if count % size == 0)
    parts = [model.evaluate(tasks.draw(start, size), num_updates) for start in range(0, count, size)]
    return type(parts[0])(*(None if part[0] is None else np.concatenate(part, axis=-1) for part in zip(*parts)))


def task_scores(metrics):
    """What is reported of each task: [tasks, 1 + updates], support rows before adaptation, query rows after each update."""
    pre, post = ((metrics.pre_loss, metrics.post_losses) if metrics.pre_accuracy is None else
                 (metrics.pre_accuracy, metrics.post_accuracies))
    return np.concatenate([pre[None], post]).T
