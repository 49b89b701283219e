"""Checkpoint files: `model<iteration>` for each saved iteration.

A checkpoint is a TensorFlow tensor bundle, `<prefix>.index` and `<prefix>.data-00000-of-00001`: named tensors, readable by
`tf.train.load_checkpoint`, as the reference's are. Besides the variables of `MAML.state()` it holds a record, a dict that says
what the numbers belong to. Both files are written to a temporary folder and renamed, and no checkpoint is ever overwritten by
another; the bundle's checksums show whether it is complete.
"""
import contextlib
import functools
import glob
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypedDict

import filelock
import numpy as np
import tensorflow as tf

from keras_network import CLASSIFIER, HEAD_PREFIX
from networks import HEADS
from runtime.jobs import bundle
from runtime.results import store
from runtime.results.provenance import Provenance
from runtime.system.errors import UserError, first_line, listing
from runtime.system.files import locked, open_regular
from runtime.system.schema import checked

KEPT = 10    # newest checkpoints; older ones are deleted, except for the best
_RECORD = 'record'
_REQUIRED = {'iteration', 'best', 'unprinted', 'skipped', 'flags', 'regime', 'pretrain_iterations', 'provenance'}  # of the record
_SUFFIXES = _DATA, _INDEX = '.data-00000-of-00001', '.index'  # renamed in this order: the index makes a checkpoint complete
_FILE = re.compile(r'model(\d+)(\.index|\.data-00000-of-00001)$')
_TEMPORARY = '.saving'
_OPTIMIZER = '/adam/'  # in the names of an outer optimizer's state
# What is meaningless for a run that starts from scratch in the directory, and what is of its newest checkpoint.
_OF_A_RUN = 'events.out.tfevents.*', 'results.json', 'shipped_results.json', 'evaluation_*', 'predict_*', 'console.log', 'metrics.csv'
_OF_THE_NEWEST = 'test_*'
_PICTURE = re.compile(r'evaluation_[a-z]+_model(\d+)(?!\d)(?!.*_of_.+_[0-9a-f]{8})')  # but not of weights of another run
# What describes the run: its flags, the columns of tables, the split of one's own data, a network of one's own; and its metrics, of
# which those of later iterations will be removed.
_DESCRIPTIONS = 'run.flags', 'columns.json', 'splits.csv', 'network', 'metrics.csv'


class Damaged(UserError):
    """A checkpoint that cannot be read."""


class _Score(TypedDict):
    iteration: int
    score: float


class Score(_Score, total=False):
    """How a checkpoint did on meta-validation; those of earlier versions lack the number of tasks."""
    tasks: int


class Record(TypedDict, total=False):
    """What the numbers of a checkpoint belong to. Those of earlier versions may lack fields."""
    iteration: int
    best: Score | None
    ranking: list[Score]        # the best on meta-validation, the best first
    unprinted: list[list[float]]  # [pre, post, others that are reported] of each iteration since the last console line
    norms: list[float]          # of the meta-gradients of those iterations
    idle: int                   # iterations in a row in which an outer step was sought and none taken
    skipped: int                # iterations whose loss or gradient was not finite
    flags: dict[str, str | int | float | bool | None]  # that determine what is learnt
    regime: str                 # the last phase of the training: 'metatrain' | 'pretrain'
    pretrain_iterations: int
    provenance: Provenance


class Checkpoint(NamedTuple):
    """What `load` read."""
    prefix: str
    arrays: dict[str, np.ndarray]
    record: Record
    checksum: int


@contextlib.contextmanager
def exclusive(directory: str) -> Iterator[None]:
    """Creates the directory and, while entered, locks it against other training processes. The lock ends with the process. Raises
    UserError if another process trains there, or it cannot be written to."""
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
    return sorted({iteration_of(name) for name in files} - {None})


def iteration_of(name: str) -> int | None:
    """The iteration of the checkpoint of which a file of this name is a part; None of other files."""
    match = _FILE.match(name)
    return int(match[1]) if match else None


