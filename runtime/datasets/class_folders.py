"""Class folders on disk: which class belongs to which split, and the images of a split.

A data folder holds either folders train, val and test of class folders, or class folders anywhere below it and a manifest, a
csv file with the columns split and class. Class folders without either are split once, and a manifest is written. Large sources
hold packed arrays instead, see arrays.py.
"""
import contextlib
import csv
import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple, TypedDict

from runtime.datasets import arrays, splits
from runtime.datasets.images import BadImages, Contents, ImageFile, decode_images, folder_contents, is_broken, readable_suffixes
from runtime.datasets.lists import Labelled, read_image_lists
from runtime.datasets.tasks import SPLITS, Examples
from runtime.system.errors import UserError, counted, listing
from runtime.system.files import read_csv, read_json, write_json
from runtime.system.schema import checked

PREPARED_SUFFIXES = {'.png', '.jpg', '.jpeg'}
# The partial manifest is written by a preparation with --allow_missing: the classes that were found.
PARTIAL_MANIFEST = 'splits.partial.csv'
LAYOUT = 'it must hold folders train, val and test, each with one folder of images per class, or just the latter'
CLASS_LIST = 'classes.csv'  # beside the preparation script: the published classes and their splits
PREPARATION_RECORD = '.prepared.json'  # says whether a preparation was completed


class ImageClass(NamedTuple):
    """The images of a class."""
    name: str
    folder: str                 # relative to the root; '' for images of a list, whose names are relative to the root themselves
    images: list[ImageFile]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderOptions(splits.Splitting):
    """What the user can ask of class folders."""
    skip_bad_images: bool = False    # leave out images that cannot be used, instead of refusing the split
    verify: bool = False             # compare checksums of decoded images, which takes time; else sizes and times only
    label_column: str | None = None  # of lists of images


