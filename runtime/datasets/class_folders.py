"""Class folders on disk: which class belongs to which split, and the images of a split.

A data folder holds either folders train, val and test of class folders, or class folders anywhere below it and a manifest, a
csv file with the columns split and class. Class folders without either are split once, and a manifest is written. Large sources
hold packed arrays instead, see arrays.py.
"""
import csv
import dataclasses
import hashlib
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence

from runtime.datasets import arrays
from runtime.datasets.images import BadImages, decode_images, image_files, is_broken, readable_suffixes
from runtime.datasets.tasks import SPLITS, Examples
from runtime.system.errors import UserError
from runtime.system.files import read_csv, read_json, write_csv

PREPARED_SUFFIXES = {'.png', '.jpg', '.jpeg'}
# The partial manifest is written by a preparation with --allow_missing: the classes that were found.
PARTIAL_MANIFEST, MANIFEST = 'splits.partial.csv', 'splits.csv'
LAYOUT = 'it must hold folders train, val and test, each with one folder of images per class, or just the latter'
CLASS_LIST = 'classes.csv'  # beside the preparation script: the published classes and their splits
PREPARATION_RECORD = '.prepared.json'  # says whether a preparation was completed


@dataclasses.dataclass(frozen=True)
class ClassFolders:
    """The class folders of a data source."""
    root: str                       # the data folder
    script: str | None = None       # the preparation script that makes it; None: the user's own images, of any size and format
    shipped_manifest: str | None = None  # to use if root holds neither one nor folders train, val and test
    split_ratios: tuple[int, int, int] | None = None  # of train, val and test, for class folders that are not split yet
    split_given: bool = False       # the user asked for these ratios: refuse a manifest with others
    skip_bad_images: bool = False   # leave out images that cannot be used, instead of refusing the split
    verify: bool = False            # compare checksums of decoded images, which takes time; else sizes and times only

    @property
    def missing_hint(self) -> str:
        """What to do if class folders are missing."""
        return (f'prepare the images with: python {self.script} --download (or without it, if you have the files)' if self.script
                else LAYOUT)

    def too_few_hint(self, num_classes: int) -> str:
        """What to do if a split has fewer than num_classes classes."""
        if not self.split_ratios:
            return 'lower it'
        enough = math.ceil(num_classes * sum(self.split_ratios) / min(self.split_ratios))
        return (f'lower it, or have {enough} class folders or more (for {_split_flag(self.split_ratios)}) and delete '
                f'{MANIFEST} there, if there is one')

    def names(self, split: str) -> list[str]:
        """The split's class folders relative to the root, sorted. Class folders that are not split yet are split permanently.

        Raises:
            UserError: the root, the split or a class folder is missing, or the preparation was not completed.
        """
        self.record_split({})
        return self._names(split)

    def record_split(self, loaded: Mapping[str, list[str]]) -> None:
        """Writes a manifest into the root, if class folders there are not split yet. `load` does not depend on it.

        Args:
            loaded: {split: its class folders}, as `load` returned them.

        Raises:
            UserError: there are too few classes, they are not those that were loaded, or the manifest cannot be written.
        """
        if not self.unsplit() or not os.path.isdir(self.root):
            return
        rows = split_classes(subfolders(self.root), self.split_ratios, self.root)
        if any([name for where, name in rows if where == split] != names for split, names in loaded.items()):
            raise UserError(f'the class folders in {self.root} have changed since they were read; start again')
        path = os.path.join(self.root, MANIFEST)
        try:
            write_manifest(path, rows)
        except (OSError, UnicodeEncodeError) as error:
            raise UserError(f'the split of the classes cannot be written to {path} ({error}); make its folder writable, or sort '
                            'the class folders into folders train, val and test yourself') from error
        counts = ' / '.join(str(sum(split == name for name, _ in rows)) for split in SPLITS)
        print(f'Split the classes into {counts} for train / val / test; the list is in {path}')

    def _check_prepared(self):
        if not os.path.isdir(self.root):
            raise UserError(f'there is no folder {self.root}; {self.missing_hint}')
        if not preparation_record(self.root).get('complete'):
            again = f'python {self.script} (with --allow_missing to accept missing images)' if self.script else 'the script that made it'
            raise UserError(f'the preparation of {self.root} was interrupted or found something missing; run it again: {again}')

    def _names(self, split):
        self._check_prepared()
        if self._is_packed():
            return list(self._packed_record(split)[split]['classes'])
        manifest = self._manifest()
        names = self._listed(manifest, split)
        if not names:
            where = f'the manifest {manifest}' if manifest else self.root
            raise UserError(f'the {split} split in {where} has no classes; {self.missing_hint}')
        missing = [name for name in names if not os.path.isdir(os.path.join(self.root, name))]
        if self.script and missing == names:
            raise UserError(f'{self.root} is not prepared: it holds no class folder of the {split} split; {self.missing_hint}')
        if missing:
            raise UserError(f'{len(missing)} of the {len(names)} class folders of the {split} split are missing in {self.root}, '
                            f'first {missing[0]}; {self.missing_hint}')
        return names

    def _listed(self, manifest, split):
        """The class folders of a split, as a manifest, the split of all folders or the folders train, val and test have them."""
        reporting = self.split_ratios and split == 'train'  # of the user's own images, once a run
        if manifest:
            if reporting:
                _report_unlisted(self.root, manifest)
            return read_manifest(manifest, split)
        if self.unsplit():
            rows = split_classes(subfolders(self.root), self.split_ratios, self.root)
            return sorted(name for where, name in rows if where == split)
        classes = {name: subfolders(os.path.join(self.root, name)) for name in SPLITS}
        if reporting:
            report_shared(classes, self.root)
        return sorted(f'{split}/{name}' for name in classes[split])

    def load(self, split: str, image_shape: tuple[int, int, int]) -> Examples:
        """The split's images, decoded and cached beside them on first use.

        Class folders that are not split yet are split in the same way as by `names`, but nothing is written beside them.

        Raises:
            BadImages: images cannot be decoded or have the wrong size.
            UserError: as for `names`.
        """
        if self._is_packed():
            return self._load_packed(split, image_shape)
        suffixes = readable_suffixes() if self.script is None else PREPARED_SUFFIXES
        files = [(name, image_files(os.path.join(self.root, name), suffixes)) for name in self._names(split)]
        try:
            return self._decoded(split, files, image_shape)
        except BadImages as error:
            if not self.skip_bad_images:
                raise
            print(f'Skipped in the {split} split (--skip_bad_images): {error.listing}')
            bad = {path for path, _ in error.images}
        return self._decoded(split, [(name, [image for image in images if os.path.join(self.root, name, image.name) not in bad])
                                     for name, images in files], image_shape)

    def _is_packed(self):
        return self.script is not None and os.path.lexists(os.path.join(self.root, arrays.RECORD))

    def _packed_record(self, split):
        """The record of a folder of packed arrays, which has an entry for the split."""
        try:
            record = arrays.read_packed_record(self.root)
        except (OSError, ValueError) as error:
            raise UserError(f'{os.path.join(self.root, arrays.RECORD)} cannot be read ({error}); make it again: '
                            f'python {self.script} --force') from error
        if not record.get(split, {'classes': {}})['classes']:
            raise UserError(f'the {split} split in {self.root} has no classes; {self.missing_hint}')
        return record

    def _load_packed(self, split, image_shape):
        self._check_prepared()
        record, path = self._packed_record(split), os.path.join(self.root, split + '.npy')
        counts = record[split]['classes']
        try:
            images = arrays.read_array(path, (sum(counts.values()), *image_shape), record[split], self.verify,
                                       lambda: arrays.write_json(os.path.join(self.root, arrays.RECORD), record))
        except Exception as error:
            reason = ' '.join(str(error).split())
            raise UserError(f'{path} is damaged ({reason}); make it again: python {self.script} --force') from error
        return Examples.grouped(images, counts, record[split]['crc32'])

    def _decoded(self, split, files, image_shape):
        own, root = self.script is None, self.root
        empty = [name for name, images in files if not images]
        if empty:
            others = f', nor do {len(empty) - 1} others' if len(empty) > 1 else ''
            raise UserError(f'the class folder {empty[0]} in {root} holds no image{others}; '
                            + ('remove it' if own else self.missing_hint))
        paths = [os.path.join(root, name, image.name) for name, images in files for image in images]
        fingerprint = hashlib.sha256(repr((image_shape, own and 'on white', files)).encode()).hexdigest()
        bad_image_hint = 'remove them' if own else f'run python {self.script} --force'
        images, checksum = arrays.cached_array(
            os.path.join(root, '.cache', f'{split}_{"x".join(map(str, image_shape))}'), fingerprint,
            (len(paths), *image_shape),
            lambda: decode_images(paths, image_shape, own, bad_image_hint, f'decoding {split} images'), self.verify)
        return Examples.grouped(images, {name: len(names) for name, names in files}, checksum)

    def _manifest(self) -> str | None:
        """The path of the manifest that splits the classes, if there is one."""
        candidates = [os.path.join(self.root, PARTIAL_MANIFEST), os.path.join(self.root, MANIFEST),
                      None if self._split_by_folders() else self.shipped_manifest]
        manifest = next((path for path in candidates if path and os.path.exists(path)), None)
        if manifest and self.split_given:
            self._check_split(manifest)
        return manifest

    def unsplit(self) -> bool:
        """Whether the root holds class folders that neither a manifest nor folders train, val and test divide."""
        return bool(self.split_ratios and not self._manifest() and not self._split_by_folders())

    def _split_by_folders(self) -> bool:
        """Whether the root holds a folder train, val or test of class folders. One that holds no folders is a class of that name."""
        return any(subfolders(os.path.join(self.root, split)) for split in SPLITS)

    def _check_split(self, manifest: str) -> None:
        """Raises UserError if a manifest splits its classes in other proportions than the user asked for."""
        rows = [(split, name) for split in SPLITS for name in read_manifest(manifest, split)]
        if rows != split_classes([name for _, name in rows], self.split_ratios, self.root):
            raise UserError(f'{manifest} does not match {_split_flag(self.split_ratios)}; leave out --split, or delete that file to '
                            'split the classes again')


