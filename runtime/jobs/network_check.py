"""Whether TensorFlow differentiates a network of one's own twice and exactly, as the inner loop needs."""
import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from keras_network import MASKS, ROWS, KerasNetwork, perturbed, random_like, watched
from maml import ModelConfig, Parameters, adapted
from networks import network_of
from runtime.system.errors import UserError, first_line
from utils import loss_of

TOLERANCE = 1e-4  # relative; layers that are known to be wrong are off by 0.2% and more
# Of central differences, relative to the size of each tensor. Where a ReLU is switched on or off between the two sides, the difference
# says nothing: with millions of them no step may be larger.
STEPS = 1e-8, 1e-9, 1e-7
Tensors = dict[str, tf.Tensor]


def check(config: ModelConfig) -> None:
    """Compares a Hessian-vector product of the support loss with central differences, in float64 on few rows; raises UserError,
    which names the layer, if they differ, or there is no second derivative. First-order methods, and those without inner
    updates, need none, and pass."""
    if config.stop_grad or config.outer == 'reptile' or not config.num_updates:
        return
    config = dataclasses.replace(config, dtype='float64')
    try:
        network, random = network_of(config), np.random.default_rng(0)
    except UserError as error:
        raise UserError(f'the second derivatives are tested in float64, in which this network cannot compute ({error}); leave the dtypes '
                        'of its layers and constants to Keras, or add --check_network=False to train without the test') from error
    x = tf.constant(random.uniform(size=[ROWS, config.dim_input]))
    y = tf.constant(np.eye(config.dim_output)[np.arange(ROWS) % config.dim_output] if config.loss == 'xent' else
                    random.normal(size=[ROWS, config.dim_output]))
    weights, norm_params = ({name: perturbed(tf.cast(value, tf.float64), random) for name, value in group.items()}
                            for group in (network.initial_weights(0), network.initial_norm_params()))
    tensors, masks = {**weights, **norm_params}, {MASKS: tf.zeros([3], tf.float64)}

    def loss(tensors):
        tensors = {**tensors, **masks}
        return loss_of(config, network.head(tensors, network.features(tensors, x)), y)

    wrong = error_of(loss, tensors, adapted(config, Parameters(weights, norm_params)).keys(), random)
    if wrong:
        culprit = _faulty_layer(network, {**tensors, **masks}, x, random) or f'{wrong} in code of its own that is in no layer'
        raise UserError(f'the second derivatives of {network.name} are wrong or missing, so the meta-gradient would be wrong: {culprit}; '
                        'use another layer, a first-order method, or --check_network=False to train as it is')


def error_of(function: Callable[[Tensors], tf.Tensor], tensors: Tensors, names, random: np.random.Generator) -> str:
    """What is wrong with the second derivatives of a scalar function of tensors, along a random direction in those of some names; '' if
    nothing is."""
    def gradient(tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = function(tensors)
        return tape.gradient(value, tensors, unconnected_gradients='zero')

    errors = []
    for step in STEPS:
        direction = {name: random_like(value, random) * (name in names) for name, value in tensors.items()}
        try:
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                first = gradient(tensors)
                slope = tf.add_n([tf.reduce_sum(first[name] * direction[name]) for name in tensors])
            exact = tape.gradient(slope, tensors, unconnected_gradients='zero')
        except (LookupError, NotImplementedError, ValueError, TypeError, tf.errors.OpError) as error:
            return f'there is no second derivative ({type(error).__name__}: {first_line(error)[:200]})'
        ahead, behind = (gradient({name: value + move * direction[name] for name, value in tensors.items()})
                         for move in (step, -step))
        expected = {name: (ahead[name] - behind[name]) / (2 * step) for name in tensors}
        size = max(_norm(expected), 1e-6 * _norm(first))
        errors.append(_norm({name: exact[name] - expected[name] for name in tensors}) / size if size else 0.)
        if errors[-1] < TOLERANCE:
            return ''
    return f'the second derivative is wrong by {min(errors):.2g} times itself'


def _faulty_layer(network: KerasNetwork, tensors: Tensors, x: tf.Tensor, random: np.random.Generator) -> str:
    """The first layer, inner ones before outer ones, whose second derivatives are wrong by themselves; '' if there is none."""
    with watched(network.layers) as calls:
        network.features(tensors, x)
    for layer, args, kwargs, outputs in list(calls):
        inputs = {f'input {number}': value for number, value in enumerate(args) if tf.is_tensor(value) and value.dtype == tf.float64}
        weights = {weight.path: tensors[weight.path] for weight in layer.trainable_variables}
        if not tf.is_tensor(outputs) or not {**inputs, **weights}:
            continue
        scales = tf.constant(random.normal(size=outputs.shape))

        def function(values, layer=layer, args=args, kwargs=kwargs, scales=scales):
            given = [values.get(f'input {number}', value) for number, value in enumerate(args)]
            with network.with_tensors({**tensors, **values}, len(x)):
                outputs = layer(*given, **kwargs)
            return tf.reduce_sum(scales * outputs + outputs ** 2)

        wrong = error_of(function, {**inputs, **weights}, {**inputs, **weights}.keys(), random)
        if wrong:
            return f'in the layer {layer.name} ({type(layer).__name__}) {wrong}'
    return ''


def _norm(tensors):
    return float(tf.sqrt(sum(tf.reduce_sum(tf.square(value)) for value in tensors.values())))
