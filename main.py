"""Model-Agnostic Meta-Learning for regression and few-shot image classification.

Usage:

  10-shot sinusoid:
    python main.py --datasource=sinusoid --logdir=logs/sine/ --metatrain_iterations=70000 --norm=None --update_batch_size=10

  10-shot sinusoid baselines, the oracle and joint pre-training:
    python main.py --datasource=sinusoid --logdir=logs/sine/ --pretrain_iterations=70000 --metatrain_iterations=0 --norm=None --update_batch_size=10 --baseline=oracle
    python main.py --datasource=sinusoid --logdir=logs/sine/ --pretrain_iterations=70000 --metatrain_iterations=0 --norm=None --update_batch_size=10

  5-way, 1-shot Omniglot:
    python main.py --datasource=omniglot --metatrain_iterations=60000 --meta_batch_size=32 --update_batch_size=1 --update_lr=0.4 --num_updates=1 --logdir=logs/omniglot5way/

  20-way, 1-shot Omniglot:
    python main.py --datasource=omniglot --metatrain_iterations=60000 --meta_batch_size=16 --update_batch_size=1 --num_classes=20 --update_lr=0.1 --num_updates=5 --logdir=logs/omniglot20way/

  5-way, 1-shot and 5-shot MiniImagenet:
    python main.py --datasource=miniimagenet --metatrain_iterations=60000 --meta_batch_size=4 --update_batch_size=1 --update_lr=0.01 --num_updates=5 --num_classes=5 --logdir=logs/miniimagenet1shot/ --num_filters=32 --max_pool=True
    python main.py --datasource=miniimagenet --metatrain_iterations=60000 --meta_batch_size=4 --update_batch_size=5 --update_lr=0.01 --num_updates=5 --num_classes=5 --logdir=logs/miniimagenet5shot/ --num_filters=32 --max_pool=True

  5-way, 1-shot CIFAR-FS and FC100:
    python main.py --datasource=cifarfs --metatrain_iterations=60000 --meta_batch_size=4 --update_batch_size=1 --update_lr=0.01 --num_updates=5 --num_classes=5 --logdir=logs/cifarfs1shot/ --num_filters=32 --max_pool=True
    python main.py --datasource=fc100 --metatrain_iterations=60000 --meta_batch_size=4 --update_batch_size=1 --update_lr=0.01 --num_updates=5 --num_classes=5 --logdir=logs/fc1001shot/ --num_filters=32 --max_pool=True

  5-way, 1-shot on your own images:
    python main.py --datasource=folder --data_path=my_images --metatrain_iterations=60000 --meta_batch_size=4 --update_batch_size=1 --update_lr=0.01 --num_updates=5 --num_classes=5 --logdir=logs/my_images/ --num_filters=32 --max_pool=True

  To evaluate, repeat the command with --train=False, and with --test_set=True for meta-test instead of meta-validation.
  All but the sinusoid's data must be prepared first: see README.md.
"""
import collections
import contextlib
import dataclasses
import math
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Optional

import numpy as np
from absl import flags

from data_generator import SOURCES, TaskBatch, TaskConfig, UserError
from reports import Progress, Summaries, table, write_results

# TensorFlow takes seconds to import, so the modules that need it are imported by main() once the flags are checked.

SUMMARY_INTERVAL, SAVE_INTERVAL = 100, 1000
PRINTS_PER_VALIDATION = 5
VALIDATION_TASKS, TEST_TASKS, TEST_UPDATES = 100, 600, 10

FLAGS = flags.FLAGS
# Data
flags.DEFINE_enum('datasource', 'sinusoid', list(SOURCES), 'where tasks come from')
flags.DEFINE_integer('num_classes', 5, 'way N: classes per task (without meaning for sinusoid)', lower_bound=1)
flags.DEFINE_string('baseline', None, "'oracle': append each task's amplitude and phase to the input and train jointly "
                    'instead of meta-training (sinusoid only)')
flags.DEFINE_string('data_path', None, "folder of the images, if not the one under data/; for --datasource=folder your own, "
                    'with folders train, val and test, each with one folder of images per class, or just the latter')
flags.DEFINE_integer('image_size', 84, 'pixels to which your own images are resized, in height and width '
                     '(--datasource=folder)', lower_bound=1)
flags.DEFINE_enum('image_channels', '3', ['1', '3'], '1: your own images are made grey; 3: RGB (--datasource=folder)')
flags.DEFINE_bool('rotations', False, "rotate each class of each task by a random multiple of 90 degrees, as Omniglot's are "
                  '(--datasource=folder)')
