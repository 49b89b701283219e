"""Checkpoint files: `model<iteration>` for each saved iteration, and `best` for the best one on meta-validation.

A checkpoint is a TensorFlow tensor bundle, `<prefix>.index` and `<prefix>.data-00000-of-00001`: named tensors without a
program around them, readable by `tf.train.load_checkpoint`, as the reference's are. Beside the variables of `MAML.state()`
it holds a record, a dict that says what the numbers belong to.
"""
import json
import os
import re

import tensorflow as tf

from data_generator import UserError

KEPT = 10
BEST = 'best'
_RECORD = 'record'
_SUFFIXES = ('.data-00000-of-00001', '.index')  # in this order: a checkpoint exists when its index does
_INDEX = re.compile(r'model(\d+)\.index$')


def iterations(directory):
    """The iterations of which the directory holds a checkpoint, ascending; [] where there is no such directory."""
    files = os.listdir(directory) if os.path.isdir(directory) else []
    return sorted(int(match[1]) for match in map(_INDEX.match, files) if match)


def names(directory):
    """The iterations as above, followed by BEST if the directory holds it."""
    best = [BEST] if os.path.exists(path(directory, BEST) + '.index') else []
    return iterations(directory) + best


def path(directory, iteration):
    """The prefix of an iteration's checkpoint; iteration may also be BEST."""
    return os.path.join(directory, iteration if iteration == BEST else f'model{iteration}')


def save(prefix, state, record):
    """Writes a checkpoint aside and moves it into place.

    Args:
        prefix: as from `path`.
        state: {name: tf.Variable or tensor}.
        record: a dict that json can write.
    """
    tensors = {**state, _RECORD: tf.constant(json.dumps(record))}
    directory, name = os.path.split(prefix)
    aside = os.path.join(directory, '.saving', name)
    os.makedirs(os.path.dirname(aside), exist_ok=True)
    tf.raw_ops.SaveV2(prefix=aside, tensor_names=list(tensors), shape_and_slices=[''] * len(tensors),
                      tensors=[tf.convert_to_tensor(tensor) for tensor in tensors.values()])
    for suffix in _SUFFIXES:
        os.replace(aside + suffix, prefix + suffix)
    os.rmdir(os.path.dirname(aside))


def load(prefix):
    """Reads a checkpoint that `save` wrote.

    Returns:
        {name: numpy array} and the record.

    Raises:
        UserError: it is missing, damaged, or not one of this program's.
    """
    arrays = _read(prefix)
    if _RECORD not in arrays:
        raise UserError(f'the checkpoint {prefix} was not written by this program')
    return arrays, json.loads(arrays.pop(_RECORD))


def _read(prefix):
    try:
        reader = tf.train.load_checkpoint(prefix)
        return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    except (ValueError, IndexError, RuntimeError, tf.errors.OpError) as error:
        raise UserError(f'the checkpoint {prefix} cannot be read: {str(error).splitlines()[0]}') from error


def restore(prefix, state, identity):
    """Gives variables the values of a checkpoint.

    Args:
        state: {name: tf.Variable}, which the checkpoint must match in names and shapes.
        identity: entries that its record must have.

    Returns:
        The record.

    Raises:
        UserError: as for `load`, or the checkpoint belongs to another run or network; says what differs.
    """
    arrays, record = load(prefix)
    differences = _differences({name: record.get(name) for name in identity}, identity) or _differences(
        {name: array.shape for name, array in arrays.items()},
        {name: tuple(variable.shape) for name, variable in state.items()})
    if differences:
        more = f', and {len(differences) - 3} more' if len(differences) > 3 else ''
        raise UserError(f'the checkpoint {prefix} is of another run: {", ".join(differences[:3])}{more}')
    for name, variable in state.items():
        variable.assign(arrays[name])
    return record


def load_weights(prefix, variables):
    """Gives a model's weights and norm parameters the values of a checkpoint, of this program's or of the reference's.

    Args:
        prefix: of a checkpoint written by `save`, or by the reference under TensorFlow 1.
        variables: {name: tf.Variable}, weights in the order in which the reference made them.

    Raises:
        UserError: there is no such checkpoint, it cannot be read, or names or shapes differ; lists the differences.
    """
    if not os.path.exists(prefix + '.index'):
        folder = os.path.abspath(os.path.dirname(prefix))
        others = sorted(name[:-len('.index')] for name in os.listdir(folder) if name.endswith('.index')) if os.path.isdir(
            folder) else []
        raise UserError(f'there is no checkpoint {prefix} (no file {prefix}.index); '
                        + (f'{folder} holds {", ".join(others)}' if others else f'{folder} holds no checkpoint'))
    arrays = _read(prefix)
    if _RECORD in arrays:
        found = {name: array for name, array in arrays.items() if name != _RECORD and '/adam/' not in name}
    else:
        ours = {theirs: name for name, theirs in reference_names(variables).items()}
        found = {ours.get(name, name): array for name, array in arrays.items()
                 if name.startswith('model/') and 'Adam' not in name}
    differences = _differences({name: array.shape for name, array in found.items()},
                               {name: tuple(variable.shape) for name, variable in variables.items()})
    if differences:
        raise UserError(f'the checkpoint {prefix} does not fit the network that the flags describe: {", ".join(differences)}')
    for name, variable in variables.items():
        variable.assign(found[name])


def reference_names(names):
    """{our name: the reference's}, for names of weights in the order of `maml.initial_weights`, and of norm parameters.

    The reference names convolutions and the last layer of a convolutional net; TensorFlow 1 numbered the others.
    """
    convolutional, numbered, result = 'conv1' in names, 0, {}
    for name in names:
        if '/' in name or convolutional and (name.startswith('conv') or name in ('w5', 'b5')):
            result[name] = f'model/{name}'
        else:
            result[name] = f'model/Variable_{numbered}' if numbered else 'model/Variable'
            numbered += 1
    return result


def _differences(there, here):
    return [f'{name} is {there.get(name, "missing")} there and {here.get(name, "missing")} here'
            for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]


def prune(directory):
    """Deletes all but the newest checkpoints; the best one is not among those counted."""
    for iteration in iterations(directory)[:-KEPT]:
        for suffix in reversed(_SUFFIXES):
            os.remove(path(directory, iteration) + suffix)


def move_aside(directory, iteration):
    """Moves the checkpoints after an iteration (after 0: all, and the best) into a new folder beside them.

    Returns:
        The folder, or None where there was nothing to move.
    """
    later = [name for name in names(directory) if (iteration == 0 if name == BEST else name > iteration)]
    if not later:
        return None
    number = 1
    while os.path.exists(folder := os.path.join(directory, f'earlier{number}')):
        number += 1
    os.mkdir(folder)
    for name in later:
        for suffix in reversed(_SUFFIXES):
            os.replace(path(directory, name) + suffix, path(folder, name) + suffix)
    return folder
