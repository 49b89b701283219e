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

import numpy as np

from runtime.datasets.class_folders import ClassFolders, FolderOptions
from runtime.datasets.functions import Family, FunctionTasks, Harmonic, Sinusoid, SinusoidOrLine
from runtime.datasets.goals import Navigation
from runtime.datasets.images import resized
from runtime.datasets.splits import MANIFEST, split_named
from runtime.datasets.tables import Tables
from runtime.datasets.tasks import SPLITS, Examples, Source, SupervisedSource, TaskBatch, TaskConfig, split_rows
from runtime.system.errors import UserError

DATA_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data')


def class_name(folder: str) -> str:
    """A class folder's name, without the folder of its split if there is one."""
    split, _, name = folder.partition('/')
    return name if split_named(split) and name else folder


# Tasks ---------------------------------------------------------------------------------------------------------------

class ClassTasks:
    """N-way classification: N distinct classes labelled 0..N-1 in random order, K + Q distinct examples of each.

    If the source has rotations, each class of each task is rotated by a random multiple of 90 degrees, the same one for all its rows.
    """
    unit = 'class'

    def __init__(self, source: 'ImageSource | TableSource', config: TaskConfig, split: str):
        self.source, self.config, self.way = source, config, config.num_classes
        self._shots = config.update_batch_size + config.query_shots  # examples of each class
        self._split_index = SPLITS.index(split)
        self.classes = source.load(split, config.data_path)
        self._check(split)
        self.fingerprint = zlib.crc32(repr((self.classes.names, self.classes.counts.tolist(), self.classes.checksum)).encode())

    def _check(self, split):
        """Raises UserError if there are too few classes, or too few examples of one."""
        config, names, counts = self.config, self.classes.names, self.classes.counts
        folders = self.source.folders(config.data_path)
        if self.way > len(names):
            raise UserError(f'--num_classes={self.way} asks for more classes than the {len(names)} of the '
                            f'{split} split in {folders.root}; {folders.too_few_hint(self.way)}')
        fewest = int(np.argmin(counts))
        if counts[fewest] < self._shots:
            raise UserError(f'a task needs {self._shots} {self.source.example}s of a {self.unit} ({config.update_batch_size} support, '
                            f'{config.query_shots} query), but {names[fewest]} in '
                            f'{folders.root} has {counts[fewest]}; lower --update_batch_size (or --test_query), or remove the '
                            f'{self.unit}')

    def class_checksums(self) -> dict[str, int]:
        """{`class_name`: CRC-32 of its first examples}, by which a class is known again under another name."""
        values, names, starts, counts, _ = self.classes
        most = max(2 ** 16 // values[:1].nbytes, 1)
        return {class_name(name): zlib.crc32(np.ascontiguousarray(values[start:start + min(count, most)]))
                for name, start, count in zip(names, starts, counts)}

    @property
    def size(self) -> str:
        """Text: how many classes and examples there are."""
        units = {'class': 'classes', 'table': 'tables'}[self.unit]
        return f'{len(self.classes.names):,} {units}, {self.classes.counts.sum():,} {self.source.example}s'

    def draw(self, start: int, count: int) -> TaskBatch:
        """Tasks start to start + count - 1."""
        x, labels = self._examples(start, count)
        support_rows = self.way * self.config.update_batch_size
        if 0 < self.config.inner_batch < support_rows:  # so that the parts of tasks differ in how many rows of a class they have
            for task in range(count):
                rng = np.random.default_rng([self.config.seed, self._split_index, start + task, 2])
                order = rng.permutation(support_rows)
                x[task, :support_rows], labels[task, :support_rows] = x[task, order], labels[task, order]
        return split_rows(x, np.eye(self.way, dtype=np.float32)[labels], support_rows)

    def draw_examples(self, start: int, count: int) -> TaskBatch:
        """Examples start to start + count - 1 of a random sequence of all of the split, labelled by their class among all: as one task,
        [1, count, ...], whose query rows are its support rows."""
        examples, names, starts, _, _ = self.classes
        chosen = [np.random.default_rng([self.config.seed, self._split_index, number, 1]).integers(len(examples))
                  for number in range(start, start + count)]
        x = self.source.preprocess(examples[chosen][None])
        y = np.eye(len(names), dtype=np.float32)[np.searchsorted(starts, chosen, side='right') - 1][None]
        return TaskBatch(x, y, x, y)

    def class_names(self, task: int) -> list[str]:
        """The classes of a task, in the order of its labels."""
        return [self.classes.names[index] for index in self._choose(task)[2]]

    def _examples(self, start, count):
        """Tasks as the network's inputs, [count, rows, dim_input], and labels, [count, rows]."""
        rows, shape = self._shots * self.way, self.classes.values.shape[1:]
        x = np.empty((count, self._shots, self.way, *shape), self.classes.values.dtype)
        labels = np.empty((count, self._shots, self.way), np.int64)
        for task in range(count):
            self._draw_one(start + task, x[task], labels[task])
        return self.source.preprocess(x.reshape(count, rows, *shape)), labels.reshape(count, rows)

    def _choose(self, task):
        """What a task is drawn from: a random generator, labels [shots, way], and the class of each label [way]."""
        rng = np.random.default_rng([self.config.seed, self._split_index, task])
        # Every shot lists the classes in its own order: rows in class order would give the label away by position.
        labels = rng.permuted(np.tile(np.arange(self.way), (self._shots, 1)), axis=1)
        return rng, labels, rng.choice(len(self.classes.names), self.way, replace=False)

    def _draw_one(self, task, x, labels):
        """Writes one task to x, [shots, way, ...], and labels, [shots, way]."""
        examples, _, starts, counts, _ = self.classes
        rng, labels[:], chosen_classes = self._choose(task)
        for label, class_index in enumerate(chosen_classes):
            chosen = examples[starts[class_index] + rng.choice(counts[class_index], self._shots, replace=False)]
            rotated = np.rot90(chosen, rng.integers(4), axes=(1, 2)) if self.source.rotations else chosen
            x[np.arange(self._shots), np.argmax(labels == label, axis=1)] = rotated


class TableTasks(ClassTasks):
    """Regression on tables: each task is a table drawn at random, and K + Q of its rows."""
    unit = 'table'

    def __init__(self, source: 'TableSource', config: TaskConfig, split: str):
        super().__init__(source, dataclasses.replace(config, num_classes=1), split)

    def draw(self, start: int, count: int) -> TaskBatch:
        """Tasks start to start + count - 1: K support and Q query rows each; there are no classes."""
        rows, features = self._examples(start, count)[0], self.source.dim_input(self.config)
        return split_rows(rows[..., :features], rows[..., features:], self.config.update_batch_size)


# The sources --------------------------------------------------------------------------------------------------------

class NumberSource(SupervisedSource):
    """The common part of sources of numbers, not of images."""
    image_shape = head = clip = None
    dim_hidden, validation_updates = (40, 40), 5

    def query_shots(self, update_batch_size: int, train: bool) -> int:
        """As many query as support examples."""
        return update_batch_size


@dataclasses.dataclass(frozen=True)
class FunctionSource(NumberSource):
    """Regression on the functions of a family. It needs no data on disk."""
    family: Family
    baselines: tuple[str, ...] = ()
    loss, print_interval, task_facts = 'mse', 1000, {}

    def tasks(self, config: TaskConfig, split: str) -> FunctionTasks:
        return FunctionTasks(self.family, config, split)

    def dim_input(self, config: TaskConfig) -> int:
        return 1 + self.family.num_uniforms if config.baseline == 'oracle' else 1

    def dim_output(self, config: TaskConfig) -> int:
        return 1


@dataclasses.dataclass(frozen=True)
class ImageSource(SupervisedSource, FolderOptions):
    """Classification of images in class folders on disk (runtime/datasets/class_folders.py says how they are laid out)."""
    image_shape: tuple[int, int, int]        # height, width, channels
    folder: str | None = None             # below data/; None: --data_path must name it
    script: str | None = None             # the preparation script; None: the user's own images, of any size and format
    rotations: bool = False
    invert: bool = False
    head: str = 'flatten'
    clip: float | None = None
    train_query_shots: int | None = None  # query examples per class in training; None: K
    validation_updates: int = 1           # or as many as a training step has; Reference behaviour: 10 for Omniglot
    test_only: bool = False                  # there are no classes to train or to validate on
    validate_on_fewer: bool = False          # if val has fewer classes than N, validate on tasks of all of them
    stored_shape: tuple[int, int, int] | None = None  # of the images on disk, if they are resized to image_shape as tasks are drawn
    print_interval: int = 100
    loss, example = 'xent', 'image'
    dim_hidden = (256, 128, 64, 64)          # --conv=False

    @property
    def task_facts(self) -> dict:
        return {'rotations': self.rotations, 'image_shape': list(self.image_shape)}

    @property
    def user_images(self) -> bool:
        """Whether the images are the user's own, so that flags say what shape they get."""
        return self.folder is None

    def tasks(self, config: TaskConfig, split: str) -> ClassTasks:
        return ClassTasks(self, config, split)

    def folders(self, data_path: str | None = None) -> ClassFolders:
        """The class folders, in data_path or else in the source's own folder."""
        own = None if self.user_images else os.path.join(DATA_FOLDER, self.folder)
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(FolderOptions)}
        return ClassFolders(data_path or own, self.script, own and os.path.join(own, MANIFEST), **options)

    def load(self, split: str, data_path: str | None = None) -> Examples:
        """The split's decoded images; see `ClassFolders.load`."""
        return self.folders(data_path).load(split, self.stored_shape or self.image_shape)

    def preprocess(self, images: np.ndarray) -> np.ndarray:
        """The network's input: uint8 [..., height, width, channels] -> float32 [..., dim_input] in [0, 1], inverted (1 - x) if the
        source says so."""
        images = resized(images, self.image_shape) if self.stored_shape else images
        images = images.reshape(*images.shape[:-3], -1)
        return (255 - images if self.invert else images).astype(np.float32) / np.float32(255)

    def dim_input(self, config: TaskConfig) -> int:
        return math.prod(self.image_shape)

    def dim_output(self, config: TaskConfig) -> int:
        return config.num_classes

    def query_shots(self, update_batch_size: int, train: bool) -> int:
        """K query examples per class, unless the source trains with another number."""
        return self.train_query_shots if train and self.train_query_shots else update_batch_size


