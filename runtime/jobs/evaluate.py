"""Evaluation of a checkpoint on many tasks of a split."""
import dataclasses
import math
import os
import platform
import time
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from data_generator import DATA_FOLDER, SOURCES
from maml import MAML, Metrics
from runtime.cli.run import Evaluation, Trained
from runtime.cli.run_data import record_split
from runtime.cli.workers import check_in_sync
from runtime.datasets.class_folders import listed_classes, preparation_facts
from runtime.datasets.tasks import Tasks
from runtime.jobs import checkpoints
from runtime.jobs.ensemble import Ensemble
from runtime.jobs.summaries import Summaries
from runtime.results import store as results
from runtime.system.errors import UserError
from runtime.system.progress import Progress

TEST_TASKS = 600
PROGRESS_DELAY = 3  # seconds before the progress bar appears


def evaluate(run: Evaluation, data: dict[str, Tasks]) -> None:
    """Evaluates a checkpoint on --num_test_tasks tasks of data[run.split]; prints a table and writes the results to files.

    Raises:
        UserError: there is no such checkpoint, it is damaged or of another network, or the results cannot be written.
    """
    results.existing(run.directory)  # one that is damaged is reported before the work, not after it
    trained, prefix, iterations, trained_on = restore(run)
    if run.replicas.chief:
        record_split(run.source, run.tasks, data)
    tasks, updates = data[run.split], run.test_updates
    check_in_sync(run.replicas, (run.worker_flags, tasks.fingerprint), trained.state().values())
    facts = evaluation_facts(run, tasks, trained, prefix, iterations, trained_on)
    print(heading(run, tasks, facts), flush=True)
    found, rates, names, written = {}, [], [], []
    models = {norm: trained.variant(dim_output=run.model.dim_output, query_norm=norm) for norm in run.query_norms}
    for query_norm, model in models.items():
        started = time.perf_counter()
        label = f'--query_norm={query_norm}' if len(run.query_norms) > 1 else None
        with Progress(0, run.num_test_tasks, run.replicas.chief, unit=' tasks', desc=label, delay=PROGRESS_DELAY) as progress:
            values = found[query_norm] = task_metrics(evaluate_tasks(model, tasks, run.num_test_tasks, updates, progress.update))
        seconds = time.perf_counter() - started
        rates.append(run.num_test_tasks / seconds)
        if not run.replicas.chief:
            continue
        try:
            os.makedirs(run.directory, exist_ok=True)
            name, file = results.write(run.directory, results_name(run, prefix, query_norm), values, {
                **facts, 'query_norm': query_norm, 'seconds': seconds, 'tasks_per_second': rates[-1]})
        except OSError as error:
            raise UserError(f'the results cannot be written to {run.directory}: {error.strerror}') from error
        names.append(name)
        written.append(file)

    print(results.table({f'--query_norm={norm}': values for norm, values in found.items()}, run.metric))
    print(beyond_training(run), end='')
    print(f'\n{min(rates):.3g} tasks a second. Written to {run.directory}: '
          + ', '.join(f'{file}.csv and .pkl' for file in written) + f', {results.FILE}')
    if run.plot and run.replicas.chief:
        for path in draw(run, models[run.query_norms[0]], tasks, found, names, prefix, iterations):
            print(f'Drawn: {path}')


def heading(run: Evaluation, tasks: Tasks, facts: dict) -> str:
    """Text: which checkpoint is evaluated on which tasks, given what `evaluation_facts` returned."""
    described = f'{facts["iterations"]} iterations' if facts['iterations'] else 'weights of another run'
    if 'ensemble' in facts:
        described += f"; mean outputs of {', '.join(f'model{number}' for number in facts['ensemble'])}"
    lines = [f'{run.description}, {results.SPLIT_TITLES[run.split]}, {run.num_test_tasks} tasks', f'{facts["checkpoint"]} ({described})']
    known = facts.get('known_classes')
    if known:
        lines.append(f'Note: {len(known)} of the {len(tasks.classes.names)} classes have the names of classes that the model was trained '
                     f'on, such as {known[0]}')
    return '\n'.join([*lines, ''])


def beyond_training(run: Evaluation) -> str:
    """A line for an evaluation with more updates than the training, if those of the training differ; else ''."""
    trained, differ = run.model.num_updates, run.model.learn_lr == 'step' or run.model.norm_per_step
    return (f'  (beyond the {trained} of the training: with the step sizes and the normalisation of the last of them)\n'
            if run.test_updates > trained and differ else '')


