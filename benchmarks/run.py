"""Times whole runs of main.py, and the share of the input pipeline in the steps.

    python benchmarks/run.py
    python benchmarks/run.py --only start evaluation --rounds 5

Images must be prepared under data/; missing sources are skipped. Nothing else should run meanwhile.

  pipeline    a source's training steps on fresh meta-batches, against as many on one fixed meta-batch: seconds per step of
              both, taken in turn, and the share of the time in which a step waited for its meta-batch
  bar         20,000 iterations of the 10-shot sinusoid on a terminal: the share of the time that the progress bar takes
  start       from the start of the process to the end of one iteration, validation and saving included
  sinusoid    70,000 iterations of the 10-shot sinusoid, the whole process
  evaluation  600 tasks of 1-shot MiniImagenet, 10 updates, the whole process, from weights of one iteration
"""
import argparse
import json
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

OMNIGLOT = '--datasource=omniglot --update_batch_size=1'
CONV = '--meta_batch_size=4 --update_batch_size=1 --update_lr=0.01 --num_updates=5 --num_filters=32 --max_pool=True'
TRAINING = {
    'sinusoid': '--datasource=sinusoid --norm=None --update_batch_size=10',
    'omniglot5': f'{OMNIGLOT} --meta_batch_size=32 --update_lr=0.4 --num_updates=1',
    'omniglot20': f'{OMNIGLOT} --meta_batch_size=16 --num_classes=20 --update_lr=0.1 --num_updates=5',
    'mini1': f'--datasource=miniimagenet {CONV}',
    'cifarfs1': f'--datasource=cifarfs {CONV}',
}
WHOLE = {'start': ('omniglot5', 1), 'sinusoid': ('sinusoid', 70_000), 'evaluation': ('mini1', 1)}


def measure_pipeline(name: str, seconds: float = 20) -> dict[str, float]:
    """{'fresh', 'kept': seconds per step, 'waiting': share of the fresh steps' time}, each over about `seconds`."""
    import main
    run, data = main.run_and_data(main.parse(['main.py', *TRAINING[name].split(), '--metatrain_iterations=1000000000']))
    from maml import MAML
    from runtime.jobs.train import meta_batches
    model = MAML(run.model)
    batches = meta_batches(data['train'], run, 0, model.steps_per_call)

    def take(draw):
        """Seconds of a call that draws and trains, and how many of them it waited for the draw."""
        start = time.perf_counter()
        batch = draw()
        drawn = time.perf_counter()
        {key: value.numpy() for key, value in model.train_steps('metatrain', batch).items()}
        return time.perf_counter() - start, drawn - start

    kept = next(batches)[1]
    take(lambda: kept)
    fresh, same = [], []
    while sum(total for total, _ in fresh) < seconds:
        fresh += [take(lambda: next(batches)[1]) for _ in range(5)]
        same += [take(lambda: kept) for _ in range(5)]
    waiting = sum(waited for _, waited in fresh) / sum(total for total, _ in fresh)
    medians = (statistics.median(total for total, _ in calls) / model.steps_per_call for calls in (fresh, same))
    return dict(zip(('fresh', 'kept'), medians), waiting=waiting)


def measure_bar() -> float:
    """The share of training time spent in the progress bar when it is drawn on a terminal."""
    import main
    from runtime.system import progress
    calls = []  # (when, how long)

    def timed(method):
        def call(*arguments):
            start = time.perf_counter()
            method(*arguments)
            calls.append((start, time.perf_counter() - start))
        return call

    progress.Progress.advance, progress.Progress.log = timed(progress.Progress.advance), timed(progress.Progress.log)
    terminal, end = pty.openpty()
    os.dup2(end, sys.stderr.fileno())
    threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(terminal, 4096), b'')], daemon=True).start()
    with tempfile.TemporaryDirectory() as logdir:
        run, data = main.run_and_data(main.parse(
            ['main.py', *TRAINING['sinusoid'].split(), '--metatrain_iterations=20000', f'--logdir={logdir}']))
        from runtime.jobs.train import train
        train(run, data)
        return sum(seconds for _, seconds in calls) / (calls[-1][0] - calls[0][0])  # without tracing and compilation


def in_process(*arguments: str) -> str | None:
    """The last line that a Python process prints, or None if it failed."""
    process = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    return process.stdout.splitlines()[-1] if process.returncode == 0 else None


def measure_whole(name: str) -> float | None:
    """Seconds of the process, or None if it failed."""
    training, iterations = WHOLE[name]
    with tempfile.TemporaryDirectory() as logdir:
        arguments = ['main.py', *TRAINING[training].split(), f'--metatrain_iterations={iterations}', f'--logdir={logdir}']
        if name == 'evaluation':
            if in_process(*arguments) is None:
                return None
            arguments += ['--train=False', '--test_set=True']
        start = time.perf_counter()
        return None if in_process(*arguments) is None else time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=['pipeline', 'bar', *WHOLE], default=['pipeline', 'bar', *WHOLE])
    parser.add_argument('--rounds', type=int, default=3, help='of the whole processes')
    parser.add_argument('--measure', choices=['bar', *TRAINING], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure_bar() if args.measure == 'bar' else measure_pipeline(args.measure)))
        return

    if 'pipeline' in args.only:
        print(f'{"pipeline":12}{"fresh":>10}{"kept":>10}{"waiting":>10}   median seconds per step, share of the time')
        for name in TRAINING:
            line = in_process(__file__, '--measure', name)
            print(f'{name:12}' + ('{fresh:10.5f}{kept:10.5f}{waiting:10.1%}'.format(**json.loads(line)) if line else '   no data'), flush=True)
    if 'bar' in args.only:
        shares = [json.loads(in_process(__file__, '--measure', 'bar')) for _ in range(args.rounds)]
        print(f'{"bar":12}{statistics.median(shares):10.2%}, median of {sorted(round(share, 4) for share in shares)}', flush=True)
    for name in [name for name in WHOLE if name in args.only]:
        seconds = [measure_whole(name) for _ in range(args.rounds)]
        print(f'{name:12}' + ('   no data' if None in seconds else
                              f'{statistics.median(seconds):10.1f} s, median of {sorted(round(s, 1) for s in seconds)}'), flush=True)


if __name__ == '__main__':
    main()
