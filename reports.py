"""What a user sees: progress and summaries while training; a table, a csv and a pickle file of an evaluation."""
import csv
import io
import pickle
import sys

import numpy as np
from tqdm import tqdm

from data_generator import write_aside


class Progress(tqdm):
    """Iterations a second and remaining time: a bar on a terminal, a line every half minute elsewhere."""

    def __init__(self, start, total):
        interval = 0.5 if sys.stderr.isatty() else 30
        super().__init__(initial=start, total=total, unit=' iterations', mininterval=interval, maxinterval=interval,
                         dynamic_ncols=True)

    def display(self, msg=None, pos=None):
        if self.fp.isatty():
            super().display(msg, pos)
        else:
            print(msg or str(self), file=self.fp, flush=True)

    def say(self, line):
        """Prints a line above the bar."""
        if self.fp.isatty():
            self.write(line)
        else:
            print(line, flush=True)


class Summaries:
    """TensorBoard summaries under the reference's tags. Where they cannot be written, that is said once, and is no error."""

    def __init__(self, directory, enabled, start, say):
        """
        Args:
            enabled: False: nothing is written.
            start: the iteration from which the run goes on; TensorBoard is told to forget what it has seen of later ones.
            say: function that shows the user a line.
        """
        import tensorflow as tf  # here, so that the checks that precede training do not wait for it

        self._tf, self._say = tf, say
        self._writer = tf.summary.create_file_writer(directory) if enabled else tf.summary.create_noop_writer()
        if enabled and start:
            restart = tf.compat.v1.Event(step=start + 1, session_log=tf.compat.v1.SessionLog(status='START'))
            self._attempt(lambda: tf.raw_ops.ImportEvent(writer=self._writer._resource, event=restart.SerializeToString()))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._attempt(self._writer.close)

    def flush(self):
        self._attempt(self._writer.flush)

    def write(self, prefix, metrics, iteration):
        """Means over tasks of Metrics, as `<prefix>_Pre-update loss`, `<prefix>_Post-update loss, step 1` and so on."""
        self._attempt(lambda: self._write(prefix, metrics, iteration))

    def _write(self, prefix, metrics, iteration):
        scalar = self._tf.summary.scalar
        with self._writer.as_default(step=iteration):
            for what, pre, post in (('loss', metrics.pre_loss, metrics.post_losses),
                                    ('accuracy', metrics.pre_accuracy, metrics.post_accuracies)):
                if pre is None:
                    continue
                scalar(f'{prefix}_Pre-update {what}', np.mean(pre))
                for update, values in enumerate(np.mean(post, axis=1), start=1):
                    scalar(f'{prefix}_Post-update {what}, step {update}', values)

    def _attempt(self, action):
        try:
            action()
        except (OSError, self._tf.errors.OpError) as error:
            if self._say:
                self._say(f'Summaries for TensorBoard cannot be written ({str(error).splitlines()[0]}). Training goes on')
            self._say = None


def statistics(values):
    """Mean, standard deviation and half-width of the 95% interval of the mean over tasks.

    Args:
        values: [tasks, columns].

    Returns:
        Three arrays [columns]; the standard deviation divides by the number of tasks, the last is 1.96 * std / sqrt(tasks).
    """
    with np.errstate(invalid='ignore', over='ignore'):  # of tasks on which adaptation diverged
        std = values.std(axis=0)
        return values.mean(axis=0), std, 1.96 * std / np.sqrt(len(values))


def table(values, score):
    """Text: for each number of updates the mean and its 95% interval; score is 'accuracy' (in percent) or 'loss'."""
    mean, _, ci95 = statistics(values)
    scale, digits, title = (100, 2, 'accuracy in %') if score == 'accuracy' else (1, 4, 'mean squared error')
    lines = [f'  updates  {title}, with its 95% interval']
    for updates, (centre, half) in enumerate(zip(mean * scale, ci95 * scale)):
        note = '   support rows, before adaptation' if updates == 0 else ''
        lines.append(f'  {updates:7d}  {centre:8.{digits}f} ± {half:.{digits}f}{note}')
    diverged = np.sum(~np.isfinite(values).all(axis=1))
    if diverged:
        lines.append(f'Adaptation diverged on {diverged} of {len(values)} tasks: lower --update_lr')
    return '\n'.join(lines)


def write_results(prefix, values):
    """Writes <prefix>.csv (header update0,update1,..., rows mean, std, ci95) and <prefix>.pkl ({'mses': values})."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([f'update{updates}' for updates in range(values.shape[1])])
    writer.writerows(statistics(values))
    write_aside(prefix + '.csv', lambda file: file.write(text.getvalue().encode()))
    write_aside(prefix + '.pkl', lambda file: pickle.dump({'mses': values}, file))
