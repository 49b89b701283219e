"""What a user sees: progress and summaries while training; a table, a csv and a pickle file of an evaluation."""
import csv
import pickle
import sys

import numpy as np
from tqdm import tqdm


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
    """TensorBoard summaries under the reference's tags; with enabled=False a thing that writes nothing."""

    def __init__(self, directory, enabled):
        import tensorflow as tf  # here, so that the checks that precede training do not wait for it

        self._scalar = tf.summary.scalar
        self._writer = tf.summary.create_file_writer(directory) if enabled else tf.summary.create_noop_writer()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._writer.close()

    def write(self, prefix, metrics, iteration):
        """Means over tasks of Metrics, as `<prefix>_Pre-update loss`, `<prefix>_Post-update loss, step 1` and so on."""
        with self._writer.as_default(step=iteration):
            for what, pre, post in (('loss', metrics.pre_loss, metrics.post_losses),
                                    ('accuracy', metrics.pre_accuracy, metrics.post_accuracies)):
                if pre is None:
                    continue
                self._scalar(f'{prefix}_Pre-update {what}', np.mean(pre))
                for update, values in enumerate(np.mean(post, axis=1), start=1):
                    self._scalar(f'{prefix}_Post-update {what}, step {update}', values)


def statistics(values):
    """Mean, standard deviation and half-width of the 95% interval of the mean over tasks.

    Args:
        values: [tasks, columns].

    Returns:
        Three arrays [columns]; the standard deviation divides by the number of tasks, the last is 1.96 * std / sqrt(tasks).
    """
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
    return '\n'.join(lines)


def write_results(prefix, values):
    """Writes <prefix>.csv (header update0,update1,..., rows mean, std, ci95) and <prefix>.pkl ({'mses': values})."""
    with open(prefix + '.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow([f'update{updates}' for updates in range(values.shape[1])])
        writer.writerows(statistics(values))
    with open(prefix + '.pkl', 'wb') as file:
        pickle.dump({'mses': values}, file)
