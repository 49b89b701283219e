"""Measures the input pipeline of trainings, and their memory. Nothing else should run meanwhile.

    python benchmarks/run.py
    python benchmarks/run.py --only growth

Images must be prepared under data/; missing sources are skipped.

  pipeline  a source's training steps on fresh meta-batches, against as many on one fixed meta-batch: seconds per step of
            both, taken in turn, and the share of the time in which a step waited for its meta-batch
  growth    memory (but for files, whose unused pages the system reclaims) and open files of 100,000 iterations of the
            sinusoid; Linux only
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

from run_files import MAIN, ROOT

from workloads import in_process

CONFIGS = {'sinusoid': 'sinusoid_10shot', 'omniglot5': 'omniglot_5way1shot', 'omniglot20': 'omniglot_20way1shot',
           'mini1': 'miniimagenet_5way1shot', 'cifarfs1': 'cifarfs_5way1shot'}
TRAINING = {name: f'--flagfile={os.path.join(ROOT, "configs", config)}.flags' for name, config in CONFIGS.items()}
GROWTH_ITERATIONS, GROWTH_REPORTS = 105_000, {5_000, *range(20_000, 100_001, 20_000)}  # the process still runs at the last one


def measure_pipeline(name: str, seconds: float = 20) -> dict[str, float]:
    """{'fresh', 'kept': seconds per step, 'waiting': share of the fresh steps' time}, each over about `seconds`."""
    import main
    run, data = main.run_and_data(main.parse(['main.py', TRAINING[name], '--metatrain_iterations=1000000000']))
    from maml import MAML
    from runtime.jobs.train import meta_batches
    model = MAML(run.model)
    batches = meta_batches(data['train'], run, 0, model.steps_per_call)

    def take(draw):
        """Seconds of a call that draws and trains, and how many of them it waited for the draw."""
        start = time.perf_counter()
        batch = draw()
        drawn = time.perf_counter()
        for values in model.train_steps('metatrain', batch).values():
            values.numpy()
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


def report_pipeline() -> None:
    """Prints a row for each source."""
    print(f'{"pipeline":12}{"fresh":>10}{"kept":>10}{"waiting":>10}   median seconds per step, share of the time')
    for name in TRAINING:
        try:
            row = '{fresh:10.5f}{kept:10.5f}{waiting:10.1%}'.format(**in_process(__file__, '--measure', name))
        except subprocess.CalledProcessError as error:
            row = '   '.join(['', *error.stderr.strip().splitlines()[-1:]])
        print(f'{name:12}{row}', flush=True)


def report_growth() -> None:
    """Prints memory and open files of a long training, after some numbers of iterations."""
    with tempfile.TemporaryDirectory() as logdir:
        process = subprocess.Popen([sys.executable, MAIN, TRAINING['sinusoid'], f'--metatrain_iterations={GROWTH_ITERATIONS}',
                                    f'--logdir={logdir}'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for line in process.stdout:
            match = re.match(r'Iteration (\d+):', line)
            if match and int(match[1]) in GROWTH_REPORTS:
                with open(f'/proc/{process.pid}/status', encoding='ascii') as file:
                    kilobytes = int(re.search(r'^RssAnon:\s+(\d+) kB', file.read(), re.M)[1])
                print(f'growth      {int(match[1]):7} iterations: {kilobytes / 1024:6.1f} MB, '
                      f'{len(os.listdir(f"/proc/{process.pid}/fd"))} open files', flush=True)
        if process.wait():
            sys.exit('growth: the training failed')


def main() -> None:
    reports = {'pipeline': report_pipeline, 'growth': report_growth}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=reports, default=list(reports))
    parser.add_argument('--measure', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure_pipeline(args.measure)))
    else:
        for name in args.only:
            reports[name]()


if __name__ == '__main__':
    main()
