"""From parsed flags to a Run and its data; importing TensorFlow, set up for this program and without its notices."""
import contextlib
import os
import platform
import signal
import sys
from typing import Any

from runtime.cli import methods, rules, workers
from runtime.cli.flags import CommandLine
from runtime.cli.request import resolve
from runtime.cli.run import Run, make_run
from runtime.cli.run_data import read_data, source_and_tasks
from runtime.compute.distribution import ALONE, Cluster, Replicas
from runtime.system.cores import usable_cores
from runtime.system.errors import UserError, first_line
from runtime.system.interruption import TERMINATION_SIGNALS

# What TensorFlow reads when it is imported; the environment may say otherwise. The system's allocator gives large tensors back at
# once, and each page of the next one costs a fault: a fifth of a MiniImagenet step. TensorFlow's own keeps them. oneDNN's kernels
# are its default on processors with AVX-512 only; with AVX2 a step takes 0.7 to 0.9 of the time with Eigen's.
SETTINGS = {'TF_CPU_ALLOCATOR_USE_BFC': '1', **({'TF_ENABLE_ONEDNN_OPTS': '1'} if platform.machine() in ('x86_64', 'AMD64') else {})}
SHOWN_BYTES = 20000  # of what libraries print before they abort
_STARTED = b'\0started\0'


def run_and_data(line: CommandLine) -> tuple[Run, Any]:
    """The run that a command line asks for, and the data that `read_data` reads for it.
    Raises UserError if the flags or the data are wrong."""
    if line.rest:
        raise UserError(f'{line.rest[0]!r} is not a flag; write --name=value')
    request = resolve(line)
    rules.check_flags(request)
    if request.dropped:
        dropped = ', '.join(f'--{name}={value}' for name, value in request.dropped.items())
        print(f'--method={request.method}: {dropped} left out, because {"they do" if len(request.dropped) > 1 else "it does"} not apply to '
              'this source or network')
    others = methods.overridden(request.method, request.values, request.given) if request.mode == 'train' else {}
    if others:
        own, given = (' '.join(f'--{name}={values[name]}' for name in others) for values in (others, request.values))
        print(f'Note: --method={request.method} has {own}; the command line or its --flagfile has {given}, which is used')
    strategy = 'one' if request.mode == 'predict' else request.strategy
    cluster = workers.cluster_from_environment(strategy)
    # The data first: their errors are reported before TensorFlow loads.
    source, tasks = source_and_tasks(request)
    data = read_data(request, source, tasks)
    workers.report_waiting(cluster)
    replicas = import_tensorflow(strategy, cluster)
    if request.mode == 'train':
        workers.check_meta_batch(request.meta_batch_size, request.task_chunk, replicas.count)
        workers.check_one_after_the_other(request.inner_optimizer, replicas.count)
        workers.check_classifier(request.pretrain_labels, request.iterations[0], replicas.count)
    for name in 'ensemble', 'permutations':
        if request.mode != 'train' and request.values[name] > 1 and replicas.count > 1:
            raise UserError(f'--{name}={request.values[name]} is evaluated on one device: add --strategy=one')
    return make_run(request, source, tasks, replicas), data


def import_tensorflow(strategy: str = 'one', cluster: Cluster = ALONE) -> Replicas:
    """Imports TensorFlow set up for one task per core: single-threaded kernels, as many at a time as there are cores.

    Its notices (on processor features, missing GPUs, XLA) are hidden. They come while it is imported, while it looks for devices
    and when XLA first compiles, and before its log levels are obeyed, so all of that is done here. If TF_CPP_MIN_LOG_LEVEL is
    set in the environment, it alone decides what is hidden. `strategy` and `cluster` are those of `workers.make_strategy`, which
    must come before the first computation.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    silent = 'TF_CPP_MIN_LOG_LEVEL' not in os.environ
    # With several workers, TensorFlow reports a lost worker at length; this program reports it in one line.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3' if cluster.workers > 1 else '2')
    with _hidden_stderr() if silent and hasattr(os, 'fork') else contextlib.nullcontext():
        try:
            import tensorflow as tf
        except (ImportError, MemoryError, OSError) as error:
            raise UserError(f'TensorFlow cannot be imported ({first_line(error)}); is there enough memory (ulimit -v), and is it '
                            'installed?') from error
        if silent:
            tf.get_logger().setLevel('ERROR')  # It warns of functions traced for many shapes, which is intended here.
        with contextlib.suppress(RuntimeError):  # TensorFlow has computed already, in a notebook for example
            tf.config.threading.set_intra_op_parallelism_threads(1)
            tf.config.threading.set_inter_op_parallelism_threads(usable_cores())
        replicas = Replicas(workers.make_strategy(strategy, cluster), cluster)
        tf.function(tf.identity, jit_compile=True)(0.0)
    if silent:
        del os.environ['TF_CPP_MIN_LOG_LEVEL']  # It has been read; child processes decide for themselves.
    return replicas


@contextlib.contextmanager
def _hidden_stderr():
    """Hides what C++ code writes to the standard error; shows it if the process ends meanwhile, as by an abort in a library."""
    sys.stderr.flush()
    reading, writing = os.pipe()
    console = os.dup(2)
    child = os.fork()
    if not child:
        _show_if_it_ends(reading, writing, console)
    os.dup2(writing, 2)
    try:
        yield
    finally:
        os.write(writing, _STARTED)
        os.dup2(console, 2)
        for descriptor in reading, writing, console:
            os.close(descriptor)
        with contextlib.suppress(ChildProcessError):  # where children are reaped by the system
            os.waitpid(child, 0)


def _show_if_it_ends(reading, writing, console):
    """The child process: prints what comes through a pipe, unless it ends in _STARTED."""
    try:
        for number in TERMINATION_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        os.close(writing)
        text = b''
        while not text.endswith(_STARTED) and (more := os.read(reading, 4096)):
            text += more
        if not text.endswith(_STARTED):
            os.write(console, text[-SHOWN_BYTES:] + b'The program was ended while TensorFlow started'
                     + (b', see above' if text else b'; is there enough memory?') + b'\n')
    finally:
        os._exit(0)
