"""A task that the user has put into folders: classes to learn from, and images to classify."""
import os
from typing import NamedTuple

import numpy as np

from runtime.datasets.class_folders import subfolders
from runtime.datasets.images import BadImages, decode_images, image_files, readable_suffixes
from runtime.datasets.tasks import Source, TaskBatch
from runtime.system.errors import UserError


class UserTask(NamedTuple):
    """A task made from the user's images."""
    batch: TaskBatch    # of this one task; rows of query_y are 0 where the class is not known
    classes: list[str]  # their names, in the order of the labels
    queries: list[str]  # paths of the query images, in the order of the rows


def read_user_task(source: Source, support_dir: str, query_dir: str, left_out: frozenset[str] = frozenset()) -> UserTask:
    """Reads the images of two folders.

    Args:
        support_dir: has one folder of images for each class.
        query_dir: has images to classify, directly or in folders; the images in a folder named like a class are of that class.
        left_out: paths of images to ignore.

    Raises:
        BadImages: images cannot be read, and the source does not ask to leave them out.
        UserError: a folder or its images are missing.
    """
    for name, folder in ('support_dir', support_dir), ('query_dir', query_dir):
        if not os.path.isdir(folder):
            raise UserError(f'--{name}={folder} is not a folder')
    classes = sorted(subfolders(support_dir))
    support = _support(support_dir, classes, left_out)
    queries = [query for query in _queries(query_dir, classes) if query[0] not in left_out]
    if not queries:
        raise UserError(f'--query_dir={query_dir} holds no images, nor do the folders in it (further below is not looked)')
    arrays, bad = [], []
    for part, images in ('support', support), ('query', queries):
        try:
            arrays += _rows(source, images, len(classes), f'decoding {part} images')
        except BadImages as error:
            bad += error.images
    if bad and not source.skip_bad_images:
        raise BadImages(bad, 'remove them')
    if bad:
        print(f'Left out (--skip_bad_images): {BadImages(bad, "").listing}')
        return read_user_task(source, support_dir, query_dir, frozenset(path for path, _ in bad))
    return UserTask(TaskBatch(*arrays), classes, [path for path, _ in queries])


def _support(support_dir: str, classes: list[str], left_out: frozenset[str]) -> list[tuple[str, int]]:
    """[(path, label)] of the support images; raises UserError if there are too few classes, or none of a class."""
    support = [(path, label) for label, name in enumerate(classes) for path in _images(os.path.join(support_dir, name))
               if path not in left_out]
    empty = set(range(len(classes))) - {label for _, label in support}
    if len(classes) < 2 or empty:
        which = f'{classes[min(empty)]} has no image' if empty else f'there {"is" if classes else "are"} {len(classes)}'
        raise UserError(f'--support_dir={support_dir} must hold a folder of images for each of two or more classes; {which}')
    return support


def _images(folder: str) -> list[str]:
    return [os.path.join(folder, file.name) for file in image_files(folder, readable_suffixes())]


def _queries(query_dir: str, classes: list[str]) -> list[tuple[str, int]]:
    """[(path, label)] of the query images; the label is len(classes) where the class is not known."""
    unknown = len(classes)
    return [(path, unknown) for path in _images(query_dir)] + [
        (path, classes.index(name) if name in classes else unknown)
        for name in sorted(subfolders(query_dir)) for path in _images(os.path.join(query_dir, name))]


def _rows(source: Source, images: list[tuple[str, int]], way: int, progress_label: str) -> tuple[np.ndarray, np.ndarray]:
    """x [1, images, dim_input] and one-hot y [1, images, way] of [(path, label)]; y is 0 for the label `way`."""
    paths, labels = zip(*images)
    decoded = decode_images(paths, source.image_shape, True, 'remove them', progress_label)
    x = source.preprocess(np.concatenate(list(decoded)))
    return x[None], np.eye(way + 1, way, dtype=np.float32)[list(labels)][None]
