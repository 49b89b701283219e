"""What a network is, the reference's two, and where the last layer of a task comes from.

A network is pure: it owns no variables, its tensors are an argument. So the inner loop can run it with a task's fast weights.
"""
from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from keras_network import CLASSIFIER, HEAD_PREFIX, MASKS, ROWS, KerasNetwork, almost_equal
from runtime.system.errors import UserError
from utils import at_step, conv_block, dense_block, glorot_uniform, truncated_normal

if TYPE_CHECKING:
    from maml import ModelConfig

CONV_LAYERS = (1, 2, 3, 4)
RIDGE_SCALARS = f'{HEAD_PREFIX}lambda', f'{HEAD_PREFIX}scale', f'{HEAD_PREFIX}bias'  # what `ridge_regression` learns
NEIGHBOURS = f'{HEAD_PREFIX}features', f'{HEAD_PREFIX}labels'  # the support rows of `nearest_neighbour`
COSINE_SCALE = 2.0  # of logits, the number of Chen et al. (2019)
Tensors = dict[str, tf.Tensor]


class Network(Protocol):
    """Rows [rows, dim_input] -> features [rows, features] -> outputs [rows, dim_output], given its tensors {name: tensor}.

    Attributes:
        head_names: names of the last layer's matrix, [features, dim_output], and bias, [dim_output].
        convolutional: whether it has convolutions: such networks are not compiled by XLA on a CPU (runtime/compute/engine.py).
        loops: whether it has loops, as recurrent layers have.
        vectorizes: whether all tasks can be computed in one graph.
        random: whether it computes something else in training, such as by the masks of dropout.
        description: text for the console.
    """
    head_names: Sequence[str]
    convolutional: bool
    loops: bool
    vectorizes: bool
    random: bool
    description: str

    def initial_weights(self, seed: int) -> Tensors:
        """All weights, float32; a function of the seed."""

    def initial_norm_params(self) -> Tensors:
        """Offsets and scales of normalisation, float32. Their names differ from those of the weights."""

    def features(self, tensors: Tensors, x: tf.Tensor, stats_rows: int | None = None) -> tf.Tensor:
        """The input of the last layer. With batch norm it depends on the rows that provide the statistics.

        Args:
            tensors: weights and norm parameters; in training also MASKS, if the network is `random`.
            x: float [rows, dim_input]; images in [0, 1], flattened.
            stats_rows: batch norm takes its statistics from the first `stats_rows` rows; None: from all.
        """

    def head(self, tensors: Tensors, features: tf.Tensor) -> tf.Tensor:
        """The last layer: features [rows, features] -> outputs [rows, dim_output]."""
        matrix, bias = self.head_names
        return features @ tensors[matrix] + tensors[bias]


_keras_network = functools.cache(KerasNetwork)


@functools.cache
def network_of(config: ModelConfig) -> Network:
    """The network that a config describes. Raises UserError if it is one's own and cannot be used with that config."""
    if config.network:
        shape = config.input_shape or config.image_shape or (config.dim_input,)
        network = _keras_network(config.network, shape, config.dim_output, config.dtype)
        network.check(config, HEADS[config.head_init].extra)
        return network
    return ConvNet(config) if config.image_shape else DenseNet(config)


class DenseNet(Network):
    """Fully connected layers `dim_hidden`, each normalised and rectified, and a linear one.

    Weights `w1 b1 w2 b2 ...`: [inputs, units] by `truncated_normal`, biases [units] 0, as in the reference.
    """
    convolutional, loops, vectorizes, random = False, False, True, False

    def __init__(self, config: ModelConfig):
        self._config, last = config, len(config.dim_hidden) + 1
        self.head_names = f'w{last}', f'b{last}'
        # Reference behaviour: there is no scope 1.
        self._scopes = {layer: '0' if layer == 1 else str(layer) for layer in range(1, last)}
        self.description = f'fully connected, {"-".join(map(str, config.dim_hidden))}, norm {config.norm}'

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


