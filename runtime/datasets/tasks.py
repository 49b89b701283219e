"""What tasks, and sources of tasks, must provide."""
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

OWN_DATA = 'folder', 'table'  # sources that are whatever --data_path names
SPLITS = ('train', 'val', 'test')


class Examples(NamedTuple):
    """The examples of a split: images or rows of numbers, class after class, or table after table."""
    values: np.ndarray   # uint8 [images, height, width, channels] or float32 [rows, columns]
    names: list[str]     # of the classes or tables
    starts: np.ndarray   # int64 [names]: index of the first example of each
    counts: np.ndarray   # int64 [names]
    checksum: int        # CRC-32 of the data

    @classmethod
    def grouped(cls, values: np.ndarray, counts: Mapping[str, int], checksum: int) -> 'Examples':
        """Of values whose classes or tables, in their order, have these counts."""
        numbers = np.array(list(counts.values()))
        return cls(values, list(counts), np.cumsum(numbers) - numbers, numbers, checksum)


class TaskBatch(NamedTuple):
    """A meta-batch. Support rows serve the inner loop, query rows the meta-loss (the reference's `a` and `b`).

    In classification, rows are shot-major: each run of N rows holds every class once, in a fresh random order. Where an inner step sees
    a part of the support rows, these are in any order.
    """
    support_x: np.ndarray  # float32 [tasks, N*K, dim_input]
    support_y: np.ndarray  # float32 [tasks, N*K, dim_output]  one-hot, or the regression target
    query_x: np.ndarray    # float32 [tasks, N*Q, dim_input]
    query_y: np.ndarray    # float32 [tasks, N*Q, dim_output]


class UserTask(NamedTuple):
    """A task that a user made, of images or of rows of numbers: examples to learn from, and queries to predict for."""
    batch: TaskBatch        # of this one task; query_y is 0 where the answer is not known
    classes: list[str]      # their names, in the order of the labels; [] in regression
    has_answer: np.ndarray  # bool [queries]: whether the answer is known
    unit: str               # what an example is: 'image' | 'row'
    support: str            # the flag that names the support examples, and its value
    name: str               # of the task, for the names of files
    names: list[str]        # of the queries, [queries]
    columns: list[str]      # of the csv file of predictions, before the predictions themselves
    cells: list[list[str]]  # [queries][columns]

    @property
    def labels(self) -> list[int | None]:
        """The label of each query, None if it is not known; in classification."""
        return [int(np.argmax(row)) if answered else None for row, answered in zip(self.batch.query_y[0], self.has_answer)]


def task_name(support: str, query: str) -> str:
    """What to call a task of two files or folders."""
    return '_'.join(os.path.basename(os.path.abspath(path)).removesuffix('.csv') for path in (support, query))


def one_hot(names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """float32 [names, classes]; a row is 0 where a name is none of the classes."""
    label = {name: index for index, name in enumerate(classes)}
    return np.eye(len(classes) + 1, len(classes), dtype=np.float32)[[label.get(name, len(classes)) for name in names]]


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
    baseline: str | None = None  # 'oracle': inputs carry the task's amplitude and phase (navigation: its goal)
    data_path: str | None = None  # folder of the data, if it is not the source's own
    inner_batch: int = 0         # support rows that an inner step sees; 0: all


class Tasks(Protocol):
    """The tasks of one split of a source."""
    fingerprint: int | None      # identifies the data, so that a resumed run can refuse others; None: no data on disk

    def draw(self, start: int, count: int) -> TaskBatch:
        """Tasks start to start + count - 1."""


class SupervisedSource:
    """What sources of labelled examples have in common."""
    supervised, test_updates, usual_flags, reported, baselines = True, 10, {}, (), ()


class Source(Protocol):
    """What an entry of SOURCES must provide."""
    loss: str                       # 'mse' | 'xent' | 'return'
    image_shape: tuple[int, int, int] | None  # height, width, channels; None: not images
    head: str | None             # 'mean' | 'flatten': what the convolutional net does before its last layer
    clip: float | None           # elementwise bound of the meta-gradient
    dim_hidden: tuple[int, ...]     # layer sizes of the fully connected net
    validation_updates: int         # inner updates of a validation during training
    print_interval: int             # iterations between console lines
    supervised: bool                # tasks are examples to learn from; False: reinforcement learning
    test_updates: int               # inner updates of an evaluation, if no flag says otherwise
    usual_flags: dict               # {flag: value} of its own defaults
    reported: tuple[str, ...]       # what a training step reports besides the metric
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
