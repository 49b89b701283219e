"""Evaluation of a checkpoint on many tasks of a split."""
import contextlib
import dataclasses
import math
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_generator import DATA_FOLDER, SOURCES, ClassTasks
from maml import MAML
from networks import network_of
from runtime.cli import methods
from runtime.cli.flags import default
from runtime.cli.request import same_folder
from runtime.cli.run import Evaluation, Trained, usual_updates
from runtime.cli.run_data import record_split
from runtime.cli.workers import check_in_sync
from runtime.datasets.class_folders import preparation_record, published_training_classes
from runtime.datasets.tasks import OWN_DATA, Tasks
from runtime.jobs import checkpoints
from runtime.jobs.ensemble import Ensemble, Permuted
from runtime.jobs.models import Navigator, Returns, new_model
from runtime.jobs.summaries import Summaries
from runtime.results import store
from runtime.results.provenance import Provenance, arithmetic, differences, program
from runtime.results.statistics import statistics
from runtime.system.errors import UserError
from runtime.system.progress import Progress
from utils import Metrics

# Flags of a training that say how its model adapts to a task. An evaluation of the weights of another run may have others.
ADAPTATION = ('inner_weights', 'head_init', 'logits', 'adapt_norm', 'norm_per_step', 'mean_loss', 'learn_lr', 'inner_optimizer')
PROGRESS_DELAY = 3  # seconds before the progress bar appears


class Restored(NamedTuple):
    """What is evaluated, and where it comes from."""
    model: MAML | Ensemble | Navigator  # with as many outputs as it was trained with
    prefix: str                 # of the checkpoint; of an ensemble, this and the next two are of the best
    iterations: int | None      # None if not known
    provenance: Provenance | None  # None: not known
    checksums: dict[str, int]   # {prefix: checksum} of its checkpoints
    method: str                 # the name of its training's; this and the next two as far as they are known, else those of the run
    trained_for: tuple[int, int]  # iterations of pre-training and of meta-training
    flags: dict[str, Any]       # that determined what was learnt
    newest: int | None = None   # iterations of the run's newest checkpoint
    is_best: bool = False       # on meta-validation, of those of the run
    ensemble: tuple[int, ...] = ()  # iterations of its checkpoints
    adapted_by: dict[str, Any] = {}  # of weights of another run: ADAPTATION of this evaluation, where it differs from their training's

    @property
    def evaluated_method(self) -> str:
        """The name of what is evaluated: of the method of its training, if there was one."""
        return 'random initialisation' if self.iterations == 0 else self.method

    @property
    def trained_on(self) -> str:
        """The source."""
        return self.flags['datasource']


class Variant(NamedTuple):
    """One of the ways in which an evaluation uses a model."""
    query_norm: str
    head: str                   # 'own' | 'nearest class mean' | 'nearest neighbour'
    orders: str = ''            # under several orders of the labels: the 'mean' accuracy, or that of the 'averaged' outputs

    @property
    def label(self) -> str:
        """Text, for tables and pictures."""
        orders = [f'{self.orders} over orders'] if self.orders else []
        return ', '.join([f'--query_norm={self.query_norm}', *([self.head] if self.head != 'own' else []), *orders])


class Result(NamedTuple):
    """What came out of one of them."""
    variant: Variant
    seconds: float
    values: np.ndarray                  # [tasks, columns], see `store.column_titles`
    spread: np.ndarray | None = None    # of a mean over orders of the labels: the standard deviation, [tasks, columns]


