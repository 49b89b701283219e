"""What several tests need: the program's modules on the path, a small Omniglot, and main.py in a process of its own."""
import contextlib
import glob
import importlib.util
import io
import os
import runpy
import subprocess
import sys
import types
from unittest import mock

import numpy as np
import pytest
from absl import flags
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'benchmarks')]

import main  # noqa: E402
from runtime.cli import flags as program_flags  # noqa: E402
from runtime.cli import startup  # noqa: E402
from runtime.system import console  # noqa: E402
from runtime.system.errors import UserError  # noqa: E402

startup.import_tensorflow()  # first, for it says how TensorFlow is set up
import compiled_models  # noqa: E402
import tensorflow as tf  # noqa: E402

from maml import MAML  # noqa: E402
from runtime.compute.engine import Engine  # noqa: E402
from runtime.jobs import train as training  # noqa: E402
from runtime.results import store  # noqa: E402

SINUSOID = ['--datasource=sinusoid', '--update_batch_size=10', '--norm=None', '--meta_batch_size=4', '--engine=map']

# Modules whose tests need no compilation, and others' that do not either: `make check` runs them with every edit.
QUICK_MODULES = {'test_checkpoints', 'test_data_generator', 'test_hostile_environment', 'test_hostile_input',
                 'test_download', 'test_files', 'test_sources', 'test_hostile_preparation', 'test_image_sets', 'test_packed',
                 'test_resize_images', 'test_structure', 'test_own_data', 'test_tieredimagenet'}
QUICK_TESTS = {'test_one_weight_by_hand', 'test_adam_against_its_formula', 'test_output_shapes', 'test_every_source_has_a_run',
               'test_refusal', 'test_nonsense', 'test_labels_say_what_differs', 'test_bootstrap_covers',
               'test_usage_text_and_readme_agree', 'test_commands_of_the_docs_parse', 'test_cluster',
               'test_a_configuration_that_makes_no_sense', 'test_what_means_nothing_is_refused',
               'test_flags_that_make_no_sense_are_refused'}
NOT_QUICK = {'test_frames_between_the_training_loop_and_the_inner_step', 'test_class_folders_that_cannot_be_written_to',
             'test_how_tensorflow_is_set_up', 'test_a_pickle_takes_no_more_memory_than_it_deserves',
             'test_printing_never_stops_a_preparation', 'test_a_server_cannot_hold_a_download', 'test_from_nothing_to_class_folders',
             'test_scipy_stats_is_imported_when_it_is_used'}


def pytest_collection_modifyitems(items):
    for item in items:
        quick = item.module.__name__ in QUICK_MODULES or item.originalname in QUICK_TESTS
        if quick and item.originalname not in NOT_QUICK and not item.get_closest_marker('slow'):
            item.add_marker('quick')