def listed_classes(folder: str, split: str) -> set[str]:
    """Names of the classes that the list of a prepared source, <folder>/classes.csv, gives to a split.

    None of a source without such a list, or of one with several published splits.
    """
    try:
        return set(read_manifest(os.path.join(folder, CLASS_LIST), split))
    except UserError:
        return set()


def preparation_facts(root: str) -> dict:
    """How the images of a data folder were chosen, as the preparation recorded it: JSON values; {} if it did not."""
    facts = preparation_record(root).get('facts')
    return facts if isinstance(facts, dict) else {}


def subfolders(folder: str) -> list[str]:
    """Names of the folders in a folder, except hidden ones; [] if it does not exist.

    Raises:
        UserError: it holds a broken symbolic link, which may have been a folder.
    """
    if not os.path.isdir(folder):
        return []
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith('.')]
    broken = sorted(entry.path for entry in entries if is_broken(entry))
    if broken:
        raise UserError(f'{broken[0]} is a broken symbolic link; fix or remove it'
                        + (f' (and {len(broken) - 1} more)' if len(broken) > 1 else ''))
    return [entry.name for entry in entries if entry.is_dir()]


def read_manifest(path: str, split: str) -> list[str]:
    """Class folders of a split, sorted, from a csv file with the columns split and class.

    Raises:
        UserError: the file cannot be read, or a line is malformed.
    """
    try:
        columns, rows = read_csv(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'the manifest {path} cannot be read: {error}') from error
    if {'split', 'class'} - set(columns):
        raise UserError(f'the first line of the manifest {path} must be split,class')
    line_of = {}
    for number, row in enumerate(rows, start=2):
        if line_of.setdefault(row['class'], number) != number:
            raise UserError(f'the manifest {path} lists {row["class"]} twice, in lines {line_of[row["class"]]} and '
                            f'{number}')
        if row.get('split') not in SPLITS or not _is_below(row.get('class')):
            raise UserError(f'line {number} of the manifest {path} is not of the form split,class, where split is one of '
                            f'{", ".join(SPLITS)} and class a folder below the data')
    return sorted(row['class'] for row in rows if row['split'] == split)


