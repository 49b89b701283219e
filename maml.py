"""Model-Agnostic Meta-Learning (Finn, Abbeel & Levine, ICML 2017, arXiv:1703.03400).

Read from the top: the network is a function of a dict of weights (`forward`). The inner loop makes new dicts by gradient descent
on a task's support set (`inner_loop`, line 6 of algorithm 1). The outer step moves the shared weights along the gradient of the
query loss through that inner loop (`meta_gradient`, line 8), averaged over tasks (`MAML`).

All functions are about one task; runtime/compute/engine.py maps them over meta-batches.
"""
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

import utils
from runtime.compute import engine
from runtime.compute.distribution import Replicas
from runtime.compute.optimizers import OPTIMIZERS
from runtime.compute.schedules import meta_lr, multi_step_weights, stage
from special_grads import recomputing_loop
from switches import adapted_names, fast_weights, features_stay, head_names, minibatch, norm_at, step_sizes
from utils import CONV_LAYERS, accuracy, adam_step, conv_block, dense_block, loss_of, norm_scope

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
    meta_lr: float = 0.001                  # step size of the outer loop, beta
    norm: str = 'batch_norm'                # 'batch_norm' | 'layer_norm' | 'None'
    image_shape: tuple[int, int, int] | None = None  # (height, width, channels); None: fully connected net
    dim_hidden: tuple[int, ...] = (40, 40)  # fully connected layer sizes
    num_filters: int = 64                   # channels of each convolution
    max_pool: bool = False                  # pool after each block, instead of convolutions of stride 2
    head: str | None = 'mean'            # 'mean' | 'flatten': what conv nets do before the last layer
    stop_grad: bool = False                 # first-order approximation
    inner_weights: str = 'all'              # the inner loop adapts 'all' weights, the last layer, 'head', or the others, 'body'
    adapt_norm: bool = False                # the inner loop adapts offsets and scales of normalisation too
    norm_scale: bool = False                # batch norm has a scale
    norm_per_step: bool = False             # offsets and scales of each inner step
    learn_lr: str = 'no'                    # a learned step size: 'layer': per tensor, 'step': per tensor and step, 'weight': per number
    mean_loss: bool = False                 # 'xent' divides by the number of rows
    multi_step_loss: int = 0                # iterations in which the objective includes the loss after each inner update
    first_order_iterations: int = 0         # first iterations, computed as if with stop_grad
    meta_optimizer: str = 'adam'            # of the outer loop: 'adam' | 'sgd'
    meta_lr_schedule: str = 'constant'      # how the outer step size moves to meta_lr_final: 'constant' | 'linear' | 'cosine'
    meta_lr_final: float = -1               # -1: 0
    metatrain_iterations: int = 0           # when meta_lr_final is reached; unused if constant
    schedule_interval: int = 1              # iterations between changes of the schedules
    query_norm: str = 'batch'               # statistics for query rows: 'batch' | 'support' | 'each', see `query_features`
    outer: str = 'gradient'                 # what the outer step follows: the meta-'gradient', or the adapted weights, 'reptile'
    inner_optimizer: str = 'sgd'            # 'sgd', or with 'reptile' also 'adam'
    inner_batch: int = 0                    # support rows of an inner step; 0: all
    recompute: bool = False                 # keep the activations of one inner step only, and recompute the others
    clip: float | None = None            # elementwise bound of the meta-gradient
    engine: str = 'auto'                    # 'tasks': one task per core; 'wide': all tasks in one compiled graph; 'auto'
    task_chunk: int | None = None        # tasks whose gradients are computed at a time; a divisor of the meta-batch
    dtype: str = 'float32'                  # 'float64': for batches of float64, where rounding must not decide


