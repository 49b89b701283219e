"""Which classes, or tables, are for train, val and test: by folders of these names, by a manifest, or in proportions.

A manifest is a csv file with the columns split and class.
"""
import collections
import csv
import dataclasses
import hashlib
import itertools
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from runtime.datasets.tasks import SPLITS
from runtime.system.errors import UserError
from runtime.system.files import read_csv, write_csv

MANIFEST = 'splits.csv'
NAMES = {'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test', 'testing': 'test'}
SHOWN_KINDS = 5  # kinds of files by name in a message
Classes = dict[str, list[str]]  # {split: names of its classes, or tables, sorted}


class EmptySplit(UserError):
    """A split has no classes, or tables, at all."""


def split_named(name: str) -> str | None:
    """The split that a folder, a file or a cell of this name stands for, in capitals or not."""
    return NAMES.get(name.strip().lower())


def split_entries(folder: str, suffix: str = '') -> dict[str, str]:
    """{split: name} of the entries of a folder that are called like a split, and end in the suffix.
    Raises UserError if two of them stand for the same split."""
    entries = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        split = split_named(name[:-len(suffix)] if suffix else name) if name.lower().endswith(suffix) else None
        if split and entries.setdefault(split, name) != name:
            raise UserError(f'{folder} holds both {entries[split]} and {name}; rename one')
    return entries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splitting:
    """How the user's own classes, or the tables of one file, are split."""
    split_ratios: tuple[int, int, int] | None = None  # of train, val and test, for what is not split yet
    split_given: bool = False         # the user asked for these ratios: refuse a manifest with others
    split_file: str | None = None     # a manifest, or lists of images; see `read_image_lists`
    kept_manifest: str | None = None  # of a run: has the split where it cannot be written beside the data
    splits_anew: bool = False         # a training that starts anew: what an earlier one kept does not count

    @property
    def kept(self) -> str | None:
        """The path of the split that a run keeps, if it counts."""
        return None if self.splits_anew else self.kept_manifest

    def classes_listed(self, manifest: str, root: str | None = None, folders: bool = True) -> Classes:
        """As `read_manifest`; raises UserError, too, if these are not the ratios that the user asked for."""
        classes = read_manifest(manifest, root, folders)
        if self.split_given and classes != split_classes(names_of(classes), self.split_ratios, manifest):
            again = '' if manifest == self.kept_manifest else ', or delete that file to split again'  # a run's own belongs to its model
            raise UserError(f'{manifest} does not match {split_flag(self.split_ratios)}; leave out --split{again}')
        return classes


def names_of(classes: Classes) -> list[str]:
    """The names of all classes."""
    return [name for names in classes.values() for name in names]


# Manifests ----------------------------------------------------------------------------------------------------------

def read_manifest(path: str, root: str | None = None, folders: bool = True) -> Classes:
    """The classes in a csv file with the columns split and class.

    If they are `folders`, a name without a folder in the root is read without blanks around it and slashes at its end. Raises UserError
    if the file cannot be read, or a line is malformed.
    """
    try:
        columns, rows = read_csv(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'the manifest {path} cannot be read: {error}') from error
    if {'split', 'class'} - set(columns):
        raise UserError(f'the first line of the manifest {path} must be split,class')
    line_of: dict[str, int] = {}
    classes = collections.defaultdict(list)
    for number, row in rows.items():
        name, split = row['class'] or '', split_named(row['split'] or '')
        if not folders:
            name = name.strip()
        elif root and not os.path.isdir(os.path.join(root, name)) or name.endswith('/'):
            name = name.strip().rstrip('/')
        if split is None or (not _is_below(name) if folders else not name):
            raise UserError(f'line {number} of the manifest {path} is not of the form split,class, where split is one of '
                            f'{", ".join(SPLITS)} and class a folder below the data')
        if line_of.setdefault(name, number) != number:
            raise UserError(f'the manifest {path} lists {name} twice, in lines {line_of[name]} and {number}')
        classes[split].append(name)
    return {split: sorted(classes[split]) for split in SPLITS}


def write_manifest(path: str, rows: Iterable[tuple[str, str]]) -> None:
    """Writes [(split, class)] as `read_manifest` reads it. Raises OSError or UnicodeEncodeError if that cannot be done."""
    write_csv(path, [('split', 'class'), *rows])