def write_manifest(path: str, rows: Iterable[tuple[str, str]]) -> None:
    """Writes [(split, class)] as `read_manifest` reads it. Raises OSError or UnicodeEncodeError if that cannot be done."""
    write_csv(path, [('split', 'class'), *rows])


def split_classes(names: Sequence[str], ratios: tuple[int, int, int], root: str) -> list[tuple[str, str]]:
    """Splits classes in an order that depends on their names only.

    Args:
        names: class folders.
        ratios: proportions of train, val and test; each gets at least one class.
        root: what to call the folder in an error.

    Returns:
        [(split, class)].

    Raises:
        UserError: there are too few classes.
    """
    if len(names) < len(SPLITS):
        raise UserError(f'{root} holds {len(names)} class folders, which cannot be split into train, val and test; {LAYOUT}')
    shuffled = sorted(names, key=lambda name: hashlib.sha256(name.encode(errors='surrogateescape')).digest())
    held_out = [max(1, len(names) * ratio // sum(ratios)) for ratio in ratios[1:]]
    if sum(held_out) >= len(names):
        raise UserError(f'{_split_flag(ratios)} leaves no class of the {len(names)} in {root} for training')
    bounds = [0, len(names) - sum(held_out), len(names) - held_out[1], len(names)]
    return [(split, name) for split, start, end in zip(SPLITS, bounds, bounds[1:]) for name in sorted(shuffled[start:end])]


def report_shared(classes: Mapping[str, Iterable[str]], root: str) -> None:
    """Prints which names of classes are in two splits: meta-test is about classes that training has not seen."""
    shared = [(name, first, second) for first, second in itertools.combinations(SPLITS, 2)
              for name in sorted({*classes[first]} & {*classes[second]})]
    if shared:
        name, first, second = shared[0]
        more = f', and {len(shared) - 1} more such names' if len(shared) > 1 else ''
        print(f'Note: {root} has a class {name} in {first} and in {second}{more}. If these are the same classes, validation and meta-test '
              'do not measure the learning of new ones')


def _report_unlisted(root: str, manifest: str) -> None:
    """Prints which class folders in root the manifest does not list."""
    listed = {name.split(os.sep)[0] for split in SPLITS for name in read_manifest(manifest, split)}
    unlisted = sorted(set(subfolders(root)) - listed)
    if unlisted:
        print(f'Ignored class folder{"s" if len(unlisted) > 1 else ""} not listed in {manifest}: {unlisted[0]}'
              + (f' and {len(unlisted) - 1} more' if len(unlisted) > 1 else '')
              + '. Add a line for each, or delete that file to split all of them again')


def _is_below(name: str | None) -> bool:
    """Whether a name is a normalised relative path that stays below the folder it is looked up in."""
    return bool(name) and not os.path.isabs(name) and os.path.normpath(name) == name and name.split(os.sep)[0] not in ('.', '..')


def _split_flag(ratios: tuple[int, int, int]) -> str:
    return '--split=' + '/'.join(map(str, ratios))


def preparation_record(root: str) -> dict:
    """What a preparation recorded; of a folder without a record, that it is complete; of one that cannot be read, {}."""
    try:
        record = read_json(os.path.join(root, PREPARATION_RECORD))
        return record if isinstance(record, dict) else {}
    except FileNotFoundError:
        return {'complete': True}
    except (OSError, ValueError):
        return {}
