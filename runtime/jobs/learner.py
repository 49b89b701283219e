"""Trained models from Python: `load` a run, `adapt` it to labelled arrays, predict for others. docs/python.md has examples.

Shapes and units are those of the data source: images [rows, height, width, channels], uint8 or float in [0, 1]; rows of tables
[rows, columns] in the units of their files; inputs of functions [rows, 1].
"""
from __future__ import annotations

import dataclasses
import json
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from runtime.cli.flags import parse
from runtime.cli.request import resolve
from runtime.cli.run import Trained, make_run
from runtime.cli.run_data import columns_of, source_and_tasks
from runtime.cli.startup import import_tensorflow
from runtime.datasets.tables import Columns
from runtime.datasets.tasks import TaskBatch
from runtime.system.errors import UserError
from runtime.system.files import require_regular_file, write_atomically
from runtime.system.schema import checked

if TYPE_CHECKING:
    from maml import MAML, ModelConfig

ROWS_AT_A_TIME = 200  # of a prediction, where rows do not depend on each other


def load(run: str | os.PathLike, checkpoint: int | str | None = None, query_norm: str = 'support',
         updates: int | None = None, trust_network: bool = False) -> Learner:
    """A trained model.

    Args:
        run: a run's directory, or a folder that holds exactly one, as for --run.
        checkpoint: an iteration, 'best' (on meta-validation) or None, the newest, or the ensemble that the method has.
        query_norm: how batch norm treats the rows of a prediction: 'support': each by the statistics of the support rows;
            'batch': all together, by their own statistics; 'each': each with the support rows.
        updates: inner steps of `adapt`; None: as many as an evaluation takes.
        trust_network: run the network of one's own that somebody else trained with.

    Raises UserError if there is no such run or checkpoint, it is damaged, or it does not learn from examples.
    """
    if query_norm == 'both':
        raise UserError("query_norm='both' is for evaluations; give 'support', 'batch' or 'each'")
    flags = [f'--run={os.fspath(run)}', '--predict', f'--query_norm={query_norm}', f'--trust_network={trust_network}']
    if checkpoint is not None:
        flags += ['--ensemble=1', '--test_best' if checkpoint == 'best' else f'--test_iter={checkpoint}']
    if updates is not None:
        flags.append(f'--test_updates={checked_updates(updates)}')
    request = resolve(parse(['load', *flags]))
    source, tasks = source_and_tasks(request)
    if not source.supervised:
        raise UserError(f'{os.fspath(run)} has a policy of {request.datasource}, which learns from episodes, not from examples: evaluate '
                        'it by --train=False, or use runtime.jobs.models.Navigator')
    import_tensorflow()
    return Learner(make_run(request, source, tasks))


class Learner:
    """A trained model, ready to adapt to a task.

    Attributes:
        model: the MAML; an Ensemble, if the method has one.
        checkpoint: its path.
        num_outputs: the largest number of classes (infinity, if the last layer is computed for each task), or the number of targets.
        updates: inner steps of `adapt`.
    """

    def __init__(self, run: Trained):
        from runtime.jobs.evaluate import restore
        source, self._run = run.source, run
        invert = bool(source.image_shape and source.invert)
        self._inputs = Inputs(run.model.dim_input, source.image_shape, invert, columns_of(source))
        self.model, self.checkpoint, *_ = restore(run)
        self.num_outputs, self.updates = run.most_outputs, run.test_updates

    def adapt(self, support_x: np.ndarray, support_y: Sequence, updates: int | None = None) -> Predictor:
        """The model adapted to labelled examples by inner steps. As --predict does, it divides the loss by the shots that are
        given, whatever the model was trained with.

        Args:
            support_x: see the top of this module.
            support_y: the class of each row, a number or a text; in regression the targets, [rows, targets] or [rows].
            updates: inner steps; None: `self.updates`.

        Raises UserError if arrays have another shape than the source's, or there are more classes than outputs.
        """
        x, labels = self._inputs.rows(support_x), as_array(support_y, 'support_y')
        if len(x) != len(labels) or not len(x):
            raise UserError(f'support_x has {len(x)} rows and support_y {len(labels)}; they must have the same number, '
                            'at least 1')
        if self._run.model.loss == 'mse':
            return self.adapt_rows(x, self._inputs.targets(labels, self.num_outputs), None, updates)
        if labels.dtype.kind not in 'biufU' or labels.dtype.kind == 'f' and not np.isfinite(labels).all():
            raise UserError(f'support_y is {labels.dtype}, and must name the class of each row by a number or a text')
        names, indices = np.unique(labels, return_inverse=True)
        if labels.ndim != 1 or not 2 <= len(names) <= self.num_outputs:
            most = '2 or more' if math.isinf(self.num_outputs) else f'2 to {self.num_outputs}'
            raise UserError(f'support_y must name {most} classes, one for each row; it has shape '
                            f'{list(labels.shape)} and {len(names)} different values')
        return self.adapt_rows(x, np.eye(len(names), dtype=np.float32)[indices], names.tolist(), updates)

    def adapt_rows(self, x: np.ndarray, y: np.ndarray, classes: list | None, updates: int | None = None) -> Predictor:
        """`adapt` to rows as the network has them, x [rows, dim_input] and y [rows, dim_output]; `classes` are named in its order."""
        from runtime.jobs.ensemble import Ensemble
        # If classes have different numbers of shots, the loss is divided by the mean.
        shape = {'dim_output': len(classes), 'update_batch_size': len(x) / len(classes)} if classes else {}
        model = self.model.variant(query_norm=self._run.query_norms[0], **shape)
        members = model.members() if isinstance(model, Ensemble) else [model]
        updates = self.updates if updates is None else checked_updates(updates)
        return Predictor(model.config, [adapted_tensors(member, x, y, updates) for member in members], x, classes, self._inputs)


