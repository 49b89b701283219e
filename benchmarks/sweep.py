"""Shows how the cost of a meta-training step grows with the meta-batch, shots, updates and filters.

    python benchmarks/sweep.py --plot sweep.png

Each varies alone, from the step of a workload of `step.py`; seconds are medians. The times of one quantity are taken in turn,
round after round. Nothing else should run meanwhile.
"""
import argparse
import dataclasses

import numpy as np
from matplotlib.figure import Figure

from workloads import WORKLOADS, Workload, measure_in_turn

SWEEPS = {
    'meta_batch_size': (2, 4, 8, 16, 32),
    'update_batch_size': (1, 2, 5, 10),
    'num_updates': (1, 2, 3, 5, 10),
    'num_filters': (8, 16, 32, 64, 128),
}


def draw(results: dict[str, np.ndarray], workload: Workload, path: str) -> None:
    """Writes the picture.

    Args:
        results: {quantity: seconds a step of its values in SWEEPS}.
    """
    figure = Figure(figsize=(3.2 * len(results), 3.2), layout='constrained')
    panels = figure.subplots(1, len(results))
    for axes, (quantity, seconds) in zip(panels, results.items()):
        axes.plot(SWEEPS[quantity], seconds, marker='o', color='black')
        axes.set(xlabel=quantity, ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.axvline(getattr(workload, quantity), color='grey', linestyle=':')
    panels[0].set_ylabel('seconds per step')
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workload', choices=list(WORKLOADS), default='cifarfs1')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--plot', metavar='FILE', help='draw the curves too')
    args = parser.parse_args()
    from runtime.cli.startup import import_tensorflow
    import_tensorflow()
    from maml import MAML
    workload, results = WORKLOADS[args.workload], {}
    for quantity, values in SWEEPS.items():
        varied = [dataclasses.replace(workload, **{quantity: value}) for value in values]
        times = measure_in_turn([(MAML(each.model_config()), each.batch(), 0) for each in varied], args.rounds)
        results[quantity] = np.median(times, axis=0)
        print(f'{quantity:18}' + '  '.join(f'{value}: {seconds:.3f}' for value, seconds in zip(values, results[quantity])), flush=True)
    if args.plot:
        draw(results, workload, args.plot)


if __name__ == '__main__':
    main()
