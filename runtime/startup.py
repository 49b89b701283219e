"""Importing TensorFlow: set up for this program, and without its notices."""
import contextlib
import os
import sys
import tempfile

from runtime import distribution
from runtime.errors import UserError


def import_tensorflow(strategy: str = 'one',
                      cluster: distribution.Cluster = distribution.ALONE) -> distribution.Replicas:
    """Imports TensorFlow set up for one task per core: single-threaded kernels, as many at a time as there are cores.

    Its notices (on processor features, missing GPUs, XLA) are hidden. They come while it is imported, while it looks for devices
    and when XLA first compiles, and before its log levels are obeyed, so all of that is done here. If TF_CPP_MIN_LOG_LEVEL is
    set in the environment, it alone decides what is hidden.

    Args:
        strategy, cluster: as for `distribution.make_strategy`, which must come before the first computation.
    """
    silent = 'TF_CPP_MIN_LOG_LEVEL' not in os.environ
    # With several workers, TensorFlow reports a lost worker as an error, at length; this program says so in a sentence.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3' if cluster.workers > 1 else '2')
    with _hidden_stderr() if silent else contextlib.nullcontext():
        import tensorflow as tf
        if silent:
            tf.get_logger().setLevel('ERROR')  # It warns of functions traced for many shapes, which is intended here.
        with contextlib.suppress(RuntimeError):  # TensorFlow has computed already, in a notebook for example
            tf.config.threading.set_intra_op_parallelism_threads(1)
            tf.config.threading.set_inter_op_parallelism_threads(os.cpu_count())
        replicas = distribution.Replicas(distribution.make_strategy(strategy, cluster), cluster)
        tf.function(tf.identity, jit_compile=True)(0.0)
    if silent:
        del os.environ['TF_CPP_MIN_LOG_LEVEL']  # It has been read; child processes decide for themselves.
    return replicas


@contextlib.contextmanager
def _hidden_stderr():
    """Hides what C++ code writes to the standard error, unless the block fails."""
    sys.stderr.flush()
    console = os.dup(2)
    with _scratch() as hidden:
        os.dup2(hidden.fileno(), 2)
        try:
            yield
        except UserError:
            raise
        except Exception:
            hidden.seek(0)
            os.write(console, hidden.read())
            raise
        finally:
            os.dup2(console, 2)
            os.close(console)


def _scratch():
    """A temporary file; if there is no place for one, nothing can be read from it."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return open(os.devnull, 'r+b')