flags.DEFINE_string('split', '64/16/20', 'proportions by which class folders are split into train/val/test, where they are '
                    'not yet; the result is written to splits.csv among them (--datasource=folder)')
flags.DEFINE_integer('test_query', -1, 'query examples per class in evaluation; -1: as many as --update_batch_size',
                     lower_bound=-1)
flags.DEFINE_integer('seed', 0, 'fixes everything random: the initial weights and the tasks of every iteration',
                     lower_bound=0, upper_bound=2 ** 31 - 1)
# Training
flags.DEFINE_integer('pretrain_iterations', 0, 'iterations of joint training (on the loss before any inner update), '
                     'before meta-training', lower_bound=0)
flags.DEFINE_integer('metatrain_iterations', 15000, 'meta-updates', lower_bound=0)
flags.DEFINE_integer('meta_batch_size', 25, 'tasks per meta-update', lower_bound=1)
flags.DEFINE_float('meta_lr', 0.001, 'step size of Adam in the outer loop', lower_bound=0)
flags.DEFINE_integer('update_batch_size', 5, 'shot K: support examples per class (in all, for sinusoid)', lower_bound=1)
flags.DEFINE_float('update_lr', 1e-3, 'step size alpha of the inner gradient descent', lower_bound=0)
flags.DEFINE_integer('num_updates', 1, 'inner updates during training', lower_bound=1)
# Model
flags.DEFINE_enum('norm', 'batch_norm', ['batch_norm', 'layer_norm', 'None'], 'normalisation of the hidden layers')
flags.DEFINE_integer('num_filters', 64, 'filters of each convolution (the paper has 32 for miniImagenet)', lower_bound=1)
flags.DEFINE_bool('conv', True, 'convolutional network for images; False: fully connected, 256-128-64-64')
flags.DEFINE_bool('max_pool', False, 'convolutions of stride 1 and 2x2 max pooling; False: convolutions of stride 2')
flags.DEFINE_bool('stop_grad', False, 'first-order MAML: treat the inner gradient as a constant')
# Computing: these change the numbers by rounding only
flags.DEFINE_enum('engine', 'auto', ['auto', 'tasks', 'wide'], "'tasks': one task per core, at once as many as there are cores; "
                  "'wide': all tasks in one graph; auto: wide for fully connected networks and on a GPU, else tasks")
flags.DEFINE_integer('task_chunk', 0, 'tasks of a meta-batch to compute at a time, to save memory: a divisor of '
                     '--meta_batch_size; 0: all', lower_bound=0)
# Logging, saving, evaluating
flags.DEFINE_bool('log', True, 'write summaries for TensorBoard')
flags.DEFINE_string('logdir', '/tmp/data', 'folder in which each experiment gets a directory of its own')
flags.DEFINE_bool('resume', True, 'go on from the newest checkpoint, if there is one')
flags.DEFINE_bool('train', True, 'train; False: evaluate')
flags.DEFINE_string('load_from', None, "prefix of a checkpoint, of this program's or of the reference's, whose weights are "
                    'evaluated, or from which training starts if there is nothing to resume')
flags.DEFINE_integer('test_iter', -1, 'iteration of the checkpoint to load; -1: the newest', lower_bound=-1)
flags.DEFINE_bool('test_best', False, 'evaluate the checkpoint that did best on meta-validation')
flags.DEFINE_bool('test_set', False, 'evaluate on meta-test; False: on meta-validation')
flags.DEFINE_integer('train_update_batch_size', -1, 'K that the model was trained with, if not --update_batch_size')
flags.DEFINE_float('train_update_lr', -1, 'alpha that the model was trained with, if not --update_lr')
flags.DEFINE_bool('help', False, 'print this text', short_name='h')


