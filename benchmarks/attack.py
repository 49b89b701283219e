"""Attacks everything that reads a file or a setting with corrupted input, and counts the outcomes.

    python benchmarks/attack.py --cases 20000

Each case takes a valid input and corrupts it: bits are flipped; pieces cut, repeated, exchanged or replaced by numbers and words
that break programs. It must be refused by the exception for bad input (printed as one sentence), or be accepted. Another
exception, a crash of the process, or more than SECONDS is a failure. This is not the fuzzer of tests/test_hostile_input.py, which
draws whole inputs from a grammar. Each target's cases run in a process of their own, so that a crash is found; it ends them.
"""
import argparse
import contextlib
import glob
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from PIL import Image
from run_files import ROOT, request_of

SECONDS = 10
ACCEPTED, REFUSED = 'accepted', 'refused'
WORDS = [b'', b'\0', b'\xff' * 8, b'-1', b'1e999', b'nan', b'99999999999999999999', b'../', b'/', b'"', b'[' * 2000, b'{', b'\n',
         b'\x80', b'(', b'True', b'null', b'\xe2\x80\xae', b'%s', b'--', b'=', b',', b'\x1b[2J']


def corrupt(content: bytes, rng: random.Random) -> bytes:
    """A corrupted copy: one to four changes at random places."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = min(start + rng.choice([1, 1, 2, 8, 64, 1000]), len(content))
        change = rng.randrange(6)
        if change == 0 and content:
            content[min(start, len(content) - 1)] ^= 1 << rng.randrange(8)
        elif change == 1:
            del content[start:end]
        elif change == 2:
            content[start:start] = content[start:end] * rng.choice([1, 2, 100])
        elif change == 3:
            content[start:end] = rng.choice(WORDS)
        elif change == 4:
            content[start:start] = rng.choice(WORDS)
        else:
            content[start:] = b''
    return bytes(content)


class Target:
    """Something that reads input: `valid` makes a valid input, `read` reads one, and may refuse it."""

    def __init__(self, folder: str):
        self.folder = folder

    def path(self, name: str, content: bytes) -> str:
        """The path of a new file with this content."""
        path = os.path.join(self.folder, name)
        with open(path, 'wb') as file:
            file.write(content)
        return path


class Pickles(Target):
    def valid(self, rng: random.Random) -> bytes:
        data = {'data': np.arange(48, dtype=rng.choice(['u1', '<f4', 'i8'])).reshape(4, 12), 'fine_labels': [1, 2, 3, 0],
                b'filenames': [b'a.png', 'b.png'], 'nested': [[(1, 2.5, None, True)], {'x': 10 ** 30}]}
        return pickle.dumps(data, protocol=rng.randrange(6))

    def read(self, content: bytes) -> None:
        from data import pickles
        try:
            pickles.load(content)
        except pickles.Refused as error:
            raise SystemExit(str(error)) from error


class Cifar(Target):
    """The archive of CIFAR-100, with a few images."""

    def valid(self, rng: random.Random) -> bytes:
        parts = {'meta': {'fine_label_names': ['cat', 'dog']}}
        for part in 'train', 'test':
            parts[part] = {'data': np.zeros([2, 3072], np.uint8), 'fine_labels': [0, 1], 'filenames': [f'{part}1.png', f'{part}2.png']}
        archive, content = io.BytesIO(), {name: pickle.dumps(part, 2) for name, part in parts.items()}
        if rng.random() < 0.5:  # a valid archive with a corrupted part in it
            name = rng.choice(sorted(content))
            content[name] = corrupt(content[name], rng)
        with tarfile.open(fileobj=archive, mode=rng.choice(['w', 'w:gz', 'w:xz', 'w:bz2'])) as file:
            for name, part in content.items():
                member = tarfile.TarInfo(f'cifar-100-python/{name}')
                member.size = len(part)
                file.addfile(member, io.BytesIO(part))
        return archive.getvalue()

    def read(self, content: bytes) -> None:
        from data import cifar100
        cifar100.read_images(self.path('cifar-100-python.tar.gz', content))


class Zips(Target):
    def valid(self, rng: random.Random) -> bytes:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, 'w', rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])) as file:
            for name in 'images/a.png', 'images/é.png', 'x/y/z.jpg':
                file.writestr(name, rng.randbytes(40))
        return archive.getvalue()

    def read(self, content: bytes) -> None:
        from data.archives import Zip
        archive = Zip(self.path('x.zip', content))
        for name in archive.names():
            with contextlib.suppress(Exception):  # a picture that cannot be read is reported with the others: see DAMAGE
                archive.read(name)


class Images(Target):
    FORMATS = ['PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WEBP', 'PPM', 'TGA', 'ICO', 'PCX', 'JPEG2000']

    def valid(self, rng: random.Random) -> bytes:
        image, content = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)), io.BytesIO()
        try:
            image.convert(rng.choice(['RGB', 'L', 'P'])).save(content, rng.choice(self.FORMATS))
        except OSError:  # a format that lacks the mode
            return self.valid(rng)
        return content.getvalue()

    def read(self, content: bytes) -> None:
        from runtime.datasets.images import decode_images
        array, = decode_images([self.path('x.png', content)], (16, 16, 3), True, 'remove it', '')
        assert array.shape == (1, 16, 16, 3) and array.dtype == np.uint8


class Manifests(Target):
    def valid(self, rng: random.Random) -> bytes:
        return b'split,class\ntrain,a\ntrain,b/c\nval,"d e"\ntest,\xc3\xa9\n'

    def read(self, content: bytes) -> None:
        from runtime.datasets.splits import read_manifest
        for name in read_manifest(self.path('splits.csv', content))['train']:
            assert not os.path.isabs(name) and '..' not in name.split('/')


class Results(Target):
    def valid(self, rng: random.Random) -> bytes:
        path, = glob.glob(os.path.join(ROOT, 'logs', 'sine', '*', 'shipped_results.json'))
        with open(path, encoding='utf-8') as file:
            results = json.load(file)
        for entry in results['evaluations']:
            entry['scores'] = entry['scores'][:2]
        return json.dumps(results).encode()

    def read(self, content: bytes) -> None:
        import main  # noqa: F401  (declares the flags)
        from runtime.results.compare import compare
        self.path('results.json', content)
        compare([self.folder], style=['text', 'csv', 'latex'][len(content) % 3])


class RunFlags(Target):
    def valid(self, rng: random.Random) -> bytes:
        return b'--norm=None\n--update_batch_size=10\n--meta_lr=0.01\n--max_pool=True\n--split=64/16/20\n--data_path=x\n'

    def read(self, content: bytes) -> None:
        self.path('run.flags', content)
        check_command_line(f'--run={self.folder}', '--train=False')


class FlagFiles(Target):
    def valid(self, rng: random.Random) -> bytes:
        return b'# a comment\n--datasource=sinusoid\n--norm=None\n--metatrain_iterations=10\n--test_query=3\n--plot\n'

    def read(self, content: bytes) -> None:
        if not any(word in content for word in (b'--help', b'--flagfile')):
            check_command_line(f'--flagfile={self.path("x.flags", content)}')


def check_command_line(*arguments: str) -> None:
    """What main.py does with flags before it reads data."""
    from absl import flags

    from runtime.cli.rules import check_flags
    from runtime.cli.run_data import source_and_tasks
    try:
        request = request_of(arguments)
        check_flags(request)
        source_and_tasks(request)
    except flags.Error as error:
        raise SystemExit(str(error)) from error


class Clusters(Target):
    def valid(self, rng: random.Random) -> bytes:
        return json.dumps({'cluster': {'worker': ['host1:12345', '127.0.0.1:2']}, 'task': {'type': 'worker', 'index': 1}}).encode()

    def read(self, content: bytes) -> None:
        from runtime.cli.workers import cluster_from_environment
        if b'\0' in content:  # no environment can hold it
            return
        os.environb[b'TF_CONFIG'] = content
        try:
            cluster = cluster_from_environment('multiworker')
            assert 0 <= cluster.worker < cluster.workers
        finally:
            del os.environ['TF_CONFIG']


class Checkpoints(Target):
    """One of the two files of a checkpoint."""

    def valid(self, rng: random.Random) -> bytes:
        index, = glob.glob(os.path.join(ROOT, 'logs', 'sine', '*nonorm', 'model70000.index'))
        shipped = [index, index.replace('.index', '.data-00000-of-00001')]
        for path in shipped:
            shutil.copy(path, self.folder)
        self.attacked = rng.choice(shipped)
        with open(self.attacked, 'rb') as file:
            return file.read()

    def read(self, content: bytes) -> None:
        from runtime.jobs import checkpoints
        path, whole = self.path(os.path.basename(self.attacked), content), checkpoints.load(os.path.splitext(self.attacked)[0])
        checkpoint = checkpoints.load(os.path.splitext(path)[0])
        assert checkpoint.record == whole.record
        assert all(np.array_equal(checkpoint.arrays[name], value) for name, value in whole.arrays.items())


TARGETS = {'pickles': Pickles, 'CIFAR archives': Cifar, 'zip archives': Zips, 'images': Images, 'manifests': Manifests,
           'results.json': Results, 'run.flags': RunFlags, 'flag files': FlagFiles, 'TF_CONFIG': Clusters, 'checkpoints': Checkpoints}


def prepare() -> None:
    """Makes this process one that attacks a target."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
    sys.stdout = sys.stderr = open(os.devnull, 'w')
    signal.signal(signal.SIGALRM, _late)


