"""What once was wrong without saying so: kills during a preparation, duplicates, stale caches, mixed or lost results."""
import builtins
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from conftest import ROOT, an_entry, class_names, error_of, results_of, run_ok, write_image_tree, write_manifest
from data import preparation, reading
from data_generator import SOURCES
from runtime.cli.flags import FLAGS
from runtime.datasets import class_folders, images
from runtime.jobs import evaluate as evaluation
from runtime.results import across, plots, render, store
from runtime.results.collect import RunEntry
from runtime.system.errors import UserError

OMNIGLOT = SOURCES['omniglot']


def png(value):
    return reading.encode(Image.new('RGB', (4, 4), (value, value, value)))


def prepare(destination, count=4, names=None, **more):
    """Prepares one class of small pictures in this process."""
    flags = [f'--{name}' for name in more if more[name]]
    args = preparation.arguments('', '', str(destination)).parse_args(flags)
    names = names or [f'train/a/{number}.png' for number in range(count)]
    pictures = [preparation.Picture(name, lambda number=number: png(number)) for number, name in enumerate(names)]
    preparation.prepare(pictures, {'train/a': preparation.Class('train', len(names))}, (4, 4), args)


def complete(destination):
    return json.loads((destination / '.prepared.json').read_text())['complete']


# Preparations

@pytest.mark.parametrize('made', [0, 1, 3])
def test_a_kill_while_force_replaces_pictures(made, tmp_path, monkeypatch):
    prepare(tmp_path)
    assert complete(tmp_path)
    files = sorted(tmp_path.glob('train/a/*.png'))
    old = [path.stat().st_mtime_ns for path in files]
    write, done = preparation.write_atomically, []

    def killed(path, content):
        if str(path).endswith('.png'):
            done.append(path)
            if len(done) > made:
                raise SystemError('killed')
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, 'write_atomically', killed)
        with pytest.raises(SystemError):
            prepare(tmp_path, force=True)
    assert not complete(tmp_path)
    prepare(tmp_path)  # what is left may be of another recipe, so that all of them are made again
    assert complete(tmp_path) and all(path.stat().st_mtime_ns > time for path, time in zip(files, old))


def test_an_image_that_can_no_longer_be_made_does_not_stay(tmp_path):
    prepare(tmp_path)
    args = preparation.arguments('', '', str(tmp_path)).parse_args(['--force', '--allow_missing'])
    pictures = [preparation.Picture('train/a/0.png', lambda: png(0)), preparation.Picture('train/a/1.png', lambda: 1 / 0)]
    preparation.prepare(pictures, {'train/a': preparation.Class('train', 2)}, (4, 4), args)
    assert not (tmp_path / 'train/a/1.png').exists() and complete(tmp_path)


def test_a_preparation_that_cannot_print_is_not_complete(tmp_path, monkeypatch):
    def broken(*arguments, **others):
        raise BrokenPipeError(32, 'Broken pipe')

    with monkeypatch.context() as patch:
        patch.setattr(builtins, 'print', broken)
        with pytest.raises(BrokenPipeError):
            prepare(tmp_path)
    assert not complete(tmp_path)


def test_images_of_one_name_are_refused(tmp_path):
    """Six images of four names: the count of what is listed would be right, that of what is on the disk is not."""
    names = [f'train/a/{number % 4}.png' for number in range(6)]
    with pytest.raises(SystemExit, match='2 file names stand for more than one image of their class, first train/a/0.png'):
        prepare(tmp_path, names=names)
    assert not complete(tmp_path)


def test_what_is_counted_is_on_the_disk(tmp_path, monkeypatch):
    """A file that goes between being written and being counted."""
    write_all = preparation.write_all

    def lossy(pictures, destination, again):
        found = write_all(pictures, destination, again)
        os.remove(os.path.join(destination, pictures[0].name))
        return found

    monkeypatch.setattr(preparation, 'write_all', lossy)
    with pytest.raises(SystemExit, match='1 classes have another number of images than they should, first train/a with 3 instead'):
        prepare(tmp_path)
    assert not complete(tmp_path)


# The cache

def omniglot_folder(root):
    names = class_names(5, 5, 5, 'alphabet/{split}{number:02d}')
    write_image_tree(root, names, images=3, size=(28, 28))
    write_manifest(root, names)
    for path in root.glob('alphabet/*/*.png'):  # one size and one time, as an archive unpacks
        path.write_bytes(path.read_bytes().ljust(400, b'\0'))
        os.utime(path, (1e9, 1e9))