@dataclasses.dataclass(frozen=True)
class ClassFolders(FolderOptions):
    """The class folders of a data source, or the classes in a list of images."""
    root: str                       # the data folder
    script: str | None = None       # the preparation script that makes it; None: the user's own images, of any size and format
    shipped_manifest: str | None = None  # to use if root holds neither one nor folders train, val and test

    @property
    def missing_hint(self) -> str:
        """What to do if class folders are missing."""
        return (f'prepare the images with: python {self.script} --download (or without it, if you have the files)' if self.script
                else LAYOUT)

    def too_few_hint(self, num_classes: int) -> str:
        """What to do if a split has fewer than num_classes classes."""
        if not self.split_ratios or self.kept:  # of the data of a training, the classes of which another split would test
            return 'lower it'
        if not self.unsplit() and self._manifest() not in (self.kept or '', os.path.join(self.root, splits.MANIFEST)):
            return 'lower it, or add classes to that split'
        enough = math.ceil(num_classes * sum(self.split_ratios) / min(filter(None, self.split_ratios)))
        kept = self._manifest()
        return (f'lower it, or have {enough} {"class folders" if self._labelled is None else "labels"} or more (for '
                f'{splits.split_flag(self.split_ratios)}){f" and delete {kept}" if kept else ""}; to evaluate a model on all classes: '
                '--split=0/0/100')

    def names(self, split: str) -> list[str]:
        """The split's class folders relative to the root, sorted. Raises splits.EmptySplit if the split has no classes; UserError if the
        root or a class folder is missing, or the preparation was not completed."""
        self._check_prepared()
        if self._is_packed():
            return list(self._packed_record(split)[split]['classes'])
        classes = self._classes()
        if self.split_ratios and split == 'train':  # of the user's own images, once a run
            self._report(classes)
        if not classes[split]:
            folder = os.path.join(self.root, splits.split_entries(self.root).get(split, split))
            contents = '' if self.script or not os.path.isdir(folder) else f'; {_holds(folder)}'
            manifest = self._manifest()
            where = f'the manifest {manifest}' if manifest else self.split_file or self.root
            raise splits.EmptySplit(f'the {split} split in {where} has no classes; {self.missing_hint}{contents}')
        self._check_folders(split, [] if self._labelled else classes[split])
        return classes[split]

    def _check_folders(self, split, names):
        missing = [name for name in names if not os.path.isdir(os.path.join(self.root, name))]
        if missing and self.script and missing == names:
            raise UserError(f'{self.root} is not prepared: it holds no class folder of the {split} split; {self.missing_hint}')
        if missing:
            listed = self.script is None and self._manifest()
            advice = f', which {listed} lists; restore it, or remove its line from that file' if listed else f'; {self.missing_hint}'
            raise UserError(f'{len(missing)} of the {len(names)} class folders of the {split} split are missing in {self.root}, '
                            f'first {missing[0]}{advice}')

    def record_split(self, loaded: Mapping[str, list[str]]) -> None:
        """Writes a manifest into the root, or else to `kept_manifest`, if class folders there are not split yet. `load` does not
        depend on it. If all classes are in one split there is nothing to write.

        Raises UserError if there are too few classes, or they are not {split: its class folders} as `load` returned them; or if the
        manifest cannot be written, and a run should keep it: an evaluation of other data can do without.
        """
        if not os.path.isdir(self.root):
            return
        unsplit, classes = self.unsplit(), self._classes()
        if not loaded.items() <= classes.items():
            raise UserError(f'the class folders in {self.root}, or how they are split, have changed since they were read; start again')
        if unsplit and sum(bool(names) for names in classes.values()) > 1:
            paths = [None if self._labelled else os.path.join(self.root, splits.MANIFEST), self.kept_manifest]
            splits.keep_split(classes, [path for path in paths if path], 'classes', required=bool(self.kept_manifest))

    def _check_prepared(self):
        if not os.path.isdir(self.root):
            raise UserError(f'there is no folder {self.root}; {self.missing_hint}')
        if not preparation_record(self.root).get('complete'):
            again = f'python {self.script} (with --allow_missing to accept missing images)' if self.script else 'the script that made it'
            raise UserError(f'the preparation of {self.root} was interrupted or found something missing; run it again: {again}')

    def _classes(self) -> splits.Classes:
        """The classes of each split, as a manifest, lists, the split of all classes or folders train, val and test have them."""
        manifest = self._manifest()
        if manifest:
            root = self.root if self.script is None else None
            classes = self.classes_listed(manifest, root, folders=self._labelled is None)
            unknown = sorted(set(splits.names_of(classes)) - self._labelled[None].keys()) if self._labelled else []
            if unknown:
                raise UserError(f'{manifest} lists {listing(unknown, 1, ", ")}, which is no label in {self.split_file}; restore it, or '
                                'remove it from the former')
            return classes
        if self.unsplit():
            return self._in_proportions()
        if self.split_given:
            raise UserError(f'{self.split_file or self.root} says which classes are for train, val and test; leave out '
                            f'{splits.split_flag(self.split_ratios)}, or give a folder of class folders as --data_path')
        if self._labelled:
            return {split: [f'{split}/{label}' for label in self._labelled.get(split, ())] for split in SPLITS}
        folders = splits.split_entries(self.root)
        return {split: sorted(f'{folders[split]}/{name}' for name in subfolders(os.path.join(self.root, folders[split])))
                if split in folders else [] for split in SPLITS}

    def _in_proportions(self) -> splits.Classes:
        """The classes of each split, where nothing else divides them."""
        if self._labelled:
            return splits.split_classes(list(self._labelled[None]), self.split_ratios, self.split_file)
        names = subfolders(self.root)
        if names and set(names) <= set(splits.split_entries(self.root).values()):
            raise UserError(f'{self.root} holds folders {" and ".join(sorted(names))} without class folders in them; {LAYOUT}; '
                            + '; '.join(_holds(os.path.join(self.root, name)) for name in sorted(names)))
        try:
            return splits.split_classes(names, self.split_ratios, self.root)
        except UserError as error:
            perhaps = f'; perhaps --data_path={os.path.join(self.root, names[0])} is meant' if len(names) == 1 else ''
            raise UserError(f'{error}; {LAYOUT}; {_holds(self.root)}{perhaps}') from error

    def load(self, split: str, image_shape: tuple[int, int, int]) -> Examples:
        """The split's images, decoded and cached beside them on first use.

        Class folders that are not split yet are split in the same way as by `names`, but nothing is written beside them. Raises
        BadImages if images cannot be decoded or have the wrong size; UserError as for `names`.
        """
        if self._is_packed():
            return self._load_packed(split, image_shape)
        names = self.names(split)
        classes = self._listed(names) if self._labelled else self._in_folders(split, names)
        cache = os.path.join(self.root, '.cache', f'{split}_{"x".join(map(str, image_shape))}')
        fingerprint = self._fingerprint(classes, image_shape)
        bad = _known_bad(cache, self.root, fingerprint) if self.skip_bad_images else []
        while True:
            paths = {path for path, _ in bad}
            if bad:
                print(f'Skipped in the {split} split (--skip_bad_images): {BadImages(bad, "").listing}')
            usable = [ImageClass(name, folder, [image for image in images if os.path.join(self.root, folder, image.name) not in paths])
                      for name, folder, images in classes]
            try:
                return self._decoded(split, usable, image_shape, cache)
            except BadImages as error:
                if not self.skip_bad_images:
                    raise
                bad = sorted(bad + error.images)
                with contextlib.suppress(OSError):  # so that the next run need not decode them to know
                    write_json(cache + '.bad.json', {'fingerprint': fingerprint, 'images': [
                        (os.path.relpath(path, self.root), reason) for path, reason in bad]})

    @cached_property
    def _labelled(self) -> Labelled | None:
        """The images of lists by split and label; None: there are class folders."""
        if not self.split_file or self._split_file_is_manifest():
            return None
        return read_image_lists(self.split_file, self.root, self.label_column, readable_suffixes())

    def _split_file_is_manifest(self):
        """Whether that file has the columns split and class, and if there are others, each class once; a list has a line for each image."""
        with contextlib.suppress(OSError, ValueError, csv.Error):
            columns, rows = read_csv(self.split_file)
            extra = set(columns) - {'split', 'class'}
            return len(columns) - len(extra) == 2 and not (extra and len({row['class'] for row in rows.values()}) < len(rows))
        return False

    def _listed(self, names: list[str]) -> list[ImageClass]:
        """The classes of these names in lists."""
        images = self._labelled[None] if None in self._labelled else {
            f'{split}/{label}': images for split, labels in self._labelled.items() for label, images in labels.items()}
        return [ImageClass(name, '', images[name]) for name in names]

    def _in_folders(self, split: str, names: list[str]) -> list[ImageClass]:
        """The classes in folders. Of the user's own images, prints how many other files there are.

        If a class folder holds no images but one folder, its images are in there. Raises UserError if a folder holds no image.
        """
        own = self.script is None
        suffixes = readable_suffixes() if own else PREPARED_SUFFIXES
        folders = [self._image_folder(name, suffixes) for name in names]
        empty = [(name, contents) for name, (_, contents) in zip(names, folders) if not contents.images]
        if empty:
            others = f', nor do {len(empty) - 1} others' if len(empty) > 1 else ''
            advice = self._advice(split, *empty[0], suffixes) if own else self.missing_hint
            raise UserError(f'the class folder {empty[0][0]} in {self.root} holds no image{others}; {advice}')
        if own:
            self._report_left_out(split, {name: contents for name, (_, contents) in zip(names, folders)})
        return [ImageClass(name, folder, contents.images) for name, (folder, contents) in zip(names, folders)]

    def _image_folder(self, name: str, suffixes: set[str]) -> tuple[str, Contents]:
        """The folder with the images of a class, and its contents; those that are no images by their paths below the class folder."""
        outer = folder_contents(os.path.join(self.root, name), suffixes)
        if self.script is None and not outer.images and len(outer.folders) == 1:
            folder = outer.folders[0]
            images, *rest = folder_contents(os.path.join(self.root, name, folder), suffixes)
            others, folders = ([f'{folder}/{entry}' for entry in entries] for entries in rest)
            if images:
                return f'{name}/{folder}', Contents(images, outer.others + others, folders)
        return name, outer

    def _report_left_out(self, split: str, classes: Mapping[str, Contents]) -> None:
        """Prints how many files of other kinds, and folders, class folders hold."""
        files = [f'{name}/{entry}' for name, contents in classes.items() for entry in contents.others]
        inner = [f'{name}/{entry}' for name, contents in classes.items() for entry in contents.folders]
        parts = [f'{counted(len(paths), what)}{kinds}, first {paths[0]}' for paths, what, kinds in (
            (files, 'file', f' of other kinds ({splits.counted_kinds(files)})'), (inner, 'folder', ' within class folders')) if paths]
        if parts:
            print(f'Left out in the {split} split, in {self.root}: ' + ' and '.join(parts))

    def _advice(self, split: str, name: str, contents: Contents, suffixes: set[str]) -> str:
        """What to do about a class folder without images."""
        deeper = [(folder, images[0].name) for folder in contents.folders
                  if (images := folder_contents(os.path.join(self.root, name, folder), suffixes).images)]
        if deeper:
            folder, image = deeper[0]
            return (f'its {len(contents.folders)} folders do, such as {name}/{folder}/{image}: if they are the classes, move them one '
                    f'level up, or list them in {os.path.join(self.root, splits.MANIFEST)}, in lines like {split},{name}/{folder} below '
                    'split,class')
        if contents.folders or contents.others:
            return f'{_holds(os.path.join(self.root, name))}; convert what are images to PNG or JPEG, or move the folder elsewhere'
        return 'remove it'

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
                                       lambda: write_json(os.path.join(self.root, arrays.RECORD), record))
        except Exception as error:
            reason = ' '.join(str(error).split())
            raise UserError(f'{path} is damaged ({reason}); make it again: python {self.script} --force') from error
        return Examples.grouped(images, counts, record[split]['crc32'])

    def _fingerprint(self, classes: list[ImageClass], image_shape: tuple[int, int, int]) -> str:
        """Identifies images, and how a user's are decoded: that text changes with what makes other pixels of the same files."""
        files = [(name, images) if folder in (name, '') else (name, folder, images) for name, folder, images in classes]
        return hashlib.sha256(repr((image_shape, self.script is None and 'on white, 12 bits', files)).encode()).hexdigest()

    def _decoded(self, split, classes, image_shape, cache):
        own, root = self.script is None, self.root
        empty = [name for name, _, images in classes if not images]
        if empty:
            raise UserError(f'the class folder {empty[0]} in {root} holds no image that can be used; move it elsewhere')
        paths = [os.path.join(root, folder, image.name) for _, folder, images in classes for image in images]
        bad_image_hint = 'remove them' if own else f'run python {self.script} --force'
        if not own and not os.path.exists(os.path.join(root, PREPARATION_RECORD)):
            bad_image_hint = (f'they are not prepared: move them elsewhere and run python {self.script} --source=THAT_FOLDER, or take them '
                              f'as your own images by --datasource=folder --data_path={root}')
        images, checksum = arrays.cached_array(
            cache, self._fingerprint(classes, image_shape), (len(paths), *image_shape),
            lambda: decode_images(paths, image_shape, own, bad_image_hint, f'decoding {split} images'), self.verify)
        return Examples.grouped(images, {name: len(images_of_class) for name, _, images_of_class in classes}, checksum)

    def _manifest(self) -> str | None:
        """The path of the manifest that splits the classes, if there is one."""
        if self.split_file and self._split_file_is_manifest():
            return self.split_file
        kept, shipped = ([], []) if self._split_by_folders() else ([self.kept], [self.shipped_manifest])
        if self._labelled is not None:
            candidates = [self.kept] if None in self._labelled else []
        else:
            # What a run keeps comes first: another training may have split the folder in the meantime.
            candidates = [*kept, os.path.join(self.root, PARTIAL_MANIFEST), os.path.join(self.root, splits.MANIFEST), *shipped]
        return next((path for path in candidates if path and os.path.exists(path)), None)

    def unsplit(self) -> bool:
        """Whether there are classes that neither a manifest, nor folders train, val and test, nor lists divide."""
        if not self.split_ratios or self._manifest():
            return False
        return None in self._labelled if self._labelled is not None else not self._split_by_folders()

    def _split_by_folders(self) -> bool:
        """Whether the root holds a folder train, val or test of class folders. One that holds no folders is a class of that name."""
        return any(subfolders(os.path.join(self.root, name)) for name in splits.split_entries(self.root).values())

    def _report(self, classes: splits.Classes) -> None:
        """Prints what is strange about the names of the user's own classes, and which folders are not among them."""
        manifest = self._manifest()
        divided = not manifest and not self.unsplit()  # names begin with the split
        splits.report_names({split: [name.split('/', 1)[1] if divided else name for name in names] for split, names in classes.items()},
                            self.root)
        listed = {name.split('/')[0] for name in splits.names_of(classes)}
        if self._labelled:
            unlisted = sorted(self._labelled[None].keys() - listed) if manifest else []
            if unlisted:
                print(f'Ignored labels in {self.split_file} not listed in {manifest}: {listing(unlisted, 1, ", ")}')
            return
        unlisted = [] if self.split_file else sorted(set(subfolders(self.root)) - listed)
        if unlisted:
            advice = ('Add a line for each, or delete that file to split all of them again' if manifest else
                      'They are beside the folders train, val and test')
            print(f'Ignored class folders not listed in {manifest or "a split"}: {listing(unlisted, 1, " ")}. {advice}')