class ConvNet(Network):
    """Four blocks of 3x3 convolution, normalisation and ReLU that halve the image, and a linear layer.

    Weights `conv1 b1 ... conv4 b4 w5 b5`: convolutions [3, 3, channels, num_filters] by `glorot_uniform`; w5 [features,
    dim_output] by it after flattening, standard normal after averaging over space; biases 0; as in the reference.
    """
    convolutional, loops, vectorizes, random = True, False, True, False
    head_names = 'w5', 'b5'

    def __init__(self, config: ModelConfig):
        self._config = config
        self.description = (f'4 convolutions of {config.num_filters} filters, {"max pooling" if config.max_pool else "stride 2"}, '
                            f'norm {config.norm}')

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


def _drawn(seed: int, layers: Iterable[tuple[str, Callable, Sequence[int]]]) -> Tensors:
    """Weights of (name, distribution, shape), each a function of (seed, name) only, and a bias of zeros for each."""
    tensors = {}
    for name, distribution, shape in layers:
        tensors[name] = distribution(shape, [seed, zlib.crc32(name.encode())])
        tensors[re.sub('conv|w', 'b', name)] = tf.zeros([shape[-1]])
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


def masks(config: ModelConfig, iteration: int | tf.Tensor | None) -> Tensors:
    """What random layers draw from in an iteration of a training; {} in evaluation, and if there are none. In float64, because a state
    of gradient checkpointing is differentiated."""
    if iteration is None or not network_of(config).random:
        return {}
    return {MASKS: tf.stack([tf.cast(number, tf.float64) for number in (config.mask_seed, iteration)])}


def mask_at(own: Tensors, step: int | tf.Tensor) -> Tensors:
    """MASKS of a task's own tensors at an inner step; {} if there are none."""
    return {MASKS: tf.concat([own[MASKS], tf.cast([step], tf.float64)], axis=0)} if MASKS in own else {}


# Where the last layer of a task comes from --------------------------------------------------------------------------

def shared_weights(config: ModelConfig, seed: int) -> Tensors:
    """What tasks share before training, float32: the network's weights, where a last layer that is computed for each task is replaced by
    what its entry of `HEADS` learns; and the weights of the classifier of pre-training, if there is one."""
    network = network_of(config)
    weights = network.initial_weights(seed)
    if config.head_init != 'learned':
        body = {name: value for name, value in weights.items() if name not in network.head_names}
        weights = {**body, **HEADS[config.head_init].learned(config, seed)}
    classifier = last_layer(config, seed, config.pretrain_classes) if config.pretrain_classes else {}
    return {**weights, **{CLASSIFIER + name: value for name, value in classifier.items()}}


def layers(config: ModelConfig, weights: Tensors) -> Tensors:
    """The shared weights that are the network's own, without those that only a head of `HEADS` or the classifier of pre-training has.
    A network of one's own may have a layer called head."""
    others = {*HEADS[config.head_init].extra}.difference(network_of(config).head_names)
    return {name: value for name, value in weights.items() if name not in others and not name.startswith(CLASSIFIER)}


def classifier_outputs(config: ModelConfig, tensors: Tensors, x: tf.Tensor) -> tf.Tensor:
    """The outputs of the classifier of pre-training (Baseline and Baseline++: Chen et al., 2019), [rows, pretrain_classes]."""
    network = network_of(config)
    own = {name: tensors[CLASSIFIER + name] for name in network.head_names}
    config_of_classifier = dataclasses.replace(config, dim_output=config.pretrain_classes)
    return outputs_of(config_of_classifier, {**tensors, **own}, network.features(tensors, x))


def initial_head(config: ModelConfig, weights: Tensors, features: tf.Tensor, support_y: tf.Tensor) -> Tensors:
    """A task's last layer before its first inner step, computed as `head_init` says, one of `HEADS`; differentiable.

    Args:
        weights: the shared ones.
        features: of the support rows, [rows, features].
        support_y: [rows, dim_output].

    Returns:
        {name of the matrix: [features, dim_output], name of the bias: [dim_output]}; of a head with outputs of its own its `extra`.
    """
    head = HEADS[config.head_init]
    names = head.extra if head.outputs else network_of(config).head_names
    return dict(zip(names, head.compute(config, weights, features, support_y)))


