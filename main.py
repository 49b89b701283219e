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
  To classify your own images, repeat the command with --predict, --support_dir=DIR and --query_dir=DIR.
  All but the sinusoid's data must be prepared first: see README.md.
"""
import contextlib
import dataclasses
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
from typing import Optional

from absl import flags

import distribution
from data_generator import SOURCES, TaskConfig, UserError, first_line

# TensorFlow takes seconds to import, so the modules that need it are imported by main() once the flags are checked.

# With the network's, the flags that determine what is learnt; a run can only be resumed with the same.
TRAINING_FLAGS = ('datasource', 'rotations', 'seed', 'meta_batch_size', 'meta_lr', 'update_batch_size', 'update_lr',
                  'num_updates', 'stop_grad')

FLAGS = flags.FLAGS
ABSL_FLAGS = set(FLAGS)


def define_number(name, default, text, at_least):
    """A flag that takes a whole number."""
    flags.DEFINE_integer(name, default, text, lower_bound=at_least, upper_bound=2 ** 31 - 1)


GROUPS = {}  # {title: names of flags}, for the help


def group(title):
    """Puts the flags defined since the last such line under a title."""
    GROUPS[title] = [name for name in FLAGS if name not in ABSL_FLAGS.union(*GROUPS.values())]


flags.DEFINE_enum('datasource', 'sinusoid', list(SOURCES), 'where tasks come from')
define_number('num_classes', 5, 'way N: classes per task (without meaning for sinusoid)', at_least=1)
flags.DEFINE_string('baseline', None, "'oracle': append each task's amplitude and phase to the input and train jointly "
                    'instead of meta-training (sinusoid only)')
flags.DEFINE_string('data_path', None, "folder of the images, if not the one under data/; for --datasource=folder your own, "
                    'with folders train, val and test, each with one folder of images per class, or just the latter')
define_number('image_size', 84, 'pixels to which your own images are resized, in height and width '
              '(--datasource=folder)', at_least=1)
flags.DEFINE_enum('image_channels', '3', ['1', '3'], '1: your own images are made grey; 3: RGB (--datasource=folder)')
flags.DEFINE_bool('rotations', False, "rotate each class of each task by a random multiple of 90 degrees, as Omniglot's are "
                  '(--datasource=folder)')
flags.DEFINE_string('split', '64/16/20', 'proportions by which class folders are split into train/val/test, where they are '
                    'not yet; the result is written to splits.csv among them (--datasource=folder)')
define_number('test_query', -1, 'query examples per class in evaluation; -1: as many as --update_batch_size',
              at_least=-1)
define_number('seed', 0, 'fixes everything random: the initial weights and the tasks of every iteration',
              at_least=0)
group('Data')
define_number('pretrain_iterations', 0, 'iterations of joint training (on the loss before any inner update), '
              'before meta-training', at_least=0)
define_number('metatrain_iterations', 15000, 'meta-updates', at_least=0)
define_number('meta_batch_size', 25, 'tasks per meta-update', at_least=1)
flags.DEFINE_float('meta_lr', 0.001, 'step size of Adam in the outer loop', lower_bound=0)
define_number('update_batch_size', 5, 'shot K: support examples per class (in all, for sinusoid)', at_least=1)
flags.DEFINE_float('update_lr', 1e-3, 'step size alpha of the inner gradient descent', lower_bound=0)
define_number('num_updates', 1, 'inner updates during training', at_least=1)
flags.DEFINE_bool('stop_grad', False, 'first-order MAML: treat the inner gradient as a constant')
flags.DEFINE_bool('skip_nonfinite', False, 'pass over iterations whose loss or gradient is not a number, and count them; '
                  'False: stop there')
group('Training')
flags.DEFINE_enum('norm', 'batch_norm', ['batch_norm', 'layer_norm', 'None'], 'normalisation of the hidden layers')
define_number('num_filters', 64, 'filters of each convolution (the paper has 32 for miniImagenet)', at_least=1)
flags.DEFINE_bool('conv', True, 'convolutional network for images; False: fully connected, 256-128-64-64')
flags.DEFINE_bool('max_pool', False, 'convolutions of stride 1 and 2x2 max pooling; False: convolutions of stride 2')
group('Network')
flags.DEFINE_enum('engine', 'auto', ['auto', 'tasks', 'wide'], "'tasks': one task per core, as many at once as there are "
                  "cores; 'wide': all tasks in one graph; auto: wide for fully connected networks and on a GPU, else tasks")
define_number('task_chunk', 0, 'tasks of a meta-batch to compute at a time, to save memory: a divisor of '
              '--meta_batch_size; 0: all', at_least=0)
flags.DEFINE_enum('strategy', 'auto', distribution.STRATEGIES, "between which devices a meta-batch's tasks are divided: 'one' "
                  "device; 'mirrored': all GPUs of this machine; 'multiworker': the machines of TF_CONFIG; auto: multiworker "
                  'where TF_CONFIG is set, mirrored where there are several GPUs, else one')
group('Computing: these change the numbers by rounding only')
flags.DEFINE_bool('log', True, 'write summaries for TensorBoard')
flags.DEFINE_string('logdir', '/tmp/data', 'folder in which each experiment gets a directory of its own')
flags.DEFINE_bool('resume', True, 'go on from the newest checkpoint, if there is one')
define_number('save_interval', 1000, 'iterations between checkpoints', at_least=1)
group('Saving and going on')
flags.DEFINE_bool('train', True, 'train; False: evaluate')
flags.DEFINE_string('load_from', None, "prefix of a checkpoint, of this program's or of the reference's, whose weights are "
                    'evaluated, or from which training starts if there is nothing to resume')
define_number('test_iter', -1, 'iteration of the checkpoint to load; -1: the newest', at_least=-1)
flags.DEFINE_bool('test_best', False, 'evaluate the checkpoint that did best on meta-validation')
flags.DEFINE_bool('plot', False, 'draw what an evaluation or a comparison found, in pictures beside its files and in '
                  'TensorBoard; in training, what every checkpoint does with meta-validation tasks, in TensorBoard')
define_number('num_test_tasks', 600, 'tasks of an evaluation', at_least=1)
flags.DEFINE_multi_string('compare', None, "instead of training or evaluating: a run's folder, or a folder of such, to show side "
                          'by side with others named after it, as far as they were evaluated on the same tasks')
flags.DEFINE_bool('test_set', False, 'evaluate on meta-test; False: on meta-validation')
flags.DEFINE_enum('query_norm', 'batch', ['batch', 'support', 'both'], "whose statistics batch norm gives query examples: "
                  "'batch': their own, so that answers depend on which others there are (transductive, as the paper's); "
                  "'support': the support examples', each query example by itself, as --predict does if not told otherwise; "
                  "'both': evaluate one after the other")
define_number('train_num_classes', -1, 'N that the model was trained with, if not --num_classes; not less than that',
              at_least=-1)
define_number('train_update_batch_size', -1, 'K that the model was trained with, if not --update_batch_size',
              at_least=-1)
flags.DEFINE_float('train_update_lr', -1, 'alpha that the model was trained with, if not --update_lr')
group('Evaluation')
flags.DEFINE_bool('predict', False, 'instead of training or evaluating: adapt the trained model to the images of --support_dir '
                  'and classify those of --query_dir')
flags.DEFINE_string('support_dir', None, 'folder with one folder of images for each class, as many classes as --num_classes or '
                    'fewer')
flags.DEFINE_string('query_dir', None, 'folder of images to classify')
group('Prediction')
flags.DEFINE_bool('help', False, 'print this text', short_name='h')
group('Help')
FLAG_NAMES = sorted(set(FLAGS) - ABSL_FLAGS - {'h', 'help'})


@dataclasses.dataclass(frozen=True)
class Run:
    """What the command line asks for, sentinels resolved. Fields are named like the flags."""
    datasource: str
    source: object              # the entry of SOURCES
    tasks: TaskConfig
    model: object               # maml.ModelConfig
    replicas: object            # distribution.Replicas
    query_norms: tuple          # with which to evaluate, of 'batch', 'support'
    num_outputs: int            # of the network as it was trained
    directory: str              # the experiment directory
    pretrain_iterations: int
    metatrain_iterations: int
    meta_batch_size: int
    resume: bool
    save_interval: int
    skip_nonfinite: bool
    log: bool
    mode: str                   # 'train' | 'evaluate' | 'predict'
    checkpoint: object          # what to load: an iteration, 'best', or None for the newest
    load_from: Optional[str]    # prefix of a checkpoint elsewhere
    split: str                  # what to evaluate: 'val' | 'test'
    num_test_tasks: int
    plot: bool                  # draw what was found
    all_flags: dict             # {flag: value}
    flags: dict                 # {flag: value} of those that determine what is learnt
    network_flags: dict         # of these, those that say which network it is

    @property
    def iterations(self):
        return self.pretrain_iterations + self.metatrain_iterations

    @property
    def regime(self):
        return 'metatrain' if self.metatrain_iterations else 'pretrain'

    @property
    def shared_flags(self):
        """Those that workers of one run must have in common: all but the names of folders."""
        return {name: value for name, value in self.all_flags.items() if name not in ('logdir', 'data_path', 'load_from')}

    @property
    def score(self):
        """What is reported: accuracies in classification, losses in regression."""
        return 'accuracy' if self.model.loss == 'xent' else 'loss'

    @property
    def method(self):
        if self.tasks.baseline:
            return self.tasks.baseline
        if self.regime == 'pretrain':
            return 'pre-training'
        return 'first-order MAML' if self.model.stop_grad else 'MAML'

    @property
    def description(self):
        way = f'{self.tasks.num_classes}-way ' if self.model.loss == 'xent' else ''
        return f'{way}{self.tasks.update_batch_size}-shot {self.datasource}'


def mode(values):
    return 'predict' if values.predict else 'train' if values.train else 'evaluate'


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
    refuse(not values.logdir, '--logdir must name a folder')
    for name in ('logdir', 'data_path', 'load_from', 'support_dir', 'query_dir'):
        try:
            (values[name].value or '').encode()
        except UnicodeEncodeError:
            refuse(True, f'--{name} holds bytes that are not UTF-8 text; rename the folder')
    refuse(values.meta_batch_size * values.update_batch_size > 10 ** 9,
           f'--meta_batch_size={values.meta_batch_size} times --update_batch_size={values.update_batch_size} is more examples '
           'than memories hold')
    refuse(values.baseline not in (None, 'None', 'oracle'), f"--baseline={values.baseline}: the only baseline is 'oracle'")
    refuse(values.baseline == 'oracle' and images,
           f'--baseline=oracle needs the amplitude and phase of a sinusoid, which {values.datasource} does not have')
    refuse(values.data_path is not None and not images,
           f'--data_path is a folder of images, but {values.datasource} has no data on disk')
    own = images and source.folder is None
    train = mode(values) == 'train'
    for name in ('support_dir', 'query_dir'):
        refuse(values.predict and not values[name].value, f'--predict needs --{name}, a folder of images')
        refuse(not values.predict and values[name].value, f'--{name} is for --predict')
    refuse(values.predict and not images, f'--predict classifies images, and --datasource={values.datasource} has none')
    refuse(values.predict and values.strategy not in ('auto', 'one'), '--predict runs on one device: leave out --strategy')
    refuse(values.predict and values.query_norm == 'both', '--predict needs one --query_norm: batch or support')
    refuse(own and not values.data_path and not values.predict,
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
    refuse(values.train_num_classes in (0, 1), '--train_num_classes must be at least 2')
    refuse(values.train_num_classes != -1 and (train or not images),
           '--train_num_classes is for the evaluation of a classifier: add --train=False')
    refuse(-1 < values.train_num_classes < values.num_classes,
           f'--num_classes={values.num_classes}: a network trained with --train_num_classes={values.train_num_classes} has no '
           'more outputs than that; evaluate on tasks of at most so many classes')
    refuse(values.query_norm != 'batch' and train, '--query_norm is for evaluation: add --train=False')
    refuse(values.query_norm != 'batch' and values.norm != 'batch_norm',
           f'--query_norm={values.query_norm} is about batch norm, and with --norm={values.norm} each example is by itself')
    refuse(values.train_update_lr < 0 and values.train_update_lr != -1, '--train_update_lr must not be negative')
    refuse(train and values.pretrain_iterations + values.metatrain_iterations == 0,
           'there is nothing to train: --pretrain_iterations and --metatrain_iterations are both 0')
    refuse(values.test_best and train, '--test_best is for evaluation: add --train=False')
    checkpoints = [name for name in ('test_best', 'test_iter', 'load_from') if values[name].present]
    refuse(train and not values.resume and values.test_iter != -1,
           '--resume=False starts anew, and --test_iter goes on from a checkpoint: give one')
    refuse(len(checkpoints) > 1, f'--{" and --".join(checkpoints)} name different checkpoints: give one')


def data_from_flags(values):
    """Turns flags into the source, an entry of SOURCES, and a TaskConfig."""
    source = SOURCES[values.datasource]
    if source.image_shape and source.folder is None:
        source = dataclasses.replace(
            source, image_shape=(values.image_size, values.image_size, int(values.image_channels)),
            rotations=values.rotations, shares=tuple(map(int, values.split.split('/'))), shares_asked=values['split'].present)
    train = mode(values) == 'train'
    asked = -1 if train else values.test_query
    return source, TaskConfig(
        num_classes=values.num_classes,
        update_batch_size=values.update_batch_size,
        query_shots=source.query_shots(values.update_batch_size, train) if asked == -1 else asked,
        seed=values.seed,
        baseline='oracle' if values.baseline == 'oracle' else None,
        data_path=values.data_path and os.path.expanduser(values.data_path))


def config_from_flags(values, source, tasks, replicas=None):
    """Turns flags into a Run on the data that `data_from_flags` made of them; replicas: see `distribution.Replicas`."""
    from checkpoints import BEST
    from maml import ModelConfig

    alone = values.predict and not values['query_norm'].present  # whoever classifies images has any number, of any classes
    query_norm = 'support' if alone else values.query_norm
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
        datasource=values.datasource, source=source, tasks=tasks, model=model, replicas=replicas or distribution.Replicas(),
        query_norms=('batch', 'support') if query_norm == 'both' else (query_norm,),
        num_outputs=trained_with(values, 'num_classes') if source.image_shape else model.dim_output,
        directory=os.path.join(os.path.expanduser(values.logdir), name),
        pretrain_iterations=pretrain_iterations, metatrain_iterations=metatrain_iterations,
        meta_batch_size=values.meta_batch_size, resume=values.resume, save_interval=values.save_interval,
        skip_nonfinite=values.skip_nonfinite, log=values.log, mode=mode(values),
        checkpoint=BEST if values.test_best else None if values.test_iter == -1 else values.test_iter,
        load_from=values.load_from and os.path.expanduser(values.load_from).removesuffix('.index'),
        split='test' if values.test_set else 'val',
        num_test_tasks=values.num_test_tasks, plot=values.plot,
        all_flags={name: values[name].value for name in FLAG_NAMES},
        flags={**network_flags(values, source), **{name: values[name].value for name in TRAINING_FLAGS}},
        network_flags=network_flags(values, source))


def network_flags(values, source):
    """{flag: value} of the flags by which networks for this source differ."""
    names = ['norm', 'baseline'] if source.image_shape is None else ['norm', 'num_classes', 'conv']
    if source.image_shape and source.folder is None:
        names += ['image_size', 'image_channels']
    if source.image_shape and values.conv:
        names += ['num_filters', 'max_pool']
    named = {name: values[name].value for name in names}
    if 'num_classes' in named:
        named['num_classes'] = trained_with(values, 'num_classes')
    return {**named, 'baseline': 'oracle' if values.baseline == 'oracle' else None} if 'baseline' in named else named


def trained_with(values, name):
    """What a flag was in training: --train_<name>, or the flag itself."""
    trained = values[f'train_{name}'].value
    return values[name].value if trained == -1 else trained


def experiment_name(values, pretrain_only):
    """The experiment directory's name, which states the hyper-parameters as the reference's does."""
    way, shot, rate = (trained_with(values, name) for name in ('num_classes', 'update_batch_size', 'update_lr'))
    oracle = values.baseline == 'oracle'
    return ''.join([
        f'cls_{way}.mbs_{values.meta_batch_size}.ubs_{shot}.numstep{values.num_updates}.updatelr{rate}',
        f'hidden{values.num_filters}' if values.num_filters != 64 else '',
        'maxpool' if values.max_pool else '',
        'stopgrad' if values.stop_grad else '',
        'oracle' if oracle else '',
        {'batch_norm': 'batchnorm', 'layer_norm': 'layernorm', 'None': 'nonorm'}[values.norm],
        # Not in the reference, where this baseline finds and resumes MAML's checkpoint.
        'pretrain' if pretrain_only and not oracle else ''])


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
        except UserError:
            raise
        except Exception:
            hidden.seek(0)
            os.write(console, hidden.read())
            raise
        finally:
            os.dup2(console, 2)
            os.close(console)


def import_tensorflow(strategy='one', cluster=distribution.Cluster(1, 0)):
    """Imports TensorFlow set up for one task per core: kernels single-threaded, as many at a time as there are cores.

    Its notices (on processor features, on GPUs that are not there, on XLA) are silenced. They come while it is imported,
    while it looks for devices and when XLA first compiles, and before its log levels are obeyed, so all that is done here.
    With TF_CPP_MIN_LOG_LEVEL set in the environment, nothing is silenced but what that asks for.

    Args:
        strategy, cluster: as for `distribution.make_strategy`, which must come before the first computation.

    Returns:
        distribution.Replicas.
    """
    silent = 'TF_CPP_MIN_LOG_LEVEL' not in os.environ
    # That a worker is gone is an error to TensorFlow, in many words; we say it in ours.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3' if cluster.workers > 1 else '2')
    with quiet() if silent else contextlib.nullcontext():
        import tensorflow as tf
        if silent:
            tf.get_logger().setLevel('ERROR')  # It warns of functions traced for many shapes, which is what they are for.
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(os.cpu_count())
        replicas = distribution.Replicas(distribution.make_strategy(strategy, cluster), cluster)
        tf.function(tf.identity, jit_compile=True)(0.0)
    if silent:
        del os.environ['TF_CPP_MIN_LOG_LEVEL']  # It has been read, and to processes that this one starts it was not said.
    return replicas


def help_text():
    """The usage and, by groups, every flag with its default and meaning."""
    width = min(shutil.get_terminal_size((118, 24)).columns, 118)
    lines = [__doc__ + '\nFlags, and what they are if not given:']
    for title, names in GROUPS.items():
        lines += ['', f'  {title}', '']
        for flag in (FLAGS[name] for name in names if name != 'h'):
            head = f'--{flag.name}' + ('' if flag.default is None or flag.name == 'help' else f'={flag.default}')
            lines += textwrap.wrap(flag.help, width=max(width, 70), initial_indent=f'    {head:32}  ',
                                   subsequent_indent=' ' * 38, break_on_hyphens=False)
    return '\n'.join(lines)


def in_our_words(message):
    """What absl says of a flag's value, without what Python said to absl."""
    for theirs, ours in (("\\('Non-boolean argument.*", 'it must be True or False'),
                         ('invalid literal.*', 'it must be a whole number'),
                         ('could not convert.*', 'it must be a number')):
        message = re.sub(theirs, ours, message)
    return message


