"""Users' own images: bad ones are listed at once, folders are taken for what they are, nothing is written that is not wanted."""
import os

import numpy as np
import pytest
from PIL import Image

from conftest import class_names, error_of, run_ok, write_image_tree
from data_generator import SOURCES
from runtime.datasets.class_folders import ClassFolders
from runtime.datasets.images import BadImages
from runtime.results import plots
from runtime.system.errors import UserError

SMALL = ['--datasource=folder', '--image_size=20', '--conv=False', '--hidden=4', '--engine=map', '--meta_batch_size=2',
         '--update_batch_size=1', '--num_classes=2', '--metatrain_iterations=2', '--test_query=1']


@pytest.fixture
def damaged(tmp_path):
    """Class folders in three splits, with two bad images in train and one in test."""
    write_image_tree(tmp_path / 'data', class_names(3, 2, 2), images=4, size=(12, 20, 3))
    for name in 'train/train00/00.png', 'train/train01/01.png', 'test/test00/00.png':
        (tmp_path / 'data' / name).write_bytes(b'no image')
    return tmp_path / 'data'


def test_all_bad_images_are_named_before_training(damaged, tmp_path):
    """Those of the test split too, which a training does not read."""
    flags = [*SMALL, f'--data_path={damaged}', f'--logdir={tmp_path / "logs"}']
    error = error_of(*flags)
    for name in '3 images: ', 'train/train00/00.png', 'train/train01/01.png', 'test/test00/00.png', '--skip_bad_images':
        assert name in error, error
    assert not (tmp_path / 'logs').exists()


@pytest.mark.slow
def test_bad_images_can_be_left_out(damaged, tmp_path):
    flags = [*SMALL, f'--data_path={damaged}', f'--logdir={tmp_path / "logs"}', '--skip_bad_images']
    output = run_ok(*flags)
    assert 'Skipped in the train split (--skip_bad_images): 2 images: ' in output and '3 classes, 10 images' in output
    assert 'Skipped in the test split' in run_ok(*flags, '--train=False', '--test_set', '--num_test_tasks=2')
    assert '--skip_bad_images is for images' in error_of('--datasource=sinusoid', '--skip_bad_images')


def test_a_class_without_good_images(damaged):
    for path in (damaged / 'train' / 'train00').iterdir():
        path.write_bytes(b'no image')
    source = ClassFolders(str(damaged), split_ratios=(1, 1, 1), skip_bad_images=True)
    with pytest.raises(Exception, match='train00 .* holds no image'):
        source.load('train', (20, 20, 3))


def test_many_bad_images_are_counted():
    error = BadImages([(f'{number}.png', 'is no image') for number in range(250)], 'remove them')
    assert '250 images: ' in str(error) and 'and 150 more' in str(error)


def test_bad_images_of_a_prediction(tmp_path):
    run_ok(*SMALL[:-1], f'--data_path={tree(tmp_path)}', f'--logdir={tmp_path / "logs"}')
    write_image_tree(tmp_path / 'support', ['one', 'two'], images=2, size=(12, 20, 3))
    write_image_tree(tmp_path, ['query'], images=3, size=(12, 20, 3))
    for name in 'support/one/00.png', 'query/01.png':
        (tmp_path / name).write_bytes(b'no image')
    flags = [*SMALL[:-1], f'--data_path={tmp_path / "data"}', f'--logdir={tmp_path / "logs"}', '--predict',
             f'--support_dir={tmp_path / "support"}', f'--query_dir={tmp_path / "query"}']
    error = error_of(*flags)
    assert '2 images: ' in error and 'one/00.png' in error and 'query/01.png' in error
    output = run_ok(*flags, '--skip_bad_images')
    assert 'Skipped' in output and 'adapted to 3 images of 2 classes' in output and '02.png' in output


def tree(tmp_path):
    write_image_tree(tmp_path / 'data', class_names(3, 2, 2), images=4, size=(12, 20, 3))
    return tmp_path / 'data'


def test_a_class_may_be_called_train(tmp_path):
    """CIFAR-100 has such a class. Folders are the splits only if they hold folders."""
    names = ['train', 'bus', *(f'class{number}' for number in range(8))]
    write_image_tree(tmp_path, names, images=2, size=(8, 8, 3))
    source = SOURCES['folder']
    found = [name for split in ('train', 'val', 'test') for name in source.folders(str(tmp_path)).names(split)]
    assert sorted(found) == sorted(names)


