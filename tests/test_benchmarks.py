"""What the scripts of benchmarks/ measure, and what they print of it."""
import glob
import json
import os
import subprocess
import sys

import pytest

import gpu
import step
import step_profile
from conftest import ROOT
from workloads import SINUSOID, WORKLOADS, in_process, processor

ENDS = {('mini1', 'map'): subprocess.CalledProcessError(1, '', '', 'Traceback\nResourceExhaustedError: Graph\nOOM when allocating\n'),
        ('mini1', 'vmap'): subprocess.CalledProcessError(-11, '', '', 'a notice\n'),
        ('cifarfs1', 'map'): subprocess.TimeoutExpired('', 60),
        ('cifarfs1', 'vmap'): subprocess.CalledProcessError(1, '', '', 'Traceback\nValueError: no such layer\n')}


def test_the_floor_is_of_the_kernel_that_openblas_chooses_itself(monkeypatch):
    def kernel(environment):
        command = [sys.executable, '-c', 'import step; print(step.blas_kernel())']
        return subprocess.check_output(command, cwd=os.path.join(ROOT, 'benchmarks'), env=environment, text=True).strip()

    monkeypatch.delenv('OPENBLAS_CORETYPE', raising=False)
    best = kernel(os.environ)
    monkeypatch.setenv('OPENBLAS_CORETYPE', 'Prescott')
    if kernel(os.environ) == best:
        pytest.skip("numpy's BLAS on this machine does not obey OPENBLAS_CORETYPE=Prescott")
    measured = step.measure_gemm()
    assert measured['kernel'] == best and measured['rate'] > 0


def test_the_floor_is_measured_without_limits(monkeypatch):
    monkeypatch.setattr(step, 'in_process', lambda *_, environment: environment)
    for name in 'OPENBLAS_CORETYPE', 'OPENBLAS_L2_SIZE', 'OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS':
        monkeypatch.setenv(name, '1')
        assert step.measure_gemm() == {other: value for other, value in os.environ.items() if other != name}
        monkeypatch.delenv(name)


def test_the_table_against_the_floor_names_kernel_and_processor(monkeypatch, capsys):
    rates = iter([3e11, 1e11, 2e11])
    monkeypatch.setattr(step, 'measure_gemm', lambda: {'rate': next(rates), 'kernel': 'OpenBLAS Zen'})
    floor = WORKLOADS['omniglot5'].flops() / 2e11
    monkeypatch.setattr(step, 'measure_alone', lambda workload, steps: {'seconds': 4 * floor, 'first': 1., 'megabytes': 1.})
    step.against_the_floor(['omniglot5'], {}, rounds=3, steps=1)
    title, _, row = capsys.readouterr().out.splitlines()
    assert title.startswith(f'GEMM 200 GFLOP/s (OpenBLAS Zen) on {os.cpu_count()} cores, {processor()};')
    assert row.split()[1:4] == [f'{floor:.3f}', f'{4 * floor:.3f}', '25%']


