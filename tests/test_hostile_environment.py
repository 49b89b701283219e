"""Disks that are full, terminals that are closed, pipes in the place of files, clusters that cannot be: said, and never a hang."""
import contextlib
import io
import json
import os
import platform
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
import types
import zlib

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from conftest import ROOT, SINUSOID, an_entry, directory_of, error_of, run_ok, write_image_tree
from data_generator import SOURCES
from runtime.cli import startup, workers
from runtime.datasets import arrays, class_folders, images
from runtime.jobs import checkpoints
from runtime.jobs import train as training
from runtime.results import plots, statistics, store
from runtime.results.provenance import Provenance
from runtime.system import console, interruption
from runtime.system.errors import UserError

STATE = {'w': tf.zeros([1000])}
RECORD = {'best': None, 'unprinted': [], 'skipped': 0, 'flags': {}, 'regime': 'metatrain', 'pretrain_iterations': 0,
          'provenance': Provenance({})}
WHOLE_PROGRAM = [sys.executable, os.path.join(ROOT, 'main.py')]


@contextlib.contextmanager
def limited_files(most):
    """As on a full disk: no file grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The --logdir of a training of 100 iterations."""
    logdir = tmp_path_factory.mktemp('trained')
    run_ok(*SINUSOID, f'--logdir={logdir}', '--metatrain_iterations=100', '--log=False')
    return logdir


# Paths

@pytest.mark.parametrize('flags', [
    ['--logdir=gs://bucket/runs'], ['--logdir=file:///tmp/runs'], ['--logdir=ram://runs'], ['--train=False', '--load_from=s3://m/model1'],
    ['--datasource=omniglot', '--data_path=file:///tmp'], ['--run=ram://runs'], ['--compare=file:///tmp'],
    ['--datasource=omniglot', '--predict', '--support_dir=.', '--query_dir=http://a/b']])
def test_addresses_are_no_paths(flags):
    error = error_of(*flags)
    assert f'{flags[-1]} is a URL, not a local path' in error


def test_a_zero_byte_in_a_path(tmp_path):
    (tmp_path / 'flags').write_bytes(b'--logdir=/tmp/a\0b\n')
    assert '--logdir contains a zero byte' in error_of(f'--flagfile={tmp_path}/flags')


@pytest.mark.parametrize('make', [lambda path: path.write_text(''), lambda path: path.symlink_to('/tmp'), os.mkfifo])
def test_something_in_the_way_of_saving(make, tmp_path):
    make(tmp_path / '.saving')
    with pytest.raises(UserError, match=f'{tmp_path}/.saving is not a folder, .* remove it'):
        with checkpoints.exclusive(str(tmp_path)):
            pass


def test_a_trial_of_saving(tmp_path):
    """It leaves nothing behind, and fails where saving would."""
    with limited_files(100), pytest.raises(OSError, match='File too large'):
        checkpoints.try_saving(str(tmp_path), STATE)
    checkpoints.try_saving(str(tmp_path), STATE)
    assert not any(tmp_path.iterdir())
    (tmp_path / '.saving').write_text('')
    with pytest.raises(OSError):
        checkpoints.try_saving(str(tmp_path), STATE)


def test_saving_that_cannot_work_is_said_at_the_start(tmp_path, capsys):
    run = types.SimpleNamespace(directory=str(tmp_path), source=SOURCES['sinusoid'], flag_file='', network_file=None)
    model = types.SimpleNamespace(state=lambda: STATE)
    with limited_files(100):
        training.prepare_directory(run, training.TrainState(), model, Provenance({}))
    assert re.fullmatch(f'Warning: checkpoints cannot be saved in {tmp_path} now .*File too large.*\n', capsys.readouterr().out)
    training.prepare_directory(run, training.TrainState(), model, Provenance({}))
    assert capsys.readouterr().out == ''


# The console

def stream(encoding='utf-8', file='/dev/null'):
    return open(file, 'w', encoding=encoding, buffering=1)


def shown(text, encoding='utf-8'):
    """What a Console writes."""
    written = io.BytesIO()
    protected = console.Console(io.TextIOWrapper(written, encoding=encoding, write_through=True))
    print(text, file=protected, end='', flush=True)
    return written.getvalue()