def evaluate(run: Evaluation, data: dict[str, Tasks]) -> None:
    """Evaluates a checkpoint on --num_test_tasks tasks of data[run.split]; prints a table and adds the results to results.json.
    Raises UserError if there is no such checkpoint, it is damaged or of another network, or the results cannot be written."""
    store.entries_of(run.directory)  # a damaged file is reported before the work, not after it
    restored = restore(run)
    if run.replicas.chief:
        with writing(run.directory), store.changing(run.directory):  # so is a folder that cannot be written to
            pass
        record_split(run.source, run.tasks, data)
    tasks = data[run.split]
    check_in_sync(run.replicas, (run.worker_flags, tasks.fingerprint), restored.model.state().values())
    seen_classes = known_classes(run, restored, tasks)
    print(heading(run, tasks, restored, seen_classes), flush=True)
    results, written, models = [], [store.FILE], models_of(run, restored)
    for variant, model in models.items():
        model_results = results_of(run, tasks, variant, model, variant.label if len(models) > 1 else None)
        results += model_results
        for result in model_results if run.replicas.chief else ():
            name = reference_name(run, restored, result.variant)
            save(run.directory, entry_of(run, tasks, restored, seen_classes, result), result.values, name,
                 lambda: check_still_there(restored))
            written += [f'{name}.csv and .pkl'] if name else []
    report(run, results, written)
    if run.plot and run.replicas.chief:
        for path in draw(run, next(iter(models.values())), tasks, {result.variant: result.values for result in results}, restored):
            print(f'Drawn: {path}')


def report(run: Evaluation, results: Sequence[Result], written: Sequence[str]) -> None:
    """Prints the table of an evaluation, and the names of the files that it wrote."""
    spreads = {f'{result.variant.label}, spread': result.spread for result in results if result.spread is not None}
    print(store.table({result.variant.label: result.values for result in results} | spreads, run.metric, run.test_updates == 0))
    for result in results:
        if diverged := np.sum(~np.isfinite(result.values).all(axis=1)):
            where = f', {result.variant.label}' if len(results) > 1 else ''
            advice = ': lower --update_lr' if run.test_updates and run.model.learn_lr == 'no' else ''
            print(f'Adaptation diverged on {diverged} of {run.num_test_tasks} tasks{where}{advice}')
    trained = run.model.num_updates
    if run.test_updates > trained and (run.model.learn_lr == 'step' or run.model.norm_per_step):
        print(f'  (updates after number {trained} use its step sizes and its normalisation again)')
    print(f'\n{run.num_test_tasks / max(result.seconds for result in results):.3g} tasks a second. '
          f'Written to {run.directory}: {", ".join(written)}')


def models_of(run: Evaluation, restored: Restored) -> dict[Variant, MAML | Ensemble]:
    """The ways in which an evaluation uses the restored model."""
    heads = {'own': {}, 'nearest class mean': {'head_init': 'prototypes', 'logits': 'linear'},
             'nearest neighbour': {'head_init': 'neighbours'}}
    return {Variant(norm, head): restored.model.variant(dim_output=run.model.dim_output, query_norm=norm, **heads[head])
            for norm in run.query_norms for head in run.heads}


def results_of(run: Evaluation, tasks: Tasks, variant: Variant, model: MAML | Ensemble, title: str | None) -> list[Result]:
    """Evaluates a model; with --permutations the mean over orders of the labels, and the averaged outputs. `title` is of the progress."""
    started = time.perf_counter()
    evaluated = Permuted(model, run.permutations) if run.permutations > 1 else model
    with Progress(0, run.num_test_tasks, run.replicas.chief, unit=' tasks', desc=title, delay=PROGRESS_DELAY) as progress:
        metrics = evaluate_tasks(evaluated, tasks, run.num_test_tasks, run.test_updates, progress.update)
    seconds = time.perf_counter() - started
    if evaluated is model:
        return [Result(variant, seconds, task_metrics(metrics))]
    return [Result(variant._replace(orders='mean'), seconds, metrics.mean.T, metrics.spread.T),
            Result(variant._replace(orders='averaged'), seconds, metrics.averaged.T)]