class Parameters(NamedTuple):
    """What all tasks share and the outer loop trains."""
    weights: Tensors              # where the inner loop starts from
    norm_params: Tensors          # offsets and scales of normalisation
    learning_rates: Tensors = {}  # {'lr/<name>': step size} of tensors that the inner loop adapts, if they are learned
    carried: Tensors = {}         # the inner optimizer's state, passed from task to task; {} if it has none

    def trained(self) -> Tensors:
        """{name: tensor} of what the outer loop trains."""
        return {**self.weights, **self.norm_params, **self.learning_rates}


class TaskState(NamedTuple):
    """The state of a task while it is adapted."""
    fast: Tensors                     # its fast weights
    features: tuple[tf.Tensor, ...]   # [N*K, features] and [N*Q, features], if the inner loop does not change them; else ()
    optimizer: Tensors = {}           # the state of the inner optimizer, if it has one


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

def classify(config: ModelConfig, hidden: tf.Tensor, weights: Tensors) -> tf.Tensor:
    """The last layer: [rows, features] -> [rows, dim_output]."""
    matrix, bias = head_names(config)
    return hidden @ weights[matrix] + weights[bias]


def features(config: ModelConfig, x: tf.Tensor, weights: Tensors, norm_params: Tensors,
             stats_rows: int | None = None) -> tf.Tensor:
    """The input of the last layer, [rows, features]. With batch norm, it depends on the rows that provide the statistics.

    Args:
        x: float [rows, dim_input]; images in [0, 1], flattened.
        norm_params: offsets and scales [channels].
        stats_rows: batch norm takes its statistics from the first `stats_rows` rows; None: from all.
    """
    if config.image_shape is None:
        for layer in range(1, len(config.dim_hidden) + 1):
            x = dense_block(x, weights[f'w{layer}'], weights[f'b{layer}'], config.norm, norm_scope(config, layer),
                            norm_params, stats_rows)
        return x

    x = tf.reshape(x, [-1, *config.image_shape])
    for layer in CONV_LAYERS:
        x = conv_block(x, weights[f'conv{layer}'], weights[f'b{layer}'], config.norm, norm_scope(config, layer),
                       norm_params, config.max_pool, config.engine == 'wide', stats_rows)
    return tf.reduce_mean(x, axis=[1, 2]) if config.head == 'mean' else tf.reshape(x, [-1, math.prod(x.shape[1:])])


# Learning one task: the inner loop ----------------------------------------------------------------------------------

def query_features(config: ModelConfig, task: TaskBatch, weights: Tensors, norm_params: Tensors) -> tf.Tensor:
    """`features` of a task's query rows, [N*Q, features].

    Under batch norm, query rows are normalised by their own statistics (Reference behaviour: so evaluation is transductive), or
    each row independently of the others: with `query_norm='support'` by those of the support rows, with 'each' by those of the
    support rows and itself (Reptile's evaluation without transduction).
    """
    if config.query_norm == 'batch':
        return features(config, task.query_x, weights, norm_params)
    if config.query_norm == 'each':
        return tf.vectorized_map(lambda row: features(
            config, tf.concat([task.support_x, row[None]], axis=0), weights, norm_params)[-1], task.query_x)
    rows, support_rows = tf.concat([task.support_x, task.query_x], axis=0), task.support_x.shape[0]
    return features(config, rows, weights, norm_params, stats_rows=support_rows)[support_rows:]


def initial_state(config: ModelConfig, parameters: Parameters, task: TaskBatch) -> TaskState:
    """A task before its first inner step."""
    fast, fixed = fast_weights(config, parameters), ()
    if features_stay(config):
        shared = parameters.weights, parameters.norm_params
        fixed = features(config, task.support_x, *shared), query_features(config, task, *shared)
    return TaskState(fast, fixed, parameters.carried)


def forward(config: ModelConfig, parameters: Parameters, task: TaskBatch, state: TaskState, step: Step, query: bool) -> tf.Tensor:
    """The network's outputs at an inner step, [rows, dim_output]: for the task's query rows, or else for its support rows."""
    if state.features:
        return classify(config, state.features[query], state.fast)
    at = state.fast, norm_at(config, parameters.norm_params, state.fast, step)
    hidden = query_features(config, task, *at) if query else features(config, task.support_x, *at)
    return classify(config, hidden, state.fast)