def refuse_untrained(directory: str, iteration: int, skipped: int) -> None:
    """Raises UserError if all iterations of a training were skipped, so that its checkpoint has the weights of the start."""
    if iteration and skipped == iteration:
        raise UserError('nothing was learnt: no iteration had a finite loss and gradient, so all were skipped; '
                        f'{path(directory, iteration)} has the weights of the start. Lower --update_lr or --meta_lr')


def path(directory: str, iteration: int) -> str:
    """The prefix of an iteration's checkpoint."""
    return os.path.join(directory, f'model{iteration}')


def save(prefix: str, state: dict[str, tf.Variable], record: Record) -> None:
    """Writes {name: tf.Variable or tensor} and a record of JSON values, atomically; when this returns, they survive a power cut.
    Raises OSError if they cannot be written; nothing is left of them."""
    directory, name = os.path.split(prefix)
    with _written(directory, name, {**state, _RECORD: tf.constant(json.dumps(record, default=vars))}) as temporary:
        os.replace(temporary + _DATA, prefix + _DATA)
        try:
            os.replace(temporary + _INDEX, prefix + _INDEX)
        except OSError:
            os.remove(prefix + _DATA)
            raise
        with contextlib.suppress(OSError):  # some systems cannot sync folders
            _sync(directory)


def try_saving(directory: str, state: dict[str, tf.Variable]) -> None:
    """Raises OSError if a checkpoint of a state cannot be written there now; leaves nothing behind."""
    with _written(directory, 'trial', state):
        pass


@contextlib.contextmanager
def _written(directory, name, tensors):
    """The prefix, in a temporary folder that is removed at the end, of a tensor bundle; failures are OSErrors."""
    folder = os.path.join(directory, _TEMPORARY)
    prefix = os.path.join(folder, name)
    try:
        os.makedirs(folder, exist_ok=True)
        tf.raw_ops.SaveV2(prefix=prefix, tensor_names=list(tensors), shape_and_slices=[''] * len(tensors),
                          tensors=[tf.convert_to_tensor(tensor) for tensor in tensors.values()])
        for suffix in _SUFFIXES:
            _sync(prefix + suffix)
        yield prefix
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
    if os.path.islink(temporary) or os.path.exists(temporary) and not os.path.isdir(temporary):
        raise UserError(f'{temporary} is not a folder, and checkpoints are written in a folder of this name; remove it')
    for iteration in iterations(temporary):
        unfinished, finished = path(temporary, iteration), path(directory, iteration)
        if os.path.exists(finished + _DATA) and not os.path.exists(unfinished + _DATA):
            os.replace(unfinished + _INDEX, finished + _INDEX)
    shutil.rmtree(temporary, ignore_errors=True)


def load(prefix: str) -> Checkpoint:
    """Reads what `save` wrote. Raises Damaged if it is missing or cannot be read, UserError if it is of another program."""
    checkpoint = _read(prefix)
    if not checkpoint.record:
        raise UserError(f'the checkpoint {prefix} was not written by this program')
    name = os.path.basename(prefix)
    if re.fullmatch(r'model\d+', name) and name != f'model{checkpoint.record.get("iteration")}':
        saved = checkpoint.record.get('iteration')
        raise Damaged(f'the checkpoint {prefix} was saved after {saved} iterations, and its name has another number; rename it '
                      f'model{saved}')
    if not _REQUIRED <= checkpoint.record.keys():
        raise UserError(f'the checkpoint {prefix} was written by an earlier version of this program: its weights can be used by '
                        '--load_from, but training cannot continue from it')
    return checkpoint


def newest(directory: str) -> Checkpoint | None:
    """The newest checkpoint; None if there is none. Damaged ones are reported and skipped; raises Damaged if all are."""
    error = None
    for iteration in reversed(iterations(directory)):
        try:
            return load(path(directory, iteration))
        except Damaged as damage:
            error = damage
            print(f'Warning: {damage}; trying the one before', file=sys.stderr)
    if error:
        raise Damaged(f'no checkpoint in {directory} can be read; to start anew, add --resume=False') from error
    return None


