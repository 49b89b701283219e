"""What a network is, the reference's two, and where the last layer of a task comes from.

A network is pure: it owns no variables, its tensors are an argument. So the inner loop can run it with a task's fast weights.
"""
from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import tensorflow as tf

from utils import conv_block, dense_block, glorot_uniform, truncated_normal

if TYPE_CHECKING:
    from maml import ModelConfig

CONV_LAYERS = (1, 2, 3, 4)
HEAD_PREFIX = 'head/'  # of the names of what last layers have besides the network's tensors
CLASSIFIER = f'{HEAD_PREFIX}classifier/'  # of the tensors of a last layer for all classes of meta-training
COSINE_SCALE = 2.0  # of logits, the number of Chen et al. (2019)
Tensors = dict[str, tf.Tensor]


class Network(Protocol):
    """Rows [rows, dim_input] -> features [rows, features] -> outputs [rows, dim_output], given its tensors {name: tensor}.

    Attributes:
        head_names: names of the last layer's matrix, [features, dim_output], and bias, [dim_output].
        convolutional: whether it has convolutions: such networks are not compiled by XLA on a CPU (runtime/compute/engine.py).
        description: text for the console.
    """
    head_names: Sequence[str]
    convolutional: bool
    description: str

    def initial_weights(self, seed: int) -> Tensors:
        """All weights, float32; a function of the seed."""

    def initial_norm_params(self) -> Tensors:
        """Offsets and scales of normalisation, float32. Their names differ from those of the weights."""

    def features(self, tensors: Tensors, x: tf.Tensor, stats_rows: int | None = None) -> tf.Tensor:
        """The input of the last layer. With batch norm it depends on the rows that provide the statistics.

        Args:
            tensors: weights and norm parameters.
            x: float [rows, dim_input]; images in [0, 1], flattened.
            stats_rows: batch norm takes its statistics from the first `stats_rows` rows; None: from all.
        """

    def head(self, tensors: Tensors, features: tf.Tensor) -> tf.Tensor:
        """The last layer: features [rows, features] -> outputs [rows, dim_output]."""


@functools.cache
def network_of(config: ModelConfig) -> Network:
    """The network that a config describes."""
    return ConvNet(config) if config.image_shape else DenseNet(config)


class DenseNet:
    """Fully connected layers `dim_hidden`, each normalised and rectified, and a linear one.

    Weights `w1 b1 w2 b2 ...`: [inputs, units] by `truncated_normal`, biases [units] 0, as in the reference.
    """
    convolutional = False

    def __init__(self, config: ModelConfig):
        self._config, last = config, len(config.dim_hidden) + 1
        self.head_names = f'w{last}', f'b{last}'
        # Reference behaviour: there is no scope 1.
        self._scopes = {layer: '0' if layer == 1 else str(layer) for layer in range(1, last)}
        self.description = 'fully connected, ' + '-'.join(map(str, config.dim_hidden))

    def initial_weights(self, seed: int) -> Tensors:
        config = self._config
        sizes = config.dim_input, *config.dim_hidden, config.dim_output
        return _drawn(seed, ((f'w{layer}', truncated_normal, shape) for layer, shape in enumerate(zip(sizes, sizes[1:]), start=1)))

    def initial_norm_params(self) -> Tensors:
        return _initial_norm_params(self._config, zip(self._scopes.values(), self._config.dim_hidden))

    def features(self, tensors: Tensors, x: tf.Tensor, stats_rows: int | None = None) -> tf.Tensor:
        for layer, scope in self._scopes.items():
            x = dense_block(x, tensors[f'w{layer}'], tensors[f'b{layer}'], self._config.norm, scope, tensors, stats_rows)
        return x

    def head(self, tensors: Tensors, features: tf.Tensor) -> tf.Tensor:
        return _linear(tensors, features, *self.head_names)