def run_from_command_line(argv):
    """The Run that a command line asks for and its data; None where that is help or a comparison.

    The data are {split: tasks}, or for a prediction a data_generator.OwnTask.

    Raises:
        UserError, flags.Error: the flags or the data are not as they should be.
    """
    try:
        rest = FLAGS(argv)[1:]
    except flags.IllegalFlagValueError as error:
        raise UserError(in_our_words(str(error))) from error
    if FLAGS.help:
        print(help_text())
        return None
    if FLAGS.compare is not None:
        others = [name for name in FLAG_NAMES if FLAGS[name].present and name not in ('compare', 'plot')]
        if others:
            raise UserError(f'--{others[0]} means nothing to --compare, which takes folders and --plot')
        import results
        print(results.compare([*FLAGS.compare, *rest], FLAGS.plot))
        return None
    if rest:
        raise UserError(f'{rest[0]!r} is not a flag; write --name=value')
    check_flags(FLAGS)
    strategy = 'one' if mode(FLAGS) == 'predict' else FLAGS.strategy
    cluster = distribution.cluster_from_environment(strategy)
    # The data first: what is wrong with them is said before anybody has waited for TensorFlow.
    source, tasks = data_from_flags(FLAGS)
    if mode(FLAGS) == 'predict':
        data = source.own_task(os.path.expanduser(FLAGS.support_dir), os.path.expanduser(FLAGS.query_dir))
    else:
        splits = ['train', 'val'] if mode(FLAGS) == 'train' else ['test' if FLAGS.test_set else 'val']
        data = {split: source.tasks(tasks, split) for split in splits}
    if cluster.workers > 1:
        elsewhere = '; what comes of it, worker 0 reports' if cluster.worker else ''
        print(f'Worker {cluster.worker} waits for the other {cluster.workers - 1} of TF_CONFIG{elsewhere}', flush=True)
    replicas = import_tensorflow(strategy, cluster)
    if mode(FLAGS) == 'train':
        distribution.check_tasks(FLAGS.meta_batch_size, replicas.count)
        chunk_of = FLAGS.meta_batch_size // replicas.count
        if FLAGS.task_chunk and chunk_of % FLAGS.task_chunk:
            raise UserError(f'--task_chunk={FLAGS.task_chunk} must divide the {chunk_of} tasks of each replica')
    return config_from_flags(FLAGS, source, tasks, replicas), data


