"""Tasks: what they contain, that they depend on (seed, split, number) only, and the cache of decoded images."""
import dataclasses
import math
import os
import random
import re

import numpy as np
import pytest
from PIL import Image

import data_generator
from conftest import class_names, error_of, write_image_tree, write_manifest
from data_generator import SOURCES, TaskConfig
from runtime.datasets import class_folders, images, splits
from runtime.datasets.class_folders import ClassFolders
from runtime.datasets.splits import read_manifest
from runtime.datasets.tasks import SPLITS
from runtime.system.errors import UserError

OMNIGLOT = SOURCES['omniglot']


def task_config(**changes):
    return dataclasses.replace(
        TaskConfig(num_classes=5, update_batch_size=2, query_shots=3, seed=7), **changes)


@pytest.fixture
def tasks(request, small_data):
    """Tasks of every kind."""
    def make(split='train', **changes):
        data = small_data.get(request.param)
        few = {'num_classes': 2, 'query_shots': 2} if request.param == 'folder' else {}  # it has few classes and images
        config = task_config(**{'data_path': data and str(data), **few, **changes})
        return SOURCES[request.param].tasks(config, split)
    return make


every_source = pytest.mark.parametrize('tasks', SOURCES, indirect=True)


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other))


@every_source
def test_a_task_does_not_depend_on_what_was_drawn_before_or_with_it(tasks):
    whole = tasks().draw(0, 12)
    again = tasks()
    again.draw(100, 3)
    for start, count in ((7, 5), (0, 1), (3, 4)):
        assert equal(again.draw(start, count), [array[start:start + count] for array in whole])


def test_parts_of_support_rows_are_in_an_order_of_each_task(small_data):
    """Of the same rows; query rows, and tasks whose inner steps see all rows, stay shot-major."""
    def rows(inner_batch):
        config = task_config(data_path=str(small_data['omniglot']), inner_batch=inner_batch)
        return OMNIGLOT.tasks(config, 'train').draw(3, 2)

    def orders(batch):
        """Of each task, where its support rows are among those in the usual order."""
        usual = rows(0).support_x
        return [[next(index for index in range(10) if np.array_equal(usual[task, index], x)) for x in batch.support_x[task]]
                for task in range(2)]

    assert equal(rows(10), rows(0)) and equal(rows(4), rows(4))
    first, second = orders(rows(4))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second and list(range(10)) not in (first, second)
    for task, order in enumerate((first, second)):
        assert np.array_equal(rows(4).support_y[task], rows(0).support_y[task, order])
    assert np.array_equal(rows(4).query_x, rows(0).query_x)


@every_source
def test_tasks_differ_between_numbers_splits_and_seeds(tasks):
    first, second = tasks().draw(0, 1), tasks().draw(1, 1)
    assert not equal(first, second)
    assert not equal(first, tasks('val').draw(0, 1))
    assert not equal(first, tasks(seed=8).draw(0, 1))


@pytest.mark.parametrize('tasks', [name for name, source in SOURCES.items() if source.supervised], indirect=True)
def test_shapes_and_types(tasks):
    config, source = tasks().config, getattr(tasks(), 'source', SOURCES['sinusoid'])
    way = config.num_classes if source.loss == 'xent' else 1
    dim_input = math.prod(source.image_shape) if source.image_shape else 3 if way > 1 else 1
    support_rows, query_rows, dim_output = 2 * way, config.query_shots * way, source.dim_output(config)
    batch = tasks().draw(0, 4)
    assert [array.shape for array in batch] == [(4, support_rows, dim_input), (4, support_rows, dim_output),
                                                (4, query_rows, dim_input), (4, query_rows, dim_output)]
    assert all(array.dtype == np.float32 for array in batch)
    assert not source.image_shape or 0 <= batch.support_x.min() < batch.support_x.max() <= 1


# Functions

