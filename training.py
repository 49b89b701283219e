"""The training loop: meta-batches in; console lines, summaries and checkpoints out; nothing lost when it is interrupted."""
import collections
import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Optional

import numpy as np

import checkpoints
from data_generator import TaskBatch, UserError
from evaluation import evaluate_tasks, task_scores
from maml import MAML
from reports import Progress, Summaries, summary

SUMMARY_INTERVAL = 100
PRINTS_PER_VALIDATION = 5
VALIDATION_TASKS = 100
RETRY_SECONDS = 30  # between attempts to save where saving fails


@dataclasses.dataclass
class Position:
    """Where a run stands. With the model's variables, all that it needs to go on as if it had never been interrupted."""
    iteration: int = 0              # iterations that are done
    best: Optional[dict] = None     # {'iteration', 'score'} of the checkpoint that did best on meta-validation
    unprinted: list = dataclasses.field(default_factory=list)  # [pre, post] of each iteration since the last console line
    skipped: int = 0                # iterations that changed nothing, their losses or gradients not being numbers


def train(run, data):
    """Trains from fresh weights, or from where a checkpoint left off, to the last iteration.

    Iteration i draws meta-batch i; the checkpoint `model<i>` is written after i iterations. The first SIGINT or SIGTERM ends
    the run after the iteration in hand, with a checkpoint.

    Args:
        run: a main.Run.
        data: {split: tasks}, for train and val.

    Raises:
        UserError: training diverged, another process trains in the directory, or it holds checkpoints of another run.
        SystemExit: with 128 + the signal's number, after an interruption.
    """
    replicas = run.replicas
    with checkpoints.exclusive(run.directory) if replicas.chief else contextlib.nullcontext():
        model = MAML(run.model, run.tasks.seed, replicas)
        fingerprints = {split: tasks.fingerprint for split, tasks in data.items()}
        # Workers look into the directory once the chief has tidied it up, which it has when it comes here.
        replicas.check_alike((run.shared_flags, fingerprints))
        position = start(run, model, fingerprints)
        replicas.check_alike(position, model.state().values())
        if position.iteration >= run.iterations:
            print(f'Nothing to do: {position.iteration} of {run.iterations} iterations are trained. '
                  'To evaluate, add --train=False.')
            return
        moved = checkpoints.move_aside(run.directory, position.iteration) if replicas.chief else None
        if moved:
            print(f'Later checkpoints were moved to {moved}')
        print(summary(run, data, model))
        with Interruption() as interruption, Progress(position.iteration, run.iterations, replicas.chief) as progress, \
                Summaries(run.directory, run.log and replicas.chief, position.iteration, progress.say) as summaries:
            if position.iteration == 0:
                summaries.write_flags(run.flags)
            saver = Saver(run, model, fingerprints, position.iteration, progress.say)
            loop(run, data, model, position, interruption, progress, summaries, saver)
        newest = checkpoints.path(run.directory, saver.iteration)
        if interruption.signal and saver.iteration < run.iterations:
            back = '' if run.resume and run.checkpoint is None else ' without --resume=False and --test_iter'
            further = (f'the newest checkpoint is {newest}. The same command{back} goes on from there' if saver.iteration else
                       'nothing is saved')
            with contextlib.suppress(OSError):  # a terminal that is gone
                # Whether it is saved, the chief knows.
                further = further if replicas.chief else 'see the first worker'
                print(f'Stopped by {signal.Signals(interruption.signal).name} after iteration {position.iteration}; {further}.',
                      file=sys.stderr, flush=True)
            sys.exit(128 + interruption.signal)
        print(f'The last checkpoint is {newest}')


def start(run, model, fingerprints):
    """Restores a checkpoint, or loads the weights to start from, if there are any; returns the Position."""
    if run.resume and (run.checkpoint is not None or checkpoints.iterations(run.directory)):
        checkpoint = checkpoints.find(run.directory, run.checkpoint)
        iteration = checkpoint.record['iteration']
        pretrained = {'pretrain_iterations': min(iteration, run.pretrain_iterations)}
        there = {**checkpoint.record['flags'],
                 'pretrain_iterations': min(iteration, checkpoint.record['pretrain_iterations'])}
        checkpoints.check_flags(checkpoint.prefix, there, {**run.flags, **pretrained},
                                'give the flags of its training, or start anew by --resume=False or in another --logdir')
        other = [split for split, known in checkpoint.record['data'].items() if fingerprints[split] != known]
        if other:
            raise UserError(f'the images of the {" and ".join(other)} split are not those that the checkpoint '
                            f'{checkpoint.prefix} was trained on; bring them back, or start anew by --resume=False or in '
                            'another --logdir')
        checkpoints.restore(checkpoint, model.state())
        print(f'Going on from {checkpoint.prefix}')
        return Position(**{field.name: checkpoint.record[field.name] for field in dataclasses.fields(Position)})
    if run.load_from:
        checkpoints.load_weights(run.load_from, {**model.weights, **model.norm_params}, run.network_flags)
        print(f'Starting from the weights of {run.load_from}')
    return Position()