@dataclasses.dataclass(frozen=True)
class Run:
    """What the command line asks for, sentinels resolved. Fields are named like the flags."""
    datasource: str
    source: object              # the entry of SOURCES
    tasks: TaskConfig
    model: object               # maml.ModelConfig
    directory: str              # the experiment directory
    pretrain_iterations: int
    metatrain_iterations: int
    meta_batch_size: int
    resume: bool
    log: bool
    train: bool
    checkpoint: object          # what to load: an iteration, checkpoints.BEST, or None for the newest
    load_from: Optional[str]    # prefix of a checkpoint elsewhere
    split: str                  # what to evaluate: 'val' | 'test'

    @property
    def iterations(self):
        return self.pretrain_iterations + self.metatrain_iterations

    @property
    def score(self):
        """What is reported: accuracies in classification, losses in regression."""
        return 'accuracy' if self.model.loss == 'xent' else 'loss'

    @property
    def description(self):
        way = f'{self.tasks.num_classes}-way ' if self.model.loss == 'xent' else ''
        return f'{way}{self.tasks.update_batch_size}-shot {self.datasource}'

    @property
    def identity(self):
        """What a checkpoint must agree on to belong to this run."""
        identity = {'datasource': self.datasource, 'regime': 'metatrain' if self.metatrain_iterations else 'pretrain'}
        return {**identity, 'seed': self.tasks.seed} if self.train else identity


def check_flags(values):
    """Refuses combinations that make no sense.

    Raises:
        UserError: says which flag, why, and what to write.
    """
    def refuse(condition, message):
        if condition:
            raise UserError(message)

    source = SOURCES[values.datasource]
    images = source.image_shape is not None
    refuse(values.baseline not in (None, 'None', 'oracle'), f"--baseline={values.baseline}: the only baseline is 'oracle'")
    refuse(values.baseline == 'oracle' and images,
           f'--baseline=oracle needs the amplitude and phase of a sinusoid, which {values.datasource} does not have')
    refuse(values.data_path is not None and not images,
           f'--data_path is a folder of images, but {values.datasource} has no data on disk')
    own = images and source.folder is None
    refuse(own and not values.data_path,
           f'--datasource={values.datasource} needs --data_path, the folder of your images')
    for name in ('image_size', 'image_channels', 'rotations', 'split'):
        refuse(not own and values[name].present, f'--{name} is for --datasource=folder')
    refuse(not re.fullmatch(r'[1-9]\d*/[1-9]\d*/[1-9]\d*', values.split),
           f'--split={values.split} must be three positive whole numbers like 64/16/20')
    refuse(own and values.max_pool and values.conv and values.image_size < 16,
           f'--image_size={values.image_size}: four times 2x2 pooling needs at least 16')
    refuse(values.task_chunk and values.meta_batch_size % values.task_chunk,
           f'--task_chunk={values.task_chunk} must divide --meta_batch_size={values.meta_batch_size}')
    refuse(values.test_query == 0, '--test_query must be at least 1')
    refuse(images and values.num_classes < 2, f'--num_classes={values.num_classes}: a task needs at least 2 classes')
    for name in ('meta_lr', 'update_lr', 'train_update_lr'):
        refuse(not math.isfinite(getattr(values, name)), f'--{name} must be a finite number')
    refuse(values.train_update_batch_size == 0, '--train_update_batch_size must be at least 1')
    refuse(values.train_update_lr < 0 and values.train_update_lr != -1, '--train_update_lr must not be negative')
    refuse(values.train and values.pretrain_iterations + values.metatrain_iterations == 0,
           'there is nothing to train: --pretrain_iterations and --metatrain_iterations are both 0')
    refuse(values.test_best and values.train, '--test_best is for evaluation: add --train=False')
    checkpoints = [name for name in ('test_best', 'test_iter', 'load_from') if values[name].present]
    refuse(len(checkpoints) > 1, f'--{" and --".join(checkpoints)} name different checkpoints: give one')


def data_from_flags(values):
    """Turns flags into the source, an entry of SOURCES, and a TaskConfig."""
    source = SOURCES[values.datasource]
    if source.image_shape and source.folder is None:
        source = dataclasses.replace(
            source, image_shape=(values.image_size, values.image_size, int(values.image_channels)),
            rotations=values.rotations, shares=tuple(map(int, values.split.split('/'))))
    asked = -1 if values.train else values.test_query
    return source, TaskConfig(
        num_classes=values.num_classes,
        update_batch_size=values.update_batch_size,
        query_shots=source.query_shots(values.update_batch_size, values.train) if asked == -1 else asked,
        seed=values.seed,
        baseline='oracle' if values.baseline == 'oracle' else None,
        data_path=values.data_path)