def test_no_split_is_written_for_flags_that_do_not_fit(tmp_path):
    write_image_tree(tmp_path / 'data', [f'class{number}' for number in range(10)], images=2, size=(8, 8, 3))
    flags = [*SMALL[:-1], f'--data_path={tmp_path / "data"}', f'--logdir={tmp_path / "logs"}']
    for wrong in '--num_classes=4', '--update_batch_size=3':
        sentence = error_of(*flags, '--split=5/1/4' if 'classes' in wrong else '--split=4/3/3', wrong)
        assert ('asks for more classes' if 'classes' in wrong else 'a task needs') in sentence
        assert not (tmp_path / 'data' / 'splits.csv').exists()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(one := tmp_path / 'data' / 'class9' / 'x.png')
    for path in (tmp_path / 'data' / 'class0').glob('*.png'):
        path.unlink()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / 'data' / 'class0' / 'single.png')
    for wrong in ['--method=protonet'], ['--method=baseline', '--pretrain_iterations=1']:  # both ask how many classes there are
        assert 'a task needs 2' in error_of(*flags, '--split=4/3/3', '--num_classes=4', *wrong)
        assert not (tmp_path / 'data' / 'splits.csv').exists()
    one.rename(tmp_path / 'data' / 'class0' / 'x.png')
    assert 'Split the classes into 4 / 3 / 3' in run_ok(*flags, '--split=4/3/3')
    assert (tmp_path / 'data' / 'splits.csv').exists()


def test_no_split_is_written_for_a_checkpoint_that_is_not_there(tmp_path):
    write_image_tree(tmp_path / 'data', [f'class{number}' for number in range(10)], images=2, size=(8, 8, 3))
    flags = [*SMALL[:-1], f'--data_path={tmp_path / "data"}', '--split=4/3/3']
    assert 'checkpoint' in error_of(*flags, f'--logdir={tmp_path / "logs"}', '--train=False')
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written to'):
        run_ok(*flags, f'--logdir={tmp_path / "file"}')
    assert not (tmp_path / 'data' / 'splits.csv').exists()


@pytest.mark.slow
def test_a_training_needs_no_test_split(tmp_path):
    write_image_tree(tmp_path / 'data', [name for name in class_names(3, 2, 2) if 'test' not in name], images=4, size=(8, 8, 3))
    assert 'Training' in run_ok(*SMALL, f'--data_path={tmp_path / "data"}', f'--logdir={tmp_path / "logs"}')


@pytest.mark.slow
def test_every_validation_is_shown(tmp_path):
    """Below 500 iterations too: --test_best chooses among them."""
    output = run_ok(*SMALL, f'--data_path={tree(tmp_path)}', f'--logdir={tmp_path / "logs"}', '--save_interval=1')
    assert ('Validation of model1: ' in output and 'Validation of model2: ' in output
            and 'did best (--test_best), with an accuracy of' in output)


def test_the_graph_of_many_updates_is_announced(tmp_path):
    import main
    from maml import MAML
    from runtime.jobs.train import description
    for updates, expected in (50, False), (51, True):
        run, data = main.run_and_data(main.parse(['main.py', '--norm=None', f'--num_updates={updates}', f'--logdir={tmp_path}']))
        assert ('with --num_updates=51 that may take many minutes' in description(run, data, MAML(run.model))) == expected


@pytest.mark.parametrize('flag', ['--max_pool', '--num_filters=32'])
def test_the_sinusoid_has_no_convolutions(flag):
    assert 'is for images' in error_of('--datasource=sinusoid', flag)


def test_pictures_of_runs_that_diverged():
    """Alone on a logarithmic axis; beside others they leave the axes, which are those of the others."""
    good, bad = np.ones([3, 4]), np.array([[1, 1e3, 1e9, np.inf]] * 3)
    assert plots.curves({'bad': bad}, 'loss', 'x').axes[0].get_yscale() == 'log'
    together = plots.curves({'good': good, 'bad': bad, 'better': good / 3}, 'loss', 'x')
    axes, = together.axes
    assert axes.get_yscale() == 'linear' and 1 < axes.get_ylim()[1] < 1.1
    assert ['leaves the axes' in text.get_text() for text in together.legends[0].get_texts()] == [False, True, False]
    accuracy = np.full([50, 4], 0.99) + np.random.default_rng(0).normal(0, 0.02, [50, 4]) * [0, 1, 1, 1]
    accuracy[:, 0] = 0.2
    low, high = plots.curves({'run': accuracy}, 'accuracy', 'x').axes[0].get_ylim()
    assert low > 90 and high - low < 10, 'the band can be seen'


@pytest.mark.slow
@pytest.mark.parametrize('image_format', ['pdf', 'svg'])
def test_formats_of_pictures(tmp_path, image_format):
    flags = ['--norm=None', '--metatrain_iterations=1', '--meta_batch_size=2', '--engine=map', f'--logdir={tmp_path}']
    run_ok(*flags)
    output = run_ok(*flags, '--train=False', '--num_test_tasks=3', '--plot', f'--plot_format={image_format}')
    paths = [line.removeprefix('Drawn: ') for line in output.splitlines() if line.startswith('Drawn: ')]
    start = {'pdf': b'%PDF', 'svg': b'<?xml'}[image_format]
    assert len(paths) == 2
    for path in paths:
        with open(path, 'rb') as file:
            assert file.read(5).startswith(start)
    assert not [name for name in os.listdir(os.path.dirname(paths[0])) if name.endswith('.png')]