def loop(run, data, model, position, interruption, progress, summaries, saver):
    """Trains from `position` on, which moves along, to the end or until interrupted, and saves what was reached."""
    prints = run.source.print_interval
    # Steps are made some at a time, as many as fall between savings.
    steps_per_call = math.gcd(model.steps_per_call, run.save_interval)
    for first, batches in meta_batches(data['train'], run, position.iteration, steps_per_call):
        if run.log and due(first, SUMMARY_INTERVAL):
            first_batch = run.replicas.each(lambda replica: draw(data['train'], run, first, replica))
            summaries.write('metatrain', model.evaluate(first_batch, run.model.num_updates), first)

        phase = 'pretrain' if first < run.pretrain_iterations else 'metatrain'
        means = model.train_steps(phase, batches, interruption.signal is not None)
        means = {name: values.numpy() for name, values in means.items()}
        if means['stopping'].any():
            interruption.agree()
        check_finite(run, means, first)
        iteration = position.iteration = first + len(means['finite'])
        position.skipped += int(np.sum(~means['finite']))
        scores = np.stack([means[f'pre_{run.score}'], means[f'post_{run.score}']], axis=1)
        position.unprinted += scores[means['finite']].tolist()
        progress.advance(iteration - first, run.meta_batch_size, position.unprinted)

        if due(iteration, prints):
            progress.say(console_line(run, phase, position))
            position.unprinted = []
        validating = due(iteration, PRINTS_PER_VALIDATION * prints)
        saving, best = due(iteration, run.save_interval) or iteration == run.iterations, position.best
        if validating or saving:
            validation = evaluate_tasks(model, data['val'], VALIDATION_TASKS,
                                        max(run.model.num_updates, run.source.validation_updates))
            summaries.write('metaval', validation, iteration)
            values = task_scores(validation)
            pre, post = values.mean(axis=0)[[0, run.model.num_updates]]
        if saving and run.plot and run.log and run.replicas.chief:
            import pictures  # here, for it takes a moment that most runs need not wait
            summaries.write_figures('metaval', pictures.of_model(run, model, data['val'], values), iteration)
        if validating and run.score == 'accuracy':
            progress.say(f'Validation results: {pre:.6g}, {post:.6g}')
        if saving:
            best = better(run, best, {'iteration': iteration, 'score': float(post)})
        stopping = interruption.agreed if run.replicas.workers > 1 else interruption.signal
        if saver.wanted(saving) or stopping:
            summaries.flush()  # so that what a checkpoint has seen is in the summaries, whatever comes after
            if saver.save(dataclasses.replace(position, best=best)):
                position.best = best
        if stopping:
            return
    while saver.iteration < position.iteration and not interruption.signal:
        time.sleep(1)
        if saver.wanted(True):
            saver.save(dataclasses.replace(position, best=best))


def due(iteration, interval):
    return iteration % interval == 0


def check_finite(run, means, first):
    """Stops a run at a loss or gradient that is no number, unless --skip_nonfinite is given.

    Args:
        means: what steps `first`, first + 1 and so on returned.

    Raises:
        UserError: says where and what, which checkpoint is the last, and what may help.
    """
    if run.skip_nonfinite or np.all(means['finite']):
        return
    step = int(np.argmin(means['finite']))
    pre, post = means['pre_loss'][step], means['post_loss'][step]
    what = 'the gradient is' if math.isfinite(pre + post) else 'these are'
    raise diverged(run, f'in iteration {first + step + 1} the loss is {pre:.6g} before and {post:.6g} after the inner '
                   f'updates, and {what} not finite')


def diverged(run, what):
    saved = checkpoints.iterations(run.directory)
    newest = f'the last checkpoint is {checkpoints.path(run.directory, saved[-1])}' if saved else 'nothing was saved yet'
    return UserError(f'training diverged: {what}; {newest}. Lower --update_lr or --meta_lr'
                     + ('' if run.skip_nonfinite else ', or pass over such iterations by --skip_nonfinite'))


def console_line(run, phase, position):
    """`Iteration 100: <pre>, <post>`, means of the scores [iterations, 2] since the last such line."""
    scores = np.array(position.unprinted, np.float32).reshape(-1, 2)
    pre, post = scores.mean(axis=0) if len(scores) else (math.nan, math.nan)
    line = (f'Pretrain Iteration {position.iteration}' if phase == 'pretrain' else
            f'Iteration {position.iteration - run.pretrain_iterations}') + f': {pre:.6g}, {post:.6g}'
    return line + (f'\nIterations passed over so far, without a finite loss and gradient: {position.skipped}'
                   if position.skipped else '')


