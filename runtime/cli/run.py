"""A run, and what its training, evaluation and prediction are asked for: small frozen dataclasses, with every default resolved.

They are made once, at start-up. Fields are named like the flags.
"""
import dataclasses
import math
import os
from typing import Any

from runtime.cli import methods, network_file, stored_run
from runtime.cli.flags import names
from runtime.cli.network_file import NetworkFile
from runtime.cli.request import Request
from runtime.compute.distribution import Replicas
from runtime.datasets.tasks import Source, TaskConfig
from runtime.system.errors import UserError

METRICS = {'xent': 'accuracy', 'mse': 'loss', 'return': 'return'}  # {what is learnt from: what is reported}
EVALUATED_HEADS = {'own': ('own',), 'nearest': ('nearest class mean', 'nearest neighbour')}  # of an evaluation, for values of --head
FOLDERS = 'logdir', 'data_path', 'split_file', 'load_from', 'run'  # flags in which the workers of a run may differ


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What is learnt or was learnt, on which tasks, and where it is."""
    directory: str              # the experiment directory
    method: str                 # for tables and pictures
    datasource: str             # where the tasks come from
    source: Source              # its entry of SOURCES
    tasks: TaskConfig
    model: Any                  # maml.ModelConfig
    pretrain_iterations: int
    metatrain_iterations: int
    learning_flags: dict[str, Any]  # {flag: value} of those that determine what is learnt: the identity of the run
    network_flags: dict[str, Any]   # of those among them by which networks for its source differ
    checkpoint: int | str | None  # what to load: an iteration, 'best' (on meta-validation), or None for the newest
    load_from: str | None       # prefix of a checkpoint elsewhere
    ensemble: int               # checkpoints whose mean outputs are evaluated, and which a training keeps
    network_file: NetworkFile | None  # that makes the network, if it is one's own
    replicas: Replicas
    worker_flags: str           # text that all workers of a run have in common: their flags, but for names of folders

    @property
    def iterations(self) -> int:
        """Of pre-training and meta-training together."""
        return self.pretrain_iterations + self.metatrain_iterations

    @property
    def last_phase(self) -> str:
        """The last phase of the training: 'metatrain' or 'pretrain'."""
        return 'metatrain' if self.metatrain_iterations else 'pretrain'

    @property
    def metric(self) -> str:
        """What is reported: one of METRICS."""
        return METRICS[self.model.loss]

    @property
    def description(self) -> str:
        """Text: the kind of task, such as 5-way 1-shot omniglot."""
        way = f'{self.tasks.num_classes}-way ' if self.model.loss == 'xent' else ''
        return f'{way}{self.tasks.update_batch_size}-shot {self.datasource}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Run):
    """A training."""
    meta_batch_size: int
    resume: bool
    save_interval: int
    skip_nonfinite: bool
    validation_tasks: int       # of meta-validation, by which checkpoints are ranked
    log: bool
    plot: bool
    headline_updates: int       # after which the method is reported
    strategy: str
    flag_file: str              # the contents of run.flags
    check_network: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained(Run):
    """The use of a trained model: a prediction, or an evaluation."""
    num_outputs: int            # of the network as it was trained
    test_updates: int           # inner updates
    query_norms: tuple[str, ...]  # of 'batch', 'support', 'each'
    plot_format: str            # 'png' | 'pdf' | 'svg'

    @property
    def most_outputs(self) -> float:
        """The largest number of outputs that the network can have: any number of classes, if the last layer is computed for each task."""
        return math.inf if self.model.loss == 'xent' and self.model.head_init != 'learned' else self.num_outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Trained):
    """An evaluation."""
    split: str                  # 'val' | 'test'
    num_test_tasks: int
    log: bool
    plot: bool
    headline_updates: int       # after which the method is reported
    permutations: int           # orders of a task's labels
    heads: tuple[str, ...]      # last layers: 'own', or 'nearest class mean' and 'nearest neighbour'


def make_run(request: Request, source: Source, tasks: TaskConfig, replicas: Replicas | None = None) -> Run:
    """The Training, Evaluation or (for a prediction) Trained that is asked for, on what `source_and_tasks` returned. Imports TensorFlow.

    Fields that are not resolved here are the request's, under the same names.
    """
    kind = {'train': Training, 'evaluate': Evaluation, 'predict': Trained}[request.mode]
    model = _model_config(request, source, tasks)
    pretrain_iterations, metatrain_iterations = request.iterations
    resolved = dict(
        source=source, tasks=tasks, model=model, replicas=replicas or Replicas(),
        method=methods.name(request.trained, request.only_pretrains),
        pretrain_iterations=pretrain_iterations, metatrain_iterations=metatrain_iterations,
        checkpoint=_checkpoint(request),
        load_from=request.load_from and os.path.expanduser(request.load_from).removesuffix('.index'),
        worker_flags=repr({name: request.values[name] for name in names() if name not in FOLDERS}),
        flag_file=stored_run.description(request.values),
        num_outputs=request.trained['num_classes'] if source.loss == 'xent' else model.dim_output,
        test_updates=evaluation_updates(request), heads=EVALUATED_HEADS[request.head],
        query_norms=_query_norms(request),
        split='test' if request.test_set else 'val',
        headline_updates=headline_updates(request))
    fields = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: resolved[name] if name in resolved else getattr(request, name) for name in fields})


def _checkpoint(request):
    """What to load: 'best', an iteration, or None, the newest. Reference behaviour: a training goes on from the newest with 0, too."""
    if request.test_best:
        return 'best'
    if request.test_iter == -1 or request.mode == 'train' and request.test_iter == 0:
        return None
    return request.test_iter


def usual_updates(num_updates: int, at_least: int) -> int:
    """The inner updates of an evaluation: `at_least` so many or the training's, but none where the training has none."""
    return num_updates and max(num_updates, at_least)


