"""What the preparation scripts share: their options, and writing class folders.

A script lists its pictures, each with a function that makes the content of its file, and says how many of each class there
should be; `prepare` writes those that are not there yet, checks the counts and prints a summary.
"""
import argparse
import collections
import contextlib
import os
import pathlib
import signal
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import filelock
from tqdm import tqdm

from data.reading import DAMAGE, reason
from runtime.datasets.arrays import file_checksum
from runtime.datasets.class_folders import PARTIAL_MANIFEST, PREPARATION_RECORD, preparation_record, subfolders
from runtime.datasets.splits import MANIFEST, write_manifest
from runtime.datasets.tasks import SPLITS
from runtime.system import console
from runtime.system.cores import usable_cores
from runtime.system.errors import UserError
from runtime.system.files import PART_SUFFIX, locked, remove_parts, write_atomically, write_json
from runtime.system.interruption import signals_handled_by

LOCK = '.lock'
DOWNLOADS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'downloads.csv')


class Picture(NamedTuple):
    """A file to be written."""
    name: str                     # '<class folder>/<file>' below the destination, with forward slashes
    encode: Callable[[], bytes]   # makes the file's content; raises one of DAMAGE


class Class(NamedTuple):
    """The expected content of a class folder."""
    split: str    # 'train' | 'val' | 'test'
    images: int


