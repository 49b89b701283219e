"""Checks and times this program on a GPU: the golden fixtures, then a meta-training step of each workload.

    python benchmarks/gpu.py --json=gpu.json
    python benchmarks/gpu.py --device=cpu --workloads omniglot5 --fixtures sinusoid_10shot --steps 2 --rounds 1     a trial without a GPU

All is done in float32 with and without TF32, in which a GPU rounds the factors of products to 10 bits; the steps with both engines.
Each case runs in a process of its own; if it fails, its row says why. The steps' cases run in turn, once a round, and their medians are
printed. Compilation is the first step less the time of a step; memory is the peak on the GPU, in a trial of the process.
"""
import argparse
import glob
import itertools
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from step import seconds_of_step
from workloads import WORKLOADS, Workload, in_process

TESTS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'tests')
TEST_FILES = {'golden': 'test_golden.py', 'golden_methods': 'test_methods.py', 'golden_reptile': 'test_methods.py',
              'golden_heads': 'test_heads.py', 'golden_networks': 'test_networks.py', 'golden_navigation': 'test_navigation.py'}
FIXTURES = {folder: sorted(os.path.basename(path)[:-4] for path in glob.glob(os.path.join(TESTS, folder, '*.npz')))
            for folder in TEST_FILES}
Values = dict[str, Any]


def check_fixtures(folder: str, fixtures: Collection[str]) -> Values:
    """{'passed': how many of the tests that have a fixture's name, 'failed': {name of another: why}}."""
    import pytest
    results = {'passed': 0, 'failed': {}}

    class Plugin:
        def pytest_runtest_logreport(self, report):
            results['passed'] += report.when == 'call' and report.passed
            if report.failed:
                results['failed'][report.nodeid.partition('::')[2]] = report.longreprtext

    pytest.main([os.path.join(TESTS, TEST_FILES[folder]), '-k', ' or '.join(fixtures), '-q', '-p', 'no:cacheprovider'], [Plugin()])
    if not any(results.values()):
        raise RuntimeError(f'pytest runs no test of {folder}')
    return results