def evaluation_facts(run: Evaluation, tasks: Tasks, trained: MAML | Ensemble, prefix: str, iterations: int | None, trained_on: str) -> dict:
    """What results.json records of an evaluation besides its figures; the arguments are what `restore` returned."""
    facts = preparation_facts(run.source.folders(run.tasks.data_path).root) if run.source.image_shape else {}
    preparation = {'preparation': facts} if facts else {}  # such as which of several published splits
    return {
        'checkpoint': prefix, 'iterations': iterations,
        **({'ensemble': trained.iterations} if isinstance(trained, Ensemble) else {}),
        **({'known_classes': known_classes(trained_on, tasks)} if run.source.image_shape and run.datasource != trained_on else {}),
        **({'trained_on': trained_on} if trained_on != run.datasource else {}),
        'method': run.method + (f', ensemble of {run.ensemble}' if isinstance(trained, Ensemble) else ''),
        'score': run.metric, 'flags': run.flags,
        'own_updates': run.headline_updates,  # see --compare
        # What makes tasks the same is everything that draws them: evaluations are only compared where all of this is equal.
        'tasks': {'datasource': run.datasource, 'split': run.split,
                  'num_classes': run.tasks.num_classes if run.source.loss == 'xent' else None,
                  'update_batch_size': run.tasks.update_batch_size, 'query_shots': run.tasks.query_shots,
                  'seed': run.tasks.seed, 'count': run.num_test_tasks, 'data': tasks.fingerprint,
                  **run.source.task_facts, **preparation},
        'versions': {'python': platform.python_version(), 'tensorflow': tf.__version__, 'numpy': np.__version__}}


def known_classes(trained_on: str, tasks: Tasks) -> list[str]:
    """Of the classes of another source than the training's, those with names of classes that the model was trained on.

    CIFAR-FS and FC100 split the same hundred classes differently, MiniImagenet and tieredImageNet those of ImageNet. Numeric
    class names are ignored.
    """
    folder = SOURCES[trained_on].folder
    trained = listed_classes(os.path.join(DATA_FOLDER, folder), 'train') if folder else set()
    names = map(os.path.basename, tasks.classes.names)
    return [name for name in names if name in trained and not name.isdigit()]


def results_name(run: Evaluation, prefix: str, query_norm: str) -> str:
    """The name of an evaluation: the reference's for the newest checkpoint on its usual tasks, else with what differs."""
    newest = [checkpoints.path(run.directory, iteration) for iteration in checkpoints.iterations(run.directory)[-1:]]
    usual = run.source.query_shots(run.model.update_batch_size, train=False)
    return ''.join([
        f'test_ubs{run.model.update_batch_size}_stepsize{run.model.update_lr}',
        f'_{run.datasource}' if run.datasource != run.trained_on else '',
        f'_cls{run.model.dim_output}' if run.model.dim_output != run.num_outputs else '',
        f'_query{run.tasks.query_shots}' if run.tasks.query_shots != usual else '',
        f'_tasks{run.num_test_tasks}' if run.num_test_tasks != TEST_TASKS else '',
        f'_seed{run.tasks.seed}' if run.tasks.seed else '',
        f'_updates{run.test_updates}' if run.test_updates != run.usual_updates else '',
        f'_batch{run.model.inner_batch}' if run.model.inner_batch != run.learning_flags['inner_batch'] else '',
        f'_querynorm{query_norm}' if query_norm != 'batch' else '',
        f'_ensemble{run.ensemble}' if run.ensemble > 1 else '',
        f'_{os.path.basename(prefix)}' if run.load_from or [prefix] != newest else ''])


