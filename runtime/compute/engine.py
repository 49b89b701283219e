"""Runs functions of one task on meta-batches: mapped over tasks, in chunks, compiled, and summed over all replicas.

A function of one task takes the values of the shared parameters, a number (the iteration, or the inner step) and the task: a
TaskBatch without the leading axis. It knows nothing of other tasks. What it computes is decided in maml.py.
"""
from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from runtime.compute.distribution import Replicas
from runtime.system.cores import usable_cores

if TYPE_CHECKING:
    from maml import ModelConfig, Parameters
    from networks import Network

# The dtype of sums over tasks. In float32 they would depend on how tasks are divided between replicas and chunks, and training
# diverges from the last digit on: a ReLU near zero is soon on in one run and off in the other.
SUM_DTYPE = tf.float64
Structure = Any  # nested tuples and dicts of tensors


def resolve(config: ModelConfig, network: Network) -> ModelConfig:
    """A ModelConfig whose fields `engine` and `jit` are decided.

    'auto' is 'vmap' (all tasks in one graph), if the network can be vectorised, for dense nets, which are small, and on a GPU; else 'map':
    on a CPU, a task with convolutions fills a core. A loop over inner steps (`recompute`) is not vectorised. XLA compiles 'vmap' and, for
    dense nets, such loops, if the network has no loops of its own, whose length may not be known; on a CPU not convolutions, because its
    sums over large images are not accurate enough for second derivatives, and no random layers, for which it would draw other numbers.
    """
    kind = {'tasks': 'map', 'wide': 'vmap'}.get(config.engine, config.engine)  # names in earlier versions
    compilable = not network.convolutional or has_gpu()
    if kind == 'auto':
        kind = 'vmap' if network.vectorizes and compilable and not config.recompute else 'map'
    jit = kind == 'vmap' and compilable or config.recompute and not (network.convolutional or network.loops)
    return dataclasses.replace(config, engine=kind, jit=jit and not network.random)


def has_gpu() -> bool:
    """Whether TensorFlow sees a GPU."""
    return bool(tf.config.list_physical_devices('GPU'))


