"""From flags to a Run: what the command line asks for, with every default resolved."""
import dataclasses
import glob
import math
import os
import re
from typing import Any

from absl import flags

from data_generator import SOURCES, TableSource
from runtime.cli.flags import FLAGS, GROUPS, LEARNING, labels, names
from runtime.cli.methods import switches, title
from runtime.cli.rules import mode
from runtime.compute.distribution import Replicas
from runtime.datasets.images import BadImages
from runtime.datasets.tables import COLUMNS_FILE, Tables, read_columns, write_columns
from runtime.datasets.tasks import Source, TaskConfig, Tasks
from runtime.system.errors import UserError, first_line
from runtime.system.files import write_atomically

FLAG_FILE = 'run.flags'  # in a run's directory: the flags that describe the run, for --run
DESCRIBING_GROUPS = ('Data', 'Training', 'Method', 'Network')  # the groups of flags that FLAG_FILE holds
TEST_UPDATES = 10  # inner updates of an evaluation, if no flag asks for others
# The flags in which an evaluation may differ from the training, and those that state the training's values.
TRAINED_WITH = {name: f'train_{name}' for name in ('num_classes', 'update_batch_size', 'update_lr', 'inner_batch', 'query_norm',
                                                    'datasource')}
IN_DIRECTORY_NAME = 'num_classes', 'update_batch_size', 'update_lr'  # of these, before the labels
OF_IMAGES = ('image_size', 'image_channels', 'rotations', 'split')  # flags that describe one's own images


@dataclasses.dataclass(frozen=True)
class Run:
    """What the command line asks for. Fields are named like the flags."""
    datasource: str
    source: Source              # the entry of SOURCES
    trained_on: str             # the datasource of the training, if that was another
    tasks: TaskConfig
    model: Any                  # maml.ModelConfig
    replicas: Replicas
    query_norms: tuple[str, ...]  # to evaluate with, of 'batch', 'support', 'each'
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
    checkpoint: int | str | None  # what to load: an iteration, 'best' (on meta-validation), or None for the newest
    load_from: str | None    # prefix of a checkpoint elsewhere
    ensemble: int               # checkpoints whose mean outputs are evaluated, and which a training keeps
    split: str                  # what to evaluate: 'val' | 'test'
    num_test_tasks: int
    test_updates: int           # inner updates of an evaluation
    headline_updates: int       # the number of updates at which the method is reported
    plot: bool
    plot_format: str            # 'png' | 'pdf' | 'svg'
    method: str                 # for tables and pictures
    flag_values: dict[str, Any]     # {flag: value} of all flags
    learning_flags: dict[str, Any]  # of those that determine what is learnt: the identity of the run
    network_flags: dict[str, Any]   # of those among them by which networks for this source differ

    @property
    def iterations(self) -> int:
        """Of pre-training and meta-training together."""
        return self.pretrain_iterations + self.metatrain_iterations

    @property
    def regime(self) -> str:
        """The last phase of the training: 'metatrain' or 'pretrain'."""
        return 'metatrain' if self.metatrain_iterations else 'pretrain'

    @property
    def worker_flags(self) -> dict[str, Any]:
        """The flags that the workers of a run must have in common: all but names of folders."""
        folders = 'logdir', 'data_path', 'load_from', 'run'
        return {name: value for name, value in self.flag_values.items() if name not in folders}

    @property
    def metric(self) -> str:
        """What is reported: 'accuracy' in classification, 'loss' in regression."""
        return 'accuracy' if self.model.loss == 'xent' else 'loss'

    @property
    def description(self) -> str:
        """Text: the kind of task, such as 5-way 1-shot omniglot."""
        way = f'{self.tasks.num_classes}-way ' if self.model.loss == 'xent' else ''
        return f'{way}{self.tasks.update_batch_size}-shot {self.datasource}'

    def write_description(self) -> None:
        """Writes the flags that describe the run into its directory, for --run, and the columns of tables.

        If the former fails, reports it and continues.

        Raises:
            UserError: the columns cannot be written, without which the model cannot be used.
        """
        if isinstance(self.source, TableSource):
            try:
                write_columns(self.directory, self.source.files.columns)
            except OSError as error:
                raise UserError(f'the columns cannot be written to {self.directory}: {error.strerror}') from error
        path = os.path.join(self.directory, FLAG_FILE)
        lines = [f'--{name}={self.flag_values[name]}' for name in _describing_flags()
                 if self.flag_values[name] != FLAGS[name].default]
        try:
            write_atomically(path, ''.join(line + '\n' for line in lines).encode())
        except OSError as error:
            print(f'{path}, for --run, cannot be written: {error.strerror}')


