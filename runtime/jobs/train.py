"""The training loop: meta-batches in; console lines, summaries and checkpoints out; interruptible without loss."""
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from data_generator import ClassTasks
from maml import ModelConfig
from networks import network_of
from runtime.cli import stored_run
from runtime.cli.flags import default
from runtime.cli.run import Training, usual_updates
from runtime.cli.run_data import columns_of, record_split
from runtime.cli.workers import check_in_sync, check_shared
from runtime.compute.schedules import next_change
from runtime.datasets.tasks import TaskBatch, Tasks
from runtime.jobs import checkpoints, network_check
from runtime.jobs.evaluate import evaluate_tasks, load_weights, task_metrics
from runtime.jobs.journal import Journal
from runtime.jobs.models import Model, new_model
from runtime.jobs.saving import Saver, TrainState, classifies, diverged
from runtime.jobs.summaries import Summaries
from runtime.results.provenance import Provenance, Weights, arithmetic, differences, program
from runtime.results.statistics import UNITS
from runtime.system.cores import usable_cores
from runtime.system.errors import UserError, counted
from runtime.system.interruption import Interruption
from runtime.system.progress import Progress

SUMMARY_INTERVAL = 100
PRINTS_PER_VALIDATION = 5
IDLE_ITERATIONS = 10  # in a row without an outer step, after which a training stops
REPORTED_TASKS = 100  # of a validation that only reports; those of checkpoints, which choose, are on --validation_tasks
MANY_UPDATES = 50  # inner updates above which a line warns that compiling takes long


def train(run: Training, data: dict[str, Tasks]) -> None:
    """Trains from fresh weights, or from a checkpoint, to the last iteration, on {split: tasks} for train and val.

    Iteration i draws meta-batch i; the checkpoint `model<i>` is written after i iterations. The first SIGINT, SIGTERM or
    SIGHUP ends the run after the current iteration, with a checkpoint, by SystemExit with 128 + the signal's number.

    Raises UserError if training diverged, another process trains in the directory, or it holds checkpoints of another run.
    """
    replicas = run.replicas
    with checkpoints.exclusive(run.directory) if replicas.chief else contextlib.nullcontext():
        model = new_model(run, run.tasks.seed)
        if run.model.network and run.check_network and run.metatrain_iterations:
            network_check.check(run.model)
        provenance = present_provenance(run, data, model)
        # The chief comes here after it has tidied up the directory; only then do the other workers look into it.
        check_in_sync(replicas, (run.worker_flags, provenance.data))
        check_shared(replicas, run.directory)
        state, provenance = start(run, model, provenance)
        check_in_sync(replicas, state, model.state().values())
        if state.iteration >= run.iterations:
            checkpoints.refuse_untrained(run.directory, state.iteration, state.skipped)
            print(f'Nothing to do: {state.iteration} of {run.iterations} iterations are trained. To evaluate, add --train=False.')
            return
        if replicas.chief:
            prepare_directory(run, state, model, provenance)
            record_split(run.source, run.tasks, data)
        with Journal(run.directory, replicas.chief, state.iteration) as journal:
            print(description(run, data, model), flush=True)
            with Interruption() as interruption, Progress(
                    state.iteration, run.iterations, replicas.chief, desc='compiling') as progress, \
                    Summaries(run.directory, run.log and replicas.chief, state.iteration, progress.log) as summaries:
                if state.iteration == 0:
                    summaries.write_flags(run.learning_flags)
                saver = Saver(run, model, provenance, state.iteration, progress.log)
                loop(run, data, model, state, saver, interruption, progress, summaries, journal)
            report_end(run, state, interruption, saver)