@pytest.mark.parametrize('text, expected', [
    ('a\nb', 'a\nb'), ('\r50%', '\r50%'), ('a\rb', r'a\rb'), ('\x1b[31mred\x07', r'\x1b[31mred\x07'), ('\x9b2J', r'\x9b2J'),
    ('a\u202eb', r'a\u202eb'), ('\udcff', r'\udcff'), ('größe 图', 'größe 图')])
def test_names_cannot_steer_the_terminal(text, expected):
    assert shown(text) == expected.encode()


def test_other_encodings():
    assert shown('1.0 ± 0.1, größe', 'ascii') == rb'1.0 +- 0.1, gr\xf6\xdfe' and shown('±', 'latin-1') == b'\xb1'


def test_what_cannot_be_written_is_left_out():
    for file in stream(file='/dev/full'), stream():
        if file.name == '/dev/null':
            file.close()
        print('a line', file=console.Console(file), flush=True)
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        print('a line', file=console.Console(open(writer, 'w')), flush=True)


@pytest.mark.slow
def test_printing_where_nothing_can_be_printed(trained, tmp_path):
    """Each by a whole program, side by side: a full disk, closed outputs, an encoding without ±; all do their work."""
    train = ' '.join([*WHOLE_PROGRAM, *SINUSOID, '--metatrain_iterations=100'])
    commands = {'full': f'{train} --logdir={tmp_path}/full > /dev/full',
                'closed': f'{train} --help >&- <&-',
                'ascii': f'{train} --logdir={trained} --train=False --num_test_tasks=2 2>&- <&-'}
    processes = {name: subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        env={**os.environ, 'PYTHONIOENCODING': 'ascii'}) for name, command in commands.items()}
    outputs = {name: process.communicate(timeout=100) for name, process in processes.items()}
    for name, process in processes.items():
        assert process.returncode == 0 and 'Error' not in outputs[name][1], outputs[name]
    assert outputs['full'][1] == '' or 'it/s' in outputs['full'][1]
    assert (directory_of(tmp_path / 'full') / 'model100.index').exists()
    assert re.search(r' 1  [ \d.]+ \+- [\d.]+', outputs['ascii'][0])


@pytest.mark.parametrize('ending, status, words', [
    ('ctypes.CDLL(None).abort()', -signal.SIGABRT, 'fatal: no such flag\nThe program was ended while TensorFlow started, see above\n'),
    ('sys.exit(3)', 3, ''), ('None', 0, '')])
def test_what_a_library_says_before_it_aborts_is_shown(ending, status, words):
    """While TensorFlow starts, its notices are hidden; not the last, if it ends the program."""
    program = f"""
import ctypes, os, sys
from runtime.cli import startup
with startup._hidden_stderr():
    os.write(2, b'fatal: no such flag\\n')
    {ending}
"""
    process = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (process.returncode, process.stderr) == (status, words)


# Pipes in the place of files

@pytest.fixture
def pipe(tmp_path):
    """Makes pipes without a writer: reading one would block for ever."""
    paths, waited, over = [], [], threading.Event()

    def make(name):
        paths.append(tmp_path / name)
        os.mkfifo(paths[-1])
        return str(paths[-1])

    def release():
        while not over.wait(0.05):
            for path in paths:
                with contextlib.suppress(OSError):  # there is no reader, or no pipe any more
                    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                    waited.extend([path] * stat.S_ISFIFO(os.stat(path).st_mode))

    watch = threading.Thread(target=release)
    watch.start()
    yield make
    over.set()
    watch.join()
    assert not waited


def test_a_pipe_as_manifest(pipe, tmp_path):
    pipe('splits.csv')
    with pytest.raises(UserError, match='the manifest .*splits.csv cannot be read: .*not a regular file'):
        class_folders.ClassFolders(str(tmp_path)).names('train')


def test_a_pipe_as_record_of_a_preparation(pipe, tmp_path):
    pipe('.prepared.json')
    with pytest.raises(UserError, match='the preparation of'):
        class_folders.ClassFolders(str(tmp_path), script='x.py').names('train')