def heading(run: Evaluation, tasks: Tasks, restored: Restored, seen_classes: Sequence[str]) -> str:
    """Text: which checkpoint is evaluated on which tasks, and how many of their classes, `seen_classes`, may have been trained on."""
    described = {None: 'weights of another run', 0: 'the initial weights'}.get(restored.iterations, f'{restored.iterations} iterations')
    if restored.ensemble:
        described += f"; mean outputs of {', '.join(f'model{iteration}' for iteration in restored.ensemble)}"
    lines = [f'{run.description}, {store.SPLIT_TITLES[run.split]}, {run.num_test_tasks} tasks',
             f'{restored.prefix} ({described})']
    if restored.adapted_by:
        adaptation, training = (' '.join(f'--{name}={flags[name]}' for name in restored.adapted_by)
                                for flags in (restored.adapted_by, restored.flags))
        lines.append(f'Note: adapted with {adaptation}, and trained with {training}')
    if seen_classes:
        how = ' (same name or images)' if run.datasource != restored.trained_on else ''
        lines.append(f'Note: {len(seen_classes)} of the {len(tasks.classes.names)} {"classes" if run.model.loss == "xent" else "tables"} '
                     f'were seen in training{how}, such as {seen_classes[0]}')
    if restored.provenance and run.datasource == restored.trained_on:
        now, examples = Provenance({run.split: tasks.fingerprint}), 'images' if run.source.image_shape else 'data'
        lines += [f'Note: {sentence}' for sentence in differences(restored.provenance, now, 'the model', examples).values()]
    return '\n'.join([*lines, ''])


def entry_of(run: Evaluation, tasks: Tasks, restored: Restored, seen_classes: Sequence[str], result: Result) -> store.Entry:
    """The entry of results.json for a result of an evaluation."""
    variant, values = result.variant, result.values
    record = preparation_record(run.source.folders(run.tasks.data_path).root) if run.source.image_shape else {}
    preparation = {'preparation': record['facts']} if record.get('facts') else {}  # such as which of several published splits
    facts = {**run.source.task_facts, **preparation}
    return store.Entry(
        checkpoint=os.path.basename(restored.prefix), iterations=restored.iterations, is_best=restored.is_best,
        ensemble=list(restored.ensemble),
        training=store.Training(
            restored.evaluated_method, *restored.trained_for, restored.flags,
            restored.provenance and restored.provenance.without_classes, restored.newest),
        tasks=store.EvaluationTasks(
            datasource=run.datasource, split=run.split, num_classes=run.tasks.num_classes if run.source.loss == 'xent' else None,
            update_batch_size=run.tasks.update_batch_size, query_shots=run.tasks.query_shots, seed=run.tasks.seed,
            count=run.num_test_tasks, data=tasks.fingerprint, facts=facts),
        setting=store.Setting(
            query_norm=variant.query_norm, head=variant.head, permutations=run.permutations, orders=variant.orders,
            update_lr=run.model.update_lr, inner_batch=run.model.inner_batch, test_updates=run.test_updates,
            headline_updates=run.headline_updates, load_from=run.load_from and os.path.abspath(run.load_from),
            adapted_by=', '.join(f'{name}={value}' for name, value in restored.adapted_by.items())),
        known_classes=list(seen_classes), metric=run.metric, seconds=result.seconds,
        versions={'python': platform.python_version(), 'numpy': np.__version__, 'program': program(),
                  **arithmetic(restored.model.config.engine, run.replicas.count)},
        figures=store.figures_of(values, result.spread), scores=values.tolist(), checksum=restored.checksums.get(restored.prefix),
        data_path=run.tasks.data_path and os.path.abspath(run.tasks.data_path) if run.datasource in OWN_DATA else None)


def check_still_there(restored: Restored) -> None:
    """Raises UserError if a checkpoint is not there any more, or another one of its name."""
    for prefix, checksum in restored.checksums.items():
        try:
            is_there = checkpoints.checksum(prefix) == checksum
        except OSError:
            is_there = False
        if not is_there:
            raise UserError(f'{prefix} was deleted, moved or replaced while it was evaluated, so nothing is written; evaluate again')


def save(directory: str, entry: store.Entry, values: np.ndarray, name: str | None, check: Callable[[], None]) -> None:
    """Adds an evaluation to results.json, and writes values [tasks, 1 + updates] to <name>.csv and .pkl if there is a name; `check` as of
    `store.add`."""
    with writing(directory):
        store.add(directory, entry, check)
        if name:
            store.write_reference_files(os.path.join(directory, name), values)


