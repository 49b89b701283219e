"""Which class learns from what: `maml.MAML` from examples, `Navigator` from episodes."""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

import navigation
from maml import MAML, ModelConfig
from navigation import Tensors, Trajectories
from runtime.cli.run import Run
from runtime.compute.distribution import Replicas
from runtime.datasets.goals import GoalBatch
from utils import glorot_uniform

GOALS_AT_ONCE = 50  # in evaluations; the episodes of one may take some megabytes


class Returns(NamedTuple):
    """Average returns of tasks, [1 + updates, tasks]: before adaptation, and after each update."""
    returns: tf.Tensor

    def reported(self) -> dict[str, np.ndarray]:
        """{metric: its values, [1 + updates, tasks]}."""
        return {'return': np.asarray(self.returns)}


class Navigator:
    """The policy of 2-D navigation, and what is done with it on meta-batches of goals. Trainings and evaluations use it as they use
    `maml.MAML`, through methods and attributes of the same names."""
    steps_per_call, norm_params = 1, {}

    def __init__(self, config: ModelConfig, seed: int = 0, replicas: Replicas | None = None):
        """Weights are Glorot-uniform, a function of config and seed; biases and the log standard deviation start at 0."""
        self.config = dataclasses.replace(config, engine='vmap', jit=True, task_chunk=GOALS_AT_ONCE)
        self.replicas = replicas or Replicas()
        sizes = [config.dim_input, *config.dim_hidden, config.dim_output]
        initial = {'log_std': tf.zeros(config.dim_output)}
        for layer, shape in enumerate(zip(sizes, sizes[1:]), 1):
            initial |= {f'w{layer}': glorot_uniform(shape, [seed, layer]), f'b{layer}': tf.zeros(shape[1])}
        self.weights = {name: tf.Variable(tf.cast(value, config.dtype)) for name, value in initial.items()}
        self.description = f'Gaussian policy, {"-".join(map(str, sizes))}, ReLU'
        self._iteration = self._compiled(navigation.iteration, jit_compile=True)
        self._walk = self._compiled(navigation.walk, jit_compile=True)
        self._update = self._compiled(navigation.evaluation_update)  # a graph, not XLA: its number of episodes varies

    def _compiled(self, function, **options):
        return tf.function(functools.partial(function, self.config), autograph=False, **options)

    def parameters(self) -> dict[str, tf.Variable]:
        return self.weights

    state = parameters  # the outer step has no state of its own

    def variant(self, **changes) -> Navigator:
        other = Navigator(dataclasses.replace(self.config, **changes), replicas=self.replicas)
        other.copy_parameters(self)
        return other

    def copy_parameters(self, other: Navigator) -> None:
        for name, variable in self.weights.items():
            variable.assign(other.weights[name])

    def train_steps(self, phase: str, batches: GoalBatch, iteration: int = 0, stopping: bool = False) -> Tensors:
        """One iteration with a GoalBatch of [1, tasks, ...]; returns what `navigation.iteration` reports, [1] each."""
        values, metrics = self._iteration(phase, self._values(), tf.nest.map_structure(lambda array: tf.constant(array[0]), batches))
        if metrics['finite']:
            for name, variable in self.weights.items():
                variable.assign(values[name])
        return {name: value[None] for name, value in {**metrics, 'stopping': tf.constant(stopping)}.items()}

    def evaluate(self, batch: GoalBatch, num_updates: int) -> Returns:
        """Average returns before adaptation and after each update, over the episodes that `trajectories` collects."""
        return Returns(tf.stack([navigation.average_return(episodes) for episodes in self.trajectories(batch, num_updates)]))

    def trajectories(self, batch: GoalBatch, num_updates: int) -> Iterator[Trajectories]:
        """Episodes before adaptation, and after each update, one set after the other, because they take much memory. As the reference
        collects them, a task has as many whole episodes as fill Q * HORIZON steps, where `query_keys` are [tasks, Q, 2]: Q of full length,
        more where the robot arrives early."""
        batch = tf.nest.map_structure(tf.constant, batch)
        parameters = {name: tf.repeat(value[None], len(batch.goals), axis=0) for name, value in self._values().items()}
        for number in range(num_updates + 1):
            episodes = self._collect(parameters, batch, number)
            yield episodes
            if number < num_updates:
                parameters = self._update(parameters, episodes, tf.constant(number))

    def paths(self, batch: GoalBatch, num_updates: int, shown: int) -> list[list[list[np.ndarray]]]:
        """Before adaptation and after each update, for each task: the positions of its first `shown` episodes, [moves + 1, 2], from the
        start to where the last move ends."""
        paths = []
        for episodes in self.trajectories(batch, num_updates):
            before, running = episodes.observations[..., :2].numpy(), episodes.mask.numpy() > 0
            after = navigation.moved(before, episodes.actions).numpy()
            paths.append([[np.concatenate([before[task, episode, :1], after[task, episode, running[task, episode]]])
                           for episode in range(min(shown, before.shape[1]))] for task in range(len(before))])
        return paths

    def _collect(self, parameters, batch, number):
        steps, rounds, walked = batch.query_keys.shape[1] * navigation.HORIZON, [], 0
        while tf.reduce_min(walked) < steps:
            rounds.append(self._walk(parameters, batch.goals, batch.query_keys, tf.constant([len(rounds), number])))
            walked += tf.reduce_sum(rounds[-1].mask, axis=[1, 2])
        return navigation.first_episodes(tf.nest.map_structure(lambda *parts: tf.concat(parts, axis=1), *rounds), steps)

    def _values(self):
        return {name: variable.read_value() for name, variable in self.weights.items()}


Model = MAML | Navigator
LEARNERS = {'mse': MAML, 'xent': MAML, 'return': Navigator}  # {what is learnt from, as the source says: class}


def new_model(run: Run, seed: int, **changes: Any) -> Model:
    """A model as the run describes it, but for some fields of its config; its initial weights are a function of the seed."""
    return LEARNERS[run.model.loss](dataclasses.replace(run.model, **changes), seed, run.replicas)