def find(directory: str, selection: int | str | None) -> Checkpoint:
    """The checkpoint of an iteration; None: the newest; 'best': the one that the newest records as best on meta-validation.
    Raises UserError as `newest`, or if it is not there; the message names the directory and what it holds."""
    what, iteration = 'checkpoint', selection
    if selection is None or selection == 'best':
        checkpoint = newest(directory)
        if checkpoint and selection is None:
            return checkpoint
        best = checkpoint.record['best'] if checkpoint else None
        iteration = best['iteration'] if best else None
        what = 'checkpoint that was validated' if checkpoint else 'checkpoint'
    saved = iterations(directory)
    if iteration in saved:
        return load(path(directory, iteration))
    if iteration is not None:
        what = f'checkpoint model{iteration}'
    if saved:
        hint = f'there {"are" if len(saved) > 1 else "is"} {", ".join(f"model{number}" for number in saved)}. Give one of these'
    else:
        logdir = os.path.dirname(os.path.abspath(directory))
        folders = sorted(name.rstrip('/') for name in glob.glob('*/', root_dir=logdir))
        hint = f'{logdir} holds {", ".join(folders) or "nothing"}. Train first'
    raise UserError(f'there is no {what} in {directory}; {hint}, or name another run by --run=DIR')


def ranking_of(record: Record) -> list[Score]:
    """The scores of the checkpoints that did best on meta-validation, the best first; earlier versions ranked one."""
    return record.get('ranking', [record['best']] if record['best'] else [])


def saved_ranking(directory: str, record: Record) -> list[Score]:
    """`ranking_of` a run's record, without checkpoints that are gone: later ones may have replaced them, or only some ship."""
    saved = iterations(directory)
    return [entry for entry in ranking_of(record) if entry['iteration'] in saved]


def find_best(directory: str, count: int) -> list[Checkpoint]:
    """The `count` checkpoints that did best on meta-validation, the best first, or as many as there are; raises UserError for none."""
    ranking = [entry['iteration'] for entry in saved_ranking(directory, find(directory, None).record)][:count]
    if not ranking:
        raise UserError(f'--ensemble={count} needs checkpoints that were validated, and {directory} has none; evaluate with --ensemble=1')
    if len(ranking) < count:
        print(f'--ensemble={count}: only {len(ranking)} checkpoints were validated and kept; all are used')
    return [find(directory, iteration) for iteration in ranking]


def check_flags(prefix: str, recorded: dict, flags: dict, hint: str) -> None:
    """Raises UserError if a checkpoint's record has other values of flags, {flag: value}; those that it lacks are not compared.
    The message spells out the differences, and ends in the hint."""
    names = [name for name in flags if name in recorded and recorded[name] != flags[name]]
    if names:
        made, given = (', '.join(f'--{name}={values[name]}' for name in names) for values in (recorded, flags))
        raise UserError(f'the checkpoint {prefix} was made with {made}, and not with {given}; {hint}')


def check_run(checkpoint: Checkpoint, flags: dict, last_phase: str, pretrain_iterations: int, hint: str) -> None:
    """`check_flags` for a run's own checkpoint, which has had as much pre-training as its iterations allow. In a run that only
    pre-trains, their number says how long the training is, and not what is trained."""
    record = checkpoint.record
    if record['regime'] == last_phase == 'pretrain':
        pretrain_iterations = record['pretrain_iterations']
    made, given = (min(record['iteration'], iterations) for iterations in (record['pretrain_iterations'], pretrain_iterations))
    recorded, flags = {**record['flags'], 'pretrain_iterations': made}, {**flags, 'pretrain_iterations': given}
    check_flags(checkpoint.prefix, recorded, flags, hint)


def checksum(prefix: str) -> int:
    """CRC-32 of a checkpoint's index, which has the checksums of all that it holds; raises OSError if it cannot be read."""
    with open_regular(prefix + _INDEX, 'rb') as file:
        return zlib.crc32(file.read())