def test_a_pipe_as_cache(pipe, tmp_path):
    """It is replaced."""
    write_image_tree(tmp_path, ['train/a'], images=2, size=(4, 4, 3))
    os.mkdir(tmp_path / '.cache')
    for suffix in 'json', 'npy':
        pipe(f'.cache/train_4x4x3.{suffix}')
    assert len(class_folders.ClassFolders(str(tmp_path)).load('train', (4, 4, 3)).values) == 2
    assert (tmp_path / '.cache' / 'train_4x4x3.npy').is_file()


def test_a_pipe_as_results(pipe, tmp_path):
    with pytest.raises(UserError, match='results.json cannot be read'):
        store.read(pipe('results.json'))
    assert 'results.json cannot be read' in error_of(f'--compare={tmp_path}')


@pytest.mark.parametrize('suffix', ['.index', '.data-00000-of-00001'])
def test_a_pipe_as_checkpoint(suffix, pipe, tmp_path):
    """It is damaged, and the one before it is used."""
    for iteration in 1, 2:
        checkpoints.save(checkpoints.path(str(tmp_path), iteration), STATE, {**RECORD, 'iteration': iteration})
    os.remove(tmp_path / f'model2{suffix}')
    path = pipe(f'model2{suffix}')
    with pytest.raises(checkpoints.Damaged, match=f'not a regular file: .*{path}'):
        checkpoints.load(str(tmp_path / 'model2'))
    assert checkpoints.newest(str(tmp_path)).record['iteration'] == 1


def test_a_pipe_as_flag_file(pipe):
    path = pipe('flags')
    assert f'--flagfile={path} cannot be read: not a regular file' in error_of(f'--flagfile={path}')
    assert 'not a regular file' in error_of('--flagfile', path) and 'not a regular file' in error_of('--flagfile=/dev/null')


def test_a_pipe_as_flag_file_that_another_names(pipe, tmp_path):
    (tmp_path / 'outer').write_text(f'--flagfile={pipe("inner")}\n--flagfile={tmp_path / "outer"}\n')
    assert 'not a regular file' in error_of(f'--flagfile={tmp_path / "outer"}')


def test_pipes_among_images(pipe, tmp_path):
    write_image_tree(tmp_path, ['a'], images=1, size=(4, 4, 3))
    pipe('a/pipe.png')
    os.symlink(tmp_path / 'a' / 'pipe.png', tmp_path / 'a' / 'link.png')
    os.symlink('/dev/zero', tmp_path / 'a' / 'zero.png')
    assert [file.name for file in images.folder_contents(str(tmp_path / 'a'), {'.png'}).images] == ['00.png']


@pytest.mark.parametrize('target', ['nothing', 'link.png', '00.png/below'])
def test_links_to_nothing_are_listed(target, tmp_path):
    """To be reported with the other bad images: to what is not there, to itself, and into a file."""
    write_image_tree(tmp_path, ['a'], images=1, size=(4, 4, 3))
    os.symlink(target, tmp_path / 'a' / 'link.png')
    assert [file.name for file in images.folder_contents(str(tmp_path / 'a'), {'.png'}).images] == ['00.png', 'link.png']


@pytest.mark.parametrize('text', ['{"a": ' + '[' * 100_000, '{"a": {"scores": [[1', '[' * 100_000 + ']' * 100_000, ''])
def test_results_that_are_no_results(text, tmp_path):
    (tmp_path / 'results.json').write_text(text)
    assert f'{tmp_path}/results.json cannot be read' in error_of(f'--compare={tmp_path}')


# Disks and clocks

