"""Checkpoint files: what goes in comes out, damage is noticed, the newest ten stay."""
import os

import numpy as np
import pytest
import tensorflow as tf

import checkpoints
from data_generator import UserError

SUFFIXES = ('.index', '.data-00000-of-00001')


def state(offset=0.0):
    return {'conv1': tf.Variable(np.arange(6, dtype=np.float32).reshape(2, 3) + offset),
            'metatrain/adam/step': tf.Variable(7, dtype=tf.int64)}


def save(directory, name, offset=0.0):
    prefix = checkpoints.path(str(directory), name)
    checkpoints.save(prefix, state(offset), {'iteration': name, 'seed': 3})
    return prefix


def test_what_is_saved_is_restored(tmp_path):
    prefix, fresh = save(tmp_path, 1000, offset=0.25), state()
    assert checkpoints.restore(prefix, fresh, {'seed': 3}) == {'iteration': 1000, 'seed': 3}
    np.testing.assert_array_equal(fresh['conv1'], state(0.25)['conv1'])
    assert sorted(os.listdir(tmp_path)) == ['model1000.data-00000-of-00001', 'model1000.index']


def test_tensorflow_reads_it(tmp_path):
    assert dict(tf.train.list_variables(save(tmp_path, 1000)))['conv1'] == [2, 3]


def test_listing(tmp_path):
    assert checkpoints.names(str(tmp_path / 'nowhere')) == []
    for name in (2000, 10000, checkpoints.BEST, 900):
        save(tmp_path, name)
    (tmp_path / 'model7.index.part').touch()
    assert checkpoints.iterations(str(tmp_path)) == [900, 2000, 10000]
    assert checkpoints.names(str(tmp_path)) == [900, 2000, 10000, checkpoints.BEST]


@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize('damage', ['delete', 'empty', 'truncate', 'garbage', 'flip'])
def test_damage_is_reported(tmp_path, suffix, damage):
    prefix = save(tmp_path, 1000)
    path = prefix + suffix
    content = open(path, 'rb').read()
    if damage == 'delete':
        os.remove(path)
    else:
        flipped = bytes([content[0] ^ 1]) + content[1:]
        damaged = {'empty': b'', 'truncate': content[:len(content) // 2], 'garbage': b'x' * len(content), 'flip': flipped}
        with open(path, 'wb') as file:
            file.write(damaged[damage])
    with pytest.raises(UserError, match='model1000 cannot be read'):
        checkpoints.restore(prefix, state(), {})


def test_another_network_or_run_is_refused(tmp_path):
    prefix = save(tmp_path, 1000)
    with pytest.raises(UserError, match=r'seed is 3 there and 4 here'):
        checkpoints.restore(prefix, state(), {'seed': 4})
    other = state()
    other['conv1'] = tf.Variable(tf.zeros([2, 4]))
    other['conv2'] = tf.Variable(tf.zeros([1]))
    with pytest.raises(UserError, match=r'conv1 is \(2, 3\) there and \(2, 4\) here, conv2 is missing there and \(1,\) here'):
        checkpoints.restore(prefix, other, {})
    np.testing.assert_array_equal(other['conv1'], tf.zeros([2, 4]))  # nothing half restored


def test_foreign_checkpoint_is_refused(tmp_path):
    prefix = tf.train.Checkpoint(v=tf.Variable(1.0)).write(str(tmp_path / 'model5'))
    with pytest.raises(UserError, match='was not written by this program'):
        checkpoints.restore(prefix, state(), {})


def test_the_newest_ten_stay(tmp_path):
    save(tmp_path, checkpoints.BEST)
    for iteration in range(1, 14):
        save(tmp_path, iteration)
    checkpoints.prune(str(tmp_path))
    assert checkpoints.names(str(tmp_path)) == list(range(4, 14)) + [checkpoints.BEST]
    assert len(os.listdir(tmp_path)) == 2 * 11


def test_checkpoints_about_to_be_redone_are_moved_aside(tmp_path):
    for name in (1000, 2000, 3000, checkpoints.BEST):
        save(tmp_path, name)
    assert checkpoints.move_aside(str(tmp_path), 3000) is None
    folder = checkpoints.move_aside(str(tmp_path), 1000)
    assert checkpoints.names(folder) == [2000, 3000]
    assert checkpoints.names(str(tmp_path)) == [1000, checkpoints.BEST]
    second = checkpoints.move_aside(str(tmp_path), 0)
    assert second != folder and checkpoints.names(second) == [1000, checkpoints.BEST]
    assert checkpoints.names(str(tmp_path)) == []
