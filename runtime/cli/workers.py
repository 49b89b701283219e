"""Several processes or devices: what TF_CONFIG and --strategy ask for, and whether all workers have been started alike."""
import json
import os
import pathlib
import re
import secrets
import signal
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from runtime.compute.distribution import ALONE, Cluster, Replicas
from runtime.system.errors import UserError
from runtime.system.files import open_regular, write_atomically
from runtime.system.interruption import signals_handled_by

STRATEGIES = ('auto', 'one', 'mirrored', 'multiworker')


def cluster_from_environment(strategy: str) -> Cluster:
    """This process's Cluster, from TF_CONFIG; ALONE if not distributed. Raises UserError if TF_CONFIG is missing or malformed."""
    text = os.environ.get('TF_CONFIG', '')
    if strategy not in ('auto', 'multiworker') or strategy == 'auto' and not text:
        return ALONE
    example = ('it must be like {"cluster": {"worker": ["host1:12345", "host2:12345"]}, "task": {"type": "worker", "index": 0}}, '
               'with the index of each machine')
    if not text:
        raise UserError(f'--strategy=multiworker needs the environment variable TF_CONFIG; {example}')
    try:
        config = json.loads(text)
        hosts, task = config['cluster'], config['task']
        chiefs, workers = len(hosts.get('chief', [])), len(hosts.get('worker', []))
        index = int(str(task['index']))  # via str, to reject 1.5 and 1e999
        addresses = hosts.get('chief', []) + hosts.get('worker', [])
        if not all(map(_is_address, addresses)) or len(set(addresses)) < len(addresses):
            raise ValueError('addresses must be of the form host:port, with a port from 1 to 65535, all different')
        if set(hosts) - {'chief', 'worker'} or not 0 <= index < len(hosts[task['type']]) or chiefs > 1:
            raise ValueError('unknown kinds of tasks, or an index out of range')
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f'TF_CONFIG cannot be understood ({type(error).__name__}: {error}); {example}') from error
    return Cluster(chiefs + workers, index if task['type'] == 'chief' else chiefs + index)


def _is_address(text: str) -> bool:
    """Whether a text is host:port; TensorFlow would wait forever for anything else."""
    label = r'[A-Za-z0-9](?:[\w-]*[A-Za-z0-9])?'
    match = re.fullmatch(rf'(?:{label}\.)*{label}\.?:([0-9]{{1,5}})', text, re.ASCII)  # only a dot separates: else matching takes forever
    return bool(match) and 1 <= int(match[1]) <= 65535


def make_strategy(name: str, cluster: Cluster) -> Any:
    """The tf.distribute.Strategy of this name, one of STRATEGIES. Call this before TensorFlow computes anything.

    'auto' is 'multiworker' if there is a cluster, 'mirrored' on several GPUs, else 'one'. Raises UserError if the other workers
    cannot be reached.
    """
    import tensorflow as tf
    if name == 'multiworker' or cluster.workers > 1:
        return _connect()
    gpus = tf.config.list_logical_devices('GPU')
    if name == 'mirrored' or name == 'auto' and len(gpus) > 1:
        return tf.distribute.MirroredStrategy([device.name for device in gpus or tf.config.list_logical_devices('CPU')])
    return tf.distribute.get_strategy()


def _connect():
    """The strategy of several workers, when all of them have been started.

    Meanwhile Ctrl-C and SIGHUP end the process at once: Python's handlers would wait as long as TensorFlow does. SIGTERM does not, for
    TensorFlow has a handler of its own.
    """
    import tensorflow as tf
    try:
        with signals_handled_by(signal.SIG_DFL):
            return tf.distribute.MultiWorkerMirroredStrategy()
    except tf.errors.OpError as error:
        raise UserError(f'the workers of TF_CONFIG cannot connect ({type(error).__name__}); start all of them, and '
                        'check that they reach each other at these addresses') from error


def report_waiting(cluster: Cluster) -> None:
    """Prints that this worker waits for the others, if there are others."""
    if cluster.workers > 1:
        elsewhere = '; worker 0 reports the results' if cluster.worker else ''
        print(f'Worker {cluster.worker} waits for the other {cluster.workers - 1} of TF_CONFIG{elsewhere}', flush=True)


def program_checksum() -> int:
    """A checksum of this program's modules."""
    root = pathlib.Path(__file__).resolve().parents[2]
    modules = sorted([*root.glob('*.py'), *root.glob('runtime/**/*.py')])
    return zlib.crc32(b''.join(path.read_bytes() for path in modules))


def check_meta_batch(meta_batch_size: int, task_chunk: int, replicas: int) -> None:
    """Raises UserError if a meta-batch cannot be divided evenly between the replicas, and their tasks into chunks (0: none)."""
    if meta_batch_size % replicas:
        lower = meta_batch_size // replicas * replicas
        nearest = [size for size in (lower, lower + replicas) if size]
        raise UserError(f'--meta_batch_size={meta_batch_size} tasks cannot be divided between {replicas} replicas; the nearest '
                        f'that can {"are" if len(nearest) > 1 else "is"} {" and ".join(map(str, nearest))}')
    per_replica = meta_batch_size // replicas
    if task_chunk and per_replica % task_chunk:
        raise UserError(f'--task_chunk={task_chunk} must divide the {per_replica} tasks of each replica')


def check_one_after_the_other(inner_optimizer: str, replicas: int) -> None:
    """Raises UserError if an inner optimizer passes its state from task to task and there are several replicas."""
    if inner_optimizer == 'adam' and replicas > 1:
        raise UserError(f'--inner_optimizer=adam passes its state from task to task, so tasks cannot be spread over {replicas} '
                        f'replicas; add --strategy=one, or --inner_optimizer=sgd')


def check_classifier(pretrain_labels: str, pretrain_iterations: int, replicas: int) -> None:
    """Raises UserError if a classifier would be trained on several replicas: batch norm takes the statistics of its whole batch."""
    if pretrain_labels == 'classes' and pretrain_iterations and replicas > 1:
        raise UserError(f'--pretrain_labels=classes trains a classifier on one batch of images, which cannot be spread over {replicas} '
                        'replicas; add --strategy=one')


def check_shared(replicas: Replicas, directory: str) -> None:
    """Raises UserError if the workers do not all see the directory that the first one trains in."""
    if replicas.workers == 1:
        return
    path = os.path.join(directory, '.workers')
    if replicas.chief:
        write_atomically(path, secrets.token_bytes(8))
    check_in_sync(replicas, 'written')
    try:
        with open_regular(path, 'rb') as file:
            token = file.read()
    except OSError:
        token = b''
    check_in_sync(replicas, token)


def check_in_sync(replicas: Replicas, facts: Any, variables: Iterable = ()) -> None:
    """Waits for all workers; raises UserError if they differ in the facts (by repr) or in the values of variables."""
    if replicas.count == 1:
        return
    checksum = zlib.crc32(repr((facts, program_checksum())).encode(errors='surrogateescape'))
    for variable in variables:
        checksum = zlib.crc32(variable.numpy().tobytes(), checksum)
    checksums = replicas.strategy.gather(replicas.distribute(lambda replica: np.array([checksum])), axis=0).numpy()
    if (checksums != checksum).any():
        raise UserError('the workers differ in their flags, images, checkpoints or versions of this program; give all the '
                        'same, and a --logdir that they share')