def _late(number, frame):
    raise TimeoutError(f'not finished after {SECONDS} seconds')


def attack(target: Target, seed: int) -> str:
    """Runs a case: ACCEPTED, REFUSED, or text that says what went wrong."""
    from runtime.system.errors import UserError
    rng = random.Random(seed)
    content = corrupt(target.valid(rng), rng)
    signal.alarm(SECONDS)
    try:
        target.read(content)
        return ACCEPTED
    except (UserError, SystemExit) as error:
        # sys.exit(status) instead of a sentence, without a message
        is_sentence = str(error) and not isinstance(getattr(error, 'code', None), int)
        return REFUSED if is_sentence else 'refused without a sentence'
    except BaseException as error:
        return f'{type(error).__name__}: {str(error)[:200]}'
    finally:
        signal.alarm(0)


def outcomes(name: str, seeds: Sequence[int]) -> list[str]:
    """Those of a target's cases, in a process of its own; the last one if it ended the process."""
    results = []
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), prepare) as pool:
        try:
            for result in pool.map(attack, itertools.repeat(TARGETS[name](folder)), seeds):
                results.append(result)
        except BrokenProcessPool:
            results.append('the process died')
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', type=int, default=20_000)
    parser.add_argument('--only', choices=TARGETS, help='attack this only')
    parser.add_argument('--seed', type=int, default=0, help='of the first case')
    options = parser.parse_args()
    names, failed = [options.only] if options.only else list(TARGETS), False
    for name in names:
        seeds = range(options.seed, options.seed + options.cases // len(names))
        results = outcomes(name, seeds)
        failures = [(seed, result) for seed, result in zip(seeds, results) if result not in (ACCEPTED, REFUSED)]
        print(f'{name}: {len(results)} cases, {results.count(REFUSED)} refused, {results.count(ACCEPTED)} accepted, '
              f'{len(failures)} failures', flush=True)
        for seed, result in failures[:10]:
            print('  ', name, seed, result, flush=True)
        failed = failed or bool(failures)
    sys.exit(failed)


if __name__ == '__main__':
    main()