def inner_loop(config: ModelConfig, task: TaskBatch, parameters: Parameters, num_updates: int, first_step: Step = 0,
               state: TaskState | None = None, iteration: Step = 0) -> Iterator[tuple[tf.Tensor, TaskState]]:
    """Adapts the weights to one task by gradient descent on its support set (line 6 of algorithm 1).

    Args:
        task: a TaskBatch of one task, without the leading axis.
        first_step: number of the first step; not 0 if the task is already adapted.
        state: of the task before that step; None: `initial_state`.
        iteration: of meta-training; with `inner_batch` it draws the order of the rows.

    Yields:
        After each step: the support outputs *before* it, [N*K, dim_output], and the task's state after it, whose fast weights are
        differentiable with respect to the parameters (with `stop_grad` as if the inner gradient were constant).
    """
    state = state or initial_state(config, parameters, task)
    for step in range(num_updates):
        step = first_step + step
        config_of_step, part = minibatch(config, task, step, iteration)
        moved = {name: state.fast[name] for name in adapted_names(config, state.fast)}
        with tf.GradientTape() as tape:
            tape.watch(moved)
            outputs = forward(config, parameters, part, state, step, query=False)
            loss = loss_of(config_of_step, outputs, part.support_y)
        if config.inner_batch:
            outputs = forward(config, parameters, task, state, step, query=False)
        gradients = tape.gradient(loss, moved, unconnected_gradients='zero')
        if config.stop_grad:
            gradients = {name: tf.stop_gradient(gradient) for name, gradient in gradients.items()}
        rates, optimizer = step_sizes(config, parameters.learning_rates, list(moved), step), state.optimizer
        if config.inner_optimizer == 'adam':
            gradients, optimizer = adam_step(gradients, optimizer)
        fast = {**state.fast, **{name: moved[name] - rates[name] * gradients[name] for name in moved}}
        state = state._replace(fast=fast, optimizer=optimizer)
        yield outputs, state


def recomputed_loop(config: ModelConfig, task: TaskBatch, parameters: Parameters, num_updates: int,
                    iteration: Step) -> Iterator[tuple[tf.Tensor, TaskState]]:
    """Like `inner_loop` from the first step, for many steps; always yields the support outputs before the first.

    Without `multi_step_loss` it yields the last state only, so that the graph does not grow with num_updates.
    """
    initial = initial_state(config, parameters, task)
    states = recomputing_loop(lambda number, state, parameters: next(
        inner_loop(config, task, parameters, 1, number, state, iteration))[1], num_updates, initial, parameters)
    outputs = forward(config, parameters, task, initial, 0, query=False)
    for index in range(0 if config.multi_step_loss else num_updates - 1, num_updates):
        yield outputs, tf.nest.map_structure(lambda values, index=index: values[index], states)


def loop_of(config: ModelConfig) -> Callable[..., Iterator[tuple[tf.Tensor, TaskState]]]:
    """The inner loop of a training step."""
    return recomputed_loop if config.recompute else inner_loop


def adapt_and_predict(config: ModelConfig, parameters: Parameters, step: Step,
                      task_and_state: tuple[TaskBatch, TaskState]) -> tuple[Outputs, TaskState]:
    """Inner step number `step` of a task: Outputs, and its state after it."""
    task, state = task_and_state
    (pre, state), = inner_loop(config, task, parameters, 1, step, state)
    return Outputs(pre, forward(config, parameters, task, state, step, query=True)), state


def metrics_of(config: ModelConfig, batch: TaskBatch, outputs: Outputs) -> Tensors:
    """{'pre_loss', 'post_loss'} and in classification {'pre_accuracy', 'post_accuracy'} of a meta-batch, each [tasks]."""
    pre, post = (outputs.pre, batch.support_y), (outputs.post, batch.query_y)
    metrics = {'pre_loss': loss_of(config, *pre), 'post_loss': loss_of(config, *post)}
    return metrics if config.loss == 'mse' else metrics | {'pre_accuracy': accuracy(*pre), 'post_accuracy': accuracy(*post)}