def test_a_disk_too_small_for_decoded_images(tmp_path, capsys):
    """They are used from memory; nothing half written stays, and the next start, with room, keeps them."""
    write_image_tree(tmp_path, ['train/a'], images=5, size=(30, 30, 3))
    whole = class_folders.ClassFolders(str(tmp_path)).load('train', (30, 30, 3))
    for path in (tmp_path / '.cache').iterdir():
        path.unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        found = class_folders.ClassFolders(str(tmp_path)).load('train', (30, 30, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 'could not be kept for the next run' in capsys.readouterr().err and not list((tmp_path / '.cache').glob('*.n*'))
    assert np.array_equal(found.values, whole.values) and found.checksum == whole.checksum
    class_folders.ClassFolders(str(tmp_path)).load('train', (30, 30, 3))
    assert len(list((tmp_path / '.cache').glob('*.npy'))) == 1


def test_two_processes_that_cache_other_images_of_one_shape(tmp_path, monkeypatch):
    """Each has the images that its checksum is of, however late it looks; and the next start has its own too."""
    path, shape = str(tmp_path / 'cache'), (2, 3)
    mine, theirs = np.zeros(shape, np.uint8), np.ones(shape, np.uint8)
    write = arrays.write_atomically

    def overtaken(written, content):
        result = write(written, content)
        if written.endswith('.npy'):  # another process finishes its own between the renaming and what comes next
            monkeypatch.setattr(arrays, 'write_atomically', write)
            arrays.cached_array(path, 'theirs', shape, lambda: [theirs])
        return result

    monkeypatch.setattr(arrays, 'write_atomically', overtaken)
    array, checksum = arrays.cached_array(path, 'mine', shape, lambda: [mine])
    assert (array == mine).all() and checksum == zlib.crc32(mine)
    for name, own in ('mine', mine), ('theirs', theirs), ('mine', mine):
        array, checksum = arrays.cached_array(path, name, shape, lambda own=own: [own])
        assert (array == own).all() and checksum == zlib.crc32(own)


@pytest.mark.parametrize('days', [-20000, 4000])
def test_clocks_that_are_wrong(days, tmp_path):
    """Files from 1970 or from the next decade: caches are used or made again, and the newest checkpoint is the furthest."""
    time = 1.8e9 + days * 86400
    write_image_tree(tmp_path / 'images', ['train/a'], images=2, size=(4, 4, 3))
    first = class_folders.ClassFolders(str(tmp_path / 'images')).load('train', (4, 4, 3))
    for path in (tmp_path / 'images').rglob('*.*'):
        os.utime(path, (time, time))
    again = class_folders.ClassFolders(str(tmp_path / 'images')).load('train', (4, 4, 3))
    assert np.array_equal(first.values, again.values) and first.checksum == again.checksum
    for iteration in 1, 2:
        checkpoints.save(checkpoints.path(str(tmp_path), iteration), STATE, {**RECORD, 'iteration': iteration})
    for path in tmp_path.glob('model1.*'):
        os.utime(path, (time, time))
    assert checkpoints.newest(str(tmp_path)).record['iteration'] == 2


# Clusters

def config(worker='["a:1", "b:1"]', index='0'):
    return f'{{"cluster": {{"worker": {worker}}}, "task": {{"type": "worker", "index": {index}}}}}'


@pytest.mark.parametrize('text', [
    config('["a:99999", "b:1"]'), config('["a:0", "b:1"]'), config('["a\\u0000:1", "b:1"]'), config('["a b:1", "b:1"]'),
    config('["-:1", "..:2"]'), config('["a:1", "a..b:1"]'), config('["a:1", "é:1234"]'), config('["a:1", "\\u001b[2J:1"]'),
    config('["a:١", "b:1"]'), config('["worker-0.workers.default.svc.cluster.local", "b:1"]'),
    config(index='1e999'), config(index='0.7'), config(index='NaN'), config(index='true'),
    '[' * 100_000, '{"cluster": ' * 100_000, config('[' * 100_000)])
def test_clusters_that_cannot_be(text, monkeypatch):
    monkeypatch.setenv('TF_CONFIG', text)
    with pytest.raises(UserError, match='TF_CONFIG cannot be understood'):
        workers.cluster_from_environment('auto')


# Pictures and figures

def test_a_picture_of_many_classes_shows_the_first():
    """A row of panels for each of 420 classes took too long to lay out."""
    source = types.SimpleNamespace(image_shape=(2, 2, 1), invert=False)
    classes = [f'class {number}' for number in range(420)]
    x, y = np.zeros([1, 420, 4], np.float32), np.eye(420, dtype=np.float32)[None]
    task = types.SimpleNamespace(classes=classes, names=['a.png'], labels=[None],
                                 batch=types.SimpleNamespace(support_x=x, support_y=y, query_x=x[:, :1], query_y=y[:, :1]))
    figure = plots.prediction_sheet(task, source, y[0, :1])
    assert 'the first 20 of 420 classes' in figure.subfigs[0].get_suptitle() and len(figure.axes) < 50

    tasks = types.SimpleNamespace(draw=lambda start, count: task.batch._replace(), class_names=lambda task: classes, source=source)
    task.batch._replace = lambda: types.SimpleNamespace(support_x=x, support_y=y, query_x=x, query_y=y)
    model = types.SimpleNamespace(predict=lambda batch, updates: types.SimpleNamespace(post=[y]))
    figure = plots.task_sheet(model, tasks, 1, 'x')
    assert 'the first 20 of 420 classes' in figure.get_suptitle() and len(figure.axes) == 2 * 20
    assert '420 of 420 are right' in figure.get_suptitle().replace('\n', ' ')
    model.predict = lambda batch, updates: types.SimpleNamespace(post=[np.full_like(y, np.nan if updates else 0)])
    figure = plots.task_sheet(model, tasks, 1, 'x')
    assert 'adaptation diverged' in figure.get_suptitle().replace('\n', ' ') and figure.axes[1].get_title() == '1 → diverged'


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('height, width', [(1, 1), (1, 4), (4, 1)])
def test_images_of_one_pixel_are_drawn(channels, height, width):
    axes = plots.Figure().subplots()
    shape = height, width, channels
    plots._show(axes, np.ones(height * width * channels, np.float32), types.SimpleNamespace(image_shape=shape, invert=False))
    assert axes.images[0].get_array().shape == (shape if channels == 3 else shape[:2])


@pytest.mark.parametrize('tasks, dtype', [(2, np.float32), (600, np.float32), (601, np.float64)])
def test_the_bootstrap_in_parts(tasks, dtype, monkeypatch):
    """The very figures of all resamples of a batch at once, as the shipped results have them."""
    values = np.random.default_rng(0).random((tasks, 11)).astype(dtype)
    whole = stats.bootstrap((values,), np.mean, n_resamples=2000, method='percentile', batch=100,
                            random_state=np.random.default_rng(0)).confidence_interval
    sizes = []
    draw = stats.bootstrap
    monkeypatch.setattr(stats, 'bootstrap', lambda *some, **others: sizes.append(others['batch']) or draw(*some, **others))
    for numbers in statistics.NUMBERS_AT_A_TIME, 7 * values.size, 1:
        monkeypatch.setattr(statistics, 'NUMBERS_AT_A_TIME', numbers)
        np.testing.assert_array_equal(statistics.bootstrap(values), np.stack([whole.low, whole.high], axis=1))
    assert sizes == [100, 7, 2]


# Signals

@pytest.fixture
def hangup():
    before = {number: signal.getsignal(number) for number in interruption.TERMINATION_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_closed_terminal(hangup):
    """A hang-up is an interruption, however often it comes; under nohup it is none."""
    signal.signal(signal.SIGHUP, lambda *_: pytest.fail('nobody listened'))
    with interruption.Interruption() as stopped:
        for _ in range(2):
            signal.raise_signal(signal.SIGHUP)
        assert stopped.signal == signal.SIGHUP and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interruption.Interruption() as stopped:
        signal.raise_signal(signal.SIGHUP)
        assert stopped.signal is None


@pytest.mark.slow
def test_hangups_of_a_training(tmp_path):
    """One training gets SIGHUP, another ignores it as under nohup; the terminal is resized as well."""
    def start(name, before=signal.SIG_DFL):
        return subprocess.Popen([*WHOLE_PROGRAM, *SINUSOID, f'--logdir={tmp_path}/{name}', '--metatrain_iterations=10000000'],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                preexec_fn=lambda: signal.signal(signal.SIGHUP, before))

    processes = {'plain': start('plain'), 'nohup': start('nohup', signal.SIG_IGN)}
    try:
        for process in processes.values():
            while not process.stdout.readline().startswith('Iteration 1000:'):
                assert process.poll() is None
            process.send_signal(signal.SIGWINCH)
            process.send_signal(signal.SIGHUP)
        _, error = processes['plain'].communicate(timeout=100)
        assert processes['plain'].returncode == 129 and 'Stopped by SIGHUP after iteration' in error
        assert int(re.search(r'newest checkpoint is .*model(\d+)', error)[1]) >= 1000
        while not processes['nohup'].stdout.readline().startswith('Iteration 2000:'):
            assert processes['nohup'].poll() is None
        processes['nohup'].terminate()
        processes['nohup'].communicate(timeout=100)
        assert processes['nohup'].returncode == 143
    finally:
        for process in processes.values():
            process.kill()


# What is said of what takes long, and of results that are large

def test_what_takes_long_is_said_before():
    def note(**config):
        defaults = {'loss': 'xent', 'outer': 'gradient', 'recompute': False, 'num_updates': 1, 'norm': 'batch_norm', 'network': None}
        return training.notes(types.SimpleNamespace(**{**defaults, **config}))
    assert note(num_updates=50, recompute=False) == note(num_updates=200, recompute=True) == []
    line, = note(num_updates=200, recompute=False)
    assert '--num_updates=200 that may take many minutes' in line
    line, = note(loss='mse')
    assert 'hardly learns' in line and not note(loss='mse', norm='None')
    line, = note(outer='reptile', inner_weights='head')
    assert 'with --inner_weights=head the other weights stay as they start' in line and not note(outer='reptile', inner_weights='all')


def test_parts_of_killed_evaluations_go(tmp_path):
    """Others may be written to at the moment."""
    parts = [tmp_path / f'results.json.{number}.part' for number in (111, 222)]
    for path in parts:
        path.write_text('half')
    os.utime(parts[0], (0, 0))
    store.add(str(tmp_path), an_entry(np.ones((3, 2), np.float32)))
    assert [path.exists() for path in parts] == [False, True]


def test_results_are_written_piece_by_piece(tmp_path):
    entry = an_entry(np.random.default_rng(0).random((3, 2)).astype(np.float32))
    store.add(str(tmp_path), entry)
    text = (tmp_path / 'results.json').read_text()
    assert text == json.dumps(json.loads(text), indent=1) and store.read(str(tmp_path / 'results.json')) == [entry]


SETTINGS_OF_TENSORFLOW = """
import resource
from runtime.cli.startup import import_tensorflow
import_tensorflow()
import tensorflow as tf
from runtime.results.provenance import arithmetic
double = tf.function(lambda x: x + x)
large = tf.zeros([20_000_000])
double(large)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    double(large)
print(arithmetic('map', 1)['oneDNN'], (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5)
"""


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='this system does not bind processes to cores')
def test_cores_that_a_scheduler_allows():
    program = ('import os, sys; sys.path.insert(0, sys.argv[1])\nfrom runtime.system.cores import usable_cores\n'
               'os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nprint(usable_cores())')
    assert subprocess.check_output([sys.executable, '-c', program, ROOT], text=True) == '1\n'


@pytest.mark.parametrize('environment, one_dnn', [({}, 'on'), ({'TF_CPU_ALLOCATOR_USE_BFC': '0', 'TF_ENABLE_ONEDNN_OPTS': '0'}, 'off')])
@pytest.mark.skipif(platform.system() != 'Linux' or platform.machine() != 'x86_64', reason='other systems have other defaults')
def test_how_tensorflow_is_set_up(environment, one_dnn):
    """A large tensor takes over the memory of an earlier one, without a fault for each of its pages; the environment may say otherwise."""
    others = {name: value for name, value in os.environ.items() if name not in startup.SETTINGS}
    output = subprocess.check_output([sys.executable, '-c', SETTINGS_OF_TENSORFLOW], cwd=ROOT, text=True, env=others | environment)
    shown, faults = output.split()
    assert shown == one_dnn
    assert (float(faults) > 20) == bool(environment)  # pages may have 2 MB, too
