"""Operations whose second derivatives TensorFlow gets wrong or computes slowly.

MAML differentiates through a gradient, so every operation of the network is differentiated twice. `tf.nn.moments`, and
with it the Keras normalisation layers, stops the gradient at the mean inside the variance: harmless for the first
derivative, where that term vanishes, and wrong by some percent for the second. The functions below are exact in both.

A convolution's output is the largest tensor of a network, and every operation on it, differentiated twice, passes over it
several times. `batch_standardize` has both derivatives in closed form instead: a few passes, each one compiled loop where
images are large. `im2col` turns convolutions of small images into matrix products.
"""
import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

try:
    from tensorflow.python.eager.record import stop_recording  # which has no public name
except ImportError:  # TensorFlow before 2.13
    from tensorflow.python.eager.tape import stop_recording

SUMMED = 256     # numbers over which several axes are averaged at a time
LARGE = 20_000   # numbers from which on launching a compiled loop takes less time than several plain loops without pooling
Structure = Any  # nested tensors


def standardize(x: tf.Tensor, axes: Sequence[int], epsilon: float, stats_rows: int | None = None) -> tf.Tensor:
    """Shifts and scales x to mean 0 and (nearly) variance 1 over `axes`, exactly differentiable any number of times.

    Args:
        x: float tensor of any shape.
        axes: the axes over which mean and variance are taken, each dividing by the number of elements reduced.
        epsilon: added to the (biased) variance before the square root.
        stats_rows: mean and variance are taken from the first `stats_rows` rows; None: from all.

    Returns:
        A tensor shaped like x.
    """
    def mean(values):
        return _mean(values if stats_rows is None else values[:stats_rows], axes)

    centred = x - mean(x)
    return centred * tf.math.rsqrt(mean(tf.square(centred)) + epsilon)


