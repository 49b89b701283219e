"""Runs functions of one task on meta-batches: mapped over tasks, in chunks, compiled, and summed over all replicas.

A function of one task takes the values of the shared parameters, a number (the iteration, or the inner step) and the task: a
TaskBatch without the leading axis. It knows nothing of other tasks. What it computes is decided in maml.py.
"""
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from runtime.compute.distribution import Replicas

# The dtype of sums over tasks. In float32 they would depend on how tasks are divided between replicas and chunks, and training
# diverges from the last digit on: a ReLU near zero is soon on in one run and off in the other.
SUM_DTYPE = tf.float64
Structure = Any  # nested tuples and dicts of tensors


def resolve(kind: str, convolutional: bool, recompute: bool = False) -> str:
    """What 'auto' means: 'wide' (all tasks in one graph) for dense nets, which are small, and on a GPU; else 'tasks'.

    On a CPU, convolutions fill a core: one task per core. A loop over inner steps (`recompute`) is not put into a wide graph.
    """
    if kind != 'auto':
        return kind
    return 'wide' if (not convolutional or has_gpu()) and not recompute else 'tasks'


def has_gpu() -> bool:
    """Whether TensorFlow sees a GPU."""
    return bool(tf.config.list_physical_devices('GPU'))


class Engine:
    """Runs functions of one task on meta-batches, which are TaskBatches [tasks, rows, dim].

    With several replicas, a meta-batch is what `Replicas.distribute` makes of TaskBatches: each replica has its own tasks.
    """

    def __init__(self, kind: str, task_chunk: int | None, convolutional: bool, loops: bool, dtype: str,
                 replicas: Replicas, shared: Structure, measure: Callable, metrics: Sequence[str]):
        """
        Args:
            kind: 'tasks': one task per core; 'wide': all tasks in one graph, compiled by XLA where that is accurate.
            loops: tasks are loops over inner steps; those of dense nets, which are small, are compiled by XLA as well.
            task_chunk: tasks whose gradients are computed at a time; None: all of the meta-batch.
            dtype: of the parameters and of all that functions of one task return.
            shared: the shared parameters, a NamedTuple of groups {name: tf.Variable}; functions of one task get its values. What
                is in the group `carried` each task takes over from the one before, so that tasks go one after the other.
            measure: function of a meta-batch and of the outputs for it that returns {metric: [tasks]}.
            metrics: the names of these metrics.
        """
        self._kind, self._task_chunk, self._dtype, self._replicas, self._strategy = (
            kind, task_chunk, dtype, replicas, replicas.strategy)
        self._shared, self._measure, self._metrics = shared, measure, metrics
        # On a CPU, XLA's sums over large images are not accurate enough for second derivatives.
        xla = kind == 'wide' and (not convolutional or has_gpu()) or loops and not convolutional
        # XLA compiles what one replica computes. If there is one replica, that is everything.
        single = replicas.count == 1
        compiled = functools.partial(tf.function, jit_compile=xla and single, autograph=False)
        on_replica = functools.partial(tf.function, jit_compile=xla, autograph=False)
        if not single:
            self._map, self._map_and_measure = on_replica(self._map), on_replica(self._map_and_measure)
            self._local_means = self._of_one_step(on_replica(self._local_means))
        self.train, self.means, self.map_on_replicas, self.map_and_measure = map(
            compiled, (self.train, self.means, self.map_on_replicas, self.map_and_measure))
        self.map = on_replica(self.map)

    # The methods below run compiled. A Python number as an argument would be compiled into them, so numbers come as tensors.

    def train(self, task_gradient: Callable, signature: Structure, update: Callable, batches: Structure, iteration: tf.Tensor,
              stopping: tf.Tensor) -> dict[str, tf.Tensor]:
        """Training steps with meta-batches [steps, tasks, rows, dim], one after the other.

        Args:
            task_gradient: function of one task, called with the iteration; returns ({name: gradient}, outputs, carried).
            signature: the structure of what it returns, with None for each tensor.
            update: updates the shared parameters, given the gradients averaged over tasks, and the iteration.
            iteration: int64 scalar, of the first step.
            stopping: scalar of the engine's dtype, 1 if this process is about to stop, else 0.

        Returns:
            {metric: [steps], averaged over tasks}; {'finite'}, bool [steps]: whether losses and gradients were finite, for a
            step in which they were not changes nothing; {'stopping'}, bool [steps]: whether any process is about to stop.
        """
        def step(index):
            shared = _values(self._shared)  # here, for variables of one device cannot be read on another
            sums = self._strategy.run(self._local_means, (shared, task_gradient, signature, batches, iteration, stopping, index))
            gradients, metrics, carried, stopped = self._all_reduce(sums, signature)

            def change():
                update(gradients, iteration + tf.cast(index, tf.int64))
                tf.nest.map_structure(lambda variable, value: variable.assign(value), self._shared.carried, carried)

            # Checked before clipping, which makes infinity finite; and of squares, which Adam keeps.
            finite = _all_finite((tf.nest.map_structure(tf.square, gradients), metrics, carried))
            tf.cond(finite, change, lambda: None)
            return {**metrics, 'finite': finite, 'stopping': stopped > 0}

        steps = self._replicas.first_local(batches[0]).shape[0]
        dtypes = {**dict.fromkeys(self._metrics, tf.as_dtype(self._dtype)), 'finite': tf.bool, 'stopping': tf.bool}
        return tf.map_fn(step, tf.range(steps), fn_output_signature=dtypes, parallel_iterations=1)

    def means(self, task_gradient: Callable, signature: Structure, batch: Structure, iteration: tf.Tensor) -> Structure:
        """({name: gradient}, {metric: value}), averaged over the tasks of a meta-batch; arguments as for `train`."""
        sums = self._strategy.run(self._local_means, (_values(self._shared), task_gradient, signature, batch, iteration))
        return self._all_reduce(sums, signature)[:2]

    def map_on_replicas(self, function: Callable, signature: Structure, batch: Structure, step: tf.Tensor) -> Structure:
        """`map` on all replicas: what the function returns for each replica's tasks stays there."""
        return self._strategy.run(self._map, (_values(self._shared), function, signature, batch, step))

    def map_and_measure(self, function: Callable, signature: Structure, batch: Structure, state: Structure,
                        step: tf.Tensor) -> tuple[tf.Tensor, Structure]:
        """`map` on all replicas over (batch, state), for a function that returns outputs and a new state of one task.

        Returns:
            The metrics [metrics, tasks of all replicas], in the order of their names, and each replica's own new states.
        """
        metrics, state = self._strategy.run(self._map_and_measure, (_values(self._shared), function, signature, batch, state, step))
        return self._replicas.gather(metrics, axis=1), state

    def map(self, function: Callable, signature: Structure, tasks: Structure, step: tf.Tensor) -> Structure:
        """What a function of one task returns for each task of this process, [tasks, ...].

        Args:
            function: called with the shared parameters, the step and one task.
            signature: the structure of what it returns, with None for each tensor.
            tasks: a structure of arrays [tasks, ...].
            step: int64 scalar.
        """
        return self._map(_values(self._shared), function, signature, tasks, step)

    def _map(self, shared, function, signature, tasks, step):
        return self._mapping(signature)(functools.partial(function, shared, step), tasks)

    def _map_and_measure(self, shared, function, signature, batch, state, step):
        """One replica's part of `map_and_measure`: metrics [metrics, tasks] and states."""
        outputs, state = self._mapping(signature)(functools.partial(function, shared, step), (batch, state))
        metrics = self._measure(batch, outputs)
        return tf.stack([metrics[name] for name in self._metrics]), state

    def _local_means(self, shared, task_gradient, signature, batch, iteration, stopping=0., index=None):
        """One replica's part of what is summed over replicas: means over tasks, and `stopping`, packed in one vector.

        Args:
            index: which of the meta-batches [steps, tasks, rows, dim]; None: batch is one meta-batch.
        """
        if index is not None:
            batch, iteration = _at(index, batch, iteration)
        mapping, tasks = self._mapping(signature), batch[0].shape[0]
        chunk = 1 if shared.carried else self._task_chunk or tasks

        def add(before, part):
            function = functools.partial(task_gradient, shared._replace(carried=before[1]), iteration)
            *found, carried = mapping(function, part)
            sums = self._sums(part, *found)
            if before[0] is not None:
                sums = tf.nest.map_structure(tf.add, before[0], sums)
            return sums, tf.nest.map_structure(lambda values: values[-1], carried)

        if chunk == tasks:
            sums, carried = add((None, shared.carried), batch)
        else:
            chunks = tf.nest.map_structure(lambda array: tf.reshape(array, [tasks // chunk, chunk, *array.shape[1:]]), batch)
            zeros = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), self._sum_specs(signature))
            # Where tasks hand on state, the next one's inner steps need not wait for this one's metrics.
            at_once = os.cpu_count() if shared.carried else 1
            sums, carried = tf.foldl(add, chunks, (zeros, shared.carried), parallel_iterations=at_once)
        means = tf.nest.map_structure(lambda total: total / (tasks * self._replicas.count), sums)
        return _pack((*means, carried, tf.cast(stopping, SUM_DTYPE)))

    @staticmethod
    def _of_one_step(local_means):
        """`_local_means` that picks the meta-batch of a step before compiled code begins: XLA compiles again for each index."""
        def of_step(shared, task_gradient, signature, batch, iteration, stopping=0., index=None):
            if index is not None:
                batch, iteration = _at(index, batch, iteration)
            return local_means(shared, task_gradient, signature, batch, iteration, stopping)
        return of_step

    def _sums(self, batch, gradients, outputs):
        """Gradients and metrics summed over the tasks of a meta-batch."""
        return tf.nest.map_structure(lambda values: tf.reduce_sum(tf.cast(values, SUM_DTYPE), axis=0),
                                     (gradients, self._measure(batch, outputs)))

    def _all_reduce(self, packed, signature):
        """What `_local_means` packed, summed over replicas: gradients, metrics, `carried`, and how many replicas are stopping."""
        carried = {name: tf.TensorSpec(variable.shape, SUM_DTYPE) for name, variable in self._shared.carried.items()}
        specs = (*self._sum_specs(signature), carried, tf.TensorSpec([], SUM_DTYPE))
        totals = _unpack(self._strategy.reduce('SUM', packed, axis=None), specs)
        return tf.nest.map_structure(lambda total: tf.cast(total, self._dtype), totals)

    def _mapping(self, signature):
        """What maps a function over tasks and stacks its results. The caller calls it, which keeps the call stack short."""
        if self._kind == 'wide':
            return tf.vectorized_map
        return functools.partial(tf.map_fn, fn_output_signature=self._dtypes(signature), parallel_iterations=os.cpu_count())

    def _dtypes(self, signature):
        return tf.nest.map_structure(lambda _: tf.as_dtype(self._dtype), signature)

    def _sum_specs(self, signature):
        """Shapes of sums over tasks: gradients have those of the parameters, metrics are scalars."""
        variables = {name: variable for group in self._shared for name, variable in group.items()}
        return ({name: tf.TensorSpec(variables[name].shape, SUM_DTYPE) for name in signature[0]},
                {name: tf.TensorSpec([], SUM_DTYPE) for name in self._metrics})


def _at(index, batches, iteration):
    """The meta-batch of a step, and its iteration."""
    return tf.nest.map_structure(lambda array: array[index], batches), iteration + tf.cast(index, tf.int64)


def _values(variables):
    return tf.nest.map_structure(lambda variable: variable.read_value(), variables)


def _all_finite(tensors):
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tf.nest.flatten(tensors)])


def _pack(tensors):
    """One vector of all numbers of a structure, so that one all-reduce is enough."""
    return tf.concat([tf.reshape(tf.cast(tensor, SUM_DTYPE), [-1]) for tensor in tf.nest.flatten(tensors)], axis=0)


def _unpack(vector, specs):
    """The structure that `_pack` packed, given its TensorSpecs."""
    shapes = [spec.shape for spec in tf.nest.flatten(specs)]
    parts = tf.split(vector, [math.prod(shape) for shape in shapes])
    return tf.nest.pack_sequence_as(specs, [tf.reshape(part, shape) for part, shape in zip(parts, shapes)])