def present_provenance(run: Training, data: dict[str, Tasks], model: Model) -> Provenance:
    """That of a model which is trained from now on; weights are named if --load_from is given, whether they are used or not."""
    weights, path = None, run.tasks.data_path
    if run.load_from:
        weights = Weights(os.path.abspath(run.load_from), None)
        with contextlib.suppress(OSError):
            weights = Weights(weights.checkpoint, checkpoints.checksum(run.load_from))
    tasks = data['train']
    return Provenance(data={split: split_tasks.fingerprint for split, split_tasks in data.items()},
                      data_path=path and os.path.abspath(path), weights=weights,
                      arithmetic=[arithmetic(model.config.engine, run.replicas.count, run.model.recompute)], program=program(),
                      classes=tasks.class_checksums() if isinstance(tasks, ClassTasks) else {})


def start(run: Training, model: Model, provenance: Provenance) -> tuple[TrainState, Provenance]:
    """Restores a checkpoint, or loads the weights to start from, if there are any; also returns the provenance of the model."""
    saved = checkpoints.iterations(run.directory)
    if run.resume and (run.checkpoint is not None or saved):
        checkpoint = checkpoints.find(run.directory, run.checkpoint)
        provenance = continued(run, checkpoint, provenance)
        checkpoints.restore(checkpoint, model.state())
        print(f'Resuming from {checkpoint.prefix}{shared_by_default(run, checkpoint)}')
        state = TrainState.from_record(checkpoint.record)
        state.ranking = checkpoints.saved_ranking(run.directory, checkpoint.record)
        counts = {entry['tasks'] for entry in state.ranking if 'tasks' in entry} - {run.validation_tasks}
        if counts:
            print(f'Note: earlier checkpoints were ranked on {", ".join(map(str, sorted(counts)))} tasks of meta-validation, later ones '
                  f'are ranked on {run.validation_tasks}')
        return state, provenance
    if run.load_from:
        record = load_weights(run.load_from, model, run.network_flags, starts=True).record
        print(f'Starting from the weights of {run.load_from}')
        earlier = record['provenance'].classes if 'provenance' in record else {}
        provenance = dataclasses.replace(provenance, classes={**earlier, **provenance.classes})
    return TrainState(), provenance


def continued(run: Training, checkpoint: checkpoints.Checkpoint, now: Provenance) -> Provenance:
    """The provenance of a model whose training goes on; prints what differs without changing what is learnt. Raises UserError if
    flags, data or the weights that --load_from names are not those of the checkpoint."""
    hint = 'start from scratch by --resume=False or in another --logdir'
    checkpoints.check_run(checkpoint, run.learning_flags, run.last_phase, run.pretrain_iterations,
                          f'give the flags of its training, or {hint}')
    then = checkpoint.record['provenance']
    changes = differences(then, now, f'the checkpoint {checkpoint.prefix}', 'images' if run.source.image_shape else 'data')
    refused = [(changes.pop(name), cure) for name, cure in (('data', 'restore them'), ('weights', 'leave out --load_from'))
               if name in changes]
    if refused:
        sentences, cures = zip(*refused)
        raise UserError(f'{"; ".join(sentences)}; {" and ".join(cures)}, or {hint}')
    if run.load_from and not then.is_known:
        changes['weights'] = f'--load_from={run.load_from} is not read: the run goes on from its own checkpoint'
    for sentence in changes.values():
        print(f'Note: {sentence}')
    if 'arithmetic' in changes or 'program' in changes:
        certainty = 'are no longer' if 'arithmetic' in changes else 'may no longer be'
        print(f'      From here on, results {certainty} bit-identical to those of an uninterrupted run')
    return then.continued(now)


def shared_by_default(run: Training, checkpoint: checkpoints.Checkpoint) -> str:
    """Text about whose run is continued, if that is in the default --logdir, which all users and studies share; else ''."""
    folder = default('logdir')
    if os.path.dirname(os.path.abspath(run.directory)) != os.path.abspath(folder):
        return ''
    status = os.stat(checkpoint.prefix + '.index')
    owner = 'you' if status.st_uid == os.getuid() else f'user {status.st_uid}'
    saved = time.strftime('%Y-%m-%d %H:%M', time.localtime(status.st_mtime))
    return (f', which {owner} saved on {saved}. --logdir={folder} is the default and shared by all users and studies: to leave that run as '
            'it is, give another --logdir')


