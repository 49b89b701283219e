"""Fetches the files that a preparation reads, from their origins, and checks each of them before anything reads it.

data/downloads.csv has for every file its size in bytes, its SHA-256 (or MD5, where only that is known), and its URLs. A file
grows as <name>.part, from which an interrupted transfer resumes. It gets its name once it is verified. A wrong one is kept as
<name>.rejected.
"""
import argparse
import csv
import hashlib
import http.client
import io
import os
import pathlib
import re
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tqdm import tqdm

from data.preparation import is_prepared, locked_folder
from data.reading import reason
from runtime.system.files import read_csv

CHUNK_BYTES = 2 ** 16
COLUMNS = {'group', 'file', 'bytes', 'sha256', 'md5', 'urls', 'page'}
AGAIN = {408, 425, 429}  # HTTP statuses, besides those from 500 on, after which the same request may succeed
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 4    # in a row without progress before the next mirror is tried
PAUSE = 1.0     # seconds before the second attempt; twice as long before each further one
PERIOD, RATE = 60.0, 10_000  # in each period, in seconds, a file must grow by so many bytes a second


class File(NamedTuple):
    """A file of a data set."""
    name: str
    bytes: int | None      # None: not known
    algorithm: str         # of the digest: 'sha256' | 'md5'
    digest: str            # hexadecimal; '': not known
    urls: tuple[str, ...]  # its origin, then mirrors; (): it must be downloaded manually
    page: str              # where it is described, and its terms


class Unavailable(Exception):
    """A file that a URL does not deliver. The message says why."""


class Retryable(Unavailable):
    """A transfer that another attempt may complete."""


class Pace:
    """How fast a file grows, and how much a server sends for it, over all requests to one URL.

    A server may hold a client without ever being silent: by one byte a request, endless `100 Continue`, endless trailers, or by
    breaking off each time a little later than before, where it must begin again.
    """

    def __init__(self, file: File, start: int):
        self._bytes, self._room = file.bytes, ATTEMPTS * file.bytes + 2 ** 20
        self._restart(start)

    def _restart(self, size):
        self._goal, self._end = min(size + PERIOD * RATE, self._bytes), time.monotonic() + PERIOD

    def note_size(self, size: int) -> None:
        """Takes note of the size of the file."""
        if self._goal <= size < self._bytes:
            self._restart(size)

    def note_received(self, count: int) -> None:
        """Takes note of bytes from the network; raises Unavailable if the server is too slow, or has sent too many."""
        self._room -= count
        if self._room < 0:
            raise Unavailable('sends far more than the file')
        if time.monotonic() > self._end:
            raise Unavailable(f'is too slow: the file grew by fewer than {PERIOD * RATE:,.0f} bytes in {PERIOD:.0f} seconds')


class _Stream(io.RawIOBase):
    """What comes from the network, watched by a Pace: a server can be slow before its answer and after the file, too."""

    def __init__(self, stream, pace):
        self._stream, self._pace = stream, pace

    def readable(self):
        return True

    def readinto(self, buffer):
        count = self._stream.readinto(buffer)
        self._pace.note_received(count or 0)
        return count

    def close(self):
        self._stream.close()
        super().close()


