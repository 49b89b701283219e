"""The command line: usage, flags, and which part of the program does what they ask for."""
import os
import sys
from typing import Any

from data_generator import SOURCES
from runtime.cli import rules, workers
from runtime.cli.flags import Learning, boolean, choice, group, help_text, number, parse, real, string, strings
from runtime.cli.methods import PRESETS
from runtime.cli.network_file import label as network_label
from runtime.cli.run import Evaluation, Run, Training
from runtime.cli.startup import run_and_data
from runtime.jobs.learner import load, load_predictor  # noqa: F401  (for Python: docs/python.md)
from runtime.system import console
from runtime.system.errors import UserError, first_line

USAGE = """Model-Agnostic Meta-Learning for regression, few-shot image classification and 2-D navigation.

Usage:

  10-shot sinusoid:
    python main.py --datasource=sinusoid --logdir=logs/sine/ --metatrain_iterations=70000 --norm=None --update_batch_size=10

  10-shot sinusoid baselines, the oracle and joint pre-training:
    python main.py --datasource=sinusoid --logdir=logs/sine/ --pretrain_iterations=70000 --metatrain_iterations=0 --norm=None --update_batch_size=10 --baseline=oracle
    python main.py --datasource=sinusoid --logdir=logs/sine/ --pretrain_iterations=70000 --metatrain_iterations=0 --norm=None --update_batch_size=10

  2-D navigation, by reinforcement learning:
    python main.py --datasource=navigation --metatrain_iterations=100 --meta_batch_size=20 --update_batch_size=20 --update_lr=0.5 --num_updates=1 --logdir=logs/navigation/

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

  Each command is also a file in configs/, as in --flagfile=configs/omniglot_5way1shot.flags.

  To evaluate: --run=DIR --train=False, and --test_set=True for meta-test instead of meta-validation; DIR is the run's directory.
  To classify your own images: --run=DIR --predict --support_dir=DIR --query_dir=DIR; rows of tables: --support_csv, --query_csv.
  Regression on functions needs no data; prepare the other data sets first: see docs/data.md.
"""  # noqa: E501  (a command is one line, to be copied)

# TensorFlow takes seconds to import, so the modules that need it are imported once flags and data have been checked.

group('Data')
choice('datasource', 'sinusoid', SOURCES, 'where tasks come from', Learning())
number('num_classes', 5, 'way N: classes per task (ignored in regression)', 1, Learning(network='classes'), only='supervised')
choice('baseline', 'None', ['None', 'oracle'], "'oracle' appends each task's amplitude and phase (navigation: its goal) to the input, "
       "and trains jointly instead of meta-training", Learning(label='{}', network='numbers'))
string('data_path', None, 'folder of the data, if not the one under data/; your own images or tables: see docs/data.md', only='files')
string('split_file', None, 'csv file with the columns split,class; or a list of images, such as filename,label, or three: train,val,test',
       only='own data')
string('label_column', None, 'column of a list of images, or of a table, with the labels', only='own data')
string('task_column', None, 'column of a table with the tasks (with --targets)', only='tables')
string('targets', None, 'columns to predict, separated by commas: each csv file is a task; without it, each is a class '
       '(--datasource=table)', Learning('.targets{}', network='tables'), only='tables')
number('image_size', 84, 'side, in pixels, of your own images once resized', 1, Learning('.size{}', network='user images'),
       only='user images')
choice('image_channels', '3', ['1', '3'], '1: your own images in grey; 3: in RGB', Learning('.channels{}', network='user images'),
       only='user images')
boolean('rotations', False, 'rotate each class of each task by a random multiple of 90 degrees (--datasource=folder)',
        Learning('.rotations'), only='user images')
string('split', '64/16/20', 'proportions in which your classes are split into train/val/test, once. 0/0/100: evaluate a given model on all '
       'of them', Learning('.split{}'), only='own data')