def run_from_flags(values: flags.FlagValues, source: Source, tasks: TaskConfig, replicas: Replicas | None = None) -> Run:
    """The Run that the flags describe, on the data that `data_from_flags` made from them. Imports TensorFlow."""
    query_norm = _query_norm(values)
    pretrain_iterations, metatrain_iterations = _iterations(values)
    model = _model_config(values, source, tasks, query_norm)
    network = network_flags(values, SOURCES[trained_with(values, 'datasource')])
    training = {name: trained_with(values, name) for name, declared in LEARNING.items() if not declared.network}
    if values.meta_lr_schedule != 'constant':
        training['metatrain_iterations'] = values.metatrain_iterations  # the step size of each iteration depends on it
    return Run(
        datasource=values.datasource, source=source, trained_on=trained_with(values, 'datasource'),
        tasks=tasks, model=model, replicas=replicas or Replicas(),
        query_norms=('batch', 'support') if query_norm == 'both' else (query_norm,),
        num_outputs=trained_with(values, 'num_classes') if source.loss == 'xent' else model.dim_output,
        directory=_directory(values),
        pretrain_iterations=pretrain_iterations, metatrain_iterations=metatrain_iterations,
        meta_batch_size=values.meta_batch_size, resume=values.resume, save_interval=values.save_interval,
        skip_nonfinite=values.skip_nonfinite, log=values.log, mode=mode(values),
        checkpoint='best' if values.test_best else {-1: None}.get(values.test_iter, values.test_iter),
        load_from=values.load_from and os.path.expanduser(values.load_from).removesuffix('.index'), ensemble=values.ensemble,
        split='test' if values.test_set else 'val', num_test_tasks=values.num_test_tasks, plot=values.plot,
        test_updates=usual_updates(values.num_updates) if values.test_updates == -1 else values.test_updates,
        headline_updates=headline_updates(values.num_updates, values.test_updates), plot_format=values.plot_format,
        method=tasks.baseline or _method(values),
        flag_values={name: values[name].value for name in names()},
        learning_flags={**network, **training}, network_flags=network)


def usual_updates(num_updates: int) -> int:
    """Inner updates of an evaluation, if no flag asks for others, of a model trained with num_updates."""
    return max(num_updates, TEST_UPDATES)


def headline_updates(num_updates: int, test_updates: int) -> int:
    """The number of inner updates at which a method is reported: --test_updates if it is set, else --num_updates."""
    return num_updates if test_updates == -1 else test_updates


def _directory(values):
    return run_directory(values) or os.path.join(os.path.expanduser(values.logdir), experiment_name(values, _pretrain_only(values)))


def _pretrain_only(values):
    pretrain_iterations, metatrain_iterations = _iterations(values)
    return pretrain_iterations > 0 and metatrain_iterations == 0


def _method(values):
    return 'pre-training' if _pretrain_only(values) else title({name: trained_with(values, name) for name in switches()})


def _model_config(values, source, tasks, query_norm):
    """The ModelConfig: fields that have a flag of the same name get its value, the source decides the others."""
    from maml import ModelConfig
    same = {field.name: values[field.name].value for field in dataclasses.fields(ModelConfig) if field.name in values}
    return ModelConfig(**{
        **same, 'query_norm': query_norm, 'task_chunk': values.task_chunk or None,
        'dim_input': source.dim_input(tasks), 'dim_output': source.dim_output(tasks), 'loss': source.loss, 'head': source.head,
        'clip': source.clip, 'dim_hidden': _hidden(values) or source.dim_hidden, 'image_shape': source.image_shape if values.conv else None})


def _hidden(values):
    return tuple(map(int, values.hidden.split(','))) if values.hidden else ()


def _query_norm(values):
    """The value of --query_norm, or else what the model was trained with.

    Predictions default to 'support': the images may be any number, of any classes.
    """
    if values['query_norm'].present:
        return values.query_norm
    return 'support' if values.predict else trained_with(values, 'query_norm')


def _iterations(values):
    """Iterations of pre-training and of meta-training."""
    if values.baseline == 'oracle':
        # Reference behaviour: the oracle is trained jointly, also in iterations asked for as meta-training.
        return values.pretrain_iterations + values.metatrain_iterations, 0
    return values.pretrain_iterations, values.metatrain_iterations