def prepare_directory(run: Training, state: TrainState, model: Model, provenance: Provenance) -> None:
    """Moves later checkpoints aside, writes the file of flags that --run reads, and warns if saving does not work."""
    later = any(iteration > state.iteration for iteration in checkpoints.iterations(run.directory))
    moved = checkpoints.move_aside(run.directory, state.iteration)
    if moved:
        what = 'Later checkpoints' if later else 'Summaries and results that were there before this training'
        print(f'{what} were moved to {moved}')
    weights = provenance.weights  # which a command that goes on need not name again
    load_from = f'--load_from={weights.checkpoint}\n' if weights and not run.load_from else ''
    stored_run.write(run.directory, run.flag_file + load_from + provenance.comments, columns_of(run.source), run.network_file)
    try:
        checkpoints.try_saving(run.directory, model.state())
    except OSError as error:
        print(f'Warning: checkpoints cannot be saved in {run.directory} now ({error}); unless this is fixed, nothing of this '
              'training will be saved', flush=True)


def report_end(run: Training, state: TrainState, interruption: Interruption, saver: Saver) -> None:
    """Prints where the run ended; raises SystemExit if it was interrupted, UserError if no iteration changed anything."""
    newest = checkpoints.path(run.directory, saver.iteration)
    if state.skipped:
        print(f'{state.skipped} of {state.iteration} iterations were skipped (non-finite loss or gradient)')
    if not interruption.signal:
        checkpoints.refuse_untrained(run.directory, state.iteration, state.skipped)
    if not interruption.signal or saver.iteration == run.iterations:
        best = state.best and (f'; on meta-validation model{state.best["iteration"]} did best (--test_best), with '
                               f'{"an" if run.metric == "accuracy" else "a"} {run.metric} of {state.best["score"]:.6g} on '
                               f'{state.best.get("tasks", run.validation_tasks)} tasks')
        print(f'The last checkpoint is {newest}{best or ""}')
        return
    if not run.replicas.chief:  # which alone knows whether it is saved
        further = 'see the first worker'
    elif not saver.iteration:
        further = 'nothing is saved'
    else:
        without = '' if run.resume and run.checkpoint is None else ' without --resume=False and --test_iter'
        further = f'the newest checkpoint is {newest}. Run the same command{without} to resume'
    with contextlib.suppress(OSError):  # the terminal may be closed
        print(f'Stopped by {signal.Signals(interruption.signal).name} after iteration {state.iteration}; {further}.',
              file=sys.stderr, flush=True)
    sys.exit(128 + interruption.signal)


def description(run: Training, data: dict[str, Tasks], model: Model) -> str:
    """Text: what is about to be trained, on what data, where and how."""
    config, replicas = model.config, run.replicas
    parameters = sum(math.prod(variable.shape) for variable in [*model.weights.values(), *model.norm_params.values()])
    gpus = len(tf.config.list_physical_devices('GPU'))
    device = counted(gpus, 'GPU') if gpus else f'{usable_cores()} CPU cores'
    lines = [f'Training {run.description} for {run.iterations:,} iterations of {run.meta_batch_size} tasks in {run.directory}',
             *data_description(run, data),
             f'  network  {model.description}; {parameters:,} parameters',
             f'  engine   {config.engine}, on {device}; TensorFlow {tf.__version__}',
             f'  metric   {run.metric}{" (a fraction)" if run.metric == "accuracy" else ""}, before / after adaptation', *notes(config)]
    if replicas.count > 1:
        where = f' in {replicas.workers} processes' if replicas.workers > 1 else ''
        lines.append(f'  strategy {run.meta_batch_size // replicas.count} tasks on each of {replicas.count} replicas{where}')
    elif run.strategy not in ('auto', 'one'):
        lines.append(f'  strategy {run.strategy}, on one device, because there is no other')
    return '\n'.join(lines)


