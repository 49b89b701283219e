"""Several devices or machines, by TensorFlow's `tf.distribute`.

Tasks are distributed over replicas; a single task is never split. Every machine has the shared weights. Each replica sums the
gradients of its tasks, and one all-reduce per meta-step, of as many numbers as there are weights, sums them over replicas. From
the same sum, every machine makes the same update. As task j is a function of (seed, split, j), each replica draws its own tasks.
"""
from collections.abc import Callable
from typing import Any, NamedTuple


class Cluster(NamedTuple):
    """What this process needs of TF_CONFIG."""
    workers: int    # number of processes
    worker: int     # index of this one; 0 is the chief, which alone prints and writes


ALONE = Cluster(1, 0)


class Replicas:
    """The replicas of a strategy.

    Attributes:
        strategy: the tf.distribute.Strategy.
        count: number of replicas in all processes.
        workers: number of processes.
        chief: whether this process is the one that prints and writes.
    """

    def __init__(self, strategy: Any = None, cluster: Cluster = ALONE):
        """strategy: None: the default one, of a single replica."""
        import tensorflow as tf
        self._tf, self.strategy = tf, strategy or tf.distribute.get_strategy()
        self.count, self.workers, self.chief = self.strategy.num_replicas_in_sync, cluster.workers, cluster.worker == 0

    def distribute(self, make: Callable[[int], Any]) -> Any:
        """Gives each replica of this process a structure of arrays: make(replica), numbered among all replicas."""
        if self.count == 1:
            return make(0)
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: self._tf.nest.map_structure(self._tf.convert_to_tensor, make(context.replica_id_in_sync_group)))

    def add_leading_axis(self, arrays: Any) -> Any:
        """Adds a leading axis of length 1 to a structure that `distribute` returned."""
        return self.strategy.run(lambda arrays: self._tf.nest.map_structure(lambda array: array[None], arrays), (arrays,))
