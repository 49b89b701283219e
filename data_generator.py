"""Data sources, their splits, and the tasks drawn from them.

Task j of a split is a function of (seed, split, j) and of nothing else: what was drawn before, by whom, and in batches of
which size makes no difference. So a run can be resumed at any iteration, evaluations of different models see the same
tasks, and workers can share a meta-batch without talking. Meta-batch i of T tasks is tasks i*T to i*T + T - 1.

To add a source, add an entry to SOURCES.
"""
import contextlib
import csv
import dataclasses
import glob
import hashlib
import io
import json
import math
import os
import re
import socket
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Optional, Tuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

SPLITS = ('train', 'val', 'test')
DATA_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data')
PREPARED_SUFFIXES = {'.png', '.jpg', '.jpeg'}
# A manifest lists the classes of each split; the partial one is what a preparation with --allow_missing leaves.
PARTIAL_MANIFEST, MANIFEST = 'splits.partial.csv', 'splits.csv'
PREPARATION_RECORD = '.prepared.json'  # says whether a preparation came to its end
CHUNK_BYTES = 2 ** 24  # of decoded images, on their way to the cache
STALE_SECONDS = 3600   # after which nobody is writing a file any more that has not grown

# Pillow refuses to decode images of more than 179 million pixels, and warns from half of that on: here both are refused.
warnings.simplefilter('error', Image.DecompressionBombWarning)
warnings.filterwarnings('ignore', 'Palette images with Transparency')


class UserError(Exception):
    """Something the user can mend; the message is one sentence that says what, where, and what to do."""


def first_line(error):
    """What an error says, without further lines and what TensorFlow puts around it."""
    return re.sub(r'\{\{.*?\}\} ?| ?\[Op:.*', '', str(error).splitlines()[0]).strip() if str(error) else type(error).__name__


class TaskBatch(NamedTuple):
    """A meta-batch. Support rows serve the inner loop, query rows the meta-loss (the reference's `a` and `b`).

    Rows are shot-major: each run of N rows holds every class once, in a fresh random order.
    """
    support_x: np.ndarray  # float32 [tasks, N*K, dim_input]
    support_y: np.ndarray  # float32 [tasks, N*K, dim_output]  one-hot, or the regression target
    query_x: np.ndarray    # float32 [tasks, N*Q, dim_input]
    query_y: np.ndarray    # float32 [tasks, N*Q, dim_output]


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What a task looks like. Fields are named like the flags."""
    num_classes: int                # N, the way; without meaning in regression
    update_batch_size: int          # K, support examples per class
    query_shots: int                # Q, query examples per class
    seed: int
    baseline: Optional[str] = None  # 'oracle': regression inputs carry the task's amplitude and phase
    data_path: Optional[str] = None  # folder of the images, where it is not the source's own


# Sinusoid regression ------------------------------------------------------------------------------------------------

class SinusoidTasks:
    """y = amplitude * sin(x - phase) with amplitude U[0.1, 5], phase U[0, pi], x U[-5, 5] (section 5.1 of the paper).

    Inputs are x, or with the oracle baseline (x, amplitude, phase).
    """
    AMPLITUDES, PHASES, INPUTS = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)

    def __init__(self, config, split):
        self.config = config
        self._key = np.random.SeedSequence([config.seed, SPLITS.index(split)]).generate_state(2, np.uint64)
        self._points = config.update_batch_size + config.query_shots
        self.fingerprint = None  # there are no data but what the seed says
        # Philox makes four numbers for each value of its counter; a task owns a block of counter values.
        self._counts_per_task = -(-(2 + self._points) // 4)

    def draw(self, start, count):
        """Tasks start to start + count - 1, as a TaskBatch; classes play no part, so rows are K and Q."""
        amplitude, phase, x = self._uniform(start, count)
        return _split_rows(*self._examples(amplitude, phase, x), self.config.update_batch_size)

    def parameters(self, start, count):
        """Amplitude and phase of these tasks, each [count, 1, 1]."""
        return self._uniform(start, count)[:2]

    def grid(self, start, count, points=200):
        """These tasks' inputs and targets at equal distances over the whole range: [count, points, dim] each."""
        x = np.broadcast_to(np.linspace(*self.INPUTS, points)[:, None], (count, points, 1))
        return self._examples(*self.parameters(start, count), x)

    def _uniform(self, start, count):
        """Amplitudes [count, 1, 1], phases likewise, and inputs [count, points, 1] of these tasks."""
        stream = np.random.Philox(key=self._key, counter=start * self._counts_per_task)
        uniform = np.random.Generator(stream).random((count, 4 * self._counts_per_task, 1))
        return (_between(self.AMPLITUDES, uniform[:, 0:1]), _between(self.PHASES, uniform[:, 1:2]),
                _between(self.INPUTS, uniform[:, 2:2 + self._points]))

    def _examples(self, amplitude, phase, x):
        y = amplitude * np.sin(x - phase)
        if self.config.baseline == 'oracle':
            x = np.concatenate([x, np.broadcast_to(amplitude, x.shape), np.broadcast_to(phase, x.shape)], axis=-1)
        return x.astype(np.float32), y.astype(np.float32)


