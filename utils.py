"""Small pure functions: network building blocks, initial values and losses."""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tensorflow as tf

from special_grads import batch_standardize, im2col, standardize

if TYPE_CHECKING:
    from maml import ModelConfig, Outputs
    from runtime.datasets.tasks import TaskBatch

BATCH_NORM_EPSILON, LAYER_NORM_EPSILON = 1e-3, 1e-12
ADAM_BETA2, ADAM_EPSILON = 0.999, 1e-8  # of the inner optimizer


def normalize(x: tf.Tensor, norm: str, scope: str, norm_params: dict[str, tf.Tensor], stats_rows: int | None = None) -> tf.Tensor:
    """Normalises hidden activations, which keep their shape, with the statistics of the current rows; there are no running averages.

    `batch_norm` takes mean and biased variance over all axes but the last, scales by gamma if there is one, and adds beta.
    `layer_norm` takes them over all axes but the first, then scales by gamma and adds beta.

    Args:
        x: [rows, ..., channels].
        norm: 'batch_norm', 'layer_norm' or 'None', which returns x.
        scope: the layer's name in norm_params, which holds '<scope>/beta' and '<scope>/gamma', each [channels].
        stats_rows: batch norm takes its statistics from the first `stats_rows` rows; None: from all.
    """
    axes = list(range(len(x.shape)))
    if norm == 'batch_norm':
        x, scale = standardize(x, axes[:-1], BATCH_NORM_EPSILON, stats_rows), norm_params.get(f'{scope}/gamma')
        return (x if scale is None else x * scale) + norm_params[f'{scope}/beta']
    if norm == 'layer_norm':
        return standardize(x, axes[1:], LAYER_NORM_EPSILON) * norm_params[f'{scope}/gamma'] + norm_params[f'{scope}/beta']
    return x


def add_bias(x: tf.Tensor, bias: tf.Tensor, norm: str) -> tf.Tensor:
    """x + bias; or x if batch norm follows, which subtracts any constant of a channel."""
    return x if norm == 'batch_norm' else x + bias


def conv2d(x: tf.Tensor, kernel: tf.Tensor, stride: int, as_matmul: bool = False) -> tf.Tensor:
    """Convolution with SAME padding: [rows, height, width, channels] -> [rows, ceil(height / stride), ..., filters].

    as_matmul: compute a matrix product whatever the stride, so that `tf.vectorized_map` can batch the products of many tasks,
        each with its own kernel. With stride 1 the windows take nine times the memory of the images.
    """
    if stride == 1 and not as_matmul:
        return tf.nn.conv2d(x, kernel, stride, 'SAME')
    size, _, channels, filters = kernel.shape
    x = im2col(x, size, stride)
    rows, height, width, inputs = x.shape
    x = tf.reshape(x, [rows * height * width, inputs]) @ tf.reshape(kernel, [inputs, filters])
    return tf.reshape(x, [rows, height, width, filters])


def conv_block(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor, norm: str, scope: str, norm_params: dict[str, tf.Tensor],
               max_pool: bool, as_matmul: bool = False, stats_rows: int | None = None) -> tf.Tensor:
    """Convolution, normalisation, ReLU; the image is halved by stride 2 or, with max_pool, by 2x2 pooling.

    Returns [rows, height', width', filters]: half the size, rounded up with stride (SAME), down with pooling (VALID).

    Args:
        x: [rows, height, width, channels].
        kernel, bias: [3, 3, channels, filters] and [filters].
        norm, scope, norm_params, stats_rows: as for `normalize`; as_matmul: as for `conv2d`.
    """
    scale = norm_params.get(f'{scope}/gamma')
    if norm == 'batch_norm' and stats_rows is None:
        # Normalisation and ReLU are increasing, so the largest of a window can be picked before them. With a negative scale
        # they are not; its sign can be moved onto the kernel, because batch-norm(sign z) = sign batch-norm(z).
        if scale is not None and max_pool:
            sign = tf.where(tf.stop_gradient(scale) < 0, -tf.ones_like(scale), tf.ones_like(scale))
            kernel, scale = kernel * sign, scale * sign
        x = batch_standardize(conv2d(x, kernel, 1 if max_pool else 2, as_matmul), BATCH_NORM_EPSILON, max_pool)
        return tf.nn.relu((x if scale is None else x * scale) + norm_params[f'{scope}/beta'])
    x = add_bias(conv2d(x, kernel, 1 if max_pool else 2, as_matmul), bias, norm)
    x = tf.nn.relu(normalize(x, norm, scope, norm_params, stats_rows))
    return tf.nn.max_pool2d(x, 2, 2, 'VALID') if max_pool else x