def decoded(root):
    return np.array(OMNIGLOT.load('train', str(root)).values)


def test_swapped_class_folders(tmp_path):
    omniglot_folder(tmp_path)
    before, folder = decoded(tmp_path), tmp_path / 'alphabet'
    for source, destination in ('train00', 'aside'), ('train01', 'train00'), ('aside', 'train01'):
        (folder / source).rename(folder / destination)
    after = decoded(tmp_path)
    assert np.array_equal(after[:3], before[3:6]) and np.array_equal(after[3:6], before[:3])


def test_files_overwritten_in_place_with_their_old_times(tmp_path):
    omniglot_folder(tmp_path)
    before, path = decoded(tmp_path), tmp_path / 'alphabet' / 'train00' / '00.png'
    path.write_bytes((tmp_path / 'alphabet' / 'train03' / '00.png').read_bytes())
    os.utime(path, (1e9, 1e9))
    assert np.array_equal(decoded(tmp_path)[0], before[9]) and not np.array_equal(before[0], before[9])


# Results

def write(folder, metric='accuracy', seed=0, **facts):
    folder.mkdir(exist_ok=True)
    tasks = {'datasource': 'folder', 'seed': seed, 'facts': facts}
    store.add(str(folder), an_entry(np.random.default_rng(0).random((4, 3)), metric, tasks=tasks, datasource='folder'))


def test_evaluations_of_other_tasks_are_not_compared(tmp_path):
    write(tmp_path / 'a', rotations=False)
    write(tmp_path / 'b', rotations=True)
    assert 'no two evaluations were made on the same tasks' in error_of(f'--compare={tmp_path}')
    write(tmp_path / 'c', rotations=True)
    assert 'B - A' in run_ok(f'--compare={tmp_path}')


def test_accuracies_are_not_compared_with_losses(tmp_path):
    write(tmp_path / 'a')
    write(tmp_path / 'b', metric='loss')
    assert 'no two evaluations were made on the same tasks' in error_of(f'--compare={tmp_path}')


@pytest.mark.slow
def test_an_evaluation_says_how_its_tasks_were_drawn(small_data, tmp_path):
    flags = ['--datasource=folder', f'--data_path={small_data["folder"]}', '--image_size=20', '--num_classes=2', '--conv=False',
             '--hidden=4', '--engine=map', '--update_batch_size=1', '--meta_batch_size=2', '--metatrain_iterations=1',
             '--num_test_tasks=3', f'--logdir={tmp_path}', '--rotations']
    run_ok(*flags)
    run_ok(*flags, '--train=False')
    entry, = results_of(next(tmp_path.glob('cls*')))
    assert entry.tasks.facts == {'rotations': True, 'image_shape': [20, 20, 3]}


def test_evaluations_that_end_together_lose_nothing(tmp_path):
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda seed: write(tmp_path, seed=seed), range(20)))
    assert len(results_of(tmp_path)) == 20


SINUSOID = ['--norm=None', '--metatrain_iterations=2', '--meta_batch_size=2', '--num_test_tasks=3', '--engine=map']


@pytest.mark.slow
def test_starting_anew_leaves_no_old_results(tmp_path, monkeypatch):
    monkeypatch.setattr(FLAGS['num_test_tasks'], 'default', 3)  # those of SINUSOID: the reference's files are written, too
    run_ok(*SINUSOID, f'--logdir={tmp_path}')
    run_ok(*SINUSOID, f'--logdir={tmp_path}', '--train=False', '--plot')
    directory, = tmp_path.iterdir()
    shutil.copy(directory / 'results.json', directory / 'shipped_results.json')
    names = {'results.json', 'shipped_results.json', 'test_ubs5_stepsize0.001.csv', 'evaluation_val_model2_updates.png'}
    assert names <= {path.name for path in directory.iterdir()}
    run_ok(*SINUSOID, f'--logdir={tmp_path}', '--resume=False')
    assert not names.intersection(path.name for path in directory.iterdir())
    assert names <= {path.name for path in (directory / 'earlier1').iterdir()}


def test_damaged_results_are_found_before_the_work(tmp_path, monkeypatch):
    run_ok(*SINUSOID, f'--logdir={tmp_path}')
    directory, = tmp_path.iterdir()
    monkeypatch.setattr(evaluation, 'evaluate_tasks', None)  # would fail if called
    for content, words in ('{', ''), ('{"x": 3}', 'version is 1, and this program reads version 2'):
        (directory / 'results.json').write_text(content)
        assert 'results.json cannot be read: ' + words in error_of(*SINUSOID, f'--logdir={tmp_path}', '--train=False')