@dataclasses.dataclass(frozen=True)
class TableSource(NumberSource):
    """Regression or classification of rows of numbers in csv files (runtime/datasets/tables.py says how they are laid out)."""
    files: Tables = Tables()
    print_interval, example, rotations = 100, 'row', False

    @property
    def loss(self) -> str:
        return 'mse' if self.files.target_names else 'xent'

    @property
    def task_facts(self) -> dict:
        return {'features': list(self.files.columns.features), 'targets': list(self.files.columns.targets)}

    def tasks(self, config: TaskConfig, split: str) -> ClassTasks:
        return (TableTasks if self.loss == 'mse' else ClassTasks)(self, config, split)

    def folders(self, data_path: str | None = None) -> Tables:
        """The csv files, in data_path if they are not known yet."""
        return self.files if self.files.root else dataclasses.replace(self.files, root=data_path or '')

    def load(self, split: str, data_path: str | None = None) -> Examples:
        """The split's rows; see `Tables.load`."""
        return self.folders(data_path).load(split)

    def preprocess(self, rows: np.ndarray) -> np.ndarray:
        """The rows are standardised already."""
        return rows

    def dim_input(self, config: TaskConfig) -> int:
        return len(self.folders(config.data_path).columns.features)

    def dim_output(self, config: TaskConfig) -> int:
        return len(self.files.target_names) or config.num_classes


