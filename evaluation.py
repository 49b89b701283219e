"""Evaluation of a checkpoint on many tasks of a split."""
import dataclasses
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
from reports import Progress, Summaries

TEST_TASKS, TEST_UPDATES = 600, 10
PATIENCE = 3  # seconds after which users want to know how long it takes


def evaluate(run, data):
    """Evaluates a checkpoint on --num_test_tasks tasks of data[run.split]; prints a table, and writes what it found to files.

    Args:
        run: a main.Run.

    Raises:
        UserError: there is no such checkpoint, it is damaged or another network's, or the results cannot be written.
    """
    trained, prefix, iterations = restore(run)
    tasks, updates = data[run.split], max(run.model.num_updates, TEST_UPDATES)
    run.replicas.check_alike((run.shared_flags, tasks.fingerprint), trained.state().values())
    facts = {
        'checkpoint': prefix, 'iterations': iterations, 'method': run.method, 'score': run.score, 'flags': run.all_flags,
        'tasks': {'datasource': run.datasource, 'split': run.split,
                  'num_classes': run.tasks.num_classes if run.source.image_shape else None,
                  'update_batch_size': run.tasks.update_batch_size, 'query_shots': run.tasks.query_shots,
                  'seed': run.tasks.seed, 'count': run.num_test_tasks, 'data': tasks.fingerprint},
        'versions': {'python': platform.python_version(), 'tensorflow': tf.__version__, 'numpy': np.__version__}}
    described = f'{iterations} iterations' if iterations else 'weights of another run'
    print(f'{run.description}, {results.SPLITS[run.split]}, {run.num_test_tasks} tasks\n{prefix} ({described})\n', flush=True)
    found, rates, drawn = {}, [], []
    for query_norm in run.query_norms:
        model = trained.variant(dim_output=run.model.dim_output, query_norm=query_norm)
        name, started = results_name(run, prefix, query_norm), time.perf_counter()
        label = f'--query_norm={query_norm}' if len(run.query_norms) > 1 else None
        with Progress(0, run.num_test_tasks, run.replicas.chief, unit=' tasks', desc=label, delay=PATIENCE) as progress:
            values = found[name] = task_scores(evaluate_tasks(model, tasks, run.num_test_tasks, updates, progress.update))
        seconds = time.perf_counter() - started
        rates.append(run.num_test_tasks / seconds)
        if not run.replicas.chief:
            continue
        try:
            os.makedirs(run.directory, exist_ok=True)
            results.write(run.directory, name, values, {**facts, 'query_norm': query_norm, 'seconds': seconds,
                                                        'tasks_per_second': rates[-1]})
        except OSError as error:
            raise UserError(f'the results cannot be written to {run.directory}: {error.strerror}') from error
        if run.plot:
            drawn += draw(run, model, tasks, values, name, iterations)

    print(results.table({f'--query_norm={norm}': values for norm, values in zip(run.query_norms, found.values())}, run.score))
    print(f'\n{min(rates):.3g} tasks a second. Written to {run.directory}: '
          + ', '.join(f'{name}.csv and .pkl' for name in found) + f', {results.FILE}')
    for path in drawn:
        print(f'Drawn: {path}')


def results_name(run, prefix, query_norm):
    """The name of an evaluation's files: the reference's, with whatever it could not be asked for."""
    usual = run.source.query_shots(run.model.update_batch_size, train=False)
    return ''.join([
        f'test_ubs{run.model.update_batch_size}_stepsize{run.model.update_lr}',
        f'_cls{run.model.dim_output}' if run.model.dim_output != run.num_outputs else '',
        f'_query{run.tasks.query_shots}' if run.tasks.query_shots != usual else '',
        f'_tasks{run.num_test_tasks}' if run.num_test_tasks != TEST_TASKS else '',
        f'_querynorm{query_norm}' if query_norm != 'batch' else '',
        f'_{os.path.basename(prefix)}' if run.load_from else ''])


def draw(run, model, tasks, values, name, iterations):
    """Writes pictures of an evaluation, named after its files, and shows them to TensorBoard; returns their paths.

    There it is a run of its own, for TensorBoard reads but one file at a time of a run.
    """
    import pictures

    drawn = pictures.of_model(run, model, tasks, values)
    paths = [os.path.join(run.directory, f'{name}_{run.split}_{what}.png') for what in drawn]
    for figure, path in zip(drawn.values(), paths):
        pictures.save(figure, path)
    with Summaries(os.path.join(run.directory, f'{name}_{run.split}'), run.log, 0, print) as summaries:
        summaries.write_flags(run.flags)
        summaries.write_scores(run.split, run.score, values.mean(axis=0), iterations or 0)
        summaries.write_figures(run.split, drawn, iterations or 0)
    return paths


def restore(run):
    """The network that the flags describe, with the weights of the checkpoint that they ask for.

    Returns:
        A MAML with as many outputs as it was trained with, the checkpoint's prefix and its iterations, None if not known.

    Raises:
        UserError: as for `evaluate`.
    """
    model = MAML(dataclasses.replace(run.model, dim_output=run.num_outputs), replicas=run.replicas)
    if run.load_from:
        record = checkpoints.load_weights(run.load_from, {**model.weights, **model.norm_params}, run.network_flags)
        return model, run.load_from, record.get('iteration')
    checkpoint = checkpoints.find(run.directory, run.checkpoint)
    record = checkpoint.record
    if record['regime'] != run.regime:
        raise UserError(f'the checkpoint {checkpoint.prefix} comes from {record["regime"]}ing, and the flags describe '
                        f'{run.regime}ing; give the flags of its training')
    checkpoints.check_flags(checkpoint.prefix, record['flags'], {**run.network_flags, 'datasource': run.datasource},
                            'give the flags of its training')
    checkpoints.restore(checkpoint, model.state())
    return model, checkpoint.prefix, record['iteration']


def evaluate_tasks(model, tasks, count, num_updates, report=lambda tasks: None):
    """Metrics of tasks 0 to count - 1, by all replicas, in batches that fit the memory; their size changes no figure.

    Args:
        report: told after each batch how many tasks it had.
    """
    replicas = model.replicas
    numbers_per_task = (sum(array.size for array in tasks.draw(0, 1))
                        + sum(math.prod(variable.shape) for variable in model.weights.values()))
    largest = min(max(2 ** 24 // numbers_per_task, 1), model.config.task_chunk or count)  # 64 MiB of float32
    each = math.ceil(count / replicas.count)
    size, parts = math.ceil(each / math.ceil(each / largest)), []
    for start in range(0, count, size * replicas.count):
        # All batches are alike, as compilation wants it; the last may go beyond what was asked for.
        batch = replicas.each(lambda replica: tasks.draw(start + replica * size, size))
        parts.append(model.evaluate(batch, num_updates))
        report(min(size * replicas.count, count - start))
    return type(parts[0])(*(None if part[0] is None else np.concatenate(part, axis=-1)[..., :count] for part in zip(*parts)))


def task_scores(metrics):
    """What is reported of each task: [tasks, 1 + updates], support rows before adaptation, query rows after each update."""
    pre, post = ((metrics.pre_loss, metrics.post_losses) if metrics.pre_accuracy is None else
                 (metrics.pre_accuracy, metrics.post_accuracies))
    return np.concatenate([pre[None], post]).T