def test_a_profile_counts_each_moment_once(tmp_path):
    """Operations have the time in which none within them runs; one may begin when another ends."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2
    space = xplane_pb2.XSpace()
    plane = space.planes.add(name='/host:CPU')
    for number, name in enumerate(['train', 'gradients/add:AddN_12', 'fusion.3', 'Sum']):
        plane.event_metadata[number].name = name
    line = plane.lines.add()
    for number, start, length in (1, 10, 40), (0, 0, 100), (2, 20, 5), (3, 50, 30), (2, 25, 10):
        line.events.add(metadata_id=number, offset_ps=start, duration_ps=length)
    (tmp_path / 'profile').write_bytes(space.SerializeToString())
    times = [(name, round(seconds * 1e12)) for name, seconds in step_profile.own_times(str(tmp_path / 'profile'))]
    assert sorted(times) == [('AddN', 25), ('Sum', 30), ('fusion', 5), ('fusion', 10), ('train', 30)]


def test_shares_of_a_step():
    shares, seconds = step_profile.shares(SINUSOID, steps=2)
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0 < seconds


def run_gpu(monkeypatch, compute, *arguments):
    """gpu.py in this process; compute(case) instead of a process for each case."""
    monkeypatch.setattr(gpu, 'in_process', lambda script, flag, case, **_: compute(json.loads(case)))
    monkeypatch.setattr(sys, 'argv', ['gpu.py', *arguments])
    gpu.main()


def test_gpu_knows_all_fixtures():
    assert gpu.FIXTURES.keys() == {os.path.basename(path) for path in glob.glob(os.path.join(ROOT, 'tests', 'golden*'))}
    assert all(gpu.FIXTURES.values())


def test_gpu_without_a_gpu(monkeypatch):
    with pytest.raises(SystemExit, match='^gpu.py: TensorFlow sees no GPU .*; add --device=cpu for a trial without one$'):
        run_gpu(monkeypatch, lambda case: {'device': 'CPU', 'tensorflow': '2'})


def test_gpu_goes_on_after_a_case_that_fails(monkeypatch, capsys, tmp_path):
    """All four ways to fail have rows; the others are computed in every round, in turn."""
    computed = []

    def compute(case):
        if not case:
            return {'device': 'H100', 'tensorflow': '2'}
        if 'fixtures' in case:
            return {'passed': 3, 'failed': {'test_a[b]': 'long'} if case['tf32'] else {}}
        computed.append((case['name'], case['engine']))
        if case['tf32'] and (case['name'], case['engine']) in ENDS:
            raise ENDS[case['name'], case['engine']]
        return {'compilation': 10., 'seconds': computed.count(computed[-1]) / 1000, 'megabytes': 5.}

    path = tmp_path / 'gpu.json'
    with pytest.raises(SystemExit) as end:
        run_gpu(monkeypatch, compute, '--workloads', 'mini1', 'cifarfs1', '--fixtures', 'gru', '--rounds=3', f'--json={path}', '--limit=60')
    assert end.value.code == 1
    title, _, *rows = [' '.join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert title == 'H100, TensorFlow 2'
    times = 'compilation 10.0 s, a step 3.0 ms, memory 5 MB'  # the median of the first, third and fourth process
    assert rows == ['golden_networks no 3 tests passed', 'golden_networks yes 3 tests passed, test_a[b] failed',
                    f'mini1 map no {times}', 'mini1 map yes out of memory', f'mini1 vmap no {times}', 'mini1 vmap yes ended by SIGSEGV',
                    f'cifarfs1 map no {times}', 'cifarfs1 map yes not within 60 s', f'cifarfs1 vmap no {times}',
                    'cifarfs1 vmap yes ValueError: no such layer']
    assert computed[:3] == [('mini1', 'map'), ('mini1', 'map'), ('mini1', 'vmap')] and len(computed) == 8 + 4 + 4
    assert [len(case['results']) for case in json.loads(path.read_text())['cases']] == [1, 1, 3, 1, 3, 1, 3, 1, 3, 1]


def test_gpu_times_a_step():
    result = gpu.time_steps(SINUSOID, 'map', steps=2)
    assert result.keys() == {'compilation', 'seconds', 'megabytes'} and min(result.values()) > 0


@pytest.mark.slow
def test_gpu_checks_fixtures(monkeypatch, tmp_path):
    """A fixture that is right, and in a process of its own what fails."""
    script = os.path.join(ROOT, 'benchmarks', 'gpu.py')
    case = {'name': 'golden', 'fixtures': ['sinusoid_10shot_oracle'], 'tf32': False}
    assert in_process(script, '--case', json.dumps(case)) == {'passed': 5, 'failed': {}}
    assert gpu.result_of({**case, 'fixtures': ['no_such']}, 'cpu', 300) == {'error': 'RuntimeError: pytest runs no test of golden'}