def photographs(folder: str, side: int) -> ImageSource:
    """A published set of square colour images, trained with 15 query examples of each class."""
    return ImageSource((side, side, 3), folder, f'data/{folder}/proc_images.py', clip=10.0, train_query_shots=15)


SOURCES: dict[str, Source] = {
    'sinusoid': FunctionSource(Sinusoid(), baselines=('oracle',)),
    'sinusoid_line': FunctionSource(SinusoidOrLine()),
    'harmonic': FunctionSource(Harmonic()),
    'navigation': Navigation(),
    'omniglot': ImageSource((28, 28, 1), 'omniglot_resized', 'data/omniglot_resized/resize_images.py', rotations=True,
                            invert=True, head='mean', validation_updates=10),
    'miniimagenet': photographs('miniImagenet', 84),
    'cifarfs': photographs('cifarfs', 32),
    'fc100': photographs('fc100', 32),
    'tieredimagenet': photographs('tieredimagenet', 84),
    'cub': photographs('cub', 84),
    'flowers': photographs('flowers', 84),
    'aircraft': photographs('aircraft', 84),
    'dtd': photographs('dtd', 84),
    'doublemnist': ImageSource((64, 64, 1), 'doublemnist', 'data/doublemnist/proc_images.py', validate_on_fewer=True),
    'triplemnist': ImageSource((84, 84, 1), 'triplemnist', 'data/triplemnist/proc_images.py'),
    'gtsrb': ImageSource((32, 32, 3), 'gtsrb', 'data/gtsrb/proc_images.py', test_only=True),
    'table': TableSource(),  # the user's own
    'folder': ImageSource((84, 84, 3), clip=10.0, split_ratios=(64, 16, 20)),  # the user's own; flags change shape and rotations
}