def arguments(description: str, source: str, destination: str) -> argparse.ArgumentParser:
    """A parser with the options of every preparation script."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='This may be interrupted and run again. The classes of each split are listed in a csv file beside this script.')
    parser.add_argument('--source', default=source, help='folder of the download (default: %(default)s)')
    parser.add_argument('--download', action='store_true',
                        help='download missing files into --source and check them; without it, archives or unpacked folders there are read')
    parser.add_argument('--downloads', default=DOWNLOADS, metavar='TABLE',
                        help='csv file with the addresses, sizes and hashes for --download (default: %(default)s); '
                             'give an edited copy to use a mirror')
    parser.add_argument('--destination', default=destination, help='folder to write to (default: %(default)s)')
    parser.add_argument('--allow_missing', action='store_true', help='continue despite missing images')
    parser.add_argument('--force', action='store_true', help='recreate what an earlier run has made')
    return parser


def run_script(main: Callable[[], None]) -> None:
    """Runs a preparation script's main. Interruptions, lack of memory and bad files end in a one-line message."""
    console.protect()
    try:
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the program at once
        print('Interrupted. Run the same command to resume.', file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except MemoryError:
        sys.exit('there is not enough memory to read the download; close other programs, or download it again if it is damaged')
    except BrokenPipeError:
        console.end_of_pipe()
    except OSError as error:
        sys.exit(f'the download cannot be read: {error}; make its files readable, or download it again')
    except UserError as error:
        sys.exit(str(error))


def prepare(pictures: Sequence[Picture], classes: Mapping[str, Class], size: tuple[int, int], args: argparse.Namespace,
            recipe: str = '', inputs: Sequence[str] = (), absent: Sequence[str] = (),
            describe: Callable[[dict], str] | None = None, facts: Mapping[str, object] | None = None,
            manifest: bool = False) -> None:
    """Writes pictures, checks them against the known counts, and prints a summary.

    A file that is there already is left as it is, unless it was made by another recipe: interrupted runs resume. Each file is
    written atomically. Raises SystemExit with one sentence for each problem found.

    Args:
        classes: by their folders below the destination.
        size: (width, height) of every picture, for the summary.
        args: as parsed by `arguments`.
        recipe: what the content depends on besides the source.
        inputs: the files and folders of originals, into which nothing may be written. If they are others than those of an earlier
            preparation, everything is made again.
        absent: names of images that the source lacks.
        describe: function of {class folder: images written} that returns the end of the summary.
        facts: how the images were chosen, for the summary and for the results of evaluations on them: JSON values.
        manifest: write which class belongs to which split into a manifest, for class folders whose paths do not say it.
    """
    facts = facts or {}

    def write(destination, again):
        refuse_duplicates(picture.name for picture in pictures)
        for folder in sorted({os.path.join(destination, os.path.dirname(picture.name)) for picture in pictures}):
            os.makedirs(folder, exist_ok=True)
            remove_parts(folder)
        damaged = write_all(pictures, destination, again)
        counts = dict(collections.Counter(os.path.dirname(picture.name) for picture in pictures
                                          if os.path.isfile(os.path.join(destination, picture.name))))
        left_over = [*first_of(left_over_files(pictures, {*classes, *counts}, destination), 'further files in its class folders'),
                     *first_of(left_over_folders(counts, classes, destination), 'further class folders')]
        complaints = differences(counts, classes, damaged, absent) + [f'{destination} holds {text}; remove them' for text in left_over]
        print(summary(counts, classes, megabytes(counts, classes, destination), size))
        facts_text = ''.join(f', {name} {value}' for name, value in facts.items())
        print((describe or describe_classes)(counts), 'in', destination + facts_text, flush=True)
        if manifest:
            rows = sorted((expected.split, name) for name, expected in classes.items())
            write_manifest(os.path.join(destination, MANIFEST), rows)
        for name in classes:  # an empty folder would be a class without images
            with contextlib.suppress(OSError):
                os.rmdir(os.path.join(destination, name))
        write_partial_manifest(counts, classes, destination, needed=bool(complaints) and args.allow_missing)
        return complaints

    outputs = {name.split('/')[0] for name in [*classes, *(picture.name for picture in pictures)]}
    run_preparation(args, recipe, inputs, write, outputs, facts)


def is_prepared(args: argparse.Namespace, recipe: str, facts: Mapping[str, object]) -> bool:
    """Whether the destination was prepared by this recipe, with nothing missing, is there, and is not to be made again."""
    record = preparation_record(args.destination)
    content = record.get('content')
    if content is None:  # of an earlier version
        content = sorted([*subfolders(args.destination), *_present(args.destination, [f'{split}.npy' for split in SPLITS])])
    return (not args.force and record.get('complete') is True and not record.get('missing')
            and (record.get('recipe'), record.get('facts', {})) == (recipe, facts)
            and bool(content) and content == _present(args.destination, content))


def _present(folder, names):
    """Those of some names that a folder has, sorted."""
    return sorted(name for name in names if os.path.exists(os.path.join(folder, name)))


def identity(inputs: Sequence[str]) -> list[list]:
    """What tells originals from others, as JSON values: the CRC-32 of a file, or of what a zip file lists; the place of a folder."""
    return [[os.path.basename(path), checksum(path)] if os.path.isfile(path) else [os.path.realpath(path)] for path in sorted(inputs)]


def checksum(path: str) -> int:
    """The CRC-32 of a file; of a zip file, of the names and checksums that it lists: the same whenever it was packed."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return zlib.crc32(repr(sorted((member.filename, member.CRC) for member in archive.infolist())).encode())
    with open(path, 'rb') as file:
        return file_checksum(file)


def run_preparation(args: argparse.Namespace, recipe: str, inputs: Sequence[str], write: Callable[[str, bool], list[str]],
                    outputs: Collection[str], facts: Mapping[str, object] | None = None) -> None:
    """Calls `write` under a lock, and records in the destination what the program reads before it uses the images there.

    Raises SystemExit if the destination cannot be written to, or lies within one of `inputs`, or there are complaints.

    Args:
        recipe, inputs, facts: as for `prepare`.
        write: function of the destination and of whether all files must be made again: by force, or of another recipe or source.
            It returns complaints.
        outputs: the names, directly in the destination, of all that it may write there; other files may be there too, such as the
            script and the download.
    """
    destination, source = os.path.realpath(args.destination), identity(inputs)
    for folder in map(os.path.realpath, inputs):
        if os.path.commonpath([folder, destination]) == folder:
            sys.exit(f'the destination {destination} lies within the originals in {folder}; name another with --destination')
    record_path = os.path.join(destination, PREPARATION_RECORD)
    busy = (f'another preparation is writing to {destination}; wait for its end, stop it, or name another folder with '
            '--destination')
    with locked_folder(destination, busy, '--destination'):
        record = preparation_record(destination)  # one of an earlier version has no source
        fits = record and record.get('recipe', recipe) == recipe and record.get('source', source) == source
        # Files without a record may have been made in another way.
        again = args.force or bool(_present(destination, outputs)) and not (os.path.exists(record_path) and fits)
        # Without a recipe if there may be files of another one until all are made: after a kill they are made again.
        write_json(record_path, {'recipe': None if again else recipe, 'source': source, 'complete': False})
        remove_parts(destination)  # of killed preparations: no other process holds the lock
        complaints = write(destination, again)
        write_json(record_path, {'recipe': recipe, 'source': source, 'complete': not complaints or args.allow_missing,
                                 'content': _present(destination, outputs), **({'missing': True} if complaints else {}),
                                 **({'facts': facts} if facts else {})})
    if complaints:
        text = 'Problems found:\n' + '\n'.join('  ' + line for line in complaints)
        if not args.allow_missing:
            sys.exit(text + '\nFix the source and run this again, or accept this by --allow_missing.')
        print(text + '\nContinuing despite this (--allow_missing).', file=sys.stderr)


@contextlib.contextmanager
def locked_folder(folder: str, busy: str, flag: str) -> Iterator[None]:
    """Creates the folder and, while entered, keeps other preparations out.

    The lock file is removed before the lock is released, so that nothing is left; the file of a killed process locks nothing.

    Raises SystemExit, with the sentence `busy`, if another is running there; and if the folder, which the flag names, cannot be
    written to while this is entered.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, LOCK)
        with locked(path, wait=False):
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # some systems cannot remove open files
                    os.remove(path)
    except filelock.Timeout:
        sys.exit(busy)
    except BrokenPipeError:  # of the output
        raise
    except OSError as error:
        sys.exit(f'writing to {folder} failed: {error}; make room or name another folder with {flag}, and run '
                 'the same command to resume')