@contextlib.contextmanager
def writing(directory: str) -> Iterator[None]:
    """Creates the folder of a run; raises UserError if that fails, or if what is done while entered is an OSError."""
    try:
        os.makedirs(directory, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f'the results cannot be written to {directory}: {error.strerror}') from error


def known_classes(run: Evaluation, restored: Restored, tasks: Tasks) -> list[str]:
    """The classes that the model was trained on, or of another source with the names of such.

    Within a source a class is known by its name or its first examples, by the latter alone if its name is a number. CIFAR-FS and FC100
    split the same hundred classes differently, MiniImagenet and tieredImageNet those of ImageNet: of another source it is known by the
    last part of its name, unless that is a number. Of weights from earlier versions, only the published classes of a source are known.
    """
    if not isinstance(tasks, ClassTasks):
        return []
    is_same_source = run.datasource == restored.trained_on
    trained = restored.provenance.classes if restored.provenance else {}
    published = getattr(SOURCES.get(restored.trained_on), 'folder', None)  # with a list of its classes
    if not trained and published and not is_same_source:
        trained = dict.fromkeys(published_training_classes(os.path.join(DATA_FOLDER, published)), 0)
    checksums, endings = set(trained.values()) - {0}, {os.path.basename(name) for name in trained}

    def is_known(name, checksum):
        ending = os.path.basename(name)
        by_name = name in trained if is_same_source else ending in endings
        return by_name and not ending.isdigit() or checksum in checksums

    return [name for name, checksum in tasks.class_checksums().items() if is_known(name, checksum)]


def reference_name(run: Evaluation, restored: Restored, variant: Variant) -> str | None:
    """The name of the .csv and .pkl files of the evaluation that the reference makes; None for any other.

    The reference evaluates the newest checkpoint as is usual, on either split. The files are named after the number of shots and the
    step size, which may be any.
    """
    is_newest = restored.newest is not None and restored.iterations == restored.newest
    others = [differs for what, (_, differs) in differences_from_usual(run, restored).items()
              if what not in ('shots', 'step size', 'query norm', 'heads', 'permutations')]  # the last three are the variant's
    is_standard = is_newest and variant == ('batch', 'own', '') and run.test_updates > 0 and not any(others)
    return f'test_ubs{run.model.update_batch_size}_stepsize{run.model.update_lr}' if is_standard else None


def is_elsewhere(run: Evaluation, restored: Restored) -> bool:
    """Whether the tasks are of the user's own data, and these are not where those of the training were, as far as that is known."""
    if run.datasource not in OWN_DATA:
        return False
    if run.datasource != restored.trained_on:
        return True
    before = restored.provenance and restored.provenance.data_path
    return bool(before) and not same_folder(run.tasks.data_path, before)


def picture_stem(run: Evaluation, restored: Restored) -> str:
    """What the paths of an evaluation's pictures begin with: split, checkpoint, and in what it differs from the usual evaluation of the
    run, so that another one does not replace them."""
    names = [name for name, differs in differences_from_usual(run, restored).values() if differs]
    return os.path.join(run.directory, '_'.join(['evaluation', run.split, os.path.basename(restored.prefix), *names]))