def dense_block(x: tf.Tensor, matrix: tf.Tensor, bias: tf.Tensor, norm: str, scope: str, norm_params: dict[str, tf.Tensor],
                stats_rows: int | None = None) -> tf.Tensor:
    """Affine map, normalisation, ReLU: [rows, inputs] -> [rows, units]. The last arguments are those of `normalize`."""
    return tf.nn.relu(normalize(add_bias(x @ matrix, bias, norm), norm, scope, norm_params, stats_rows))


def at_step(values: tf.Tensor, step: int | tf.Tensor) -> tf.Tensor:
    """Entry number `step` of values [steps, ...]; the last one beyond them."""
    last = values.shape[0] - 1
    if isinstance(step, int):
        return values[min(step, last)]
    # Not values[step], for each value of which XLA compiles the whole graph.
    return tf.gather(with_dense_gradient(values), tf.minimum(step, last))


def map_rows(function: Callable[[tf.Tensor], tf.Tensor], rows: tf.Tensor, in_one_graph: bool = True) -> tf.Tensor:
    """What a function returns for each row, all [rows, ...]; in one graph this is faster, but drops custom gradients in the function."""
    return tf.vectorized_map(function, rows) if in_one_graph else tf.map_fn(function, rows)


@tf.custom_gradient
def with_dense_gradient(x: tf.Tensor) -> tf.Tensor:
    """x, whose gradient is a tensor, not the slices of one."""
    return tf.identity(x), tf.convert_to_tensor