def test_a_picture_is_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / 'x.png'
    path.write_bytes(b'the old picture')
    figure = plots.curves({'run': np.ones([3, 2])}, 'loss', 'x')
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
        with pytest.raises(UserError, match='No space left'):
            plots.save(figure, str(path))
    assert path.read_bytes() == b'the old picture' and [other.name for other in tmp_path.iterdir()] == ['x.png']
    plots.save(figure, str(path))
    assert Image.open(path).size[0] > 100


# Formats

EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 setgray 0 0 8 8 rectfill\n%%EOF\n'


def test_no_interpreter_is_run_on_an_image(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    runs = []
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *arguments, **others: runs.append(arguments))
    (tmp_path / 'x.jpg').write_bytes(EPS)
    for resize in True, False:
        with pytest.raises(UserError, match='x.jpg cannot be read as an image'):
            list(images.decode_images([str(tmp_path / 'x.jpg')], (8, 8, 3), resize, 'remove it', ''))
    assert not runs and not images.readable_suffixes() & {'.eps', '.ps', '.h5', '.hdf', '.mpg', '.mpeg', '.wmf', '.emf'}
    assert images.readable_suffixes() >= {'.png', '.jpg', '.jpeg', '.gif', '.bmp', '.tif', '.tiff', '.webp'}


def test_prepared_images_are_decoded_in_a_fresh_process(small_omniglot):
    """Where nothing has made Pillow register its formats before."""
    program = (f'import sys; sys.path.insert(0, {ROOT!r})\nfrom runtime.datasets.images import decode_images\n'
               f'print(next(decode_images([{str(small_omniglot / "alphabet" / "train00" / "00.png")!r}], (28, 28, 1), False, "", "")'
               ').shape)')
    process = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert process.stdout == '(1, 28, 28, 1)\n', process.stderr


@pytest.mark.parametrize('script', ['miniImagenet', 'omniglot'])
def test_no_interpreter_is_run_on_a_download(script, tmp_path, monkeypatch):
    from test_hostile_input import load_script
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *_, **__: pytest.fail('Ghostscript was run'))
    with pytest.raises(reading.DAMAGE):
        if script == 'omniglot':
            load_script('omniglot_resized/resize_images.py').resize(EPS, antialias=False)
        else:
            load_script('miniImagenet/proc_images.py').fit(EPS, (84, 84))
    shutil.rmtree(tmp_path)


def test_the_last_evaluation_of_a_checkpoint_in_a_setting_counts(tmp_path):
    """It replaces the one before; another checkpoint, ensemble, setting or other tasks make another entry."""
    def add(value, **more):
        store.add(str(tmp_path), an_entry(np.full((3, 3), value), **more))

    others = [{}, {'checkpoint': 'model6'}, {'ensemble': [5, 6]}, {'ensemble': [5, 7]}, {'setting': {'query_norm': 'support'}},
              {'setting': {'load_from': '/a/model5'}}, {'setting': {'headline_updates': 2}},
              {'setting': {'test_updates': 3}}, {'tasks': {'data': 1}}, {'tasks': {'split': 'test'}}, {'tasks': {'query_shots': 2}}]
    for value in 1.0, 2.0:
        for more in others:
            add(value, **more)
    entries = results_of(tmp_path)
    assert len(entries) == len(others) and all(entry.scores[0][0] == 2.0 for entry in entries)
    assert entries[1].checkpoint == 'model6', 'the order stays'


def matrix_of(evaluations):
    matrix, = across.matrices_of([RunEntry(*evaluation) for evaluation in evaluations])
    return matrix


def test_a_table_across_sources_keeps_other_data_apart():
    """Other images, or rotated ones, under one description: a column each."""
    matrix = matrix_of([('run', None, an_entry([[0.1, value]] * 3, 'accuracy', tasks={'datasource': 'folder', **more}))
                        for value, more in [(0.2, {'data': 1}), (0.5, {'data': 2}), (0.9, {'data': 1, 'facts': {'rotations': True}})]])
    assert len(set(matrix.targets)) == 3 and sorted(matrix.text(0, column)[:5] for column in range(3)) == ['20.00', '50.00', '90.00']


