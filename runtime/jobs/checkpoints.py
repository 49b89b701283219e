"""Checkpoint files: `model<iteration>` for each saved iteration.

A checkpoint is a TensorFlow tensor bundle, `<prefix>.index` and `<prefix>.data-00000-of-00001`: named tensors, readable by
`tf.train.load_checkpoint`, as the reference's are. Besides the variables of `MAML.state()` it holds a record, a dict that says
what the numbers belong to. Both files are written to a temporary folder and renamed, and no checkpoint is ever overwritten by
another; the bundle's checksums show whether it is complete.
"""
import contextlib
import glob
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import filelock
import numpy as np
import tensorflow as tf

from runtime.system.errors import UserError, first_line
from runtime.system.files import locked, require_regular_file

KEPT = 10    # newest checkpoints; older ones are deleted, except for the best
_RECORD = 'record'
_ENTRIES = 'iteration', 'best', 'unprinted', 'skipped', 'flags', 'regime', 'pretrain_iterations', 'data'  # of the record
_SUFFIXES = ('.data-00000-of-00001', '.index')  # renamed in this order: the index makes the checkpoint complete
_FILE = re.compile(r'model(\d+)(\.index|\.data-00000-of-00001)$')
_TEMPORARY = '.saving'
_OPTIMIZER = '/adam/'  # in the names of an outer optimizer's state
# Summaries and results, which are meaningless for a run that starts from scratch in the directory.
_OF_A_RUN = 'events.out.tfevents.*', 'results.json', 'shipped_results.json', 'test_*', 'evaluation_*', 'predict_*'
_DESCRIPTIONS = 'run.flags', 'columns.json'  # what describes the run: its flags, and the columns of tables


class Damaged(UserError):
    """A checkpoint that cannot be read."""


class Checkpoint(NamedTuple):
    """What `load` read."""
    prefix: str
    arrays: dict    # {name: numpy array}
    record: dict


@contextlib.contextmanager
def exclusive(directory: str) -> Iterator[None]:
    """Creates the directory and, while entered, locks it against other training processes. The lock ends with the process.

    Raises:
        UserError: another process trains there, or it cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(directory, exist_ok=True)
            stack.enter_context(locked(os.path.join(directory, '.lock'), wait=False))
            with tempfile.TemporaryFile(dir=directory):
                pass
            _finish_saving(directory)
        except filelock.Timeout as error:
            raise UserError(f'another process is training in {directory}; wait for its end, stop it, or choose another '
                            '--logdir') from error
        except OSError as error:
            raise UserError(f'the experiment directory {directory} cannot be written to: {error.strerror}; choose another '
                            '--logdir') from error
        yield


def iterations(directory: str) -> list[int]:
    """The iterations of the directory's checkpoints, incomplete ones too, ascending; [] if there is no directory."""
    files = os.listdir(directory) if os.path.isdir(directory) else []
    return sorted({int(match[1]) for match in map(_FILE.match, files) if match})


def is_file_of(name: str, iteration: int | None = None) -> bool:
    """Whether a file of this name is one of a checkpoint's: of an iteration's, or of any."""
    match = _FILE.match(name)
    return bool(match) and iteration in (None, int(match[1]))


def path(directory: str, iteration: int) -> str:
    """The prefix of an iteration's checkpoint."""
    return os.path.join(directory, f'model{iteration}')


