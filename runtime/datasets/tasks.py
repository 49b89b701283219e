"""What tasks, and sources of tasks, must provide."""
import dataclasses
from typing import NamedTuple, Protocol

import numpy as np

SPLITS = ('train', 'val', 'test')


class TaskBatch(NamedTuple):
    """A meta-batch. Support rows serve the inner loop, query rows the meta-loss (the reference's `a` and `b`).

    In classification, rows are shot-major: each run of N rows holds every class once, in a fresh random order.
    """
    support_x: np.ndarray  # float32 [tasks, N*K, dim_input]
    support_y: np.ndarray  # float32 [tasks, N*K, dim_output]  one-hot, or the regression target
    query_x: np.ndarray    # float32 [tasks, N*Q, dim_input]
    query_y: np.ndarray    # float32 [tasks, N*Q, dim_output]


def split_rows(x: np.ndarray, y: np.ndarray, support_rows: int) -> TaskBatch:
    """A TaskBatch of rows of which the first are support rows."""
    return TaskBatch(x[:, :support_rows], y[:, :support_rows], x[:, support_rows:], y[:, support_rows:])


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What a task looks like. Fields are named like the flags."""
    num_classes: int                # N, the way; unused in regression
    update_batch_size: int          # K, support examples per class
    query_shots: int                # Q, query examples per class
    seed: int
    baseline: str | None = None  # 'oracle': regression inputs carry the task's amplitude and phase
    data_path: str | None = None  # folder of the data, if it is not the source's own


class Tasks(Protocol):
    """The tasks of one split of a source."""
    fingerprint: int | None      # identifies the data, so that a resumed run can refuse others; None: no data on disk

    def draw(self, start: int, count: int) -> TaskBatch:
        """Tasks start to start + count - 1."""


class Source(Protocol):
    """What an entry of SOURCES must provide."""
    loss: str                       # 'mse' | 'xent'
    image_shape: tuple[int, int, int] | None  # height, width, channels; None: not images
    head: str | None             # 'mean' | 'flatten': what the convolutional net does before its last layer
    clip: float | None           # elementwise bound of the meta-gradient
    dim_hidden: tuple[int, ...]     # layer sizes of the fully connected net
    validation_updates: int         # inner updates of a validation during training
    print_interval: int             # iterations between console lines
    baselines: tuple[str, ...]      # values of --baseline that it offers
    task_facts: dict                # what tasks depend on besides the flags and the data: JSON values; see results.json

    def tasks(self, config: TaskConfig, split: str) -> Tasks:
        """The tasks of 'train', 'val' or 'test'; raises UserError if the data are not there or do not suffice."""

    def dim_input(self, config: TaskConfig) -> int:
        """Numbers per row of x."""

    def dim_output(self, config: TaskConfig) -> int:
        """Numbers per row of y."""

    def query_shots(self, update_batch_size: int, train: bool) -> int:
        """Q, if no flag says otherwise."""