def data_description(run: Training, data: dict[str, Tasks]) -> list[str]:
    """A line about the amount of data in each split, if the source has data on disk."""
    sizes = [f'{split}: {tasks.size}' for split, tasks in data.items() if isinstance(tasks, ClassTasks)]
    outputs = run.source.dim_output(data['val'].config) if 'val' in data else run.model.dim_output
    if outputs < run.model.dim_output:
        sizes[-1] += f', so that validation is {outputs}-way'
    if sizes and not run.source.image_shape:
        sizes.append(run.source.files.columns.text)
    return ['  data     ' + '; '.join(sizes)] if sizes else []


def notes(config: ModelConfig) -> list[str]:
    """Lines about what hardly learns, or takes long to compile."""
    lines = []
    if config.loss == 'mse' and config.norm == 'batch_norm' and not config.network:
        lines.append("  note     with --norm=batch_norm, the default, regression hardly learns; the paper's sinusoid command has "
                     '--norm=None')
    if config.outer == 'reptile' and config.inner_weights != 'all':
        lines.append(f'  note     --outer=reptile trains what the inner loop adapts: with --inner_weights={config.inner_weights} the other '
                     'weights stay as they start')
    if config.network and (config.adapt_norm or config.norm_per_step) and not network_of(config).initial_norm_params():
        lines.append(f'  note     {network_of(config).name} has no offsets and scales of normalisation: --adapt_norm and --norm_per_step '
                     'change nothing')
    if config.num_updates > MANY_UPDATES and not config.recompute:
        lines.append('  note     an iteration is compiled with all its inner updates: with '
                     f'--num_updates={config.num_updates} that may take many minutes and gigabytes of memory before the first '
                     'one; --recompute avoids both')
    return lines


def loop(run: Training, data: dict[str, Tasks], model: Model, state: TrainState, saver: Saver, interruption: Interruption,
         progress: Progress, summaries: Summaries, journal: Journal) -> None:
    """Trains from `state`, which is updated in place, to the end or an interruption, and saves the result."""
    validation_model = model_for(run, data.get('val'), model)
    steps_per_call = math.gcd(model.steps_per_call, run.save_interval)  # as many as fit between checkpoints
    for first, batches in meta_batches(data['train'], run, state.iteration, steps_per_call):
        if run.log and first % SUMMARY_INTERVAL == 0:
            summarise(run, data['train'], model, first, summaries)  # before learning from it

        pretraining = run.pretrain_iterations
        phase, iteration = ('pretrain', first) if first < pretraining else ('metatrain', first - pretraining)
        means = model.train_steps(phase, batches, iteration, interruption.signal is not None)
        record_steps(run, state, means, interruption)
        progress.advance(state.iteration - first, run.meta_batch_size, state.unprinted)
        if is_reported(run, state.iteration):
            report_steps(run, phase, state, progress, summaries, journal)

        saving = state.iteration % run.save_interval == 0 or state.iteration == run.iterations
        ranking = state.ranking
        if 'val' in data and (saving or reports_validation(run, state.iteration)):
            progress.announce('validating')
            validation_model.copy_parameters(model)  # of which it may have fewer outputs
            before, after = validate(run, validation_model, data['val'], state.iteration, saving, summaries, progress)
            journal.write(state.iteration, 'metaval', before, after)
            progress.announce('')
            ranking = ranked(run, ranking, state.iteration, score(run, before, after)) if saving else ranking

        stopping = interruption.agreed if run.replicas.workers > 1 else interruption.signal
        if saver.is_due(saving) or stopping:
            summaries.flush()  # so that they hold everything that happened before the checkpoint
            saver.save(state, ranking)
        if stopping:
            return
    saver.finish(state, ranking, interruption)