def _is_below(name: str) -> bool:
    """Whether a name, with forward slashes on every system, is a normalised relative path that stays below its folder."""
    return not {'', '.', '..'} & set(name.split('/')) and not os.path.isabs(name) and not os.path.splitdrive(name)[0]


# Proportions --------------------------------------------------------------------------------------------------------

def split_classes(names: Sequence[str], ratios: tuple[int, int, int], root: str, what: str = 'class folders') -> Classes:
    """Splits classes in an order that depends on their names only.

    Args:
        ratios: proportions of train, val and test; each that is not 0 gets at least one class.
        root, what: what to call the folder, and what it holds, in an error.

    Raises UserError if there are too few classes.
    """
    parts = sum(ratio > 0 for ratio in ratios)
    if len(names) < parts:
        raise UserError(f'{root} holds {len(names)} {what}, which cannot be split into train, val and test')
    shuffled = sorted(names, key=lambda name: hashlib.sha256(name.encode(errors='surrogateescape')).digest())
    counts = [max(ratio > 0, len(names) * ratio // sum(ratios)) for ratio in ratios]
    first = next(index for index, ratio in enumerate(ratios) if ratio)  # gets what is left over
    counts[first] = len(names) - sum(counts[first + 1:])
    if counts[first] < 1:
        raise UserError(f'{split_flag(ratios)} leaves no class of the {len(names)} in {root} for '
                        + {'train': 'training', 'val': 'validation'}[SPLITS[first]])
    rest = iter(shuffled)
    return {split: sorted(itertools.islice(rest, count)) for split, count in zip(SPLITS, counts)}


def split_flag(ratios: tuple[int, int, int]) -> str:
    """The flag that asks for these proportions."""
    return '--split=' + '/'.join(map(str, ratios))


def keep_split(classes: Classes, paths: Sequence[str], what: str, required: bool = True) -> None:
    """Writes a manifest to the first of some paths that can be written, and prints where it is.
    Raises UserError if it can be written to none of them, and is required."""
    reasons = []
    for path in paths:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_manifest(path, [(split, name) for split, names in classes.items() for name in names])
        except (OSError, UnicodeEncodeError) as error:
            reasons.append(f'{path} ({error})')
            continue
        counts = ' / '.join(str(len(names)) for names in classes.values())
        print(f'Split the {what} into {counts} for train / val / test; the list is in {path}')
        return
    if required:
        raise UserError(f'the split of the {what} cannot be written to {" nor to ".join(reasons)}; make a folder writable, or sort them '
                        'into folders train, val and test yourself')


# What is strange ----------------------------------------------------------------------------------------------------

def report_names(classes: Mapping[str, Iterable[str]], root: str, what: str = 'class') -> None:
    """Prints which names of classes are in two splits, or differ only in capitals or in how Unicode writes them: meta-test is about
    classes, or tasks, that training has not seen. `classes` are {split: names}."""
    names = {split: set(members) for split, members in classes.items()}
    shared = [(name, first, second) for first, second in itertools.combinations(names, 2) for name in sorted(names[first] & names[second])]
    if shared:
        name, first, second = shared[0]
        more = f', and {len(shared) - 1} more such names' if len(shared) > 1 else ''
        give = 'the folder of the class folders of one split' if what == 'class' else 'one file with all of them'
        print(f'Note: {root} has a {what} {name} in {first} and in {second}{more}. If these are the same, validation and meta-test do not '
              f'measure the learning of new ones: put each {what} into one split, or give {give} as --data_path, to have them split')
    similar = collections.defaultdict(list)
    for name in sorted(set().union(*names.values())):
        similar[unicodedata.normalize('NFKC', name).casefold().strip()].append(name)
    alike = [group for group in similar.values() if len(group) > 1]
    if alike:
        more = f', and {len(alike) - 1} more such groups' if len(alike) > 1 else ''
        print(f'Note: {root} has the classes {" and ".join(map(repr, alike[0]))}, which differ only in capitals, blanks or Unicode form'
              f'{more}. If they are one class, make them one')


def counted_kinds(names: Iterable[str]) -> str:
    """Text: how many files of each kind there are, as in '3 .dcm and 1 .txt'."""
    kinds = collections.Counter(os.path.splitext(name)[1].lower() or 'without a suffix' for name in names).most_common()
    shown = [f'{count} {kind}' for kind, count in kinds[:SHOWN_KINDS]]
    rest = sum(count for _, count in kinds[SHOWN_KINDS:])
    return ', '.join(shown + ([f'{rest} of other kinds'] if rest else []))