boolean('skip_bad_images', False, 'leave out images that cannot be decoded or have the wrong size', only='images')
boolean('verify', False, 'compare checksums of decoded images at start-up, not only sizes and times', only='images')
number('test_query', -1, 'query examples per class in evaluation; -1: as many as --update_batch_size (navigation: 40 episodes)', -1)
number('seed', 0, 'seed of a training: of the initial weights and the tasks', 0, Learning('.seed{}'))
number('test_seed', 0, "seed of an evaluation's tasks, whatever the model's --seed", 0)
group('Training')
number('pretrain_iterations', 0, 'iterations of joint training, on the loss before any inner update; before meta-training', 0)
number('metatrain_iterations', 15000, 'meta-updates', 0)
number('meta_batch_size', 25, 'tasks per meta-update', 1, Learning())
real('meta_lr', 0.001, 'step size of the outer loop', Learning('.metalr{}'), lower_bound=0, only='supervised')
number('update_batch_size', 5, 'shot K: support examples per class (per task, in regression; in navigation, episodes)', 1, Learning())
real('update_lr', 1e-3, 'step size alpha of the inner gradient descent', Learning(), lower_bound=0)
number('num_updates', 1, 'inner updates during training; 0: none, for --head_init=prototypes or ridge', 0, Learning())
real('ridge_lambda', 50.0, 'initial value of the learned penalty of --head_init=ridge', Learning('.lambda{}'), only='ridge')
real('ridge_scale', 10.0, 'initial value of the learned scale of outputs of --head_init=ridge', Learning('.scale{}'), only='ridge')
boolean('stop_grad', False, 'first-order MAML: treat the inner gradient as a constant', Learning('stopgrad'))
boolean('skip_nonfinite', False, 'skip and count iterations whose loss or gradient is not finite, instead of stopping', only='supervised')
number('validation_tasks', 300, 'meta-validation tasks by which a training ranks its checkpoints (navigation: 100)', 1)
group('Method')
choice('method', 'maml', PRESETS, 'a preset of flags, see docs/methods.md; flags on the command line and in a --flagfile override it')
choice('inner_weights', 'all', ['all', 'head', 'body'], 'what the inner loop adapts: all weights, the last layer, or all other layers',
       Learning('.inner{}'), only='supervised')
choice('head_init', 'learned', ['learned', 'shared', 'new', 'prototypes', 'ridge'], "a task's last layer before its first inner update: "
       "learned weights; one learned column for all classes; nothing learned; or the prototypes or the ridge regression of the support "
       "examples", Learning('.{}'), only='supervised')
choice('pretrain_labels', 'tasks', ['tasks', 'classes'], 'labels in pre-training: those of the tasks; or all classes of '
       'meta-training, in batches of --meta_batch_size images', Learning('.{}'), only='images')
choice('logits', 'linear', ['linear', 'cosine'], 'last layers: linear, or cosine of features and weights', Learning('.{}logits'),
       only='classes')
boolean('adapt_norm', False, 'the inner loop adapts offsets and scales of normalisation too', Learning('.adaptnorm'), only='normalisation')
boolean('norm_scale', False, 'batch norm has a scale', Learning('.normscale'), only='batch norm')
boolean('norm_per_step', False, 'each inner step has its own offsets and scales', Learning('.normperstep'), only='normalisation')
choice('learn_lr', 'no', ['no', 'layer', 'step', 'weight'], 'learn the inner step size, from --update_lr: one for each tensor, for each '
       'tensor and inner step, or for each weight', Learning('.learnlr{}'), only='supervised')
boolean('mean_loss', False, 'divide the cross-entropy by rows, not by shots as the reference', Learning('.meanloss'), only='classes')
choice('query_norm', 'batch', ['batch', 'support', 'each', 'both'], "batch norm's statistics for query examples: their own, as in the "
       "paper (transductive); those of the support examples, the default of --predict; those of the support examples and the one query "
       "example; or, in evaluation, the first two in turn", Learning('.querynorm{}'), only='supervised, batch norm')
number('multi_step_loss', 0, 'N: in the first N iterations, minimise a weighted mean of the query losses after each update', 0,
       Learning('.msl{}'), only='supervised')
number('first_order_iterations', 0, 'N: compute the first N iterations as with --stop_grad', 0, Learning('.fo{}'), only='supervised')
choice('meta_lr_schedule', 'constant', ['constant', 'linear', 'cosine'], 'how --meta_lr moves to --meta_lr_final', Learning('.{}'),
       only='supervised')
real('meta_lr_final', -1, 'step size of the outer loop after the last iteration; -1 stands for 0', Learning('.final{}'), only='supervised')
choice('meta_optimizer', 'adam', ['adam', 'sgd'], 'optimizer of the outer loop', Learning('.{}'), only='supervised')
real('clip_norm', 0, 'bound of the Euclidean norm of the meta-gradient: a longer one is scaled down to it; 0: none',
     Learning('.clipnorm{}'), lower_bound=0, only='supervised')
