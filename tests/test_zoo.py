"""The shipped models, and benchmarks/zoo.py: their figures are what they give again, and what ships of a run is enough."""
import glob
import json
import os
import shutil
import subprocess

import pytest

import zoo
from conftest import ROOT, error_of, run_ok
from runtime.cli.flags import default
from runtime.jobs import checkpoints
from runtime.results.collect import Evaluation, result_directories

LOGS = os.path.join(ROOT, 'logs')
TRACKED = subprocess.run(['git', 'ls-files', 'logs'], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
SHIPPED = [directory for directory in (os.path.relpath(one, ROOT) for one in result_directories(LOGS, 'run.flags'))
           if f'{directory}/run.flags' in TRACKED or not TRACKED]  # not one's own runs
SEED3 = os.path.join(LOGS, 'sine_seeds', 'cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm.seed3')
TINY = ('--datasource=sinusoid', '--norm=None', '--update_batch_size=10', '--metatrain_iterations=5', '--save_interval=1', '--ensemble=2',
        '--log=False')


def entries_of(directory):
    with open(os.path.join(directory, 'results.json'), encoding='utf-8') as file:
        return json.load(file)


@pytest.mark.parametrize('directory', SHIPPED)
def test_what_ships_belongs_together(directory):
    """Each evaluation has its checkpoint, the console log is the run's own, and no path is of another machine."""
    there = checkpoints.iterations(os.path.join(ROOT, directory))
    assert there
    if os.path.exists(os.path.join(ROOT, directory, 'results.json')):
        for entry in entries_of(os.path.join(ROOT, directory)).values():
            assert set(entry.get('ensemble', [entry['iterations']])) <= set(there)
            assert os.path.dirname(entry['checkpoint']) == directory
            assert not [value for value in entry['flags'].values() if isinstance(value, str) and os.path.isabs(value)
                        and value != default('logdir')]
    for path in glob.glob(os.path.join(glob.escape(os.path.join(ROOT, directory)), '*.log')):
        with open(path, encoding='utf-8') as file:
            named = {line.rpartition(' in ')[2].rstrip() for line in file if line.startswith('Training ')}
        assert named <= {directory}


def test_flags_that_repeat_an_evaluation():
    """Those that are not at their defaults, and those that the training had otherwise."""
    directory = os.path.join(LOGS, 'fc1001shot', 'cls_5.mbs_4.ubs_1.numstep5.updatelr0.01hidden32maxpoolbatchnorm')
    entries = entries_of(directory)

    def flags(name, **changes):
        entry = entries[f'{name}, test']
        return zoo.flags_of(Evaluation(directory, name, None, {**entry, 'flags': {**entry['flags'], **changes}}))

    assert {'--query_norm=support', '--test_iter=60000', '--num_updates=5', '--test_set=True'} <= set(flags(
        'test_ubs1_stepsize0.01_querynormsupport'))
    assert {'--query_norm=batch', '--test_iter=32000'} <= set(flags('test_ubs1_stepsize0.01_model32000'))
    assert {'--datasource=gtsrb'} <= set(flags('test_ubs1_stepsize0.01_gtsrb'))
    assert '--num_updates=1' in flags('test_ubs1_stepsize0.01', num_updates=1)  # the default, where the training had 5
    assert not [flag for flag in flags('test_ubs1_stepsize0.01') if flag.startswith(('--run', '--logdir', '--method'))]


@pytest.mark.slow
def test_shipped_figures_are_reproduced(capsys):
    assert zoo.check([SEED3, SEED3])  # named twice, evaluated once
    printed = capsys.readouterr().out
    assert 'model70000: the same, 0.4572 ± 0.0454 after 1' in printed and 'model64000: the same, 0.4422 ± 0.0452 after 1' in printed
    assert printed.endswith('2 the same, 0 nearly the same, 0 different, 0 left out\n')


@pytest.mark.slow
def test_other_figures_are_reported(tmp_path, capsys):
    run = tmp_path / os.path.basename(SEED3)
    shutil.copytree(SEED3, run)
    entries = entries_of(run)
    entries['test_ubs10_stepsize0.001, test']['updates'][1]['mean'] += 0.0032
    entries['another, test'] = entries_of(SEED3)['test_ubs10_stepsize0.001, test'] | {'scores': [[0.0]]}
    entries['another, test']['updates'][1]['mean'] += 0.0002
    entries['test_ubs10_stepsize0.001_model64000, test']['iterations'] = 63000
    (run / 'results.json').write_text(json.dumps(entries))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(SystemExit) as end:
        zoo.command_line(['check', str(tmp_path)])
    printed = capsys.readouterr().out
    assert end.value.code == 1
    assert 'model70000: different, 0.4604 ± 0.0454 recorded and 0.4572 ± 0.0454 now after 1\n' in printed
    assert 'model70000: nearly the same, 0.4574 ± 0.0454 recorded and 0.4572 ± 0.0454 now after 1\n' in printed
    assert 'evaluation failed: ' in printed and 'there is no checkpoint model63000' in printed
    assert printed.endswith('0 the same, 1 nearly the same, 2 different, 0 left out\n')
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_what_cannot_be_repeated_is_left_out(tmp_path, capsys):
    """Images that are not there, other weights, evaluations of earlier versions; and folders without evaluations."""
    run = tmp_path / 'run'
    shutil.copytree(os.path.join(ROOT, 'logs/fc1001shot/cls_5.mbs_4.ubs_1.numstep5.updatelr0.01hidden32maxpoolbatchnorm'), run)
    entries = entries_of(run)
    for entry in entries.values():
        entry['flags']['data_path'] = '/nowhere'
    entries['test_ubs1_stepsize0.01_gtsrb, test']['flags']['load_from'] = 'elsewhere/model1'
    del entries['test_ubs1_stepsize0.01_cifarfs, test']['updates']
    (run / 'results.json').write_text(json.dumps(entries))
    assert not zoo.check([str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count('left out, there is no folder /nowhere') == 3
    assert "left out, not the run's own weights" in printed and 'left out, recorded by an earlier version' in printed
    with pytest.raises(SystemExit, match='there is no results.json in'):
        zoo.command_line(['check', str(tmp_path / 'nowhere')])


@pytest.mark.slow
def test_what_ships_is_enough(tmp_path, capsys):
    """To evaluate each of its checkpoints, to the same figures, and to go on from the newest, but not from another."""
    run_ok(*TINY, f'--logdir={tmp_path}/logs/run/')
    run, = (tmp_path / 'logs' / 'run').iterdir()
    evaluations = ['--ensemble=1'], ['--test_best', '--ensemble=1'], ['--ensemble=2']
    for flags in *evaluations, ['--ensemble=1', '--test_iter=1']:
        run_ok(f'--run={run}', '--train=False', '--num_test_tasks=4', '--log=False', *flags)
    path = run / 'results.json'
    path.write_text(path.read_text().replace(f'"{tmp_path}', '"relative'))
    best = [entry['iteration'] for entry in checkpoints.find(str(run), None).record['ranking']]
    zoo.command_line(['pack', str(tmp_path / 'logs'), str(tmp_path / 'packed')])
    zoo.command_line(['pack', str(tmp_path / 'logs'), str(tmp_path / 'packed')])  # replaces it
    packed = tmp_path / 'packed' / 'run' / run.name
    assert checkpoints.iterations(str(packed)) == sorted({5, *best})
    assert not list((tmp_path / 'packed' / 'run').glob('tmp*'))
    entries, all_entries = entries_of(packed), entries_of(run)
    assert entries == {name: entry for name, entry in all_entries.items() if {5, *best}.issuperset(
        entry.get('ensemble', [entry['iterations']]))}
    assert len(entries) == len(all_entries) - (1 not in best)
    assert zoo.check([str(packed)]) and f'{len(entries)} the same' in capsys.readouterr().out

    other = next(one for one in best if one != 5)
    assert f'model{other} has the weights but not the state of the optimizer' in error_of(
        *TINY, f'--logdir={tmp_path}/packed/run/', f'--test_iter={other}')
    with_six = [flag.replace('iterations=5', 'iterations=6') for flag in TINY]
    for logs in 'logs', 'packed':
        assert 'Resuming from' in run_ok(*with_six, f'--logdir={tmp_path}/{logs}/run/')
    sixth = [checkpoints.load(str(folder / 'model6')).arrays for folder in (run, packed)]
    assert sixth[0].keys() == sixth[1].keys() and all((sixth[0][name] == sixth[1][name]).all() for name in sixth[0])


def test_a_run_of_an_earlier_version_is_packed(tmp_path):
    """Its record ranks one checkpoint only, the best."""
    run = tmp_path / 'run'
    shutil.copytree(SEED3, run)
    arrays, record = checkpoints.load(str(run / 'model70000'))[1:]
    del record['ranking']
    for name in 'model70000.index', 'model70000.data-00000-of-00001':
        os.remove(run / name)
    checkpoints.save(str(run / 'model70000'), arrays, {**record, 'best': {'iteration': 64000, 'score': 0.4}})
    zoo.command_line(['pack', str(run), str(tmp_path / 'packed')])
    assert checkpoints.iterations(str(tmp_path / 'packed')) == [64000, 70000] and len(entries_of(tmp_path / 'packed')) == 2
    assert (run / 'model70000.data-00000-of-00001').read_bytes() == (tmp_path / 'packed' / 'model70000.data-00000-of-00001').read_bytes()


def test_a_destination_that_holds_something_else(tmp_path):
    """It would be replaced: notes, other runs, or the run itself, that is, the folder that it is in."""
    run, notes = tmp_path / 'exp' / 'run', tmp_path / 'dest' / 'notes'
    shutil.copytree(SEED3, run)
    shutil.copytree(SEED3, tmp_path / 'dest')
    notes.mkdir()
    (notes / 'thesis.txt').touch()

    def refusal(source, destination):
        with pytest.raises(SystemExit) as end:
            zoo.command_line(['pack', str(source), str(destination)])
        assert (notes / 'thesis.txt').exists() and (run / 'run.flags').exists() and (tmp_path / 'dest' / 'run.flags').exists()
        return str(end.value)

    assert 'would be replaced, and holds notes, which does not ship with a run' in refusal(run, tmp_path / 'dest')
    assert 'is in the other; name a folder elsewhere' in refusal(run, tmp_path / 'exp')
    assert 'is in the other; name a folder elsewhere' in refusal(tmp_path / 'exp', tmp_path / 'exp' / 'run' / 'copy')
    shutil.rmtree(notes)
    with checkpoints.exclusive(str(tmp_path / 'dest')):
        with pytest.raises(SystemExit, match='another process is training in'):
            zoo.command_line(['pack', str(run), str(tmp_path / 'dest')])
    zoo.command_line(['pack', str(run), str(tmp_path / 'dest')])
    assert not (tmp_path / 'dest' / '.lock').exists()


def test_what_cannot_be_packed(tmp_path):
    """What is at the destination stays."""
    run, packed = tmp_path / 'run', tmp_path / 'packed'
    shutil.copytree(SEED3, run)
    shutil.copytree(SEED3, packed)
    before = {path.name: path.read_bytes() for path in packed.iterdir()}

    def refusal(source, destination):
        with pytest.raises(SystemExit) as end:
            zoo.command_line(['pack', str(source), str(destination)])
        assert {path.name: path.read_bytes() for path in packed.iterdir()} == before
        return str(end.value)

    assert 'there is no run' in refusal(tmp_path / 'nowhere', packed)
    assert 'cannot be copied to itself' in refusal(run, run)
    entries = entries_of(run)
    entries['test_ubs10_stepsize0.001, test']['flags']['logdir'] = '/home/me/logs'
    (run / 'results.json').write_text(json.dumps(entries))
    assert 'names /home/me/logs (test_ubs10_stepsize0.001, test)' in refusal(run, packed)
    (run / 'results.json').write_text('{')
    assert 'results.json cannot be read' in refusal(run, packed)
    (run / 'model70000.data-00000-of-00001').write_bytes(b'')
    assert 'model70000 cannot be read' in refusal(run, packed)