def data_from_flags(values: flags.FlagValues) -> tuple[Source, TaskConfig]:
    """The source, an entry of SOURCES (changed by flags for the user's own images or tables), and what its tasks look like."""
    source = _with_flags(SOURCES[values.datasource], values)
    if trained_with(values, 'datasource') != values.datasource:
        source = _with_network_of(trained_with(values, 'datasource'), source, values)
    if source.image_shape:
        source = dataclasses.replace(source, skip_bad_images=values.skip_bad_images, verify=values.verify)
    if source.image_shape and source.user_images and mode(values) != 'predict':
        _refuse_runs_among_classes(values, source)
    train = mode(values) == 'train'
    query_shots = -1 if train else values.test_query
    return source, TaskConfig(
        num_classes=values.num_classes,
        update_batch_size=values.update_batch_size,
        query_shots=source.query_shots(values.update_batch_size, train) if query_shots == -1 else query_shots,
        seed=values.test_seed if mode(values) == 'evaluate' else values.seed,
        baseline='oracle' if values.baseline == 'oracle' else None,
        data_path=values.data_path and os.path.expanduser(values.data_path))


def _refuse_runs_among_classes(values, source):
    """Raises UserError if the run's directory would be one of the class folders that are to be split."""
    folders, directory = source.folders(os.path.expanduser(values.data_path or '.')), _directory(values)
    root = os.path.realpath(folders.root)
    if os.path.commonpath([root, os.path.realpath(directory)]) == root and folders.unsplit():
        raise UserError(f'the directory of the run, {directory}, is in --data_path={values.data_path}, where each folder is a class; '
                        'give another --logdir')


def missing_classes(values: flags.FlagValues, split: str) -> str:
    """'', or why a split's classes of images cannot be listed, as where the data are not prepared; reads no image."""
    try:
        source, tasks = data_from_flags(values)
        if source.image_shape:
            source.folders(tasks.data_path).names(split)
    except UserError as error:
        return str(error)
    return ''


def _with_flags(source, values):
    """A source as the flags change it, if its data are the user's own."""
    if isinstance(source, TableSource):
        known = _known_columns(values)
        root = os.path.expanduser(values.data_path or '')
        return dataclasses.replace(source, files=Tables(root, target_names(values), known))
    if not source.image_shape or not source.user_images:
        return source
    return dataclasses.replace(
        source, image_shape=(values.image_size, values.image_size, int(values.image_channels)), rotations=values.rotations,
        split_ratios=tuple(map(int, values.split.split('/'))), split_given=values['split'].present)


def _known_columns(values):
    """The columns of tables that the model was trained with; None if a training starts from scratch.

    Raises:
        UserError: they cannot be read, or are not beside the checkpoint that --load_from names.
    """
    directory = _directory(values)
    # Not `checkpoints.iterations`: data are read before TensorFlow is imported.
    started = values.resume and glob.glob(os.path.join(glob.escape(directory), 'model*.index'))
    if values.load_from and (mode(values) != 'train' or not started):
        folder = os.path.dirname(os.path.expanduser(values.load_from)) or '.'
        known = read_columns(folder)
        if known is None:
            raise UserError(f'there is no {COLUMNS_FILE} in {folder}, which says what the columns of the model of --load_from are, and how '
                            'they are scaled; copy it there from the directory of its training')
        return known
    return read_columns(directory) if mode(values) != 'train' or started else None


def _with_network_of(trained_on, source, values):
    """A source whose tasks are given to a model of another source, with that model's network.

    Raises:
        UserError: their images differ in shape, and --resize does not ask to change it.
    """
    other = _with_flags(SOURCES[trained_on], values)
    source = dataclasses.replace(source, head=other.head, clip=other.clip)
    if other.image_shape == source.image_shape:
        return source
    if other.image_shape and values.resize:
        return dataclasses.replace(source, image_shape=other.image_shape, stored_shape=source.image_shape)
    there, here = ('x'.join(map(str, shape or ['no images'])) for shape in (other.image_shape, source.image_shape))
    raise UserError(f'a model of {trained_on} ({there}) cannot be evaluated on {values.datasource} ({here}): their images '
                    f'differ in shape; --resize makes those of {values.datasource} fit')


