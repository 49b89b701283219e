"""Lists of images: csv files with a line for each image, which names its file and its label."""
import collections
import csv
import os
from collections.abc import Mapping, Sequence

from runtime.datasets.images import ImageFile, image_file
from runtime.datasets.splits import split_named
from runtime.system.errors import UserError
from runtime.system.files import read_csv, walk

LABELS = 'label', 'class', 'category'  # columns that are taken for the label if no flag names one
FILES = 'filename', 'file', 'image', 'path', 'name'  # columns that are taken for the images where several could be
Labelled = dict[str | None, dict[str, list[ImageFile]]]


def read_image_lists(paths: str, root: str, label_column: str | None, suffixes: set[str]) -> Labelled:
    """{split or None: {label: images}} that csv files name; labels and images are sorted, and the images' names relative to the root.

    An image is named by its path below the root or by its last component, with its suffix or without. Its split is in a column
    `split`, or if there are several csv files, the name of its own; else it has none.

    Args:
        paths: of a csv file, or of several, separated by commas.
        root: the folder of the images, in any folders below it.
        label_column: None: a column of LABELS, or the only one that does not name images or splits.
        suffixes: of files that are images.

    Raises UserError if a file cannot be used, or names images that are not there, or one image twice.
    """
    index, line_of, missing = _index(root, suffixes), {}, []
    labelled: Labelled = collections.defaultdict(lambda: collections.defaultdict(list))
    for path in list_paths(paths):
        split_of_file = split_named(os.path.splitext(os.path.basename(path))[0]) if len(list_paths(paths)) > 1 else None
        for place, name, label, split in _rows(path, root, label_column, index, suffixes, split_of_file):
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
        raise UserError(f'{len(missing)} of the {len(missing) + len(line_of)} images that are listed are not in {root}, first '
                        f'{missing[0]}; remove their lines, or give the folder of the images as --data_path')
    if None in labelled and len(labelled) > 1:
        raise UserError(f'--split_file={paths} gives only some of the images a split')
    if None in labelled and len(list_paths(paths)) > 1:
        raise UserError(f'--split_file={paths}: several lists must be called train.csv, val.csv and test.csv, or have a column split')
    return {split: {label: sorted(images) for label, images in sorted(by_label.items())} for split, by_label in labelled.items()}


def list_paths(text: str) -> list[str]:
    """The paths of csv files separated by commas, or the one path that has commas."""
    paths = [text] if os.path.exists(os.path.expanduser(text)) else text.split(',')
    return [os.path.expanduser(path.strip()) for path in paths]


def _index(root: str, suffixes: set[str]) -> Mapping[str, Sequence[str]]:
    """{name: paths of images relative to the root}, by each name that a list may have for them."""
    index = collections.defaultdict(list)
    for folder, folders, names in walk(root):
        # Links last: of a folder with two paths, the list may have the one that is no link.
        folders[:] = sorted((name for name in folders if not name.startswith('.')),
                            key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith('.'):
                path = os.path.relpath(os.path.join(folder, name), root).replace(os.sep, '/')
                for alias in {path, name, os.path.splitext(path)[0], os.path.splitext(name)[0]}:
                    if alias != path or index[path] != [path]:
                        index[alias].append(path)
    return {name: [name] if name in paths else paths for name, paths in index.items()}  # a whole path is never ambiguous


def _rows(path, root, label_column, index, suffixes, split_of_file):
    """Yields (place, name, label, split) of each line; the split of all is that of the file where no column has it."""
    try:
        columns, rows = read_csv(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'--split_file={path} cannot be read: {error}') from error
    if not rows or len(columns) < 2:
        raise UserError(f'{path} lists no images: its first line names its columns, such as filename,label, and then comes a line for each')
    columns, cells = _named_alike(columns, rows.values())
    image = _image_column(path, cells, label_column, index, root, suffixes)
    if image in index and image.lower() not in FILES:
        raise UserError(f'the first line of {path} names an image, {image}; put a line before it that names the columns, such as '
                        'filename,label')
    label = _label_column(path, columns, image, label_column)
    has_splits = 'split' in columns
    for number, row in zip(rows, cells):
        place, split = f'line {number} of {path}', split_named(row['split']) if has_splits else split_of_file
        if not row[image] or not row[label] or '/' in row[label] or (has_splits and split is None):
            raise UserError(f'{place} lacks an image, a label (without a slash) or, if there is such a column, a split')
        yield place, row[image], row[label], split


def _named_alike(columns, rows):
    """Columns and rows in which the column `split` has small letters, and cells no blanks around them."""
    names = {name: 'split' if name.lower() == 'split' and 'split' not in columns else name for name in columns}
    return list(names.values()), [{names[name]: (row[name] or '').strip() for name in names} for row in rows]


def _image_column(path, rows, label_column, index, root, suffixes):
    """The column of which most cells name images; with their suffixes, if any do, for labels and running numbers may be names of images,
    too."""
    named = {name: [row[name] for row in rows if row[name] in index] for name in rows[0] if name not in ('split', label_column)}
    ranks = {name: (sum(os.path.splitext(cell)[1].lower() in suffixes for cell in cells), len(cells), name.lower() in FILES,
                    name.lower() not in LABELS) for name, cells in named.items()}
    image = max(ranks, key=ranks.__getitem__, default=None)
    if image is None or not named[image]:
        raise UserError(f'no column of {path} ({", ".join(rows[0])}) names images below {root}, such as '
                        f'{next(iter(index), "(it holds none)")}; give their folder as --data_path')
    equal = [name for name, rank in ranks.items() if rank == ranks[image] and name != image]
    if equal:
        raise UserError(f'the columns {image} and {equal[0]} of {path} both name images below {root}: rename the one that is meant to '
                        'filename, or write the suffixes of the files')
    return image


def _label_column(path, columns, image, label_column):
    """The column that a flag names, or that is called like a label, or the only other one."""
    others = [name for name in columns if name not in ('split', image)]
    called = [name for name in others if name.lower() in LABELS] or (others if len(others) == 1 else [])
    label = label_column or (called[0] if len(called) == 1 else None)
    if label not in others:
        raise UserError(f'{path} has the columns {", ".join(columns)}; name the one with the labels by --label_column')
    return label