def test_sinusoids_and_lines():
    tasks = SOURCES['sinusoid_line'].tasks(task_config(update_batch_size=10, query_shots=10), 'train')
    batch, (line, first, second) = tasks.draw(0, 4000), tasks.parameters(0, 4000)
    x, y = np.concatenate([batch.support_x, batch.query_x], axis=1), np.concatenate([batch.support_y, batch.query_y], axis=1)
    np.testing.assert_allclose(y, np.where(line, first * x + second, first * np.sin(x - second)), atol=1e-4)
    assert abs(line.mean() - 0.5) < 0.03 and -5 <= x.min() < -4.9 and 4.9 < x.max() <= 5
    for values, low, high in ((first[line], -3, 3), (second[line], -3, 3), (first[~line], 0.1, 5), (second[~line], 0, math.pi)):
        assert low <= values.min() < low + 0.05 and high - 0.05 < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.15


def test_harmonic_functions():
    tasks = SOURCES['harmonic'].tasks(task_config(update_batch_size=10, query_shots=10), 'train')
    batch, (a1, a2, w, b1, b2, place) = tasks.draw(0, 4000), tasks.parameters(0, 4000)
    x, y = np.concatenate([batch.support_x, batch.query_x], axis=1), np.concatenate([batch.support_y, batch.query_y], axis=1)
    np.testing.assert_allclose(y, a1 * np.sin(w * x + b1) + a2 * np.sin(2 * w * x + b2), atol=1e-4)
    for values in a1, a2, x - place:
        assert abs(values.mean()) < 0.06 and abs(values.std() - 1) < 0.05
    for values, low, high in ((w, 5, 7), (b1, 0, 2 * math.pi), (b2, 0, 2 * math.pi), (place, -4, 4)):
        assert low <= values.min() < low + 0.05 and high - 0.05 < values.max() <= high


@pytest.mark.parametrize('source', ['sinusoid', 'sinusoid_line', 'harmonic'])
def test_grids_lie_on_the_functions(source):
    tasks = SOURCES[source].tasks(task_config(), 'val')
    x, y = tasks.grid(3, 2, points=50)
    parameters = tasks.parameters(3, 2)
    np.testing.assert_allclose(y, tasks.family.values(parameters, x.astype(float)), atol=1e-4)
    low, high = tasks.family.plot_range(parameters)
    np.testing.assert_allclose(x[:, [0, -1], 0], np.concatenate([low, high], axis=1), rtol=1e-6)
    assert all(tasks.family.describe(tasks.parameters(task, 1)) for task in range(4))


# Sinusoid

def test_sinusoid_is_a_sine_of_the_stated_ranges():
    config = task_config(update_batch_size=10, query_shots=10, baseline='oracle')
    batch = SOURCES['sinusoid'].tasks(config, 'train').draw(0, 4000)
    x, amplitude, phase = np.moveaxis(np.concatenate([batch.support_x, batch.query_x], axis=1), -1, 0)
    y = np.concatenate([batch.support_y, batch.query_y], axis=1)[..., 0]
    np.testing.assert_allclose(y, amplitude * np.sin(x - phase), atol=1e-5)
    for values, low, high in ((x, -5, 5), (amplitude, 0.1, 5), (phase, 0, np.pi)):
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)
    assert (np.ptp(amplitude, axis=1) == 0).all() and (np.ptp(phase, axis=1) == 0).all()
    correlations = np.corrcoef([x[:, 0], x[:, 1], amplitude[:, 0], phase[:, 0]])
    assert np.abs(correlations - np.eye(4)).max() < 0.06


def test_the_oracle_sees_the_same_tasks():
    plain, oracle = (SOURCES['sinusoid'].tasks(task_config(baseline=baseline), 'test').draw(0, 3)
                     for baseline in (None, 'oracle'))
    assert np.array_equal(plain.support_y, oracle.support_y)
    assert np.array_equal(plain.query_x[..., 0], oracle.query_x[..., 0])


# Images

@pytest.fixture
def omniglot_tasks(small_omniglot):
    return lambda split='train', **changes: OMNIGLOT.tasks(task_config(data_path=str(small_omniglot), **changes), split)


