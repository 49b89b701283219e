"""Times a meta-training step of standard workloads against the arithmetic floor of this machine, and against peers.

    python benchmarks/step.py
    python benchmarks/step.py --workloads omniglot5 mini1 --rounds 7 --peer 'torch=/venv/bin/python torch_peer.py {} loop'

In each round every contender runs every workload once, in separate processes, one after the other; the GEMM rate that sets
the floor is measured in between. Medians over the rounds are printed. A peer is any command in which {} stands for the
workload, whose last output line ends in '<number> s a step'. Nothing else should run meanwhile.
"""
import argparse
import json
import re
import shlex
import statistics
import subprocess
import time

import numpy as np

from workloads import WORKLOADS, in_process, measure


def gemm_rate(n: int = 2048, repeats: int = 9) -> float:
    """FLOP/s of the fastest of some float32 matrix products of size n, by numpy on all cores."""
    a = np.random.default_rng(0).random((n, n), np.float32)

    def seconds():
        start = time.perf_counter()
        a @ a
        return time.perf_counter() - start
    return 2 * n ** 3 / min(seconds() for _ in range(1 + repeats))


def measure_peer(command: str, name: str) -> float | None:
    """Seconds of a step, or None if the peer fails."""
    process = subprocess.run(shlex.split(command.replace('{}', name)), capture_output=True, text=True)
    found = re.search(r'([\d.]+) s a step\s*$', process.stdout)
    return float(found[1]) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workloads', nargs='+', choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=10, help='steps timed in each process')
    parser.add_argument('--peer', action='append', default=[], metavar='NAME=COMMAND')
    parser.add_argument('--measure', choices=list(WORKLOADS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        from runtime.cli.startup import import_tensorflow
        import_tensorflow()
        print(json.dumps(measure(WORKLOADS[args.measure].model_config(), WORKLOADS[args.measure].batch(), args.steps)))
        return

    peers = dict(peer.split('=', 1) for peer in args.peer)
    rates, ours = [], {name: [] for name in args.workloads}
    theirs = {(peer, name): [] for peer in peers for name in args.workloads}
    for _ in range(args.rounds):
        for name in args.workloads:
            rates.append(gemm_rate())
            ours[name].append(in_process(__file__, '--measure', name, '--steps', args.steps))
            for peer, command in peers.items():
                theirs[peer, name].append(measure_peer(command, name))

    report(args, statistics.median(rates), ours, theirs, peers)


def report(args: argparse.Namespace, rate: float, ours: dict[str, list], theirs: dict[tuple[str, str], list],
           peers: dict[str, str]) -> None:
    """Prints the medians: a row for each workload."""
    print(f'GEMM {rate / 1e9:.0f} GFLOP/s; medians of {args.rounds} rounds, seconds per step')
    print(f'{"workload":12}{"floor":>8}{"this":>8}{"of floor":>10}{"tasks/s":>9}{"MB":>7}{"first step":>12}'
          + ''.join(f'{peer:>15}' for peer in peers))
    for name in args.workloads:
        median = {key: statistics.median(run[key] for run in ours[name]) for key in ours[name][0]}
        floor = WORKLOADS[name].flops() / rate
        row = (f'{name:12}{floor:8.3f}{median["seconds"]:8.3f}{floor / median["seconds"]:10.0%}'
               f'{WORKLOADS[name].meta_batch_size / median["seconds"]:9.0f}{median["megabytes"]:7.0f}{median["first"]:12.1f}')
        for peer in peers:
            times = [seconds for seconds in theirs[peer, name] if seconds is not None]
            peer_median = statistics.median(times) if times else None
            row += f'{peer_median:9.3f} {peer_median / median["seconds"]:4.1f}x' if times else f'{"-":>15}'
        print(row, flush=True)


if __name__ == '__main__':
    main()
