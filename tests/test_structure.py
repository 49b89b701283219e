"""The structure of the code: who imports whom, how long files are, how deep the algorithm lies, and that the docs are current."""
import ast
import glob
import os
import re
import subprocess
import sys
import traceback

import pytest

import flags_page
import main
import maml
from conftest import ROOT, run_ok
from runtime.cli.flags import LEARNING, ONLY
from runtime.cli.request import PURPOSES

with open(os.path.join(ROOT, 'docs', 'architecture.md'), encoding='utf-8') as page:
    ROWS = re.findall(r'^\| `(?:runtime/)?(\w+)(?:/|\.py)` \|.*\| (.*?) ?\|$', page.read(), re.M)
# {room: what it may import besides itself}, from the bottom to the top. A room is a file of the top level or a package of runtime/.
MAY_IMPORT = {name: set(re.findall(r'\w+', imports)) for name, imports in ROWS}


def modules():
    """{module: path} of the program."""
    paths = glob.glob(os.path.join(ROOT, '*.py')) + glob.glob(os.path.join(ROOT, 'runtime', '*', '*.py'))
    return {os.path.relpath(path, ROOT)[:-3].replace(os.sep, '.'): path for path in paths if not path.endswith('__init__.py')}


def executed(node):
    """The nodes below a node, without those that only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and getattr(child.test, 'id', '') == 'TYPE_CHECKING'):
            yield from executed(child)


def imports(path):
    """The program's modules that a file imports anywhere, and all top-level names of other packages."""
    found = set()
    with open(path, encoding='utf-8') as file:
        for node in executed(ast.parse(file.read())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {f'{node.module}.{alias.name}' for alias in node.names} | {node.module}
    return found


GRAPH = {name: {other for other in imports(path) if other in modules()} for name, path in modules().items()}


def reachable(name):
    found, new = set(), {name}
    while new:
        found |= new
        new = set().union(*(GRAPH[one] for one in new)) - found
    return found - {name}


def test_no_circle_of_imports():
    for name in GRAPH:
        assert name not in set().union(*(reachable(other) for other in GRAPH[name]), set()), name


def room(module):
    return module.split('.')[1] if module.startswith('runtime.') else module


@pytest.mark.parametrize('name', GRAPH)
def test_no_import_upwards(name):
    assert {room(other) for other in GRAPH[name]} <= MAY_IMPORT[room(name)] | {room(name)}


def test_each_room_is_known():
    assert {room(name) for name in GRAPH} == set(MAY_IMPORT)


def test_the_algorithm_needs_neither_pillow_nor_tqdm():
    for name in {'maml'} | reachable('maml'):
        assert not {other.split('.')[0] for other in imports(modules()[name])} & {'PIL', 'tqdm', 'absl'}, name


def test_scipy_stats_is_imported_when_it_is_used():
    """It is slow to import, and a training does not need it."""
    code = ('import sys, runtime.results.statistics as s; print("scipy.stats" in sys.modules); '
            's.scipy.stats.t; print("scipy.stats" in sys.modules)')
    assert subprocess.check_output([sys.executable, '-c', code], cwd=ROOT, text=True).split() == ['False', 'True']


@pytest.mark.parametrize('name, most', [('main', 250), ('maml', 450), ('navigation', 399), ('data_generator', 299), ('README.md', 220)])
def test_length(name, most):
    with open(os.path.join(ROOT, name if '.' in name else name + '.py'), encoding='utf-8') as file:
        assert len(file.readlines()) <= most


def test_no_function_is_too_complex():
    """By radon, which counts branches, loops, conditions and their operators."""
    from radon.complexity import cc_visit
    paths = [path for path in glob.glob(os.path.join(ROOT, '**', '*.py'), recursive=True)
             if os.path.relpath(path, ROOT).split(os.sep)[0] in ('runtime', 'data', 'benchmarks') or os.path.dirname(path) == ROOT]
    assert len(paths) > 60
    for path in paths:
        with open(path, encoding='utf-8') as file:
            found = {block.name: block.complexity for block in cc_visit(file.read())}
        assert max(found.values(), default=0) <= 15, (path, max(found, key=found.get))


def test_the_installed_program_has_all_modules():
    """pip install . knows every module that lies beside main.py."""
    with open(os.path.join(ROOT, 'pyproject.toml'), encoding='utf-8') as file:
        listed = re.search(r'py-modules = \[(.*)\]', file.read())[1]
    assert set(re.findall(r'"(\w+)"', listed)) == {name for name in modules() if '.' not in name}


def test_only_main_speaks_for_main():
    for name, path in modules().items():
        with open(path, encoding='utf-8') as file:
            assert name == 'main' or not re.search(r"""['"]main\.py: """, file.read()), name


@pytest.mark.usefixtures('fresh_models')
@pytest.mark.parametrize('most, more', [(6, []), pytest.param(7, ['--task_chunk=1', '--norm=batch_norm'], marks=pytest.mark.slow)])
def test_frames_between_the_training_loop_and_the_inner_step(most, more, tmp_path, monkeypatch):
    """Six at most, in validation too; in chunks one more."""
    stacks, inner_step = [], maml.inner_step

    def spy(*arguments, **others):
        stacks.append([frame.name for frame in traceback.extract_stack() if frame.filename.startswith(ROOT + os.sep)
                       and '/site-packages/' not in frame.filename])
        return inner_step(*arguments, **others)

    monkeypatch.setattr(maml, 'inner_step', spy)
    run_ok('--norm=None', '--metatrain_iterations=1', '--meta_batch_size=2', f'--logdir={tmp_path}', '--log=False', *more)
    assert any('meta_gradient' in stack for stack in stacks) and any('validate' in stack for stack in stacks)
    for stack in stacks:
        between = stack[stack.index('loop') + 1:stack.index('spy')]
        assert len(between) <= most, between


def test_flags_are_declared_for_purposes_that_there_are():
    for name, declared in LEARNING.items():
        assert declared.network in {None, 'all', *PURPOSES}, f"--{name} is declared with network={declared.network!r}"
    for name, purposes in ONLY.items():
        assert set(purposes) <= set(PURPOSES), f"--{name} is declared with only={', '.join(purposes)!r}; there are {', '.join(PURPOSES)}"


# The docs ---------------------------------------------------------------------------------------------------------------

def test_rooms_import_those_below_them():
    for index, (name, imports) in enumerate(MAY_IMPORT.items()):
        assert imports <= set(list(MAY_IMPORT)[:index]), name


def test_the_page_of_flags_is_current():
    """If this fails: python benchmarks/flags_page.py"""
    with open(os.path.join(ROOT, 'docs', 'flags.md'), encoding='utf-8') as file:
        assert file.read() == flags_page.markdown()


def test_each_published_command_is_a_file_of_configs():
    """Those of the usage text, and one for each source that has classes to train on; all of them parse."""
    usage = {line.strip().removeprefix('python main.py ') for line in main.USAGE.splitlines() if 'python main.py --data' in line}
    commands = {}
    for path in glob.glob(os.path.join(ROOT, 'configs', '*.flags')):
        with open(path, encoding='utf-8') as file:
            first, *lines = file.read().splitlines()
        assert first.startswith('# ')
        commands[' '.join(lines)] = os.path.basename(path)
        values = main.parse(['main.py', *lines]).values
        assert os.path.basename(path).startswith(f'{values["datasource"]}_')
    assert usage < set(commands)
    trained = {re.match(r'--datasource=(\w+)', command)[1] for command in commands}
    assert trained == {name for name, source in main.SOURCES.items() if not getattr(source, 'test_only', False)}


def test_links_of_the_docs_lead_somewhere():
    for page in [os.path.join(ROOT, name) for name in ('README.md', 'CONTRIBUTING.md')] + glob.glob(os.path.join(ROOT, 'docs/*.md')):
        with open(page, encoding='utf-8') as file:
            for link in re.findall(r'\]\(([^)#\s]+)', file.read()):
                if not link.startswith(('http', 'mailto')):
                    assert os.path.exists(os.path.join(os.path.dirname(page), link)), f'{page}: {link}'


@pytest.mark.slow
def test_the_example_of_a_source_works(tmp_path):
    """docs/adding-a-source.md, as printed: the code block, then a training and an evaluation."""
    with open(os.path.join(ROOT, 'docs', 'adding-a-source.md'), encoding='utf-8') as file:
        example = re.search(r'```python\n(.*?)```', file.read(), re.S)[1]
    name = re.search(r"SOURCES\['(\w+)'\]", example)[1]
    flags = [f'--datasource={name}', '--norm=None', '--metatrain_iterations=2', f'--logdir={tmp_path}', '--num_test_tasks=5']
    program = (f'import sys; sys.path.insert(0, {ROOT!r})\n{example}\nimport main\n'
               f'main.main(["main.py", *{flags!r}])\n'
               f'main.main(["main.py", *{flags!r}, "--train=False", "--test_set=True"])\n')
    process = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0 and 'meta-test, 5 tasks' in process.stdout, process.stderr