def config_from_flags(values, source, tasks):
    """Turns flags into a Run on the data that `data_from_flags` made of them."""
    from checkpoints import BEST
    from maml import ModelConfig

    pretrain_iterations, metatrain_iterations = values.pretrain_iterations, values.metatrain_iterations
    if tasks.baseline == 'oracle':
        # Reference behaviour: the oracle is trained jointly, also for the iterations asked for as meta-training.
        pretrain_iterations, metatrain_iterations = pretrain_iterations + metatrain_iterations, 0
    model = ModelConfig(
        dim_input=source.dim_input(tasks),
        dim_output=source.dim_output(tasks),
        loss=source.loss,
        update_batch_size=values.update_batch_size,
        update_lr=values.update_lr,
        num_updates=values.num_updates,
        meta_lr=values.meta_lr,
        norm=values.norm,
        image_shape=source.image_shape if values.conv else None,
        dim_hidden=source.dim_hidden,
        num_filters=values.num_filters,
        max_pool=values.max_pool,
        head=source.head,
        stop_grad=values.stop_grad,
        clip=source.clip,
        engine=values.engine,
        task_chunk=values.task_chunk or None)
    name = experiment_name(values, pretrain_only=pretrain_iterations > 0 and metatrain_iterations == 0)
    return Run(
        datasource=values.datasource, source=source, tasks=tasks, model=model,
        directory=os.path.join(values.logdir, name),
        pretrain_iterations=pretrain_iterations, metatrain_iterations=metatrain_iterations,
        meta_batch_size=values.meta_batch_size, resume=values.resume, log=values.log, train=values.train,
        checkpoint=BEST if values.test_best else None if values.test_iter == -1 else values.test_iter,
        load_from=values.load_from,
        split='test' if values.test_set else 'val')


def experiment_name(values, pretrain_only):
    """The experiment directory's name, which states the hyper-parameters as the reference's does."""
    shot = values.update_batch_size if values.train_update_batch_size == -1 else values.train_update_batch_size
    rate = values.update_lr if values.train_update_lr == -1 else values.train_update_lr
    oracle = values.baseline == 'oracle'
    return ''.join([
        f'cls_{values.num_classes}.mbs_{values.meta_batch_size}.ubs_{shot}.numstep{values.num_updates}.updatelr{rate}',
        f'hidden{values.num_filters}' if values.num_filters != 64 else '',
        'maxpool' if values.max_pool else '',
        'stopgrad' if values.stop_grad else '',
        'oracle' if oracle else '',
        {'batch_norm': 'batchnorm', 'layer_norm': 'layernorm', 'None': 'nonorm'}[values.norm],
        # Not in the reference, where this baseline finds and resumes MAML's checkpoint.
        'pretrain' if pretrain_only and not oracle else ''])


# Training -----------------------------------------------------------------------------------------------------------

def train(run, data):
    """Trains from fresh weights, or from where a checkpoint left off, to the last iteration.

    Iteration i draws meta-batch i; the checkpoint `model<i>` is written after i iterations.

    Args:
        data: {split: tasks}, for train and val.
    """
    import checkpoints
    from maml import MAML

    model = MAML(run.model, run.tasks.seed)
    start, best = 0, None
    if run.resume and (run.checkpoint is not None or checkpoints.iterations(run.directory)):
        prefix = find_checkpoint(run)
        record = checkpoints.restore(prefix, model.state(), run.identity)
        start, best = record['iteration'], record['best']
        print(f'Going on from {prefix}')
    elif run.load_from:
        checkpoints.load_weights(run.load_from, {**model.weights, **model.norm_params})
        print(f'Starting from the weights of {run.load_from}')
    if start >= run.iterations:
        print(f'Nothing to do: {start} of {run.iterations} iterations are trained. To evaluate, add --train=False.')
        return
    prepare_directory(run.directory, start)
    print(f'Training {run.description} for {run.iterations} iterations in {run.directory}')

    prints, window = run.source.print_interval, []
    with Progress(start, run.iterations) as progress, Summaries(run.directory, run.log) as summaries:
        for first, batches in meta_batches(data['train'], run, start, model.steps_per_call):
            if run.log and due(first, SUMMARY_INTERVAL):
                first_batch = TaskBatch(*(array[0] for array in batches))
                summaries.write('metatrain', model.evaluate(first_batch, run.model.num_updates), first)

            phase = 'pretrain' if first < run.pretrain_iterations else 'metatrain'
            means = model.train_steps(phase, batches)
            window.append(np.stack([means[f'pre_{run.score}'], means[f'post_{run.score}']], axis=1))
            iteration = first + len(window[-1])
            progress.update(len(window[-1]))
            check_finite(run, means, iteration)

            validating = due(iteration, PRINTS_PER_VALIDATION * prints)
            saving = due(iteration, SAVE_INTERVAL) or iteration == run.iterations
            if due(iteration, prints):
                progress.say(console_line(run, phase, iteration, np.concatenate(window)))
                window = []
            if validating or saving:
                validation = evaluate_tasks(model, data['val'], VALIDATION_TASKS,
                                            max(run.model.num_updates, run.source.validation_updates))
                summaries.write('metaval', validation, iteration)
                pre, post = task_scores(validation).mean(axis=0)[[0, run.model.num_updates]]
            if validating and run.score == 'accuracy':
                progress.say(f'Validation results: {pre:.6g}, {post:.6g}')
            if saving:
                best = save_checkpoints(run, model, iteration, post, best)
    print(f'The last checkpoint is {checkpoints.path(run.directory, run.iterations)}')