def write_small_omniglot(root, images):
    names = class_names(5, 5, 5, 'alphabet/{split}{number:02d}')
    write_image_tree(root, names, images, size=(28, 28))
    write_manifest(root, names)


def labels_of(one_hot):
    assert set(np.unique(one_hot)) == {0, 1} and (one_hot.sum(axis=-1) == 1).all()
    return one_hot.argmax(axis=-1)


def test_each_run_of_n_rows_holds_every_class_once_in_a_fresh_order(omniglot_tasks):
    batch = omniglot_tasks().draw(0, 200)
    labels = labels_of(np.concatenate([batch.support_y, batch.query_y], axis=1)).reshape(-1, 5)
    assert (np.sort(labels, axis=1) == np.arange(5)).all()
    # Each label stands equally often in each place: 1000 runs, 200 expected, standard deviation 12.6.
    counts = np.array([(labels == label).sum(axis=0) for label in range(5)])
    assert np.abs(counts - 200).max() < 60


def test_images_of_a_task_are_distinct_and_of_the_right_class(small_omniglot, omniglot_tasks):
    """Found again on disk, after undoing inversion and trying the four rotations."""
    names = read_manifest(small_omniglot / 'splits.csv')['train']
    on_disk = {}
    for name in names:
        for number in range(6):
            pixels = np.asarray(Image.open(small_omniglot / name / f'{number:02d}.png')) > 127
            for turns in range(4):
                on_disk[np.rot90(pixels, turns).tobytes()] = name, number, turns
    batch = omniglot_tasks().draw(0, 30)
    turns_seen = set()
    for task in range(30):
        rows = np.concatenate([batch.support_x[task], batch.query_x[task]])
        assert set(np.unique(rows)) == {0, 1}
        labels = labels_of(np.concatenate([batch.support_y[task], batch.query_y[task]]))
        found = [on_disk[(row.reshape(28, 28) < 0.5).tobytes()] for row in rows]
        assert len({(name, number) for name, number, _ in found}) == 25
        of_label = [{(name, turns) for (name, _, turns), other in zip(found, labels) if other == label}
                    for label in range(5)]
        assert all(len(kinds) == 1 for kinds in of_label)  # one class, one rotation
        assert len({kinds.pop()[0] for kinds in [set(kinds) for kinds in of_label]}) == 5
        turns_seen |= {turns for _, _, turns in found}
    assert turns_seen == {0, 1, 2, 3}


def test_ink_is_one(tmp_path):
    write_small_omniglot(tmp_path, images=2)
    for path in tmp_path.glob('alphabet/*/*.png'):
        Image.new('L', (28, 28), 255).save(path)  # blank paper
    batch = OMNIGLOT.tasks(task_config(update_batch_size=1, query_shots=1, data_path=str(tmp_path)), 'train').draw(0, 1)
    assert not batch.support_x.any()


@pytest.mark.parametrize('changes, words', [
    (dict(num_classes=25), ['--num_classes=25', '24', 'train']),
    (dict(update_batch_size=4), ['7 images', 'alphabet/train', 'has 6', 'lower --update_batch_size']),
])
def test_tasks_that_cannot_be_drawn_are_refused(omniglot_tasks, changes, words):
    with pytest.raises(UserError) as error:
        omniglot_tasks(**changes)
    assert all(word in str(error.value) for word in words)


def test_the_shipped_split():
    """1100/100/423 of the 1623 characters: the sorted list, shuffled with seed 1."""
    path = os.path.join(data_generator.DATA_FOLDER, OMNIGLOT.folder, 'splits.csv')
    splits = list(read_manifest(path).values())
    assert [len(names) for names in splits] == [1100, 100, 423]
    characters = sorted(sum(splits, []))
    assert len(set(characters)) == 1623 and len({name.split('/')[0] for name in characters}) == 50
    random.Random(1).shuffle(characters)
    assert [sorted(characters[:1100]), sorted(characters[1100:1200]), sorted(characters[1200:])] == splits


