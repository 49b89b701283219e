"""Several devices or machines, by TensorFlow's `tf.distribute`.

Tasks are distributed over replicas; a single task is never split. Every machine has the shared weights. Each replica sums the
gradients of its tasks, and one all-reduce per meta-step, of as many numbers as there are weights, sums them over replicas. From
the same sum, every machine makes the same update. As task j is a function of (seed, split, j), each replica draws its own tasks.
"""
import contextlib
import glob
import json
import os
import re
import signal
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from runtime.errors import UserError

STRATEGIES = ('auto', 'one', 'mirrored', 'multiworker')


class Cluster(NamedTuple):
    """The contents of TF_CONFIG."""
    workers: int    # number of processes
    worker: int     # index of this one; 0 is the chief, which alone prints and writes


ALONE = Cluster(1, 0)


def cluster_from_environment(strategy: str) -> Cluster:
    """This process's Cluster, from TF_CONFIG; Cluster(1, 0) if not distributed.

    Raises:
        UserError: TF_CONFIG is missing or malformed.
    """
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
    match = re.fullmatch(r'(?:[A-Za-z0-9](?:[\w-]*[A-Za-z0-9])?\.?)+:([0-9]{1,5})', text, re.ASCII)
    return bool(match) and 1 <= int(match[1]) <= 65535


def make_strategy(name: str, cluster: Cluster) -> Any:
    """A tf.distribute.Strategy. Call this before TensorFlow computes anything.

    Args:
        name: one of STRATEGIES. 'auto' is 'multiworker' if there is a cluster, 'mirrored' on several GPUs, else 'one'.

    Raises:
        UserError: the other workers cannot be reached.
    """
    import tensorflow as tf
    if name == 'multiworker' or cluster.workers > 1:
        try:
            with _ctrl_c_as_usual():
                return tf.distribute.MultiWorkerMirroredStrategy()
        except tf.errors.OpError as error:
            raise UserError(f'the workers of TF_CONFIG cannot connect ({type(error).__name__}); start all of them, and '
                            'check that they reach each other at these addresses') from error
    gpus = tf.config.list_logical_devices('GPU')
    if name == 'mirrored' or name == 'auto' and len(gpus) > 1:
        return tf.distribute.MirroredStrategy([device.name for device in gpus or tf.config.list_logical_devices('CPU')])
    return tf.distribute.get_strategy()


@contextlib.contextmanager
def _ctrl_c_as_usual():
    """Lets Ctrl-C and SIGHUP end the process at once: Python's handlers would wait as long as TensorFlow waits for workers.

    SIGTERM cannot be restored: TensorFlow handles it itself meanwhile, and continues to wait.
    """
    hangup = getattr(signal, 'SIGHUP', signal.SIGINT)  # not all systems have it
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, hangup)}
    for number, handler in before.items():
        if number != signal.SIGTERM and handler != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # that of SIGTERM was replaced by TensorFlow


def report_waiting(cluster: Cluster) -> None:
    """Prints that this worker waits for the others, if there are others."""
    if cluster.workers > 1:
        elsewhere = '; worker 0 reports the results' if cluster.worker else ''
        print(f'Worker {cluster.worker} waits for the other {cluster.workers - 1} of TF_CONFIG{elsewhere}', flush=True)


def program_checksum() -> int:
    """A checksum of this program's modules."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = sorted(glob.glob(os.path.join(glob.escape(root), '*.py')) + glob.glob(os.path.join(glob.escape(root), 'runtime', '*.py')))
    checksum = 0
    for path in paths:
        with open(path, 'rb') as file:
            checksum = zlib.crc32(file.read(), checksum)
    return checksum


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


class Replicas:
    """The replicas of a strategy.

    Attributes:
        strategy: the tf.distribute.Strategy.
        count: number of replicas in all processes.
        workers: number of processes.
        chief: whether this process is the one that prints and writes.
    """

    def __init__(self, strategy: Any = None, cluster: Cluster = ALONE):
        """strategy: None: the default one, of a single replica."""
        import tensorflow as tf
        self._tf, self.strategy = tf, strategy or tf.distribute.get_strategy()
        self.count, self.workers, self.chief = self.strategy.num_replicas_in_sync, cluster.workers, cluster.worker == 0

    def distribute(self, make: Callable[[int], Any]) -> Any:
        """Gives each replica of this process a structure of arrays: make(replica), numbered among all replicas."""
        if self.count == 1:
            return make(0)
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: self._tf.nest.map_structure(self._tf.convert_to_tensor, make(context.replica_id_in_sync_group)))

    def add_leading_axis(self, arrays: Any) -> Any:
        """Adds a leading axis of length 1 to a structure that `distribute` returned."""
        return self.strategy.run(lambda arrays: self._tf.nest.map_structure(lambda array: array[None], arrays), (arrays,))

    def first_local(self, values: Any) -> Any:
        """A tensor's value on the first replica of this process."""
        return self.strategy.experimental_local_results(values)[0]

    def gather(self, values: Any, axis: int) -> Any:
        """The tensors of all replicas concatenated along an axis."""
        return self.strategy.gather(values, axis)

    def check_in_sync(self, facts: Any, variables: Iterable = ()) -> None:
        """Waits for all workers, and checks that they agree on these facts, from which each derives the same decisions.

        Raises:
            UserError: the workers differ in the facts (by repr) or in the values of variables.
        """
        if self.count > 1:
            checksum = zlib.crc32(repr((facts, program_checksum())).encode(errors='surrogateescape'))
            for variable in variables:
                checksum = zlib.crc32(variable.numpy().tobytes(), checksum)
            own = self.distribute(lambda replica: self._tf.constant([checksum], self._tf.int64))
            sums = self.gather(own, axis=0).numpy()
            if (sums != sums[0]).any():
                raise UserError('the workers differ in their flags, images, checkpoints or versions of this program; give all the '
                                'same, and a --logdir that they share')