def outputs_of(config: ModelConfig, tensors: Tensors, features: tf.Tensor) -> tf.Tensor:
    """The outputs for rows with features [rows, features]: of the last layer, or with 'cosine' logits of its matrix without the bias, or
    as the head says; [rows, outputs]."""
    head = HEADS[config.head_init]
    if head.outputs:
        return head.outputs(tensors, features)
    if config.logits == 'linear':
        return network_of(config).head(tensors, features)
    matrix = tensors[network_of(config).head_names[0]]
    return COSINE_SCALE * tf.matmul(tf.math.l2_normalize(features, axis=1), tf.math.l2_normalize(matrix, axis=0))


def narrowed(config: ModelConfig, variables: Tensors, wider: ModelConfig, tensors: Tensors) -> Tensors:
    """A model's parameters, {name: tensor}, from those of another, which may have more outputs: then the first are taken; or fewer, if the
    last layer is computed for each task.

    Raises UserError if a network of one's own with another number of outputs would compute something else.
    """
    of_steps = names_of_steps(config, variables)
    values = {name: fitted(tensors[name], variable.shape, name in of_steps) for name, variable in variables.items() if name in tensors}
    if config.network and config.dim_output != wider.dim_output and not (
            all(name in values and values[name].shape == variable.shape for name, variable in variables.items())
            and _has_same_first_outputs(config, values, wider, tensors)):
        raise UserError(f'{network_of(config).name} computes something different when it is made with {config.dim_output} outputs instead '
                        f'of the {wider.dim_output} that it was trained with: use tasks of {wider.dim_output} classes')
    return values


def names_of_steps(config: ModelConfig, names: Iterable[str]) -> set[str]:
    """Those of some names of parameters that have an entry for each inner step."""
    norm_params = network_of(config).initial_norm_params() if config.norm_per_step else {}
    return {name for name in names if name in norm_params or config.learn_lr == 'step' and name.startswith('lr/')}


def fitted(value: tf.Tensor, shape: Sequence[int], has_steps: bool) -> tf.Tensor:
    """A tensor of another model in the given shape: its first outputs; or if it has an entry for each inner step, those of the steps, where
    further steps have what the last one has. One entry for all steps becomes that of each."""
    if value.shape == shape:
        return value
    if not has_steps:
        return value[..., :shape[-1]]
    value = tf.convert_to_tensor(value)
    return at_step(value if len(value.shape) == len(shape) else value[None], tf.range(shape[0]))


def _has_same_first_outputs(config, values, wider, tensors):
    """Whether a network with other outputs makes the first of those of the wider one, or where the last layer is computed, has the
    same features."""
    def of_first_step(config, tensors):
        of_steps = names_of_steps(config, tensors)
        return {name: at_step(tf.convert_to_tensor(value), 0) if name in of_steps else tf.convert_to_tensor(value)
                for name, value in tensors.items()}

    x = tf.constant(np.random.default_rng(0).uniform(size=[ROWS, config.dim_input]), config.dtype)
    models = [(network_of(each), of_first_step(each, own)) for each, own in ((config, values), (wider, tensors))]
    made = [network.features(tensors, x) for network, tensors in models]
    if config.head_init == 'learned':
        made = [network.head(tensors, features)[:, :config.dim_output] for (network, tensors), features in zip(models, made)]
    return made[0].shape == made[1].shape and almost_equal(*made)


def last_layer(config: ModelConfig, seed: int, outputs: int) -> Tensors:
    """The last layer of a network with so many outputs, initially: [features, outputs] and [outputs]."""
    network = network_of(dataclasses.replace(config, dim_output=outputs))
    weights = network.initial_weights(seed)
    if config.network and network.head_inputs != network_of(config).head_inputs:
        raise UserError(f'the features of {network.name} depend on the number of outputs, so its last layer cannot have another number')
    return {name: weights[name] for name in network.head_names}


def repeated_column(config, weights, features, support_y):
    """The shared column for each class (UNICORN-MAML: Ye & Chao, 2022, section 5)."""
    return [tf.repeat(weights[name], support_y.shape[-1], axis=-1) for name in network_of(config).head_names]