# The cache

@pytest.fixture
def own_omniglot(tmp_path):
    write_small_omniglot(tmp_path, images=5)
    return tmp_path


def decoded(root):
    return np.array(OMNIGLOT.load('train', str(root)).values)


def cache_files(root):
    return [root / '.cache' / name for name in ('train_28x28x1.npy', 'train_28x28x1.json')]


def test_images_are_decoded_once(own_omniglot, monkeypatch):
    first = decoded(own_omniglot)
    monkeypatch.setattr(class_folders, 'decode_images', None)  # would fail if called
    assert np.array_equal(decoded(own_omniglot), first)


@pytest.mark.parametrize('file', [0, 1])
@pytest.mark.parametrize('damage', ['delete', 'empty', 'truncate', 'flip'])
def test_a_damaged_cache_is_rebuilt(own_omniglot, file, damage):
    expected = decoded(own_omniglot)
    path = cache_files(own_omniglot)[file]
    content = path.read_bytes()
    if damage == 'delete':
        path.unlink()
    else:
        flipped = bytearray(content)
        flipped[-10] ^= 1
        path.write_bytes({'empty': b'', 'truncate': content[:len(content) // 2], 'flip': bytes(flipped)}[damage])
    assert np.array_equal(decoded(own_omniglot), expected)
    assert re.sub(rb'"mtime_ns": \d+', b'', path.read_bytes()) == re.sub(rb'"mtime_ns": \d+', b'', content)


def test_a_stale_cache_is_rebuilt(own_omniglot):
    decoded(own_omniglot)
    changed = own_omniglot / 'alphabet' / 'train00' / '00.png'
    Image.new('L', (28, 28), 77).save(changed)
    assert (decoded(own_omniglot)[0] == 77).all()
    (own_omniglot / 'alphabet' / 'train00' / '01.png').unlink()
    assert len(decoded(own_omniglot)) == 24


def test_without_a_place_for_the_cache_the_images_are_decoded_all_the_same(own_omniglot, capsys):
    (own_omniglot / '.cache').write_text('a file where the folder should be')
    assert len(decoded(own_omniglot)) == 25
    assert 'could not be kept' in capsys.readouterr().err


# Bad folders

def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match='there is no folder .*nowhere; .*resize_images.py'):
        OMNIGLOT.load('train', str(tmp_path / 'nowhere'))


def test_missing_and_empty_classes(own_omniglot):
    folder = own_omniglot / 'alphabet' / 'train03'
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match='the class folder alphabet/train03 in .* holds no image'):
        decoded(own_omniglot)
    folder.rmdir()
    with pytest.raises(UserError, match='1 of the 5 class folders of the train split are missing in .*, first alphabet/train03'):
        decoded(own_omniglot)


@pytest.mark.parametrize('content', [b'', b'not an image', b'\x89PNG\r\n\x1a\n' + b'\0' * 30])
def test_a_file_that_is_no_image(own_omniglot, content):
    path = own_omniglot / 'alphabet' / 'train02' / '03.png'
    path.write_bytes(content)
    with pytest.raises(UserError, match='train02/03.png cannot be read as an image'):
        decoded(own_omniglot)


def test_an_image_of_another_size(own_omniglot):
    Image.new('L', (105, 105)).save(own_omniglot / 'alphabet' / 'train02' / '03.png')
    with pytest.raises(UserError, match='train02/03.png is 105x105 pixels, not 28x28'):
        decoded(own_omniglot)


@pytest.mark.parametrize('content, message', [
    (b'', 'the first line of the manifest .* must be split,class'),
    (b'split,class\n', 'the train split in .* has no classes'),
    (b'a,b\n1,2\n', 'the first line of the manifest .*splits.csv must be split,class'),
    (b'split,class\ntrain,a\ntrain\n', 'line 3 of the manifest'),
    (b'split,class\ntrain,../a\n', 'line 2 of the manifest'),
    (b'split,class\ntrain,a\nval,a\n', 'lists a twice, in lines 2 and 3'),
    (b'\xff\xfe\x00', 'the manifest .*splits.csv cannot be read'),
])
def test_a_manifest_that_is_none(own_omniglot, content, message):
    (own_omniglot / 'splits.csv').write_bytes(content)
    with pytest.raises(UserError, match=message):
        decoded(own_omniglot)


# Your own images

FOLDER = SOURCES['folder']


@pytest.fixture
def own_images(tmp_path):
    """Class folders with awkward names, not split yet."""
    names = ['plain', 'two words', 'Ünï cødé', "quote's, comma", 'a', 'b', 'c', 'd', 'e', 'f']
    write_image_tree(tmp_path, names, images=3, size=(12, 20, 3))
    (tmp_path / 'notes.txt').write_text('no class')
    (tmp_path / 'plain' / 'notes.txt').write_text('no image')
    (tmp_path / '.hidden').mkdir()
    return tmp_path


def names_once_split(source, split, root):
    """The classes of a split, which is written down if it was not yet."""
    source.folders(str(root)).record_split({})
    return source.folders(str(root)).names(split)


def test_class_folders_are_split_once_and_written_down(own_images, capsys):
    splits = {split: names_once_split(FOLDER, split, own_images) for split in SPLITS}
    assert [len(names) for names in splits.values()] == [7, 1, 2]
    assert sorted(sum(splits.values(), [])) == sorted(path.name for path in own_images.iterdir() if path.is_dir()
                                                      and not path.name.startswith('.'))
    said = capsys.readouterr().out
    assert 'Split the classes into 7 / 1 / 2' in said and said.count('Split') == 1
    # A class that comes later does not change the split of the others; nor do other shares.
    write_image_tree(own_images, ['later'], images=3, size=(12, 20, 3))
    other = dataclasses.replace(FOLDER, split_ratios=(1, 1, 1))
    assert {split: names_once_split(other, split, own_images) for split in SPLITS} == splits


def test_the_split_depends_on_the_names_alone(own_images, tmp_path_factory):
    names = [path.name for path in own_images.iterdir() if path.is_dir()]
    split = splits.split_classes(names, (64, 16, 20), 'here')
    assert splits.split_classes(names[::-1], (64, 16, 20), 'elsewhere') == split
    with pytest.raises(UserError, match='there holds 2 class folders'):
        splits.split_classes(['a', 'b'], (64, 16, 20), 'there')


def test_folders_named_train_val_and_test_need_no_split(tmp_path):
    write_image_tree(tmp_path, class_names(2, 1, 1), images=2, size=(8, 8))
    assert FOLDER.folders(str(tmp_path)).names('train') == ['train/train00', 'train/train01']
    assert not (tmp_path / 'splits.csv').exists()
    os.rename(tmp_path / 'val', tmp_path / 'elsewhere')
    with pytest.raises(UserError, match='the val split in .* has no classes; it must hold folders train, val and test'):
        FOLDER.folders(str(tmp_path)).names('val')


def test_own_images_of_any_format_and_size_are_resized(tmp_path):
    write_image_tree(tmp_path, class_names(1, 1, 1), images=1, size=(8, 8))
    folder = tmp_path / 'train' / 'train00'
    pictures = {'b.jpg': ('RGB', (300, 20)), 'c.gif': ('L', (7, 9)), 'd.bmp': ('RGB', (10, 10)), 'e.TIFF': ('1', (64, 64)),
                'f.webp': ('RGBA', (5, 50))}
    for name, (mode, size) in pictures.items():
        Image.new(mode, size, 1 if mode == '1' else 'white').save(folder / name)
    grey = dataclasses.replace(FOLDER, image_shape=(10, 10, 1))
    for source in FOLDER, grey:
        images = source.load('train', str(tmp_path)).values
        assert images.shape == (6, *source.image_shape)
        assert (images[1:] == 255).all()


def test_photographs_are_turned_upright(tmp_path):
    write_image_tree(tmp_path, class_names(1, 1, 1), images=1, size=(8, 8))
    image = Image.new('RGB', (84, 84))
    image.paste('white', (0, 0, 84, 42))  # upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image.save(tmp_path / 'train' / 'train00' / '00.png', exif=exif)
    upright = FOLDER.load('train', str(tmp_path)).values[0]
    assert (upright[:, 43:] == 255).all() and (upright[:, :41] == 0).all()


def test_decoded_images_are_memory_mapped(small_data):
    for _ in range(2):
        assert isinstance(SOURCES['cifarfs'].load('train', str(small_data['cifarfs'])).values, np.memmap)


def test_sixteen_bits_become_eight(tmp_path):
    write_image_tree(tmp_path, class_names(1, 1, 1), images=1, size=(8, 8))
    ramp = np.linspace(0, 65535, 84 * 84).astype(np.uint16).reshape(84, 84)
    Image.fromarray(ramp).save(tmp_path / 'train' / 'train00' / '00.png')
    np.testing.assert_allclose(FOLDER.load('train', str(tmp_path)).values[0, ..., 0], ramp / 257, atol=1)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / 'train' / 'train00' / '01.tiff')
    with pytest.raises(UserError, match='01.tiff cannot be read as an image .*floating-point'):
        FOLDER.load('train', str(tmp_path))


