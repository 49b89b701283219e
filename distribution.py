"""Several devices or machines, by TensorFlow's `tf.distribute`: each replica learns from its share of a meta-batch's tasks.

Tasks are what is divided, not the task. The shared weights are on every machine; a replica gets them, adds up the gradients of
its tasks, and all replicas' sums are added up once a meta-step (an all-reduce of as many numbers as there are weights). From
the same sum, every machine makes the same step. As task j is a function of (seed, split, j), each replica draws its own tasks.
"""
import contextlib
import json
import math
import os
import re
import signal
import zlib
from typing import NamedTuple

from data_generator import UserError

STRATEGIES = ('auto', 'one', 'mirrored', 'multiworker')


class Cluster(NamedTuple):
    """What TF_CONFIG says."""
    workers: int    # processes that train
    worker: int     # which of them this is, from 0 on; that is the chief, which alone prints and writes


def cluster_from_environment(strategy):
    """The Cluster that this process is one worker of; of one, unless the strategy and TF_CONFIG say otherwise.

    Raises:
        UserError: TF_CONFIG is missing or is not as it should be.
    """
    text = os.environ.get('TF_CONFIG', '')
    if strategy not in ('auto', 'multiworker') or strategy == 'auto' and not text:
        return Cluster(1, 0)
    example = ('it must be like {"cluster": {"worker": ["host1:12345", "host2:12345"]}, "task": {"type": "worker", "index": 0}}, '
               'with the index of each machine')
    if not text:
        raise UserError(f'--strategy=multiworker needs the environment variable TF_CONFIG; {example}')
    try:
        config = json.loads(text)
        hosts, task = config['cluster'], config['task']
        chiefs, workers = len(hosts.get('chief', [])), len(hosts.get('worker', []))
        index = int(task['index'])
        addresses = hosts.get('chief', []) + hosts.get('worker', [])
        if not all(re.fullmatch(r'[^:]+:\d+', address) for address in addresses) or len(set(addresses)) < len(addresses):
            raise ValueError('addresses must be of the form host:port, each another')
        if set(hosts) - {'chief', 'worker'} or not 0 <= index < len(hosts[task['type']]) or chiefs > 1:
            raise ValueError('unknown kinds of tasks, or an index out of range')
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f'TF_CONFIG cannot be understood ({type(error).__name__}: {error}); {example}') from error
    return Cluster(chiefs + workers, index if task['type'] == 'chief' else chiefs + index)


def make_strategy(name, cluster):
    """A tf.distribute.Strategy; to be called before TensorFlow computes anything.

    Args:
        name: one of STRATEGIES. 'auto' is 'multiworker' where there is a cluster, 'mirrored' on several GPUs, else 'one'.
        cluster: a Cluster.

    Raises:
        UserError: the other workers cannot be reached.
    """
    import tensorflow as tf
    if name == 'multiworker' or cluster.workers > 1:
        try:
            with _ctrl_c_as_usual():
                return tf.distribute.MultiWorkerMirroredStrategy()
        except tf.errors.OpError as error:
            raise UserError(f'the workers of TF_CONFIG do not come together ({type(error).__name__}); start all of them, and '
                            'see that they reach each other at these addresses') from error
    gpus = tf.config.list_logical_devices('GPU')
    if name == 'mirrored' or name == 'auto' and len(gpus) > 1:
        return tf.distribute.MirroredStrategy([device.name for device in gpus or tf.config.list_logical_devices('CPU')])
    return tf.distribute.get_strategy()


@contextlib.contextmanager
def _ctrl_c_as_usual():
    """Lets Ctrl-C end the process at once: Python's own handler would wait as long as TensorFlow waits for others.

    SIGTERM is out of reach: TensorFlow handles it itself then, and waits on.
    """
    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    term = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, term)  # back from TensorFlow


def check_tasks(meta_batch_size, replicas):
    """Raises UserError where the tasks of a meta-batch cannot be divided evenly."""
    if meta_batch_size % replicas:
        lower = meta_batch_size // replicas * replicas
        nearest = [size for size in (lower, lower + replicas) if size]
        raise UserError(f'--meta_batch_size={meta_batch_size} tasks cannot be divided between {replicas} replicas; the nearest '
                        f'that can {"are" if len(nearest) > 1 else "is"} {" and ".join(map(str, nearest))}')


class Replicas:
    """The replicas of a strategy, and what is done on them.

    Attributes:
        count: how many there are in all.
        workers: how many processes they are spread over.
        chief: whether this process is the one that prints and writes.
    """

    def __init__(self, strategy=None, cluster=Cluster(1, 0)):
        import tensorflow as tf
        self._tf, self._strategy = tf, strategy or tf.distribute.get_strategy()
        self.count, self.workers, self.chief = self._strategy.num_replicas_in_sync, cluster.workers, cluster.worker == 0

    def each(self, make):
        """What make(replica) returns, a structure of arrays, for each replica of this process, numbered among all of them."""
        if self.count == 1:
            return make(0)
        return self._strategy.experimental_distribute_values_from_function(
            lambda context: self._tf.nest.map_structure(self._tf.convert_to_tensor, make(context.replica_id_in_sync_group)))

    def run(self, function, *arguments):
        """Calls a function on each replica with its part of those arguments that come from `each` or `run`."""
        return self._strategy.run(function, arguments)

    def local(self, values):
        """A tensor's value on the first replica of this process."""
        return self._strategy.experimental_local_results(values)[0]

    def total(self, function, *arguments):
        """The sums over all replicas of what `run` returns, a structure of tensors of one type, by a single all-reduce."""
        tf, made = self._tf, []

        def packed(*arguments):
            result = function(*arguments)
            made.append(result)  # for its structure, which all replicas share
            return tf.concat([tf.reshape(tensor, [-1]) for tensor in tf.nest.flatten(result)], axis=0)

        total = self._strategy.reduce('SUM', self.run(packed, *arguments), axis=None)
        shapes = [tensor.shape for tensor in tf.nest.flatten(made[0])]
        parts = tf.split(total, [math.prod(shape) for shape in shapes])
        return tf.nest.pack_sequence_as(made[0], [tf.reshape(part, shape) for part, shape in zip(parts, shapes)])

    def gather(self, values, axis):
        """All replicas' tensors one after the other along an axis."""
        return self._strategy.gather(values, axis)

    def check_alike(self, facts, variables=()):
        """Waits for all workers; raises UserError unless they come with the same facts (by repr) and values of variables.

        What workers decide by themselves, and do together, is decided by these.
        """
        if self.count > 1:
            checksum = zlib.crc32(repr(facts).encode(errors='surrogateescape'))
            for variable in variables:
                checksum = zlib.crc32(variable.numpy().tobytes(), checksum)
            sums = self.gather(self.each(lambda replica: self._tf.constant([checksum], self._tf.int64)), axis=0).numpy()
            if (sums != sums[0]).any():
                raise UserError('the workers differ in their flags, images or checkpoints; give all the same, and a --logdir '
                                'that they share')
