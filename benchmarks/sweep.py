"""Shows how the cost of a meta-training step grows with the meta-batch, shots, updates and filters.

    python benchmarks/sweep.py --plot sweep.png

Each varies alone, from the step of a workload of `step.py`; seconds are medians. The times of one quantity are taken in turn,
round after round. Nothing else should run meanwhile. --plot needs matplotlib.
"""
import argparse
import dataclasses
import statistics
from collections.abc import Sequence

from workloads import WORKLOADS, Workload, seconds_of_step

SWEEPS = {
    'meta_batch_size': (2, 4, 8, 16, 32),
    'update_batch_size': (1, 2, 5, 10),
    'num_updates': (1, 2, 3, 5, 10),
    'num_filters': (8, 16, 32, 64, 128),
}


def seconds_a_step(workloads: Sequence[Workload], rounds: int) -> list[float]:
    """Median seconds of a step of each workload."""
    from maml import MAML
    contenders = [(MAML(workload.model_config()), workload.batch()) for workload in workloads]

    for model, batch in contenders:
        seconds_of_step(model, batch)
    times = [[seconds_of_step(model, batch) for model, batch in contenders] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times)]


def draw(results: dict[str, tuple], workload: Workload, path: str) -> None:
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(3.2 * len(results), 3.2), layout='constrained')
    for axis, (quantity, (values, seconds)) in zip(axes, results.items()):
        axis.plot(values, seconds, marker='o', color='black')
        axis.set(xlabel=quantity, ylim=(0, None), xlim=(0, None))
        axis.grid(alpha=0.3)
        axis.axvline(getattr(workload, quantity), color='grey', linestyle=':')
    axes[0].set_ylabel('seconds per step')
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workload', choices=list(WORKLOADS), default='cifarfs1')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--plot', metavar='FILE', help='draw the curves too')
    args = parser.parse_args()

    from runtime.cli import startup
    startup.import_tensorflow()
    workload, results = WORKLOADS[args.workload], {}
    for quantity, values in SWEEPS.items():
        seconds = seconds_a_step([dataclasses.replace(workload, **{quantity: value}) for value in values], args.rounds)
        results[quantity] = values, seconds
        print(f'{quantity:18}' + '  '.join(f'{value}: {taken:.3f}' for value, taken in zip(values, seconds)), flush=True)
    if args.plot:
        draw(results, workload, args.plot)


if __name__ == '__main__':
    main()