def test_a_split_without_classes_to_train_on_is_refused_and_not_written(own_images):
    with pytest.raises(UserError, match='--split=1/1/100 leaves no class of the 10'):
        names_once_split(dataclasses.replace(FOLDER, split_ratios=(1, 1, 100)), 'train', own_images)
    assert not (own_images / 'splits.csv').exists()


def test_folders_of_a_split_count_more_than_the_manifest_of_another_place(small_data, tmp_path):
    """GTSRB prepared in its own folder has a manifest there. It does not divide other data, given by --data_path."""
    write_manifest(tmp_path, ['alphabet/test01'])
    elsewhere, undivided = str(tmp_path / 'splits.csv'), tmp_path / 'undivided'
    undivided.mkdir()
    divided = ClassFolders(str(small_data['cifarfs']), shipped_manifest=elsewhere)
    assert divided.names('train') == [f'train/train{number:02d}' for number in range(6)]
    with pytest.raises(UserError, match='1 of the 1 class folders of the test split are missing'):
        ClassFolders(str(undivided), shipped_manifest=elsewhere).names('test')


def test_a_run_among_the_classes(own_images):
    """Its directory would be a class in the manifest that is written after it was made, and move others to other splits."""
    flags = ['--datasource=folder', f'--data_path={own_images}', '--num_classes=2', '--update_batch_size=1']
    error = error_of(*flags, f'--logdir={own_images / "logs"}')
    assert f'is in --data_path={own_images}, where each folder is a class; give another --logdir' in error
    folders = dataclasses.replace(FOLDER, split_ratios=(64, 16, 20)).folders(str(own_images))
    loaded = {'val': folders.load('val', (8, 8, 1)).names}
    (own_images / 'later').mkdir()
    (own_images / 'zz later').mkdir()
    with pytest.raises(UserError, match='have changed since they were read; start again'):
        folders.record_split({**loaded, 'train': []})
    assert not (own_images / 'splits.csv').exists()