def _between(bounds, uniform):
    low, high = bounds
    return low + (high - low) * uniform


def _split_rows(x, y, support_rows):
    return TaskBatch(x[:, :support_rows], y[:, :support_rows], x[:, support_rows:], y[:, support_rows:])


# Image classification -----------------------------------------------------------------------------------------------

class ImageClasses(NamedTuple):
    """The images of a split, class after class."""
    images: np.ndarray   # uint8 [images, height, width, channels]
    names: list          # class folders, relative to the data folder
    starts: np.ndarray   # int64 [classes]: index of a class's first image
    counts: np.ndarray   # int64 [classes]
    checksum: int        # of the images


class OwnTask(NamedTuple):
    """A task that somebody has put into folders."""
    batch: TaskBatch    # of this one task; rows of query_y are 0 where the class is not known
    classes: list       # their names, in the order of labels
    queries: list       # query images' paths, in the order of rows


class ImageTasks:
    """N-way classification: N distinct classes labelled 0..N-1 in random order, K + Q distinct images of each.

    Where the source asks for it, each class of each task is rotated by a random multiple of 90 degrees, the same one for
    all its rows. Pixels are in [0, 1], inverted (1 - x) where the source asks for it.
    """

    def __init__(self, source, config, split):
        self.source, self.config = source, config
        self._split_index = SPLITS.index(split)
        self.classes = source.load(split, config.data_path)
        self._check(split)
        # Tells other data from these.
        self.fingerprint = zlib.crc32(repr((self.classes.names, self.classes.counts.tolist(), self.classes.checksum)).encode())

    def _check(self, split):
        config, names, counts = self.config, self.classes.names, self.classes.counts
        if config.num_classes > len(names):
            raise UserError(f'--num_classes={config.num_classes} asks for more classes than the {len(names)} of the '
                            f'{split} split in {self.source.path(config.data_path)}; {self.source.more(config.num_classes)}')
        needed, fewest = config.update_batch_size + config.query_shots, int(np.argmin(counts))
        if counts[fewest] < needed:
            raise UserError(f'a task needs {needed} images of a class ({config.update_batch_size} support, '
                            f'{config.query_shots} query), but {names[fewest]} in '
                            f'{self.source.path(config.data_path)} has {counts[fewest]}; ask for fewer, or remove the class')

    def draw(self, start, count):
        """Tasks start to start + count - 1, as a TaskBatch."""
        way, shots = self.config.num_classes, self.config.update_batch_size + self.config.query_shots
        x = np.empty((count, shots, way, *self.source.image_shape), np.uint8)
        labels = np.empty((count, shots, way), np.int64)
        for task in range(count):
            self._draw_one(start + task, x[task], labels[task])
        x = self.source.rows(x.reshape(count, shots * way, *self.source.image_shape))
        y = np.eye(way, dtype=np.float32)[labels.reshape(count, shots * way)]
        return _split_rows(x, y, way * self.config.update_batch_size)

    def class_names(self, task):
        """The class folders of a task, in the order of its labels."""
        return [self.classes.names[index] for index in self._choose(task)[2]]

    def _choose(self, task):
        """What a task is drawn from: a random generator, labels [shots, way], and the classes that they stand for [way]."""
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
class SinusoidSource:
    """Regression on sine waves: nothing to prepare."""
    loss = 'mse'
    image_shape = head = clip = None
    dim_hidden = (40, 40)
    validation_updates = 5      # inner updates that validation looks at during training
    print_interval = 1000       # iterations between console lines

    def tasks(self, config, split):
        return SinusoidTasks(config, split)

    def dim_input(self, config):
        return 3 if config.baseline == 'oracle' else 1

    def dim_output(self, config):
        return 1

    def query_shots(self, update_batch_size, train):
        """Query examples per task: as many as the support has."""
        return update_batch_size


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Classification of images found on disk.

    Their folder holds either folders train, val and test of class folders, or a manifest of class folders (a csv file with
    the columns split,class), or, where `shares` are given, class folders to be split by them.
    """
    image_shape: Tuple[int, int, int]        # height, width, channels
    folder: Optional[str] = None             # below data/; None: only --data_path says
    script: Optional[str] = None             # what prepares the folder; None: the user's own images, of any size and format
    rotations: bool = False
    invert: bool = False
    head: str = 'flatten'                    # 'mean' | 'flatten': what the conv net does before its last layer
    clip: Optional[float] = None             # elementwise bound of the meta-gradient
    train_query_shots: Optional[int] = None  # query examples per class in training; None: K
    validation_updates: int = 10
    shares: Optional[Tuple[int, int, int]] = None  # proportions of train, val and test in number of classes
    shares_asked: bool = False               # insist on them, where classes are split already
    print_interval: int = 100
    loss = 'xent'
    dim_hidden = (256, 128, 64, 64)          # --conv=False

    def tasks(self, config, split):
        return ImageTasks(self, config, split)

    def rows(self, images):
        """What the network sees of images: uint8 [..., height, width, channels] -> float32 [..., dim_input] in [0, 1]."""
        images = images.reshape(*images.shape[:-3], -1)
        return (255 - images if self.invert else images).astype(np.float32) / np.float32(255)

    def own_task(self, support_dir, query_dir):
        """An OwnTask: learn the classes of support_dir, one folder of images each, and classify the images of query_dir.

        These may be in folders, too; one of the name of a class says that they are of that class.

        Raises:
            UserError: there are no images, or one cannot be read.
        """
        suffixes = _readable_suffixes()

        def images(folder):
            return [os.path.join(folder, file.name) for file in _image_files(folder, suffixes)]

        def load(paths, message):
            return self.rows(np.concatenate(list(decode_images(paths, self.image_shape, True, 'remove it', message))))[None]

        for name, folder in ('support_dir', support_dir), ('query_dir', query_dir):
            if not os.path.isdir(folder):
                raise UserError(f'--{name}={folder} is not a folder')
        classes = sorted(_subfolders(support_dir))
        support = [(path, label) for label, name in enumerate(classes) for path in images(os.path.join(support_dir, name))]
        empty = set(range(len(classes))) - {label for _, label in support}
        if len(classes) < 2 or empty:
            which = f'{classes[min(empty)]} has no image' if empty else f'there {"is" if classes else "are"} {len(classes)}'
            raise UserError(f'--support_dir={support_dir} must hold a folder of images for each of two or more classes; {which}')
        queries = [(path, None) for path in images(query_dir)] + [
            (path, classes.index(name) if name in classes else None)
            for name in sorted(_subfolders(query_dir)) for path in images(os.path.join(query_dir, name))]
        if not queries:
            raise UserError(f'--query_dir={query_dir} holds no images, nor do the folders in it (further below is not looked)')
        one_hot = np.eye(len(classes) + 1, len(classes), dtype=np.float32)  # its last row is 0
        support_y, query_y = (one_hot[[len(classes) if label is None else label for _, label in rows]][None]
                              for rows in (support, queries))
        support_paths, query_paths = ([path for path, _ in rows] for rows in (support, queries))
        return OwnTask(TaskBatch(load(support_paths, 'decoding support images'), support_y,
                                 load(query_paths, 'decoding query images'), query_y), classes, query_paths)

    def dim_input(self, config):
        return math.prod(self.image_shape)

    def dim_output(self, config):
        return config.num_classes

    def query_shots(self, update_batch_size, train):
        """Query examples per class: K, unless the source trains with another number."""
        return self.train_query_shots if train and self.train_query_shots else update_batch_size

    def path(self, data_path=None):
        return data_path or os.path.join(DATA_FOLDER, self.folder)

    def more(self, num_classes):
        """What to do where a split has too few classes."""
        if not self.shares:
            return 'lower it'
        enough = math.ceil(num_classes * sum(self.shares) / min(self.shares))
        return (f'lower it, or have {enough} class folders or more (as {_split_flag(self.shares)} divides them) and delete '
                f'{MANIFEST} there, if there is one')

    @property
    def remedy(self):
        return (f'prepare the images with: python {self.script}' if self.script else
                'it must hold folders train, val and test, each with one folder of images per class, or just the latter')

    @property
    def _mend(self):
        return f'run python {self.script} --force' if self.script else 'remove it'

    def class_folders(self, split, data_path=None):
        """The split's class folders relative to the data folder, sorted.

        Raises:
            UserError: there is no such folder, or no class in it.
        """
        root = self.path(data_path)
        if not os.path.isdir(root):
            raise UserError(f'there is no folder {root}; {self.remedy}')
        if not _preparation_complete(root):
            raise UserError(f'the preparation of {root} was interrupted or found something missing; run it again: '
                            f'python {self.script} (with --allow_missing to go on with what is there)')
        manifest = self._manifest(root)
        if manifest:
            names = read_manifest(manifest, split)
            if self.shares and split == 'train':  # once a run
                _tell_left_out(root, manifest)
        else:
            names = sorted(f'{split}/{name}' for name in _subfolders(os.path.join(root, split)))
        if not names:
            where = f'the manifest {manifest}' if manifest else root
            raise UserError(f'the {split} split in {where} has no classes; {self.remedy}')
        missing = [name for name in names if not os.path.isdir(os.path.join(root, name))]
        if missing:
            raise UserError(f'{len(missing)} of the {len(names)} class folders of the {split} split are missing in {root}, '
                            f'first {missing[0]}; {self.remedy}')
        return names

    def _manifest(self, root):
        """The path of the manifest that splits the classes in root, or None where folders do."""
        candidates = [os.path.join(root, PARTIAL_MANIFEST), os.path.join(root, MANIFEST)]
        if self.folder:
            candidates.append(os.path.join(DATA_FOLDER, self.folder, MANIFEST))
        found = next(filter(os.path.exists, candidates), None)
        if found and self.shares_asked:
            asked = split_classes([name for split in SPLITS for name in read_manifest(found, split)], self.shares, root)
            if any(sorted(name for where, name in asked if where == split) != read_manifest(found, split) for split in SPLITS):
                raise UserError(f'{found} splits the classes otherwise than {_split_flag(self.shares)}; leave out '
                                '--split, or delete that file to have them split anew')
        if found or not self.shares or any(os.path.isdir(os.path.join(root, split)) for split in SPLITS):
            return found
        write_manifest(os.path.join(root, MANIFEST), split_classes(_subfolders(root), self.shares, root))
        return os.path.join(root, MANIFEST)

    def load(self, split, data_path=None):
        """The split's images, decoded once: kept in a cache beside them, and read from there from then on.

        Raises:
            UserError: missing folders, or an image that cannot be decoded or has the wrong size.
        """
        root, own = self.path(data_path), self.script is None
        suffixes = _readable_suffixes() if own else PREPARED_SUFFIXES
        files = [(name, _image_files(os.path.join(root, name), suffixes)) for name in self.class_folders(split, data_path)]
        empty = [name for name, images in files if not images]
        if empty:
            raise UserError(f'the class folder {empty[0]} in {root} holds no image' + (
                f', nor do {len(empty) - 1} others' if len(empty) > 1 else '') + (
                '; remove it' if own else f'; {self.remedy}'))
        counts = np.array([len(images) for _, images in files])
        paths = [os.path.join(root, name, image.name) for name, images in files for image in images]
        fingerprint = hashlib.sha256(repr((self.image_shape, own and 'on white', files)).encode()).hexdigest()
        images, checksum = cached_array(
            os.path.join(root, '.cache', f'{split}_{"x".join(map(str, self.image_shape))}'), fingerprint,
            (len(paths), *self.image_shape),
            lambda: decode_images(paths, self.image_shape, own, self._mend, f'decoding {split} images'))
        return ImageClasses(images, [name for name, _ in files], np.cumsum(counts) - counts, counts, checksum)


SOURCES = {
    'sinusoid': SinusoidSource(),
    'omniglot': ImageSource((28, 28, 1), 'omniglot_resized', 'data/omniglot_resized/resize_images.py', rotations=True,
                            invert=True, head='mean'),
    'miniimagenet': ImageSource((84, 84, 3), 'miniImagenet', 'data/miniImagenet/proc_images.py', clip=10.0,
                                train_query_shots=15, validation_updates=1),
    'cifarfs': ImageSource((32, 32, 3), 'cifarfs', 'data/cifarfs/proc_images.py', clip=10.0, train_query_shots=15),
    'fc100': ImageSource((32, 32, 3), 'fc100', 'data/fc100/proc_images.py', clip=10.0, train_query_shots=15),
    # The user's own images; flags change the shape, the rotations and the shares.
    'folder': ImageSource((84, 84, 3), clip=10.0, shares=(64, 16, 20)),
}


# Images on disk -----------------------------------------------------------------------------------------------------

def read_manifest(path, split):
    """Class folders of a split, sorted, from a csv file with the columns split and class.

    Raises:
        UserError: the file cannot be read, or a line is not as it should be.
    """
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'the manifest {path} cannot be read: {error}') from error
    if {'split', 'class'} - set(columns):
        raise UserError(f'the first line of the manifest {path} must be split,class')
    split_of = {}
    for number, row in enumerate(rows, start=2):
        if split_of.setdefault(row['class'], number) != number:
            raise UserError(f'the manifest {path} lists {row["class"]} twice, in lines {split_of[row["class"]]} and '
                            f'{number}')
        if row.get('split') not in SPLITS or not _is_below(row.get('class')):
            raise UserError(f'line {number} of the manifest {path} is not of the form split,class, where split is one of '
                            f'{", ".join(SPLITS)} and class a folder below the data')
    return sorted(row['class'] for row in rows if row['split'] == split)


def _tell_left_out(root, manifest):
    """Says which of the class folders in root a manifest does not list."""
    listed = {name.split(os.sep)[0] for split in SPLITS for name in read_manifest(manifest, split)}
    left_out = sorted(set(_subfolders(root)) - listed)
    if left_out:
        print(f'Left out, for {manifest} does not list {"it" if len(left_out) == 1 else "them"}: {left_out[0]}'
              + (f' and {len(left_out) - 1} more' if len(left_out) > 1 else '')
              + '. Add a line for each, or delete that file to have all split anew')


def _is_below(name):
    """Whether a name is that of a folder below the one in which it is looked up, and plainly so."""
    return bool(name) and not os.path.isabs(name) and os.path.normpath(name) == name and name.split(os.sep)[0] not in ('.', '..')


def _split_flag(shares):
    return '--split=' + '/'.join(map(str, shares))


def split_classes(names, shares, root):
    """Splits classes in an order that depends on their names only: [(split, class)].

    Args:
        names: class folders.
        shares: proportions of train, val and test; each gets at least one class.
        root: what to call the folder in an error.

    Raises:
        UserError: there are fewer classes than splits.
    """
    if len(names) < len(SPLITS):
        raise UserError(f'{root} holds {len(names)} class folders, which cannot be split into train, val and test; it must '
                        'hold folders train, val and test, each with one folder of images per class, or just the latter')
    shuffled = sorted(names, key=lambda name: hashlib.sha256(name.encode(errors='surrogateescape')).digest())
    held_out = [max(1, len(names) * share // sum(shares)) for share in shares[1:]]
    if sum(held_out) >= len(names):
        raise UserError(f'{_split_flag(shares)} leaves no class of the {len(names)} in {root} for training')
    bounds = [0, len(names) - sum(held_out), len(names) - held_out[1], len(names)]
    return [(split, name) for split, start, end in zip(SPLITS, bounds, bounds[1:]) for name in sorted(shuffled[start:end])]


def write_manifest(path, rows):
    """Writes [(split, class)] where `read_manifest` will find it, and says so."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([('split', 'class'), *rows])
    try:
        write_aside(path, lambda file: file.write(text.getvalue().encode()))
    except (OSError, UnicodeEncodeError) as error:
        raise UserError(f'the split of the classes cannot be written to {path} ({error}); make its folder writable, or sort '
                        'the class folders into folders train, val and test yourself') from error
    counts = ' / '.join(str(sum(split == name for name, _ in rows)) for split in SPLITS)
    print(f'Split the classes into {counts} for train / val / test; the list is in {path}')


