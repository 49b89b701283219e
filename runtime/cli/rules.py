"""Flags that make no sense: given for what they are not for, or combinations, a table of conditions and messages."""
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from runtime.cli import methods
from runtime.cli.flags import BUILT_IN_NETWORKS, LEARNING, ONLY, CommandLine, default
from runtime.cli.request import PURPOSES, STATED, Request
from runtime.cli.stored_run import describing_flags
from runtime.compute.config import outputs_stay_equal
from runtime.system.errors import UserError

RIDGE_FLAGS = 'ridge_lambda', 'ridge_scale'
PATHS = ('logdir', 'data_path', 'split_file', 'network', 'load_from', 'support_dir', 'query_dir', 'support_csv', 'query_csv', 'run',
         'compare', 'across')


def check_paths(values: Mapping[str, Any]) -> None:
    """Refuses paths that are URLs or not valid text, before anything is read from them; raises UserError.

    TensorFlow interprets gs://bucket, file:///tmp and ram://x as remote or special paths, Python as folders of these names.
    """
    problems = [f'--{name} contains a line break, which the file of flags of a run cannot hold; rename what it names'
                for name in describing_flags() if isinstance(values[name], str) and re.search('[\n\r]', values[name])]
    for name in PATHS:
        value = values[name]
        for path in value if isinstance(value, list) else [value or '']:
            if '\0' in path:
                problems.append(f'--{name} contains a zero byte; rename the folder')
            elif re.search('[\ud800-\udfff]', path):
                problems.append(f'--{name} is not valid UTF-8; rename the folder')
            elif re.match(r'[A-Za-z][\w.+-]*://', path):
                problems.append(f'--{name}={path} is a URL, not a local path; mount it and give that path')
    if problems:
        raise UserError('; '.join(problems))


def check_flags(request: Request) -> None:
    """Refuses flags that are not for what is asked, and combinations that make no sense; raises UserError."""
    facts = {**request.values, 'trained': request.trained}
    broken = [*_misplaced(request), *(message for refused, message in RULES if refused(request))]
    if broken:
        sentence = '; '.join(dict.fromkeys(message.format(**facts) for message in broken))
        raise UserError(sentence + methods.preset_hint(request.method, request.values, request.given, sentence))


def _misplaced(request):
    """Messages about flags that were given and are not for what is asked; one at its default asks for nothing."""
    for name in sorted(request.given & ONLY.keys()):
        if request.values[name] == request.source.usual_flags.get(name, default(name)):
            continue
        unmet = [text for text, holds in (PURPOSES[purpose] for purpose in ONLY[name]) if not holds(request)]
        if unmet:
            yield f'--{name} is for {unmet[0]}'


def check_comparison(line: CommandLine) -> None:
    """Refuses flags that cannot be combined with --compare or --across; raises UserError."""
    action = 'compare' if line.values['across'] is None else 'across'
    others = sorted(name for name in line.given - {action, 'plot', 'plot_format'} if 'comparison' not in ONLY.get(name, ()))
    if others:
        raise UserError(f'{", ".join(f"--{name}" for name in others)} cannot be combined with --{action}')
    against = line.values['against']
    if against and (action == 'across' or not line.values['plot']):
        raise UserError(f'--against={against} is for --compare with --plot')
    if against and against not in {*LEARNING, 'pretrain_iterations', 'metatrain_iterations', 'test_updates'}:
        raise UserError(f'--against={against} is no flag of a training; one that is: --against=update_lr')


def _names_checkpoint(request, name):
    """Whether a flag is given and chooses a checkpoint."""
    return name in request.given and request.values[name] != default(name)


def _all_different(listed):
    names = [name.strip() for name in listed.split(',')]
    return all(names) and len(set(names)) == len(names)