def _opener(pace):
    """Opens http:// and https:// and nothing else, also where a server redirects to it."""
    class Response(http.client.HTTPResponse):
        def __init__(self, sock, *args, **kwargs):
            super().__init__(sock, *args, **kwargs)
            self.fp = io.BufferedReader(_Stream(self.fp.detach(), pace))

    class Plain(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(type('Connection', (http.client.HTTPConnection,), {'response_class': Response}), request)

    class Secure(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(type('Connection', (http.client.HTTPSConnection,), {'response_class': Response}), request)

    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler, Plain, Secure, urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor,
                    urllib.request.HTTPDefaultErrorHandler, urllib.request.UnknownHandler):
        opener.add_handler(handler())
    return opener


def fetch(group: str, args: argparse.Namespace, recipe: str = '', facts: Mapping[str, object] | None = None) -> None:
    """Fetches the files of a group of the table into args.source, if args.download asks for it.

    Files that are there, and right, are not fetched again. For files that need a manual download, prints where to get them and
    checks those present. `args`, `recipe` and `facts` are those of `preparation.prepare`.

    Raises SystemExit with a sentence for each file that could not be fetched; without an error if none is there, because the
    images are prepared already.
    """
    if not args.download:
        return
    files = read_table(args.downloads, group)
    if is_prepared(args, recipe, facts or {}) and not any(os.path.exists(os.path.join(args.source, file.name)) for file in files):
        print(f'{args.destination} is prepared already; --force fetches the files and makes it again')
        sys.exit()
    check_by_hand([file for file in files if not file.urls], args.source)
    fetch_files([file for file in files if file.urls], args.source)


def read_table(path: str, group: str) -> list[File]:
    """The files of a group. Raises SystemExit if the table cannot be read or has none."""
    try:
        files = [_file(row) for row in read_csv(path)[1].values() if row['group'] == group]
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
    size_of_digest = 2 * hashlib.new(algorithm).digest_size
    if (row[algorithm] or urls) and not re.fullmatch(f'[0-9a-f]{{{size_of_digest}}}', row[algorithm]):
        raise ValueError(f'{row["file"]} has no {algorithm} of hexadecimal digits')
    if not all(url.startswith(('http://', 'https://')) for url in urls):
        raise ValueError(f'a URL of {row["file"]} begins with neither http:// nor https://')
    return File(row['file'], int(row['bytes']) if row['bytes'] or urls else None, algorithm, row[algorithm], urls, row['page'])


def check_by_hand(files: Sequence[File], folder: str) -> None:
    """Prints where to get files that must be downloaded by hand, and whether the checksums of those in the folder are right."""
    for file in files:
        path = os.path.join(folder, file.name)
        if not os.path.isfile(path):
            checksum = f'; its {file.algorithm} is {file.digest}' if file.digest else ''
            print(f'{file.name} must be downloaded by hand: if you need it, get it from {file.page} and put it into {folder}{checksum}')
        elif not file.digest:
            print(f'{path} has no recorded checksum; its contents will be validated')
        else:
            wrong = difference(path, file)
            print(f'{path} does not match the recorded checksum ({wrong}); its contents will be validated anyway' if wrong else
                  f'{path} matches the recorded checksum')


def fetch_files(files: Sequence[File], folder: str) -> None:
    """Fetches the files that are missing or wrong in the folder; raises SystemExit with a sentence for each that it could not."""
    if not files:
        return
    with locked_folder(folder, f'another download is writing to {folder}; wait for its end, or stop it', '--source'):
        missing = [file for file in files if not is_complete(file, folder)]
        check_space(missing, folder)
        complaints = [complaint for file in missing if (complaint := fetch_file(file, folder))]
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

    Raises Unavailable if this URL does not deliver the file. A wrong one is at <path>.rejected.
    """
    part, largest, idle = path + '.part', 0, 0
    pace = Pace(file, size(part))
    while True:
        try:
            resumed = transfer(url, file, part, pace)
        except Retryable as error:
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


def transfer(url: str, file: File, part: str, pace: Pace) -> bool:
    """Appends the missing rest of a file to `part`, by one request; returns whether `part` began with bytes of an earlier one.

    Raises Retryable if another attempt may continue, Unavailable if it may not.
    """
    start = size(part) if size(part) <= file.bytes else 0
    if start == file.bytes:
        return True
    with _open(url, start, part, pace) as response:
        offset = re.match(r'bytes (\d{1,18})-', response.headers.get('Content-Range', ''))
        begin = int(offset[1]) if response.status == 206 and offset else 0  # servers may ignore Range
        if begin not in (0, start):
            pathlib.Path(part).unlink(missing_ok=True)
            raise Retryable('sent another part of the file than it was asked for')
        announced, received, most = response.length, 0, file.bytes + 1 - begin  # one extra byte detects an oversized file
        with open(part, 'ab' if begin else 'wb') as output, tqdm(
                desc=file.name, total=file.bytes, initial=begin, unit='B', unit_scale=True, disable=None) as progress:
            while received < most and (content := _read(response, min(CHUNK_BYTES, most - received), begin + received == file.bytes)):
                output.write(content)
                received += len(content)
                pace.note_size(begin + received)
                progress.update(len(content))
        ended = response.chunked if announced is None else received >= min(announced, most)
        if not ended and begin + received < file.bytes:
            raise Retryable(f'broke off after {begin + received:,} of {file.bytes:,} bytes')
    return begin > 0


def _open(url, start, part, pace):
    """The answer to a request for a file from the byte `start` on."""
    headers = {'User-Agent': 'maml', 'Accept-Encoding': 'identity'} | ({'Range': f'bytes={start}-'} if start else {})
    try:
        return _opener(pace).open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing there
            pathlib.Path(part).unlink(missing_ok=True)
        kind = Retryable if error.code in AGAIN | {416} or error.code >= 500 else Unavailable
        raise kind(f'answered with status {error.code} ({reason(error)})') from error
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        cause = getattr(error, 'reason', None) or error
        # A name that nobody knows, or another protocol, will be the same in a minute.
        raise (Unavailable if isinstance(cause, (socket.gaierror, str)) else Retryable)(f'cannot be reached ({reason(cause)})') from error
    except ValueError as error:  # an invalid URL
        raise Unavailable(f'cannot be used ({reason(error)})') from error


def _read(response, count, complete):
    try:
        return response.read1(count)
    except (OSError, http.client.HTTPException, Unavailable) as error:
        if complete:  # whether the file is right does not depend on what follows
            return b''
        raise error if isinstance(error, Unavailable) else Retryable(f'broke off ({reason(error)})') from error


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