def write_all(pictures: Sequence[Picture], destination: str, again: bool) -> list[tuple[str, Exception]]:
    """Writes pictures on all cores, those that are there already only if `again`; returns [(name, error)] of those that cannot be
    made, sorted."""
    def work(picture):
        path = os.path.join(destination, picture.name)
        if not again and os.path.exists(path) and os.path.getsize(path):
            return None
        try:
            content = picture.encode()
        except DAMAGE as error:
            pathlib.Path(path).unlink(missing_ok=True)
            return picture.name, error
        write_atomically(path, content)
        return None

    damaged = []
    with deferred_interrupt() as interrupts, ThreadPoolExecutor(usable_cores()) as pool:
        for problem in tqdm(pool.map(work, pictures), total=len(pictures), unit=' images', disable=None):
            if interrupts:
                break
            if problem:
                damaged.append(problem)
    return sorted(damaged, key=lambda pair: pair[0])


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """While entered, the first Ctrl-C is only recorded, in the list that this yields; KeyboardInterrupt follows at the end.

    For thread pools and other code with many locks: a KeyboardInterrupt inside it could leave a lock held. A second Ctrl-C ends
    the program at once.
    """
    interrupts = []

    def record(number, frame):
        interrupts.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    with signals_handled_by(record, [signal.SIGINT] if raises else []):
        yield interrupts
    if interrupts:
        raise KeyboardInterrupt


def refuse_duplicates(names: Iterable[str]) -> None:
    """Raises SystemExit if pictures have the same name: which of them would be written is chance."""
    duplicates = sorted(name for name, count in collections.Counter(names).items() if count > 1)
    if duplicates:
        sys.exit(f'{len(duplicates)} file names stand for more than one image of their class, first {duplicates[0]}; download the '
                 'source again')


