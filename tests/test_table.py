"""The queue that makes the table of results, benchmarks/table.py, on a row that trains in seconds."""
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

import table
from conftest import ROOT, results_of
from runtime.results.store import SHIPPED_FILE

PROGRAM = """import sys
sys.path[:0] = [{root!r} + folder for folder in ('', '/benchmarks', '/tests')]
import table
import test_table
vars(table).update(test_table.of_a_tiny_row({folder!r}, 10 ** 6))
table.command_line(sys.argv[1:])"""


def of_a_tiny_row(folder, iterations):
    """{name: value} of what table.py has for a page and a log directory in a folder."""
    flags = f'--metatrain_iterations={iterations}', '--save_interval=100', f'--logdir={folder}/logs/', '--log=False'
    return {'PAGE': f'{folder}/results.md', 'COMMANDS_PAGE': f'{folder}/results-commands.md', 'LOCK': f'{folder}/lock', 'ROWS': [
        table.Row('sinusoid_10shot', 'tiny sinusoid', '1.23', '4.56', flags),
        table.Row('miniimagenet_5way1shot', 'without data', flags=(f'--logdir={folder}/logs/', '--data_path=/nowhere'))]}


@pytest.fixture
def queue(tmp_path, monkeypatch, capfd):
    """Runs the queue in this process; returns the exit status, and what was printed."""
    (tmp_path / 'results.md').write_text(f'before\n{table.BEGIN}\nold\n{table.END}\nafter\n')

    def run(*arguments, iterations=300):
        for name, value in of_a_tiny_row(tmp_path, iterations).items():
            monkeypatch.setattr(table, name, value)
        try:
            table.command_line(arguments)
        except SystemExit as end:
            return 1, end.code + ''.join(capfd.readouterr())
        return 0, ''.join(capfd.readouterr())
    return run


def lines(tmp_path):
    """The rows of the written table, {title: cells}."""
    page = (tmp_path / 'results.md').read_text()
    assert page.startswith('before\n') and page.endswith('\nafter\n') and 'old' not in page
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in page.splitlines() if line.startswith('| ')]
    return {row[0]: row[1:] for row in rows}


def test_evaluations_with_other_steps_are_not_the_rows(monkeypatch):
    """Of the shipped runs; Reptile's has steps of its own in evaluations."""
    monkeypatch.chdir(ROOT)
    for title in 'FC100 5-way 1-shot', 'CIFAR-FS 5-way 1-shot, Reptile':
        state = table.state_of(next(row for row in table.ROWS if row.title == title))
        entry, = table.entries_shown(state, [state.newest])
        for other in {'update_lr': 0.2}, {'inner_batch': 3}, {'headline_updates': 3}, {'query_norm': 'support'}, {'load_from': '/model1'}:
            changed = dataclasses.replace(entry, setting=dataclasses.replace(entry.setting, **other))
            with monkeypatch.context() as patched:
                patched.setattr(table.store, 'entries_of', lambda directory, changed=changed: [changed])
                assert table.entries_shown(state, [state.newest]) == []


@pytest.mark.slow
def test_rows_are_trained_evaluated_and_written(queue, tmp_path):
    """What is done is not done again, more iterations continue it, and no data mean no row."""
    status, printed = queue(iterations=100)
    assert status == 0 and '0 of 100 iterations' in printed, printed
    assert 'without data' not in printed and 'left out, there is no folder /nowhere' in printed
    run, = (tmp_path / 'logs').iterdir()
    assert (run / 'console.log').read_text().startswith('Training 10-shot sinusoid for 100 iterations')
    assert json.loads((run / 'training_time.json').read_text()) and lines(tmp_path)['tiny sinusoid'][4] == '100 of 100'

    status, printed = queue('--only', 'sinusoid')
    assert status == 0 and f'Resuming from {run}/model100' in printed, printed
    last = next(entry for entry in results_of(run) if entry.iterations == 300)
    assert last.tasks.count == 600 and last.tasks.split == 'test'
    row = lines(tmp_path)['tiny sinusoid']
    shown = re.match(r'([\d.]+) ± [\d.]+ after 1, ([\d.]+) ± [\d.]+ after 10$', row[2])
    assert [float(shown[1]), float(shown[2])] == pytest.approx([last.figures[1].mean, last.figures[10].mean], abs=1e-4)
    assert row[:2] == ['1.23', '4.56'] and row[4] == '300 of 300' and re.match(r'[\d.e-]+ h on \d+ cores', row[5])
    assert lines(tmp_path)['without data'][2:5] == ['', '', '0 of 60,000']

    before = (run / 'results.json').read_bytes()
    for options, iterations in ([], 300), (['--evaluate'], 400):
        status, printed = queue('--only', 'sinusoid', *options, iterations=iterations)
        assert status == 0 and 'Iteration' not in printed and (run / 'results.json').read_bytes() == before


