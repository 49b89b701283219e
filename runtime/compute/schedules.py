"""Schedules of meta-training: what changes with the iteration."""
from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import tensorflow as tf

from runtime.system.errors import UserError

if TYPE_CHECKING:
    from maml import ModelConfig


def multi_step_weights(config: ModelConfig, iteration: int | tf.Tensor) -> list[tf.Tensor]:
    """The weights of the query losses after each of T inner updates, which sum to 1; they move to the last one with the iterations.

    In epoch e of E (an epoch has `schedule_interval` iterations), all but the last are max(1/T - e/(T E), 0.03/T); the last one is
    the rest. MAML++ (Antoniou et al., 2019, section 4), with the numbers of its program.
    """
    updates, epochs = config.num_updates, config.multi_step_loss / config.schedule_interval
    epoch = tf.cast(iteration // config.schedule_interval, config.dtype)
    others = tf.maximum(1 / updates - epoch / (updates * epochs), 0.03 / updates)
    last = tf.minimum(1 / updates + epoch * (updates - 1) / (updates * epochs), 1 - (updates - 1) * 0.03 / updates)
    return [others] * (updates - 1) + [last]


def config_at(config: ModelConfig, iteration: int) -> ModelConfig:
    """The config that is in force in an iteration of meta-training, without schedules that are over or inactive."""
    start = iteration // config.schedule_interval * config.schedule_interval
    return dataclasses.replace(config, first_order_iterations=0, stop_grad=config.stop_grad or start < config.first_order_iterations,
                               multi_step_loss=config.multi_step_loss if start < config.multi_step_loss else 0)


def next_change(config: ModelConfig, iteration: int) -> float:
    """The first later iteration in which another `config_at` is in force; infinity if there is none."""
    ends = (-(-last // config.schedule_interval) * config.schedule_interval
            for last in (config.first_order_iterations, config.multi_step_loss))
    return min((end for end in ends if end > iteration), default=math.inf)


def meta_lr(config: ModelConfig, iteration: int | tf.Tensor) -> float | tf.Tensor:
    """The step size of the outer loop in an iteration of meta-training; constant within `schedule_interval` iterations.

    With d in [0, 1], the part of `metatrain_iterations` that is done: final + (meta_lr - final) left, where left is 1 - d for
    'linear' and (1 + cos(pi d)) / 2 for 'cosine'. Raises UserError for a schedule without an end.
    """
    if config.meta_lr_schedule == 'constant':
        return config.meta_lr
    if config.metatrain_iterations < 1 or config.meta_lr_final < 0:
        raise UserError(f'meta_lr_schedule={config.meta_lr_schedule!r} needs metatrain_iterations of 1 or more, and a meta_lr_final that '
                        'is not negative')
    start = iteration // config.schedule_interval * config.schedule_interval
    done = tf.minimum(tf.cast(start, config.dtype) / config.metatrain_iterations, 1)
    left = 1 - done if config.meta_lr_schedule == 'linear' else (1 + tf.cos(math.pi * done)) / 2
    return config.meta_lr_final + (config.meta_lr - config.meta_lr_final) * left