def time_steps(workload: Workload, engine: str, steps: int) -> Values:
    """Seconds of compilation and of a step (median), and the peak of memory in MB."""
    import tensorflow as tf
    model, batch = replace(workload, changes={**workload.changes, 'engine': engine}).model(), workload.batch()
    first = seconds_of_step(model, batch, workload.iteration)
    seconds = statistics.median(seconds_of_step(model, batch, workload.iteration) for _ in range(steps))
    peak = (tf.config.experimental.get_memory_info('GPU:0')['peak'] if tf.config.list_physical_devices('GPU')
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return {'compilation': first - seconds, 'seconds': seconds, 'megabytes': peak / 1024 ** 2}


def compute(case: Values) -> Values:
    """The result of a case, computed in this process; of an empty case, the machine."""
    from runtime.cli.startup import import_tensorflow
    from runtime.results.provenance import arithmetic
    import_tensorflow()
    import tensorflow as tf
    if not case:
        return arithmetic('auto', 1)
    tf.config.experimental.enable_tensor_float_32_execution(case['tf32'])
    if 'fixtures' in case:
        return check_fixtures(case['name'], case['fixtures'])
    return time_steps(WORKLOADS[case['name']], case['engine'], case['steps'])


def result_of(case: Values, device: str, limit: float) -> Values:
    """The result of a case, computed in a process of its own, or {'error': why it failed}."""
    hidden = {'CUDA_VISIBLE_DEVICES': '-1'} if device == 'cpu' else {}
    try:
        return in_process(__file__, '--case', json.dumps(case), timeout=limit, environment=os.environ | hidden)
    except subprocess.TimeoutExpired:
        return {'error': f'not within {limit:g} s'}
    except subprocess.CalledProcessError as error:
        if any(words in error.stderr for words in ('OOM', 'out of memory', 'RESOURCE_EXHAUSTED', 'MemoryError')):
            return {'error': 'out of memory'}
        if error.returncode < 0:
            return {'error': f'ended by {signal.Signals(-error.returncode).name}'}
        return {'error': error.stderr.strip().rpartition('\n')[2]}


def row(case: Values, results: Sequence[Values]) -> str:
    """Text: a case and its result (of several the medians), or why it failed."""
    text = f'{case["name"]:18}{case.get("engine", ""):8}{"yes" if case["tf32"] else "no":6}'
    if 'error' in results[-1]:
        return text + results[-1]['error']
    if 'fixtures' in case:
        return text + ', '.join([f'{results[0]["passed"]} tests passed', *(f'{name} failed' for name in results[0]['failed'])])
    median = {key: statistics.median(result[key] for result in results) for key in results[0]}
    return text + (f'compilation {median["compilation"]:6.1f} s, a step {1000 * median["seconds"]:8.1f} ms, '
                   f'memory {median["megabytes"]:7.0f} MB')


def cases_of(fixtures: Collection[str] | None, workloads: Sequence[str], steps: int) -> Iterator[Values]:
    """The cases: fixtures (None: all) by folder, then workloads; without and with TF32."""
    for folder, names in FIXTURES.items():
        if chosen := names if fixtures is None else [name for name in names if name in fixtures]:
            yield from ({'name': folder, 'fixtures': chosen, 'tf32': tf32} for tf32 in (False, True))
    for name, engine, tf32 in itertools.product(workloads, ('map', 'vmap'), (False, True)):
        yield {'name': name, 'engine': engine, 'tf32': tf32, 'steps': steps}


def run_in_turn(cases: Sequence[Values], rounds: int, device: str, limit: float) -> list[list[Values]]:
    """The results of each case; what failed, and fixtures, are not repeated. Each is reported at once on the standard error."""
    results = [[] for _ in cases]
    for _ in range(rounds):
        for case, earlier in zip(cases, results):
            if not earlier or 'seconds' in earlier[-1]:
                earlier.append(result_of(case, device, limit))
                print(row(case, earlier[-1:]), file=sys.stderr, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=['gpu', 'cpu'], default='gpu')
    parser.add_argument('--workloads', nargs='*', choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument('--fixtures', nargs='*', metavar='NAME', help='files of tests/golden* without .npz (default: all)')
    parser.add_argument('--steps', type=int, default=10, help='steps timed in each process (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=3, help='(default: %(default)s)')
    parser.add_argument('--limit', type=float, default=1800, help='seconds for a case (default: %(default)s)')
    parser.add_argument('--json', metavar='FILE', help='write all results')
    parser.add_argument('--case', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := {*(args.fixtures or ())}.difference(*FIXTURES.values()):
        parser.error(f'there is no fixture {", ".join(sorted(unknown))}')
    if args.case:
        print('\n' + json.dumps(compute(json.loads(args.case))))
        return
    machine = result_of({}, args.device, args.limit)
    if args.device == 'gpu' and machine.get('device') == 'CPU':
        machine = {'error': 'TensorFlow sees no GPU (see docs/troubleshooting.md); add --device=cpu for a trial without one'}
    if 'error' in machine:
        sys.exit(f'gpu.py: {machine["error"]}')
    cases = list(cases_of(args.fixtures, args.workloads, args.steps))
    results = run_in_turn(cases, args.rounds, args.device, args.limit)
    print(f'{machine["device"]}, TensorFlow {machine["tensorflow"]}\n{"":18}{"engine":8}TF32', *map(row, cases, results), sep='\n')
    if args.json:
        with open(args.json, 'w', encoding='utf-8') as file:
            json.dump({'machine': machine, 'cases': [{**case, 'results': each} for case, each in zip(cases, results)]}, file, indent=1)
    if any('error' in result or result.get('failed') for each in results for result in each):
        sys.exit(1)


if __name__ == '__main__':
    main()