number('schedule_interval', 1, 'iterations between changes of the schedules', 1, Learning('.every{}'), only='supervised')
choice('outer', 'gradient', ['gradient', 'reptile'], 'what the outer step follows: the meta-gradient; or the difference between adapted '
       'and shared weights, without query examples', Learning('.{}'), only='supervised')
choice('inner_optimizer', 'sgd', ['sgd', 'adam'], 'optimizer of the inner loop; adam, without momentum, for --outer=reptile: second '
       'moments carry over from task to task', Learning('.inner{}'), only='supervised')
number('inner_batch', 0, 'support examples of an inner step, in random order; 0: all', 0, Learning('.batch{}'), only='supervised')
number('ensemble', 1, 'n: keep the n checkpoints that did best on meta-validation, and evaluate their mean outputs', 1, only='supervised')
group('Network')
choice('norm', 'batch_norm', ['batch_norm', 'layer_norm', 'None'], 'normalisation of the hidden layers (navigation: none)',
       Learning({'batch_norm': 'batchnorm', 'layer_norm': 'layernorm', 'None': 'nonorm'}, network='all'), only='supervised')
number('num_filters', 64, 'filters of each convolution; 32 in the paper for MiniImagenet', 1, Learning('hidden{}', 'convolutions'),
       only='images')
boolean('conv', True, 'convolutional network for images; False: fully connected, 256-128-64-64', Learning(network='images'),
        only='supervised')
boolean('max_pool', False, 'convolutions of stride 1 and 2x2 max pooling; False: convolutions of stride 2',
        Learning('maxpool', 'convolutions'), only='images')
string('network', None, 'FILE.py:FUNCTION, instead of the networks that the other flags describe: a function (input_shape, outputs) -> '
       'keras.Model; see docs/networks.md',
       Learning(network_label, network='all'), only='supervised')
string('input_shape', None, 'shape in which --network gets the numbers of a row, as in 6,3; default: one axis',
       Learning('.input{}', network='all'), only='own networks, numbers')
boolean('check_network', True, 'before a training, test the second derivatives of --network', only='own networks')
string('hidden', None, 'sizes of the hidden layers of a fully connected network; default: 40,40 (navigation: '
       '100,100), or with --conv=False 256,128,64,64',
       Learning('.layers{}', network='all'), only='fully connected')
group('Computation (results differ only by rounding)')
choice('engine', 'auto', ['auto', 'map', 'vmap', 'tasks', 'wide'], 'map: one task per core; vmap: all tasks in one graph (tasks, wide: '
       'their earlier names); auto: vmap for fully connected networks and on a GPU, but not with --recompute or --network; else map',
       only='supervised')
number('task_chunk', 0, 'tasks of a meta-batch to compute at a time, to save memory: a divisor of --meta_batch_size; 0: all', 0,
       only='supervised')
boolean('recompute', False, 'gradient checkpointing over inner steps: saves memory and compilation for many inner updates',
        only='supervised')
choice('strategy', 'auto', workers.STRATEGIES, 'where the tasks of a meta-batch run: one device, all GPUs of this machine, or the machines '
       'of TF_CONFIG; auto: the last if TF_CONFIG is set, all GPUs if there are several, else one device', only='supervised')
group('Saving and resuming')
boolean('log', True, 'write summaries for TensorBoard')
string('logdir', '/tmp/data', 'folder in which each experiment gets a directory of its own')
string('run', None, 'directory of a run: use the flags of its training, except those of computation and saving, to evaluate, to predict '
       'or to continue; an evaluation may have other tasks')
boolean('trust_network', False, 'run the network that somebody else trained with, from the directory of --run', only='own networks')
boolean('resume', True, 'continue from the newest checkpoint, if there is one')
number('save_interval', 1000, 'iterations between checkpoints (navigation: 10)', 1)
group('Evaluation')
boolean('train', True, 'train; False: evaluate')
string('load_from', None, 'prefix of a checkpoint, of this program or of the reference, to evaluate, or to start a training from')
number('test_iter', -1, 'iteration of the checkpoint to load; -1: the newest; 0: the initial weights; in a training the newest', -1)
boolean('test_best', False, 'evaluate the checkpoint that did best on meta-validation', only='evaluation')
boolean('plot', False, 'draw the results of an evaluation or a comparison; in training, those of every checkpoint on meta-validation, in '
        'TensorBoard')
