"""The shipped models, benchmarks/zoo.py: their figures are what they give again, and what ships of a run is enough."""
import json
import os
import shutil
import sys

import pytest

from conftest import ROOT, error_of, run_ok
from runtime import checkpoints

sys.path.insert(0, os.path.join(ROOT, 'benchmarks'))
import zoo  # noqa: E402

SEED3 = os.path.join(ROOT, 'logs', 'sine_seeds', 'cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm.seed3')
TINY = ('--datasource=sinusoid', '--norm=None', '--update_batch_size=10', '--metatrain_iterations=5', '--save_interval=1', '--ensemble=2',
        '--log=False')


@pytest.mark.slow
def test_shipped_figures_are_reproduced(tmp_path, capsys):
    assert zoo.check([SEED3])
    printed = capsys.readouterr().out
    assert 'model70000: the same, 0.4572 ± 0.0454' in printed and 'model64000: the same, 0.4422 ± 0.0452' in printed


@pytest.mark.slow
def test_other_figures_are_reported(tmp_path, capsys):
    run = tmp_path / os.path.basename(SEED3)
    shutil.copytree(SEED3, run)
    entries = json.loads((run / 'results.json').read_text())
    entries['test_ubs10_stepsize0.001, test']['updates'][1]['mean'] += 0.0002
    entries['test_ubs10_stepsize0.001_model64000, test']['iterations'] = 63000
    (run / 'results.json').write_text(json.dumps(entries))
    before = sorted(run.iterdir())
    with pytest.raises(SystemExit):
        zoo.command_line(['check', str(tmp_path)])
    printed = capsys.readouterr().out
    assert 'model70000: 0.4574 ± 0.0454 recorded and 0.4572 ± 0.0454 now after 1 updates' in printed
    assert 'could not be evaluated: ' in printed and 'there is no checkpoint model63000' in printed
    assert '2 evaluations repeated, 2 of them with another outcome; 0 left out' in printed
    assert sorted(run.iterdir()) == before


def test_what_ships_is_enough(tmp_path, capsys):
    """To evaluate each of its checkpoints, to the same figures, and to go on from the newest, but not from another."""
    run_ok(*TINY, f'--logdir={tmp_path}/logs/run/')
    evaluations = ['--test_iter=5', '--ensemble=1'], ['--test_best', '--ensemble=1'], ['--ensemble=2']
    for flags in evaluations:
        run_ok(*TINY, f'--logdir={tmp_path}/logs/run/', '--train=False', '--num_test_tasks=4', *flags)
    run_ok(*TINY, f'--logdir={tmp_path}/logs/run/', '--train=False', '--num_test_tasks=4', '--ensemble=1', '--test_iter=1')
    run, = (tmp_path / 'logs' / 'run').iterdir()
    newest = checkpoints.find(str(run), None)
    best = [entry['iteration'] for entry in newest.record['ranking']]
    zoo.command_line(['pack', str(tmp_path / 'logs'), str(tmp_path / 'packed')])
    packed = tmp_path / 'packed' / 'run' / run.name
    assert checkpoints.iterations(str(packed)) == sorted({5, *best})
    entries, all_entries = (json.loads((folder / 'results.json').read_text()) for folder in (packed, run))
    assert entries == {name: entry for name, entry in all_entries.items() if entry['iterations'] in {5, *best}}
    assert len(entries) == len(all_entries) - (1 not in best)

    for flags in evaluations:
        printed = [run_ok(*TINY, f'--logdir={tmp_path}/{logs}/run/', '--train=False', '--num_test_tasks=4', *flags).splitlines()[-20:]
                   for logs in ('logs', 'packed')]
        assert [line for line in printed[0] if '±' in line] == [line for line in printed[1] if '±' in line] != []

    other = next(one for one in best if one != 5)
    assert f'model{other} has the weights but not the state of the optimizer' in error_of(
        *TINY, f'--logdir={tmp_path}/packed/run/', f'--test_iter={other}')
    with_six = [flag.replace('iterations=5', 'iterations=6') for flag in TINY]
    for logs in 'logs', 'packed':
        assert 'Going on from' in run_ok(*with_six, f'--logdir={tmp_path}/{logs}/run/')
    sixth = [checkpoints.load(str(folder / 'model6')).arrays for folder in (run, packed)]
    assert all((sixth[0][name] == sixth[1][name]).all() for name in sixth[0]) and sixth[0].keys() == sixth[1].keys()


def test_nothing_to_pack(tmp_path):
    with pytest.raises(SystemExit, match='there is no run'):
        zoo.command_line(['pack', str(tmp_path), str(tmp_path / 'packed')])
