"""Combinations of flags that make no sense: a table of conditions and messages."""
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from data_generator import SOURCES, TableSource
from runtime.cli.methods import preset_hint
from runtime.system.errors import UserError

PATHS = ('logdir', 'data_path', 'load_from', 'support_dir', 'query_dir', 'support_csv', 'query_csv', 'run', 'compare', 'across')


class Request:
    """The flags, and the facts about them that several rules use.

    Attributes:
        values: the absl FlagValues; they are attributes of the request too.
        mode: 'train', 'evaluate' or 'predict'.
        source: the entry of SOURCES.
        images: whether the source has images.
        user_images: whether these are the user's own.
        tables: whether it has tables.
        classes: whether its tasks are classification tasks.
    """

    def __init__(self, values: flags.FlagValues):
        self.values, self.mode = values, mode(values)
        self.source = source = SOURCES[values.datasource]
        self.images = source.image_shape is not None
        self.user_images = self.images and source.user_images
        self.tables = isinstance(source, TableSource)
        self.classes = self.images or (self.tables and not values.targets)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.values, name)

    def given(self, name: str) -> bool:
        """Whether the command line has the flag."""
        return bool(self.values[name].present)


class Rule(NamedTuple):
    """A combination that is refused."""
    refused: Callable[[Request], bool]
    message: str    # with {flag} for the values of flags


def mode(values: flags.FlagValues) -> str:
    """What the flags ask for: 'train', 'evaluate' or 'predict'."""
    return 'predict' if values.predict else 'train' if values.train else 'evaluate'


def check_paths(values: flags.FlagValues) -> None:
    """Refuses paths that are URLs or not valid text, before anything is read from them; raises UserError.

    TensorFlow interprets gs://bucket, file:///tmp and ram://x as remote or special paths, Python as folders of these names.
    """
    problems = []
    for name in PATHS:
        value = values[name].value
        for path in value if isinstance(value, list) else [value or '']:
            if not _text(path) or '\0' in path:
                problems.append(f'--{name} holds bytes that no name in UTF-8 text has; rename the folder')
            elif re.match(r'[A-Za-z][\w.+-]*://', path):
                problems.append(f'--{name}={path} is an address, and not a path in a file system of this machine; '
                                'mount what is there and give the path')
    if problems:
        raise UserError('; '.join(problems))


def check_flags(values: flags.FlagValues) -> None:
    """Refuses combinations of flags that make no sense.

    Raises:
        UserError: says which flags, why, and what to write.
    """
    request = Request(values)
    broken = [rule.message.format(**values.flag_values_dict()) for rule in RULES if rule.refused(request)]
    if broken:
        sentence = '; '.join(dict.fromkeys(broken))
        raise UserError(sentence + preset_hint(values, sentence))


def check_comparison(values: flags.FlagValues, names: list[str]) -> None:
    """Refuses flags, of those named, that cannot be combined with --compare or --across; raises UserError."""
    wanted = 'compare' if values.across is None else 'across'
    others = [name for name in names if values[name].present and name not in (wanted, 'plot', 'format', 'plot_format')]
    if others:
        raise UserError(f'--{others[0]} means nothing to --{wanted}, which takes folders, --plot, --plot_format and --format')


def _text(value):
    """Whether a flag's value is text that can be encoded."""
    try:
        return value.encode() is not None
    except UnicodeEncodeError:
        return False


def _all_different(listed):
    names = [name.strip() for name in listed.split(',')]
    return all(names) and len(set(names)) == len(names)


def _only_with(names: list[str], condition: Callable[[Request], bool], message: str) -> list[Rule]:
    """One rule for each of some flags: it is refused unless a condition holds."""
    return [Rule(lambda r, name=name: r.given(name) and not condition(r), f'--{name} {message}') for name in names]


def _only_pretrains(r: Request) -> bool:
    return r.baseline == 'oracle' or r.pretrain_iterations > 0 and r.metatrain_iterations == 0


def _needs(r: Request, name: str) -> bool:
    return r.mode == 'predict' and not r.values[name].value