def module_at(path):
    """The module of a file that is not on the path of modules."""
    spec = importlib.util.spec_from_file_location(os.path.basename(path)[:-3], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said_by(main, *arguments):
    """What the main of a preparation's script says that refuses these arguments, in this process; None if it takes them."""
    with mock.patch.object(sys, 'argv', ['script', *map(str, arguments)]):
        try:
            main()
        except SystemExit as error:
            assert isinstance(error.code, str) and error.code, error.code  # which is exit status 1
            return error.code
    return None


def run_process(*arguments, script='main.py', cwd=ROOT):
    """Runs main.py, or another script, as a user does, in a process of its own; returns the finished process."""
    return subprocess.run([sys.executable, os.path.join(ROOT, script), *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, timeout=300)


def run_script(script, *arguments):
    """Runs a script of data/ in this process, which takes less time; returns what `run_process` does, as far as tests look at it."""
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    path = os.path.join(ROOT, script)
    with (mock.patch.object(sys, 'argv', [path, *map(str, arguments)]), mock.patch.object(sys, 'path', [*sys.path]),
          mock.patch.object(console, 'protect'), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr)):
        try:
            runpy.run_path(path, run_name='__main__')
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
    return types.SimpleNamespace(returncode=status, stdout=stdout.getvalue(), stderr=stderr.getvalue())


def run_main(*arguments):
    """Runs main.py's main in this process, which saves the seconds that TensorFlow takes to start."""
    main.main(['main.py', *arguments])


def run_ok(*arguments):
    """Runs main.py, which must succeed; returns what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run_main(*arguments)
    return printed.getvalue()


def error_of(*arguments):
    """Runs main.py, which must refuse; returns the sentence. That it becomes an exit status of 1: see test_refusal."""
    with pytest.raises((UserError, flags.Error)) as error:
        run_main(*arguments)
    sentence = str(error.value)
    assert '\n' not in sentence
    return sentence


def results_of(directory):
    """The entries of a run's results.json."""
    return store.read(os.path.join(directory, store.FILE))


def directory_of(logdir):
    """The only run in a --logdir."""
    directory, = (path for path in logdir.iterdir() if path.is_dir())
    return directory


def fixture_files(folder, variable):
    """{name: path} of the fixtures in a folder of tests/, and in the folders that a variable of the environment names."""
    folders = [os.path.join(ROOT, 'tests', folder), *filter(None, os.environ.get(variable, '').split(os.pathsep))]
    return {os.path.basename(path)[:-4]: path for folder in folders for path in sorted(glob.glob(os.path.join(folder, '*.npz')))}


def an_entry(scores, metric='loss', checkpoint='model5', iterations=5, is_best=False, ensemble=(), known_classes=(), training=None,
             tasks=None, setting=None, **flags):
    """An entry of results.json, an evaluation of a sinusoid run on meta-validation unless other values are given.

    Args:
        scores: [tasks, 1 + updates].
        training, tasks, setting: {field: value} of its parts.
        flags: of the training.
    """
    scores = np.array(scores)
    flags = {'datasource': 'sinusoid', 'seed': 0, 'num_updates': 1, 'update_lr': 0.001, 'inner_batch': 0, **flags}
    last = scores.shape[1] - 1
    return store.Entry(
        checkpoint, iterations, is_best, list(ensemble),
        store.Training(**{'method': 'MAML', 'pretrain_iterations': 0, 'metatrain_iterations': 5, 'flags': flags, **(training or {})}),
        store.EvaluationTasks(**{'datasource': 'sinusoid', 'split': 'val', 'num_classes': None, 'update_batch_size': 5, 'query_shots': 5,
                                 'seed': 0, 'count': len(scores), 'data': None, 'facts': {}, **(tasks or {})}),
        store.Setting(**{'query_norm': 'batch', 'update_lr': flags['update_lr'], 'inner_batch': flags['inner_batch'], 'test_updates': last,
                         'headline_updates': min(flags['num_updates'], last), 'load_from': None, **(setting or {})}),
        list(known_classes), metric, 1.0, {}, store.figures_of(scores), scores.tolist())


def write_image_tree(root, classes, images, size, seed=0):
    """Writes <root>/<class>/<number>.png for each class.

    A class is a fixed random pattern of one or three channels; its images are that pattern with some values flipped, so that
    it can be learnt.

    Args:
        classes: class folders.
        images: how many of each.
        size: (height, width) or (height, width, 3).
    """
    rng = np.random.default_rng(seed)
    for name in classes:
        os.makedirs(root / name)
        pattern = rng.random(size) < 0.5
        for image in range(images):
            noisy = pattern ^ (rng.random(size) < 0.05)
            Image.fromarray((255 * noisy).astype(np.uint8)).save(root / name / f'{image:02d}.png')


def write_manifest(root, names):
    (root / 'splits.csv').write_text('split,class\n' + ''.join(f'{name.split("/")[1][:-2]},{name}\n' for name in names))


def class_names(train, val, test, pattern='{split}/{split}{number:02d}'):
    counts = {'train': train, 'val': val, 'test': test}
    return [pattern.format(split=split, number=number) for split in counts for number in range(counts[split])]


@pytest.fixture
def fresh_models(monkeypatch):
    """Models share no compiled functions with others: for tests that change what is compiled, or watch it."""
    monkeypatch.setattr(MAML, '__init__', compiled_models.make_model)


def map_eagerly(engine, parameters, function, tasks, step, mapped=Engine._map):
    """`Engine._map`; one task after the other, without the graph from which that takes the structure of the results."""
    if engine._config.engine != 'map':
        return mapped(engine, parameters, function, tasks, step)
    tasks = engine._cast(tasks)
    results = [function(parameters, step, tf.nest.map_structure(lambda array, task=task: tf.convert_to_tensor(array[task]), tasks))
               for task in range(len(tf.nest.flatten(tasks)[0]))]
    return tf.nest.map_structure(lambda *values: tf.stack(values), *results)


@pytest.fixture
def eager(monkeypatch):
    """TensorFlow runs functions as they stand, which takes less time than to compile what is run once or twice."""
    monkeypatch.setattr(Engine, '_map', map_eagerly)
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def few_tasks(monkeypatch):
    """Validation and evaluation look at fewer tasks than they do for users."""
    monkeypatch.setattr(training, 'REPORTED_TASKS', 10)
    monkeypatch.setattr(program_flags.FLAGS['validation_tasks'], 'default', 10)
    monkeypatch.setattr(program_flags.FLAGS['num_test_tasks'], 'default', 40)


@pytest.fixture(scope='session')
def small_data(tmp_path_factory):
    """{source: a small folder of images such as it wants}."""
    root = tmp_path_factory.mktemp('data')
    names = class_names(24, 21, 22, 'alphabet/{split}{number:02d}')
    write_image_tree(root / 'omniglot', names, images=6, size=(28, 28))
    write_manifest(root / 'omniglot', names)
    for source, size in ('miniimagenet', (84, 84, 3)), ('cifarfs', (32, 32, 3)), ('fc100', (32, 32, 3)):
        write_image_tree(root / source, class_names(6, 5, 5), images=20, size=size)
    for source, size in ('doublemnist', (64, 64)), ('triplemnist', (84, 84)):
        write_image_tree(root / source, class_names(6, 5, 5), images=6, size=size)
    write_image_tree(root / 'folder', [f'class {number}' for number in range(32)], images=4, size=(40, 30, 3))
    rng = np.random.default_rng(0)
    for name in class_names(6, 5, 5):
        os.makedirs((root / 'table' / name).parent, exist_ok=True)
        rows = np.random.default_rng(len(name)).normal(rng.normal(0, 5, 3), 1, (20, 3))
        np.savetxt(root / 'table' / f'{name}.csv', rows, delimiter=',', header='a,b,c', comments='')
    alike = dict.fromkeys(['tieredimagenet', 'cub', 'flowers', 'aircraft', 'dtd'], 'miniimagenet') | {'gtsrb': 'cifarfs'}
    return {path.name: path for path in root.iterdir()} | {name: root / other for name, other in alike.items()}


@pytest.fixture(scope='session')
def small_omniglot(small_data):
    """A folder like data/omniglot_resized with 24 + 21 + 22 classes of 6 images each."""
    return small_data['omniglot']