def save(prefix: str, state: dict[str, tf.Variable], record: dict) -> None:
    """Writes a checkpoint atomically; when this returns, it survives a power cut.

    Args:
        prefix: as from `path`.
        state: {name: tf.Variable or tensor}.
        record: a dict that json can write.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    directory, name = os.path.split(prefix)
    with _written(directory, name, {**state, _RECORD: tf.constant(json.dumps(record))}) as temporary:
        for suffix in _SUFFIXES:
            _sync(temporary + suffix)
        data, index = (prefix + suffix for suffix in _SUFFIXES)
        os.replace(temporary + _SUFFIXES[0], data)
        try:
            os.replace(temporary + _SUFFIXES[1], index)
        except OSError:
            os.remove(data)
            raise
        with contextlib.suppress(OSError):  # some systems cannot sync folders
            _sync(directory)


def try_saving(directory: str, state: dict[str, tf.Variable]) -> None:
    """Raises OSError if a checkpoint of a state cannot be written there now; leaves nothing behind."""
    with _written(directory, 'trial', state) as temporary:
        for suffix in _SUFFIXES:
            os.stat(temporary + suffix)


@contextlib.contextmanager
def _written(directory, name, tensors):
    """The prefix, in a temporary folder that is removed at the end, of a tensor bundle; failures are OSErrors."""
    folder = os.path.join(directory, _TEMPORARY)
    try:
        os.makedirs(folder, exist_ok=True)
        tf.raw_ops.SaveV2(prefix=os.path.join(folder, name), tensor_names=list(tensors), shape_and_slices=[''] * len(tensors),
                          tensors=[tf.convert_to_tensor(tensor) for tensor in tensors.values()])
        yield os.path.join(folder, name)
    except tf.errors.OpError as error:
        raise OSError(first_line(error)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path):
    """Flushes a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finish_saving(directory):
    """Completes a checkpoint of which a killed process had renamed one of two files; removes unfinished ones."""
    temporary = os.path.join(directory, _TEMPORARY)
    if os.path.lexists(temporary) and (os.path.islink(temporary) or not os.path.isdir(temporary)):
        raise UserError(f'{temporary} is not a folder, and checkpoints are written in a folder of this name; remove it')
    for name in os.listdir(temporary) if os.path.isdir(temporary) else []:
        match = _FILE.match(name)
        if match and match[2] == '.index' and not os.path.exists(path(temporary, match[1]) + _SUFFIXES[0]) and os.path.exists(
                path(directory, match[1]) + _SUFFIXES[0]):
            os.replace(os.path.join(temporary, name), os.path.join(directory, name))
    shutil.rmtree(temporary, ignore_errors=True)


def load(prefix: str) -> Checkpoint:
    """Reads a checkpoint written by `save`.

    Raises:
        Damaged: it is missing or cannot be read.
        UserError: it is not one of this program's.
    """
    arrays = _read(prefix)
    if _RECORD not in arrays:
        raise UserError(f'the checkpoint {prefix} was not written by this program')
    record = _decode(prefix, arrays.pop(_RECORD))
    if not set(_ENTRIES) <= record.keys():
        raise UserError(f'the checkpoint {prefix} was written by an earlier version of this program: its weights can be used by '
                        '--load_from, but training cannot continue from it')
    return Checkpoint(prefix, arrays, record)


def newest(directory: str) -> Checkpoint | None:
    """The newest checkpoint that can be read, or None if there is none. Damaged ones are reported and skipped.

    Raises:
        Damaged: there are some, and none can be read.
        UserError: as for `load`.
    """
    saved, error = iterations(directory), None
    for iteration in reversed(saved):
        try:
            return load(path(directory, iteration))
        except Damaged as damage:
            error = damage
            print(f'Warning: {damage}; trying the one before', file=sys.stderr)
    if error:
        raise Damaged(f'no checkpoint in {directory} can be read; to start anew, add --resume=False') from error
    return None


def find(directory: str, wanted: int | str | None) -> Checkpoint:
    """The requested checkpoint.

    Args:
        wanted: an iteration, None for the newest, or 'best' for the one that the newest records as best on meta-validation.

    Raises:
        UserError: as for `newest`, or it is not there; the message names the directory and what it holds.
    """
    what = 'checkpoint'
    if wanted is None or wanted == 'best':
        checkpoint = newest(directory)
        if checkpoint and wanted is None:
            return checkpoint
        wanted = checkpoint and checkpoint.record['best'] and checkpoint.record['best']['iteration']
        what = 'checkpoint that was validated' if checkpoint else 'checkpoint'
    saved = iterations(directory)
    if wanted in saved:
        return load(path(directory, wanted))
    if wanted is not None:
        what = f'checkpoint model{wanted}'
    if saved:
        there = f'there {"are" if len(saved) > 1 else "is"} ' + ', '.join(f'model{iteration}' for iteration in saved)
        hint = 'Give one of these'
    else:
        there, hint = _contents(os.path.dirname(directory)), 'Train first'
    raise UserError(f'there is no {what} in {directory}; {there}. {hint}, or name the run by --run=DIR')


def ranking_of(record: dict) -> list[dict]:
    """{'iteration', 'score'} of the checkpoints that did best on meta-validation, the best first; earlier versions ranked one."""
    return record.get('ranking', [record['best']] if record['best'] else [])


def find_best(directory: str, count: int) -> list[Checkpoint]:
    """The `count` checkpoints that did best on meta-validation, the best first.

    Raises:
        UserError: as for `find`, or the run has fewer.
    """
    checkpoint = find(directory, None)
    ranking = [entry['iteration'] for entry in ranking_of(checkpoint.record)][:count]
    if len(ranking) < count:
        raise UserError(f'--ensemble={count} needs as many checkpoints that were validated and kept, and {directory} has '
                        f'{len(ranking) or "none"}; train on with --ensemble={count}, or evaluate with --ensemble={max(len(ranking), 1)}')
    return [find(directory, iteration) for iteration in ranking]