def moments(x: tf.Tensor, axes: Sequence[int], keepdims: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and biased variance over axes, as `tf.nn.moments`, but exactly differentiable any number of times."""
    axes = [axis % len(x.shape) for axis in axes]
    size = math.prod(x.shape[axis] for axis in axes)

    @tf.custom_gradient
    def variance(x):
        # The sum of what is centred is 0: the term of the mean vanishes in the first derivative. It is in the second.
        return _mean(tf.square(x - _mean(x, axes)), axes), lambda upstream: 2 / size * upstream * (x - _mean(x, axes))

    both = _mean(x, axes), variance(x)
    return both if keepdims else tuple(tf.squeeze(values, axes) for values in both)


@contextlib.contextmanager
def exact_statistics(rows: int, stats_rows: int | None = None, sizes: list[int] | None = None) -> Iterator[None]:
    """While entered, `tf.nn.moments`, and with it every layer of Keras, is exact in this thread: see `moments`.

    Args:
        rows: of what the network is given.
        stats_rows: statistics over rows are taken from the first `stats_rows`; None: from all.
        sizes: each call that takes statistics over the first axis adds the size of that axis.
    """
    outer = getattr(_here, 'statistics', None)
    with _patching:
        _replaced.append(tf.nn.moments)
        tf.nn.moments = _moments_of_thread
    _here.statistics = rows, stats_rows, sizes
    try:
        yield
    finally:
        _here.statistics = outer
        with _patching:
            tf.nn.moments = _replaced.pop()  # that of another thread, if it is not the last one here


_here, _patching, _replaced = threading.local(), threading.Lock(), []


def _moments_of_thread(x, axes, shift=None, keepdims=False, name=None):
    statistics = getattr(_here, 'statistics', None)
    if statistics is None:
        return _replaced[0](x, axes, shift, keepdims, name)
    axes = [axis % len(x.shape) for axis in ([axes] if isinstance(axes, int) else axes)]
    rows, stats_rows, sizes = statistics
    if sizes is not None and 0 in axes:
        sizes.append(x.shape[0])
    if stats_rows is not None and 0 in axes:
        x = x[:stats_rows * (x.shape[0] // rows)]  # a layer may have folded other axes into the rows
    return moments(x, axes, keepdims)


def batch_standardize(z: tf.Tensor, epsilon: float, pool: bool = False) -> tf.Tensor:
    """`standardize` over all axes but the last, of images, then 2x2 max pooling if asked; differentiable exactly twice.

    With u = (z - mean) * scale, scale = (variance + epsilon)^(-1/2), and m() the mean over all positions of a channel, the
    Jacobian J of u is symmetric, and its derivative along an upstream gradient g and a direction w is symmetric in them:

        J g = scale * (g - m(g) - u m(g u))
        d(w . J g)/dz = -scale * (m(g u) J w + m(w u) J g + m(w J g) u)

    Scaling up is increasing, so the largest of a window is known before: pooling first picks from z, and standardises only
    the quarter that is left. Its gradient scatters g to the argmax positions; sums over those are sums over g.

    Args:
        z: float [rows, height, width, channels].
        epsilon: added to the (biased) variance before the square root.
        pool: keep the largest of each 2x2 window (the first of equals), without the last row or column of odd sizes.

    Returns:
        A tensor shaped like z, or [rows, height // 2, width // 2, channels].

    Raises:
        LookupError: on the third derivative.
    """
    fused = _one_loop if pool or math.prod(z.shape) >= LARGE else lambda function: function

    @tf.custom_gradient
    def forward(z):
        def m(x):
            kept = math.prod(x.shape[1:3]) / math.prod(z.shape[1:3])  # 1, or after pooling a quarter, whose other positions are 0
            mean_of_kept = _mean(x, [0, 1, 2])
            return mean_of_kept if kept == 1 else kept * mean_of_kept

        # Tapes must not make derivatives of these loops, which they would compile. (`tf.stop_gradient` does not do: `tf.vectorized_map`
        # drops custom gradients, and what then differentiates the operations themselves would meet it.)
        with stop_recording():
            mean = m(z)
            scale = tf.math.rsqrt(m(fused(_row_mean_of_squares)(z, mean)) + epsilon)
            u = fused(_shift_and_scale)(z, mean, scale, pool)

        @tf.custom_gradient
        def backward(z, g):
            winner, mean_gu = fused(_winner_and_mean)(z, g, u, pool)
            m_g, m_gu = m(g), m(mean_gu)

            def backward_again(w):
                picked, mean_wu, mean_wg = fused(_pick_and_means)(w, z, mean, scale, u, winner, g)
                m_w, m_wu, m_wg = m(w), m(mean_wu), m(mean_wg)
                dg = scale * (picked - m_w - u * m_wu)
                dz = fused(_second)(z, mean, scale, u, winner, g, w, m_g, m_gu, m_w, m_wu, m_wg)
                return _last_derivative(dz), _last_derivative(dg)

            return fused(_first)(z, mean, scale, u, winner, g, m_g, m_gu), backward_again

        return u, functools.partial(backward, z)

    return forward(z)


@functools.cache
def _one_loop(function):
    """Compiles a function so that its elementwise operations are fused into one loop over the images."""
    return tf.function(function, jit_compile=True, autograph=False)


def _shift_and_scale(z, mean, scale, pool):
    return ((_largest(z) if pool else z) - mean) * scale


def _first(z, mean, scale, u, winner, g, m_g, m_gu):
    """J g."""
    return scale * (_spread(g, winner, z) - m_g - _unpooled(u, z, mean, scale, winner) * m_gu)


def _second(z, mean, scale, u, winner, g, w, m_g, m_gu, m_w, m_wu, m_wg):
    """d(w . J g)/dz, with J w, J g and m(w J g) written out."""
    u, g = _unpooled(u, z, mean, scale, winner), _spread(g, winner, z)
    factors = [-tf.square(scale) * factor for factor in (m_gu, m_wu, m_wg - m_w * m_g - 3 * m_wu * m_gu)]
    return factors[0] * (w - m_w) + factors[1] * (g - m_g) + factors[2] * u


def _row_mean_of_squares(z, mean):
    return tf.reduce_mean(tf.math.squared_difference(z, mean), axis=0, keepdims=True)


def _row_mean_of_products(x, y):
    return tf.reduce_mean(x * y, axis=0, keepdims=True)


def _winner_and_mean(z, g, u, pool):
    """`_winner`, if there is pooling, and the mean over rows of g u."""
    return _winner(z) if pool else None, _row_mean_of_products(g, u)


def _pick_and_means(w, z, mean, scale, u, winner, g):
    """w at the winning corners, and the means over rows of w u before pooling and of that w g."""
    picked = _pick(w, winner)
    return picked, _row_mean_of_products(w, _unpooled(u, z, mean, scale, winner)), _row_mean_of_products(picked, g)


def _unpooled(u, z, mean, scale, winner):
    """u before pooling: recomputed, which is faster than reading it from memory; u if there was no pooling."""
    return u if winner is None else (z - mean) * scale


def _winner(z):
    """Which corner of each 2x2 window, from 0 row by row, is the (first) largest: int8 [rows, h // 2, w // 2, channels]."""
    corners, largest = _corners(z), _largest(z)
    winner = tf.fill(largest.shape, tf.constant(3, tf.int8))
    for corner in (2, 1, 0):
        winner = tf.where(corners[corner] == largest, tf.constant(corner, tf.int8), winner)
    return winner


def _largest(z):
    return functools.reduce(tf.maximum, _corners(z))


def _pick(x, winner):
    """x at the winning corners; x if there was no pooling."""
    if winner is None:
        return x
    corners = _corners(x)
    picked = corners[3]
    for corner in (2, 1, 0):
        picked = tf.where(winner == corner, corners[corner], picked)
    return picked


def _spread(g, winner, z):
    """The transpose of _pick: g at the winning corners of a tensor shaped like z, 0 elsewhere; g if there was no pooling."""
    if winner is None:
        return g
    rows, height, width, channels = z.shape
    corner = np.arange(4, dtype=np.int8).reshape(1, 1, 2, 1, 2, 1)
    spread = tf.where(winner[:, :, None, :, None] == corner, g[:, :, None, :, None], tf.zeros([], g.dtype))
    spread = tf.reshape(spread, [rows, height // 2 * 2, width // 2 * 2, channels])
    return tf.pad(spread, [[0, 0], [0, height % 2], [0, width % 2], [0, 0]])


def _corners(x):
    """The corners of the 2x2 windows, row by row: four tensors [rows, height // 2, width // 2, channels]."""
    rows, height, width, channels = x.shape
    windows = tf.reshape(x[:, :height // 2 * 2, :width // 2 * 2], [rows, height // 2, 2, width // 2, 2, channels])
    return [windows[:, :, i, :, j] for i in (0, 1) for j in (0, 1)]


@tf.custom_gradient
def _last_derivative(x):
    def gradient(_):
        raise LookupError('batch_standardize has no third derivative')
    return x, gradient


def _mean(x, axes):
    """Mean over axes, which are kept: axes with at most SUMMED numbers together, or one, at a time, because TensorFlow adds all numbers
    of an operation in one long float32 chain.

    Over the 35,280 positions of a first miniImagenet layer that chain is wrong in the fifth digit; within a few meta-updates
    Adam amplifies that to a thousandth.
    """
    together = []
    for axis in axes:
        if together and math.prod(x.shape[each] for each in (*together, axis)) > SUMMED:
            x, together = tf.reduce_mean(x, together, keepdims=True), []
        together.append(axis)
    return tf.reduce_mean(x, together, keepdims=True)


def im2col(x: tf.Tensor, size: int, stride: int) -> tf.Tensor:
    """The windows of a convolution with SAME padding: their matrix product with its kernel is that convolution.

    TensorFlow's convolutions rearrange the kernel for every call. For few images of few pixels that takes longer than the
    product, above all for the gradient of the kernel.

    Args:
        x: [rows, height, width, channels].
        size, stride: of the windows, in both directions.

    Returns:
        [rows, ceil(height / stride), ceil(width / stride), size * size * channels]; zeros where a window overlaps the
        border. Linear in x, and differentiable any number of times.
    """
    rows, height, width, channels = x.shape
    pixels, windows, shape = _window_tables(height, width, size, stride)

    @tf.custom_gradient
    def gather(x):
        return tf.gather(_with_zero(x), pixels, axis=1), scatter

    @tf.custom_gradient
    def scatter(y):
        return _one_loop(_gather_sum)(y, windows), gather

    y = gather(tf.reshape(x, [rows, height * width, channels]))
    return tf.reshape(y, [rows, *shape, size * size * channels])


@functools.cache
def _window_tables(height, width, size, stride):
    """Which pixel is at each place of each window, and at which places each pixel is.

    Returns:
        pixels: int32 [windows * size * size], indices of pixels; height * width means the border.
        windows: int32 [height * width, n], indices into `pixels`; its length means no entry.
        (windows down, windows across).
    """
    def places(pixels):
        count = -(-pixels // stride)
        before = max((count - 1) * stride + size - pixels, 0) // 2
        place = np.arange(count)[:, None] * stride + np.arange(size) - before
        return np.where((place >= 0) & (place < pixels), place, -1)

    down, across = places(height)[:, None, :, None], places(width)[None, :, None, :]
    pixels = np.where((down >= 0) & (across >= 0), down * width + across, height * width).ravel()
    shown = [np.flatnonzero(pixels == pixel) for pixel in range(height * width)]
    windows = np.full([height * width, max(map(len, shown))], len(pixels))
    for row, places_of_pixel in zip(windows, shown):
        row[:len(places_of_pixel)] = places_of_pixel
    return pixels.astype(np.int32), windows.astype(np.int32), (len(down), across.shape[1])


def _with_zero(x):
    return tf.concat([x, tf.zeros_like(x[:, :1])], axis=1)


def _gather_sum(y, table):
    return tf.reduce_sum(tf.gather(_with_zero(y), table, axis=1), axis=2)


def recomputing_loop(step: Callable, count: int, state: Structure, shared: Structure) -> Structure:
    """The states after each of `count` steps, differentiable (once) with respect to `state` and `shared`.

    The gradient keeps the state before each step and recomputes the step itself. Besides the states it holds only what one step
    needs, and the graph has one step whatever the count (Chen et al., 2016, arXiv:1604.06174, with every state kept).

    Args:
        step: function (number of the step, int32 scalar; state; shared) -> state of the same structure, shapes and dtypes.
        state: before the first step, nested tensors.
        shared: nested tensors that each step uses.

    Returns:
        The structure of `state`, with tensors [count, ...].
    """
    flat, both = tf.nest.flatten((state, shared)), (state, shared)

    def loop(body, *values):
        return tf.while_loop(lambda number, *_: number < count, lambda number, *values: (number + 1, *body(number, *values)),
                             (tf.constant(0), *values), parallel_iterations=1, maximum_iterations=count)[1:]

    @tf.custom_gradient
    def run(*tensors):
        state, shared = tf.nest.pack_sequence_as(both, tensors)
        arrays = [tf.TensorArray(value.dtype, count, element_shape=value.shape) for value in tf.nest.flatten(state)]

        def forward(number, state, before):
            before = [array.write(number, value) for array, value in zip(before, tf.nest.flatten(state))]
            return step(number, state, shared), before

        last, before = loop(forward, state, arrays)
        before = [array.stack() for array in before]

        def gradient(*upstream):
            def backward(number, towards_state, towards_shared):
                number = count - 1 - number
                start = tf.nest.pack_sequence_as(state, [values[number] for values in before])
                with tf.GradientTape() as tape:
                    tape.watch((start, shared))
                    after = step(number, start, shared)
                into = [total + values[number] for total, values in zip(towards_state, upstream)]
                gradients = tape.gradient(tf.nest.flatten(after), tf.nest.flatten((start, shared)), output_gradients=into,
                                      unconnected_gradients='zero')
                states = len(into)
                return gradients[:states], [total + more for total, more in zip(towards_shared, gradients[states:])]

            zeros = [[tf.zeros_like(value) for value in tf.nest.flatten(part)] for part in (state, shared)]
            return [value for part in loop(backward, *zeros) for value in part]

        return [tf.concat([values[1:], value[None]], axis=0) for values, value in zip(before, tf.nest.flatten(last))], gradient

    return tf.nest.pack_sequence_as(state, run(*flat))
