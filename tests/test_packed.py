"""Packed arrays: made of good and bad images, read without being read, and refused when they are damaged; MNIST's sources."""
import csv
import dataclasses
import gzip
import itertools
import json
import os
import re
import shutil

import numpy as np
import pytest

from conftest import ROOT, run_process, said_by, write_image_tree
from data import mnist, packing, preparation
from data_generator import SOURCES, TaskConfig
from runtime.datasets import arrays
from runtime.system.errors import UserError

SHAPE = (64, 64, 1)
CLASSES = {f'{split}/{split}{number}': preparation.Class(split, 3) for split in ('train', 'val', 'test') for number in range(2)}
SOURCE = SOURCES['doublemnist']


def image(name, number):
    return np.random.default_rng([*name.encode(), number]).integers(0, 256, SHAPE, np.uint8)


def lists(**changes):
    """ImageLists of all classes but for `changes`, {class with _ for /: ImageList, or None to leave it out}."""
    found = {name: packing.ImageList(3, lambda number, name=name: image(name, number)) for name in CLASSES}
    found |= {name.replace('_', '/'): images for name, images in changes.items()}
    return {name: images for name, images in found.items() if images}


def pack(folder, images=None, *flags, recipe=''):
    """Packs them; returns what the program said if it refused."""
    args = preparation.arguments('', '', str(folder)).parse_args(flags)
    try:
        packing.pack(images or lists(), CLASSES, SHAPE, args, recipe)
        return None
    except SystemExit as error:
        return error.code


def bad(number):
    if number == 1:
        raise ValueError('it is damaged')
    return image('train/train0', number)


def test_what_is_packed_is_what_is_loaded(tmp_path, capsys):
    assert pack(tmp_path) is None
    assert '6 classes / 18 images' in capsys.readouterr().out
    for split in 'train', 'val', 'test':
        found = SOURCE.load(split, str(tmp_path))
        assert isinstance(found.values, np.memmap) and found.names == [f'{split}/{split}0', f'{split}/{split}1']
        assert found.starts.tolist() == [0, 3] and found.counts.tolist() == [3, 3]
        for name, start in zip(found.names, found.starts):
            for number in range(3):
                np.testing.assert_array_equal(found.values[start + number], image(name, number))
    config = TaskConfig(num_classes=2, update_batch_size=1, query_shots=2, seed=0, data_path=str(tmp_path))
    batch = SOURCE.tasks(config, 'train').draw(0, 3)
    assert batch.support_x.shape == (3, 2, 64 * 64) and SOURCE.folders(str(tmp_path)).names('val') == ['val/val0', 'val/val1']


def test_complaints_and_allow_missing(tmp_path):
    images = lists(train_train0=packing.ImageList(3, bad), val_val1=None,
                   test_test0=packing.ImageList(2, lambda number: image('x', number)),
                   test_new=packing.ImageList(1, lambda number: image('x', number)))
    said = pack(tmp_path, images)
    assert '1 images cannot be decoded, first image 1 of train/train0 (it is damaged)' in said
    assert '3 of 6 classes are missing, first train/train0' in said and '1 classes are not known, first test/new' in said
    assert '1 classes have another number of images than they should, first test/test0 with 2 instead of 3' in said
    assert not (tmp_path / 'train.npy').exists()
    with pytest.raises(UserError, match='was interrupted or found something missing; run it again: python data/doublemnist'):
        SOURCE.load('train', str(tmp_path))
    assert pack(tmp_path, images, '--allow_missing') is None
    found = SOURCE.load('train', str(tmp_path))
    assert found.counts.tolist() == [2, 3] and not list(tmp_path.glob('*.part'))
    np.testing.assert_array_equal(found.values[1], image('train/train0', 2))


@pytest.mark.parametrize('make', [lambda number: np.zeros([3, 3, 1], np.uint8), lambda number: np.zeros(SHAPE),
                                  lambda number: None])
def test_images_that_are_no_images(make, tmp_path):
    assert '3 images cannot be decoded, first image 0 of train/train0' in pack(tmp_path, lists(train_train0=packing.ImageList(3, make)))


def test_what_is_done_is_not_done_again(tmp_path):
    made = []

    def make(number):
        made.append(number)
        return image('train/train0', number)

    images = lists(train_train0=packing.ImageList(3, make))
    pack(tmp_path, images)
    pack(tmp_path, images)
    assert len(made) == 3
    (tmp_path / 'test.npy').write_bytes(b'cut off')
    (tmp_path / '.prepared.json').write_text('{"recipe": "", "complete": false}')
    pack(tmp_path, images)  # as after a kill: only what is missing
    assert len(made) == 3 and SOURCE.load('test', str(tmp_path)).values.shape[0] == 6
    pack(tmp_path, images, recipe='another')
    pack(tmp_path, images, '--force', recipe='another')
    assert len(made) == 9