def better(run, best, candidate):
    """The better one of two {'iteration', 'score'} by accuracy (more is better) or loss (less is); the first may be None.

    A score that is not a number is no candidate.
    """
    sign = 1 if run.score == 'accuracy' else -1
    if not math.isfinite(candidate['score']) or best and not sign * candidate['score'] > sign * best['score']:
        return best
    return candidate


def meta_batches(tasks, run, start, steps_per_call):
    """Yields (iteration, TaskBatch [steps, tasks, rows, dim]) from `start` to the end, drawn while others are in use.

    Steps end where a multiple of steps_per_call, the end of pre-training, or the end of the run is reached.
    """
    def blocks():
        first = start
        while first < run.iterations:
            phase_end = run.pretrain_iterations if first < run.pretrain_iterations else run.iterations
            end = min((first // steps_per_call + 1) * steps_per_call, phase_end)
            yield first, end - first
            first = end

    def draw_block(first, steps):
        def of(replica):
            batches = [draw(tasks, run, iteration, replica) for iteration in range(first, first + steps)]
            return TaskBatch(*map(np.stack, zip(*batches)))
        return first, run.replicas.each(of)

    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = collections.deque()
        for block in blocks():
            ahead.append(pool.submit(draw_block, *block))
            if len(ahead) == 2:
                yield ahead.popleft().result()
        yield ahead.popleft().result()


def draw(tasks, run, iteration, replica):
    """A replica's tasks of an iteration's meta-batch, as a TaskBatch."""
    share = run.meta_batch_size // run.replicas.count
    return tasks.draw(iteration * run.meta_batch_size + replica * share, share)


class Saver:
    """Saves a run's checkpoints. Where that fails (a full disk, say) it says so, and wants to be asked again a while later.

    Attributes:
        iteration: of the newest checkpoint; 0: there is none.
    """

    def __init__(self, run, model, fingerprints, iteration, say):
        """
        Args:
            fingerprints: {split: number} of the data.
            iteration: of the checkpoint from which the run goes on; 0: of none.
            say: function that shows the user a line.
        """
        self.iteration, self._run, self._model, self._say, self._data = iteration, run, model, say, fingerprints
        self._failed_at = None

    def wanted(self, saving):
        """Whether to save now, where it would be time to (`saving`) or not."""
        return saving if self._failed_at is None else time.monotonic() - self._failed_at > RETRY_SECONDS

    def save(self, position):
        """Saves the model and where the run stands; returns whether that worked.

        Raises:
            UserError: weights are no numbers.
        """
        run, state = self._run, self._model.state()
        broken = [name for name, variable in state.items() if not np.all(np.isfinite(variable.numpy()))]
        if broken:
            raise diverged(run, f'after iteration {position.iteration} {broken[0]} holds what is not a number')
        if position.iteration == self.iteration:
            return True
        if not run.replicas.chief:
            self.iteration = position.iteration
            return True
        prefix = checkpoints.path(run.directory, position.iteration)
        record = {**dataclasses.asdict(position), 'flags': run.flags, 'regime': run.regime,
                  'pretrain_iterations': run.pretrain_iterations, 'data': self._data}
        try:
            checkpoints.save(prefix, state, record)
        except OSError as error:
            self._failed_at = time.monotonic()
            self._say(f'Saving {prefix} failed ({error}). The program goes on, and tries again every {RETRY_SECONDS} s')
            return False
        if self._failed_at is not None:
            self._say(f'Saving works again: {prefix}')
        self.iteration, self._failed_at = position.iteration, None
        with contextlib.suppress(OSError):  # next time, then
            checkpoints.prune(run.directory, position.best and position.best['iteration'])
        return True


class Interruption:
    """While entered, the first SIGINT or SIGTERM is noted down in `signal`, and the second ends the process at once.

    Signals that are ignored stay so (those of a process in the background of a script, say).
    """

    def __init__(self):
        self.signal, self.agreed = None, False

    def agree(self):
        """Notes down that some worker was interrupted; all of them are told after the same iteration."""
        self.agreed, self.signal = True, self.signal or signal.SIGTERM

    def __enter__(self):
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._handle(self._note)
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, handler):
        for number, before in self._before.items():
            if before != signal.SIG_IGN:
                signal.signal(number, handler)

    def _note(self, number, frame):
        self.signal = number
        self._handle(signal.SIG_DFL)
        with contextlib.suppress(OSError):  # a terminal that is gone
            os.write(2, b'\nFinishing the iteration in hand and saving it; a second signal ends the program at once.\n')