def main(argv):
    asked = run_from_command_line(argv)
    if asked:
        run, data = asked
        from tensorflow.errors import OpError, ResourceExhaustedError
        if not run.replicas.chief:
            sys.stdout = open(os.devnull, 'w')  # What there is to say, the chief says.
        try:
            if run.mode == 'train':
                from training import train
                train(run, data)
            elif run.mode == 'evaluate':
                from evaluation import evaluate
                evaluate(run, data)
            else:
                from prediction import predict
                predict(run, data)
        except ResourceExhaustedError as error:
            raise MemoryError(first_line(error)) from error
        except OpError as error:
            if run.replicas.workers == 1:
                raise
            go_on = ' to go on from the newest checkpoint' if run.mode == 'train' else ''
            raise UserError('another worker has stopped, see what it printed; start all workers again' + go_on) from error


def stop(number, frame):
    """What SIGTERM does while there is nothing to save: ends the program, with what it had begun to write cleared away."""
    sys.exit(128 + number)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, stop)
    try:
        main(sys.argv)
        sys.stdout.flush()
    except (UserError, flags.Error) as error:
        sys.exit('main.py: ' + str(error).replace('\n', ' '))
    except MemoryError as error:
        sys.exit(f'main.py: there is not enough memory for what the flags ask for ({error})')
    except KeyboardInterrupt:
        print('Interrupted.', file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # what reads our output has gone, as `head` does; Python must not try to write the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # of SIGPIPE
    except OSError as error:
        sys.exit(f'main.py: {error}')
