"""Optimizers of the outer loop."""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import tensorflow as tf

from runtime.compute.schedules import meta_lr

if TYPE_CHECKING:
    from maml import ModelConfig

ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON = 0.9, 0.999, 1e-8


class Adam:
    """Adam (Kingma & Ba, 2015), with epsilon added to the uncorrected root as TensorFlow 1 did (end of its section 2)."""

    def __init__(self, variables: dict[str, tf.Variable], learning_rate: Callable):
        """
        Args:
            variables: {name: tf.Variable}, updated in place.
            learning_rate: a function of the iteration.
        """
        def zeros():
            return {name: tf.Variable(tf.zeros_like(v), trainable=False) for name, v in variables.items()}

        self.variables, self.learning_rate = variables, learning_rate
        self.step, self.means, self.squares = tf.Variable(0, dtype=tf.int64, trainable=False), zeros(), zeros()

    def apply(self, gradients: dict[str, tf.Tensor], iteration: int | tf.Tensor = 0) -> None:
        """One update of every variable by {name: gradient}."""
        step = tf.cast(self.step.assign_add(1), next(iter(self.variables.values())).dtype)
        rate = self.learning_rate(iteration) * tf.sqrt(1 - ADAM_BETA2 ** step) / (1 - ADAM_BETA1 ** step)
        for name, variable in self.variables.items():
            gradient, mean, square = gradients[name], self.means[name], self.squares[name]
            mean.assign(ADAM_BETA1 * mean + (1 - ADAM_BETA1) * gradient)
            square.assign(ADAM_BETA2 * square + (1 - ADAM_BETA2) * tf.square(gradient))
            variable.assign_sub(rate * mean / (tf.sqrt(square) + ADAM_EPSILON))

    def state(self, prefix: str = '') -> dict[str, tf.Variable]:
        """{prefix + name: variable}: what must be saved to continue."""
        state = {'step': self.step, **{f'm/{name}': v for name, v in self.means.items()},
                 **{f'v/{name}': v for name, v in self.squares.items()}}
        return {prefix + name: variable for name, variable in state.items()}


class SGD:
    """Plain gradient descent. Arguments and methods as of Adam."""

    def __init__(self, variables: dict[str, tf.Variable], learning_rate: Callable):
        self.variables, self.learning_rate = variables, learning_rate

    def apply(self, gradients: dict[str, tf.Tensor], iteration: int | tf.Tensor = 0) -> None:
        """One update of every variable by {name: gradient}."""
        for name, variable in self.variables.items():
            variable.assign_sub(self.learning_rate(iteration) * gradients[name])

    def state(self, prefix: str = '') -> dict[str, tf.Variable]:
        """{}: there is no state to continue from."""
        return {}


def bounded(config: ModelConfig, gradients: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """{name: meta-gradient} within the bounds of a config: each number of a weight's, but not of a learned step size's, within
    [-clip, clip]; then the Euclidean norm of all together at most `clip_norm` (Pascanu et al., 2013, algorithm 1)."""
    if config.clip is not None:
        gradients = {name: gradient if name.startswith('lr/') else tf.clip_by_value(gradient, -config.clip, config.clip)
                     for name, gradient in gradients.items()}
    if config.clip_norm:
        scale = config.clip_norm / tf.maximum(tf.linalg.global_norm(list(gradients.values())), config.clip_norm)
        gradients = {name: scale * gradient for name, gradient in gradients.items()}
    return gradients


def outer_optimizers(config: ModelConfig, variables: dict[str, tf.Variable]) -> dict[str, Adam | SGD]:
    """{phase: its optimizer}; pre-training has one of its own, without a schedule."""
    optimizer = {'adam': Adam, 'sgd': SGD}[config.meta_optimizer]
    return {'metatrain': optimizer(variables, functools.partial(meta_lr, config)),
            'pretrain': optimizer(variables, lambda iteration: config.meta_lr)}


def outer_updates(config: ModelConfig, optimizers: dict[str, Adam | SGD]) -> dict[str, Callable]:
    """{phase: what updates the variables, given {name: gradient} and the iteration}; meta-gradients are `bounded`."""
    def metatrain(gradients, iteration):
        # Reptile's update is not a gradient.
        optimizers['metatrain'].apply(bounded(config, gradients) if config.outer == 'gradient' else gradients, iteration)

    return {'metatrain': metatrain, 'pretrain': optimizers['pretrain'].apply}