def _read(prefix):
    """The Checkpoint at a prefix; its record is {} if the reference wrote it."""
    try:
        before = checksum(prefix)
        bundle.check(prefix + _INDEX, prefix + _DATA)
        with _without_wildcards(prefix) as path:
            reader = tf.train.load_checkpoint(path)
            arrays = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    except (OSError, ValueError, IndexError, RuntimeError, tf.errors.OpError) as error:
        raise Damaged(f'the checkpoint {prefix} cannot be read: {first_line(error)}') from error
    try:
        record = _checked_record(arrays.pop(_RECORD, '{}'))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise Damaged(f'the checkpoint {prefix} cannot be read: its record is not one of this program ({first_line(error)})') from error
    return Checkpoint(prefix, arrays, record, before)


def _checked_record(text):
    """The Record in a text; raises ValueError or TypeError if it is none."""
    record = json.loads(text)
    if 'data' in record and 'provenance' not in record:  # of earlier versions
        record['provenance'] = {'data': record.pop('data')}
    record = checked(Record, record, 'record')
    numbers = [record.get(name, 0) for name in ('iteration', 'skipped', 'idle', 'pretrain_iterations')]
    lengths = set(map(len, record.get('unprinted', [])))
    regime = record.get('regime', 'pretrain')
    if min(numbers) < 0 or len(lengths) > 1 or min(lengths, default=2) < 2 or regime not in ('pretrain', 'metatrain'):
        raise ValueError('numbers are out of range')
    return record


@contextlib.contextmanager
def _without_wildcards(prefix):
    """A path of a checkpoint that TensorFlow, which expands wildcards in what it reads, takes as it is."""
    if not re.search(r'[*?[\]\\]', prefix):
        yield prefix
        return
    with tempfile.TemporaryDirectory() as folder:
        for suffix in _SUFFIXES:
            os.symlink(os.path.abspath(prefix + suffix), os.path.join(folder, 'model' + suffix))
        yield os.path.join(folder, 'model')


def restore(checkpoint: Checkpoint, variables: dict[str, tf.Variable]) -> None:
    """Assigns the values of a checkpoint to variables: `MAML.state()`, to continue a training, or for an evaluation
    `MAML.parameters()`, which lack the state of the optimizer. Raises UserError, which says what differs, if they do not match.
    """
    arrays = checkpoint.arrays
    if not any(_OPTIMIZER in name for name in variables):
        weights = without_optimizer(arrays)
        arrays = {name: array for name, array in arrays.items() if name in weights or name in variables}  # a classifier's too
    elif not any(_OPTIMIZER in name for name in arrays):
        raise UserError(f'the checkpoint {checkpoint.prefix} has the weights but not the state of the optimizer, so training '
                        'cannot continue from it; start another run from its weights by --load_from')
    _assign(checkpoint.prefix, arrays, variables)