def due(iteration, interval):
    return iteration % interval == 0


def check_finite(run, means, iteration):
    """Stops a run whose losses are no longer numbers: its weights would be worthless, and must not be saved."""
    if not np.all(np.isfinite([means['pre_loss'], means['post_loss']])):
        raise UserError(f'training diverged: the loss is no longer a number (at iteration {iteration} or shortly before); '
                        f'lower --update_lr or --meta_lr. Earlier checkpoints, if any, are in {run.directory}')


def console_line(run, phase, iteration, scores):
    """`Iteration 100: <pre>, <post>`, means of the scores [iterations, 2] since the last such line."""
    pre, post = scores.mean(axis=0)
    if phase == 'pretrain':
        return f'Pretrain Iteration {iteration}: {pre:.6g}, {post:.6g}'
    return f'Iteration {iteration - run.pretrain_iterations}: {pre:.6g}, {post:.6g}'


def save_checkpoints(run, model, iteration, score, best):
    """Saves the newest checkpoint, and the best one if this is it.

    Args:
        score: on meta-validation after `num_updates` updates: accuracy (more is better) or loss (less is).
        best: the best so far, {'iteration', 'score'}, or None.

    Returns:
        The best including this one.
    """
    import checkpoints

    better = best is None or (score > best['score'] if run.score == 'accuracy' else score < best['score'])
    best = {'iteration': iteration, 'score': float(score)} if better else best
    record = {**run.identity, 'iteration': iteration, 'best': best, 'model': dataclasses.asdict(run.model)}
    for name in (iteration, checkpoints.BEST) if better else (iteration,):
        checkpoints.save(checkpoints.path(run.directory, name), model.state(), record)
    checkpoints.prune(run.directory)
    return best


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

    def draw(block):
        first, steps = block
        batch = tasks.draw(first * run.meta_batch_size, steps * run.meta_batch_size)
        return first, TaskBatch(*(array.reshape(steps, run.meta_batch_size, *array.shape[1:]) for array in batch))

    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = collections.deque()
        for block in blocks():
            ahead.append(pool.submit(draw, block))
            if len(ahead) == 2:
                yield ahead.popleft().result()
        yield ahead.popleft().result()


def prepare_directory(directory, start):
    """Makes the experiment directory; moves checkpoints later than `start`, which are about to be redone, out of the way.

    Raises:
        UserError: it cannot be written to.
    """
    import checkpoints

    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        moved = checkpoints.move_aside(directory, start)
    except OSError as error:
        raise UserError(f'the experiment directory {directory} cannot be written to: {error.strerror}; choose another '
                        '--logdir') from error
    if moved:
        print(f'Earlier checkpoints were moved to {moved}')


def find_checkpoint(run):
    """The prefix of the checkpoint that the flags ask for.

    Raises:
        UserError: there is none; says where it was looked for and what is there.
    """
    import checkpoints

    saved = checkpoints.names(run.directory)
    wanted = run.checkpoint if run.checkpoint is not None else max((n for n in saved if n != checkpoints.BEST), default=None)
    if wanted in saved:
        return checkpoints.path(run.directory, wanted)
    what = 'checkpoint' if wanted is None else f'checkpoint {os.path.basename(checkpoints.path("", wanted))}'
    if saved:
        there = 'there are ' + ', '.join(os.path.basename(checkpoints.path('', name)) for name in saved)
    else:
        logdir = os.path.dirname(run.directory)
        others = sorted(os.listdir(logdir)) if os.path.isdir(logdir) else []
        there = f'{logdir} holds ' + (', '.join(others) if others else 'nothing')
    raise UserError(f'there is no {what} in {run.directory}; {there}. Train first, or give the flags of the training run')


# Evaluation ---------------------------------------------------------------------------------------------------------

