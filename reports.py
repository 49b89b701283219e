"""What a user sees of a training run: progress on the console, and summaries in TensorBoard."""
import contextlib
import math
import os
import sys

import numpy as np
from tqdm import tqdm

from data_generator import first_line


class Progress(tqdm):
    """Iterations a second and remaining time: a bar on a terminal, a line every half minute elsewhere."""

    def __init__(self, start, total, shown=True, unit='it', **others):
        """
        Args:
            start, total: the first and the last count of what is done.
            others: further arguments of tqdm.
        """
        interval = 0.5 if sys.stderr.isatty() else 30
        super().__init__(initial=start, total=total, unit=unit, mininterval=interval, maxinterval=interval, dynamic_ncols=True,
                         disable=not shown, **others)

    def display(self, msg=None, pos=None):
        with contextlib.suppress(OSError):  # of a terminal that is gone, or a log on a full disk: training is worth more
            if self.fp.isatty():
                super().display(msg, pos)
            else:
                print(msg or str(self), file=self.fp, flush=True)

    def close(self):
        with contextlib.suppress(OSError):
            super().close()

    def advance(self, iterations, tasks_per_iteration, scores):
        """Counts iterations that are done, and shows tasks a second and the last one of scores, [before, after adaptation]."""
        if self.disable:
            return
        state = self.format_dict
        rate = state['rate'] or (state['n'] + iterations - state['initial']) / max(state['elapsed'], 1e-9)
        tasks = rate * tasks_per_iteration
        latest = [f'{before:.3g} -> {after:.3g}' for before, after in scores[-1:]]
        self.set_postfix_str(', '.join([f'{tasks:.{0 if tasks > 10 else 1}f} tasks/s', *latest]), refresh=False)
        self.update(iterations)

    def say(self, line):
        """Prints a line above the bar, if that is possible."""
        if self.disable:
            return
        with contextlib.suppress(OSError):
            if self.fp.isatty():
                self.write(line)
            else:
                print(line, flush=True)


def summary(run, data, model):
    """Text: what is about to be trained, on what, where and how."""
    import tensorflow as tf

    config, weights = model.config, {**model.weights, **model.norm_params}
    images = [f'{split}: {len(tasks.classes.names):,} classes, {tasks.classes.counts.sum():,} images'
              for split, tasks in data.items() if run.source.image_shape]
    if config.image_shape:
        net = f'4 convolutions of {config.num_filters} filters, {"max pooling" if config.max_pool else "stride 2"}'
    else:
        net = 'fully connected, ' + '-'.join(map(str, config.dim_hidden))
    gpus = len(tf.config.list_physical_devices('GPU'))
    device = f'{gpus} GPU{"s" if gpus > 1 else ""}' if gpus else f'{os.cpu_count()} CPU cores'
    lines = [f'Training {run.description} for {run.iterations:,} iterations of {run.meta_batch_size} tasks in {run.directory}',
             *(['  data     ' + '; '.join(images)] if images else []),
             f'  network  {net}, norm {config.norm}; {sum(math.prod(v.shape) for v in weights.values()):,} parameters',
             f'  engine   {config.engine}, on {device}; TensorFlow {tf.__version__}',
             f'  shown    {run.score} before and after adaptation']
    if run.replicas.count > 1:
        where = f' in {run.replicas.workers} processes' if run.replicas.workers > 1 else ''
        share = run.meta_batch_size // run.replicas.count
        lines.append(f'  strategy {share} tasks on each of {run.replicas.count} replicas{where}')
    elif run.all_flags['strategy'] not in ('auto', 'one'):
        lines.append(f'  strategy {run.all_flags["strategy"]}, on one device, for there is no other')
    return '\n'.join(lines)


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
        self._writer = tf.summary.create_noop_writer()
        if enabled:
            self._attempt(lambda: self._open(directory, start))

    def _open(self, directory, start):
        tf, self._writer = self._tf, self._tf.summary.create_file_writer(directory)
        if start:
            restart = tf.compat.v1.Event(step=start + 1, session_log=tf.compat.v1.SessionLog(status='START'))
            tf.raw_ops.ImportEvent(writer=self._writer._resource, event=restart.SerializeToString())

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._attempt(self._writer.close)

    def flush(self):
        self._attempt(self._writer.flush)

    def write(self, prefix, metrics, iteration):
        """Means over tasks of Metrics, as `<prefix>_Pre-update loss`, `<prefix>_Post-update loss, step 1` and so on."""
        self.write_scores(prefix, 'loss', [np.mean(metrics.pre_loss), *np.mean(metrics.post_losses, axis=1)], iteration)
        if metrics.pre_accuracy is not None:
            self.write_scores(prefix, 'accuracy', [np.mean(metrics.pre_accuracy), *np.mean(metrics.post_accuracies, axis=1)],
                              iteration)

    def write_flags(self, flags):
        """The run's flags, {name: value}, for the HParams page."""
        self._attempt(lambda: self._write_flags(flags))

    def _write_flags(self, flags):
        from tensorboard.plugins.hparams import api
        with self._writer.as_default():
            api.hparams({name: str(value) if value is None else value for name, value in flags.items()})

    def write_scores(self, prefix, score, means, iteration):
        """An evaluation's means, [1 + updates], under tags like those of `write`."""
        tags = [f'{prefix}_Pre-update {score}'] + [f'{prefix}_Post-update {score}, step {step}' for step in range(1, len(means))]
        self._attempt(lambda: self._write_scalars(dict(zip(tags, means)), iteration))

    def _write_scalars(self, scalars, iteration):
        with self._writer.as_default(step=iteration):
            for tag, value in scalars.items():
                self._tf.summary.scalar(tag, value)

    def write_figures(self, prefix, figures, iteration):
        """Pictures, {what: matplotlib Figure}, as `<prefix>_<what>`."""
        self._attempt(lambda: self._write_figures(prefix, figures, iteration))

    def _write_figures(self, prefix, figures, iteration):
        from pictures import pixels
        with self._writer.as_default(step=iteration):
            for what, figure in figures.items():
                self._tf.summary.image(f'{prefix}_{what}', pixels(figure)[None])

    def _attempt(self, action):
        try:
            action()
        except (OSError, self._tf.errors.OpError) as error:
            if self._say:
                self._say(f'Summaries for TensorBoard cannot be written ({first_line(error)}); the program goes on')
            self._say = None
