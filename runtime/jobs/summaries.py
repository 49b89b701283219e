"""TensorBoard summaries."""
import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from runtime.jobs.models import Returns
from runtime.system.errors import first_line
from utils import Metrics


class Summaries(contextlib.AbstractContextManager):
    """TensorBoard summaries under the reference's tags. If they cannot be written, one line reports it; it is not an error."""

    def __init__(self, directory: str, enabled: bool, start: int, log: Callable[[str], None]):
        """Of a run that continues from iteration `start`; TensorBoard discards later events. `log` shows the user a line."""
        self._log, self._writer = log, tf.summary.create_noop_writer()
        with self._failure_reported():
            if enabled:
                self._writer = tf.summary.create_file_writer(directory)
            if enabled and start:
                restart = tf.compat.v1.Event(step=start + 1, session_log=tf.compat.v1.SessionLog(status='START'))
                tf.raw_ops.ImportEvent(writer=self._writer._resource, event=restart.SerializeToString())

    def __exit__(self, *exception: object) -> None:
        with self._failure_reported():
            self._writer.close()

    def flush(self) -> None:
        with self._failure_reported():
            self._writer.flush()

    def write(self, prefix: str, metrics: Metrics | Returns, iteration: int, updates: int) -> None:
        """Means over tasks of Metrics, as `<prefix>_Pre-update loss`, `<prefix>_Post-update loss, step 1` and so on; step 0 if there were
        no inner updates."""
        for metric, values in metrics.reported().items():
            self.write_means(prefix, metric, np.mean(values, axis=1), iteration, updates)

    def write_means(self, prefix: str, metric: str, means: Sequence[float], iteration: int, updates: int) -> None:
        """The means of an evaluation's columns, under tags like those of `write`."""
        with self._failure_reported(), self._writer.as_default(step=iteration):
            tf.summary.scalar(f'{prefix}_Pre-update {metric}', means[0])
            for step, mean in enumerate(means[1:], start=min(updates, 1)):
                tf.summary.scalar(f'{prefix}_Post-update {metric}, step {step}', mean)

    def write_norms(self, norms: Sequence[float], iteration: int) -> None:
        """The median and the largest norm of the gradients of iterations up to this one: single tasks can have very large gradients."""
        with self._failure_reported(), self._writer.as_default(step=iteration):
            tf.summary.scalar('metatrain_Gradient norm, median', np.median(norms))
            tf.summary.scalar('metatrain_Gradient norm, largest', np.max(norms))

    def write_flags(self, flags: dict) -> None:
        """The run's flags, {name: value}, for TensorBoard's HParams page."""
        from tensorboard.plugins.hparams import api
        with self._failure_reported(), self._writer.as_default():
            api.hparams({name: str(value) if value is None else value for name, value in flags.items()})

    def write_figures(self, prefix: str, figures: dict, iteration: int) -> None:
        """Pictures, {what: matplotlib Figure}, as `<prefix>_<what>`."""
        from runtime.results.plots import pixels
        with self._failure_reported(), self._writer.as_default(step=iteration):
            for what, figure in figures.items():
                tf.summary.image(f'{prefix}_{what}', pixels(figure)[None])

    @contextlib.contextmanager
    def _failure_reported(self):
        try:
            yield
        except (OSError, tf.errors.OpError) as error:
            if self._log:
                self._log(f'Summaries for TensorBoard cannot be written ({first_line(error)}); the program continues')
            self._log = None