def test_a_table_across_sources_keeps_ways_to_adapt_apart():
    """Other step sizes or weights from elsewhere are rows of their own; a name for several runs does not make them one."""
    def entry(value, **more):
        return an_entry([[1.0, value]] * 3, **more)

    settings = [{'update_lr': 0.01}, {'update_lr': 0.1}, {'load_from': '/a/model1'}, {'load_from': '/b/model1'}]
    matrix = matrix_of([('run', None, entry(value, setting=setting)) for value, setting in enumerate(settings)])
    assert len(set(matrix.labels)) == 4 and [matrix.text(row, 0)[:1] for row in range(4)] == ['0', '1', '2', '3']
    assert [('update_lr=0.1' in label) for label in matrix.labels] == [False, True, False, False]
    matrix = matrix_of([('runs/a', 'mine', entry(0)), ('runs/b', 'mine', entry(1)), ('other', 'other', entry(2))])
    assert matrix.labels == ['mine, a', 'mine, b', 'other']
    assert matrix_of([('runs/a', None, entry(0)), ('runs/b', None, entry(1))]).labels == ['MAML, a', 'MAML, b']


def write_results(folder, *entries):
    """A run's results.json: of each entry the mean after an update, and what else it has."""
    folder.mkdir()
    store.write(str(folder / 'results.json'), [
        an_entry([[9.0, mean + task / 10] for task in range(3)], checkpoint=more.pop('checkpoint', 'model10'), **more)
        for mean, more in entries])


@pytest.mark.parametrize('method, one, other, alike', [
    ('MAML', {}, {}, True),
    ('Reptile', {'inner_batch': 1}, {'inner_batch': 5}, False),
    ('pre-training', {'inner_weights': 'all'}, {'inner_weights': 'head'}, False),
    ('MAML', {'training': {'metatrain_iterations': 10}}, {'training': {'metatrain_iterations': 20}}, True),
    ('MAML', {'setting': {'update_lr': 1.0}}, {}, False),
    ('MAML', {'setting': {'query_norm': 'support'}}, {}, False),
    ('MAML', *({'training': {'metatrain_iterations': count}, 'meta_lr_schedule': 'linear'} for count in (10, 20)), False),
])
def test_means_over_seeds_are_of_runs_that_are_alike(method, one, other, alike, tmp_path):
    for seed, more in enumerate([one, other]):
        write_results(tmp_path / str(seed),
                      (1.0 + 2 * seed, {**more, 'seed': seed, 'training': {'method': method, **more.get('training', {})}}))
    assert ('2.1000 (1.4142)' in run_ok(f'--compare={tmp_path}')) == alike


def test_means_over_seeds_are_of_all_seeds(tmp_path):
    """Of each one's own best checkpoint, or ensemble, whichever they are, and one that is the newest, too."""
    def write_seed(seed, with_best=True):
        newest = 1.0 + 2 * seed, {'seed': seed, 'is_best': seed == 2}
        best = 4.0, {'seed': seed, 'is_best': True, 'checkpoint': f'model{seed}'}
        together = 2.0 * seed, {'seed': seed, 'is_best': True, 'ensemble': [seed, 7], 'checkpoint': f'model{seed}'}
        write_results(tmp_path / str(seed), newest, *([best] if with_best and seed != 2 else []), together)

    for seed in range(3):
        write_seed(seed)
    table = run_ok(f'--compare={tmp_path}')
    assert [f'{mean:.4f} ({std:.4f})' in table for mean, std in ((3.1, 2.0), (13 / 3 + 0.1, 1 / 3 ** 0.5), (2.1, 2.0))] == [True] * 3, table
    shutil.rmtree(tmp_path / '0')
    write_seed(0, with_best=False)
    table = run_ok(f'--compare={tmp_path}')
    assert '3.1000 (2.0000)' in table and table.count('over seeds') == 4, table  # two means, what they are, and the table of methods


def test_models_on_other_sources_are_shown_by_across(tmp_path):
    """--compare refuses them, in every format, and says so."""
    write_results(tmp_path / 'run', (1.0, {'datasource': 'harmonic'}),
                  (2.0, {'datasource': 'harmonic', 'tasks': {'datasource': 'harmonic'}}))
    for style in 'text', 'csv', 'latex':
        assert '--across shows models' in error_of(f'--compare={tmp_path}', f'--format={style}')
    assert re.search(r'MAML +1 +2.1000 ± 0.0924\* +1.1000 ± 0.0924\n', run_ok(f'--across={tmp_path}'))
    latex = run_ok(f'--across={tmp_path}', '--format=latex', '--plot')
    assert '\n% *: the source that the model was trained on\n' in latex and 'Drawn' not in latex
    assert r'MAML & $1$ & $2.1000 \pm 0.0924^*$ & $1.1000 \pm 0.0924$ \\' in latex and 'harmonic & sinusoid' in latex


