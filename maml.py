"""Model-Agnostic Meta-Learning (Finn, Abbeel & Levine, ICML 2017, arXiv:1703.03400).

Read from the top: the network is a function of a dict of weights (`forward`); the inner loop makes new dicts by gradient
descent on a task's support set (`inner_loop`, line 6 of algorithm 1); the outer step moves the shared weights along the
gradient of the query loss through that inner loop (`MAML.meta_gradients`, `MAML.metatrain_step`, line 8).
"""
import dataclasses
import functools
import math
import os
import zlib
from typing import NamedTuple, Optional, Tuple

import tensorflow as tf

from distribution import Replicas
from utils import accuracy, conv_block, dense_block, mse, xent

CONV_LAYERS = (1, 2, 3, 4)
ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON = 0.9, 0.999, 1e-8
# Of sums over tasks. In float32 they would depend on how tasks are divided between replicas and chunks, and training goes apart
# from a last digit on: a ReLU near zero is soon on in one run and off in the other.
SUM_DTYPE = tf.float64


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the model is and how it learns. Fields are named like the flags; the others come from the data source."""
    dim_input: int                          # numbers per row
    dim_output: int                         # targets per row; the way N in classification
    loss: str                               # 'mse' | 'xent'
    update_batch_size: int                  # K, by which 'xent' divides
    update_lr: float                        # inner step size, alpha
    num_updates: int = 1                    # inner updates of a training step
    meta_lr: float = 0.001                  # Adam step size of the outer loop, beta
    norm: str = 'batch_norm'                # 'batch_norm' | 'layer_norm' | 'None'
    image_shape: Optional[Tuple[int, int, int]] = None  # (height, width, channels); None: fully connected net
    dim_hidden: Tuple[int, ...] = (40, 40)  # fully connected layer sizes
    num_filters: int = 64
    max_pool: bool = False
    head: str = 'mean'                      # 'mean' | 'flatten': what conv nets do before the last layer
    stop_grad: bool = False                 # first-order approximation
    query_norm: str = 'batch'               # whose statistics batch norm gives query rows: their own, 'batch', or 'support'
    clip: Optional[float] = None            # elementwise bound of the meta-gradient
    # How it is computed; changes no number but by rounding.
    engine: str = 'auto'                    # 'tasks': one task per core; 'wide': all tasks in one compiled graph; 'auto'
    task_chunk: Optional[int] = None        # tasks whose gradients are computed at a time; a divisor of the meta-batch
    dtype: str = 'float32'                  # 'float64', for batches of such, where rounding must not decide


class Outputs(NamedTuple):
    """What the network said about a task (with a leading axis [tasks]: about a meta-batch)."""
    pre: tf.Tensor      # [N*K, dim_output]  support rows, before adaptation
    post: tf.Tensor     # [N*Q, dim_output]  query rows, after adaptation; from `predict` [updates, tasks, N*Q, dim_output]


class Metrics(NamedTuple):
    """Losses and accuracies, one value per task; callers average. Accuracies are fractions in [0, 1]."""
    pre_loss: tf.Tensor                         # [tasks]           support loss before adaptation
    post_losses: tf.Tensor                      # [updates, tasks]  query loss after each update
    pre_accuracy: Optional[tf.Tensor] = None    # [tasks]           classification only
    post_accuracies: Optional[tf.Tensor] = None  # [updates, tasks]


# The network: a pure function of its weights ------------------------------------------------------------------------

def initial_weights(config, seed):
    """The weights that the inner loop adapts, by the reference's names, each a function of (seed, name) only.

    Returns:
        {name: float32 tensor}: `conv1 b1 ... conv4 b4 w5 b5`, or `w1 b1 w2 b2 ...` for the fully connected net.
    """
    def draw(name, distribution, *shape):
        return distribution(shape, [seed, zlib.crc32(name.encode())])

    weights = {}
    if config.image_shape is None:
        sizes = (config.dim_input, *config.dim_hidden, config.dim_output)
        for layer, (inputs, units) in enumerate(zip(sizes, sizes[1:]), start=1):
            weights[f'w{layer}'] = draw(f'w{layer}', _truncated_normal, inputs, units)
            weights[f'b{layer}'] = tf.zeros([units])
        return weights

    height, width, channels = config.image_shape
    for layer in CONV_LAYERS:
        weights[f'conv{layer}'] = draw(f'conv{layer}', _glorot_uniform, 3, 3, channels, config.num_filters)
        weights[f'b{layer}'] = tf.zeros([config.num_filters])
        channels = config.num_filters
        height, width = (size // 2 if config.max_pool else -(-size // 2) for size in (height, width))
    if config.head == 'mean':
        weights['w5'] = draw('w5', tf.random.stateless_normal, channels, config.dim_output)
    else:
        weights['w5'] = draw('w5', _glorot_uniform, height * width * channels, config.dim_output)
    weights['b5'] = tf.zeros([config.dim_output])
    return weights


def _truncated_normal(shape, seed):
    return tf.random.stateless_truncated_normal(shape, seed, stddev=0.01)


def _glorot_uniform(shape, seed):
    receptive_field = math.prod(shape[:-2])
    limit = math.sqrt(6 / (receptive_field * (shape[-2] + shape[-1])))
    return tf.random.stateless_uniform(shape, seed, -limit, limit)


def initial_norm_params(config):
    """Offsets (beta, 0) and, for layer norm, scales (gamma, 1): {'<scope>/beta': float32 [channels], ...}.

    Shared by all tasks: trained by the outer loop, not adapted by the inner one.
    """
    if config.image_shape is None:
        scopes = {_dense_scope(layer): units for layer, units in enumerate(config.dim_hidden, start=1)}
    else:
        scopes = {_conv_scope(layer): config.num_filters for layer in CONV_LAYERS}
    params = {}
    for scope, channels in scopes.items():
        if config.norm in ('batch_norm', 'layer_norm'):
            params[f'{scope}/beta'] = tf.zeros([channels])
        if config.norm == 'layer_norm':
            params[f'{scope}/gamma'] = tf.ones([channels])
    return params


def _conv_scope(layer):
    return str(layer - 1)


def _dense_scope(layer):
    return '0' if layer == 1 else str(layer)  # Reference behaviour: there is no scope 1.


def forward(config, x, weights, norm_params, known=None):
    """The network's output for a set of rows; under batch norm each row's output depends on all of them.

    Args:
        x: float [rows, dim_input]; images in [0, 1], flattened.
        weights, norm_params: as made by `initial_weights` and `initial_norm_params`.
        known: under batch norm each row's output depends on the first so many rows only, and on itself.

    Returns:
        [rows, dim_output]: predictions, or logits in classification.
    """
    if config.image_shape is None:
        for layer in range(1, len(config.dim_hidden) + 1):
            x = dense_block(x, weights[f'w{layer}'], weights[f'b{layer}'], config.norm, _dense_scope(layer), norm_params,
                            known)
        layer = len(config.dim_hidden) + 1
        return x @ weights[f'w{layer}'] + weights[f'b{layer}']

    x = tf.reshape(x, [-1, *config.image_shape])
    for layer in CONV_LAYERS:
        x = conv_block(x, weights[f'conv{layer}'], weights[f'b{layer}'], config.norm, _conv_scope(layer), norm_params,
                       config.max_pool, by_product=config.engine == 'wide', known=known)
    if config.head == 'mean':
        x = tf.reduce_mean(x, axis=[1, 2])
    else:
        x = tf.reshape(x, [-1, math.prod(x.shape[1:])])
    return x @ weights['w5'] + weights['b5']


def loss_of(config, outputs, targets):
    """The task loss, [..., rows, dim_output] -> [...]: see `mse` and `xent` for what is divided by what."""
    return mse(outputs, targets) if config.loss == 'mse' else xent(outputs, targets, config.update_batch_size)


# Learning one task --------------------------------------------------------------------------------------------------

def inner_loop(config, support_x, support_y, weights, norm_params, num_updates):
    """Adapts the weights to one task by gradient descent on its support set (line 6 of algorithm 1).

    Args:
        support_x, support_y: [N*K, dim_input] and [N*K, dim_output].
        num_updates: how many gradient steps, at least 1.

    Yields:
        After each step: the support outputs *before* it, [N*K, dim_output], and the fast weights after it, a dict like
        `weights` and differentiable with respect to it (with `stop_grad` as if the inner gradient were a constant).
    """
    for _ in range(num_updates):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            outputs = forward(config, support_x, weights, norm_params)
            loss = loss_of(config, outputs, support_y)
        gradients = tape.gradient(loss, weights, unconnected_gradients='zero')
        if config.stop_grad:
            gradients = {name: tf.stop_gradient(gradient) for name, gradient in gradients.items()}
        weights = {name: weights[name] - config.update_lr * gradients[name] for name in weights}
        yield outputs, weights


def answer(config, task, weights, norm_params):
    """The network's output for a task's query rows, [N*Q, dim_output].

    Under batch norm, query rows are normalised by their own statistics (Reference behaviour: so an answer depends on the other
    query rows, and evaluation is transductive), or with `query_norm='support'` by those of the support rows, each by itself.
    """
    if config.query_norm == 'batch':
        return forward(config, task.query_x, weights, norm_params)
    support_rows = task.support_x.shape[0]
    rows = tf.concat([task.support_x, task.query_x], axis=0)
    return forward(config, rows, weights, norm_params, known=support_rows)[support_rows:]


def learn_task(config, task, weights, norm_params, num_updates):
    """Runs the inner loop on one task and says what the network answers before and after.

    Args:
        task: a TaskBatch of one task, without the leading axis.
        weights: where the inner loop starts from.

    Returns:
        Outputs, and the fast weights.
    """
    inner_steps = list(inner_loop(config, task.support_x, task.support_y, weights, norm_params, num_updates))
    (pre, _), (_, fast_weights) = inner_steps[0], inner_steps[-1]
    return Outputs(pre, answer(config, task, fast_weights, norm_params)), fast_weights


def metrics_of(config, outputs, batch):
    """Metrics from Outputs of a meta-batch; without an axis [updates] where the outputs have none."""
    query_y = tf.broadcast_to(batch.query_y, tf.shape(outputs.post))
    losses = loss_of(config, outputs.pre, batch.support_y), loss_of(config, outputs.post, query_y)
    if config.loss == 'mse':
        return Metrics(*losses)
    return Metrics(*losses, accuracy(outputs.pre, batch.support_y), accuracy(outputs.post, query_y))


# Learning to learn --------------------------------------------------------------------------------------------------

class Adam:
    """Adam (Kingma & Ba, 2015), with epsilon added to the uncorrected root as TensorFlow 1 did (end of its section 2)."""

    def __init__(self, variables, learning_rate):
        """variables: {name: tf.Variable}, updated in place."""
        def zeros():
            return {name: tf.Variable(tf.zeros_like(v), trainable=False) for name, v in variables.items()}

        self.variables, self.learning_rate = variables, learning_rate
        self.step, self.means, self.squares = tf.Variable(0, dtype=tf.int64, trainable=False), zeros(), zeros()

    def apply(self, gradients):
        """One update of every variable by {name: gradient}."""
        step = tf.cast(self.step.assign_add(1), next(iter(self.variables.values())).dtype)
        rate = self.learning_rate * tf.sqrt(1 - ADAM_BETA2 ** step) / (1 - ADAM_BETA1 ** step)
        for name, variable in self.variables.items():
            gradient, mean, square = gradients[name], self.means[name], self.squares[name]
            mean.assign(ADAM_BETA1 * mean + (1 - ADAM_BETA1) * gradient)
            square.assign(ADAM_BETA2 * square + (1 - ADAM_BETA2) * tf.square(gradient))
            variable.assign_sub(rate * mean / (tf.sqrt(square) + ADAM_EPSILON))

    def state(self):
        """{name: variable}: what must be saved to go on."""
        return {'step': self.step, **{f'm/{name}': v for name, v in self.means.items()},
                **{f'v/{name}': v for name, v in self.squares.items()}}


class MAML:
    """The shared weights, and what is done with them on meta-batches.

    A meta-batch is a TaskBatch of arrays [tasks, rows, dim].

    Attributes:
        weights: {'conv1': tf.Variable, ...}, adapted in the inner loop; the reference's names.
        norm_params: {'0/beta': tf.Variable, ...}, trained by the outer loop only.
        steps_per_call: how many steps to ask of one `train_steps`: many where the call would take longer than the step.
    """

    def __init__(self, config, seed=0, replicas=None):
        """Initial weights are a function of config and seed. The attribute `config` has `engine` resolved.

        Args:
            replicas: distribution.Replicas that divide meta-batches between them; None: one. With several, a meta-batch is
                what `Replicas.each` makes of TaskBatches, but for `predict`, which knows one.
        """
        self.replicas = replicas or Replicas()
        self.config = config = dataclasses.replace(config, engine=_engine(config))
        self.weights, self.norm_params = (
            {name: tf.Variable(tf.cast(value, config.dtype)) for name, value in values.items()}
            for values in (initial_weights(config, seed), initial_norm_params(config)))
        variables = {**self.weights, **self.norm_params}
        self._adams = {phase: Adam(variables, config.meta_lr) for phase in ('metatrain', 'pretrain')}

        self.steps_per_call = 100 if sum(math.prod(v.shape) for v in variables.values()) < 10_000 else 1
        # On a CPU, XLA's sums over large images are not accurate enough for second derivatives.
        xla = config.engine == 'wide' and (config.image_shape is None or _has_gpu())
        # XLA compiles what one replica computes; with a single one, that is all.
        alone = self.replicas.count == 1
        compiled = functools.partial(tf.function, jit_compile=xla and alone, autograph=False)
        on_replica = functools.partial(tf.function, jit_compile=xla, autograph=False)
        self._sums, self._adapt = (self._sums, self._adapt) if alone else (on_replica(self._sums), on_replica(self._adapt))
        self._compiled_gradients = compiled(self._gradients)
        self._compiled_steps = compiled(self._steps)
        self._compiled_begin = compiled(self._begin)
        self._compiled_measure = compiled(self._measure)
        self._compiled_adapt = on_replica(self._adapt)
        self._compiled_answer = on_replica(self._answer)

    def state(self):
        """{name: tf.Variable}: everything that a training run needs to go on."""
        return {**self.weights, **self.norm_params,
                **{f'{phase}/adam/{name}': variable
                   for phase, adam in self._adams.items() for name, variable in adam.state().items()}}

    def variant(self, **changes):
        """A MAML with the same weights, fresh optimizers and another config; with fewer outputs, if `dim_output` is less.

        Of N outputs the first n make a network for n-way tasks: tasks number their classes in random order, so that all outputs
        have learnt the same.
        """
        other = MAML(dataclasses.replace(self.config, **changes), replicas=self.replicas)
        for ours, variables in (self.weights, other.weights), (self.norm_params, other.norm_params):
            for name, variable in variables.items():
                variable.assign(ours[name][..., :variable.shape[-1]])
        return other

    def predict(self, batch, num_updates):
        """Outputs for a meta-batch before adaptation and after each of num_updates inner updates.

        Returns:
            Outputs: pre [tasks, N*K, dim_output], post [num_updates, tasks, N*Q, dim_output].
        """
        batch = tf.nest.map_structure(tf.convert_to_tensor, batch)
        fast_weights, norm_params, updates = _for_each_task(_values(self.weights), batch), _values(self.norm_params), []
        for _ in range(num_updates):
            outputs, fast_weights = self._compiled_adapt(batch, fast_weights, norm_params)
            updates.append(outputs)
        return Outputs(updates[0].pre, tf.stack([outputs.post for outputs in updates]))

    def predict_unadapted(self, batch):
        """What the shared weights answer for the query rows of a meta-batch: [tasks, N*Q, dim_output]."""
        return self._compiled_answer(tf.nest.map_structure(tf.convert_to_tensor, batch))

    def evaluate(self, batch, num_updates):
        """Metrics of a meta-batch, each [tasks] or [num_updates, tasks]; no task's figures depend on another's."""
        fast_weights, updates = self._compiled_begin(batch), []
        for _ in range(num_updates):
            metrics, fast_weights = self._compiled_measure(batch, fast_weights)
            updates.append(metrics)
        (pre_loss, *pre_accuracy), post = updates[0][::2], tf.stack(updates, axis=1)[1::2]
        return Metrics(pre_loss, post[0], *pre_accuracy, *post[1:])

    def meta_gradients(self, batch):
        """The exact gradient of the query loss after the last inner update, averaged over tasks, before clipping.

        Returns:
            {name: tensor} over weights and norm_params.
        """
        return self._compiled_gradients('metatrain', batch)[0]

    def pretrain_gradients(self, batch):
        """The gradient of the support loss before adaptation, averaged over tasks. Returns as above."""
        return self._compiled_gradients('pretrain', batch)[0]

    def train_steps(self, phase, batches, stopping=False):
        """Updates the shared weights with meta-batches [steps, tasks, rows, dim], one after the other.

        Args:
            phase: 'metatrain': outer updates (algorithm 1 of the paper), by the gradient of the query loss after the last
                inner update. 'pretrain': joint training, by that of the support loss before adaptation.
            stopping: whether this process is about to stop.

        Returns:
            {'pre_loss', 'post_loss'} and in classification {'pre_accuracy', 'post_accuracy'}, each [steps]: support rows
            before adaptation and query rows after the last inner update, averaged over tasks, as they were before the step.
            {'finite'}, bool [steps]: whether losses and gradients were numbers; a step where they were not changes nothing.
            {'stopping'}, bool [steps]: whether any process said that it is about to.
        """
        return self._compiled_steps(phase, batches, tf.cast(stopping, self.config.dtype))

    def metatrain_step(self, batch):
        """One outer update with a meta-batch [tasks, rows, dim]; scalars as named by `train_steps`."""
        return self._one_step('metatrain', batch)

    def pretrain_step(self, batch):
        """One update of joint training with a meta-batch [tasks, rows, dim]; scalars as named by `train_steps`."""
        return self._one_step('pretrain', batch)

    def _one_step(self, phase, batch):
        batches = self.replicas.run(lambda batch: tf.nest.map_structure(lambda array: array[None], batch), batch)
        return {name: values[0] for name, values in self.train_steps(phase, batches).items()}

    def _adapt(self, batch, fast_weights, norm_params):
        """One inner update of each task from weights of its own: Outputs, and the weights after it, all [tasks, ...]."""
        return self._map_tasks(
            lambda task_and_weights: learn_task(self.config, *task_and_weights, norm_params, num_updates=1),
            (batch, fast_weights), self._signature(fast_weights))

    def _answer(self, batch):
        weights, norm_params = _values(self.weights), _values(self.norm_params)
        return self._map_tasks(lambda task: answer(self.config, task, weights, norm_params), batch, self.config.dtype)

    def _begin(self, batch):
        """The shared weights for each task, on all replicas."""
        weights = _values(self.weights)
        return self.replicas.run(lambda batch: _for_each_task(weights, batch), batch)

    def _measure(self, batch, fast_weights):
        """`_adapt` on all replicas: Metrics as a tensor [fields, tasks of all replicas], and the weights, on each its own."""
        norm_params = _values(self.norm_params)

        def replica(batch, fast_weights):
            outputs, fast_weights = self._adapt(batch, fast_weights, norm_params)
            metrics = metrics_of(self.config, outputs, batch)
            return tf.stack([values for values in metrics if values is not None]), fast_weights

        metrics, fast_weights = self.replicas.run(replica, batch, fast_weights)
        return self.replicas.gather(metrics, axis=1), fast_weights

    def _gradients(self, phase, batches, step=None, stopping=0.):
        """Gradients of the phase's objective averaged over tasks, the means of the metrics, and the sum of `stopping`.

        Args:
            batches: on each replica its part of a meta-batch [tasks, rows, dim]; with `step`, of that one of
                [steps, tasks, rows, dim].
        """
        weights, norm_params = _values(self.weights), _values(self.norm_params)

        def shares(batches):
            batch = batches if step is None else tf.nest.map_structure(lambda array: array[step], batches)
            tasks = batch.support_x.shape[0] * self.replicas.count
            sums = self._sums(phase, batch, weights, norm_params)
            return *tf.nest.map_structure(lambda total: total / tasks, sums), tf.cast(stopping, SUM_DTYPE)

        return tf.nest.map_structure(lambda total: tf.cast(total, self.config.dtype), self.replicas.total(shares, batches))

    def _sums(self, phase, batch, weights, norm_params):
        """Gradients and metrics as named by `_scores`, summed over the tasks of a batch, in SUM_DTYPE."""
        def task_gradients(task):
            with tf.GradientTape() as tape:
                tape.watch((weights, norm_params))
                outputs, _ = learn_task(self.config, task, weights, norm_params, self.config.num_updates)
                if phase == 'metatrain':
                    objective = loss_of(self.config, outputs.post, task.query_y)
                else:
                    objective = loss_of(self.config, outputs.pre, task.support_y)
            return outputs, tape.gradient(objective, {**weights, **norm_params}, unconnected_gradients='zero')

        def sums(batch):
            outputs, gradients = self._map_tasks(task_gradients, batch, self._signature((*weights, *norm_params)))
            metrics = metrics_of(self.config, outputs, batch)
            scores = dict(zip(self._scores(), metrics))
            return tf.nest.map_structure(lambda values: tf.reduce_sum(tf.cast(values, SUM_DTYPE), axis=0), (gradients, scores))

        tasks = batch.support_x.shape[0]
        chunk = self.config.task_chunk or tasks
        if chunk == tasks:
            return sums(batch)
        chunks = tf.nest.map_structure(lambda array: tf.reshape(array, [tasks // chunk, chunk, *array.shape[1:]]), batch)
        zeros = ({name: tf.zeros_like(value, SUM_DTYPE) for name, value in {**weights, **norm_params}.items()},
                 dict.fromkeys(self._scores(), tf.zeros([], SUM_DTYPE)))
        return tf.foldl(lambda totals, batch: tf.nest.map_structure(tf.add, totals, sums(batch)), chunks, zeros,
                        parallel_iterations=1)

    def _signature(self, names):
        """What `_map_tasks` must know of Outputs and a dict of tensors."""
        dtype = self.config.dtype
        return Outputs(dtype, dtype), dict.fromkeys(names, dtype)

    def _scores(self):
        """The names under which training reports the fields of Metrics, in their order."""
        return ['pre_loss', 'post_loss'] + ['pre_accuracy', 'post_accuracy'] * (self.config.loss == 'xent')

    def _steps(self, phase, batches, stopping):
        def step(index):
            gradients, means, stopped = self._gradients(phase, batches, index, stopping)
            # Before clipping, which makes a number of infinity; and of squares, which Adam keeps.
            finite = _all_finite((tf.nest.map_structure(tf.square, gradients), means))
            if phase == 'metatrain' and self.config.clip is not None:
                gradients = {name: tf.clip_by_value(gradient, -self.config.clip, self.config.clip)
                             for name, gradient in gradients.items()}
            tf.cond(finite, lambda: self._adams[phase].apply(gradients), lambda: None)
            return {**means, 'finite': finite, 'stopping': stopped > 0}

        signature = {**dict.fromkeys(self._scores(), self.config.dtype), 'finite': tf.bool, 'stopping': tf.bool}
        steps = self.replicas.local(batches.support_x).shape[0]
        return tf.map_fn(step, tf.range(steps), fn_output_signature=signature, parallel_iterations=1)

    def _map_tasks(self, function, batch, signature):
        """Applies a function of one task to every task of a meta-batch and stacks what it returns."""
        if self.config.engine == 'wide':
            return tf.vectorized_map(function, batch)
        return tf.map_fn(function, batch, fn_output_signature=signature, parallel_iterations=os.cpu_count())


def _engine(config):
    """Dense nets are small, and GPUs are wide: all tasks in one graph. Convolutions fill a CPU core: one task per core."""
    if config.engine != 'auto':
        return config.engine
    return 'wide' if config.image_shape is None or _has_gpu() else 'tasks'


def _has_gpu():
    return bool(tf.config.list_physical_devices('GPU'))


def _all_finite(tensors):
    """Whether every number of a structure of tensors is one."""
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tf.nest.flatten(tensors)])


def _values(variables):
    return {name: variable.read_value() for name, variable in variables.items()}


def _for_each_task(weights, batch):
    """The shared weights repeated for each task of a batch: {name: [tasks, ...]}."""
    return {name: tf.repeat(values[None], batch.support_x.shape[0], axis=0) for name, values in weights.items()}


