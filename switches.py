"""How the methods differ: which tensors an inner step adapts, with which step sizes, on which rows. Functions of a ModelConfig.

docs/methods.md lists the settings of each method; schedules over iterations are in runtime/compute/schedules.py.
"""
import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from utils import at_step, rows_of_step

Config = Any      # a maml.ModelConfig
Parameters = Any  # a maml.Parameters
TaskBatch = Any   # a data_generator.TaskBatch of one task
Step, Tensors = int | tf.Tensor, dict[str, tf.Tensor]


def head_names(config: Config) -> tuple[str, str]:
    """The names of the last layer's matrix and bias."""
    last = 5 if config.image_shape else len(config.dim_hidden) + 1
    return f'w{last}', f'b{last}'


def adapted_names(config: Config, fast: Tensors) -> Sequence[str]:
    """Names of the tensors that the inner loop adapts, of those that `fast_weights` returns."""
    head = head_names(config)
    wanted = {'all': lambda name: True, 'head': lambda name: name in head, 'body': lambda name: name not in head}
    return [name for name in fast if '/' in name or wanted[config.inner_weights](name)]


def fast_weights(config: Config, parameters: Parameters) -> Tensors:
    """Where a task's fast weights start: the shared weights, with `adapt_norm` those of normalisation as well."""
    return {**parameters.norm_params, **parameters.weights} if config.adapt_norm else parameters.weights


def norm_at(config: Config, norm_params: Tensors, fast: Tensors, step: Step) -> Tensors:
    """The offsets and scales in force at an inner step: those among the fast weights, or else the shared ones."""
    found = {name: fast.get(name, value) for name, value in norm_params.items()}
    return {name: at_step(value, step) for name, value in found.items()} if config.norm_per_step else found


def step_sizes(config: Config, learning_rates: Tensors, names: Sequence[str], step: Step) -> dict[str, Any]:
    """{name: step size} of inner step number `step`: alpha, or the learned one, a scalar or shaped like the tensor."""
    if config.learn_lr == 'no':
        return dict.fromkeys(names, config.update_lr)
    rates = {name: learning_rates[f'lr/{name}'] for name in names}
    return {name: at_step(rate, step) for name, rate in rates.items()} if config.learn_lr == 'step' else rates


def minibatch(config: Config, task: TaskBatch, step: Step, iteration: Step) -> tuple[Config, TaskBatch]:
    """The task with the support rows of an inner step, and the config with their shots, so that the loss keeps its scale."""
    if not config.inner_batch:
        return config, task
    rows = rows_of_step(task.support_x.shape[0], config.inner_batch, step, iteration)
    task = task._replace(support_x=tf.gather(task.support_x, rows), support_y=tf.gather(task.support_y, rows))
    return dataclasses.replace(config, update_batch_size=config.inner_batch / config.dim_output), task


def features_stay(config: Config) -> bool:
    """Whether the last layer's input is the same in every inner step (ANIL), so that it can be computed once per task."""
    return config.inner_weights == 'head' and not (config.adapt_norm or config.norm_per_step or config.inner_batch)