def without_optimizer(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint that an evaluation needs: neither the optimizer's, nor those of a classifier of pre-training."""
    return {name: array for name, array in arrays.items() if _OPTIMIZER not in name and not name.startswith(CLASSIFIER)}


def load_any(prefix: str) -> Checkpoint:
    """Reads a checkpoint of this program, or of the reference under TensorFlow 1, whose record is {}. Raises UserError, which
    says what is there instead, if there is none; Damaged if it cannot be read."""
    if not os.path.exists(prefix + _INDEX):
        folder = os.path.abspath(os.path.dirname(prefix))
        others = ', '.join(sorted(name.removesuffix(_INDEX) for name in glob.glob('*' + _INDEX, root_dir=folder)))
        raise UserError(f'there is no checkpoint {prefix} (no file {prefix}.index); {folder} holds {others or "no checkpoint"}')
    return _read(prefix)


def restore_weights(checkpoint: Checkpoint, variables: dict[str, tf.Variable], network_flags: dict, last_layer: Sequence[str],
                    starts: bool, head_init: str) -> None:
    """Assigns the values of what `load_any` read to a model's parameters; raises UserError, which lists the differences, if
    names, shapes or flags differ.

    What plain MAML lacks stays as it is if the checkpoint lacks it: learned step sizes, the state of an inner optimizer, scales
    of batch norm. Where a network has offsets and scales for each inner step and the checkpoint has one set, all become that set.
    The model may lack the last layer. In a training that `starts`, the checkpoint may, or may have learnt one for another --head_init:
    that layer then stays as it is.

    Args:
        variables: {name: tf.Variable}, weights in the order in which the reference made them.
        network_flags: {flag: value}, which the record of a checkpoint of this program must not contradict.
        last_layer: the names of the network's last layer.
        head_init: of the model.
    """
    prefix, _, record, _ = checkpoint
    saved_head = record.get('flags', {}).get('head_init', head_init)
    computed = HEADS[head_init].extra if saved_head != head_init else ()
    # A network's last layer may have the names of what the model's has besides.
    arrays = {name: array for name, array in _parameters(checkpoint, variables, last_layer).items() if name not in computed}
    replaced = starts and saved_head != head_init
    has_both = all(name in arrays and name in variables for name in last_layer)
    if last_layer and (replaced or saved_head == head_init == 'shared' or not has_both):
        network_flags = {name: value for name, value in network_flags.items() if name != 'num_classes'}  # which is free then
    arrays = _with_last_layer(arrays, variables, last_layer, starts, replaced)
    of_network = set(last_layer).difference(HEADS[head_init].extra)
    _add_what_plain_maml_lacks(arrays, variables, of_network, network_flags.get('norm') == 'batch_norm')
    _assign(prefix, arrays, variables)
    check_flags(prefix, record.get('flags', {}), network_flags, 'give the same')


def outputs(checkpoint: Checkpoint, last_layer: Sequence[str]) -> int | None:
    """The number of outputs of a classifier that `load_any` read; None if it does not tell, or has no last layer, whose names are
    given."""
    if checkpoint.record:
        return checkpoint.record.get('flags', {}).get('num_classes') if set(last_layer) <= checkpoint.arrays.keys() else None
    numbered = [name for name in checkpoint.arrays if re.fullmatch(r'model/Variable_\d+', name)]
    bias = checkpoint.arrays.get('model/b5', checkpoint.arrays.get(max(numbered, default='', key=lambda name: (len(name), name))))
    return None if bias is None else bias.shape[-1]


def _parameters(checkpoint, variables, last_layer):
    """A checkpoint's arrays by this program's names, without the state of optimizers that the model does not have."""
    if checkpoint.record:
        return {name: array for name, array in without_optimizer(checkpoint.arrays).items()
                if name in variables or not name.startswith('inner/')}
    return _reference_weights(checkpoint.arrays, list(dict.fromkeys([*variables, *last_layer])))


def _with_last_layer(arrays, variables, last_layer, starts, replaced):
    """Arrays without a last layer that the model lacks. In a training that `starts`, the model's own last layer is added where the arrays
    have none, or, if --head_init is another (`replaced`), where theirs has another shape."""
    arrays = {name: array for name, array in arrays.items()
              if name in variables or not (name in last_layer or name.startswith(HEAD_PREFIX))}
    if replaced:
        arrays = {name: array for name, array in arrays.items()
                  if name not in last_layer or name not in variables or array.shape == variables[name].shape}
    fresh = [name for name in last_layer if starts and name in variables]
    return {**{name: variables[name].numpy() for name in fresh}, **arrays}


def _add_what_plain_maml_lacks(arrays, variables, last_layer, scaled):
    """Adds to arrays the model's own values of what a checkpoint of plain MAML lacks: learned step sizes, the inner optimizer's state, what
    heads have besides the network's last layer (which may itself be called head), and if `scaled` the scales of batch norm. One set of
    offsets and scales becomes that of each inner step."""
    for name, variable in variables.items():
        belongs_to_head = name.startswith(HEAD_PREFIX) and name not in last_layer
        if name not in arrays and (belongs_to_head or name.startswith(('lr/', 'inner/')) or scaled and name.endswith('/gamma')):
            arrays[name] = variable.numpy()
        elif '/' in name and name in arrays and arrays[name].shape == variable.shape[1:]:
            arrays[name] = np.broadcast_to(arrays[name], variable.shape)


def _reference_weights(arrays, variables):
    """The parameters in a checkpoint of the reference, by this program's names. The reference names convolutions and the last
    layer of a convolutional net; TensorFlow 1 numbered the others."""
    names, numbered = {}, 0
    for name in variables:
        if '/' in name or 'conv1' in variables and (name.startswith('conv') or name in ('w5', 'b5')):
            names[f'model/{name}'] = name
        else:
            names[f'model/Variable_{numbered}' if numbered else 'model/Variable'] = name
            numbered += 1
    return {names.get(name, name): array for name, array in arrays.items() if name.startswith('model/') and 'Adam' not in name}


def _assign(prefix, arrays, variables):
    saved = {name: f'{array.dtype.name}{list(array.shape)}' for name, array in arrays.items()}
    expected = {name: f'{variable.dtype.name}{list(variable.shape)}' for name, variable in variables.items()}
    differences = [f'{name} is {saved.get(name, "missing")} there and {expected.get(name, "missing")} here'
                   for name in sorted(saved.keys() | expected.keys()) if saved.get(name) != expected.get(name)]
    if differences:
        raise UserError(f'the checkpoint {prefix} does not fit the network that the flags describe: {listing(differences, 3, ", ")}')
    for name, variable in variables.items():
        variable.assign(arrays[name])


def _files(directory, iteration):
    """The paths of a checkpoint's files; the index, without which it is incomplete, is the first."""
    paths = [path(directory, iteration) + suffix for suffix in reversed(_SUFFIXES)]
    return [name for name in paths if os.path.lexists(name)]


def prune(directory: str, best: Sequence[int]) -> None:
    """Deletes all checkpoints but the KEPT newest ones and those of the iterations `best`."""
    for iteration in iterations(directory)[:-KEPT]:
        if iteration not in best:
            for name in _files(directory, iteration):
                os.remove(name)


def move_aside(directory: str, iteration: int) -> str | None:
    """Moves the checkpoints after an iteration into a new folder, with their evaluations; after iteration 0 all that is of the
    run. Returns the folder, or None if there was nothing to move. Raises UserError if something is to be moved, and there are results that
    cannot be read."""
    with store.changing(directory):
        paths, folder = _later_paths(directory, iteration), functools.cache(functools.partial(_new_folder, directory))
        try:
            store.entries_of(directory)  # damaged ones are reported before anything is moved
        except UserError:
            if paths:
                raise
            return None
        for name in paths:
            os.replace(name, os.path.join(folder(), os.path.basename(name)))
        store.move_later(directory, iteration, folder)
        return folder() if folder.cache_info().currsize else None


def _later_paths(directory, iteration):
    """The files that are of a run's checkpoints after an iteration."""
    later = [number for number in iterations(directory) if number > iteration]
    if iteration:
        patterns = [_OF_THE_NEWEST] if later else []
        pictures = [name for name in os.listdir(directory) if (match := _PICTURE.match(name)) and int(match[1]) > iteration]
    else:
        patterns, pictures = [*_OF_A_RUN, _OF_THE_NEWEST], []
    names = [*(name for pattern in patterns for name in glob.glob(pattern, root_dir=directory)), *pictures]
    return [*(name for number in later for name in _files(directory, number)), *(os.path.join(directory, name) for name in names)]


def _new_folder(directory):
    """A new folder for what is moved aside, with what describes it: the next training writes its own."""
    number = 1
    while os.path.exists(folder := os.path.join(directory, f'earlier{number}')):
        number += 1
    os.mkdir(folder)
    for description in _DESCRIPTIONS:
        source = os.path.join(directory, description)
        if os.path.isdir(source):
            shutil.copytree(source, os.path.join(folder, description))
        elif os.path.exists(source):
            shutil.copy(source, folder)
    return folder
