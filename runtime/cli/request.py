"""What the command line asks for: each flag as given, or else as --run=DIR or --method has it, or else its default."""
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from data_generator import SOURCES, TableSource
from runtime.cli import methods, network_file, stored_run
from runtime.cli.flags import BUILT_IN_NETWORKS, LEARNING, ONLY, CommandLine, labels
from runtime.cli.network_file import NetworkFile
from runtime.datasets.tasks import Source
from runtime.system.errors import UserError

# In what an evaluation may differ from the training: its tasks, and how the model adapts to them. 'train_<name>', where there is
# such a flag, states the training's value.
OF_TASKS = 'datasource', 'split', 'num_classes', 'update_batch_size', 'update_lr', 'inner_batch', 'query_norm'
STATED = 'update_batch_size', 'update_lr'
OF_IMAGES = 'image_size', 'image_channels', 'rotations'  # the same, if the tasks are of another source: one's own images


@dataclasses.dataclass(frozen=True)
class Request:
    """The flags, with --run and --method resolved, and what follows from them. The values of flags are attributes too."""
    mode: str                       # 'train' | 'evaluate' | 'predict'
    values: Mapping[str, Any]       # {flag: value} for this training, evaluation or prediction
    trained: Mapping[str, Any]      # {flag: value} in the training of the run; in a training the same
    given: frozenset[str]           # the flags on the command line
    run_directory: str | None       # that --run names
    # {flag: value} of --method that have no meaning for the source or network
    dropped: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    network_file: NetworkFile | None = None  # that --network names, or its copy in the run's directory

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__['values'][name]
        except KeyError as error:
            raise AttributeError(name) from error

    @property
    def source(self) -> Source:
        """The entry of SOURCES."""
        return SOURCES[self.datasource]

    @property
    def images(self) -> bool:
        """Whether the source has images."""
        return self.source.image_shape is not None

    @property
    def user_images(self) -> bool:
        """Whether these are the user's own."""
        return self.images and self.source.user_images

    @property
    def tables(self) -> bool:
        """Whether the source has tables."""
        return isinstance(self.source, TableSource)

    @property
    def own_data(self) -> bool:
        """Whether the data are the user's own."""
        return self.user_images or self.tables

    @property
    def group_column(self) -> str | None:
        """The column of tables that has the label or the task of each line."""
        return self.label_column or self.task_column

    @property
    def classes(self) -> bool:
        """Whether tasks are classification tasks."""
        return self.images or (self.tables and not self.targets)

    @property
    def computes_head(self) -> bool:
        """Whether the last layer is computed for each task, so that the model takes any number of classes."""
        return self.head_init != 'learned'

    @property
    def is_transfer(self) -> bool:
        """Whether the tasks are those of another source than the training's."""
        return self.datasource != self.trained['datasource']

    @property
    def iterations(self) -> tuple[int, int]:
        """Iterations of pre-training and of meta-training."""
        if self.baseline == 'oracle':
            # Reference behaviour: the oracle is trained jointly, also in iterations asked for as meta-training.
            return self.pretrain_iterations + self.metatrain_iterations, 0
        return self.pretrain_iterations, self.metatrain_iterations

    @property
    def only_pretrains(self) -> bool:
        """Whether there is joint training, and no meta-training."""
        return self.iterations[0] > 0 and self.iterations[1] == 0

    @functools.cached_property
    def training(self) -> 'Request':
        """The request that the training of the run was."""
        return dataclasses.replace(self, values=self.trained)

    @property
    def learning_flags(self) -> dict[str, Any]:
        """{flag: value} of those that determine what is learnt: the identity of the run."""
        how = {name: self.trained[name] for name, declared in LEARNING.items() if not declared.network}
        if self.meta_lr_schedule != 'constant':
            how['metatrain_iterations'] = self.metatrain_iterations  # the step size of each iteration depends on it
        return {**self.network_flags, **how}

    @property
    def network_flags(self) -> dict[str, Any]:
        """{flag: value} of those that decide which network the training has: weights fit another run only if these agree."""
        applicable = {name: self.trained[name] for name, declared in LEARNING.items()
                      if declared.network == 'all' or declared.network and PURPOSES[declared.network][1](self.training)}
        return {name: None if value == 'None' and name != 'norm' else value for name, value in applicable.items()}

    @property
    def directory(self) -> str:
        """The experiment directory: that of --run, or the one in --logdir whose name states the hyper-parameters."""
        return self.run_directory or os.path.join(os.path.expanduser(self.logdir), self.experiment_name)

    @property
    def experiment_name(self) -> str:
        """The name of an experiment directory, which states the hyper-parameters as the reference's does."""
        way, shot, alpha = (self.trained[name] for name in ('num_classes', 'update_batch_size', 'update_lr'))
        # Not in the reference, where the pre-training baseline shares a directory with MAML and resumes MAML's checkpoint.
        suffix = 'pretrain' if self.only_pretrains and self.baseline != 'oracle' else ''
        stated = {**self.trained, 'norm': None} if self.network else self.trained  # a network of the user's has its own normalisation
        return f'cls_{way}.mbs_{self.meta_batch_size}.ubs_{shot}.numstep{self.num_updates}.updatelr{alpha}{labels(stated)}{suffix}'