@pytest.mark.slow
def test_an_interrupted_queue_saves_and_goes_on(queue, tmp_path):
    """SIGTERM is passed on to the training; a second queue is refused meanwhile."""
    process = subprocess.Popen([sys.executable, '-c', PROGRAM.format(root=ROOT, folder=str(tmp_path)), '--only', 'sinusoid'],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith('Iteration 1000:'):
            break
    status, printed = queue('--only', 'sinusoid')
    assert status == 1 and 'another queue is running' in printed
    process.send_signal(signal.SIGTERM)
    printed = ''.join(process.communicate(timeout=300))
    assert process.returncode == 1 and 'ended with status 143; start this again to continue' in printed and 'Traceback' not in printed
    iteration, = re.findall(r'Stopped by SIGTERM after iteration (\d+)', printed)
    run, = (tmp_path / 'logs').iterdir()
    assert (run / f'model{iteration}.index').exists() and json.loads((run / 'training_time.json').read_text())
    assert queue('--write', iterations=10 ** 6)[0] == 0
    assert f'{int(iteration):,}' in ' '.join(lines(tmp_path)['tiny sinusoid'])


def test_a_row_that_does_not_exist(queue):
    status, printed = queue('--only', 'nothing')
    assert status == 1 and "no row has 'nothing' in its name; there are: sinusoid_10shot" in printed


def test_validations_of_a_console_log(tmp_path):
    import curves
    log = ('Iteration 400: 0.2, 0.3\nIteration 500: 0.2, 0.4\nValidation results: 0.2, 0.35\nValidation of model700: 0.2, 0.5\n'
           'Resuming from model500\nIteration 600: 0.2, 0.5\nValidation of model700: 0.2, 0.45\nIteration 1000: 0.2, 0.5\n'
           'Validation results: 0.2, 0.25\n')
    np.testing.assert_array_equal(curves.validations(log, 0), [[500, 0.35], [700, 0.45], [1000, 0.25]])
    classifier = 'Pretrain Iteration 200: 0.2, 0.3\nValidation results: 0.2, 0.3\nIteration 100: 0.2, 0.4\nValidation results: 0.2, 0.4\n'
    np.testing.assert_array_equal(curves.validations(classifier, 250), [[200, 0.3], [350, 0.4]])
    np.testing.assert_allclose(curves.running_mean(np.array([1., 2, 3, 4, 5, 6, 7])), [1, 1.5, 2, 2.5, 3, 4, 5])
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'console.log').write_text(log)
    (tmp_path / 'run' / 'run.flags').write_text('')
    with pytest.raises(SystemExit, match='is not of classification'):
        curves.console_log(str(tmp_path))
    (tmp_path / 'run' / 'run.flags').write_text('--datasource=omniglot\n')
    curves.draw({'a': curves.console_log(str(tmp_path))}, str(tmp_path / 'curves.png'))
    assert (tmp_path / 'curves.png').stat().st_size > 5000


def test_each_row_that_ships_has_figures():
    """As when a preset changes, and the table looks for evaluations in another setting than those that ship."""
    states = {row.title: table.state_of(row) for row in table.ROWS}
    shown = {title: table.evaluations_asked(state.directory, state.evaluation) for title, state in states.items()
             if os.path.exists(os.path.join(state.directory, SHIPPED_FILE))}
    assert len(shown) > 20 and all(shown.values()), [title for title, entries in shown.items() if not entries]
