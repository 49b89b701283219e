"""The shipped models, and benchmarks/zoo.py: their figures are what they give again, and what ships of a run is enough."""
import dataclasses
import glob
import os
import shutil
import subprocess
import types

import pytest

import main
import zoo
from conftest import ROOT, error_of, results_of, run_ok
from runtime.cli import rules
from runtime.cli.request import resolve
from runtime.jobs import checkpoints
from runtime.results import store
from runtime.results.collect import read_evaluations, result_directories
from runtime.system.errors import UserError

LOGS = os.path.join(ROOT, 'logs')
TRACKED = subprocess.run(['git', 'ls-files', 'logs'], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
SHIPPED = [directory for directory in (os.path.relpath(one, ROOT) for one in result_directories(LOGS, ['run.flags']))
           if f'{directory}/run.flags' in TRACKED or not TRACKED]  # not one's own runs
SEED3 = os.path.join(LOGS, 'sine_seeds', 'cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm.seed3')
TINY = ('--datasource=sinusoid', '--norm=None', '--update_batch_size=10', '--metatrain_iterations=5', '--save_interval=1', '--ensemble=2',
        '--log=False', '--engine=map')


def shipped(directory):
    """The evaluations that ship with a run."""
    return store.read(os.path.join(directory, store.SHIPPED_FILE))


def write_shipped(directory, entries):
    store.write(os.path.join(directory, store.SHIPPED_FILE), entries)


@pytest.mark.parametrize('directory', SHIPPED)
def test_what_ships_belongs_together(directory):
    """Each evaluation has its checkpoint, but of the initial weights, no path is of another machine, and the console log is the run's
    own."""
    there = checkpoints.iterations(os.path.join(ROOT, directory))
    assert there
    for entry in shipped(os.path.join(ROOT, directory)):
        assert set(entry.ensemble or [entry.iterations]) <= {0, *there} and entry.checkpoint == f'model{entry.iterations}'
        assert entry.setting.load_from is None
    for path in glob.glob(os.path.join(glob.escape(os.path.join(ROOT, directory)), '*.log')):
        with open(path, encoding='utf-8') as file:
            named = {line.rpartition(' in ')[2].rstrip() for line in file if line.startswith('Training ')}
        assert named <= {directory}


def test_flags_that_repeat_an_evaluation():
    """They name its tasks and its setting, and pass the checks of flags."""
    directory = os.path.join(LOGS, 'fc1001shot', 'cls_5.mbs_4.ubs_1.numstep5.updatelr0.01hidden32maxpoolbatchnorm')
    own, support, best, *_, signs = map(zoo.flags_of, shipped(directory))
    assert {'--query_norm=support', '--test_iter=60000', '--update_lr=0.01', '--test_set=True', '--num_test_tasks=600'} <= set(support)
    assert {'--query_norm=batch', '--test_iter=32000', '--ensemble=1'} <= set(best)
    assert '--datasource=gtsrb' in signs and not [flag for flag in own if flag.startswith('--datasource')]
    for directory in SHIPPED:
        for entry in shipped(os.path.join(ROOT, directory)):
            rules.check_flags(resolve(main.parse(['main.py', f'--run={os.path.join(ROOT, directory)}', *zoo.flags_of(entry)])))


def test_flags_that_repeat_other_heads_and_orders():
    entry = shipped(SEED3)[0]
    for changes, flag in ({'head': 'nearest neighbour', 'test_updates': 0}, '--head=nearest'), ({'permutations': 3}, '--permutations=3'):
        assert flag in zoo.flags_of(dataclasses.replace(entry, setting=dataclasses.replace(entry.setting, **changes)))


def test_a_network_of_ones_own_ships_with_its_run(tmp_path):
    run, packed = tmp_path / 'run', tmp_path / 'packed'
    shutil.copytree(SEED3, run)
    (run / 'network').mkdir()
    (run / 'network' / 'conv4.py').write_text('# a network')
    for _ in range(2):  # an earlier pack is replaced
        zoo.pack(str(run), str(packed))
        assert (packed / 'network' / 'conv4.py').read_text() == '# a network'


@pytest.mark.slow
def test_shipped_figures_are_reproduced(capsys):
    assert zoo.check([SEED3, SEED3])  # named twice, evaluated once
    printed = capsys.readouterr().out
    assert 'model70000: the same, 0.4572 ± 0.0454 after 1' in printed and 'model64000: the same, 0.4422 ± 0.0452 after 1' in printed
    assert printed.endswith('2 the same, 0 nearly the same, 0 different, 0 left out\n')


@pytest.fixture
def run_here(monkeypatch):
    """Evaluations run in this process, which takes less time."""
    def run(command, **_):
        try:
            run_ok(*command[2:])
        except UserError as error:
            raise subprocess.CalledProcessError(1, command, str(error)) from error

    monkeypatch.setattr(zoo, 'subprocess', types.SimpleNamespace(**{**vars(subprocess), 'run': run}))


@pytest.mark.slow
@pytest.mark.usefixtures('run_here')
def test_other_figures_are_reported(tmp_path, capsys):
    run = tmp_path / os.path.basename(SEED3)
    shutil.copytree(SEED3, run)
    newest, best = shipped(run)

    def with_mean(added):
        figures = [newest.figures[0], dataclasses.replace(newest.figures[1], mean=newest.figures[1].mean + added), *newest.figures[2:]]
        return dataclasses.replace(newest, figures=figures)

    write_shipped(run, [with_mean(0.0032), dataclasses.replace(with_mean(0.0002), ensemble=[70000]),
                        dataclasses.replace(best, iterations=63000)])
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


def test_shipped_figures_are_checked_beside_ones_own(tmp_path, monkeypatch, capsys):
    run = tmp_path / 'run'
    shutil.copytree(SEED3, run)
    entries = shipped(run)
    store.write(str(run / store.FILE), entries[:1])
    monkeypatch.setattr(zoo, 'repeat', lambda evaluation: (zoo.SAME, evaluation.path))
    assert zoo.check([str(tmp_path)])
    assert capsys.readouterr().out.endswith(f'{len(entries) + 1} the same, 0 nearly the same, 0 different, 0 left out\n')


def test_a_figure_whose_interval_has_no_width(monkeypatch):
    """The accuracy of outputs that are all alike, for example, which another processor sums up to another last digit."""
    evaluation = next(iter(read_evaluations([SEED3])))
    without, usual, *others = evaluation.entry.figures
    without = dataclasses.replace(without, ci95=0.0)
    recorded = dataclasses.replace(evaluation.entry, figures=[without, usual, *others])

    def outcome(changes):
        figures = [dataclasses.replace(figure, mean=figure.mean + change) for figure, change in zip((without, usual), changes)]
        monkeypatch.setattr(zoo, 'evaluate_again', lambda *_: dataclasses.replace(evaluation.entry, figures=[*figures, *others]))
        return zoo.repeat(dataclasses.replace(evaluation, entry=recorded))[0]

    assert outcome((1e-9, 0)) == zoo.SAME and outcome((1e-9, 0.0002)) == zoo.CLOSE
    assert outcome((1e-3, 0)) == outcome((1e-9, 0.0032)) == zoo.DIFFERENT


def test_what_cannot_be_repeated_is_left_out(tmp_path, capsys):
    """Images that are not there, and other weights; and folders without evaluations."""
    run = tmp_path / 'run'
    shutil.copytree(os.path.join(ROOT, 'logs/fc1001shot/cls_5.mbs_4.ubs_1.numstep5.updatelr0.01hidden32maxpoolbatchnorm'), run)
    own, *others = shipped(run)
    write_shipped(run, [*others, dataclasses.replace(own, setting=dataclasses.replace(own.setting, load_from='/elsewhere/model1'))])
    with open(run / 'run.flags', 'a', encoding='utf-8') as file:
        file.write('--data_path=/nowhere\n')
    assert not zoo.check([str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count('left out, there is no folder /nowhere') == 2 and "left out, not the run's own weights" in printed
    assert printed.endswith('0 the same, 0 nearly the same, 0 different, 5 left out\n')
    (tmp_path / 'empty').mkdir()
    for name, words in ('empty', 'there is no results.json in'), ('nowhere', 'there is no folder'):
        with pytest.raises(SystemExit, match=words):
            zoo.command_line(['check', str(tmp_path / name)])


@pytest.mark.slow
@pytest.mark.usefixtures('run_here')
def test_what_ships_is_enough(tmp_path, capsys):
    """To evaluate each of its checkpoints, to the same figures, and to go on from the newest, but not from another."""
    run_ok(*TINY, f'--logdir={tmp_path}/logs/run/')
    run, = (tmp_path / 'logs' / 'run').iterdir()
    evaluations = ['--ensemble=1'], ['--test_best', '--ensemble=1'], ['--ensemble=2']
    for flags in *evaluations, ['--ensemble=1', '--test_iter=1']:
        run_ok(f'--run={run}', '--train=False', '--num_test_tasks=4', '--log=False', *flags)
    best = [entry['iteration'] for entry in checkpoints.find(str(run), None).record['ranking']]
    zoo.command_line(['pack', str(tmp_path / 'logs'), str(tmp_path / 'packed')])
    zoo.command_line(['pack', str(tmp_path / 'logs'), str(tmp_path / 'packed')])  # replaces it
    packed = tmp_path / 'packed' / 'run' / run.name
    assert checkpoints.iterations(str(packed)) == sorted({5, *best})
    assert not list((tmp_path / 'packed' / 'run').glob('tmp*'))
    entries, all_entries = shipped(packed), results_of(run)
    assert entries == [entry for entry in all_entries if {5, *best}.issuperset(entry.ensemble or [entry.iterations])]
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
    arrays, record = checkpoints.load(str(run / 'model70000'))[1:3]
    del record['ranking']
    for name in 'model70000.index', 'model70000.data-00000-of-00001':
        os.remove(run / name)
    checkpoints.save(str(run / 'model70000'), arrays, {**record, 'best': {'iteration': 64000, 'score': 0.4}})
    zoo.command_line(['pack', str(run), str(tmp_path / 'packed')])
    assert checkpoints.iterations(str(tmp_path / 'packed')) == [64000, 70000] and len(shipped(tmp_path / 'packed')) == 2
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


def test_a_destination_survives_a_failure(tmp_path, monkeypatch):
    destination, replace = tmp_path / 'packed', os.replace
    zoo.pack(SEED3, str(destination))
    (destination / 'console.log').write_text('what was there')

    def fail(source, target):
        if os.path.basename(source) == 'run':
            raise OSError('the disk is gone')
        replace(source, target)

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='the disk is gone'):
        zoo.pack(SEED3, str(destination))
    assert (destination / 'console.log').read_text() == 'what was there'


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
    (packed / 'results.json').touch()
    before['results.json'] = b''
    assert 'holds results.json, which does not ship with a run' in refusal(run, packed)
    (packed / 'results.json').unlink()
    del before['results.json']
    (run / 'results.json').write_text('{')
    assert 'results.json cannot be read' in refusal(run, packed)
    (run / 'model70000.data-00000-of-00001').write_bytes(b'')
    assert 'model70000 cannot be read' in refusal(run, packed)
