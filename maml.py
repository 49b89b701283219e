"""Model-Agnostic Meta-Learning (Finn, Abbeel & Levine, ICML 2017, arXiv:1703.03400).

Read from the top: the network is a function of a dict of weights (`forward`). The inner loop makes new dicts by gradient descent
on a task's support set (`inner_loop`, line 6 of algorithm 1). The outer step moves the shared weights along the gradient of the
query loss through that inner loop (`meta_gradient`, line 8), averaged over tasks (`MAML`).

All functions are about one task; runtime/engine.py maps them over meta-batches.
"""
import dataclasses
import functools
import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from runtime import engine
from runtime.distribution import Replicas
from runtime.optimizers import Adam
from utils import accuracy, conv_block, dense_block, glorot_uniform, mse, truncated_normal, xent

CONV_LAYERS = (1, 2, 3, 4)
Step, Tensors = int | tf.Tensor, dict[str, tf.Tensor]
TaskBatch = Any  # a data_generator.TaskBatch, of which only the field names are used here


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the model is and how it learns. Fields are named like the flags; the others come from the data source."""
    dim_input: int                          # numbers per row
    dim_output: int                         # targets per row; the way N in classification
    loss: str                               # 'mse' | 'xent'
    update_batch_size: float                # K, by which 'xent' divides
    update_lr: float                        # inner step size, alpha
    num_updates: int = 1                    # inner updates of a training step
    meta_lr: float = 0.001                  # Adam step size of the outer loop, beta
    norm: str = 'batch_norm'                # 'batch_norm' | 'layer_norm' | 'None'
    image_shape: tuple[int, int, int] | None = None  # (height, width, channels); None: fully connected net
    dim_hidden: tuple[int, ...] = (40, 40)  # fully connected layer sizes
    num_filters: int = 64
    max_pool: bool = False
    head: str | None = 'mean'            # 'mean' | 'flatten': what conv nets do before the last layer
    stop_grad: bool = False                 # first-order approximation
    query_norm: str = 'batch'               # whose statistics batch norm gives query rows: their own, 'batch', or 'support'
    clip: float | None = None            # elementwise bound of the meta-gradient
    engine: str = 'auto'                    # 'tasks': one task per core; 'wide': all tasks in one compiled graph; 'auto'
    task_chunk: int | None = None        # tasks whose gradients are computed at a time; a divisor of the meta-batch
    dtype: str = 'float32'                  # 'float64': for batches of float64, where rounding must not decide


class Parameters(NamedTuple):
    """What all tasks share and the outer loop trains."""
    weights: Tensors       # where the inner loop starts from
    norm_params: Tensors   # offsets and scales of normalisation


class Outputs(NamedTuple):
    """The network's outputs for a task; from `MAML.predict` for a meta-batch."""
    pre: tf.Tensor   # [N*K, dim_output]  support rows, before adaptation
    post: tf.Tensor  # [N*Q, dim_output]  query rows, after it


class Metrics(NamedTuple):
    """Losses and accuracies, one value per task; callers average. Accuracies, in classification only, are in [0, 1]."""
    pre_loss: tf.Tensor         # [tasks]           of support rows before adaptation
    post_losses: tf.Tensor      # [updates, tasks]  of query rows after each update
    pre_accuracy: tf.Tensor | None = None
    post_accuracies: tf.Tensor | None = None


# The network: a pure function of its weights ------------------------------------------------------------------------

