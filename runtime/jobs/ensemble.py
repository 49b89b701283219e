"""The mean of several outputs for a task: of several checkpoints of one run, or under several orders of the task's labels."""
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from maml import MAML, Outputs
from runtime.datasets.tasks import TaskBatch
from utils import Metrics, accuracy, metric_functions, stack_metrics


class Ensemble:
    """The mean outputs (logits, in classification) of several checkpoints of a network, each adapted to the task separately.

    It evaluates and predicts as a MAML does, on one device (MAML++'s evaluation: Antoniou et al., 2019, section 5). `config`,
    `replicas`, `weights` and `state` are those of the model.
    """

    def __init__(self, model: MAML, members: Sequence[dict[str, np.ndarray]]):
        """`members` holds all parameters of each checkpoint, {name: array}; those of the model are overwritten."""
        self._model, self._members = model, members
        self.config, self.replicas, self.weights, self.state = model.config, model.replicas, model.weights, model.state

    def members(self) -> Iterator[MAML]:
        """The model with the parameters of each checkpoint in turn."""
        for member in self._members:
            for name, variable in self._model.parameters().items():
                variable.assign(member[name])
            yield self._model

    def variant(self, **changes: Any) -> 'Ensemble':
        """As `MAML.variant`."""
        variants = [model.variant(**changes) for model in self.members()]
        members = [{name: variable.numpy() for name, variable in variant.parameters().items()} for variant in variants]
        return Ensemble(variants[0], members)

    def predict(self, batch: TaskBatch, num_updates: int) -> Outputs:
        """As `MAML.predict`."""
        outputs = [model.predict(batch, num_updates) for model in self.members()]
        return tf.nest.map_structure(lambda *tensors: tf.add_n(tensors) / len(tensors), *outputs)

    def evaluate(self, batch: TaskBatch, num_updates: int) -> Metrics:
        """As `MAML.evaluate`, of the mean outputs."""
        outputs = self.predict(batch, num_updates)
        measure = metric_functions(self.config)
        return stack_metrics([{name: function(batch, Outputs(outputs.pre, post)) for name, function in measure.items()}
                              for post in outputs.post])


class OrderMetrics(NamedTuple):
    """Accuracies in [0, 1] under several orders of a task's labels, [columns, tasks]: see `store.column_titles`."""
    mean: np.ndarray      # over the orders
    spread: np.ndarray    # standard deviation over the orders
    averaged: np.ndarray  # of the mean outputs (logits)


class Permuted:
    """A model that is adapted to each task under several orders of the labels of its classes, on one device.

    The last layer of MAML starts differently for each class, so its accuracy depends on their order (Ye & Chao, 2022, section 4).
    """

    def __init__(self, model: MAML | Ensemble, count: int):
        """`count` is of the orders, the first of which is that of the tasks; all are different."""
        self._model, self._orders = model, label_orders(model.config.dim_output, count)
        self.config, self.replicas, self.weights = model.config, model.replicas, model.weights

    def evaluate(self, batch: TaskBatch, num_updates: int) -> OrderMetrics:
        """Accuracies of a meta-batch."""
        outputs = []
        for order in self._orders:
            permuted = batch._replace(support_y=batch.support_y[..., order], query_y=batch.query_y[..., order])
            pre, post = self._model.predict(permuted, num_updates)
            outputs.append([values.numpy()[..., np.argsort(order)] for values in (pre, *post)])
        accuracies = np.stack([self._accuracies(batch, order_outputs) for order_outputs in outputs])
        means = [np.mean(values, axis=0) for values in zip(*outputs)]
        return OrderMetrics(accuracies.mean(axis=0), accuracies.std(axis=0), self._accuracies(batch, means))

    def _accuracies(self, batch, outputs):
        targets = [batch.support_y] + [batch.query_y] * (len(outputs) - 1)
        return np.stack([accuracy(tf.constant(values), labels) for values, labels in zip(outputs, targets)])


def label_orders(way: int, count: int) -> list[np.ndarray]:
    """Different permutations of the labels 0 to way - 1, a function of the arguments; the first leaves them as they are."""
    orders, rng = {tuple(range(way)): None}, np.random.default_rng(0)
    while len(orders) < count:
        orders[tuple(rng.permutation(way).tolist())] = None
    return [np.array(order) for order in orders]