def differences_from_usual(run: Evaluation, restored: Restored) -> dict[str, tuple[str, bool]]:
    """{what: (its name in this evaluation, whether it differs from the usual evaluation of the run)}, but for split and checkpoint."""
    tasks, source, trained = run.tasks, run.source, run.learning_flags
    weights_of = os.path.dirname(os.path.abspath(restored.prefix))
    return {
        'ensemble': (f'ensemble{len(restored.ensemble)}', bool(restored.ensemble)),
        'source': (run.datasource, run.datasource != restored.trained_on),
        'weights': (f'of_{os.path.basename(weights_of)}_{zlib.crc32(weights_of.encode()):08x}', bool(run.load_from)),
        'data': (f'data_{zlib.crc32(os.path.abspath(tasks.data_path or "").encode()):08x}', is_elsewhere(run, restored)),
        'updates': (f'{run.test_updates}updates', run.test_updates != usual_updates(run.model.num_updates, source.test_updates)),
        'queries': (f'{tasks.query_shots}query', tasks.query_shots != source.query_shots(tasks.update_batch_size, train=False)),
        'step size': (f'updatelr{run.model.update_lr}', run.model.update_lr != trained['update_lr']),
        'inner batch': (f'batch{run.model.inner_batch}', run.model.inner_batch != trained['inner_batch']),
        'tasks': (f'{run.num_test_tasks}tasks', run.num_test_tasks != source.usual_flags.get('num_test_tasks', default('num_test_tasks'))),
        'way': (f'{tasks.num_classes}way', source.loss == 'xent' and tasks.num_classes != run.num_outputs),
        'shots': (f'{tasks.update_batch_size}shot', tasks.update_batch_size != trained['update_batch_size']),
        'query norm': ('-'.join(run.query_norms), run.query_norms != (trained['query_norm'],)),
        'seed': (f'seed{tasks.seed}', tasks.seed != 0),
        'heads': ('nearest', run.heads != ('own',)),
        'permutations': (f'{run.permutations}orders', run.permutations > 1)}


def draw(run: Evaluation, model: MAML | Ensemble, tasks: Tasks, values_of: dict[Variant, np.ndarray],
         restored: Restored) -> list[str]:
    """Writes the figures of an evaluation with {variant: values}, whose paths begin with `picture_stem`; returns their paths. The model is
    of the first variant.

    They are for TensorBoard too, where each evaluation is a run of its own, because it reads one file of a run at a time.
    """
    from runtime.results import plots  # imported late: matplotlib is slow to import, and only --plot needs it

    checkpoint, iteration = os.path.basename(restored.prefix), restored.iterations or 0
    stem = picture_stem(run, restored)
    titles = {variant: f', {variant.label}' if len(values_of) > 1 else '' for variant in values_of}
    curves = {checkpoint + titles[variant]: values for variant, values in values_of.items()}
    figures = plots.evaluation_figures(run, model, tasks, run.split, curves, run.test_updates, restored.evaluated_method)
    paths = [f'{stem}_{what}.{run.plot_format}' for what in figures]
    for figure, path in zip(figures.values(), paths):
        plots.save(figure, path)
    for index, (variant, values) in enumerate(values_of.items()):
        is_first = index == 0
        name = '_'.join([stem, variant.query_norm, *(part.replace(' ', '') for part in variant[1:] if part not in ('own', ''))])
        with Summaries(stem if is_first else name, run.log, 0, print) as summaries:
            summaries.write_flags(run.learning_flags)
            summaries.write_means(run.split, run.metric, statistics(values)[0], iteration, run.test_updates)
            summaries.write_figures(run.split, figures if is_first else {}, iteration)
    return paths


def restore(run: Trained) -> Restored:
    """The network that the flags describe, with the weights of the checkpoint that they ask for, or an ensemble."""
    model = new_model(run, run.learning_flags['seed'], dim_output=run.num_outputs)
    if run.load_from:
        return _of_another_run(run, model)
    if run.checkpoint == 0:
        return Restored(model, checkpoints.path(run.directory, 0), 0, None, {}, run.method,
                        (run.pretrain_iterations, run.metatrain_iterations), run.learning_flags)
    is_ensemble = run.ensemble > 1
    members = (checkpoints.find_best(run.directory, run.ensemble) if is_ensemble else
               [checkpoints.find(run.directory, run.checkpoint)])
    checkpoint, iterations = members[0], tuple(member.record['iteration'] for member in members)
    record = checkpoint.record
    if record['regime'] != run.last_phase:
        raise UserError(f'the checkpoint {checkpoint.prefix} comes from {record["regime"]}ing, and the flags describe '
                        f'{run.last_phase}ing; give the flags of its training')
    checkpoints.check_run(checkpoint, {**run.network_flags, 'datasource': run.learning_flags['datasource']}, run.last_phase,
                          run.pretrain_iterations, 'give the flags of its training')
    checkpoints.refuse_untrained(run.directory, record['iteration'], record['skipped'])
    checkpoints.restore(checkpoint, model.parameters())
    if is_ensemble:
        model = Ensemble(model, [checkpoints.without_optimizer(member.arrays) for member in members])
    newest = checkpoint if run.checkpoint is None and not is_ensemble else checkpoints.find(run.directory, None)
    best = newest.record['best']
    flags = {name: record['flags'].get(name, value) for name, value in run.learning_flags.items()}  # the record knows how it was trained
    trained_for = newest.record['pretrain_iterations'], flags.get('metatrain_iterations', run.metatrain_iterations)
    return Restored(model, checkpoint.prefix, iterations[0], record['provenance'],
                    {member.prefix: member.checksum for member in members}, run.method, trained_for, flags,
                    newest=newest.record['iteration'],
                    is_best=best is not None and best['iteration'] == iterations[0], ensemble=iterations if is_ensemble else ())