def checked_updates(updates: int) -> int:
    """A number of inner steps; raises UserError if it is none."""
    if not isinstance(updates, (int, np.integer)) or updates < 0:
        raise UserError(f'updates={updates!r} must be a whole number, 0 or more')
    return int(updates)


def as_array(values: Sequence, name: str) -> np.ndarray:
    """An array with an axis of rows; raises UserError if the values are none."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise UserError(f'{name} is no array: its rows have different shapes') from error
    if not array.ndim:
        raise UserError(f'{name} is one {type(values).__name__}, and must have rows')
    return array


def adapted_tensors(model: MAML, x: np.ndarray, y: np.ndarray, updates: int) -> dict[str, np.ndarray]:
    """The network's tensors after inner steps on support rows x [rows, dim_input], y [rows, dim_output]."""
    import tensorflow as tf

    from maml import initial_state, inner_step, weights_at
    config, parameters = model.config, tf.nest.map_structure(tf.convert_to_tensor, model.shared)
    task = TaskBatch(tf.constant(x), tf.constant(y), tf.constant(x[:1]), tf.constant(y[:1]))

    @tf.function(autograph=False, jit_compile=config.jit)
    def step(state, number):
        return inner_step(config, parameters, task, state, number)[0]

    state = initial_state(config, parameters, task)
    for number in tf.range(updates, dtype=tf.int64):
        state = step(state, number)
    tensors = weights_at(config, parameters, {**state.own, **state.fast}, max(updates - 1, 0))
    return {name: value.numpy() for name, value in tensors.items()}


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A model that is adapted to a task."""
    config: ModelConfig
    members: list[dict[str, np.ndarray]]  # the adapted network's tensors; of an ensemble, of each member
    support_x: np.ndarray                 # the rows that it was adapted to, [rows, dim_input]
    classes: list | None                  # their names in the order of the probabilities; None in regression
    inputs: Inputs                        # how arrays become rows of the network

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Probabilities of the classes, [rows, classes], or targets in their own units, [rows, targets]; errors as of `adapt`, or if the
        adaptation diverged."""
        predictions = self.of_rows(self.inputs.rows(x))
        if not np.isfinite(predictions).all():
            raise UserError('the adaptation diverged, so there are no predictions: lower the number of updates, or train with another step '
                            'size')
        return predictions

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """As by a call, of rows as the network has them, [rows, dim_input]."""
        from scipy.special import softmax
        if not len(rows):
            return np.zeros((0, self.config.dim_output), np.float32)
        parts = 1 if self.config.query_norm == 'batch' else -(-len(rows) // ROWS_AT_A_TIME)
        outputs = np.concatenate([np.mean([self._outputs(part, tensors) for tensors in self.members], axis=0)
                                  for part in np.array_split(rows, parts)])
        return self.inputs.restore_targets(outputs) if self.classes is None else softmax(outputs, axis=-1)

    def _outputs(self, rows, tensors):
        import tensorflow as tf

        from maml import query_features
        from networks import outputs_of
        task = TaskBatch(tf.constant(self.support_x), None, tf.constant(rows), None)
        return outputs_of(self.config, tensors, query_features(self.config, task, tensors)).numpy()

    def save(self, path: str | os.PathLike) -> None:
        """Writes the predictor to an .npz file, which `load_predictor` reads; raises OSError if that cannot be done."""
        from networks import network_of
        columns = self.inputs.columns
        config = {**dataclasses.asdict(self.config), 'network': self.config.network and network_of(self.config).name}
        facts = {'config': config, 'classes': self.classes,
                 'inputs': {**self.inputs._asdict(), 'columns': columns and vars(columns)}}
        arrays = {f'{number}/{name}': array for number, member in enumerate(self.members) for name, array in member.items()}
        write_atomically(path, lambda file: np.savez(file, facts=json.dumps(facts), support_x=self.support_x, **arrays))


def load_predictor(path: str | os.PathLike, network: Callable | None = None) -> Predictor:
    """The predictor that `Predictor.save` wrote; raises UserError if it cannot be read, or is not such a file. `network` is the
    function that made its network, if that is one's own: the file does not hold code."""
    import_tensorflow()
    from maml import ModelConfig
    from networks import network_of
    try:
        require_regular_file(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        facts = json.loads(str(arrays.pop('facts')))
        support_x, members = arrays.pop('support_x'), {}
        for name, array in arrays.items():
            number, _, tensor = name.partition('/')
            members.setdefault(int(number), {})[tensor] = array
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in facts['config'].items()}
        if bool(fields.get('network')) != bool(network):
            made_by = f'{fields["network"]}, which network= must give' if fields.get('network') else 'this program: leave out network='
            raise UserError(f'{os.fspath(path)} has a network made by {made_by}')
        columns = checked(Columns | None, facts['inputs'].pop('columns'), 'columns')
        inputs = Inputs(**facts['inputs'], columns=columns)
        config = ModelConfig(**{**fields, 'network': network})
        network_tensors = {*network_of(config).initial_norm_params(), *network_of(config).initial_weights(0)} if network else set()
        missing = sorted(network_tensors - members[0].keys())
        if missing:
            raise UserError(f'{os.fspath(path)} has no {missing[0]}, a weight of network=: it was made by another function')
        return Predictor(config, list(members.values()), support_x, facts['classes'], inputs)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f'{os.fspath(path)} cannot be read, or Predictor.save did not write it '
                        f'({type(error).__name__}: {error})') from error