def _contents(logdir):
    """What --logdir holds, for an error message."""
    folders = sorted(entry.name for entry in os.scandir(logdir) if entry.is_dir()) if os.path.isdir(logdir) else []
    return f'{logdir} holds ' + (', '.join(folders) or 'nothing')


def check_flags(prefix: str, there: dict, wanted: dict, hint: str) -> None:
    """Refuses a checkpoint that was made with other flags than those wanted.

    Args:
        there: {flag: value} from its record; flags that it does not know are not compared.
        wanted: {flag: value}.
        hint: what to do; the end of the error message.

    Raises:
        UserError: spells out the differences.
    """
    names = [name for name in wanted if name in there and there[name] != wanted[name]]
    if names:
        made, here = (', '.join(f'--{name}={values[name]}' for name in names) for values in (there, wanted))
        raise UserError(f'the checkpoint {prefix} was made with {made}, and not with {here}; {hint}')


def check_run(checkpoint: Checkpoint, wanted: dict, pretrain_iterations: int, hint: str) -> None:
    """`check_flags` for a run's own checkpoint, which has had as much pre-training as its iterations allow.

    Args:
        wanted, hint: as for `check_flags`.
        pretrain_iterations: of the run that is wanted.
    """
    record = checkpoint.record
    there, here = (min(record['iteration'], iterations) for iterations in (record['pretrain_iterations'], pretrain_iterations))
    check_flags(checkpoint.prefix, {**record['flags'], 'pretrain_iterations': there}, {**wanted, 'pretrain_iterations': here}, hint)


def _read(prefix):
    try:
        for suffix in '.index', '.data-*':
            for name in glob.glob(glob.escape(prefix) + suffix):
                require_regular_file(name)
        with _without_wildcards(prefix) as path:
            reader = tf.train.load_checkpoint(path)
            return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    except (OSError, ValueError, IndexError, RuntimeError, tf.errors.OpError) as error:
        raise Damaged(f'the checkpoint {prefix} cannot be read: {first_line(error)}') from error


@contextlib.contextmanager
def _without_wildcards(prefix):
    """A path of a checkpoint that TensorFlow, which expands wildcards in what it reads, takes as it is."""
    if not re.search(r'[*?[\]\\]', prefix):
        yield prefix
        return
    with tempfile.TemporaryDirectory() as folder:
        for suffix in _SUFFIXES:
            if os.path.exists(prefix + suffix):
                os.symlink(os.path.abspath(prefix + suffix), os.path.join(folder, 'model' + suffix))
        yield os.path.join(folder, 'model')


def _decode(prefix, record):
    try:
        return dict(json.loads(record))
    except (TypeError, ValueError, RecursionError) as error:
        raise Damaged(f'the checkpoint {prefix} cannot be read: its record is not one of this program') from error


def restore(checkpoint: Checkpoint, state: dict[str, tf.Variable]) -> None:
    """Assigns the values of a checkpoint to variables, to continue a training.

    Args:
        state: {name: tf.Variable}, which the checkpoint must match in names and shapes.

    Raises:
        UserError: it does not; says what differs.
    """
    if any(_OPTIMIZER in name for name in state) and not any(_OPTIMIZER in name for name in checkpoint.arrays):
        raise UserError(f'the checkpoint {checkpoint.prefix} has the weights but not the state of the optimizer, so training cannot '
                        'continue from it; start another run from its weights by --load_from')
    _assign(checkpoint.prefix, checkpoint.arrays, state)


def restore_parameters(checkpoint: Checkpoint, parameters: dict[str, tf.Variable]) -> None:
    """As `restore`, for an evaluation: the state of the optimizer is not used, and need not be there."""
    _assign(checkpoint.prefix, without_optimizer(checkpoint.arrays), parameters)


