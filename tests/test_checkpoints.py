"""Checkpoint files: round trips, damaged files are reported and skipped, the newest ten are kept."""
import os

import numpy as np
import pytest
import tensorflow as tf

from runtime.jobs import checkpoints
from runtime.results.provenance import Provenance
from runtime.system.errors import UserError

INDEX, DATA = SUFFIXES = '.index', '.data-00000-of-00001'


def state(offset=0.0):
    return {'conv1': tf.Variable(np.arange(6, dtype=np.float32).reshape(2, 3) + offset),
            'metatrain/adam/step': tf.Variable(7, dtype=tf.int64)}


def record(iteration, best=None):
    return {'iteration': iteration, 'best': best, 'unprinted': [], 'skipped': 0, 'flags': {}, 'regime': 'metatrain',
            'pretrain_iterations': 0, 'provenance': Provenance({'train': 3})}


def save(directory, name, offset=0.0):
    prefix = checkpoints.path(str(directory), name)
    checkpoints.save(prefix, state(offset), record(name))
    return prefix


def files(directory):
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith('.'))


def same(checkpoint, offset):
    return checkpoint.arrays.keys() == state().keys() and all(
        np.array_equal(checkpoint.arrays[name], value) for name, value in state(offset).items())


def test_what_is_saved_is_restored(tmp_path):
    prefix, fresh = save(tmp_path, 1000, offset=0.25), state()
    checkpoint = checkpoints.load(prefix)
    checkpoints.restore(checkpoint, fresh)
    assert checkpoint.record == record(1000)
    np.testing.assert_array_equal(fresh['conv1'], state(0.25)['conv1'])
    assert files(tmp_path) == ['model1000.data-00000-of-00001', 'model1000.index']


@pytest.mark.parametrize('name', ['runs[1]', '[!x]', 'what?', 'back\\slash', '*'])
def test_wildcards_in_a_path_are_no_wildcards(name, tmp_path):
    """TensorFlow expands them in what it reads, and not in what it writes."""
    os.makedirs(tmp_path / 'another')
    os.makedirs(tmp_path / name)
    save(tmp_path / 'another', 7, offset=1.0)
    assert same(checkpoints.load(save(tmp_path / name, 7)), 0.0)
    os.remove(tmp_path / name / f'model7{INDEX}')
    with pytest.raises(checkpoints.Damaged):
        checkpoints.load(str(tmp_path / name / 'model7'))


def test_tensorflow_reads_it(tmp_path):
    assert dict(tf.train.list_variables(save(tmp_path, 1000)))['conv1'] == [2, 3]


def test_listing(tmp_path):
    assert checkpoints.iterations(str(tmp_path / 'nowhere')) == []
    for name in (2000, 10000, 900):
        save(tmp_path, name)
    (tmp_path / 'model7.index.part').touch()
    assert checkpoints.iterations(str(tmp_path)) == [900, 2000, 10000]


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_every_byte_matters(tmp_path, suffix):
    """Each byte changed in turn, in one bit or in all, and the file cut off at each length: reported, or harmless."""
    prefix = save(tmp_path, 1000, offset=0.25)
    with open(prefix + suffix, 'rb') as file:
        content = file.read()
    damaged = [content[:length] for length in range(len(content))]
    damaged += [content[:at] + bytes([content[at] ^ bits]) + content[at + 1:] for at in range(len(content)) for bits in (1, 255)]
    damaged += [b'x' * len(content), content + content]
    reported = 0
    for corrupted in damaged:
        with open(prefix + suffix, 'wb') as file:
            file.write(corrupted)
        try:
            checkpoint = checkpoints.load(prefix)
            assert same(checkpoint, 0.25) and checkpoint.record == record(1000)
        except checkpoints.Damaged as error:
            reported += 'model1000 cannot be read' in str(error)
    assert reported > len(content)  # at the least, every cut


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_the_one_before_a_damaged_one_is_taken(tmp_path, suffix, capsys):
    save(tmp_path, 1000, offset=1)
    newest = save(tmp_path, 2000, offset=2)
    os.remove(newest + suffix)
    assert checkpoints.newest(str(tmp_path)).record['iteration'] == 1000
    assert 'model2000 cannot be read' in capsys.readouterr().err
    with pytest.raises(UserError, match='model2000 cannot be read'):
        checkpoints.find(str(tmp_path), 2000)
    os.remove(checkpoints.path(str(tmp_path), 1000) + suffix)
    with pytest.raises(UserError, match='no checkpoint in .* can be read; to start anew, add --resume=False'):
        checkpoints.newest(str(tmp_path))


def test_the_best_is_the_one_that_the_newest_names(tmp_path):
    for iteration in 1000, 2000:
        checkpoints.save(checkpoints.path(str(tmp_path), iteration), state(iteration),
                         record(iteration, best={'iteration': 1000, 'score': 0.5}))
    assert checkpoints.find(str(tmp_path), 'best').record['iteration'] == 1000
    save(tmp_path, 3000)
    with pytest.raises(UserError, match='no checkpoint that was validated in .*; there are model1000, model2000, model3000'):
        checkpoints.find(str(tmp_path), 'best')