# {what a flag can be for: (the text of '--x is for <text>', whether a request is that)}
PURPOSES: dict[str, tuple[str, Callable[[Request], bool]]] = {
    'supervised': ('learning from examples, and --datasource={datasource} is reinforcement learning', lambda r: r.source.supervised),
    'images': ('images, and --datasource={datasource} has none', lambda r: r.images),
    'user images': ('--datasource=folder', lambda r: r.user_images),
    'tables': ('--datasource=table', lambda r: r.tables),
    'own data': ('your own data, --datasource=folder or table', lambda r: r.own_data),
    'files': ('images and tables, and --datasource={datasource} has none', lambda r: r.images or r.tables),
    'numbers': ('sources without images', lambda r: not r.images),
    'classes': ('classification', lambda r: r.classes),
    'batch norm': ('batch norm: with --norm={norm} leave it out', lambda r: r.norm == 'batch_norm'),
    'normalisation': ('networks with a normalisation, and --norm=None has none', lambda r: r.norm != 'None'),
    'ridge': ('--head_init=ridge', lambda r: r.head_init == 'ridge'),
    'own networks': ('a network of your own: add --network', lambda r: bool(r.network)),
    'convolutions': ('convolutional networks', lambda r: r.images and r.conv),
    'fully connected': ('fully connected networks: add --conv=False, or leave it out (--num_filters is for convolutions)',
                        lambda r: not r.images or not r.conv),
    'evaluation': ('evaluation: add --train=False', lambda r: r.mode != 'train'),
    'scores': ('evaluation: add --train=False, and leave out --predict', lambda r: r.mode == 'evaluate'),
    'transfer': ('the evaluation of a model of another source: add --run=DIR and --datasource', lambda r: r.is_transfer),
    'prediction': ('--predict', lambda r: r.mode == 'predict'),
    'comparison': ('--compare and --across', lambda r: False),
}


def resolve(line: CommandLine) -> Request:
    """The request that a command line makes.

    With --run=DIR the flags are those of the training there. An evaluation may have other tasks; without --run, it is of the run
    whose training has the same flags. Raises UserError if the run's file of flags cannot be read, or flags on the command line
    contradict what was learnt.
    """
    directory = None if line.values['run'] is None else stored_run.find(line.values['run'])
    stored = stored_run.read(directory) if directory else {}
    preset = methods.settings(line.values['method'], line.values, line.given)
    dropped = _without_meaning(preset, line)
    values = {**line.values, **_usual_flags(line, stored), **_without(preset, dropped)}
    mode = 'predict' if values['predict'] else 'train' if values['train'] else 'evaluate'
    stated = {name: values[f'train_{name}'] for name in STATED if values[f'train_{name}'] != -1}
    network = _own_network(values)
    if directory is None:
        trained = values if mode == 'train' else {**values, **stated, 'query_norm': _query_norm_of_training(values)}
        return Request(mode, values, trained, line.given, None, dropped, network)
    if mode != 'train':
        _refuse_initial_weights(line, stored, directory)
    else:
        _refuse_meta_training(line, stored, directory)
    # The weights of --load_from are those that the training started from.
    values.update(_without(stored, {*line.given, *(['load_from'] if mode != 'train' else [])}))
    _forget_data(values, stored, line.given)
    learnt = {name: stored[name] for name in LEARNING}
    _refuse_contradictions(values, learnt, stated, directory, () if mode == 'train' else OF_TASKS)
    where = {name: stored[name] for name in ('data_path', 'split_file')}
    return Request(mode, values, {**values, **learnt, **where}, line.given, directory,
                   network_file=network or _own_network(values, directory))


