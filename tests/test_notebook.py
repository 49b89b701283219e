"""maml.ipynb: runs from its first cell to its last, on a small budget, and is committed with what it printed and drew."""
import os
import shutil

import nbclient
import nbformat
import pytest

from conftest import ROOT

NOTEBOOK = os.path.join(ROOT, 'maml.ipynb')
BUDGET = {'iterations = 25_000': 'iterations = 200', 'STEPS = 10, 0.01, 25, 10_000': 'STEPS = 10, 0.01, 25, 200',
          "logdir = 'logs/notebook/'": "logdir = 'logs/tested/'"}


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    """In a copy of the repository without images, as a newcomer's is."""
    left_out = shutil.ignore_patterns('.*', '*.png', 'tests', 'benchmarks', 'data')
    shutil.copytree(ROOT, tmp_path / 'copy', ignore=left_out)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        for full, small in BUDGET.items():
            cell.source = cell.source.replace(full, small)
    assert sum(cell.source.count(small) for cell in notebook.cells for small in BUDGET.values()) == len(BUDGET)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3',
                            resources={'metadata': {'path': str(tmp_path / 'copy')}}).execute()
    printed = [output.text for cell in notebook.cells for output in cell.get('outputs', ()) if output.output_type == 'stream']
    assert any('meta-test, 600 tasks' in text for text in printed) and any('Omniglot is not there' in text for text in printed)
    # A shell command that fails is no error to a notebook.
    assert not any('main.py: ' in text or 'Traceback' in text for text in printed), printed


def test_committed_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == 'code']
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(cell.execution_count for cell in cells) and not any(output.output_type == 'error' for output in outputs)
    assert sum('image/png' in output.get('data', {}) for output in outputs) >= 4
    assert 'accuracy in %' in str(outputs) and 'mean squared error' in str(outputs)