def read_data(source: Source, tasks: TaskConfig, mode: str, split: str) -> dict[str, Tasks]:
    """{split: tasks}: for training those of train and val, else those of `split`.

    Before a training the images of the test split are read as well, if there are any: a bad one should not be found after it.

    Raises:
        BadImages: images of any of these splits cannot be used.
        UserError: the data are not there or do not suffice.
    """
    wanted = ['train', 'val'] if mode == 'train' else [split]
    data, bad, hint = {}, [], ''
    for name in [*wanted, 'test'] if mode == 'train' and source.image_shape else wanted:
        try:
            data[name] = source.tasks(_validation_config(source, tasks) if (mode, name) == ('train', 'val') else tasks, name)
        except BadImages as error:
            bad, hint = bad + error.images, error.hint
        except UserError:
            if name in wanted:  # a training needs no test split, and not one that suffices
                raise
    if bad:
        raise BadImages(bad, hint)
    return {name: data[name] for name in wanted}


def _validation_config(source, tasks):
    """What a validation task of a training looks like: like those of the training, or with all classes if the split has fewer.

    Published splits cannot be changed: DoubleMNIST, which is trained 20-way, has 16 classes to validate on. Users can split their
    own images again.
    """
    if not (source.image_shape and source.validate_on_fewer):
        return tasks
    there = len(source.class_folders('val', tasks.data_path))
    return dataclasses.replace(tasks, num_classes=there) if 1 < there < tasks.num_classes else tasks


def record_split(source: Source, tasks: TaskConfig, data: dict[str, Tasks]) -> None:
    """Writes down how the user's class folders are split, now that flags and checkpoints are known to fit them.

    Raises:
        UserError: they are not those that `data`, from `read_data`, was read from, or it cannot be written.
    """
    if source.image_shape and source.user_images:
        source.folders(tasks.data_path).record_split({split: of.classes.names for split, of in data.items()})


def network_flags(values: flags.FlagValues, source: Source) -> dict[str, Any]:
    """{flag: value} of the flags by which networks for this source differ."""
    images, tables = source.image_shape is not None, isinstance(source, TableSource)
    applies = {'all': True, 'regression': not images, 'images': images, 'convolutions': images and values.conv,
               'classes': images or (tables and not target_names(values)), 'tables': tables,
               'user images': images and source.user_images, None: False}
    network = {name: trained_with(values, name) for name, declared in LEARNING.items() if applies[declared.network]}
    return {name: None if value == 'None' and name != 'norm' else value for name, value in network.items()}


def target_names(values: flags.FlagValues) -> tuple[str, ...]:
    """The columns that --targets names."""
    return tuple(name.strip() for name in values.targets.split(',')) if values.targets else ()


def trained_with(values: flags.FlagValues, name: str) -> Any:
    """What a flag was in training: the value of --train_<name>, if there is one and it is given, or of the flag itself."""
    if name == 'query_norm':  # in an evaluation, it says how to evaluate
        return values.query_norm if mode(values) == 'train' else values.train_query_norm
    trained = values[TRAINED_WITH[name]].value if name in TRAINED_WITH else None
    return values[name].value if trained in (-1, None) else trained


def experiment_name(values: flags.FlagValues, pretrain_only: bool) -> str:
    """The experiment directory's name, which states the hyper-parameters as the reference's does."""
    way, shot, rate = (trained_with(values, name) for name in IN_DIRECTORY_NAME)
    # Not in the reference, where the pre-training baseline shares a directory with MAML and resumes MAML's checkpoint.
    suffix = 'pretrain' if pretrain_only and values.baseline != 'oracle' else ''
    trained_on = SOURCES[trained_with(values, 'datasource')]
    # In an evaluation of a model of another source, the flags of one's own images are about the tasks.
    own_images = trained_on.image_shape and trained_on.user_images
    named = {name: trained_with(values, name) if own_images or name not in OF_IMAGES else values[name].default for name in LEARNING}
    return (f'cls_{way}.mbs_{values.meta_batch_size}.ubs_{shot}.numstep{values.num_updates}.updatelr{rate}' + labels(named) + suffix)