def evaluation_updates(request: Request) -> int:
    """The number of inner updates of an evaluation."""
    if request.head == 'nearest':
        return 0
    return usual_updates(request.num_updates, request.source.test_updates) if request.test_updates == -1 else request.test_updates


def headline_updates(request: Request) -> int:
    """The number of inner updates after which a method is reported: --test_updates if it is set, else --num_updates."""
    return evaluation_updates(request) if request.head == 'nearest' or request.test_updates != -1 else request.num_updates


def _query_norms(request):
    """What query rows are normalised by. Predictions default to 'support': the images may be any number, of any classes."""
    if request.query_norm == 'both':
        return 'batch', 'support'
    return ('support' if request.mode == 'predict' and 'query_norm' not in request.given else request.query_norm,)


def _model_config(request, source, tasks):
    """The ModelConfig: the source and these lines decide some fields, flags of the same names the others."""
    from maml import ModelConfig
    same = {field.name: request.values[field.name] for field in dataclasses.fields(ModelConfig) if field.name in request.values}
    by_classes = request.mode == 'train' and request.pretrain_labels == 'classes'
    hidden, shape = ((text and tuple(map(int, text.split(',')))) for text in (request.hidden, request.input_shape))
    if shape and math.prod(shape) != source.dim_input(tasks):
        raise UserError(f'--input_shape={request.input_shape} is {math.prod(shape)} numbers, and a row has {source.dim_input(tasks)}')
    return ModelConfig(**{
        **same, 'query_norm': _query_norms(request)[0], 'meta_lr_final': max(request.meta_lr_final, 0.0),
        'pretrain_classes': len(source.folders(tasks.data_path).names('train')) if by_classes else 0,
        'dim_input': source.dim_input(tasks), 'dim_output': source.dim_output(tasks), 'loss': source.loss, 'head': source.head,
        'clip': source.clip, 'dim_hidden': hidden or source.dim_hidden, 'input_shape': shape, 'mask_seed': request.trained['seed'],
        'network': request.network_file and network_file.load(request.network_file),
        'image_shape': source.image_shape if request.conv else None})