number('num_test_tasks', 600, 'tasks of an evaluation (navigation: 40)', 1)
number('test_updates', -1, 'inner updates of an evaluation; -1: 10 (navigation: 4), or --num_updates if that is more; but 0 with '
       '--num_updates=0; a training records it for its evaluations', -1)
strings('compare', None, 'compare the runs in these folders on the tasks on which several were evaluated; name=DIR gives those in DIR a '
        'name')
strings('across', None, 'a table of the runs in these folders against the tasks of all sources on which they were evaluated')
choice('checkpoints', 'all', ['all', 'newest', 'best'], 'of each run, those that --compare and --across show: all that were evaluated, the '
       'newest, or the best on meta-validation', only='comparison')
string('against', None, 'a flag in which the runs of --compare differ: --plot draws their results against it', only='comparison')
choice('format', 'text', ['text', 'csv', 'latex'], 'format of what --compare and --across print: tables for a terminal, csv, or LaTeX',
       only='comparison')
choice('plot_format', 'png', ['png', 'pdf', 'svg'], 'format of the pictures that --plot and --predict draw')
boolean('test_set', False, 'evaluate on meta-test; False: on meta-validation')
number('train_update_batch_size', -1, 'K of the training, if not --update_batch_size; not needed with --run', -1)
choice('head', 'own', ['own', 'nearest'], "the model's own last layer, or the nearest class mean and neighbour", only='scores, classes')
number('permutations', 1, "orders of each task's labels to evaluate in: reports their mean accuracy, and that of their averaged outputs", 1,
       only='scores, classes')
real('train_update_lr', -1, 'alpha of the training, if not --update_lr; not needed with --run')
boolean('resize', False, "resize the images of --datasource to the training's size and channels", only='transfer')
group('Prediction')
boolean('predict', False, 'adapt the trained model to the images of --support_dir and classify those of --query_dir, or to the rows of '
        '--support_csv and predict for those of --query_csv', only='files')
string('support_dir', None, 'folder with a folder of images for each class; a trained last layer takes --num_classes at most',
       only='images, prediction')
string('query_dir', None, 'folder of images to classify', only='images, prediction')
string('support_csv', None, "rows to adapt to: the training's columns, and class if it had no --targets", only='tables, prediction')
string('query_csv', None, 'rows to predict for', only='tables, prediction')
group('Help')
boolean('help', False, 'print this text', short_name='h')


def compare(values: dict[str, Any], folders: list[str]) -> None:
    """Prints a comparison of the folders after --compare or --across, and of those that follow."""
    from runtime.results import across, compare
    folders = [*(values['compare'] or values['across']), *folders]
    options = values['plot'], values['format'], values['plot_format'], values['checkpoints']
    print(across.across(folders, *options) if values['compare'] is None else compare.compare(folders, *options, values['against']))


def execute(run: Run, data: Any) -> None:
    """Trains, evaluates or predicts."""
    from tensorflow.errors import OpError, ResourceExhaustedError
    if not run.replicas.chief:
        sys.stdout = open(os.devnull, 'w')  # only the chief prints
    try:
        if isinstance(run, Training):
            from runtime.jobs.train import train as action
        elif isinstance(run, Evaluation):
            from runtime.jobs.evaluate import evaluate as action
        else:
            from runtime.jobs.predict import predict as action
        action(run, data)
    except ResourceExhaustedError as error:
        raise MemoryError(first_line(error)) from error
    except OpError as error:
        if run.replicas.workers == 1:
            raise
        hint = ' to continue from the newest checkpoint' if isinstance(run, Training) else ''
        raise UserError('another worker has stopped, see what it printed; start all workers again' + hint) from error


def main(argv: list[str]) -> None:
    """What the command line asks for. Raises UserError or absl.flags.Error, each with one sentence, for what is wrong with it."""
    line = parse(argv)
    if line.values['help']:
        print(help_text(USAGE))
        return
    rules.check_paths(line.values)
    if line.values['compare'] is None and line.values['across'] is None:
        execute(*run_and_data(line))
    else:
        rules.check_comparison(line)
        compare(line.values, line.rest)


if __name__ == '__main__':
    console.run(main, os.path.basename(__file__))