def summarise(run: Training, tasks: Tasks, model: Model, iteration: int, summaries: Summaries) -> None:
    """Writes summaries of an iteration's meta-batch; there is none where a classifier is trained."""
    if not classifies(run, iteration):
        batch = run.replicas.distribute(functools.partial(draw, tasks, run, iteration))
        updates = run.model.num_updates
        summaries.write('metatrain', model.evaluate(batch, updates), iteration, updates)


def model_for(run: Training, tasks: Tasks | None, model: Model) -> Model:
    """The model itself, or if tasks have fewer classes, one with as many outputs."""
    outputs = run.source.dim_output(tasks.config) if tasks else model.config.dim_output
    return model if outputs == model.config.dim_output else model.variant(dim_output=outputs)


def record_steps(run: Training, state: TrainState, means: dict[str, tf.Tensor], interruption: Interruption) -> None:
    """Updates the state by what the steps after `state.iteration` returned; raises UserError if one was not finite, unless
    --skip_nonfinite is given."""
    means = {name: values.numpy() for name, values in means.items()}
    finite = means['finite']
    if means['stopping'].any():
        interruption.agree()
    state.idle = 0 if means.get('taken', finite)[-1] else state.idle + 1
    diverging = not run.skip_nonfinite and not finite.all()
    if diverging or 'taken' in means and state.idle >= IDLE_ITERATIONS:
        step = int(np.argmin(finite))
        quantity = 'loss' if 'pre_loss' in means else run.metric
        pre, post = means[f'pre_{quantity}'][step], means[f'post_{quantity}'][step]
        if not diverging:
            problem = f'no outer step was found in {IDLE_ITERATIONS} iterations in a row'
        elif math.isfinite(pre + post):
            problem = 'the gradient is not finite'
        else:
            problem = 'at least one of them is not finite'
        raise diverged(run, state.iteration, f'in iteration {state.iteration + step + 1} the {quantity} is {pre:.6g} before and {post:.6g} '
                       f'after the inner updates, and {problem}', 'diverged' if diverging else 'stopped')
    state.iteration += len(finite)
    state.skipped += int(np.sum(~finite))
    metrics = np.stack([means[name] for name in (f'pre_{run.metric}', f'post_{run.metric}', *run.source.reported)], axis=1)
    state.unprinted += metrics[finite].tolist()
    if 'gradient_norm' in means:
        state.norms += means['gradient_norm'][finite].tolist()


def is_reported(run: Training, iteration: int) -> bool:
    """Whether a console line follows an iteration; also at the end of pre-training, so that none is about both phases."""
    return iteration % run.source.print_interval == 0 or run.metatrain_iterations > 0 and iteration == run.pretrain_iterations


def report_steps(run: Training, phase: str, state: TrainState, progress: Progress, summaries: Summaries, journal: Journal) -> None:
    """Reports the iterations since the last console line: by such a line, `Iteration 100: <before>, <after>`, by one of metrics.csv, and by
    the norms of their gradients."""
    metrics = np.array(state.unprinted, np.float32).reshape(-1, 2 + len(run.source.reported))
    before, after, *others = metrics.mean(axis=0) if len(metrics) else (math.nan,) * metrics.shape[1]  # nan: all were skipped
    title = f'Pretrain Iteration {state.iteration}' if phase == 'pretrain' else f'Iteration {state.iteration - run.pretrain_iterations}'
    details = ''.join(f', {name} {value:.4g}' for name, value in zip(run.source.reported, others))
    skipped = f'\nSkipped {state.skipped} iterations so far (non-finite loss or gradient)' if state.skipped else ''
    progress.log(f'{title}: {before:.6g}, {after:.6g}{details}{skipped}')
    journal.write(state.iteration, phase, before, after)
    if state.norms:
        summaries.write_norms(state.norms, state.iteration)
    state.unprinted, state.norms = [], []


def reports_validation(run: Training, iteration: int) -> bool:
    """Whether an iteration's validation is reported even if no checkpoint is saved."""
    return iteration % (PRINTS_PER_VALIDATION * run.source.print_interval) == 0


