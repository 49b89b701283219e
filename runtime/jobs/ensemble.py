"""Several checkpoints of one run as one model: the mean of their outputs."""
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from maml import MAML, Outputs
from runtime.datasets.tasks import TaskBatch
from utils import Metrics, metric_functions, stack_metrics


class Ensemble:
    """The mean outputs (logits, in classification) of several checkpoints of a network, each adapted to the task separately.

    It evaluates and predicts as a MAML does, on one device (MAML++'s evaluation: Antoniou et al., 2019, section 5).

    Attributes:
        config, replicas, weights, state: as of the model.
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