# Learning to learn: the outer loop ----------------------------------------------------------------------------------

def objective(config: ModelConfig, task: TaskBatch, parameters: Parameters, trajectory: Sequence[TaskState],
              iteration: Step) -> tuple[tf.Tensor, tf.Tensor]:
    """What meta-training minimises: the query loss after the last inner update (line 8 of algorithm 1).

    With `multi_step_loss`, a weighted mean of those after every one; `trajectory` ends with the task's states after each.

    Returns:
        The loss, a scalar divided as by `utils.loss_of`, and the query outputs after the last update, [N*Q, dim_output].
    """
    def outputs_after(step):
        return forward(config, parameters, task, trajectory[step - config.num_updates], step, query=True)

    last = outputs_after(config.num_updates - 1)
    loss = loss_of(config, last, task.query_y)
    if config.multi_step_loss:
        *weights, weight = multi_step_weights(config, iteration)
        loss = weight * loss + sum(w * loss_of(config, outputs_after(step), task.query_y) for step, w in enumerate(weights))
    return loss, last


def meta_gradient(config: ModelConfig, phase: str, parameters: Parameters, iteration: Step,
                  task: TaskBatch) -> tuple[Tensors, Outputs, Tensors]:
    """The exact gradient of one task's objective, through its inner loop (line 8 of algorithm 1, equation 1).

    `phase` is 'metatrain', or 'pretrain', joint training: then it is the gradient of the support loss before adaptation.

    Returns:
        {name: gradient} of `Parameters.trained`, Outputs, and `Parameters.carried` for the next task.
    """
    with tf.GradientTape() as tape:
        tape.watch(parameters)
        support_outputs, trajectory = zip(*loop_of(config)(config, task, parameters, config.num_updates, iteration=iteration))
        loss, query_outputs = objective(config, task, parameters, trajectory, iteration)
        if phase == 'pretrain':
            loss = loss_of(config, support_outputs[0], task.support_y)
    gradients = tape.gradient(loss, parameters.trained(), unconnected_gradients='zero')
    return gradients, Outputs(support_outputs[0], query_outputs), parameters.carried


def reptile_gradient(config: ModelConfig, phase: str, parameters: Parameters, iteration: Step,
                     task: TaskBatch) -> tuple[Tensors, Outputs, Tensors]:
    """The shared weights minus the adapted ones, used by Reptile as the gradient (Nichol, Achiam & Schulman, 2018, algorithm 1).

    Query outputs are computed only for the metrics. Returns the same as `meta_gradient`.
    """
    support_outputs, (*_, last) = zip(*loop_of(config)(config, task, parameters, config.num_updates, iteration=iteration))
    query_outputs = forward(config, parameters, task, last, config.num_updates - 1, query=True)
    gradients = {name: value - last.fast.get(name, value) for name, value in parameters.trained().items()}
    return gradients, Outputs(support_outputs[0], query_outputs), last.optimizer