def test_numbers_of_tables_for_other_programs():
    """Seven digits, as single precision has, in csv; powers of ten in LaTeX."""
    table = render.Table('a_b', ['run', 'p'], [['x_y', 1.3e-13], ['z', float(np.float32(0.1) * 100)]])
    assert render.as_csv(table) == 'run,p\nx_y,1.3e-13\nz,10'
    table = render.Table('a_b', ['run', 'p'], [
        ['x_y', text] for text in ('1.3e-13', '4.51e+17 ± 2.00e+16', '57.40 ± 1.83+', '-', '', 'nan ± inf')])
    cells = [line.split(' & ')[1].removesuffix(r' \\') for line in render.as_latex(table).splitlines() if line.startswith(r'x\_y')]
    assert cells == [r'$1.3 \times 10^{-13}$', r'$4.51 \times 10^{17} \pm 2.00 \times 10^{16}$', r'$57.40 \pm 1.83^+$', '-', '',
                     r'$\mathrm{nan} \pm \infty$']


def test_curves_of_different_lengths():
    """Reptile is evaluated with 50 updates, MAML with 10."""
    for lengths in (51, 11), (11, 51):
        figure = plots.curves({str(length): np.random.default_rng(0).uniform(1, 2, (5, length)) for length in lengths}, 'loss', 'x')
        axes, = figure.axes
        assert axes.get_xlim()[1] > 50 and len(axes.get_xticks()) == 11 and axes.get_yscale() == 'linear'


@pytest.mark.slow
def test_step_sizes_that_are_learned_stay(tmp_path):
    """Those of a model that --load_from names, too."""
    flags = ['--norm=None', '--meta_batch_size=2', '--log=False', '--engine=map', '--learn_lr=layer']
    run_ok(*flags, '--metatrain_iterations=1', f'--logdir={tmp_path / "run"}')
    run, = (tmp_path / 'run').iterdir()
    loaded = [*flags, '--train=False', '--num_test_tasks=3', f'--load_from={run / "model1"}', f'--logdir={tmp_path / "other"}']
    assert 'are learned, and an evaluation cannot change them; give --update_lr=0.001' in error_of(*loaded, '--update_lr=0.5')
    assert '3 tasks' in run_ok(*loaded)
    assert 'are learned' in error_of(f'--run={run}', '--train=False', '--update_lr=0.5')


@pytest.mark.slow
def test_weights_of_another_source_are_no_home_match(tmp_path):
    """A model of the sinusoid, given by --load_from, is not one of the source that it is evaluated on."""
    flags = ['--norm=None', '--meta_batch_size=2', '--log=False', '--engine=map']
    run_ok(*flags, '--metatrain_iterations=1', f'--logdir={tmp_path / "sine"}')
    run, = (tmp_path / 'sine').iterdir()
    run_ok(*flags, '--datasource=harmonic', '--train=False', '--num_test_tasks=3', f'--load_from={run / "model1"}',
           f'--logdir={tmp_path / "other"}')
    table = run_ok(f'--across={tmp_path / "other"}')
    assert re.search(r'± [\d.]+\n', table) and not re.search(r'± [\d.]+\*', table)
    assert ',sinusoid,harmonic,' in run_ok(f'--across={tmp_path / "other"}', '--format=csv')


def test_links_to_what_is_not_there(tmp_path):
    """Images and class folders on a disk that is not mounted are missing, and not left out."""
    write_image_tree(tmp_path, ['a'], images=2, size=(4, 4, 3))
    os.symlink(tmp_path / 'away.png', tmp_path / 'a' / '02.png')
    paths = [str(tmp_path / 'a' / file.name) for file in images.folder_contents(str(tmp_path / 'a'), {'.png'}).images]
    with pytest.raises(images.BadImages) as error:
        list(images.decode_images(paths, (4, 4, 3), True, '', ''))
    assert [path for path, _ in error.value.images] == [str(tmp_path / 'a' / '02.png')]
    os.symlink(tmp_path / 'away', tmp_path / 'b')
    with pytest.raises(UserError, match='/b is a broken symbolic link'):
        class_folders.subfolders(str(tmp_path))