@np.errstate(all='ignore')  # adaptation diverged on some tasks
def validate(run: Training, model: Model, tasks: Tasks, iteration: int, saving: bool, summaries: Summaries,
             progress: Progress) -> tuple[float, float]:
    """The mean metric of validation tasks before and after adaptation. Prints it and writes summaries, with figures when `saving`."""
    updates = usual_updates(run.model.num_updates, run.source.validation_updates)
    metrics = evaluate_tasks(model, tasks, run.validation_tasks if saving else REPORTED_TASKS, updates)
    summaries.write('metaval', metrics, iteration, updates)
    if saving and run.plot and run.log and run.replicas.chief:
        from runtime.results import plots  # imported late: matplotlib is slow to import, and only --plot needs it
        figures = plots.evaluation_figures(run, model, tasks, 'val', {f'model{iteration}': task_metrics(metrics)}, updates, run.method)
        summaries.write_figures('metaval', figures, iteration)
    values = task_metrics(metrics)
    if run.metric == 'accuracy':
        values = np.nan_to_num(values)  # one task on which adaptation diverged counts as wrong, and must not hide the others
    pre, post = values.mean(axis=0)[[0, max(run.model.num_updates, 1)]]
    if run.metric == 'accuracy':  # Reference behaviour: no line in regression
        title = 'Validation results' if reports_validation(run, iteration) else f'Validation of model{iteration}'
        progress.log(f'{title}: {pre:.6g}, {post:.6g}')
    return float(pre), float(post)


def score(run: Training, before: float, after: float) -> float:
    """What ranks a checkpoint, of its metric before and after adaptation. An oracle sees the task, and has nothing to adapt to."""
    return before if run.tasks.baseline == 'oracle' else after


def ranked(run: Training, ranking: list[checkpoints.Score], iteration: int, score: float) -> list[checkpoints.Score]:
    """A ranking with another checkpoint, if its score is finite: the `run.ensemble` best, or as many as there were, best first, of equals
    the earlier."""
    if not math.isfinite(score):
        return ranking
    candidate = checkpoints.Score(iteration=iteration, score=score, tasks=run.validation_tasks)
    sign = -1 if UNITS[run.metric].higher_is_better else 1
    best_first = sorted([*ranking, candidate], key=lambda entry: (sign * entry['score'], entry['iteration']))
    return best_first[:max(run.ensemble, len(ranking))]  # a training that goes on without --ensemble keeps what it has


def meta_batches(tasks: Tasks, run: Training, start: int, steps_per_call: int) -> Iterator[tuple[int, TaskBatch]]:
    """Yields (iteration, TaskBatch [steps, tasks, rows, dim]) from `start` to the end, drawn while others are in use. A block
    ends at a multiple of steps_per_call, at the end of pre-training, of a stage of meta-training, or of the run."""
    def blocks():
        first = start
        while first < run.iterations:
            before = run.pretrain_iterations
            phase_end = before if first < before else min(run.iterations, before + next_change(run.model, first - before))
            end = min((first // steps_per_call + 1) * steps_per_call, phase_end)
            yield range(first, end)
            first = end

    def draw_block(block):
        def share_of(replica):
            batches = [draw(tasks, run, iteration, replica) for iteration in block]
            return tf.nest.map_structure(lambda *arrays: np.stack(arrays), *batches)
        return block.start, run.replicas.distribute(share_of)

    with ThreadPoolExecutor(max_workers=1) as pool:
        futures = (pool.submit(draw_block, block) for block in blocks())
        for future, _following in itertools.pairwise(itertools.chain(futures, [None])):  # the following block is drawn meanwhile
            yield future.result()


def draw(tasks: Tasks, run: Training, iteration: int, replica: int) -> TaskBatch:
    """A replica's tasks of an iteration's meta-batch; or its examples, in the pre-training of a classifier."""
    count = run.meta_batch_size // run.replicas.count
    return (tasks.draw_examples if classifies(run, iteration) else tasks.draw)(iteration * run.meta_batch_size + replica * count, count)