def _known_bad(cache, root, fingerprint):
    """[(path, reason)] of images that an earlier run could not use."""
    with contextlib.suppress(Exception):
        record = read_json(cache + '.bad.json')
        if record['fingerprint'] == fingerprint:
            return [(os.path.join(root, path), reason) for path, reason in checked(list[tuple[str, str]], record['images'], 'images')]
    return []


def _holds(folder: str) -> str:
    """Text: what a folder holds, with an example of an image below it."""
    images, others, folders = folder_contents(folder, readable_suffixes())
    parts = [splits.counted_kinds([image.name for image in images] + others)] if images or others else []
    parts += [f'{counted(len(folders), "folder")}, such as {folders[0]}'] if folders else []
    tables = [name for name in others if name.endswith('.csv')]
    example = next((os.path.relpath(os.path.join(parent, name), folder) for parent, _, names in os.walk(folder) for name in sorted(names)
                    if os.path.splitext(name)[1].lower() in readable_suffixes()), None)
    return (f'{folder} holds {" and ".join(parts) or "nothing"}' + (f', with images such as {example}' if example else '')
            + (f' (if {tables[0]} says the labels of images: --split_file={os.path.join(folder, tables[0])})' if tables else ''))


def published_training_classes(folder: str) -> list[str]:
    """Those of a prepared source, as its list <folder>/classes.csv has them; [] of a source without such a list, or with several
    published splits."""
    try:
        return splits.read_manifest(os.path.join(folder, CLASS_LIST))['train']
    except UserError:
        return []


def subfolders(folder: str) -> list[str]:
    """Names of the folders in a folder, except hidden ones; [] if it does not exist.
    Raises UserError if it holds a broken symbolic link, which may have been a folder."""
    if not os.path.isdir(folder):
        return []
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith('.')]
    broken = sorted(entry.path for entry in entries if is_broken(entry))
    if broken:
        raise UserError(f'{broken[0]} is a broken symbolic link; fix or remove it'
                        + (f' (and {len(broken) - 1} more)' if len(broken) > 1 else ''))
    return [entry.name for entry in entries if entry.is_dir()]


class Preparation(TypedDict, total=False):
    """What a preparation recorded."""
    complete: bool
    content: list[str]          # what it made, directly in the folder
    facts: dict[str, Any]       # how the images were chosen


def preparation_record(root: str) -> Preparation:
    """What a preparation recorded; of a folder without a record, that it is complete; of one that cannot be read, {}."""
    try:
        return checked(Preparation, read_json(os.path.join(root, PREPARATION_RECORD)), PREPARATION_RECORD)
    except FileNotFoundError:
        return {'complete': True}
    except (OSError, ValueError):
        return {}