def test_names_of_classes_in_two_splits_are_reported(tmp_path, capsys):
    write_image_tree(tmp_path, ['train/cat', 'train/cow', 'val/cow', 'test/cat', 'test/cow', 'test/dog'], images=1, size=(4, 4, 3))
    assert FOLDER.folders(str(tmp_path)).names('train') == ['train/cat', 'train/cow']
    assert f'Note: {tmp_path} has a class cow in train and in val, and 3 more such names. If' in capsys.readouterr().out
    assert FOLDER.folders(str(tmp_path)).names('test') and capsys.readouterr().out == ''


def test_integers_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(np.arange(16, dtype=np.int32).reshape(4, 4)).save(tmp_path / 'image.tif')
    Image.fromarray(np.full((4, 4), 257 * 7, np.uint16)).save(tmp_path / 'deep.png')
    with pytest.raises(images.BadImages) as error:
        list(images.decode_images([str(tmp_path / 'image.tif'), str(tmp_path / 'deep.png')], (4, 4, 1), True, '', ''))
    assert [(path, 'of unknown range' in what) for path, what in error.value.images] == [(str(tmp_path / 'image.tif'), True)]
    assert (next(images.decode_images([str(tmp_path / 'deep.png')], (4, 4, 1), True, '', '')) == 7).all()