RULES = [
    Rule(lambda r: not r.logdir, '--logdir must name a folder'),
    Rule(lambda r: r.load_from == '', '--load_from must name a checkpoint'),
    Rule(lambda r: r.run is not None and r.given('method'), '--run names a run, whose method is known: leave out --method'),
    Rule(lambda r: r.run is not None and r.given('logdir'), '--run names the directory of a run: leave out --logdir'),
    Rule(lambda r: r.meta_batch_size * r.update_batch_size > 10 ** 9,
         '--meta_batch_size={meta_batch_size} times --update_batch_size={update_batch_size} is more examples than memories hold'),
    # Data
    Rule(lambda r: r.baseline not in (None, 'None', 'oracle'), "--baseline={baseline}: the only baseline is 'oracle'"),
    Rule(lambda r: r.baseline == 'oracle' and 'oracle' not in r.source.baselines,
         '--baseline=oracle needs the amplitude and phase of a sinusoid, which {datasource} does not have'),
    Rule(lambda r: r.data_path is not None and not (r.images or r.tables),
         '--data_path is a folder of images or tables, but {datasource} has no data on disk'),
    Rule(lambda r: (r.user_images or r.tables) and not r.data_path and r.mode != 'predict',
         '--datasource={datasource} needs --data_path, the folder of your data'),
    Rule(lambda r: r.images and r.source.test_only and r.mode == 'train',
         '--datasource={datasource} has no classes to train on: evaluate a model of another source on it, by --run=DIR or '
         '--train_datasource, with --train=False and --test_set=True'),
    Rule(lambda r: r.images and r.source.test_only and r.mode == 'evaluate' and not r.test_set,
         '--datasource={datasource} has classes for meta-test only: add --test_set=True'),
    *_only_with(['skip_bad_images', 'verify'], lambda r: r.images, 'is for sources of images'),
    *_only_with(['targets', 'support_csv', 'query_csv'], lambda r: r.tables, 'is for --datasource=table'),
    Rule(lambda r: bool(r.targets) and not _all_different(r.targets), '--targets={targets} must name columns, separated by commas, each once'),
    *_only_with(['image_size', 'image_channels', 'rotations', 'split'], lambda r: r.user_images, 'is for --datasource=folder'),
    Rule(lambda r: not re.fullmatch(r'[1-9]\d*/[1-9]\d*/[1-9]\d*', r.split),
         '--split={split} must be three positive whole numbers like 64/16/20'),
    Rule(lambda r: r.user_images and r.max_pool and r.conv and r.image_size < 16,
         '--image_size={image_size}: four times 2x2 pooling needs at least 16'),
    Rule(lambda r: r.user_images and r.image_size > 1024,
         '--image_size={image_size}: tasks of images of more than 1024x1024 pixels do not fit in memory'),
    Rule(lambda r: r.classes and r.num_classes < 2, '--num_classes={num_classes}: a task needs at least 2 classes'),
    Rule(lambda r: r.test_query == 0, '--test_query must be at least 1'),
    Rule(lambda r: r.given('format'), '--format is for --compare and --across'),
    # Network
    *(Rule(lambda r, name=name: not r.images and r.values[name].value != r.values[name].default,
           f'--{name} is for networks of images: leave it out') for name in ('max_pool', 'num_filters')),
    Rule(lambda r: r.hidden is not None and r.images and r.conv,
         '--hidden is for fully connected networks: add --conv=False, or leave it out (--num_filters is for convolutions)'),
    Rule(lambda r: r.hidden is not None and not re.fullmatch(r'[1-9]\d{0,5}(,[1-9]\d{0,5})*', r.hidden),
         '--hidden={hidden} must be sizes of layers separated by commas, like 40,40'),
    # Method
    Rule(lambda r: r.norm_scale and r.norm != 'batch_norm', '--norm_scale is for batch norm: with --norm={norm} leave it out'),
    *(Rule(lambda r, name=name: r.values[name].value and r.norm == 'None', f'--{name} needs a normalisation, and --norm=None has none')
      for name in ('adapt_norm', 'norm_per_step')),
    Rule(lambda r: r.mean_loss and not r.classes, '--mean_loss is about classification; the loss of {datasource} is a mean already'),
    Rule(lambda r: r.given('schedule_interval') and not (r.multi_step_loss or r.first_order_iterations or r.meta_lr_schedule != 'constant'),
         '--schedule_interval needs a schedule: --multi_step_loss, --first_order_iterations or --meta_lr_schedule'),
    Rule(lambda r: r.meta_lr_final < 0 and r.meta_lr_final != -1, '--meta_lr_final must not be negative'),
    Rule(lambda r: r.meta_lr_final != -1 and r.meta_lr_schedule == 'constant', '--meta_lr_final needs --meta_lr_schedule=linear or cosine'),
    *(Rule(lambda r, name=name: r.mode == 'train' and r.values[name].value != r.values[name].default and _only_pretrains(r),
           f'--{name}={{{name}}} is about meta-training, and there are no iterations of it: leave it out')
      for name in ('meta_lr_schedule', 'multi_step_loss', 'first_order_iterations', 'learn_lr', 'outer')),
    Rule(lambda r: r.stop_grad and r.first_order_iterations > 0,
         '--stop_grad is first order in all iterations: leave out --first_order_iterations'),
    Rule(lambda r: r.recompute and r.engine in ('vmap', 'wide'), '--recompute loops over the inner steps of one task at a time: leave out --engine={engine}'),
    *(Rule(lambda r, name=name, plain=plain: r.outer == 'reptile' and r.values[name].value != plain,
           f'--{name} is about a gradient through the inner loop, and --outer=reptile takes none: leave it out')
      for name, plain in (('stop_grad', False), ('first_order_iterations', 0), ('multi_step_loss', 0), ('learn_lr', 'no'))),
    Rule(lambda r: r.outer == 'reptile' and r.mode == 'train' and r.query_norm != 'batch',
         '--outer=reptile learns from support examples alone: --query_norm is for its evaluation'),
    Rule(lambda r: r.inner_optimizer == 'adam' and r.outer == 'gradient',
         '--inner_optimizer=adam needs --outer=reptile: there is no gradient through Adam'),
    Rule(lambda r: r.ensemble > 1 and r.mode != 'train' and bool(r.load_from),
         '--ensemble={ensemble} takes the checkpoints of a run, and --load_from names one: give one'),
    *(Rule(lambda r, name=name: r.ensemble > 1 and r.mode != 'train' and r.given(name),
           f'--ensemble={{ensemble}} and --{name} name different checkpoints: give one, or --ensemble=1') for name in ('test_iter', 'test_best')),
    Rule(lambda r: r.test_updates == 0, '--test_updates must be at least 1'),
    Rule(lambda r: r.given('test_updates') and r.mode == 'train', '--test_updates is for evaluation: add --train=False'),
    # Training
    *(Rule(lambda r, name=name: not math.isfinite(r.values[name].value), f'--{name} must be a finite number')
      for name in ('meta_lr', 'meta_lr_final', 'update_lr', 'train_update_lr')),
    Rule(lambda r: r.mode == 'train' and r.pretrain_iterations + r.metatrain_iterations == 0,
         'there is nothing to train: --pretrain_iterations and --metatrain_iterations are both 0'),
    Rule(lambda r: bool(r.task_chunk) and r.meta_batch_size % r.task_chunk != 0,
         '--task_chunk={task_chunk} must divide --meta_batch_size={meta_batch_size}'),
    Rule(lambda r: r.mode == 'train' and not r.resume and r.test_iter != -1,
         '--resume=False starts from scratch, and --test_iter continues from a checkpoint: give one'),
    # Evaluation
    Rule(lambda r: r.train_datasource is not None and r.mode != 'evaluate', '--train_datasource is for evaluation: add --train=False'),
    Rule(lambda r: r.train_datasource is not None and not (r.images and SOURCES[r.train_datasource].image_shape),
         '--train_datasource={train_datasource}, --datasource={datasource}: both must be sources of images'),
    Rule(lambda r: r.resize and r.train_datasource in (None, r.datasource),
         '--resize is for the evaluation of a model of another source: add --train_datasource, or --run=DIR and --datasource'),
    Rule(lambda r: r.train_update_batch_size == 0, '--train_update_batch_size must be at least 1'),
    *_only_with(['train_update_batch_size', 'train_update_lr', 'train_inner_batch', 'train_query_norm'], lambda r: r.mode != 'train',
                'is for evaluation: add --train=False'),
    Rule(lambda r: r.mode != 'train' and r.learn_lr != 'no' and r.train_update_lr not in (-1, r.update_lr),
         '--update_lr={update_lr}: the step sizes of this model are learned, and an evaluation cannot change them'),
    Rule(lambda r: r.train_num_classes in (0, 1), '--train_num_classes must be at least 2'),
    Rule(lambda r: r.train_update_lr < 0 and r.train_update_lr != -1, '--train_update_lr must not be negative'),
    Rule(lambda r: r.train_num_classes != -1 and (r.mode == 'train' or not r.classes),
         '--train_num_classes is for the evaluation of a classifier: add --train=False'),
    Rule(lambda r: -1 < r.train_num_classes < r.num_classes,
         '--num_classes={num_classes}: a network trained with --train_num_classes={train_num_classes} has no more outputs than '
         'that; evaluate on tasks of at most that many classes'),
    Rule(lambda r: r.query_norm == 'both' and r.mode == 'train', '--query_norm=both is for evaluation: add --train=False'),
    Rule(lambda r: r.query_norm != 'batch' and r.norm != 'batch_norm',
         '--query_norm={query_norm} applies only to batch norm; with --norm={norm} each example is normalised separately'),
    Rule(lambda r: r.test_best and r.mode == 'train', '--test_best is for evaluation: add --train=False'),
    *(Rule(lambda r, one=one, other=other: r.given(one) and r.given(other),
           f'--{one} and --{other} name different checkpoints: give one')
      for one, other in (('test_best', 'test_iter'), ('test_best', 'load_from'), ('test_iter', 'load_from'))),
    # Prediction
    *(Rule(lambda r, name=name: not r.tables and _needs(r, name), f'--predict needs --{name}, a folder of images')
      for name in ('support_dir', 'query_dir')),
    *(Rule(lambda r, name=name: r.tables and _needs(r, name), f'--predict needs --{name}, a csv file')
      for name in ('support_csv', 'query_csv')),
    *(Rule(lambda r, name=name: r.mode != 'predict' and bool(r.values[name].value), f'--{name} is for --predict')
      for name in ('support_dir', 'query_dir', 'support_csv', 'query_csv')),
    *(Rule(lambda r, name=name: r.tables and bool(r.values[name].value), f'--{name} is for images, and --datasource={{datasource}} has none')
      for name in ('support_dir', 'query_dir')),
    Rule(lambda r: r.mode == 'predict' and not (r.images or r.tables),
         '--predict is for images and tables, and --datasource={datasource} has none'),
    Rule(lambda r: r.mode == 'predict' and r.strategy not in ('auto', 'one'),
         '--predict runs on one device: leave out --strategy'),
    Rule(lambda r: r.mode == 'predict' and r.query_norm == 'both', '--predict needs one --query_norm: batch, support or each'),
]