def rows_of_step(rows: int, size: int, step: int | tf.Tensor, iteration: int | tf.Tensor) -> tf.Tensor:
    """Indices of the rows that an inner step sees, int32 [size]: all `rows` in random order, reshuffled after each pass.

    Args:
        rows: of the support set.
        size: of each step's part; it may be larger than `rows`.
        step: counts from 0; each step goes on where the one before ended.
        iteration: of the training; each has orders of its own.
    """
    first = tf.cast(step, tf.int32) * size

    def order(number):
        # Not random floats, which XLA makes of other bits; these 23 are those of which TensorFlow itself makes them.
        bits = tf.random.stateless_uniform([rows], [tf.cast(iteration, tf.int32), first // rows + number], None, None, tf.uint32)
        return tf.argsort(tf.cast(tf.bitwise.bitwise_and(bits, tf.constant(2 ** 23 - 1, tf.uint32)), tf.int32))

    passes = [order(number) for number in range(1 + -(-(size - 1) // rows))]
    return tf.gather(tf.concat(passes, axis=0), first % rows + tf.range(size))  # not a slice: see `at_step`


def adam_step(gradients: dict[str, tf.Tensor], state: dict[str, tf.Tensor]) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]:
    """Adam without momentum: {name: update direction, to be multiplied by the step size and subtracted}, and the new state.

    Reptile's inner optimizer (openai/supervised-reptile), with epsilon added to the uncorrected root as TensorFlow 1 did. Its
    state is {'inner/t': steps so far, 'inner/v/<name>': decaying mean of squared gradients}.
    """
    steps = state['inner/t'] + 1
    squares = {name: ADAM_BETA2 * state[f'inner/v/{name}'] + (1 - ADAM_BETA2) * tf.square(gradient)
               for name, gradient in gradients.items()}
    correction = tf.sqrt(1 - ADAM_BETA2 ** steps)
    moves = {name: correction * gradient / (tf.sqrt(squares[name]) + ADAM_EPSILON) for name, gradient in gradients.items()}
    return moves, {'inner/t': steps, **{f'inner/v/{name}': square for name, square in squares.items()}}


def mse(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Mean squared error over the last two axes: [..., rows, dim] -> [...]."""
    return tf.reduce_mean(tf.square(outputs - targets), axis=(-2, -1))


def xent(outputs: tf.Tensor, targets: tf.Tensor, shots: float) -> tf.Tensor:
    """Softmax cross-entropy summed over the rows and divided by the number of *shots*: [..., rows, way] -> [...].

    Reference behaviour: not divided by the number of rows, so that a task's loss and its gradient are N times the mean
    ones for N-way support sets. The inner step sizes people use are tuned to that.
    """
    return tf.reduce_sum(tf.nn.softmax_cross_entropy_with_logits(targets, outputs), axis=-1) / shots


def loss_of(config: ModelConfig, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """The task loss, [..., rows, dim_output] -> [...]; see `mse` and `xent` for what it is divided by."""
    if config.loss == 'mse':
        return mse(outputs, targets)
    return xent(outputs, targets, targets.shape[-2] if config.mean_loss else config.update_batch_size)


def accuracy(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Fraction of rows whose largest output is the target's class: [..., rows, way] -> [...], in [0, 1]; nan if an output is not finite,
    for then adaptation diverged, and which output is the largest says nothing."""
    hits = tf.equal(tf.argmax(outputs, axis=-1), tf.argmax(targets, axis=-1))
    fraction = tf.reduce_mean(tf.cast(hits, outputs.dtype), axis=-1)
    return tf.where(tf.reduce_all(tf.math.is_finite(outputs), axis=(-2, -1)), fraction, math.nan)


class Metrics(NamedTuple):
    """Losses and accuracies, one value per task; callers average. Accuracies, in classification only, are in [0, 1]."""
    pre_loss: tf.Tensor         # [tasks]           of support rows before adaptation
    post_losses: tf.Tensor      # [updates, tasks]  of query rows after each update
    pre_accuracy: tf.Tensor | None = None
    post_accuracies: tf.Tensor | None = None

    def reported(self) -> dict[str, np.ndarray]:
        """{metric: its values before adaptation and after each update, [1 + updates, tasks]}; the last is that of tables."""
        pairs = {'loss': (self.pre_loss, self.post_losses), 'accuracy': (self.pre_accuracy, self.post_accuracies)}
        return {name: np.concatenate([pre[None], post]) for name, (pre, post) in pairs.items() if pre is not None}


def metric_functions(config: ModelConfig) -> dict[str, Callable[[TaskBatch, Outputs], tf.Tensor]]:
    """{name: function of a meta-batch and a maml.Outputs for it that returns the values of the tasks, [tasks]}."""
    loss = functools.partial(loss_of, config)
    losses = {'pre_loss': lambda batch, outputs: loss(outputs.pre, batch.support_y),
              'post_loss': lambda batch, outputs: loss(outputs.post, batch.query_y)}
    accuracies = {'pre_accuracy': lambda batch, outputs: accuracy(outputs.pre, batch.support_y),
                  'post_accuracy': lambda batch, outputs: accuracy(outputs.post, batch.query_y)}
    return losses if config.loss == 'mse' else losses | accuracies


def stack_metrics(rows: Sequence[dict[str, tf.Tensor]]) -> Metrics:
    """Metrics of {name: [tasks]} after each update."""
    post = {name: tf.stack([row[name] for row in rows]) for name in rows[0] if name.startswith('post')}
    return Metrics(rows[0]['pre_loss'], post['post_loss'], rows[0].get('pre_accuracy'), post.get('post_accuracy'))


def truncated_normal(shape: Sequence[int], seed: Sequence[int]) -> tf.Tensor:
    """Initial weights, normal with mean 0 and standard deviation 0.01, redrawn beyond two standard deviations."""
    return tf.random.stateless_truncated_normal(shape, seed, stddev=0.01)


def glorot_uniform(shape: Sequence[int], seed: Sequence[int]) -> tf.Tensor:
    """Initial weights, uniform with variance 2 / (inputs + outputs) (Glorot & Bengio, 2010)."""
    receptive_field = math.prod(shape[:-2])
    limit = math.sqrt(6 / (receptive_field * (shape[-2] + shape[-1])))
    return tf.random.stateless_uniform(shape, seed, -limit, limit)
