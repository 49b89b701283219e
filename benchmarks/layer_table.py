"""How exact the meta-gradient is with each kind of Keras layer: python benchmarks/layer_table.py prints a table.

A small network with the layer takes two inner steps; its meta-gradient, along a random direction in all weights, is compared with
central differences, in float64. Kinds that are refused say so instead.
"""
import math
import re
from collections.abc import Callable

import numpy as np
import run_files  # noqa: F401  (puts the program on the path)

from runtime.cli import startup
from runtime.system.errors import UserError

STEPS = 1e-6, 1e-7, 1e-5  # of the central differences; one of them is too large if a ReLU is switched on or off between the sides
IMAGE, SEQUENCE, VECTOR = (6, 6, 3), (5, 4), (6,)


def kinds() -> dict[str, tuple[tuple[int, ...], Callable]]:
    """{kind: (shape of a row, function of a tensor that applies the layer)}."""
    from keras import layers as k

    def of(layer, *args, **kwargs):
        return lambda x: layer(*args, **kwargs)(x)

    images = {
        'Conv2D': of(k.Conv2D, 4, 3), 'Conv2D, strides 2': of(k.Conv2D, 4, 3, strides=2, padding='same'),
        'Conv2D, dilation 2': of(k.Conv2D, 4, 2, dilation_rate=2), 'Conv2D, groups 2': of(k.Conv2D, 4, 3, groups=2),
        'Conv2DTranspose': of(k.Conv2DTranspose, 4, 3),
        'DepthwiseConv2D': of(k.DepthwiseConv2D, 3), 'SeparableConv2D': of(k.SeparableConv2D, 4, 3),
        'BatchNormalization': of(k.BatchNormalization), 'GroupNormalization': of(k.GroupNormalization, 4),
        'LayerNormalization': of(k.LayerNormalization), 'RMSNormalization': of(k.RMSNormalization),
        'UnitNormalization': of(k.UnitNormalization), 'SpectralNormalization': lambda x: k.SpectralNormalization(k.Conv2D(4, 3))(x),
        'MaxPooling2D': of(k.MaxPooling2D, 2), 'AveragePooling2D': of(k.AveragePooling2D, 2),
        'GlobalAveragePooling2D': of(k.GlobalAveragePooling2D), 'GlobalMaxPooling2D': of(k.GlobalMaxPooling2D),
        'UpSampling2D, nearest': of(k.UpSampling2D, 2), 'UpSampling2D, bilinear': of(k.UpSampling2D, 2, interpolation='bilinear'),
        'Resizing, bicubic': of(k.Resizing, 5, 5, 'bicubic'), 'ZeroPadding2D': of(k.ZeroPadding2D, 1), 'Cropping2D': of(k.Cropping2D, 1),
        'Dropout': of(k.Dropout, 0.3), 'SpatialDropout2D': of(k.SpatialDropout2D, 0.3), 'GaussianNoise': of(k.GaussianNoise, 0.1)}
    sequences = {
        'Conv1D': of(k.Conv1D, 4, 3), 'GRU': of(k.GRU, 4), 'LSTM': of(k.LSTM, 4), 'SimpleRNN': of(k.SimpleRNN, 4),
        'Bidirectional': lambda x: k.Bidirectional(k.GRU(3))(x), 'MultiHeadAttention': lambda x: k.MultiHeadAttention(2, 3)(x, x),
        'GroupQueryAttention': lambda x: k.GroupQueryAttention(2, 2, 1)(x, x),
        'TimeDistributed': lambda x: k.TimeDistributed(k.Dense(3))(x)}
    vectors = {
        'Dense': of(k.Dense, 5), 'PReLU': of(k.PReLU), 'LeakyReLU': of(k.LeakyReLU), 'ELU': of(k.ELU), 'Softmax': of(k.Softmax),
        'Activation, gelu': of(k.Activation, 'gelu')}
    return {kind: (shape, layer) for shape, group in ((IMAGE, images), (SEQUENCE, sequences), (VECTOR, vectors))
            for kind, layer in group.items()}


def error_of(kind: str, enough: float = 0.) -> float | str:
    """The relative error of a kind's meta-gradient, or the sentence with which it is refused. Below `enough` no further step is tried."""
    import keras
    import tensorflow as tf
    from keras import layers

    import maml
    from runtime.datasets.tasks import TaskBatch
    from runtime.jobs import network_check
    shape, layer = kinds()[kind]

    def network(input_shape, outputs):
        x = inputs = keras.Input(input_shape)
        first = layers.Conv2D(4, 3, padding='same', activation='tanh') if len(shape) == 3 else layers.Dense(4, activation='tanh')
        return keras.Model(inputs, layers.Dense(outputs)(layers.Flatten()(layer(first(x)))))

    config = maml.ModelConfig(dim_input=int(np.prod(shape)), dim_output=3, loss='xent', update_batch_size=1, update_lr=0.1, num_updates=2,
                              input_shape=shape, dtype='float64', network=network)
    try:
        network_check.check(config)
        parameters = tf.nest.map_structure(lambda value: tf.cast(value, tf.float64), maml.initial_parameters(config, 0))
    except UserError as error:
        return str(error)
    rng = np.random.default_rng(0)
    x, y = tf.constant(rng.uniform(size=[9, config.dim_input])), tf.constant(np.tile(np.eye(3), [3, 1]))
    task = TaskBatch(x[:3], y[:3], x[3:], y[3:])
    direction = tf.nest.map_structure(lambda value: tf.constant(rng.normal(size=value.shape)), parameters)

    def loss_after(step):
        moved = tf.nest.map_structure(lambda value, move: value + step * move, parameters, direction)
        _, states = maml.inner_loop(config, moved, task, 0)
        return float(maml.objective(config, moved, task, states, 0)[0])

    gradients = maml.meta_gradient(config, parameters, 0, task)[0]
    exact = float(sum(tf.reduce_sum(gradient * direction.trained()[name]) for name, gradient in gradients.items()))
    least = math.inf
    for step in STEPS:
        least = min(least, abs(2 * step * exact / (loss_after(step) - loss_after(-step)) - 1))
        if least < enough:
            break
    return least


def table() -> str:
    """The table, in markdown."""
    lines = ['| layer | relative error of the meta-gradient |', '| --- | --- |']
    for kind in kinds():
        error = error_of(kind)
        reason = re.sub(r'^.*?(in the layer|cannot be used:) ', r'\1 ', error).partition(';')[0] if isinstance(error, str) else ''
        lines.append(f'| {kind} | {"refused: " + reason if reason else f"{error:.0e}"} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    startup.import_tensorflow()
    print(table())