def find_query_norm(values: flags.FlagValues) -> None:
    """Sets --train_query_norm if --query_norm repeats the training's.

    The command of a training with --query_norm=support, repeated with --train=False, means that run, unless there is only one
    that was trained without.

    Raises:
        UserError: there are both.
    """
    if mode(values) == 'train' or values.run or values['train_query_norm'].present or values.query_norm not in ('support', 'each'):
        return
    found = {}
    for norm in 'batch', values.query_norm:
        values.train_query_norm = norm
        path = os.path.join(os.path.expanduser(values.logdir), experiment_name(values, _pretrain_only(values)))
        found[norm] = os.path.isdir(path)
    if all(found.values()):
        raise UserError(f'--query_norm={values.query_norm}: two such runs are in {values.logdir}, one trained with it and one with '
                        f'--query_norm=batch; say which by --train_query_norm={values.query_norm} or --train_query_norm=batch')
    values.train_query_norm = values.query_norm if found[values.query_norm] else 'batch'


# --run=DIR ----------------------------------------------------------------------------------------------------------

def _describing_flags():
    return [*(name for group in DESCRIBING_GROUPS for name in GROUPS[group] if name != 'method'), 'test_updates']


def run_directory(values: flags.FlagValues) -> str | None:
    """The experiment directory that --run names: DIR itself, or the only one in it; None without --run.

    Raises:
        UserError: there is none, or more than one.
    """
    if values.run is None:
        return None
    directory = os.path.expanduser(values.run)
    if os.path.isfile(os.path.join(directory, FLAG_FILE)):
        return os.path.normpath(directory)
    if not os.path.isdir(directory):
        raise UserError(f'--run={values.run}: there is no such folder')
    found = sorted(entry.path for entry in os.scandir(directory) if os.path.isfile(os.path.join(entry.path, FLAG_FILE)))
    if len(found) == 1:
        return os.path.normpath(found[0])
    what = f'holds {len(found)} runs ({", ".join(map(os.path.basename, found))}): name one' if found else (
        f'holds no {FLAG_FILE}, which trainings write: give the flags of the training instead')
    raise UserError(f'--run={values.run} {what}')


def apply_run(values: flags.FlagValues) -> None:
    """Sets the flags that --run=DIR describes, except those given on the command line.

    For an evaluation on other tasks than those of the training (--num_classes, --update_batch_size, --update_lr, --datasource),
    the --train_ flags are set too.

    Raises:
        UserError: the run's file of flags cannot be read, or flags on the command line contradict what was learnt.
    """
    directory = run_directory(values)
    if directory is None:
        return
    stored = _read_flag_file(os.path.join(directory, FLAG_FILE), values)
    # Whether the tasks are those of another source than the training's.
    elsewhere = (mode(values) != 'train' and values['datasource'].present and
                 values.datasource != stored.get('datasource', values['datasource'].default))
    contradictions = []
    if mode(values) != 'train' and not values['train_query_norm'].present:
        values.train_query_norm = stored.get('query_norm', 'batch')
    for name in _describing_flags():
        if elsewhere and name == 'data_path':  # the run's is the folder of the training's images
            continue
        value = stored.get(name, values[name].default)
        if not values[name].present:
            values[name].value = value
        elif name in LEARNING and values[name].value != value and not _may_differ(values, name, value, elsewhere):
            contradictions.append(f'--{name}={values[name].value} contradicts --{name}={value}')
    if contradictions:
        raise UserError(f'{", ".join(contradictions)}, with which the run in {directory} was trained; leave out the former')


def _may_differ(values, name, trained, elsewhere):
    """Whether a flag of an evaluation may differ from the training's; then --train_<name>, if there is one, is set."""
    if mode(values) != 'train' and name in TRAINED_WITH:
        if not values[TRAINED_WITH[name]].present:
            values[TRAINED_WITH[name]].value = trained
        return True
    return elsewhere and name in OF_IMAGES


def _read_flag_file(path: str, values: flags.FlagValues) -> dict[str, Any]:
    """{flag: value} of a file of flags that a training wrote."""
    try:
        with open(path, encoding='utf-8') as file:
            pairs = [re.fullmatch(r'--(\w+)=(.*)', line) for line in file.read().splitlines() if line.strip()]
        return {pair[1]: _parsed(values, pair[1], pair[2]) for pair in pairs}
    except (OSError, ValueError, TypeError, KeyError, flags.Error) as error:
        raise UserError(f'{path} cannot be read, or no training wrote it ({first_line(error)}); give the flags of the training '
                        'instead of --run') from error


def _parsed(values, name, text):
    if name not in _describing_flags():
        raise ValueError(f'--{name} does not describe a run')
    value = values[name].parser.parse(text)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'--{name}={text}')
    return value