@pytest.mark.parametrize('moved', [[], [DATA], [DATA, INDEX]])
def test_killed_while_saving(tmp_path, moved):
    """Written aside, and killed before, between and after moving the two files into place: all or nothing is there."""
    save(tmp_path, 1000, offset=1)
    prefix = save(tmp_path, 2000, offset=2)
    (tmp_path / '.saving').mkdir()
    for suffix in SUFFIXES:
        if suffix not in moved:
            os.rename(prefix + suffix, tmp_path / '.saving' / ('model2000' + suffix))
    with checkpoints.exclusive(str(tmp_path)):
        assert not (tmp_path / '.saving').exists()
        assert same(checkpoints.newest(str(tmp_path)), 2 if moved else 1)
        assert len(files(tmp_path)) == (4 if moved else 2)


def test_what_cannot_be_saved_leaves_nothing(tmp_path):
    (tmp_path / 'model1000.index').mkdir()  # where the file would be moved to
    with pytest.raises(OSError):
        save(tmp_path, 1000)
    assert files(tmp_path) == ['model1000.index']


def test_two_processes_cannot_train_in_one_directory(tmp_path):
    directory = str(tmp_path / 'run')
    with checkpoints.exclusive(directory):
        with pytest.raises(UserError, match='another process is training in'):
            with checkpoints.exclusive(directory):
                pass
    with checkpoints.exclusive(directory):
        pass


def test_another_network_is_refused(tmp_path):
    checkpoint = checkpoints.load(save(tmp_path, 1000))
    other = state()
    other['conv1'] = tf.Variable(tf.zeros([2, 4]))
    other['conv2'] = tf.Variable(tf.zeros([1]))
    with pytest.raises(UserError, match=r'conv1 is float32\[2, 3\] there and float32\[2, 4\] here, conv2 is missing there and '
                                        r'float32\[1\] here'):
        checkpoints.restore(checkpoint, other)
    np.testing.assert_array_equal(other['conv1'], tf.zeros([2, 4]))  # nothing half restored


def test_foreign_checkpoints_are_refused(tmp_path):
    prefix = tf.train.Checkpoint(v=tf.Variable(1.0)).write(str(tmp_path / 'model5'))
    with pytest.raises(UserError, match='was not written by this program'):
        checkpoints.load(prefix)
    checkpoints.save(prefix, state(), {'iteration': 5})
    with pytest.raises(UserError, match='by an earlier version of this program'):
        checkpoints.load(prefix)
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=['record'], shape_and_slices=[''], tensors=[tf.constant(1.0)])
    with pytest.raises(UserError, match='its record is not one of this program'):
        checkpoints.load(prefix)


def test_the_newest_ten_and_the_best_stay(tmp_path):
    for iteration in range(1, 14):
        save(tmp_path, iteration)
    checkpoints.prune(str(tmp_path), best=[2])
    assert checkpoints.iterations(str(tmp_path)) == [2] + list(range(4, 14))
    assert len(files(tmp_path)) == 2 * 11


def test_checkpoints_about_to_be_redone_are_moved_aside(tmp_path):
    for name in (1000, 2000, 3000):
        save(tmp_path, name)
    os.remove(checkpoints.path(str(tmp_path), 3000) + INDEX)
    assert checkpoints.move_aside(str(tmp_path), 3000) is None
    folder = checkpoints.move_aside(str(tmp_path), 1000)
    assert checkpoints.iterations(folder) == [2000, 3000]
    assert checkpoints.iterations(str(tmp_path)) == [1000]
    second = checkpoints.move_aside(str(tmp_path), 0)
    assert second != folder and checkpoints.iterations(second) == [1000]
    assert files(tmp_path) == ['earlier1', 'earlier2']


def test_what_describes_checkpoints_goes_with_them(tmp_path):
    for name in 'run.flags', 'columns.json', 'metrics.csv':
        (tmp_path / name).write_text(name)
    (tmp_path / 'evaluation_test_model1000').mkdir()  # of TensorBoard
    save(tmp_path, 1000)
    assert files(tmp_path / os.path.basename(checkpoints.move_aside(str(tmp_path), 0))) == sorted(
        ['columns.json', 'evaluation_test_model1000', 'metrics.csv', 'run.flags', f'model1000{INDEX}', f'model1000{DATA}'])
    assert files(tmp_path) == ['columns.json', 'earlier1', 'run.flags']
    (tmp_path / 'metrics.csv').write_text('10,metatrain,1,2\n')
    for number in 100, 1000:
        save(tmp_path, number)
        (tmp_path / f'evaluation_val_model{number}').mkdir()
    moved = checkpoints.move_aside(str(tmp_path), 100)
    assert files(tmp_path / os.path.basename(moved)) == sorted(
        ['columns.json', 'evaluation_val_model1000', 'metrics.csv', 'run.flags', f'model1000{INDEX}', f'model1000{DATA}'])
    assert 'metrics.csv' in files(tmp_path)
