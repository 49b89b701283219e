"""Lists of images: csv files with a line for each image, which names its file and its label."""
import collections
import csv
import os
from collections.abc import Mapping, Sequence

from runtime.datasets.images import ImageFile, image_file
from runtime.datasets.splits import split_named
from runtime.system.errors import UserError
from runtime.system.files import read_csv

LABELS = 'label', 'class', 'category'  # columns that are taken for the label if no flag names one
Labelled = dict[str | None, dict[str, list[ImageFile]]]


def read_image_lists(paths: str, root: str, label_column: str | None, suffixes: set[str]) -> Labelled:
    """The images that csv files name, by split and label.

    An image is named by its path below the root or by its last component, with its suffix or without. Its split is in a column
    `split`, or is the name of its csv file; else it has none.

    Args:
        paths: of a csv file, or of several, separated by commas.
        root: the folder of the images, in any folders below it.
        label_column: None: a column of LABELS, or the only one that does not name images or splits.
        suffixes: of files that are images.

    Returns:
        {split or None: {label: images}}; labels and images are sorted, and the images' names are relative to the root.

    Raises:
        UserError: a file cannot be used, or names images that are not there, or one image twice.
    """
    index, line_of, missing = _index(root, suffixes), {}, []
    labelled: Labelled = collections.defaultdict(lambda: collections.defaultdict(list))
    for path in map(str.strip, paths.split(',')):
        for place, name, label, split in _rows(path, root, label_column, index):
            images = index.get(name, ())
            if len(images) > 1:
                raise UserError(f'{place} names {name}, and {root} holds {" and ".join(images[:2])}; write the path')
            if not images:
                missing.append(f'{name} ({place})')
            elif line_of.setdefault(images[0], place) != place:
                raise UserError(f'{images[0]} is in {line_of[images[0]]} and in {place}; remove one')
            else:
                labelled[split][label].append(image_file(images[0], os.stat(os.path.join(root, images[0]))))
    if missing:
        raise UserError(f'{len(missing)} of the {len(missing) + len(line_of)} images that are listed are not in {root}, first {missing[0]}; '
                        'remove their lines, or give the folder of the images as --data_path')
    if None in labelled and len(labelled) > 1:
        raise UserError(f'--split_file={paths} gives only some of the images a split')
    return {split: {label: sorted(images) for label, images in sorted(of.items())} for split, of in labelled.items()}


def _index(root: str, suffixes: set[str]) -> Mapping[str, Sequence[str]]:
    """{name: paths of images relative to the root}, by each name that a list may have for them."""
    index = collections.defaultdict(list)
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith('.'):
                path = os.path.relpath(os.path.join(folder, name), root).replace(os.sep, '/')
                for alias in {path, name, os.path.splitext(path)[0], os.path.splitext(name)[0]}:
                    if alias != path or index[path] != [path]:
                        index[alias].append(path)
    return {name: [name] if name in paths else paths for name, paths in index.items()}  # a whole path is never ambiguous


def _rows(path, root, label_column, index):
    """Yields (place, name, label, split) of each line."""
    try:
        columns, rows = read_csv(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'--split_file={path} cannot be read: {error}') from error
    if not rows or len(columns) < 2:
        raise UserError(f'{path} lists no images: its first line names its columns, such as filename,label, and then comes a line for each')
    names = [column for column in columns if column not in ('split', label_column)]
    image = max(names, key=lambda column: sum((row[column] or '').strip() in index for row in rows[:100]))
    if not any((row[image] or '').strip() in index for row in rows):
        raise UserError(f'no column of {path} ({", ".join(columns)}) names images below {root}, such as '
                        f'{next(iter(index), "(it holds none)")}; give their folder as --data_path')
    others = [column for column in columns if column not in ('split', image)]
    label = label_column or next((column for column in others if column.lower() in LABELS), None) or (others[0] if len(others) == 1 else None)
    if label not in others:
        raise UserError(f'{path} has the columns {", ".join(columns)}; name the one with the labels by --label_column')
    for number, row in enumerate(rows, start=2):
        place, cells = f'line {number} of {path}', [(row[column] or '').strip() for column in (image, label)]
        split = split_named((row['split'] or '') if 'split' in columns else os.path.splitext(os.path.basename(path))[0])
        if not all(cells) or '/' in cells[1] or ('split' in columns and split is None):
            raise UserError(f'{place} lacks an image, a label (without a slash) or, if there is such a column, a split')
        yield place, *cells, split