class ImageFile(NamedTuple):
    """An image as the folder lists it; size and time tell when a cache of it is stale."""
    name: str
    bytes: int
    mtime_ns: int


def _preparation_complete(root):
    """Whether a preparation script says that it came to its end, or none has left word."""
    try:
        with open(os.path.join(root, PREPARATION_RECORD), encoding='utf-8') as file:
            return bool(json.load(file)['complete'])
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _subfolders(folder):
    if not os.path.isdir(folder):
        return []
    return [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith('.')]


def _readable_suffixes():
    return {suffix for suffix, image_format in Image.registered_extensions().items() if image_format in Image.OPEN}


def _image_files(folder, suffixes):
    """The folder's images sorted by name, as [ImageFile]; other files and hidden ones are passed over."""
    def is_image(name):
        return os.path.splitext(name)[1].lower() in suffixes and not name.startswith('.')

    return sorted(ImageFile(entry.name, entry.stat().st_size, entry.stat().st_mtime_ns)
                  for entry in os.scandir(folder) if is_image(entry.name) and entry.is_file())


def decode_images(paths, image_shape, resize, mend, message):
    """Decodes image files, grey for one channel, else RGB; some at a time, on all cores.

    Args:
        resize: resize images (upright, on white where they are transparent, by a Lanczos filter, not keeping the aspect)
            instead of refusing other sizes.
        mend: what to do about a bad image, for an error.
        message: what the progress bar says.

    Yields:
        uint8 arrays [some, height, width, channels].

    Raises:
        UserError: a file is no image or has another size; names it.
    """
    height, width, channels = image_shape

    def decode(path):
        try:
            with Image.open(path) as image:
                image = _on_white(ImageOps.exif_transpose(image)) if resize else image
                size, pixels = image.size, _eight_bits(image).convert('L' if channels == 1 else 'RGB')
        except MemoryError:
            raise
        except Exception as error:  # damaged images make Pillow raise about anything
            raise UserError(f'{path} cannot be read as an image ({error}); {mend}') from error
        if size != (width, height):
            if not resize:
                raise UserError(f'{path} is {size[0]}x{size[1]} pixels, not {width}x{height}; {mend}')
            pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
        return np.asarray(pixels).reshape(image_shape)

    some = max(1, CHUNK_BYTES // math.prod(image_shape))
    with ThreadPoolExecutor() as pool, tqdm(desc=message, total=len(paths), unit=' images', leave=False,
                                            disable=None) as progress:
        for start in range(0, len(paths), some):
            chunk = list(pool.map(decode, paths[start:start + some]))
            progress.update(len(chunk))
            yield np.stack(chunk)


def _on_white(image):
    """An image as it looks on white paper."""
    if image.mode not in ('RGBA', 'LA', 'PA', 'RGBa', 'La') and 'transparency' not in image.info:
        return image
    if image.mode.startswith('I'):  # grey of 16 bits, of which one is transparent
        grey = np.asarray(image)
        return Image.fromarray(np.where(grey == image.info['transparency'], 65535, grey).astype(np.int32))
    image = image.convert('RGBA')
    return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)