def test_a_full_disk_leaves_no_part(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(packing, 'write_array', full)
    assert 'No space left on device' in pack(tmp_path) and not list(tmp_path.glob('*.npy*'))


# Damage

@pytest.fixture
def packed(tmp_path):
    pack(tmp_path / 'packed')
    return tmp_path / 'packed'


def damage(path, keep_time):
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_damage_shows_in_the_time_or_by_verify(packed):
    damage(packed / 'val.npy', keep_time=False)
    with pytest.raises(UserError, match=r'val.npy is damaged \(its size or its checksum is wrong\); make it again: python data/doub'):
        SOURCE.load('val', str(packed))
    damage(packed / 'train.npy', keep_time=True)
    SOURCE.load('train', str(packed))
    with pytest.raises(UserError, match='train.npy is damaged'):
        dataclasses.replace(SOURCE, verify=True).load('train', str(packed))
    dataclasses.replace(SOURCE, verify=True).load('test', str(packed))


def test_a_copy_is_read_once(packed, tmp_path, monkeypatch):
    shutil.copytree(packed, tmp_path / 'copy', copy_function=shutil.copyfile)
    SOURCE.load('train', str(tmp_path / 'copy'))
    monkeypatch.setattr(arrays.zlib, 'crc32', None)  # a start that reads it now fails
    SOURCE.load('train', str(tmp_path / 'copy'))


@pytest.mark.parametrize('name, content, words', [
    ('packed.json', b'', 'cannot be read'), ('packed.json', b'[]', 'malformed'), ('packed.json', b'{"train": 3}', 'malformed'),
    ('packed.json', b'[' * 100_000, 'malformed'), ('packed.json', b'{"train": {"classes": {"a": -1}}}', 'malformed'),
    ('train.npy', b'', 'is damaged'), ('train.npy', b'\x93NUMPY\x01\0\x04\0junk', 'is damaged'), ('train.npy', None, 'is damaged')])
def test_files_that_cannot_be(name, content, words, packed):
    (packed / name).unlink()
    if content is not None:
        (packed / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        SOURCE.load('train', str(packed))
    assert 'make it again: python data/doublemnist/proc_images.py --force' in str(error.value)


def test_arrays_of_another_shape(packed):
    with pytest.raises(UserError, match=r'train.npy is damaged \(it holds uint8 \[6, 64, 64, 1\]\)'):
        SOURCES['triplemnist'].load('train', str(packed))


def test_a_split_that_is_not_there(packed):
    record = json.loads((packed / 'packed.json').read_text())
    del record['val']
    (packed / 'packed.json').write_text(json.dumps(record))
    with pytest.raises(UserError, match='the val split in .* has no classes; prepare the images with'):
        SOURCE.load('val', str(packed))


def test_ones_own_images_may_lie_beside_such_a_file(tmp_path):
    write_image_tree(tmp_path, ['train/a', 'train/b'], images=1, size=(84, 84))
    (tmp_path / 'packed.json').write_text('mine')
    assert len(SOURCES['folder'].load('train', str(tmp_path)).values) == 2


def test_caches_of_class_folders_are_not_read_either(tmp_path, monkeypatch):
    source = SOURCES['cifarfs']
    write_image_tree(tmp_path, ['train/a', 'train/b'], images=2, size=(32, 32, 3))
    checksum, first = source.load('train', str(tmp_path)).checksum, np.array(source.load('train', str(tmp_path)).values)
    damage(next((tmp_path / '.cache').glob('*.npy')), keep_time=True)
    assert not np.array_equal(source.load('train', str(tmp_path)).values, first)
    np.testing.assert_array_equal(dataclasses.replace(source, verify=True).load('train', str(tmp_path)).values, first)
    monkeypatch.setattr(arrays.zlib, 'crc32', None)
    assert source.load('train', str(tmp_path)).checksum == checksum


# MNIST

def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>i4').tobytes() + array.tobytes()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """Ten images of each digit d, which are d + 1 everywhere, in the four files."""
    monkeypatch.setattr(mnist, 'PARTS', {'train': 80, 't10k': 20})
    monkeypatch.setattr(mnist, 'IMAGES_PER_CLASS', 4)
    folder = tmp_path / 'mnist'
    folder.mkdir()
    for part, count in mnist.PARTS.items():
        labels = np.arange(count, dtype=np.uint8) % 10
        (folder / f'{part}-labels-idx1-ubyte.gz').write_bytes(gzip.compress(idx(labels)))
        (folder / f'{part}-images-idx3-ubyte').write_bytes(idx(np.broadcast_to(labels[:, None, None] + np.uint8(1), (count, 28, 28))))
    return folder


def prepare(source, folder, destination):
    """Runs doublemnist's or triplemnist's script in this process; returns what it said if it refused."""
    return said_by(lambda: mnist.main('', os.path.join(ROOT, 'data', source), SOURCES[source].image_shape[0]),
                   '--source', folder, '--destination', destination)


@pytest.mark.parametrize('source, counts', [('doublemnist', (64, 16, 20)), ('triplemnist', (640, 160, 200))])
def test_digits_stand_in_their_cells(source, counts, small_mnist, tmp_path):
    assert prepare(source, small_mnist, tmp_path / 'prepared') is None
    size, length = SOURCES[source].image_shape[0], 2 + (source == 'triplemnist')
    places = set()
    for split, count in zip(('train', 'val', 'test'), counts):
        found = SOURCES[source].load(split, str(tmp_path / 'prepared'))
        assert len(found.names) == count and len(found.values) == 4 * count
        for name, start in itertools.islice(zip(found.names, found.starts), 10):
            for image in found.values[start:start + 4, ..., 0]:
                for cell, digit in enumerate(name.split('/')[1]):
                    rows, columns = np.nonzero(image[:, cell * size // length:(cell + 1) * size // length] == int(digit) + 1)
                    assert len(rows) == 28 * 28 and rows.max() - rows.min() == columns.max() - columns.min() == 27
                    places.add((rows.min(), columns.min()))
                assert np.count_nonzero(image) == length * 28 * 28
    assert len({row for row, _ in places}) > (size - 28) / 2
    assert {column for _, column in places} == (set(range(4)) if length == 2 else {0})
    assert not SOURCES[source].rotations and not SOURCES[source].invert


@pytest.mark.parametrize('source, count', [('doublemnist', 100), ('triplemnist', 1000)])
def test_classes_are_those_of_the_generator(source, count):
    """MultiDigitMNIST's: all numbers, shuffled by seed 123, divided 64 / 16 / 20."""
    numbers = np.arange(count)
    np.random.RandomState(123).shuffle(numbers)
    numbers, bounds = [f'{number:0{2 + (count == 1000)}d}' for number in numbers], [0, count * 64 // 100, count * 80 // 100, count]
    with open(os.path.join(ROOT, 'data', source, 'classes.csv'), newline='') as file:
        rows = [(row['split'], row['class']) for row in csv.DictReader(file)]
    for split, start, end in zip(('train', 'val', 'test'), bounds, bounds[1:]):
        assert sorted(name for where, name in rows if where == split) == sorted(numbers[start:end])


@pytest.mark.parametrize('name, change, words', [
    ('train-images-idx3-ubyte', lambda content: content[:-1], r'does not hold bytes of shape \[80, 28, 28\]'),
    ('train-images-idx3-ubyte', lambda content: content + b'x', 'does not hold bytes'),
    ('train-images-idx3-ubyte', lambda content: b'<html>' + content[6:], 'does not hold bytes'),
    ('train-images-idx3-ubyte', None, 'holds neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz; fetch MNIST by --download'),
    ('t10k-labels-idx1-ubyte.gz', lambda content: content[:-9], 'is damaged'),
    ('t10k-labels-idx1-ubyte.gz', lambda content: b'', 'does not hold bytes'),
    ('t10k-labels-idx1-ubyte.gz', lambda content: b'<html>', 'is damaged'),
    ('t10k-labels-idx1-ubyte.gz', lambda content: gzip.compress(bytes(2 ** 28)), 'does not hold bytes'),
    ('t10k-labels-idx1-ubyte.gz', lambda content: gzip.compress(idx(np.full(20, 10, np.uint8))), 'holds a label 10')])
def test_corrupted_mnist(name, change, words, small_mnist, tmp_path):
    path = small_mnist / name
    content = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(content))
    said = prepare('doublemnist', small_mnist, tmp_path / 'prepared')
    assert re.search(words, said) and not (tmp_path / 'prepared').exists(), said


def test_digits_that_are_missing(small_mnist, tmp_path):
    for part, count in mnist.PARTS.items():
        (small_mnist / f'{part}-labels-idx1-ubyte.gz').write_bytes(gzip.compress(idx(np.arange(count, dtype=np.uint8) % 9)))
    assert 'lack the digit 9' in prepare('doublemnist', small_mnist, tmp_path / 'prepared')


@pytest.mark.parametrize('source', ['doublemnist', 'triplemnist'])
def test_the_scripts(source, tmp_path):
    process = run_process('--source', tmp_path, script=f'data/{source}/proc_images.py')
    assert process.returncode == 1 and process.stderr.startswith(f'{tmp_path} holds neither train-images-idx3-ubyte nor'), process.stderr
    assert 'neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte.gz; fetch' in process.stderr