def _query_norm_of_training(values):
    """No training has --query_norm=both, and Reptile's only the default."""
    return 'batch' if values['query_norm'] == 'both' or values['outer'] == 'reptile' else values['query_norm']


def _without(values, names):
    return {name: value for name, value in values.items() if name not in names}


def same_folder(*paths: str | None) -> bool:
    """Whether paths lead to the same folder."""
    return len({path and os.path.realpath(os.path.expanduser(path)) for path in paths}) == 1


def _usual_flags(line, stored):
    """{flag: value} of the source's own defaults, where the command line has none."""
    source = SOURCES[line.values['datasource'] if 'datasource' in line.given or not stored else stored['datasource']]
    return _without(source.usual_flags, line.given)


def _forget_data(values, stored, given):
    """Takes away the paths that are about the training's data, if the tasks are of others."""
    if values['datasource'] != stored['datasource'] and 'data_path' not in given:
        values['data_path'] = None
    if not same_folder(values['data_path'], stored['data_path']) and 'split_file' not in given:
        values['split_file'] = None
        if SOURCES[values['datasource']].image_shape and 'label_column' not in given:  # of the list
            values['label_column'] = None


def _without_meaning(preset, line):
    """{flag: value} of those flags of a --method that the source or the network of a command line has no use for. Raises UserError if
    nothing of the method would be left."""
    values = {**line.values, **_usual_flags(line, {})}
    request = Request('train', values, values, line.given, None)
    unmet = {name: [purpose for purpose in ONLY.get(name, ()) if not PURPOSES[purpose][1](request)]
             for name in preset if name in LEARNING}
    dropped = {name: value for name, value in preset.items() if unmet.get(name) or request.network and name in BUILT_IN_NETWORKS}
    switches = preset.keys() & methods.switches()
    if switches and switches <= dropped.keys():
        reason = next(text for purpose, (text, _) in PURPOSES.items() if any(purpose in unmet[name] for name in switches))
        raise UserError(f'--method={request.method} is for {reason.format_map(values)}')
    return dropped


def _own_network(values, directory=None):
    """The network of one's own that --network names, or its copy in a run's directory; None if there is none. In the values, its
    identity takes the place of what names it."""
    if not values['network']:
        return None
    network = (network_file.read_copy(directory, values['network'], values['trust_network']) if directory else
               network_file.read(values['network']))
    values['network'] = network.identity
    return network


def _refuse_initial_weights(line, stored, directory):
    """Refuses --test_iter=0 of a run that started from other weights."""
    if line.values['test_iter'] == 0 and stored['load_from'] and 'load_from' not in line.given:
        raise UserError(f'--test_iter=0: the run in {directory} did not start from initial weights; evaluate those that it started from by '
                        f'--load_from={stored["load_from"]}')


def _refuse_meta_training(line, stored, directory):
    """Refuses to go on with meta-training where a run, whose directory is named so, only pre-trains; an oracle does nothing else."""
    is_pretraining = stored['pretrain_iterations'] and not stored['metatrain_iterations'] and stored['baseline'] != 'oracle'
    if is_pretraining and 'metatrain_iterations' in line.given and line.values['metatrain_iterations']:
        raise UserError(f'--metatrain_iterations={line.values["metatrain_iterations"]}: the run in {directory} is of pre-training only; '
                        f'start a meta-training from it by --load_from={directory}/model{stored["pretrain_iterations"]}, without --run')


def _refuse_contradictions(values, learnt, stated, directory, may_differ):
    if 'datasource' in may_differ and values['datasource'] != learnt['datasource']:
        may_differ += OF_IMAGES
    contradictions = [f'--{name}={values[name]} contradicts --{name}={value}' for name, value in learnt.items()
                      if values[name] != value and name not in may_differ]
    contradictions += [f'--train_{name}={value} contradicts --{name}={learnt[name]}' for name, value in stated.items()
                       if value != learnt[name]]
    if contradictions:
        raise UserError(f'{", ".join(contradictions)}, with which the run in {directory} was trained; leave out what '
                        'contradicts it')