def initial_weights(config: ModelConfig, seed: int) -> Tensors:
    """The weights that the inner loop adapts, float32, each a function of (seed, name) only.

    They have the reference's names: `conv1 b1 ... conv4 b4 w5 b5`, or `w1 b1 w2 b2 ...` for the fully connected net.
    """
    def draw(name, distribution, *shape):
        weights[name] = distribution(shape, [seed, zlib.crc32(name.encode())])
        weights['b' + name.lstrip('convw')] = tf.zeros([shape[-1]])

    weights = {}
    if config.image_shape is None:
        sizes = (config.dim_input, *config.dim_hidden, config.dim_output)
        for layer, (inputs, units) in enumerate(zip(sizes, sizes[1:]), start=1):
            draw(f'w{layer}', truncated_normal, inputs, units)
        return weights
    height, width, channels = config.image_shape
    for layer in CONV_LAYERS:
        draw(f'conv{layer}', glorot_uniform, 3, 3, channels, config.num_filters)
        channels = config.num_filters
        height, width = (size // 2 if config.max_pool else -(-size // 2) for size in (height, width))
    distribution, features = ((tf.random.stateless_normal, channels) if config.head == 'mean' else
                              (glorot_uniform, height * width * channels))
    draw('w5', distribution, features, config.dim_output)
    return weights


def initial_norm_params(config: ModelConfig) -> Tensors:
    """Offsets (beta, 0) and, for layer norm, scales (gamma, 1) of all tasks: {'<scope>/beta': float32 [channels], ...}."""
    sizes = config.dim_hidden if config.image_shape is None else [config.num_filters] * len(CONV_LAYERS)
    params = {}
    for layer, channels in enumerate(sizes, start=1):
        if config.norm in ('batch_norm', 'layer_norm'):
            params[f'{_norm_scope(config, layer)}/beta'] = tf.zeros([channels])
        if config.norm == 'layer_norm':
            params[f'{_norm_scope(config, layer)}/gamma'] = tf.ones([channels])
    return params


def _norm_scope(config, layer):
    return str(layer - 1 if config.image_shape or layer == 1 else layer)  # Reference behaviour: dense nets have no scope 1.


def forward(config: ModelConfig, x: tf.Tensor, weights: Tensors, norm_params: Tensors,
            stats_rows: int | None = None) -> tf.Tensor:
    """The network's output for a set of rows: predictions, or logits in classification.

    Args:
        x: float [rows, dim_input]; images in [0, 1], flattened.
        stats_rows: batch norm takes its statistics from the first `stats_rows` rows; None: from all.

    Returns:
        [rows, dim_output]. Under batch norm, each row's output depends on the rows that the statistics are from.
    """
    if config.image_shape is None:
        for layer in range(1, len(config.dim_hidden) + 1):
            x = dense_block(x, weights[f'w{layer}'], weights[f'b{layer}'], config.norm, _norm_scope(config, layer),
                            norm_params, stats_rows)
        last = len(config.dim_hidden) + 1
        return x @ weights[f'w{last}'] + weights[f'b{last}']

    x = tf.reshape(x, [-1, *config.image_shape])
    for layer in CONV_LAYERS:
        x = conv_block(x, weights[f'conv{layer}'], weights[f'b{layer}'], config.norm, _norm_scope(config, layer),
                       norm_params, config.max_pool, config.engine == 'wide', stats_rows)
    x = tf.reduce_mean(x, axis=[1, 2]) if config.head == 'mean' else tf.reshape(x, [-1, math.prod(x.shape[1:])])
    return x @ weights['w5'] + weights['b5']


def loss_of(config: ModelConfig, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """The task loss, [..., rows, dim_output] -> [...]; `mse` and `xent` say what is divided by what."""
    return mse(outputs, targets) if config.loss == 'mse' else xent(outputs, targets, config.update_batch_size)


# Learning one task: the inner loop ----------------------------------------------------------------------------------

def adapted_names(config: ModelConfig, weights: Tensors) -> Sequence[str]:
    """Names of the tensors that the inner loop moves: all weights. A method that adapts fewer changes this function."""
    return list(weights)


def step_sizes(config: ModelConfig, names: Sequence[str], step: Step) -> dict[str, float]:
    """{name: step size} of inner step number `step`: alpha. A method with other step sizes changes this function."""
    return dict.fromkeys(names, config.update_lr)


def inner_loop(config: ModelConfig, task: TaskBatch, parameters: Parameters, num_updates: int,
               first_step: Step = 0) -> Iterator[tuple[tf.Tensor, Tensors]]:
    """Adapts the weights to one task by gradient descent on its support set (line 6 of algorithm 1).

    Args:
        task: a TaskBatch of one task, without the leading axis.
        first_step: number of the first step; not 0 if the weights are already adapted.

    Yields:
        After each step: the support outputs *before* it, [N*K, dim_output], and the fast weights after it, a dict like
        `parameters.weights` and differentiable with respect to it (with `stop_grad` as if the inner gradient were constant).
    """
    weights, norm_params = parameters
    for step in range(num_updates):
        moved = {name: weights[name] for name in adapted_names(config, weights)}
        with tf.GradientTape() as tape:
            tape.watch(moved)
            outputs = forward(config, task.support_x, weights, norm_params)
            loss = loss_of(config, outputs, task.support_y)
        gradients = tape.gradient(loss, moved, unconnected_gradients='zero')
        if config.stop_grad:
            gradients = {name: tf.stop_gradient(gradient) for name, gradient in gradients.items()}
        rates = step_sizes(config, list(moved), first_step + step)
        weights = {**weights, **{name: moved[name] - rates[name] * gradients[name] for name in moved}}
        yield outputs, weights


def predict_query(config: ModelConfig, task: TaskBatch, weights: Tensors, norm_params: Tensors) -> tf.Tensor:
    """The network's output for a task's query rows, [N*Q, dim_output].

    Under batch norm, query rows are normalised by their own statistics (Reference behaviour: so evaluation is transductive), or
    with `query_norm='support'` by those of the support rows, each row independently of the others.
    """
    if config.query_norm == 'batch':
        return forward(config, task.query_x, weights, norm_params)
    support_rows = task.support_x.shape[0]
    rows = tf.concat([task.support_x, task.query_x], axis=0)
    return forward(config, rows, weights, norm_params, stats_rows=support_rows)[support_rows:]


def adapt_and_predict(config: ModelConfig, parameters: Parameters, step: Step,
                      task_and_weights: tuple[TaskBatch, Tensors]) -> tuple[Outputs, Tensors]:
    """Inner step number `step` of a task, from fast weights of its own: Outputs, and the fast weights after it."""
    task, weights = task_and_weights
    (pre, weights), = inner_loop(config, task, parameters._replace(weights=weights), num_updates=1, first_step=step)
    return Outputs(pre, predict_query(config, task, weights, parameters.norm_params)), weights


def metrics_of(config: ModelConfig, batch: TaskBatch, outputs: Outputs) -> Tensors:
    """{'pre_loss', 'post_loss'} and in classification {'pre_accuracy', 'post_accuracy'} of a meta-batch, each [tasks]."""
    pre, post = (outputs.pre, batch.support_y), (outputs.post, batch.query_y)
    metrics = {'pre_loss': loss_of(config, *pre), 'post_loss': loss_of(config, *post)}
    return metrics if config.loss == 'mse' else metrics | {'pre_accuracy': accuracy(*pre), 'post_accuracy': accuracy(*post)}


# Learning to learn: the outer loop ----------------------------------------------------------------------------------

def objective(config: ModelConfig, task: TaskBatch, trajectory: Sequence[Tensors], norm_params: Tensors,
              iteration: Step) -> tuple[tf.Tensor, tf.Tensor]:
    """What meta-training minimises: the query loss after the last inner update (line 8 of algorithm 1).

    `trajectory` holds the fast weights after each inner update, `iteration` is that of the outer loop: a method with losses on
    the way, or one that changes during training, changes this function.

    Returns:
        The loss, and the query outputs after the last update, [N*Q, dim_output].
    """
    outputs = predict_query(config, task, trajectory[-1], norm_params)
    return loss_of(config, outputs, task.query_y), outputs


def meta_gradient(config: ModelConfig, phase: str, parameters: Parameters, iteration: Step,
                  task: TaskBatch) -> tuple[Tensors, Outputs]:
    """The exact gradient of one task's objective, through its inner loop (line 8 of algorithm 1, equation 1), and Outputs.

    In phase 'pretrain', joint training, it is the gradient of the support loss before adaptation instead.
    """
    with tf.GradientTape() as tape:
        tape.watch(parameters)
        support_outputs, trajectory = zip(*inner_loop(config, task, parameters, config.num_updates))
        loss, query_outputs = objective(config, task, trajectory, parameters.norm_params, iteration)
        if phase == 'pretrain':
            loss = loss_of(config, support_outputs[0], task.support_y)
    gradients = tape.gradient(loss, {**parameters.weights, **parameters.norm_params}, unconnected_gradients='zero')
    return gradients, Outputs(support_outputs[0], query_outputs)


class MAML:
    """The shared parameters, and what is done with them on meta-batches: TaskBatches of arrays [tasks, rows, dim].

    Attributes:
        weights: {'conv1': tf.Variable, ...}, adapted in the inner loop; the reference's names.
        norm_params: {'0/beta': tf.Variable, ...}, trained by the outer loop only.
        learning_rates: {name: tf.Variable} of learned inner step sizes; {}, for MAML's are fixed.
        steps_per_call: training steps per compiled call: 100 for small networks, where call overhead dominates, else 1.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, replicas: Replicas | None = None):
        """The initial weights are a function of config and seed.

        With several replicas, a meta-batch is what `Replicas.distribute` makes, except for `predict` and `predict_unadapted`.
        """
        self.replicas, convolutional = replicas or Replicas(), config.image_shape is not None
        self.config = config = dataclasses.replace(config, engine=engine.resolve(config.engine, convolutional))
        self.weights, self.norm_params = (
            {name: tf.Variable(tf.cast(value, config.dtype)) for name, value in values.items()}
            for values in (initial_weights(config, seed), initial_norm_params(config)))
        self.learning_rates, variables = {}, {**self.weights, **self.norm_params}
        self.steps_per_call = 100 if sum(math.prod(v.shape) for v in variables.values()) < 10_000 else 1
        # Reference behaviour: the gradient of pre-training is not clipped.
        self._optimizers = {phase: Adam(variables, config.meta_lr, clip)
                            for phase, clip in (('metatrain', config.clip), ('pretrain', None))}
        metrics = ['pre_loss', 'post_loss'] + ['pre_accuracy', 'post_accuracy'] * (config.loss == 'xent')
        self._engine = engine.Engine(config.engine, config.task_chunk, convolutional, config.dtype, self.replicas,
                                     Parameters(self.weights, self.norm_params), functools.partial(metrics_of, config), metrics)
        # What the engine runs, with the structure of what it returns. Made once: TensorFlow compiles each function object anew.
        self._gradients = {phase: (functools.partial(meta_gradient, config, phase), (dict.fromkeys(variables), Outputs(0, 0)))
                           for phase in self._optimizers}
        self._updates = {phase: adam.apply for phase, adam in self._optimizers.items()}
        self._adapt = functools.partial(adapt_and_predict, config), (Outputs(0, 0), dict.fromkeys(self.weights))
        self._predict_unadapted = (lambda parameters, _, task: predict_query(config, task, *parameters)), None

    def state(self) -> dict[str, tf.Variable]:
        """{name: variable}: everything that a training run needs to go on."""
        metatrain, pretrain = (adam.state(f'{phase}/adam/') for phase, adam in self._optimizers.items())
        return {**self.weights, **self.norm_params, **metatrain, **pretrain}

    def variant(self, **changes) -> 'MAML':
        """A MAML with the same weights, another config and a fresh optimizer.

        With a smaller `dim_output` n it has the first n outputs. They make a network for n-way tasks: the labels of a task are
        in random order, so all outputs have learnt the same.
        """
        other = MAML(dataclasses.replace(self.config, **changes), replicas=self.replicas)
        for ours, variables in (self.weights, other.weights), (self.norm_params, other.norm_params):
            for name, variable in variables.items():
                variable.assign(ours[name][..., :variable.shape[-1]])
        return other

    def train_steps(self, phase: str, batches: TaskBatch, iteration: int = 0, stopping: bool = False) -> Tensors:
        """Updates the shared parameters with meta-batches [steps, tasks, rows, dim], one after the other.

        `phase` is 'metatrain' or 'pretrain' (see `meta_gradient`), `iteration` that of the first step; `stopping` says that this
        process is about to stop.

        Returns:
            The metrics of `metrics_of` before each step, averaged over tasks; 'finite': whether losses and gradients were finite
            (a step in which they were not changes nothing); 'stopping': whether any process is about to stop. Each [steps].
        """
        return self._engine.train(*self._gradients[phase], self._updates[phase], batches, tf.constant(iteration, tf.int64),
                                  tf.cast(stopping, self.config.dtype))

    def metatrain_step(self, batch: TaskBatch, iteration: int = 0) -> Tensors:
        """One outer update with a meta-batch; returns scalars named as by `train_steps`."""
        found = self.train_steps('metatrain', self.replicas.add_leading_axis(batch), iteration)
        return {name: values[0] for name, values in found.items()}

    def pretrain_step(self, batch: TaskBatch) -> Tensors:
        """One update of joint training with a meta-batch; returns scalars named as by `train_steps`."""
        found = self.train_steps('pretrain', self.replicas.add_leading_axis(batch))
        return {name: values[0] for name, values in found.items()}

    def meta_gradients(self, batch: TaskBatch, iteration: int = 0) -> Tensors:
        """The exact gradient of `objective`, averaged over tasks, before clipping: {name: tensor}, parameters' names."""
        return self._engine.means(*self._gradients['metatrain'], batch, tf.constant(iteration, tf.int64))[0]

    def pretrain_gradients(self, batch: TaskBatch) -> Tensors:
        """The gradient of the support loss before adaptation, averaged over tasks; like `meta_gradients`."""
        return self._engine.means(*self._gradients['pretrain'], batch, tf.constant(0, tf.int64))[0]

    def evaluate(self, batch: TaskBatch, num_updates: int) -> Metrics:
        """Metrics of a meta-batch, each [tasks] or [num_updates, tasks]; no task's figures depend on another's."""
        fast_weights, found = self._engine.repeat('weights', batch), []
        for step in tf.range(num_updates, dtype=tf.int64):
            metrics, fast_weights = self._engine.map_and_measure(*self._adapt, batch, fast_weights, step)
            found.append(metrics)
        columns = zip(*found)  # each a metric after each update
        return Metrics(*(tf.stack(column) if post else column[0] for column, post in zip(columns, itertools.cycle([0, 1]))))

    def predict(self, batch: TaskBatch, num_updates: int) -> Outputs:
        """Outputs before adaptation [tasks, N*K, dim_output], and after each update [num_updates, tasks, N*Q, dim_output]."""
        fast_weights, found = self._engine.repeat('weights', batch), []
        for step in tf.range(num_updates, dtype=tf.int64):
            outputs, fast_weights = self._engine.map(*self._adapt, (batch, fast_weights), step)
            found.append(outputs)
        return Outputs(found[0].pre, tf.stack([outputs.post for outputs in found]))

    def predict_unadapted(self, batch: TaskBatch) -> tf.Tensor:
        """The outputs of the shared weights for the query rows of a meta-batch: [tasks, N*Q, dim_output]."""
        return self._engine.map(*self._predict_unadapted, batch, tf.constant(0, tf.int64))
