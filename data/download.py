"""Fetches the files that a preparation reads, from their origins, and checks each of them before anything reads it.

data/downloads.csv has for every file its size in bytes, its SHA-256 (or MD5, where only that is known), and its URLs. A file
grows as <name>.part, from which an interrupted transfer resumes. It gets its name once it is verified. A wrong one is kept as
<name>.rejected.
"""
import argparse
import contextlib
import csv
import hashlib
import http.client
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import NamedTuple

import filelock
from tqdm import tqdm

from data.preparation import locked_folder, reason
from runtime.system.files import read_csv

CHUNK_BYTES = 2 ** 16
COLUMNS = {'group', 'file', 'bytes', 'sha256', 'md5', 'urls', 'page'}
AGAIN = {408, 425, 429}  # HTTP statuses, besides those from 500 on, after which the same request may succeed
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 4    # in a row without progress before the next mirror is tried
PAUSE = 1.0     # seconds before the second attempt; twice as long before each further one


class File(NamedTuple):
    """A file of a data set."""
    name: str
    bytes: int | None      # None: not known
    algorithm: str         # of the digest: 'sha256' | 'md5'
    digest: str            # hexadecimal
    urls: tuple[str, ...]  # its origin, then mirrors; (): it must be downloaded manually
    page: str              # where it is described, and its terms


class Unavailable(Exception):
    """A file that a URL does not deliver. The message says why."""


class Interrupted(Unavailable):
    """A transfer that another attempt may complete."""


def fetch(group: str, args: argparse.Namespace) -> None:
    """Fetches the files of a group of the table into args.source, if args.download asks for it.

    Files that are there, and right, are not fetched again. For files that need a manual download, prints where to get them and
    checks those present.

    Args:
        args: as parsed by `preparation.arguments`.

    Raises:
        SystemExit: with a sentence for each file that could not be fetched.
    """
    if not args.download:
        return
    files = read_table(args.downloads, group)
    check_by_hand([file for file in files if not file.urls], args.source)
    fetch_files([file for file in files if file.urls], args.source)


def read_table(path: str, group: str) -> list[File]:
    """The files of a group. Raises SystemExit if the table cannot be read or has none."""
    try:
        files = [_file(row) for row in read_csv(path)[1] if row['group'] == group]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        sys.exit(f'the table of downloads {path} cannot be read ({reason(error)}); its first line must be '
                 f'{",".join(sorted(COLUMNS))}, in any order')
    if not files:
        sys.exit(f'the table of downloads {path} has no line for {group}')
    return files


def _file(row):
    algorithm = 'sha256' if row['sha256'] else 'md5'
    urls = tuple(row['urls'].split())
    if not re.fullmatch(r'[\w.-]+', row['file']) or row['file'].startswith('.'):
        raise ValueError(f'{row["file"]!r} is not the name of a file')
    if not re.fullmatch('[0-9a-f]+', row[algorithm]) or len(row[algorithm]) != 2 * hashlib.new(algorithm).digest_size:
        raise ValueError(f'{row["file"]} has no {algorithm} of hexadecimal digits')
    if not all(url.startswith(('http://', 'https://')) for url in urls):
        raise ValueError(f'a URL of {row["file"]} begins with neither http:// nor https://')
    return File(row['file'], int(row['bytes']) if row['bytes'] or urls else None, algorithm, row[algorithm], urls, row['page'])


def check_by_hand(files: Sequence[File], folder: str) -> None:
    """Prints where to get files that must be downloaded by hand, and whether the checksums of those in the folder are right."""
    for file in files:
        path = os.path.join(folder, file.name)
        if not os.path.isfile(path):
            print(f'{file.name} must be downloaded by hand: if you need it, get it from {file.page} and put it into {folder}')
        else:
            wrong = difference(path, file)
            print(f'{path} does not match the recorded checksum ({wrong}); its contents will be validated anyway' if wrong else
                  f'{path} matches the recorded checksum')


def fetch_files(files: Sequence[File], folder: str) -> None:
    """Fetches the files that are missing or wrong in the folder.

    Raises:
        SystemExit: with a sentence for each file that could not be fetched.
    """
    if not files:
        return
    try:
        with locked_folder(folder):
            missing = [file for file in files if not is_complete(file, folder)]
            check_space(missing, folder)
            complaints = [complaint for file in missing if (complaint := fetch_file(file, folder))]
    except filelock.Timeout:
        sys.exit(f'another download is writing to {folder}; wait for its end, or stop it')
    except OSError as error:
        sys.exit(f'writing to {folder} failed: {error}; make room or name another folder with --source, and run the same '
                 'command to resume')
    if complaints:
        sys.exit('\n'.join(complaints) + '\nRun the same command to resume. If you have the files from elsewhere, '
                 f'put them into {folder} and leave out --download.')


def is_complete(file: File, folder: str) -> bool:
    """Whether the folder holds the right file."""
    path = os.path.join(folder, file.name)
    if not os.path.isfile(path):
        return False
    wrong = difference(path, file)
    if wrong:
        print(f'{path} is not the right file ({wrong}); it will be kept as {file.name}.rejected')
    return not wrong