def new_layer(config, weights, features, support_y):
    """A layer that has learned nothing: zeros, or for cosines, which zeros do not have, random numbers."""
    shape = [features.shape[-1], support_y.shape[-1]]
    with tf.init_scope():  # XLA would draw other numbers
        matrix = (tf.zeros(shape, features.dtype) if config.logits == 'linear' else
                  tf.random.stateless_normal(shape, [0, 0], dtype=features.dtype))
    return matrix, tf.zeros(shape[1:], features.dtype)


def prototypes(config, weights, features, support_y):
    """2 c_k and -|c_k|^2, where c_k is the mean of the features f of class k: the outputs are minus the squared distances |f - c_k|^2,
    but for |f|^2, which is the same for all classes (ProtoNet: Snell et al., 2017, equation 8; ProtoMAML: Triantafillou et al.,
    2020, section 3)."""
    means = tf.matmul(features, support_y / tf.reduce_sum(support_y, axis=0), transpose_a=True)
    return 2 * means, -tf.reduce_sum(tf.square(means), axis=0)


def ridge_scalars(config: ModelConfig, seed: int) -> Tensors:
    """What `ridge_regression` learns, initially: scalars."""
    return dict(zip(RIDGE_SCALARS, map(tf.constant, (config.ridge_lambda, config.ridge_scale, 0.0))))


def ridge_regression(config, weights, features, support_y):
    """The ridge regression of y on the features and a column of ones, in closed form, scaled (R2-D2: Bertinetto et al., 2019, equations
    4 to 6). With X and Y divided by the root of the number of rows it is X'(XX' + lambda)^-1 Y, or where there are more rows than
    columns (X'X + lambda)^-1 X'Y."""
    penalty, scale, bias = (weights[name] for name in RIDGE_SCALARS)
    root = math.sqrt(features.shape[0])
    x = tf.concat([features, tf.ones_like(features[:, :1])], axis=1) / root
    y = support_y / root

    def solve(gram, right):
        gram += penalty * tf.eye(gram.shape[0], dtype=gram.dtype)
        # TensorFlow ends the program if it cannot solve; where training diverged, the result shall be nan, as elsewhere.
        gram = tf.where(tf.reduce_all(tf.math.is_finite(gram)), gram, tf.eye(gram.shape[0], dtype=gram.dtype))
        return tf.linalg.solve(gram, right)

    if x.shape[0] <= x.shape[1]:
        solution = tf.matmul(x, solve(tf.matmul(x, x, transpose_b=True), y), transpose_a=True)
    else:
        solution = solve(tf.matmul(x, x, transpose_a=True), tf.matmul(x, y, transpose_a=True))
    solution *= scale
    return solution[:-1], solution[-1] + bias


def nearest_neighbour(tensors, features):
    """For each class minus the squared distance to its nearest support row, but for a constant of the row."""
    support, labels = (tensors[name] for name in NEIGHBOURS)
    closeness = 2 * tf.matmul(features, support, transpose_b=True) - tf.reduce_sum(tf.square(support), axis=1)
    return tf.reduce_max(tf.where(labels[None] > 0, closeness[:, :, None], closeness.dtype.min), axis=1)


class Head(NamedTuple):
    """A way to compute the last layer of a task."""
    # Function of the arguments of `initial_head`: matrix and bias, or with `outputs` the `extra`.
    compute: Callable[..., Iterable[tf.Tensor]] | None  # None: it is not computed
    learned: Callable[[ModelConfig, int], Tensors] = lambda config, seed: {}  # the shared weights that it needs, initially
    extra: tuple[str, ...] = ()                  # names of the tensors that it has besides the network's
    outputs: Callable[[Tensors, tf.Tensor], tf.Tensor] | None = None  # of tensors and features; None: those of the network's last layer


HEADS = {'learned': Head(None),
         'shared': Head(repeated_column, functools.partial(last_layer, outputs=1)), 'new': Head(new_layer),
         'prototypes': Head(prototypes), 'ridge': Head(ridge_regression, ridge_scalars, RIDGE_SCALARS),
         'neighbours': Head(lambda config, weights, *examples: examples, extra=NEIGHBOURS, outputs=nearest_neighbour)}