# (whether a request is refused, the message, with {flag} for the values of flags)
RULES: list[tuple[Callable[[Request], bool], str]] = [
    (lambda r: not r.logdir, '--logdir must name a folder'),
    (lambda r: r.load_from == '', '--load_from must name a checkpoint'),
    (lambda r: r.run is not None and 'method' in r.given, '--run names a run, whose method is known: leave out --method'),
    (lambda r: r.run is not None and 'logdir' in r.given, '--run names the directory of a run: leave out --logdir'),
    (lambda r: r.meta_batch_size * r.update_batch_size > 10 ** 9,
     '--meta_batch_size={meta_batch_size} times --update_batch_size={update_batch_size} does not fit in memory'),
    # Data
    (lambda r: r.baseline == 'oracle' and 'oracle' not in r.source.baselines,
     '--baseline=oracle needs the amplitude and phase of a sinusoid, which {datasource} does not have'),
    (lambda r: not r.source.supervised and r.num_updates != 1,
     '--num_updates={num_updates}: an iteration of --datasource={datasource} has one inner update; --test_updates is for its evaluation'),
    (lambda r: (r.user_images or r.tables) and not r.data_path and r.mode != 'predict',
     '--datasource={datasource} needs --data_path, the folder of your data'),
    (lambda r: r.images and r.source.test_only and r.mode == 'train',
     '--datasource={datasource} has no classes to train on: evaluate a model of another source on it, by --run=DIR with '
     '--train=False and --test_set=True'),
    (lambda r: r.images and r.source.test_only and r.mode == 'evaluate' and not r.test_set,
     '--datasource={datasource} has classes for meta-test only: add --test_set=True'),
    (lambda r: bool(r.targets) and not _all_different(r.targets), '--targets={targets} must name columns, separated by commas, each once'),
    (lambda r: not re.fullmatch(r'\d{1,9}/\d{1,9}/\d{1,9}', r.split) or not re.search('[1-9]', r.split),
     '--split={split} must be three whole numbers like 64/16/20, not all of them 0'),
    (lambda r: r.own_data and r.mode == 'train' and re.match('0+/', r.split), '--split={split} leaves no classes to train on'),
    (lambda r: r.tables and 'split' in r.given and not r.group_column,
     '--split={split} needs the column with the class or task of each row: add --label_column or --task_column, or leave out --split'),
    (lambda r: r.tables and bool(r.label_column) and bool(r.task_column), '--label_column and --task_column: give one'),
    (lambda r: r.tables and bool(r.label_column) and bool(r.targets),
     '--label_column is for classification, --targets for regression: give one'),
    (lambda r: r.tables and bool(r.task_column) and not r.targets, '--task_column needs --targets, the columns to predict'),
    (lambda r: bool(r.split_file) and r.mode != 'predict' and not (r.user_images or r.group_column),
     '--split_file={split_file} of a table needs --label_column or --task_column'),
    (lambda r: r.user_images and bool(r.label_column) and not r.split_file,
     '--label_column of images is for lists of them: add --split_file'),
    (lambda r: r.user_images and r.max_pool and r.conv and r.image_size < 16,
     '--image_size={image_size}: four times 2x2 pooling needs at least 16'),
    (lambda r: r.user_images and r.image_size > 1024,
     '--image_size={image_size}: tasks of images of more than 1024x1024 pixels do not fit in memory'),
    (lambda r: r.classes and r.num_classes < 2, '--num_classes={num_classes}: a task needs at least 2 classes'),
    (lambda r: r.test_query == 0, '--test_query must be at least 1'),
    # Network
    (lambda r: r.hidden is not None and not re.fullmatch(r'[1-9]\d{0,5}(,[1-9]\d{0,5})*', r.hidden),
     '--hidden={hidden} must be sizes of layers separated by commas, like 40,40'),
    *((lambda r, name=name: bool(r.network) and name in r.given,
       f'--{name} is for the networks of this program: leave it out with --network') for name in BUILT_IN_NETWORKS),
    (lambda r: r.input_shape is not None and not re.fullmatch(r'[1-9]\d{0,6}(,[1-9]\d{0,6})*', r.input_shape),
     '--input_shape={input_shape} must be sizes separated by commas, like 6,3'),
    # Method
    (lambda r: 'schedule_interval' in r.given and r.schedule_interval != default('schedule_interval') and not (
        r.multi_step_loss or r.first_order_iterations or r.meta_lr_schedule != 'constant'),
     '--schedule_interval needs a schedule: --multi_step_loss, --first_order_iterations or --meta_lr_schedule'),
    (lambda r: r.meta_lr_final < 0 and r.meta_lr_final != -1, '--meta_lr_final must not be negative'),
    (lambda r: r.meta_lr_final != -1 and r.meta_lr_schedule == 'constant', '--meta_lr_final needs --meta_lr_schedule=linear or cosine'),
    *((lambda r, name=name: r.mode == 'train' and r.values[name] != default(name) and r.only_pretrains,
       f'--{name}={{{name}}} is about meta-training, and this run only pre-trains: leave it out')
      for name in ('meta_lr_schedule', 'multi_step_loss', 'first_order_iterations', 'learn_lr', 'norm_per_step', 'outer', 'clip_norm')),
    (lambda r: r.mode == 'train' and r.norm_per_step and r.iterations[0] > 0 and not r.only_pretrains,
     '--norm_per_step: pre-training has no inner step, so it would train the offsets and scales of the first one only; train with '
     '--pretrain_iterations alone, then start from its checkpoint by --load_from, which copies them to all'),
    (lambda r: not r.classes and r.head_init in ('shared', 'prototypes'), '--head_init={head_init} is for classification'),
    (outputs_stay_equal,
     '--head_init={head_init} starts with equal outputs for all classes, and --inner_weights=body keeps them equal: adapt the last layer'),
    (lambda r: r.computes_head and r.outer == 'reptile',
     '--outer=reptile moves shared weights to adapted ones, and a last layer of --head_init={head_init} is not shared: leave out one'),
    (lambda r: r.mode == 'train' and r.pretrain_labels == 'classes' and r.iterations[0] == 0,
     '--pretrain_labels=classes is about pre-training: add --pretrain_iterations'),
    (lambda r: r.mode == 'train' and r.pretrain_labels == 'classes' and r.task_chunk > 0,
     '--task_chunk splits a meta-batch of tasks, and --pretrain_labels=classes trains on images: leave out one'),
    (lambda r: r.computes_head and r.mode == 'train' and r.iterations[0] > 0 and r.pretrain_labels == 'tasks',
     'joint training, before any inner update, needs a last layer that tasks share: leave out --head_init={head_init}, or '
     '--pretrain_iterations and --baseline'),
    (lambda r: r.source.supervised and r.num_updates == 0 and r.head_init in ('learned', 'shared', 'new'),
     '--num_updates=0 needs a last layer that is computed from the support examples: add --head_init=ridge, or for classification '
     'prototypes'),
    (lambda r: r.mode == 'train' and r.multi_step_loss > 0 and r.num_updates == 1,
     '--multi_step_loss is a mean over inner updates, and --num_updates=1 takes one: leave it out'),
    (lambda r: r.mode == 'train' and r.stop_grad and r.first_order_iterations > 0,
     '--stop_grad is first order in all iterations, so --first_order_iterations={first_order_iterations} changes nothing: leave out one'),
    *((lambda r, name=name: r.num_updates == 0 and r.values[name] != default(name),
       f'--{name} is about the inner updates of the training, and --num_updates=0 takes none: leave it out')
      for name in ('stop_grad', 'first_order_iterations', 'multi_step_loss', 'learn_lr', 'norm_per_step', 'inner_batch')),
    (lambda r: r.head_init == 'ridge' and r.logits == 'cosine',
     '--logits=cosine takes only the directions of the columns, so the scale and the bias of --head_init=ridge would learn nothing: leave '
     'out one'),
    *((lambda r, name=name: r.values[name] <= 0 and r.head_init == 'ridge', f'--{name} must be positive') for name in RIDGE_FLAGS),
    (lambda r: r.recompute and r.engine in ('vmap', 'wide'),
     '--recompute loops over the inner steps of one task at a time: leave out --engine={engine}'),
    *((lambda r, name=name: r.outer == 'reptile' and r.values[name] != default(name),
       f'--{name} is about a gradient through the inner loop, and --outer=reptile takes none: leave it out')
      for name in ('stop_grad', 'first_order_iterations', 'multi_step_loss', 'learn_lr', 'clip_norm')),
    (lambda r: r.outer == 'reptile' and r.mode == 'train' and r.iterations[0] > 0,
     "--meta_lr of --outer=reptile is not a gradient's step size, as pre-training needs: leave out --pretrain_iterations, or pre-train "
     'another run and start from it by --load_from'),
    (lambda r: r.outer == 'reptile' and r.mode == 'train' and r.query_norm != 'batch',
     '--outer=reptile learns from support examples alone: --query_norm is for its evaluation'),
    (lambda r: r.inner_optimizer == 'adam' and r.outer == 'gradient',
     '--inner_optimizer=adam needs --outer=reptile: there is no gradient through Adam'),
    # Training
    *((lambda r, name=name: not math.isfinite(r.values[name]), f'--{name} must be a finite number')
      for name in ('meta_lr', 'meta_lr_final', 'update_lr', 'train_update_lr', 'clip_norm', *RIDGE_FLAGS)),
    (lambda r: r.mode == 'train' and r.pretrain_iterations + r.metatrain_iterations == 0,
     'there is nothing to train: --pretrain_iterations and --metatrain_iterations are both 0'),
    (lambda r: r.mode == 'train' and bool(r.task_chunk) and r.meta_batch_size % r.task_chunk != 0,
     '--task_chunk={task_chunk} must divide --meta_batch_size={meta_batch_size}'),
    (lambda r: r.mode == 'train' and r.plot and not r.log,
     '--plot of a training draws into the summaries, and --log=False writes none: leave out one'),
    (lambda r: r.mode == 'train' and not r.resume and r.test_iter != -1,
     '--resume=False starts from scratch, and --test_iter continues from a checkpoint: give one'),
    # Evaluation
    (lambda r: r.is_transfer and r.mode == 'predict',
     '--datasource={datasource} contradicts --datasource={trained[datasource]}, which a prediction needs; leave it out'),
    (lambda r: r.is_transfer and not (r.images and r.training.images),
     '--datasource={datasource} with a model of {trained[datasource]}: both must be sources of images'),
    *((lambda r, name=name: r.mode == 'train' and r.values[f'train_{name}'] not in (-1, r.values[name]),
       f'--train_{name}={{train_{name}}} contradicts --{name}={{{name}}}, with which a training takes its inner steps: leave it out')
      for name in STATED),
    (lambda r: r.train_update_batch_size == 0, '--train_update_batch_size must be at least 1'),
    (lambda r: r.train_update_lr < 0 and r.train_update_lr != -1, '--train_update_lr must not be negative'),
    (lambda r: r.learn_lr != 'no' and r.update_lr != r.trained['update_lr'],
     '--update_lr={update_lr}: the step sizes of this model are learned, and an evaluation cannot change them'),
    (lambda r: r.classes and r.num_classes > r.trained['num_classes'] and not r.computes_head and r.head == 'own',
     '--num_classes={num_classes}: the network was trained with --num_classes={trained[num_classes]} and has no more outputs than '
     'that; evaluate on tasks of at most that many classes'),
    (lambda r: r.head == 'nearest' and 'test_updates' in r.given and r.test_updates != 0,
     '--head=nearest is without inner updates: leave out --test_updates={test_updates}'),
    (lambda r: r.classes and r.permutations > math.factorial(min(r.num_classes, 13)),
     '--permutations={permutations}: the labels of --num_classes={num_classes} classes have fewer orders'),
    (lambda r: r.query_norm == 'both' and r.mode != 'evaluate',
     '--query_norm=both is for evaluation, with --train=False and without --predict; else give batch, support or each'),
    (lambda r: r.ensemble > 1 and r.mode != 'train' and bool(r.load_from),
     '--ensemble={ensemble} takes the checkpoints of a run, and --load_from names one: give one, or --ensemble=1'),
    *((lambda r, name=name: r.ensemble > 1 and r.mode != 'train' and _names_checkpoint(r, name),
       f'--ensemble={{ensemble}} and --{name} name different checkpoints: give one, or --ensemble=1')
      for name in ('test_iter', 'test_best')),
    *((lambda r, pair=pair: r.mode != 'train' and all(_names_checkpoint(r, name) for name in pair),
       '--{} and --{} name different checkpoints: give one'.format(*pair))
      for pair in itertools.combinations(('test_best', 'test_iter', 'load_from'), 2)),
    # Prediction
    *((lambda r, name=name: r.mode == 'predict' and r.images and not r.values[name], f'--predict needs --{name}, a folder of images')
      for name in ('support_dir', 'query_dir')),
    *((lambda r, name=name: r.mode == 'predict' and r.tables and not r.values[name], f'--predict needs --{name}, a csv file')
      for name in ('support_csv', 'query_csv')),
    (lambda r: r.mode == 'predict' and r.strategy not in ('auto', 'one'), '--predict runs on one device: leave out --strategy'),
]