class MAML:
    """The shared parameters, and what is done with them on meta-batches: TaskBatches of arrays [tasks, rows, dim].

    Attributes:
        weights: {'conv1': tf.Variable, ...}, the reference's names. The inner loop adapts them, unless `inner_weights` leaves some out.
        norm_params: {'0/beta': tf.Variable, ...}, trained by the outer loop, and adapted by the inner loop with `adapt_norm`.
        learning_rates: {name: tf.Variable} of learned inner step sizes; {} if they are fixed.
        steps_per_call: training steps per compiled call: 100 for small networks, where call overhead dominates, else 1.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, replicas: Replicas | None = None):
        """The initial weights are a function of config and seed. With several replicas, meta-batches are what
        `Replicas.distribute` makes, except for `predict` and `predict_unadapted`."""
        self.replicas, convolutional = replicas or Replicas(), config.image_shape is not None
        self.config = config = dataclasses.replace(config, engine=engine.resolve(config.engine, convolutional, config.recompute))
        initial = Parameters(utils.initial_weights(config, seed), utils.initial_norm_params(config))
        fast = fast_weights(config, initial)
        moved = {name: fast[name] for name in adapted_names(config, fast)}
        initial = initial._replace(learning_rates=utils.initial_learning_rates(config, moved),
                                   carried=utils.initial_inner_optimizer(config, moved))
        self._parameters = Parameters(*({name: tf.Variable(tf.cast(value, config.dtype)) for name, value in values.items()}
                                        for values in initial))
        self.weights, self.norm_params, rates, carried = self._parameters
        self.learning_rates, variables = {name[3:]: v for name, v in rates.items()}, self._parameters.trained()
        self.steps_per_call = 100 if sum(math.prod(v.shape) for v in variables.values()) < 10_000 else 1
        # Reference behaviour: the gradient of pre-training is not clipped. Neither is Reptile's update, which is not a gradient.
        clips = {'metatrain': config.clip if config.outer == 'gradient' else None, 'pretrain': None}
        rates = {'metatrain': functools.partial(meta_lr, config), 'pretrain': lambda iteration: config.meta_lr}  # no schedule
        self._optimizers = {phase: OPTIMIZERS[config.meta_optimizer](variables, rates[phase], clip) for phase, clip in clips.items()}
        metrics = ['pre_loss', 'post_loss'] + ['pre_accuracy', 'post_accuracy'] * (config.loss == 'xent')
        self._engine = engine.Engine(config.engine, config.task_chunk, convolutional, config.recompute, config.dtype,
                                     self.replicas, self._parameters, functools.partial(metrics_of, config), metrics)
        self._updates = {phase: optimizer.apply for phase, optimizer in self._optimizers.items()}
        # What the engine runs, with the structure of what it returns. Made once: TensorFlow compiles each function object again.
        self._gradients, self._gradient_structure = {}, (dict.fromkeys(variables), Outputs(0, 0), dict.fromkeys(carried))
        state = TaskState(dict.fromkeys(fast), (0, 0) if features_stay(config) else (), dict.fromkeys(carried))
        self._initial_state = (lambda parameters, _, task: tf.nest.map_structure(  # tf.vectorized_map needs an operation
            tf.identity, initial_state(config, parameters, task))), state
        self._adapt = functools.partial(adapt_and_predict, config), (Outputs(0, 0), state)
        self._predict_unadapted = (lambda parameters, _, task: forward(
            config, parameters, task, initial_state(config, parameters, task), 0, query=True)), None

    def parameters(self) -> dict[str, tf.Variable]:
        """{name: variable} of all that tasks share; 'lr/<name>' for learned step sizes."""
        return {name: variable for group in self._parameters for name, variable in group.items()}

    def _gradient(self, phase, iteration):
        """`meta_gradient`, or `reptile_gradient`, as it is in an iteration, and the structure of what it returns."""
        config, reptile = stage(self.config, iteration), phase == 'metatrain' and self.config.outer == 'reptile'
        key = phase, config.stop_grad, config.multi_step_loss
        if key not in self._gradients:
            self._gradients[key] = functools.partial(reptile_gradient if reptile else meta_gradient, config, phase)
        return self._gradients[key], self._gradient_structure

    def state(self) -> dict[str, tf.Variable]:
        """{name: variable}: everything that a training run needs to continue."""
        metatrain, pretrain = (optimizer.state(f'{phase}/adam/') for phase, optimizer in self._optimizers.items())
        return {**self.parameters(), **metatrain, **pretrain}

    def variant(self, **changes: Any) -> 'MAML':
        """A MAML with the same weights, another config and a fresh optimizer.

        With a smaller `dim_output` n it has the first n outputs. They make a network for n-way tasks: the labels of a task are
        in random order, so all outputs are equivalent.
        """
        other = MAML(dataclasses.replace(self.config, **changes), replicas=self.replicas)
        other.copy_parameters(self)
        return other

    def copy_parameters(self, other: 'MAML') -> None:
        """Copies weights and all other parameters from another MAML, which may have more outputs; see `variant`."""
        theirs = other.parameters()
        for name, variable in self.parameters().items():
            value = theirs[name]
            variable.assign(value if variable.shape == value.shape else value[..., :variable.shape[-1]])

    def train_steps(self, phase: str, batches: TaskBatch, iteration: int = 0, stopping: bool = False) -> Tensors:
        """Updates the shared parameters with meta-batches [steps, tasks, rows, dim], one after the other.

        `phase` is 'metatrain' or 'pretrain' (see `meta_gradient`), `iteration` that of the first step; all must be in one
        stage (`schedules.stage_end`). `stopping`: whether this process is about to stop.

        Returns:
            The metrics of `metrics_of` before each step, averaged over tasks; 'finite': whether losses and gradients were finite
            (a step in which they were not changes nothing); 'stopping': whether any process is about to stop. Each [steps].
        """
        return self._engine.train(*self._gradient(phase, iteration), self._updates[phase], batches,
                                  tf.constant(iteration, tf.int64), tf.cast(stopping, self.config.dtype))

    def metatrain_step(self, batch: TaskBatch, iteration: int = 0) -> Tensors:
        """One outer update with a meta-batch; returns scalars named as by `train_steps`."""
        found = self.train_steps('metatrain', self.replicas.add_leading_axis(batch), iteration)
        return {name: values[0] for name, values in found.items()}

    def pretrain_step(self, batch: TaskBatch) -> Tensors:
        """One update of joint training with a meta-batch; returns scalars named as by `train_steps`."""
        found = self.train_steps('pretrain', self.replicas.add_leading_axis(batch))
        return {name: values[0] for name, values in found.items()}

    def meta_gradients(self, batch: TaskBatch, iteration: int = 0) -> Tensors:
        """`meta_gradient`, or `reptile_gradient`, averaged over tasks, before clipping: {name: tensor}."""
        return self._engine.means(*self._gradient('metatrain', iteration), batch, tf.constant(iteration, tf.int64))[0]

    def pretrain_gradients(self, batch: TaskBatch) -> Tensors:
        """The gradient of the support loss before adaptation; otherwise like `meta_gradients`."""
        return self._engine.means(*self._gradient('pretrain', 0), batch, tf.constant(0, tf.int64))[0]

    def evaluate(self, batch: TaskBatch, num_updates: int) -> Metrics:
        """Metrics of a meta-batch, each [tasks] or [num_updates, tasks]; no task's figures depend on another's. num_updates >= 1."""
        state, found = self._engine.map_on_replicas(*self._initial_state, batch, tf.constant(0, tf.int64)), []
        for step in tf.range(num_updates, dtype=tf.int64):
            metrics, state = self._engine.map_and_measure(*self._adapt, batch, state, step)
            found.append(metrics)
        return Metrics(*(tf.stack(each) if post else each[0] for each, post in zip(zip(*found), itertools.cycle([0, 1]))))

    def predict(self, batch: TaskBatch, num_updates: int) -> Outputs:
        """Outputs before adaptation [tasks, N*K, dim_output], and after each of num_updates >= 1, [num_updates, tasks, N*Q, dim_output]."""
        state, found = self._engine.map(*self._initial_state, batch, tf.constant(0, tf.int64)), []
        for step in tf.range(num_updates, dtype=tf.int64):
            outputs, state = self._engine.map(*self._adapt, (batch, state), step)
            found.append(outputs)
        return Outputs(found[0].pre, tf.stack([outputs.post for outputs in found]))

    def predict_unadapted(self, batch: TaskBatch) -> tf.Tensor:
        """The outputs of the shared weights for the query rows of a meta-batch: [tasks, N*Q, dim_output]."""
        return self._engine.map(*self._predict_unadapted, batch, tf.constant(0, tf.int64))