class Engine:
    """Runs functions of one task on meta-batches, which are TaskBatches [tasks, rows, dim].

    With several replicas, a meta-batch is what `Replicas.distribute` makes of TaskBatches: each replica has its own tasks.
    """

    def __init__(self, config: ModelConfig, replicas: Replicas, parameters: Parameters, metrics: dict[str, Callable]):
        """
        Args:
            config: a ModelConfig from `resolve`.
            parameters: the shared ones, as {name: tf.Variable}; functions of one task get their values. If an inner optimizer's
                state is among them, each task takes it over from the one before: tasks go one after the other.
            metrics: {name: function of a meta-batch and the outputs for it that returns [tasks]}.
        """
        self._config, self._replicas, self._strategy = config, replicas, replicas.strategy
        self._parameters, self._metrics = parameters, metrics
        # XLA compiles what one replica computes. If there is one replica, that is everything.
        single = replicas.count == 1
        compiled = functools.partial(tf.function, jit_compile=config.jit and single, autograph=False)
        on_replica = functools.partial(tf.function, jit_compile=config.jit, autograph=False)
        if not single:
            self._map, self._map_and_measure = on_replica(self._map), on_replica(self._map_and_measure)
            self._local_means = on_replica(self._local_means)
        self.train, self.means, self.map_on_replicas, self.map_and_measure = map(
            compiled, (self.train, self.means, self.map_on_replicas, self.map_and_measure))
        self.map = on_replica(self.map)

    # The methods below run compiled. A Python number as an argument would be compiled into them, so numbers come as tensors.

    def train(self, task_gradient: Callable, signature: Structure, update: Callable, batches: Structure,
              first_iteration: tf.Tensor, stopping: tf.Tensor) -> dict[str, tf.Tensor]:
        """Training steps with meta-batches [steps, tasks, rows, dim], one after the other.

        Args:
            task_gradient: function of one task, called with the iteration; returns ({name: gradient}, outputs, inner optimizer's state).
            signature: the structure of what it returns, with anything for each tensor.
            update: updates the shared parameters, given the gradients averaged over tasks, and the iteration.
            first_iteration: int64 scalar, of the first step.
            stopping: scalar of the engine's dtype, 1 if this process is about to stop, else 0.

        Returns:
            {metric: [steps], averaged over tasks}; {'gradient_norm'}, [steps]: the Euclidean norm of the mean gradient, of all tensors
            together; {'finite'}, bool [steps]: whether losses and gradients were finite, for a step in which they were not changes
            nothing; {'stopping'}, bool [steps]: whether any process is about to stop.
        """
        def step(index):
            parameters = _values(self._parameters)  # here, for variables of one device cannot be read on another
            batch = self._strategy.run(_element, (batches, index))  # before compiled code begins: XLA compiles again for each index
            iteration = first_iteration + tf.cast(index, tf.int64)
            sums = self._strategy.run(self._local_means, (parameters, task_gradient, signature, batch, iteration, stopping))
            gradients, metrics, optimizer_state, stopped = self._all_reduce(sums)

            def change():
                update(gradients, iteration)
                for name, variable in self._parameters.inner_optimizer_state.items():
                    variable.assign(optimizer_state[name])

            # Of gradients before clipping, which makes infinity finite. It is a sum of squares, which Adam keeps: they must be finite too.
            norm = tf.linalg.global_norm(list(gradients.values()))
            finite = _all_finite((norm, metrics, optimizer_state))
            tf.cond(finite, change, lambda: None)
            return {**metrics, 'gradient_norm': norm, 'finite': finite, 'stopping': stopped > 0}

        steps = self._strategy.experimental_local_results(batches[0])[0].shape[0]
        dtypes = {**dict.fromkeys([*self._metrics, 'gradient_norm'], tf.as_dtype(self._config.dtype)), 'finite': tf.bool,
                  'stopping': tf.bool}
        return tf.map_fn(step, tf.range(steps), fn_output_signature=dtypes, parallel_iterations=1)

    def means(self, task_gradient: Callable, signature: Structure, batch: Structure, iteration: tf.Tensor) -> Structure:
        """{name: gradient}, averaged over the tasks of a meta-batch; arguments as for `train`."""
        sums = self._strategy.run(self._local_means, (_values(self._parameters), task_gradient, signature, batch, iteration))
        return self._all_reduce(sums)[0]

    def map_on_replicas(self, function: Callable, batch: Structure, step: tf.Tensor) -> Structure:
        """`map` on all replicas: what the function returns for each replica's tasks stays there."""
        return self._strategy.run(self._map, (_values(self._parameters), function, batch, step))

    def map_and_measure(self, function: Callable, signature: Structure, batch: Structure, state: Structure,
                        step: tf.Tensor) -> tuple[dict[str, tf.Tensor], Structure]:
        """`map` on all replicas over (batch, state), for a function that returns outputs and a new state of one task.

        Args:
            signature: the structure of the outputs.

        Returns:
            {metric: [tasks of all replicas]}, and each replica's own new states.
        """
        metrics, state = self._strategy.run(self._map_and_measure, (_values(self._parameters), function, signature, batch, state, step))
        return dict(zip(self._metrics, tf.unstack(self._strategy.gather(metrics, axis=1), len(self._metrics)))), state

    def map(self, function: Callable, tasks: Structure, step: tf.Tensor) -> Structure:
        """What a function of one task returns for each task of this process, [tasks, ...].

        Args:
            function: called with the shared parameters, the step and one task.
            tasks: a structure of arrays [tasks, ...].
            step: int64 scalar.
        """
        return self._map(_values(self._parameters), function, tasks, step)

    def _cast(self, values):
        """Examples in the dtype in which is computed."""
        return tf.nest.map_structure(lambda value: tf.cast(value, self._config.dtype), values)

    def _map(self, parameters, function, tasks, step):
        tasks = self._cast(tasks)
        function = functools.partial(function, parameters, step)
        # tf.map_fn asks for the structure of what the function returns: it is traced once more for that.
        task = tf.nest.map_structure(lambda array: tf.TensorSpec(array.shape[1:], array.dtype), tasks)
        signature = self._config.engine == 'map' and tf.function(function, autograph=False).get_concrete_function(task).structured_outputs
        return self._mapping(signature)(function, tasks)

    def _map_and_measure(self, parameters, function, signature, batch, state, step):
        """One replica's part of `map_and_measure`: metrics [metrics, tasks] and states."""
        batch = self._cast(batch)
        outputs, state = self._mapping((signature, state))(functools.partial(function, parameters, step), (batch, state))
        return tf.stack(list(self._measure(batch, outputs).values())), state

    def _measure(self, batch, outputs):
        return {name: function(batch, outputs) for name, function in self._metrics.items()}

    def _local_means(self, parameters, task_gradient, signature, batch, iteration, stopping=0.):
        """One replica's part of what is summed over replicas: means over tasks, the inner optimizer's state, and `stopping`."""
        batch = self._cast(batch)
        mapping, tasks = self._mapping(signature), batch[0].shape[0]
        chunk = 1 if parameters.inner_optimizer_state else math.gcd(self._config.task_chunk or tasks, tasks)

        def add(before, part):
            earlier_sums, optimizer_state = before
            function = functools.partial(task_gradient, parameters._replace(inner_optimizer_state=optimizer_state), iteration)
            gradients, outputs, optimizer_states = mapping(function, part)
            sums = tf.nest.map_structure(tf.add, earlier_sums, self._sums(part, gradients, outputs))
            return sums, _element(optimizer_states, -1)

        if chunk == tasks:
            gradients, outputs, optimizer_states = mapping(functools.partial(task_gradient, parameters, iteration), batch)
            sums = self._sums(batch, gradients, outputs)
            optimizer_state = _element(optimizer_states, -1)
        else:
            chunks = tf.nest.map_structure(lambda array: tf.reshape(array, [tasks // chunk, chunk, *array.shape[1:]]), batch)
            zeros = ({name: tf.zeros(value.shape, SUM_DTYPE) for name, value in parameters.trained().items()},
                     dict.fromkeys(self._metrics, tf.zeros([], SUM_DTYPE)))
            # Where tasks hand on state, the next one's inner steps need not wait for this one's metrics.
            at_once = usable_cores() if parameters.inner_optimizer_state else 1
            sums, optimizer_state = tf.foldl(add, chunks, (zeros, parameters.inner_optimizer_state), parallel_iterations=at_once)
        means = tf.nest.map_structure(lambda total: total / (tasks * self._replicas.count), sums)
        stopping = tf.identity(stopping)  # of this graph, as `all_reduce` needs it
        return tf.nest.map_structure(lambda tensor: tf.cast(tensor, SUM_DTYPE), (*means, optimizer_state, stopping))

    def _sums(self, batch, gradients, outputs):
        """Gradients and metrics summed over the tasks of a meta-batch."""
        return tf.nest.map_structure(lambda values: tf.reduce_sum(tf.cast(values, SUM_DTYPE), axis=0),
                                     (gradients, self._measure(batch, outputs)))

    def _all_reduce(self, local_means):
        """What `_local_means` returned, summed over replicas: gradients, metrics, inner optimizer's state, and how many are stopping."""
        sums = self._strategy.run(lambda means: tf.distribute.get_replica_context().all_reduce('SUM', means), (local_means,))
        return tf.nest.map_structure(
            lambda values: tf.cast(self._strategy.experimental_local_results(values)[0], self._config.dtype), sums)

    def _mapping(self, signature):
        """What maps a function over tasks and stacks its results. The caller calls it, which keeps the call stack short."""
        if self._config.engine == 'vmap':
            return tf.vectorized_map
        dtypes = tf.nest.map_structure(lambda _: tf.as_dtype(self._config.dtype), signature)
        return functools.partial(tf.map_fn, fn_output_signature=dtypes, parallel_iterations=usable_cores())


def _element(structure, index):
    return tf.nest.map_structure(lambda array: array[index], structure)


def _values(variables):
    return tf.nest.map_structure(lambda variable: variable.read_value(), variables)


def _all_finite(tensors):
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tf.nest.flatten(tensors)])
