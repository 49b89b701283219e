"""A task that the user has put into two folders: images to learn from, in a folder for each class, and images to classify."""
import os

import numpy as np

from runtime.datasets.class_folders import subfolders
from runtime.datasets.images import BadImages, decode_images, folder_contents, readable_suffixes
from runtime.datasets.tasks import Source, TaskBatch, UserTask, one_hot, task_name
from runtime.system.errors import UserError


def read_user_images(source: Source, support_dir: str, query_dir: str, skipped: frozenset[str] = frozenset()) -> UserTask:
    """Reads the images of two folders, but for those skipped.

    Args:
        support_dir: has one folder of images for each class.
        query_dir: has images to classify, directly or in folders; the images in a folder named like a class are of that class.

    Raises BadImages if images cannot be read, and the source does not ask to leave them out; UserError if a folder or its images
    are missing.
    """
    classes, support, queries = _find_images(support_dir, query_dir, skipped)
    arrays, bad = [], []
    for part, images in ('support', support), ('query', queries):
        paths, names = zip(*images)
        try:
            decoded = list(decode_images(paths, source.image_shape, True, 'remove them', f'decoding {part} images'))
            arrays += [source.preprocess(np.concatenate(decoded)), one_hot(names, classes)]
        except BadImages as error:
            bad += error.images
    if bad and not source.skip_bad_images:
        raise BadImages(bad, 'remove them')
    if bad:
        print(f'Skipped (--skip_bad_images): {BadImages(bad, "").listing}')
        return read_user_images(source, support_dir, query_dir, frozenset(path for path, _ in bad))
    return UserTask(TaskBatch(*(rows[None] for rows in arrays)), classes, arrays[-1].any(axis=1), 'image', f'--support_dir={support_dir}',
                    task_name(support_dir, query_dir), [os.path.relpath(path, query_dir) for path, _ in queries],
                    ['image', 'class'], [[path, name] for path, name in queries])


Images = list[tuple[str, str]]  # path and class, '' if it is not known


def _find_images(support_dir: str, query_dir: str, skipped: frozenset[str]) -> tuple[list[str], Images, Images]:
    """The classes, the support images and the query images; raises UserError if any are missing."""
    for name, folder in ('support_dir', support_dir), ('query_dir', query_dir):
        if not os.path.isdir(folder):
            raise UserError(f'--{name}={folder} is not a folder')
    classes = sorted(subfolders(support_dir))
    support = [image for image in _images_of(support_dir, classes) if image[0] not in skipped]
    empty = sorted(set(classes) - {name for _, name in support})
    if len(classes) < 2 or empty:
        which = f'{empty[0]} has no image' if empty else f'there {"is" if classes else "are"} {len(classes)}'
        raise UserError(f'--support_dir={support_dir} must hold a folder of images for each of two or more classes; {which}')
    queries = [(path, '') for path in _images(query_dir)] + _images_of(query_dir, sorted(subfolders(query_dir)))
    queries = [(path, name if name in classes else '') for path, name in queries if path not in skipped]
    if not queries:
        raise UserError(f'--query_dir={query_dir} holds no images (only this folder and its direct subfolders are searched)')
    return classes, support, queries


def _images(folder: str) -> list[str]:
    return [os.path.join(folder, file.name) for file in folder_contents(folder, readable_suffixes()).images]


def _images_of(folder: str, classes: list[str]) -> Images:
    """The images in the folders of classes."""
    return [(path, name) for name in classes for path in _images(os.path.join(folder, name))]