class ConvNet:
    """Four blocks of 3x3 convolution, normalisation and ReLU that halve the image, and a linear layer.

    Weights `conv1 b1 ... conv4 b4 w5 b5`: convolutions [3, 3, channels, num_filters] by `glorot_uniform`; w5 [features,
    dim_output] by it after flattening, standard normal after averaging over space; biases 0; as in the reference.
    """
    convolutional = True
    head_names = 'w5', 'b5'

    def __init__(self, config: ModelConfig):
        self._config = config
        self.description = f'4 convolutions of {config.num_filters} filters, {"max pooling" if config.max_pool else "stride 2"}'

    def initial_weights(self, seed: int) -> Tensors:
        config, (height, width, channels) = self._config, self._config.image_shape
        for _ in CONV_LAYERS:
            height, width = (size // 2 if config.max_pool else -(-size // 2) for size in (height, width))
        inputs = [channels] + [config.num_filters] * (len(CONV_LAYERS) - 1)
        features, distribution = ((config.num_filters, tf.random.stateless_normal) if config.head == 'mean' else
                                  (height * width * config.num_filters, glorot_uniform))
        return _drawn(seed, [*((f'conv{layer}', glorot_uniform, (3, 3, size, config.num_filters))
                               for layer, size in zip(CONV_LAYERS, inputs)), ('w5', distribution, (features, config.dim_output))])

    def initial_norm_params(self) -> Tensors:
        return _initial_norm_params(self._config, ((str(layer - 1), self._config.num_filters) for layer in CONV_LAYERS))

    def features(self, tensors: Tensors, x: tf.Tensor, stats_rows: int | None = None) -> tf.Tensor:
        config = self._config
        x = tf.reshape(x, [-1, *config.image_shape])
        for layer in CONV_LAYERS:
            x = conv_block(x, tensors[f'conv{layer}'], tensors[f'b{layer}'], config.norm, str(layer - 1), tensors,
                           config.max_pool, config.engine == 'vmap', stats_rows)
        return tf.reduce_mean(x, axis=[1, 2]) if config.head == 'mean' else tf.reshape(x, [-1, math.prod(x.shape[1:])])

    def head(self, tensors: Tensors, features: tf.Tensor) -> tf.Tensor:
        return _linear(tensors, features, *self.head_names)


def _linear(tensors: Tensors, x: tf.Tensor, matrix: str, bias: str) -> tf.Tensor:
    return x @ tensors[matrix] + tensors[bias]


def _drawn(seed: int, layers: Iterable[tuple[str, Callable, Sequence[int]]]) -> Tensors:
    """Weights of (name, distribution, shape), each a function of (seed, name) only, and a bias of zeros for each."""
    tensors = {}
    for name, distribution, shape in layers:
        tensors[name] = distribution(shape, [seed, zlib.crc32(name.encode())])
        tensors['b' + name.lstrip('convw')] = tf.zeros([shape[-1]])
    return tensors


def _initial_norm_params(config: ModelConfig, scopes: Iterable[tuple[str, int]]) -> Tensors:
    """Offsets (beta, 0) and scales (gamma, 1) of (scope, channels): {'<scope>/beta': [channels], ...}.

    Batch norm has scales if `norm_scale` says so, layer norm always.
    """
    params, scaled = {}, config.norm == 'layer_norm' or config.norm_scale
    for scope, channels in scopes if config.norm != 'None' else ():
        params[f'{scope}/beta'] = tf.zeros([channels])
        if scaled:
            params[f'{scope}/gamma'] = tf.ones([channels])
    return params


# Where the last layer of a task comes from --------------------------------------------------------------------------

def shared_weights(config: ModelConfig, seed: int) -> Tensors:
    """The weights that tasks share, initially: all, or with the last layers of `HEADS` the others and what these learn; and those of a
    classifier of pre-training; float32."""
    network = network_of(config)
    weights = network.initial_weights(seed)
    if config.head_init != 'learned':
        body = {name: value for name, value in weights.items() if name not in network.head_names}
        weights = {**body, **HEADS[config.head_init].learned(config, seed)}
    classifier = last_layer(config, seed, config.pretrain_classes) if config.pretrain_classes else {}
    return {**weights, **{CLASSIFIER + name: value for name, value in classifier.items()}}


def classifier_outputs(config: ModelConfig, tensors: Tensors, x: tf.Tensor) -> tf.Tensor:
    """The outputs of the classifier of pre-training (Baseline and Baseline++: Chen et al., 2019), [rows, pretrain_classes]."""
    network = network_of(config)
    own = {name: tensors[CLASSIFIER + name] for name in network.head_names}
    return outputs_of(config, {**tensors, **own}, network.features(tensors, x))


def initial_head(config: ModelConfig, weights: Tensors, features: tf.Tensor, support_y: tf.Tensor) -> Tensors:
    """A task's last layer before its first inner step, computed as `head_init` says, one of `HEADS`; differentiable.

    Args:
        weights: the shared ones.
        features: of the support rows, [rows, features].
        support_y: [rows, dim_output].

    Returns:
        {name of the matrix: [features, dim_output], name of the bias: [dim_output]}; for 'neighbours' the arguments.
    """
    if config.head_init == 'neighbours':
        return {f'{HEAD_PREFIX}features': features, f'{HEAD_PREFIX}labels': support_y}
    return dict(zip(network_of(config).head_names, HEADS[config.head_init].compute(config, weights, features, support_y)))


def outputs_of(config: ModelConfig, tensors: Tensors, features: tf.Tensor) -> tf.Tensor:
    """The outputs for rows with features [rows, features]: of the last layer, or with 'cosine' logits of its matrix without the bias, or
    for 'neighbours' for each class minus the squared distance to its nearest support row, but for a constant of the row;
    [rows, outputs]."""
    if config.head_init != 'neighbours' and config.logits == 'linear':
        return network_of(config).head(tensors, features)
    if config.head_init != 'neighbours':
        matrix = tensors[network_of(config).head_names[0]]
        return COSINE_SCALE * tf.matmul(tf.math.l2_normalize(features, axis=1), tf.math.l2_normalize(matrix, axis=0))
    support, labels = tensors[f'{HEAD_PREFIX}features'], tensors[f'{HEAD_PREFIX}labels']
    closeness = 2 * tf.matmul(features, support, transpose_b=True) - tf.reduce_sum(tf.square(support), axis=1)
    return tf.reduce_max(tf.where(labels[None] > 0, closeness[:, :, None], closeness.dtype.min), axis=1)


def last_layer(config: ModelConfig, seed: int, outputs: int) -> Tensors:
    """The last layer of a network with so many outputs, initially: [features, outputs] and [outputs]."""
    network = network_of(dataclasses.replace(config, dim_output=outputs))
    weights = network.initial_weights(seed)
    return {name: weights[name] for name in network.head_names}


def head_column(config: ModelConfig, seed: int) -> Tensors:
    """The last layer for one class, initially."""
    return last_layer(config, seed, 1)


def repeated_column(config, weights, features, support_y):
    """The shared column for each class (UNICORN-MAML: Ye & Chao, 2022, section 5)."""
    return [tf.repeat(weights[name], support_y.shape[-1], axis=-1) for name in network_of(config).head_names]


def new_layer(config, weights, features, support_y):
    """A layer that has learned nothing: zeros, or for cosines, which zeros do not have, random numbers."""
    shape = [features.shape[-1], support_y.shape[-1]]
    matrix = tf.zeros(shape, features.dtype) if config.logits == 'linear' else tf.random.stateless_normal(shape, [0, 0], dtype=features.dtype)
    return matrix, tf.zeros(shape[1:], features.dtype)


def prototypes(config, weights, features, support_y):
    """2 c_k and -|c_k|^2, where c_k is the mean of the features f of class k: the outputs are minus the squared distances |f - c_k|^2,
    but for |f|^2, which is the same for all classes (ProtoNet: Snell et al., 2017, equation 8; ProtoMAML: Triantafillou et al.,
    2020, section 3)."""
    means = tf.matmul(features, support_y / tf.reduce_sum(support_y, axis=0), transpose_a=True)
    return 2 * means, -tf.reduce_sum(tf.square(means), axis=0)


def ridge_scalars(config: ModelConfig, seed: int) -> Tensors:
    """What `ridge_regression` learns, initially: scalars."""
    return {f'{HEAD_PREFIX}lambda': tf.constant(config.ridge_lambda), f'{HEAD_PREFIX}scale': tf.constant(config.ridge_scale),
            f'{HEAD_PREFIX}bias': tf.constant(0.0)}


def ridge_regression(config, weights, features, support_y):
    """The ridge regression of y on the features and a column of ones, in closed form, scaled (R2-D2: Bertinetto et al., 2019, equations
    4 to 6). With X and Y divided by the root of the number of rows it is X'(XX' + lambda)^-1 Y, or where there are more rows than
    columns (X'X + lambda)^-1 X'Y."""
    rows = features.shape[0]
    x, y = (values / math.sqrt(rows) for values in (tf.concat([features, tf.ones_like(features[:, :1])], axis=1), support_y))
    by_rows = rows <= x.shape[1]
    gram = tf.matmul(x, x, transpose_a=not by_rows, transpose_b=by_rows)
    gram += weights[f'{HEAD_PREFIX}lambda'] * tf.eye(gram.shape[0], dtype=gram.dtype)
    # TensorFlow ends the program if it cannot solve; where training diverged, the result shall be nan, as elsewhere.
    gram = tf.where(tf.reduce_all(tf.math.is_finite(gram)), gram, tf.eye(gram.shape[0], dtype=gram.dtype))
    solution = tf.matmul(x, tf.linalg.solve(gram, y), transpose_a=True) if by_rows else (
        tf.linalg.solve(gram, tf.matmul(x, y, transpose_a=True)))
    solution *= weights[f'{HEAD_PREFIX}scale']
    return solution[:-1], solution[-1] + weights[f'{HEAD_PREFIX}bias']


class Head(NamedTuple):
    """A way to compute the last layer of a task."""
    learned: Callable[[ModelConfig, int], Tensors]  # function of config and seed: the shared weights that it needs, initially
    compute: Callable[..., Iterable[tf.Tensor]]     # function of the arguments of `initial_head`: matrix and bias


HEADS = {'shared': Head(head_column, repeated_column), 'new': Head(lambda config, seed: {}, new_layer),
         'prototypes': Head(lambda config, seed: {}, prototypes), 'ridge': Head(ridge_scalars, ridge_regression),
         'neighbours': Head(lambda config, seed: {}, lambda *_: ())}