def _eight_bits(image):
    """Grey images of 16 bits, which Pillow would clip, scaled to 8; raises ValueError for floating-point ones."""
    if image.mode == 'F':
        raise ValueError('its pixels are floating-point numbers, of unknown range')
    if image.mode.startswith('I'):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image


def cached_array(path, fingerprint, shape, make):
    """A uint8 array from <path>.npy, or from make() where that file is missing, damaged or made from something else.

    Args:
        path: the cache's path without ending; <path>.json beside it holds fingerprint and checksum.
        fingerprint: says what the array is made from.
        shape: what the array must have.
        make: function that yields the array, some of its first axis at a time.

    Returns:
        The array, memory-mapped (in memory only where the cache cannot be written), and its checksum.
    """
    found = _read_cache(path, fingerprint, shape)
    if found:
        return found

    def write(file):
        checksum = 0
        np.lib.format.write_array_header_1_0(file, {'descr': '|u1', 'fortran_order': False, 'shape': shape})
        for part in make():
            checksum = zlib.crc32(part, checksum)
            file.write(part)
        return checksum

    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        record = {'fingerprint': fingerprint, 'crc32': write_aside(path + '.npy', write)}
        write_aside(path + '.json', lambda file: file.write(json.dumps(record).encode()))
        return np.load(path + '.npy', mmap_mode='r'), record['crc32']
    except OSError as error:
        print(f'The decoded images could not be kept for the next run: {error}', file=sys.stderr)
        array = np.concatenate(list(make()))
        return array, zlib.crc32(array)


def _read_cache(path, fingerprint, shape):
    """The array and its checksum, or None. Reads the file for its checksum piece by piece, not to fill the memory."""
    try:
        with open(path + '.json', encoding='utf-8') as file:
            record = json.load(file)
        array = np.load(path + '.npy', mmap_mode='r')
        if array.shape != shape or array.dtype != np.uint8 or record.get('fingerprint') != fingerprint:
            return None
        checksum = 0
        with open(path + '.npy', 'rb') as file:
            file.seek(array.offset)
            while part := file.read(CHUNK_BYTES):
                checksum = zlib.crc32(part, checksum)
        return (array, checksum) if checksum == record.get('crc32') else None
    except Exception:  # damaged files make numpy raise about anything, and a cache that cannot be read is made again
        return None


def write_aside(path, write):
    """Writes a file aside and moves it into place, so that nobody ever sees half of it; returns what write returns."""
    for left in glob.glob(f'{glob.escape(path)}.*.part'):  # by a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(left) > STALE_SECONDS:
                os.unlink(left)
    aside = f'{path}.{socket.gethostname()}.{os.getpid()}.part'
    try:
        with open(aside, 'wb') as file:
            result = write(file)
        os.replace(aside, path)
        return result
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise
