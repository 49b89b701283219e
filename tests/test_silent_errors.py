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

from conftest import ROOT, class_names, error_of, run_ok, write_image_tree, write_manifest
from data import preparation
from data_generator import SOURCES
from runtime.datasets import class_folders, images
from runtime.jobs import evaluate as evaluation
from runtime.results import across, plots
from runtime.results import store as results
from runtime.results.collect import Evaluation
from runtime.system.errors import UserError

OMNIGLOT = SOURCES['omniglot']


def png(value):
    return preparation.encode(Image.new('RGB', (4, 4), (value, value, value)))


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

@pytest.mark.parametrize('removed', [0, 1, 3])
def test_a_kill_while_force_removes_pictures(removed, tmp_path, monkeypatch):
    prepare(tmp_path)
    assert complete(tmp_path)
    remove, done = os.remove, []

    def killed(path):
        if len(done) == removed:
            raise SystemError('killed')
        done.append(path)
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'remove', killed)
        with pytest.raises(SystemError):
            prepare(tmp_path, force=True)
    assert not complete(tmp_path)
    prepare(tmp_path)  # goes on: what is left may be of another recipe, and is made again
    assert complete(tmp_path) and len(list(tmp_path.glob('train/a/*.png'))) == 4


def test_a_preparation_that_cannot_print_is_not_complete(tmp_path, monkeypatch):
    def broken(*arguments, **others):
        raise BrokenPipeError(32, 'Broken pipe')

    with monkeypatch.context() as patch:
        patch.setattr(builtins, 'print', broken)
        with pytest.raises(SystemExit):
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

    def lossy(pictures, destination):
        found = write_all(pictures, destination)
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

def entry(**tasks):
    return {'checkpoint': 'model5', 'score': 'accuracy', 'method': 'MAML', 'flags': {},
            'tasks': {'datasource': 'folder', 'split': 'val', **tasks}}


def write(folder, name='x', score='accuracy', **tasks):
    folder.mkdir(exist_ok=True)
    results.write(str(folder), name, np.random.default_rng(len(name)).random((4, 3)), {**entry(**tasks), 'score': score})


def test_evaluations_of_other_tasks_are_not_compared(tmp_path):
    write(tmp_path / 'a', rotations=False)
    write(tmp_path / 'b', rotations=True)
    assert 'no two evaluations were made on the same tasks' in error_of(f'--compare={tmp_path}')
    write(tmp_path / 'c', rotations=True)
    assert 'B - A' in run_ok(f'--compare={tmp_path}')


def test_accuracies_are_not_compared_with_losses(tmp_path):
    write(tmp_path / 'a')
    write(tmp_path / 'b', score='loss')
    assert 'no two evaluations were made on the same tasks' in error_of(f'--compare={tmp_path}')


def test_an_evaluation_says_how_its_tasks_were_drawn(small_data, tmp_path):
    flags = ['--datasource=folder', f'--data_path={small_data["folder"]}', '--image_size=20', '--num_classes=2', '--num_filters=2',
             '--update_batch_size=1', '--meta_batch_size=2', '--metatrain_iterations=1', '--num_test_tasks=3', '--max_pool',
             f'--logdir={tmp_path}', '--rotations']
    run_ok(*flags)
    run_ok(*flags, '--train=False')
    found, = json.loads(next(tmp_path.glob('*/results.json')).read_text()).values()
    assert found['tasks']['rotations'] is True and found['tasks']['image_shape'] == [20, 20, 3]


def test_evaluations_that_end_together_lose_nothing(tmp_path):
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda number: write(tmp_path, f'name{number}'), range(20)))
    assert len(results.existing(str(tmp_path))) == 20


SINUSOID = ['--norm=None', '--metatrain_iterations=2', '--meta_batch_size=2', '--num_test_tasks=3']


def test_starting_anew_leaves_no_old_results(tmp_path):
    run_ok(*SINUSOID, f'--logdir={tmp_path}')
    run_ok(*SINUSOID, f'--logdir={tmp_path}', '--train=False')
    directory, = tmp_path.iterdir()
    run_ok(*SINUSOID, f'--logdir={tmp_path}', '--resume=False')
    assert not (directory / 'results.json').exists() and not list(directory.glob('test_*'))
    assert (directory / 'earlier1' / 'results.json').exists() and list((directory / 'earlier1').glob('test_*.csv'))


def test_damaged_results_are_found_before_the_work(tmp_path, monkeypatch):
    run_ok(*SINUSOID, f'--logdir={tmp_path}')
    directory, = tmp_path.iterdir()
    (directory / 'results.json').write_text('{')
    monkeypatch.setattr(evaluation, 'evaluate_tasks', None)  # would fail if called
    assert 'results.json cannot be read' in error_of(*SINUSOID, f'--logdir={tmp_path}', '--train=False')


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
    def run(*arguments, **others):
        raise AssertionError('Ghostscript was run')

    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', run)
    (tmp_path / 'x.jpg').write_bytes(EPS)
    for resize in True, False:
        with pytest.raises(UserError, match='x.jpg cannot be read as an image'):
            list(images.decode_images([str(tmp_path / 'x.jpg')], (8, 8, 3), resize, 'remove it', ''))
    assert not images.readable_suffixes() & {'.eps', '.ps', '.h5', '.hdf', '.mpg', '.mpeg', '.wmf', '.emf'}
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
    with pytest.raises(preparation.DAMAGE):
        if script == 'omniglot':
            load_script('omniglot_resized/resize_images.py').resize(EPS, antialias=False)
        else:
            load_script('miniImagenet/proc_images.py').fit(EPS)
    shutil.rmtree(tmp_path)


def test_a_kill_between_the_files_of_an_evaluation_and_its_results(tmp_path, monkeypatch):
    """The files of a new checkpoint are there, results.json knows the old one: its figures are not taken for the new one's."""
    def facts(checkpoint):
        return {'checkpoint': checkpoint, 'score': 'loss', 'flags': {}, 'tasks': {'datasource': 'sinusoid', 'split': 'val', 'count': 3}}

    def killed(path, content, write=results.write_atomically):
        if path.endswith(results.FILE):
            raise KeyboardInterrupt
        write(path, content)

    results.write(str(tmp_path), 'n', np.full((3, 3), 1.), facts('model1'))
    with monkeypatch.context() as patch:
        patch.setattr(results, 'write_atomically', killed)
        with pytest.raises(KeyboardInterrupt):
            results.write(str(tmp_path), 'n', np.full((3, 3), 2.), facts('model2'))
    results.write(str(tmp_path), 'n', np.full((3, 3), 2.), facts('model2'))
    entries = results.existing(str(tmp_path))
    assert {entry['file']: entry['scores'][0][0] for entry in entries.values()} == {'n_model1': 1., 'n': 2.}
    for entry in entries.values():
        assert np.array_equal(np.load(tmp_path / f'{entry["file"]}.pkl', allow_pickle=True)['mses'], entry['scores'])


def test_a_table_across_sources_keeps_other_data_apart():
    """Other images, or rotated ones, under one description: a column each."""
    tasks = {'datasource': 'folder', 'split': 'test', 'count': 3, 'num_classes': 5, 'update_batch_size': 1, 'query_shots': 1, 'seed': 0}
    found = [Evaluation('run', f'n{number}', None, {'checkpoint': 'model1', 'score': 'accuracy', 'flags': {}, 'scores': [[0.1, value]] * 3,
                                                    'tasks': {**tasks, **more}})
             for number, (value, more) in enumerate([(0.2, {'data': 1}), (0.5, {'data': 2}), (0.9, {'data': 1, 'rotations': True})])]
    table, = across.tables(found)
    assert len(set(table.targets)) == 3 and sorted(table.text(0, column)[:5] for column in range(3)) == ['20.00', '50.00', '90.00']


def test_a_table_across_sources_keeps_ways_to_adapt_apart():
    """Other step sizes or weights from elsewhere are rows of their own; a name for several runs does not make them one."""
    tasks = {'datasource': 'sinusoid', 'split': 'test', 'count': 3, 'update_batch_size': 5, 'query_shots': 5, 'seed': 0, 'data': 1}

    def one(number, directory='run', given=None, checkpoint='run/model1', **flags):
        return Evaluation(directory, f'n{number}', given, {'checkpoint': checkpoint, 'score': 'loss', 'scores': [[1.0, number]] * 3,
                                                           'tasks': tasks, 'flags': {'num_updates': 1, **flags}})

    table, = across.tables([one(0, update_lr=0.01), one(1, update_lr=0.1), one(2, checkpoint='a/model1', load_from='a/model1'),
                            one(3, checkpoint='b/model1', load_from='b/model1')])
    assert len(set(table.models)) == 4 and [table.text(row, 0)[:1] for row in range(4)] == ['0', '1', '2', '3']
    assert [bool('--update_lr=0.1' in model) for model in table.models] == [False, True, False, False]
    table, = across.tables([one(0, 'runs/a', 'mine'), one(1, 'runs/b', 'mine'), one(2, 'other', 'other')])
    assert [model.split(',')[:2] for model in table.models] == [['mine', ' runs/a'], ['mine', ' runs/b'], ['other']]


def write_results(folder, **entries):
    """A run's results.json: {name: (mean, flags, what else an entry has)}."""
    tasks = {'datasource': 'sinusoid', 'split': 'test', 'count': 3, 'update_batch_size': 5, 'query_shots': 5, 'seed': 0, 'data': 1}
    folder.mkdir()
    (folder / 'results.json').write_text(json.dumps({f'{name}, test': {
        'checkpoint': f'{folder}/model10', 'score': 'loss', 'scores': [[9.0, mean + task / 10] for task in range(3)], 'tasks': tasks,
        'flags': {'num_updates': 1, 'seed': 0, **flags}, **more} for name, (mean, flags, more) in entries.items()}))


@pytest.mark.parametrize('method, one, other, alike', [
    ('MAML', {}, {}, True),
    ('MAML', {'recompute': False}, {'recompute': True}, True),
    ('Reptile', {'inner_batch': 1}, {'inner_batch': 5}, False),
    ('pre-training', {'inner_weights': 'all'}, {'inner_weights': 'head'}, False),
    ('MAML', {'metatrain_iterations': 10}, {'metatrain_iterations': 20}, True),
    ('MAML', *({'metatrain_iterations': count, 'meta_lr_schedule': 'linear'} for count in (10, 20)), False),
])
def test_means_over_seeds_are_of_runs_that_are_alike(method, one, other, alike, tmp_path):
    for seed, flags in enumerate([one, other]):
        write_results(tmp_path / str(seed), n=(1.0 + 2 * seed, {**flags, 'seed': seed}, {'method': method}))
    assert ('2.1000 (1.4142)' in run_ok(f'--compare={tmp_path}')) == alike


def test_means_over_seeds_are_of_all_seeds(tmp_path):
    """Of each one's own best checkpoint, or ensemble, whichever they are, and one that is the newest, too."""
    for seed in range(3):
        flags = {'seed': seed, 'metatrain_iterations': 10}
        best = {} if seed == 2 else {'checkpoint': f'runs/model{seed}'}
        more = {'ensemble': [seed, 7], 'method': 'MAML++, ensemble of 2', 'checkpoint': f'runs/model{seed}'}
        write_results(tmp_path / str(seed), newest=(1.0 + 2 * seed, flags, {}), best=(1.0 + 2 * seed if seed == 2 else 4.0, {**flags, 'test_best': True}, best),
                      together=(2.0 * seed, flags, more))
    table = run_ok(f'--compare={tmp_path}')
    assert [f'{mean:.4f} ({std:.4f})' in table for mean, std in ((3.1, 2.0), (13 / 3 + 0.1, 1 / 3 ** 0.5), (2.1, 2.0))] == [True] * 3, table
    entries = json.loads((tmp_path / '0' / 'results.json').read_text())
    del entries['best, test']
    (tmp_path / '0' / 'results.json').write_text(json.dumps(entries))
    table = run_ok(f'--compare={tmp_path}')
    assert '3.1000 (2.0000)' in table and table.count('over seeds') == 3, table  # two means, and what they are


def test_a_table_of_nothing_comparable_is_refused(tmp_path):
    """For other programs; a person is shown the table of models against sources."""
    write_results(tmp_path / 'run', n=(1.0, {}, {'trained_on': 'harmonic'}))
    assert 'sinusoid' in run_ok(f'--compare={tmp_path}')
    for style in 'csv', 'latex':
        assert f'is what --across --format={style} prints' in error_of(f'--compare={tmp_path}', f'--format={style}')
    latex = run_ok(f'--across={tmp_path}', '--format=latex', '--plot')
    assert '\n% *: the source that the model was trained on\n' in latex and 'Drawn' not in latex


def test_curves_of_different_lengths():
    """Reptile is evaluated with 50 updates, MAML with 10."""
    for lengths in (51, 11), (11, 51):
        figure = plots.curves({str(length): np.random.default_rng(0).uniform(1, 2, (5, length)) for length in lengths}, 'loss', 'x')
        axes, = figure.axes
        assert axes.get_xlim()[1] > 50 and len(axes.get_xticks()) == 11 and axes.get_yscale() == 'linear'


def test_step_sizes_that_are_learned_stay(tmp_path):
    """Those of a model that --load_from names, too."""
    flags = ['--norm=None', '--meta_batch_size=2', '--log=False', '--learn_lr=layer']
    run_ok(*flags, '--metatrain_iterations=1', f'--logdir={tmp_path / "run"}')
    run, = (tmp_path / 'run').iterdir()
    loaded = [*flags, '--train=False', '--num_test_tasks=3', f'--load_from={run / "model1"}', f'--logdir={tmp_path / "other"}']
    assert 'are learned, and an evaluation cannot change them; give --update_lr=0.001' in error_of(*loaded, '--update_lr=0.5')
    assert '3 tasks' in run_ok(*loaded)
    assert 'are learned' in error_of(f'--run={run}', '--train=False', '--update_lr=0.5')


def test_weights_of_another_source_are_no_home_match(tmp_path):
    """A model of the sinusoid, given by --load_from, is not one of the source that it is evaluated on."""
    flags = ['--norm=None', '--meta_batch_size=2', '--log=False']
    run_ok(*flags, '--metatrain_iterations=1', f'--logdir={tmp_path / "sine"}')
    run, = (tmp_path / 'sine').iterdir()
    run_ok(*flags, '--datasource=harmonic', '--train=False', '--num_test_tasks=3', f'--load_from={run / "model1"}', f'--logdir={tmp_path / "other"}')
    table = run_ok(f'--across={tmp_path / "other"}')
    assert re.search(r'± [\d.]+\n', table) and not re.search(r'± [\d.]+\*', table)
    assert ',sinusoid,harmonic,' in run_ok(f'--across={tmp_path / "other"}', '--format=csv')


def test_ensembles_with_the_same_best_do_not_overwrite_each_other(tmp_path):
    for number, members in enumerate([[13, 5, 14], [13, 40, 41]]):
        results.write(str(tmp_path), 'n', np.full((2, 2), float(number)), {
            'checkpoint': 'run/model13', 'ensemble': members, 'score': 'loss', 'tasks': {'split': 'test', 'datasource': 'sinusoid'}, 'flags': {}})
    assert {name: entry['scores'][0][0] for name, entry in results.existing(str(tmp_path)).items()} == {
        'n_model13_5_14, test': 0.0, 'n, test': 1.0}


def test_links_to_what_is_not_there(tmp_path):
    """Images and class folders on a disk that is not mounted are missing, and not left out."""
    write_image_tree(tmp_path, ['a'], images=2, size=(4, 4, 3))
    os.symlink(tmp_path / 'away.png', tmp_path / 'a' / '02.png')
    paths = [str(tmp_path / 'a' / file.name) for file in images.image_files(str(tmp_path / 'a'), {'.png'})]
    with pytest.raises(images.BadImages) as error:
        list(images.decode_images(paths, (4, 4, 3), True, '', ''))
    assert [path for path, _ in error.value.images] == [str(tmp_path / 'a' / '02.png')]
    os.symlink(tmp_path / 'away', tmp_path / 'b')
    with pytest.raises(UserError, match='/b is a broken symbolic link'):
        class_folders.subfolders(str(tmp_path))


def test_evaluations_with_other_updates_do_not_overwrite_each_other(tmp_path):
    flags = ['--norm=None', '--update_batch_size=2', '--meta_batch_size=2', f'--logdir={tmp_path}', '--log=False']
    run_ok(*flags, '--metatrain_iterations=1')
    for more in [], ['--test_updates=2'], ['--test_updates=3']:
        run_ok(*flags, '--train=False', '--num_test_tasks=3', *more)
    run, = tmp_path.iterdir()
    entries = results.existing(str(run))
    assert [len(entry['updates']) for entry in entries.values()] == [11, 3, 4]
    assert [name.split(',')[0].partition('_tasks3')[2] for name in entries] == ['', '_updates2', '_updates3']