def without_optimizer(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint that an evaluation needs."""
    return {name: array for name, array in arrays.items() if _OPTIMIZER not in name}


def load_weights(prefix: str, variables: dict[str, tf.Variable], network_flags: dict) -> dict:
    """Assigns the values of a checkpoint, of this program or of the reference, to a model's parameters.

    What plain MAML lacks stays as it is if the checkpoint lacks it: learned step sizes, the state of an inner optimizer, scales of
    batch norm. Where a network has offsets and scales for each inner step and the checkpoint has one set, all become that set.

    Args:
        prefix: of a checkpoint written by `save`, or by the reference under TensorFlow 1.
        variables: {name: tf.Variable}, weights in the order in which the reference made them.
        network_flags: {flag: value}, which the record of a checkpoint of this program must not contradict.

    Returns:
        The record of a checkpoint of this program, else {}.

    Raises:
        UserError: there is no such checkpoint, it cannot be read, or names, shapes or flags differ; lists the differences.
    """
    _check_there(prefix)
    arrays = _read(prefix)
    own = _RECORD in arrays
    record = _decode(prefix, arrays.pop(_RECORD)) if own else {}
    found = (_own_weights if own else _reference_weights)(arrays, variables)
    scaled = network_flags.get('norm') == 'batch_norm'  # which has no scales in plain MAML
    for name, variable in variables.items():
        if name not in found and (name.startswith(('lr/', 'inner/')) or scaled and name.endswith('/gamma')):
            found[name] = variable.numpy()
        elif '/' in name and name in found and found[name].shape == variable.shape[1:]:
            found[name] = np.broadcast_to(found[name], variable.shape)
    _assign(prefix, found, variables)
    check_flags(prefix, record.get('flags', {}), network_flags, 'give the same')
    return record


def _check_there(prefix):
    """Raises UserError, which says what is there instead, if there is no checkpoint."""
    if os.path.exists(prefix + '.index'):
        return
    folder = os.path.abspath(os.path.dirname(prefix))
    names = os.listdir(folder) if os.path.isdir(folder) else []
    others = ', '.join(sorted(name[:-len('.index')] for name in names if name.endswith('.index')))
    raise UserError(f'there is no checkpoint {prefix} (no file {prefix}.index); {folder} holds {others or "no checkpoint"}')


def _own_weights(arrays, variables):
    """The parameters in a checkpoint of this program, without the state of an inner optimizer that the model lacks."""
    return {name: array for name, array in without_optimizer(arrays).items() if name in variables or not name.startswith('inner/')}


def _reference_weights(arrays, variables):
    """The parameters in a checkpoint of the reference, by this program's names."""
    plain = [name for name in variables if not name.startswith(('lr/', 'inner/'))]
    ours = {theirs: name for name, theirs in reference_names(plain).items()}
    return {ours.get(name, name): array for name, array in arrays.items() if name.startswith('model/') and 'Adam' not in name}


def _assign(prefix, arrays, variables):
    there = {name: f'{array.dtype.name}{list(array.shape)}' for name, array in arrays.items()}
    here = {name: f'{variable.dtype.name}{list(variable.shape)}' for name, variable in variables.items()}
    differences = [f'{name} is {there.get(name, "missing")} there and {here.get(name, "missing")} here'
                   for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if differences:
        more = f', and {len(differences) - 3} more' if len(differences) > 3 else ''
        raise UserError(f'the checkpoint {prefix} does not fit the network that the flags describe: '
                        f'{", ".join(differences[:3])}{more}')
    for name, variable in variables.items():
        variable.assign(arrays[name])


def reference_names(names: Sequence[str]) -> dict[str, str]:
    """{our name: the reference's}, for names of weights in the order of `Network.initial_weights`, and of norm parameters.

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


def prune(directory: str, best: Sequence[int]) -> None:
    """Deletes all checkpoints but the KEPT newest ones and those of the iterations `best`."""
    for iteration in iterations(directory)[:-KEPT]:
        if iteration not in best:
            for suffix in reversed(_SUFFIXES):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path(directory, iteration) + suffix)


def move_aside(directory: str, iteration: int) -> str | None:
    """Moves the checkpoints after an iteration into a new folder beside them; for iteration 0 also summaries and results.

    Returns:
        The folder, or None if there was nothing to move.
    """
    later = [name for name in iterations(directory) if name > iteration]
    found = [glob.glob(os.path.join(glob.escape(directory), pattern)) for pattern in _OF_A_RUN]
    others = [] if iteration else sum(found, [])
    if not later and not others:
        return None
    number = 1
    while os.path.exists(folder := os.path.join(directory, f'earlier{number}')):
        number += 1
    os.mkdir(folder)
    for name in _DESCRIPTIONS:  # the next training writes its own
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(os.path.join(directory, name), folder)
    for name in others:
        os.replace(name, os.path.join(folder, os.path.basename(name)))
    for name in later:
        for suffix in reversed(_SUFFIXES):
            with contextlib.suppress(FileNotFoundError):  # of an incomplete one
                os.replace(path(directory, name) + suffix, path(folder, name) + suffix)
    return folder
