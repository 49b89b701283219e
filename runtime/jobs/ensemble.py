"""Several checkpoints of one run as one model: the mean of their outputs."""
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from maml import MAML, Metrics, Outputs, metrics_of
from runtime.datasets.tasks import TaskBatch


class Ensemble:
    """The mean outputs (logits, in classification) of several checkpoints of a network, each adapted to the task separately.

    It evaluates and predicts as a MAML does, on one device (MAML++'s evaluation: Antoniou et al., 2019, section 5).

    Attributes:
        config, replicas, weights, state: as of the model.
        iterations: of the checkpoints.
    """

    def __init__(self, model: MAML, members: Sequence[dict[str, np.ndarray]], iterations: Sequence[int]):
        """
        Args:
            model: its parameters are overwritten.
            members: {name: array} of all its parameters, one dict for each checkpoint.
            iterations: of these.
        """
        self._model, self._members, self.iterations = model, members, iterations
        self.config, self.replicas, self.weights, self.state = model.config, model.replicas, model.weights, model.state

    def _as_each_member(self):
        for member in self._members:
            for name, variable in self._model.parameters().items():
                variable.assign(member[name])
            yield self._model

    def variant(self, **changes: Any) -> 'Ensemble':
        """As `MAML.variant`."""
        variants = [model.variant(**changes) for model in self._as_each_member()]
        return Ensemble(variants[0], [{name: variable.numpy() for name, variable in one.parameters().items()} for one in variants],
                        self.iterations)

    def predict(self, batch: TaskBatch, num_updates: int) -> Outputs:
        """As `MAML.predict`."""
        return _mean([model.predict(batch, num_updates) for model in self._as_each_member()])

    def predict_unadapted(self, batch: TaskBatch) -> tf.Tensor:
        """As `MAML.predict_unadapted`."""
        return _mean([model.predict_unadapted(batch) for model in self._as_each_member()])

    def evaluate(self, batch: TaskBatch, num_updates: int) -> Metrics:
        """As `MAML.evaluate`, of the mean outputs."""
        pre, post = self.predict(batch, num_updates)
        after = [metrics_of(self.config, batch, Outputs(pre, outputs)) for outputs in post]
        return Metrics(after[0]['pre_loss'], tf.stack([one['post_loss'] for one in after]), after[0].get('pre_accuracy'),
                       tf.stack([one['post_accuracy'] for one in after]) if 'post_accuracy' in after[0] else None)


def _mean(found):
    """The mean of several structures of tensors."""
    return tf.nest.map_structure(lambda *tensors: tf.add_n(tensors) / len(tensors), *found)
