"""Data sources and the tasks drawn from them.

Task j of a split is a function of (seed, split, j) only. It does not depend on what was drawn before, by which process, or in
batches of which size. So a run can be resumed at any iteration, evaluations of different models see the same tasks, and workers
can share a meta-batch without communicating. Meta-batch i of T tasks consists of tasks i*T to i*T + T - 1.

To add a source, add an entry to SOURCES; see docs/adding-a-source.md.
"""
import dataclasses
import math
import os
import zlib
from typing import NamedTuple, Protocol

import numpy as np

from runtime.class_folders import MANIFEST, SPLITS, ClassFolders, ImageClasses
from runtime.errors import UserError
from runtime.functions import Family, Harmonic, Sinusoid, SinusoidOrLine

DATA_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data')


class TaskBatch(NamedTuple):
    """A meta-batch. Support rows serve the inner loop, query rows the meta-loss (the reference's `a` and `b`).

    In classification, rows are shot-major: each run of N rows holds every class once, in a fresh random order.
    """
    support_x: np.ndarray  # float32 [tasks, N*K, dim_input]
    support_y: np.ndarray  # float32 [tasks, N*K, dim_output]  one-hot, or the regression target
    query_x: np.ndarray    # float32 [tasks, N*Q, dim_input]
    query_y: np.ndarray    # float32 [tasks, N*Q, dim_output]


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What a task looks like. Fields are named like the flags."""
    num_classes: int                # N, the way; unused in regression
    update_batch_size: int          # K, support examples per class
    query_shots: int                # Q, query examples per class
    seed: int
    baseline: str | None = None  # 'oracle': regression inputs carry the task's amplitude and phase
    data_path: str | None = None  # folder of the images, if it is not the source's own


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


# Regression ---------------------------------------------------------------------------------------------------------

class FunctionTasks:
    """Functions of a family, each seen at K + Q random inputs.

    Inputs are x, or with the oracle baseline x and the function's parameters.
    """

    def __init__(self, family: Family, config: TaskConfig, split: str):
        self.family, self.config = family, config
        self._key = np.random.SeedSequence([config.seed, SPLITS.index(split)]).generate_state(2, np.uint64)
        self._points = config.update_batch_size + config.query_shots
        self.fingerprint = None
        # Philox makes four numbers for each value of its counter; a task owns a block of counter values.
        self._counts_per_task = -(-(family.numbers + self._points) // 4)

    def draw(self, start: int, count: int) -> TaskBatch:
        """Tasks start to start + count - 1: K support and Q query rows each; there are no classes."""
        return _split_rows(*self._examples(*self._functions(start, count)), self.config.update_batch_size)

    def parameters(self, start: int, count: int) -> tuple[np.ndarray, ...]:
        """The parameters of these tasks' functions, each [count, 1, 1]."""
        return self._functions(start, count)[0]

    def grid(self, start: int, count: int, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of these tasks at equally spaced x over the whole range: [count, points, dim] each."""
        parameters = self.parameters(start, count)
        return self._examples(parameters, np.linspace(*self.family.span(parameters), points, axis=1))

    def _functions(self, start, count):
        """Parameters and x, [count, points, 1], of these tasks."""
        stream = np.random.Philox(key=self._key, counter=start * self._counts_per_task)
        uniform = np.random.Generator(stream).random((count, 4 * self._counts_per_task, 1))
        numbers = self.family.numbers
        parameters = self.family.parameters(uniform[:, :numbers])
        return parameters, self.family.inputs(parameters, uniform[:, numbers:numbers + self._points])

    def _examples(self, parameters, x):
        y = self.family.values(parameters, x)
        if self.config.baseline == 'oracle':
            x = np.concatenate([x, *(np.broadcast_to(parameter, x.shape) for parameter in parameters)], axis=-1)
        return x.astype(np.float32), y.astype(np.float32)


def _split_rows(x, y, support_rows):
    return TaskBatch(x[:, :support_rows], y[:, :support_rows], x[:, support_rows:], y[:, support_rows:])


# Image classification -----------------------------------------------------------------------------------------------

class ImageTasks:
    """N-way classification: N distinct classes labelled 0..N-1 in random order, K + Q distinct images of each.

    If the source has rotations, each class of each task is rotated by a random multiple of 90 degrees, the same one for all its
    rows. Pixels are in [0, 1], inverted (1 - x) if the source says so.
    """

    def __init__(self, source: 'ImageSource', config: TaskConfig, split: str):
        self.source, self.config = source, config
        self._split_index = SPLITS.index(split)
        self.classes = source.load(split, config.data_path)
        self._check(split)
        self.fingerprint = zlib.crc32(repr((self.classes.names, self.classes.counts.tolist(), self.classes.checksum)).encode())

    def _check(self, split):
        """Raises UserError if there are too few classes, or too few images of one."""
        config, names, counts = self.config, self.classes.names, self.classes.counts
        folders = self.source.folders(config.data_path)
        if config.num_classes > len(names):
            raise UserError(f'--num_classes={config.num_classes} asks for more classes than the {len(names)} of the '
                            f'{split} split in {folders.root}; {folders.too_few_hint(config.num_classes)}')
        needed, fewest = config.update_batch_size + config.query_shots, int(np.argmin(counts))
        if counts[fewest] < needed:
            raise UserError(f'a task needs {needed} images of a class ({config.update_batch_size} support, '
                            f'{config.query_shots} query), but {names[fewest]} in '
                            f'{folders.root} has {counts[fewest]}; ask for fewer, or remove the class')

    def draw(self, start: int, count: int) -> TaskBatch:
        """Tasks start to start + count - 1."""
        way, shots = self.config.num_classes, self.config.update_batch_size + self.config.query_shots
        x = np.empty((count, shots, way, *self.source.image_shape), np.uint8)
        labels = np.empty((count, shots, way), np.int64)
        for task in range(count):
            self._draw_one(start + task, x[task], labels[task])
        x = self.source.preprocess(x.reshape(count, shots * way, *self.source.image_shape))
        y = np.eye(way, dtype=np.float32)[labels.reshape(count, shots * way)]
        return _split_rows(x, y, way * self.config.update_batch_size)

    def class_names(self, task: int) -> list[str]:
        """The class folders of a task, in the order of its labels."""
        return [self.classes.names[index] for index in self._choose(task)[2]]

    def _choose(self, task):
        """What a task is drawn from: a random generator, labels [shots, way], and the class of each label [way]."""
        way, shots = self.config.num_classes, self.config.update_batch_size + self.config.query_shots
        rng = np.random.default_rng([self.config.seed, self._split_index, task])
        # Every shot lists the classes in an order of its own: rows in class order would give the label away by position.
        labels = rng.permuted(np.tile(np.arange(way), (shots, 1)), axis=1)
        return rng, labels, rng.choice(len(self.classes.names), way, replace=False)

    def _draw_one(self, task, x, labels):
        """Writes one task to x, uint8 [shots, way, height, width, channels], and labels, [shots, way]."""
        images, _, starts, counts, _ = self.classes
        rng, labels[:], chosen_classes = self._choose(task)
        shots, shot_index = len(labels), np.arange(len(labels))
        for label, class_index in enumerate(chosen_classes):
            chosen = images[starts[class_index] + rng.choice(counts[class_index], shots, replace=False)]
            if self.source.rotations:
                chosen = np.rot90(chosen, rng.integers(4), axes=(1, 2))
            x[shot_index, np.argmax(labels == label, axis=1)] = chosen


# The sources --------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class FunctionSource:
    """Regression on the functions of a family. Needs no data on disk."""
    family: Family
    baselines: tuple[str, ...] = ()
    loss = 'mse'
    image_shape = head = clip = None
    dim_hidden = (40, 40)
    validation_updates = 5
    print_interval = 1000
    task_facts = {}

    def tasks(self, config: TaskConfig, split: str) -> FunctionTasks:
        return FunctionTasks(self.family, config, split)

    def dim_input(self, config: TaskConfig) -> int:
        return 1 + self.family.numbers if config.baseline == 'oracle' else 1

    def dim_output(self, config: TaskConfig) -> int:
        return 1

    def query_shots(self, update_batch_size: int, train: bool) -> int:
        """As many query as support examples."""
        return update_batch_size


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Classification of images in class folders on disk (runtime/class_folders.py says how they are laid out)."""
    image_shape: tuple[int, int, int]        # height, width, channels
    folder: str | None = None             # below data/; None: --data_path must name it
    script: str | None = None             # the preparation script; None: the user's own images, of any size and format
    rotations: bool = False
    invert: bool = False
    head: str = 'flatten'
    clip: float | None = None
    train_query_shots: int | None = None  # query examples per class in training; None: K
    validation_updates: int = 10
    split_ratios: tuple[int, int, int] | None = None  # of train, val and test, for class folders that are not split yet
    split_given: bool = False                # the user asked for these ratios: refuse a manifest with others
    skip_bad_images: bool = False            # leave out images that cannot be used
    verify: bool = False                     # compare checksums of decoded images
    test_only: bool = False                  # there are no classes to train or to validate on
    print_interval: int = 100
    loss = 'xent'
    dim_hidden = (256, 128, 64, 64)          # --conv=False
    baselines = ()

    @property
    def task_facts(self) -> dict:
        return {'rotations': self.rotations, 'image_shape': list(self.image_shape)}

    @property
    def user_images(self) -> bool:
        """Whether the images are the user's own, so that flags say what shape they get."""
        return self.folder is None

    def tasks(self, config: TaskConfig, split: str) -> ImageTasks:
        return ImageTasks(self, config, split)

    def folders(self, data_path: str | None = None) -> ClassFolders:
        """The class folders, in data_path or else in the source's own folder."""
        own = None if self.user_images else os.path.join(DATA_FOLDER, self.folder)
        return ClassFolders(data_path or own, self.script, own and os.path.join(own, MANIFEST), self.split_ratios,
                            self.split_given, self.skip_bad_images, self.verify)

    def class_folders(self, split: str, data_path: str | None = None) -> list[str]:
        """Names of the split's class folders; see `ClassFolders.names`."""
        return self.folders(data_path).names(split)

    def load(self, split: str, data_path: str | None = None) -> ImageClasses:
        """The split's decoded images; see `ClassFolders.load`."""
        return self.folders(data_path).load(split, self.image_shape)

    def preprocess(self, images: np.ndarray) -> np.ndarray:
        """The network's input: uint8 [..., height, width, channels] -> float32 [..., dim_input] in [0, 1]."""
        images = images.reshape(*images.shape[:-3], -1)
        return (255 - images if self.invert else images).astype(np.float32) / np.float32(255)

    def dim_input(self, config: TaskConfig) -> int:
        return math.prod(self.image_shape)

    def dim_output(self, config: TaskConfig) -> int:
        return config.num_classes

    def query_shots(self, update_batch_size: int, train: bool) -> int:
        """K query examples per class, unless the source trains with another number."""
        return self.train_query_shots if train and self.train_query_shots else update_batch_size


SOURCES: dict[str, Source] = {
    'sinusoid': FunctionSource(Sinusoid(), baselines=('oracle',)),
    'sinusoid_line': FunctionSource(SinusoidOrLine()),
    'harmonic': FunctionSource(Harmonic()),
    'omniglot': ImageSource((28, 28, 1), 'omniglot_resized', 'data/omniglot_resized/resize_images.py', rotations=True,
                            invert=True, head='mean'),
    'miniimagenet': ImageSource((84, 84, 3), 'miniImagenet', 'data/miniImagenet/proc_images.py', clip=10.0,
                                train_query_shots=15, validation_updates=1),
    **{name: ImageSource((side, side, 3), name, f'data/{name}/proc_images.py', clip=10.0, train_query_shots=15)
       for side, names in ((32, 'cifarfs fc100'), (84, 'tieredimagenet cub flowers aircraft dtd')) for name in names.split()},
    **{f'{count}mnist': ImageSource((side, side, 1), f'{count}mnist', f'data/{count}mnist/proc_images.py')
       for count, side in (('double', 64), ('triple', 84))},
    'gtsrb': ImageSource((32, 32, 3), 'gtsrb', 'data/gtsrb/proc_images.py', test_only=True),
    'folder': ImageSource((84, 84, 3), clip=10.0, split_ratios=(64, 16, 20)),  # the user's own; flags change shape and rotations
}