class Inputs(NamedTuple):
    """How arrays in a source's shape and units become rows of the network."""
    dim_input: int
    image_shape: Sequence[int] | None  # height, width, channels; None: not images
    invert: bool                       # of images: ink is 1
    columns: Columns | None            # of tables

    def rows(self, x: np.ndarray) -> np.ndarray:
        """float32 [rows, dim_input]; raises UserError if x has another shape, or numbers out of range."""
        x = as_array(x, 'the array')
        shape = list(self.image_shape or [self.dim_input])
        if x.dtype.kind not in 'buif' or list(x.shape[1:]) not in (shape, shape[:-1] if shape[-1] == 1 else shape):
            raise UserError(f'the array is {x.dtype} {list(x.shape)}, and must be numbers of shape '
                            f'[rows, {", ".join(map(str, shape))}]')
        x = x.reshape(len(x), self.dim_input)
        if not np.isfinite(x).all():
            raise UserError('the array has numbers that are not finite')
        if self.columns:
            return self.columns.standardise(x.astype(float))
        if self.image_shape:
            if x.dtype == np.uint8:
                return (255 - x if self.invert else x).astype(np.float32) / np.float32(255)
            if x.size and not 0 <= x.min() <= x.max() <= 1:
                raise UserError('images must be uint8, or floats from 0 to 1')
            x = 1 - x if self.invert else x
        return x.astype(np.float32)

    def targets(self, y: np.ndarray, count: int) -> np.ndarray:
        """float32 [rows, count], as the network learns them; raises UserError if y has another shape."""
        y = y[:, None] if y.ndim == 1 else y
        if y.dtype.kind not in 'buif' or y.shape[1:] != (count,):
            raise UserError(f'support_y is {y.dtype} {list(y.shape)}, and must be numbers of shape [rows, {count}]')
        if not np.isfinite(y).all():
            raise UserError('support_y has numbers that are not finite')
        return Columns(self.columns.targets).standardise(y.astype(float)) if self.columns else y.astype(np.float32)

    def restore_targets(self, outputs: np.ndarray) -> np.ndarray:
        """The inverse of `targets`."""
        return self.columns.restore_targets(outputs.astype(float)) if self.columns else outputs