def differences(counts: Mapping[str, int], classes: Mapping[str, Class], damaged: Sequence[tuple[str, Exception]] = (),
                absent: Sequence[str] = ()) -> list[str]:
    """Sentences on how the images found differ from the expected ones."""
    missing, unknown = sorted(classes.keys() - counts.keys()), sorted(counts.keys() - classes.keys())
    wrong = [f'{name} with {counts[name]} instead of {classes[name].images}' for name in sorted(counts.keys() & classes.keys())
             if counts[name] != classes[name].images]
    return [*first_of([f'{name} ({reason(error)})' for name, error in damaged], 'images cannot be decoded'),
            *first_of(absent, 'images are missing'),
            *first_of(missing, f'of {len(classes)} classes are missing'),
            *first_of(unknown, 'classes are not known'),
            *first_of(wrong, 'classes have another number of images than they should')]


def first_of(names: Sequence[str], what: str) -> list[str]:
    """A sentence that counts names and shows the first; none if there are no names."""
    return [f'{len(names)} {what}, first {names[0]}'] if names else []


def left_over_files(pictures: Sequence[Picture], folders: Iterable[str], destination: str) -> list[str]:
    """Files of another preparation in our class folders, which would be taken for images of this one."""
    ours = {picture.name for picture in pictures}
    existing = sorted(folder for folder in folders if os.path.isdir(os.path.join(destination, folder)))
    return [f'{folder}/{name}' for folder in existing for name in sorted(os.listdir(os.path.join(destination, folder)))
            if f'{folder}/{name}' not in ours and not name.startswith('.') and not name.endswith(PART_SUFFIX)]


def left_over_folders(counts: Mapping[str, int], classes: Mapping[str, Class], destination: str) -> list[str]:
    """Folders of another preparation beside our class folders, which would be taken for classes of this one."""
    parents = {os.path.dirname(name) for name in classes}
    folders = {f'{parent}/{name}' for parent in parents for name in subfolders(os.path.join(destination, parent))}
    return sorted(folders - classes.keys() - counts.keys())


def megabytes(counts: Mapping[str, int], classes: Mapping[str, Class], destination: str) -> dict[str, float]:
    """The disk space of the class folders of each split."""
    sizes = dict.fromkeys(SPLITS, 0.0)
    for name in counts.keys() & classes.keys():
        sizes[classes[name].split] += sum(entry.stat().st_size for entry in os.scandir(os.path.join(destination, name))) / 1e6
    return sizes


def summary(counts: Mapping[str, int], classes: Mapping[str, Class], megabytes: Mapping[str, float], size: tuple[int, int]) -> str:
    """Text: classes, images, and their size in each split."""
    lines = [f'{"split":8}{"classes":>8}{"images":>9}{"pixels":>9}{"megabytes":>11}']
    for split in SPLITS:
        folders = [name for name in counts if name in classes and classes[name].split == split]
        lines.append(f'{split:8}{len(folders):8,}{sum(counts[name] for name in folders):9,}'
                     f'{"x".join(map(str, size)):>9}{megabytes[split]:11.1f}')
    return '\n'.join(lines)


def describe_classes(counts: Mapping[str, int]) -> str:
    """Text: how many classes and images there are, from {class: images}."""
    return f'{len(counts):,} classes / {sum(counts.values()):,} images'


def write_partial_manifest(counts: Mapping[str, int], classes: Mapping[str, Class], destination: str, needed: bool) -> None:
    """Where a manifest names the classes and some are missing, writes one that names those that are there.

    Class folders below train, val and test need none.
    """
    path = os.path.join(destination, PARTIAL_MANIFEST)
    if needed and any(not name.startswith(expected.split + '/') for name, expected in classes.items()):
        write_manifest(path, sorted((expected.split, name) for name, expected in classes.items() if name in counts))
    else:
        pathlib.Path(path).unlink(missing_ok=True)
