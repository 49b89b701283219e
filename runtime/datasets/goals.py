"""Goals of the paper's 2-D navigation: tasks without examples; what is random in their episodes is a function of keys."""
import dataclasses
from typing import NamedTuple

import numpy as np

from runtime.datasets.tasks import SPLITS, TaskConfig

LARGEST = 0.5  # coordinate of a goal


class GoalBatch(NamedTuple):
    """A meta-batch of goals."""
    goals: np.ndarray         # float32 [tasks, 2]
    support_keys: np.ndarray  # int32 [tasks, K, 2]: of the random numbers of each episode before adaptation, in training
    query_keys: np.ndarray    # int32 [tasks, Q, 2]: after it; of all episodes in evaluation


class GoalTasks:
    """Goals uniform in [-0.5, 0.5]^2. Those of meta-test are the reference's: of numpy.random.seed(1), if --test_seed is 0."""

    def __init__(self, config: TaskConfig, split: str):
        self.config, self._split, self.fingerprint = config, split, None

    def draw(self, start: int, count: int) -> GoalBatch:
        """Tasks start to start + count - 1."""
        episodes, support = self.config.update_batch_size + self.config.query_shots, self.config.update_batch_size
        random = [np.random.default_rng([self.config.seed, SPLITS.index(self._split), task]) for task in range(start, start + count)]
        goals = np.stack([rng.uniform(-LARGEST, LARGEST, 2) for rng in random])
        keys = np.stack([rng.integers(2 ** 30, size=(episodes, 2), dtype=np.int32) for rng in random])
        if self._split == 'test':
            goals = np.random.RandomState(1 + self.config.seed).uniform(-LARGEST, LARGEST, (start + count, 2))[start:]
        return GoalBatch(goals.astype(np.float32), keys[:, :support], keys[:, support:])


@dataclasses.dataclass(frozen=True)
class Navigation:
    """2-D navigation by reinforcement learning (section 5.3 of the paper): a task is a goal, and a shot an episode."""
    image_shape = head = clip = None
    loss, dim_hidden, baselines, task_facts = 'return', (100, 100), ('oracle',), {}
    supervised, print_interval, validation_updates, test_updates, reported = False, 1, 1, 4, ('kl', 'taken')
    usual_flags = {'norm': 'None', 'strategy': 'one', 'save_interval': 10, 'num_test_tasks': 40, 'validation_tasks': 100}

    def tasks(self, config: TaskConfig, split: str) -> GoalTasks:
        return GoalTasks(config, split)

    def dim_input(self, config: TaskConfig) -> int:
        return 4 if config.baseline == 'oracle' else 2

    def dim_output(self, config: TaskConfig) -> int:
        return 2

    def query_shots(self, update_batch_size: int, train: bool) -> int:
        """As many episodes after adaptation as before it; in evaluation 40 before each update, as the reference."""
        return update_batch_size if train else 40