def draw(run: Evaluation, model: MAML, tasks: Tasks, found: dict[str, np.ndarray], names: Sequence[str], prefix: str,
         iterations: int | None) -> list[str]:
    """Writes the figures of evaluations, named after the first, and for TensorBoard; returns their paths.

    In TensorBoard each evaluation is a run of its own, because TensorBoard reads one file of a run at a time.

    Args:
        model: shows what it does with some tasks.
        found: {query_norm: values}.
        names: of these evaluations.
    """
    from runtime.results import plots  # imported late: matplotlib is slow to import, and only --plot needs it

    labels = [os.path.basename(prefix) + (f', --query_norm={norm}' if len(found) > 1 else '') for norm in found]
    drawn = plots.evaluation_figures(run, model, tasks, run.split, dict(zip(labels, found.values())))
    paths = [os.path.join(run.directory, f'{names[0]}_{run.split}_{what}.{run.plot_format}') for what in drawn]
    for figure, path in zip(drawn.values(), paths):
        plots.save(figure, path)
    for name, values in zip(names, found.values()):
        with Summaries(os.path.join(run.directory, f'{name}_{run.split}'), run.log, 0, print) as summaries:
            summaries.write_flags(run.learning_flags)
            summaries.write_means(run.split, run.metric, values.mean(axis=0), iterations or 0)
            summaries.write_figures(run.split, drawn if name == names[0] else {}, iterations or 0)
    return paths


def restore(run: Trained) -> tuple[MAML | Ensemble, str, int | None, str]:
    """The network that the flags describe, with the weights of the checkpoint that they ask for, or an ensemble.

    Returns:
        A MAML with as many outputs as it was trained with; the checkpoint's prefix; its iterations, None if not known; and the source
        that it was trained on, as far as is known. Of an ensemble these are those of the best.

    Raises:
        UserError: as for `evaluate`.
    """
    model = MAML(dataclasses.replace(run.model, dim_output=run.num_outputs), replicas=run.replicas)
    if run.load_from:
        record = checkpoints.load_weights(run.load_from, model.parameters(), run.network_flags)
        learnt = record.get('flags', {})
        if learnt.get('learn_lr', 'no') != 'no' and learnt['update_lr'] != run.model.update_lr:
            raise UserError(f'--update_lr={run.model.update_lr}: the step sizes of this model are learned, and an evaluation cannot change '
                            f'them; give --update_lr={learnt["update_lr"]}, with which its training started')
        return model, run.load_from, record.get('iteration'), learnt.get('datasource', run.trained_on)
    best = checkpoints.find_best(run.directory, run.ensemble) if run.ensemble > 1 else []
    checkpoint = best[0] if best else checkpoints.find(run.directory, run.checkpoint)
    record = checkpoint.record
    if record['regime'] != run.regime:
        raise UserError(f'the checkpoint {checkpoint.prefix} comes from {record["regime"]}ing, and the flags describe '
                        f'{run.regime}ing; give the flags of its training')
    checkpoints.check_run(checkpoint, {**run.network_flags, 'datasource': run.trained_on}, run.pretrain_iterations,
                          'give the flags of its training')
    checkpoints.restore_parameters(checkpoint, model.parameters())
    if best:
        model = Ensemble(model, [{name: one.arrays[name] for name in model.parameters()} for one in best],
                         [one.record['iteration'] for one in best])
    return model, checkpoint.prefix, record['iteration'], run.trained_on


def evaluate_tasks(model: MAML, tasks: Tasks, count: int, num_updates: int,
                   report: Callable[[int], None] = lambda tasks: None) -> Metrics:
    """Metrics of tasks 0 to count - 1, by all replicas, in batches that fit the memory; their size changes no figure.

    Args:
        report: called after each batch with its number of tasks.
    """
    replicas = model.replicas
    numbers_per_task = (sum(array.size for array in tasks.draw(0, 1))
                        + sum(math.prod(variable.shape) for variable in model.weights.values()))
    largest = min(max(2 ** 24 // numbers_per_task, 1), model.config.task_chunk or count)  # 64 MiB of float32
    per_replica = math.ceil(count / replicas.count)
    size, parts = math.ceil(per_replica / math.ceil(per_replica / largest)), []
    for start in range(0, count, size * replicas.count):
        # All batches have one size, to be compiled once; the last may have more tasks than were asked for.
        batch = replicas.distribute(lambda replica, start=start: tasks.draw(start + replica * size, size))
        parts.append(model.evaluate(batch, num_updates))
        report(min(size * replicas.count, count - start))
    return type(parts[0])(*(None if part[0] is None else np.concatenate(part, axis=-1)[..., :count] for part in zip(*parts)))


def task_metrics(metrics: Metrics) -> np.ndarray:
    """Accuracies, or losses in regression, [tasks, 1 + updates]: support rows before adaptation, query rows after each update."""
    pre, post = ((metrics.pre_loss, metrics.post_losses) if metrics.pre_accuracy is None else
                 (metrics.pre_accuracy, metrics.post_accuracies))
    return np.concatenate([pre[None], post]).T