def _of_another_run(run, model):
    """`restore` from the checkpoint that --load_from names."""
    checkpoint = load_weights(run.load_from, model, run.network_flags)
    record, learnt = checkpoint.record, checkpoint.record.get('flags', {})
    if learnt.get('learn_lr', 'no') != 'no' and learnt['update_lr'] != run.model.update_lr:
        raise UserError(f'--update_lr={run.model.update_lr}: the step sizes of this model are learned, and an evaluation '
                        f'cannot change them; give --update_lr={learnt["update_lr"]}, with which its training started')
    flags = run.learning_flags
    if learnt:  # a record of an earlier version may lack some, which had their defaults
        flags = {**flags, **{name: default(name) for name in flags if name not in ('datasource', 'num_classes')}, **learnt}
    method = methods.name(flags, record.get('regime') == 'pretrain') if learnt else run.method
    iterations, pretrained = record.get('iteration'), record.get('pretrain_iterations', 0)
    trained_for = run.pretrain_iterations, run.metatrain_iterations
    if iterations is not None:
        trained_for = min(iterations, pretrained), max(iterations - pretrained, 0)
    adapted_by = {name: value for name, value in run.learning_flags.items() if name in ADAPTATION and learnt and value != flags[name]}
    return Restored(model, run.load_from, iterations, record.get('provenance'), {run.load_from: checkpoint.checksum}, method, trained_for,
                    flags, adapted_by=adapted_by)


def load_weights(prefix: str, model: MAML, network_flags: dict, starts: bool = False) -> checkpoints.Checkpoint:
    """`checkpoints.load_any`, and its weights into a model, which gets the first outputs of a classifier that has more, unless that has
    another kind of last layer."""
    config, checkpoint = model.config, checkpoints.load_any(prefix)
    last_layer, head_init = network_of(config).head_names, checkpoint.record.get('flags', {}).get('head_init', config.head_init)
    outputs, classes = checkpoints.outputs(checkpoint, last_layer), network_flags.get('num_classes')
    is_wider = classes is not None and outputs is not None and outputs > classes and head_init == config.head_init
    # The seed is for what the checkpoint lacks.
    target = MAML(dataclasses.replace(config, dim_output=outputs), config.mask_seed, model.replicas) if is_wider else model
    flags = {**network_flags, 'num_classes': outputs} if is_wider else network_flags
    checkpoints.restore_weights(checkpoint, target.parameters(), flags, last_layer, starts, config.head_init)
    if is_wider:
        model.copy_parameters(target)
    return checkpoint


def evaluate_tasks(model: MAML, tasks: Tasks, count: int, num_updates: int,
                   report: Callable[[int], None] = lambda tasks: None) -> Metrics | Returns:
    """Metrics of tasks 0 to count - 1, by all replicas, in batches that fit the memory; their size changes no figure. `report` is
    called after each batch with its number of tasks."""
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


def task_metrics(metrics: Metrics | Returns) -> np.ndarray:
    """Accuracies, losses in regression, or returns, [tasks, columns], see `store.column_titles`."""
    *_, values = metrics.reported().values()
    return values.T