def check_space(files: Sequence[File], folder: str) -> None:
    """Raises SystemExit if the disk has no room for the missing parts of the files."""
    needed = sum(max(0, file.bytes - size(os.path.join(folder, file.name + '.part'))) for file in files)
    free = shutil.disk_usage(folder).free
    if needed > free:
        sys.exit(f'the disk of {folder} has {free / 1e6:,.0f} MB left, and the download needs {needed / 1e6:,.0f} MB; make room or '
                 'name another folder with --source')


def fetch_file(file: File, folder: str) -> str | None:
    """Fetches a file from the first of its URLs that delivers it; returns an error message if none does."""
    path = os.path.join(folder, file.name)
    if file.page:
        print(f'{file.name} comes from {file.page}, whose terms apply', flush=True)
    failures = []
    for url in file.urls:
        try:
            fetch_from(url, file, path)
        except Unavailable as error:
            failures.append(f'{url} {error}')
            continue
        if os.path.lexists(path):
            os.replace(path, path + '.rejected')
        os.replace(path + '.part', path)
        return None
    return f'{file.name} could not be fetched: ' + '; '.join(failures)


def fetch_from(url: str, file: File, path: str) -> None:
    """Completes <path>.part, resuming from what is there.

    Raises:
        Unavailable: this URL does not deliver the file. A wrong one is at <path>.rejected.
    """
    part, largest, idle = path + '.part', 0, 0
    while True:
        try:
            resumed = transfer(url, file, part)
        except Interrupted as error:
            idle = 0 if size(part) > largest else idle + 1
            largest = max(largest, size(part))
            if idle >= ATTEMPTS:
                raise Unavailable(f'{error}, {idle} attempts in a row without progress') from error
            time.sleep(PAUSE * 2 ** idle if idle else 0)
            continue
        wrong = difference(part, file)
        if not wrong:
            return
        if not resumed:
            os.replace(part, path + '.rejected')
            raise Unavailable(f'gave another file ({wrong}), which is kept as {path}.rejected')
        os.remove(part)  # perhaps pieces of two files: once more, from the beginning


def transfer(url: str, file: File, part: str) -> bool:
    """One request for the missing rest of a file, appended to `part`.

    Returns:
        Whether `part` began with bytes of an earlier request.

    Raises:
        Interrupted: another attempt may continue.
        Unavailable: it may not.
    """
    start = size(part) if size(part) <= file.bytes else 0
    if start == file.bytes:
        return True
    with _open(url, start, part) as response:
        offset = re.match(r'bytes (\d+)-', response.headers.get('Content-Range', ''))
        begin = int(offset[1]) if response.status == 206 and offset else 0  # servers may ignore Range
        if begin not in (0, start):
            os.remove(part)
            raise Interrupted('sent another part of the file than it was asked for')
        announced, received, most = response.length, 0, file.bytes + 1 - begin  # one extra byte detects an oversized file
        with open(part, 'ab' if begin else 'wb') as output, tqdm(
                desc=file.name, total=file.bytes, initial=begin, unit='B', unit_scale=True, disable=None) as progress:
            while received < most and (content := _read(response, min(CHUNK_BYTES, most - received))):
                output.write(content)
                received += len(content)
                progress.update(len(content))
        ended = response.chunked if announced is None else received >= min(announced, most)
        if not ended and begin + received < file.bytes:
            raise Interrupted(f'broke off after {begin + received:,} of {file.bytes:,} bytes')
    return begin > 0


def _open(url, start, part):
    """The answer to a request for a file from the byte `start` on."""
    headers = {'User-Agent': 'maml', 'Accept-Encoding': 'identity'} | ({'Range': f'bytes={start}-'} if start else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing there
            with contextlib.suppress(FileNotFoundError):
                os.remove(part)
        kind = Interrupted if error.code in AGAIN | {416} or error.code >= 500 else Unavailable
        raise kind(f'answered with status {error.code} ({reason(error)})') from error
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise Interrupted(f'cannot be reached ({reason(getattr(error, "reason", None) or error)})') from error
    except ValueError as error:  # an invalid URL
        raise Unavailable(f'cannot be used ({reason(error)})') from error


def _read(response, count):
    try:
        return response.read1(count)
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f'broke off ({reason(error)})') from error


def difference(path: str, file: File) -> str:
    """How a file on the disk differs from the expected one; '' if it does not."""
    length, digest = os.path.getsize(path), hashlib.new(file.algorithm)
    with open(path, 'rb') as content:
        beginning = content.read(40)
        content.seek(0)
        while chunk := content.read(2 ** 20):
            digest.update(chunk)
    if file.bytes in (length, None) and digest.hexdigest() == file.digest:
        return ''
    expected = f'{file.bytes:,} bytes with the' if file.bytes is not None else 'the'
    page = 'a web page, ' if beginning.lstrip().startswith(b'<') else ''
    return (f'expected {expected} {file.algorithm} {file.digest}; found {page}{length:,} bytes with {digest.hexdigest()} that begin '
            f'with {beginning!r}')


def size(path: str) -> int:
    """Bytes of a file; 0 if it is not there."""
    return os.path.getsize(path) if os.path.exists(path) else 0