def test_transparent_images_are_on_white(tmp_path):
    """Black ink on nothing, as drawing programs export it, in each way in which a file can say so."""
    ink = Image.new('L', (8, 8), 0)
    ink.paste(255, (2, 2, 6, 6))
    drawing = Image.new('RGBA', (8, 8), (0, 0, 0, 0))
    drawing.putalpha(ink)
    palette = Image.fromarray((np.asarray(ink) // 255).astype(np.uint8), 'P')
    palette.putpalette([0, 0, 0, 0, 0, 0])
    drawing.save(tmp_path / 'rgba.png')
    drawing.convert('LA').save(tmp_path / 'la.png')
    palette.save(tmp_path / 'palette.png', transparency=0)
    deep = np.where(np.asarray(ink) > 0, 0, 300).astype(np.uint16)  # grey of 16 bits, 300 being transparent
    Image.fromarray(deep).save(tmp_path / 'deep.png', transparency=300)
    paths = [str(tmp_path / name) for name in ('rgba.png', 'la.png', 'palette.png', 'deep.png')]
    for image in next(images.decode_images(paths, (8, 8, 1), True, '', '')):
        np.testing.assert_array_equal(image[..., 0], 255 - np.asarray(ink))


def test_a_split_that_is_asked_for_is_not_passed_over(tmp_path):
    """--split again is the same; another one is refused while splits.csv says otherwise."""
    for number in range(10):
        (tmp_path / f'class{number}').mkdir()
    source = dataclasses.replace(SOURCES['folder'], split_ratios=(60, 20, 20), split_given=True)
    first = names_once_split(source, 'val', tmp_path)
    assert source.folders(str(tmp_path)).names('val') == first and len(first) == 2
    with pytest.raises(UserError, match='splits.csv does not match --split=40/30/30'):
        dataclasses.replace(source, split_ratios=(40, 30, 30)).folders(str(tmp_path)).names('val')
    with pytest.raises(UserError, match='splits.csv does not match --split=40/30/30'):
        dataclasses.replace(source, split_ratios=(40, 30, 30), split_file=str(tmp_path / 'splits.csv')).folders(str(tmp_path)).names('val')
    assert dataclasses.replace(source, split_ratios=(40, 30, 30), split_given=False).folders(str(tmp_path)).names('val') == first


def test_classes_that_came_later_are_named(tmp_path, capsys):
    for number in range(10):
        (tmp_path / f'class{number}').mkdir()
    names_once_split(FOLDER, 'train', tmp_path)
    assert 'Ignored' not in capsys.readouterr().out
    for name in 'late', 'later':
        (tmp_path / name).mkdir()
    assert not {'late', 'later'} & set(FOLDER.folders(str(tmp_path)).names('train'))
    assert f'Ignored class folders not listed in {tmp_path}/splits.csv: late and 1 more.' in capsys.readouterr().out


def test_too_few_classes_says_how_many_are_enough(tmp_path):
    for classes in 31, 32:
        write_image_tree(tmp_path / str(classes), [f'class{number}' for number in range(classes)], images=2, size=(8, 8))
    few, enough = (TaskConfig(5, 1, 1, seed=0, data_path=str(tmp_path / name)) for name in ('31', '32'))
    with pytest.raises(UserError, match='more classes than the 4 of the val split .* have 32 class folders or more'):
        FOLDER.tasks(few, 'val')
    for split in 'train', 'val', 'test':
        FOLDER.tasks(enough, split)