def evaluate(run, data):
    """Evaluates a checkpoint on 600 tasks of data[run.split]; prints a table, writes the reference's csv and pickle files."""
    import checkpoints
    from maml import MAML

    model = MAML(run.model)
    output = os.path.join(run.directory, f'test_ubs{run.model.update_batch_size}_stepsize{run.model.update_lr}')
    if run.tasks.query_shots != run.source.query_shots(run.model.update_batch_size, train=False):
        output += f'_query{run.tasks.query_shots}'
    if run.load_from:
        prefix, trained = run.load_from, 'weights of another run'
        checkpoints.load_weights(prefix, {**model.weights, **model.norm_params})
        output += f'_{os.path.basename(prefix)}'
    else:
        prefix = find_checkpoint(run)
        trained = f'{checkpoints.restore(prefix, model.state(), run.identity)["iteration"]} iterations'
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
    numbers_per_task = sum(array.size for array in tasks.draw(0, 1)) + sum(math.prod(v.shape) for v in model.weights.values())
    largest = min(max(2 ** 24 // numbers_per_task, 1), model.config.task_chunk or count)  # 64 MiB of float32
    size = max(size for size in range(1, largest + 1) if count % size == 0)
    parts = [model.evaluate(tasks.draw(start, size), num_updates) for start in range(0, count, size)]
    return type(parts[0])(*(None if part[0] is None else np.concatenate(part, axis=-1) for part in zip(*parts)))


def task_scores(metrics):
    """What is reported, per task: [tasks, 1 + updates], support rows before adaptation, then query rows after each update."""
    pre, post = ((metrics.pre_loss, metrics.post_losses) if metrics.pre_accuracy is None else
                 (metrics.pre_accuracy, metrics.post_accuracies))
    return np.concatenate([pre[None], post]).T


# The program --------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def quiet():
    """Keeps what C++ code writes to the standard error from the console, unless the block fails."""
    sys.stderr.flush()
    console = os.dup(2)
    with tempfile.TemporaryFile() as hidden:
        os.dup2(hidden.fileno(), 2)
        try:
            yield
        except BaseException:
            hidden.seek(0)
            os.write(console, hidden.read())
            raise
        finally:
            os.dup2(console, 2)
            os.close(console)


def import_tensorflow():
    """Imports TensorFlow set up for one task per core: kernels single-threaded, as many at a time as there are cores.

    Its notices (on processor features, on GPUs that are not there, on XLA) are silenced. They come while it is imported, while
    it looks for devices and when XLA first compiles, and before its log levels are obeyed, so all that is done at once here.
    With TF_CPP_MIN_LOG_LEVEL set in the environment, nothing is silenced but what that asks for.
    """
    silent = 'TF_CPP_MIN_LOG_LEVEL' not in os.environ
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    with quiet() if silent else contextlib.nullcontext():
        import tensorflow as tf
        if silent:
            tf.get_logger().setLevel('ERROR')  # It warns of functions traced for many shapes, which is what they are for.
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(os.cpu_count())
        tf.function(tf.identity, jit_compile=True)(0.0)


def run_from_command_line(argv):
    """The Run that a command line asks for and {split: tasks} of its data; None where that is help, which is printed.

    Raises:
        UserError, flags.Error: the flags or the data are not as they should be.
    """
    rest = FLAGS(argv)[1:]
    if FLAGS.help:
        print(__doc__ + '\nFlags:\n' + FLAGS.main_module_help())
        return None
    if rest:
        raise UserError(f'{rest[0]!r} is not a flag; write --name=value')
    check_flags(FLAGS)
    # The data first: what is wrong with them is said before anybody has waited for TensorFlow.
    source, tasks = data_from_flags(FLAGS)
    splits = ['train', 'val'] if FLAGS.train else ['test' if FLAGS.test_set else 'val']
    data = {split: source.tasks(tasks, split) for split in splits}
    import_tensorflow()
    return config_from_flags(FLAGS, source, tasks), data


def main(argv):
    asked = run_from_command_line(argv)
    if asked:
        run, data = asked
        (train if run.train else evaluate)(run, data)


if __name__ == '__main__':
    try:
        main(sys.argv)
    except (UserError, flags.Error) as error:
        sys.exit(f'main.py: {error}')
    except MemoryError as error:
        sys.exit(f'main.py: there is not enough memory for what the flags ask for ({error})')
    except KeyboardInterrupt:
        print('Interrupted. The same command goes on from the newest checkpoint.', file=sys.stderr)
        sys.exit(130)
