"""The methods of the family as users run them: presets, resuming, evaluating, and what is refused; and the examples of new ones."""
import functools
import glob
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import main
from clusters import checkpoint
from conftest import ROOT, directory_of, error_of, results_of, run_ok
from runtime.cli import flags, methods, rules, startup, workers
from runtime.cli.request import resolve
from runtime.jobs.ensemble import Ensemble
from runtime.jobs.learner import load
from runtime.system.errors import UserError

SINUSOID = ['--datasource=sinusoid', '--update_batch_size=5', '--norm=None', '--meta_batch_size=2', '--engine=map']
IMAGES = ['--datasource=omniglot', '--update_batch_size=1', '--num_filters=4', '--meta_batch_size=2', '--update_lr=0.4']


@pytest.mark.slow
def test_schedules_and_learned_rates_resume_to_the_bit(tmp_path):
    """An interruption within a stage and at its end; the first stage ends within what is one call else."""
    flags = [*SINUSOID, '--num_updates=2', '--learn_lr=step', '--multi_step_loss=5', '--first_order_iterations=2']
    run_ok(*flags, f'--logdir={tmp_path / "whole"}', '--metatrain_iterations=6')
    for last in 1, 2, 5, 6:
        run_ok(*flags, f'--logdir={tmp_path / "parts"}', f'--metatrain_iterations={last}')
    whole, parts = checkpoint(tmp_path / 'whole', 6), checkpoint(tmp_path / 'parts', 6)
    assert whole.keys() == parts.keys() and 'lr/w1' in whole and not np.array_equal(whole['lr/w1'], [0.001, 0.001])
    for name in whole.keys() - {'record'}:  # it says which checkpoint was best, and there are more of them
        assert np.array_equal(whole[name], parts[name]), name


@pytest.mark.slow
@pytest.mark.parametrize('flags', [
    pytest.param(['--num_updates=2', '--norm=batch_norm', '--norm_scale', '--norm_per_step', '--adapt_norm', '--learn_lr=weight'],
                 id='norms'),
    pytest.param(['--method=reptile', '--norm=batch_norm', '--num_updates=3', '--inner_batch=2'], id='reptile')])
def test_norm_sets_and_moments_resume_to_the_bit(flags, tmp_path):
    """Offsets and scales of each step; second moments and their count that Reptile's tasks hand on, and its schedule."""
    flags = [*SINUSOID, '--metatrain_iterations=6', *flags]
    run_ok(*flags, f'--logdir={tmp_path / "whole"}', '--save_interval=3')
    shutil.copytree(tmp_path / 'whole', tmp_path / 'parts')
    for path in tmp_path.glob('parts/*/model6.*'):
        path.unlink()
    assert 'model3' in run_ok(*flags, f'--logdir={tmp_path / "parts"}', '--save_interval=3')
    whole, parts = checkpoint(tmp_path / 'whole', 6), checkpoint(tmp_path / 'parts', 6)
    assert whole.keys() == parts.keys() and len(whole) > 9
    for name in whole:
        assert np.array_equal(whole[name], parts[name]), name


def test_a_run_with_another_end_is_another_run(tmp_path):
    """Where the outer step size depends on the last iteration, that is part of the run."""
    flags = [*SINUSOID, f'--logdir={tmp_path}', '--meta_lr_schedule=cosine', '--meta_optimizer=sgd']
    run_ok(*flags, '--metatrain_iterations=2')
    assert 'made with --metatrain_iterations=2, and not with' in error_of(*flags, '--metatrain_iterations=4')


@pytest.mark.slow
def test_a_plain_checkpoint_starts_a_run_with_more(tmp_path, small_omniglot, few_tasks):
    """Learned rates start at --update_lr, scales at 1, and each inner step's offsets at the trained ones."""
    data = [*IMAGES, f'--data_path={small_omniglot}', f'--logdir={tmp_path}']
    run_ok(*data, '--metatrain_iterations=2')
    prefix = next(tmp_path.glob('*/model2.index')).with_suffix('')
    more = [*data, '--metatrain_iterations=1', '--num_updates=2', '--learn_lr=step', '--norm_scale', '--norm_per_step', '--meta_lr=0']
    assert 'Starting from the weights' in run_ok(*more, f'--load_from={prefix}')
    found, = tmp_path.glob('*normscale*/model1.index')
    read = functools.partial(tf.train.load_variable, str(found.with_suffix('')))
    plain = tf.train.load_variable(str(prefix), '0/beta')
    assert np.array_equal(read('0/beta'), [plain, plain]) and np.array_equal(read('0/gamma'), np.ones([2, 4]))
    assert np.allclose(read('lr/conv1'), 0.4) and np.array_equal(read('conv1'), tf.train.load_variable(str(prefix), 'conv1'))


@pytest.mark.slow
@pytest.mark.parametrize('method, name, label', [
    ('anil', 'ANIL', '.innerhead'), ('boil', 'BOIL', 'updatelr0.5hidden4batchnorm.innerbody.adaptnorm.normscale.meanloss'),
    ('metasgd', 'Meta-SGD', '.learnlrweight'),
    ('reptile', 'Reptile', '.adaptnorm.normscale.linear.final0.0.sgd.reptile.inneradam.batch10')])
def test_presets_of_the_program(method, name, label, tmp_path, small_omniglot, few_tasks):
    data = [flag for flag in IMAGES if 'update_lr' not in flag] + [f'--data_path={small_omniglot}', f'--logdir={tmp_path}']
    flags = [*data, f'--method={method}', '--metatrain_iterations=2']
    run_ok(*flags)
    directory = directory_of(tmp_path)
    assert directory.name.endswith(label)
    run_ok(*flags, '--train=False', '--num_test_tasks=3')
    run_ok(f'--run={directory}', '--train=False', '--num_test_tasks=4', '--test_updates=2')
    entries = results_of(directory)
    assert [entry.training.method for entry in entries] == [name, name]
    assert len(entries[1].figures) == 3 and entries[1].setting.headline_updates == 2
    assert '--run names a run, whose method is known' in error_of(f'--run={directory}', '--method=maml', '--train=False')


@pytest.mark.slow
def test_maml_plus_plus_of_the_program(tmp_path, small_omniglot, few_tasks):
    """Through first-order, multi-step and last stages; then the best checkpoints together, one of them, and too many."""
    data = [flag for flag in IMAGES if 'update_lr' not in flag] + [f'--data_path={small_omniglot}', f'--logdir={tmp_path}']
    flags = [*data, '--method=maml++', '--num_filters=4', '--multi_step_loss=3', '--first_order_iterations=1', '--schedule_interval=1',
             '--num_updates=2', '--ensemble=2', '--test_query=1']
    run_ok(*flags, '--metatrain_iterations=4', '--save_interval=1')
    evaluation = [*flags, '--train=False', '--num_test_tasks=3']
    assert 'mean outputs of model' in run_ok(*evaluation)
    run_ok(*evaluation, '--ensemble=1', '--test_best')
    directory = directory_of(tmp_path)
    together, best = results_of(directory)
    assert len(together.ensemble) == 2 and together.ensemble[0] == best.iterations and best.ensemble == []
    assert (together.is_best and best.is_best and together.setting.headline_updates == 2
            and together.training.method.startswith('MAML++ with'))
    assert '--ensemble=3: only 2 checkpoints were validated and kept' in run_ok(*evaluation, '--ensemble=3')
    assert '--test_best name different checkpoints' in error_of(*evaluation, '--test_best')
    assert '--load_from names one' in error_of(*evaluation, f'--load_from={directory}/model4')
    assert isinstance(load(directory).model, Ensemble)
    chosen = load(directory, checkpoint=2)
    assert os.path.basename(chosen.checkpoint) == 'model2' and not isinstance(chosen.model, Ensemble)


@pytest.mark.slow
def test_norms_of_query_rows_in_training(tmp_path):
    """A directory of its own, found by the same command with --train=False; --run=DIR evaluates otherwise than it was trained."""
    flags = [flag for flag in SINUSOID if 'norm' not in flag] + [f'--logdir={tmp_path}']
    run_ok(*flags, '--query_norm=support', '--metatrain_iterations=2')
    directory = directory_of(tmp_path)
    assert directory.name.endswith('batchnorm.querynormsupport')
    evaluation = [*flags, '--train=False', '--num_test_tasks=3']
    assert str(directory) in run_ok(*evaluation, '--query_norm=support')
    assert 'there is no checkpoint' in error_of(*evaluation)
    run_ok(f'--run={directory}', '--train=False', '--num_test_tasks=3')
    run_ok(f'--run={directory}', '--train=False', '--num_test_tasks=3', '--query_norm=both')
    run_ok(f'--run={directory}', '--train=False', '--num_test_tasks=3', '--query_norm=each')
    assert sorted(entry.setting.query_norm for entry in results_of(directory)) == ['batch', 'each', 'support']
    run_ok(*flags, '--metatrain_iterations=2')
    plain, = (path for path in tmp_path.iterdir() if path.is_dir() and path != directory)
    assert str(directory) in run_ok(*evaluation, '--query_norm=support')
    assert str(plain) in run_ok(*evaluation, '--query_norm=both')
    assert str(plain) in run_ok(f'--run={plain}', '--train=False', '--num_test_tasks=3', '--query_norm=support')


@pytest.mark.slow
def test_parts_of_the_support_rows_in_evaluation(tmp_path):
    """An evaluation may take parts of another size; the flags of the training name the run."""
    flags = [*SINUSOID, f'--logdir={tmp_path}', '--inner_batch=2']
    run_ok(*flags, '--metatrain_iterations=2')
    directory = directory_of(tmp_path)
    assert directory.name.endswith('.batch2')
    assert str(directory) in run_ok(*flags, '--train=False', '--num_test_tasks=3')
    assert str(directory) in run_ok(f'--run={directory}', '--inner_batch=3', '--train=False', '--num_test_tasks=3')
    assert sorted(entry.setting.inner_batch for entry in results_of(directory)) == [2, 3]


def preset(*flags):
    return resolve(main.parse(['main.py', '--datasource=omniglot', *flags])).values


def title(*flags):
    return methods.title(preset(*flags))


def test_presets_are_the_table_and_flags_override_them():
    assert not any(preset(f'--method={name}')[flag] != value
                   for name, entry in methods.PRESETS.items() for flag, value in entry.flags.items())
    assert preset('--method=boil', '--update_lr=0.1')['update_lr'] == 0.1
    for name, updates in ('protomaml', -1), ('unicorn', -1), ('maml++', -1), ('reptile', 50), ('baseline', 100):
        assert preset(f'--method={name}', '--num_updates=9')['test_updates'] == updates, 'where -1 leaves it to --num_updates'
    assert preset('--method=maml++', '--num_updates=5')['test_updates'] == 5, 'that of the preset'
    assert title('--method=fomaml') == title('--stop_grad') == 'first-order MAML' and title() == 'MAML'
    assert title('--method=anil', '--learn_lr=step') == 'ANIL with learn_lr=step'
    assert title('--learn_lr=layer', '--mean_loss') == 'MAML with learn_lr=layer, mean_loss'
    assert title('--method=boil', '--adapt_norm=False') == 'BOIL with adapt_norm=False'
    assert all(title(f'--method={name}') == entry.title for name, entry in methods.PRESETS.items())


@pytest.mark.parametrize('flags, words', [
    (['--norm=layer_norm', '--norm_scale'], '--norm_scale is for batch norm'),
    (['--norm=None', '--adapt_norm'], '--adapt_norm is for networks with a normalisation'),
    (['--norm=None', '--norm_per_step'], '--norm_per_step is for networks with'), (['--mean_loss'], '--mean_loss is for classification'),
    (['--schedule_interval=5'], '--schedule_interval needs a schedule'), (['--meta_lr_final=0.1'], 'needs --meta_lr_schedule'),
    (['--meta_lr_schedule=linear', '--meta_lr_final=-2'], 'must not be negative'),
    (['--method=matchingnet'], 'method'), (['--inner_optimizer=adam'], 'needs --outer=reptile'),
    (['--outer=reptile', '--stop_grad'], '--stop_grad is about a gradient through the inner loop'),
    (['--outer=reptile', '--multi_step_loss=5'], '--multi_step_loss is about a gradient'),
    (['--outer=reptile', '--clip_norm=5'], '--clip_norm is about a gradient'), (['--clip_norm=-1'], 'clip_norm'),
    (['--clip_norm=inf'], '--clip_norm must be a finite number'),
    (['--clip_norm=5', '--pretrain_iterations=1', '--metatrain_iterations=0'], '--clip_norm=5.0 is about meta-training'),
    (['--outer=reptile', '--learn_lr=step'], '--learn_lr is about a gradient'),
    (['--outer=reptile', '--first_order_iterations=5'], '--first_order_iterations is about a gradient'),
    (['--outer=reptile', '--query_norm=support'], 'learns from support examples alone'),
    (['--query_norm=both'], '--query_norm=both is for evaluation'), (['--recompute', '--engine=wide'], 'leave out --engine=wide'),
    (['--recompute', '--engine=vmap'], 'leave out --engine=vmap'),
    (['--ensemble=2', '--train=False', '--test_iter=5'], 'name different checkpoints')])
def test_what_means_nothing_is_refused(flags, words):
    assert words in error_of(*flags)


@pytest.mark.parametrize('flags, hint', [
    (['--method=maml++', '--datasource=omniglot', '--outer=reptile'],
     ' (--method=maml++ sets --learn_lr=step and --multi_step_loss=7500 and --first_order_iterations=5500; a flag on'),
    (['--method=reptile', '--meta_lr_schedule=constant'], ' (--method=reptile sets --meta_lr_final=0.0; '),
    (['--method=fomaml', '--stop_grad', '--num_updates=0'], '')])
def test_a_flag_that_a_preset_sets_is_named(flags, hint):
    sentence = error_of(*flags)
    assert hint in sentence and ('--method' in sentence) == bool(hint)


@pytest.mark.parametrize('given, dropped', [
    (['--method=maml++'], ['num_filters', 'mean_loss']), (['--method=boil', '--norm=None'], ['mean_loss', 'adapt_norm', 'norm_scale']),
    (['--method=maml++', '--datasource=omniglot'], []),
    (['--method=boil', '--datasource=omniglot', '--norm=layer_norm'], ['norm_scale']),
    (['--method=protomaml', '--datasource=omniglot', '--norm=None'], ['query_norm'])])
def test_a_preset_drops_what_has_no_meaning(given, dropped):
    """For the source, or the network; the same flag is refused where the user gives it."""
    request = resolve(main.parse(['main.py', *given]))
    assert set(request.dropped) == set(dropped) and all(request.values[name] == flags.default(name) for name in dropped)
    rules.check_flags(request)
    for name in dropped:
        assert f'--{name} is for ' in error_of(*given, f'--{name}={request.dropped[name]}')


def test_what_a_preset_drops_is_said(capsys, monkeypatch):
    monkeypatch.setattr(startup, 'import_tensorflow', lambda *_: startup.Replicas())
    startup.run_and_data(main.parse(['main.py', '--method=boil', '--norm=None']))
    assert capsys.readouterr().out == ('--method=boil: --adapt_norm=True, --norm_scale=True, --mean_loss=True left out, because they do '
                                       'not apply to this source or network\n')


@pytest.mark.parametrize('given, note', [
    ('--method=boil --num_updates=5 --test_query=3',
     'Note: --method=boil has --num_updates=1; the command line or its --flagfile has --num_updates=5, which is used\n'),
    ('--method=boil --num_updates=1', ''), ('--method=fomaml --stop_grad --update_lr=0.1', ''), ('--num_updates=7', '')])
def test_what_overrides_a_preset_is_said(given, note, small_omniglot, capsys, monkeypatch):
    """It may come from a --flagfile, which is for another method."""
    monkeypatch.setattr(startup, 'import_tensorflow', lambda *_: startup.Replicas())
    source = ['--datasource=omniglot', '--update_batch_size=1', f'--data_path={small_omniglot}']
    startup.run_and_data(main.parse(['main.py', *source, *given.split()]))
    assert capsys.readouterr().out == note


def test_moments_that_tasks_hand_on_need_one_device():
    with pytest.raises(UserError, match='--inner_optimizer=adam .* 2 replicas'):
        workers.check_one_after_the_other('adam', 2)
    workers.check_one_after_the_other('adam', 1)
    workers.check_one_after_the_other('sgd', 2)


@pytest.mark.slow
def test_a_run_is_evaluated_with_the_updates_of_its_method(tmp_path):
    """Reptile's 50 updates, with --run as with the whole command; and what updates beyond the trained ones use is said."""
    flags = [*SINUSOID, '--method=reptile', '--norm=batch_norm', '--num_updates=2', '--inner_batch=2', '--metatrain_iterations=1']
    run_ok(*flags, f'--logdir={tmp_path}', '--save_interval=1')
    run, = tmp_path.iterdir()
    output = run_ok(f'--run={run}', '--train=False', '--num_test_tasks=3')
    entry, = results_of(run)
    assert entry.setting.headline_updates == 50 and len(entry.figures) == 51 and 'beyond' not in output
    steps = [*SINUSOID, '--learn_lr=step', '--num_updates=2', f'--logdir={tmp_path / "steps"}']
    run_ok(*steps, '--metatrain_iterations=1')
    assert '(updates after number 2 use its step sizes' in run_ok(*steps, '--train=False', '--num_test_tasks=3')
    assert 'beyond' not in run_ok(*steps, '--train=False', '--num_test_tasks=3', '--test_updates=2')


EXAMPLES = {'inner_momentum': "norm='None', inner_momentum=0.9"}
EXAMPLE = """
import numpy as np, tensorflow as tf, main
from runtime.cli.startup import import_tensorflow
import_tensorflow()
from data_generator import TaskBatch
from maml import MAML, ModelConfig
rng = np.random.default_rng(0)
labels = np.eye(2)[[[0, 1, 1, 0]]]
batch = TaskBatch(rng.normal(size=(1, 4, 3)), labels, rng.normal(size=(1, 4, 3)), labels)
gradients = []
for more in {}, {'engine': 'map'}, {'recompute': True}:
    model = MAML(ModelConfig(dim_input=3, dim_output=2, loss='xent', update_batch_size=2, update_lr=0.1, num_updates=2,
                             dim_hidden=(4,), dtype='float64', CHANGES, **more))
    rng = np.random.default_rng(1)
    for variable in model.parameters().values():
        variable.assign(rng.normal(size=variable.shape))
    gradients.append(model.meta_gradients(batch))
for name, gradient in gradients[0].items():
    for other in gradients[1:]:
        np.testing.assert_allclose(gradient, other[name], rtol=1e-10)
direction = {name: rng.normal(size=v.shape) for name, v in model.weights.items()}
def loss(size):
    for name, variable in model.weights.items():
        variable.assign_add(size * direction[name])
    return float(model.evaluate(batch, 2).post_losses[-1, 0])
above = loss(1e-6)
below = loss(-2e-6)
slope = sum(float(np.sum(gradient * direction[name])) for name, gradient in gradients[0].items())
assert abs((above - below) / 2e-6 - slope) < 1e-6 * abs(slope), ((above - below) / 2e-6, slope)
assert 'FLAG' in main.parse(['main.py']).values and np.any(gradients[0]['w1'])
plain = MAML(ModelConfig(dim_input=3, dim_output=2, loss='xent', update_batch_size=2, update_lr=0.1, num_updates=2, norm='None',
                         dim_hidden=(4,), dtype='float64'))
plain.copy_parameters(model)
assert abs(float(plain.evaluate(batch, 2).post_losses[-1, 0]) - float(model.evaluate(batch, 2).post_losses[-1, 0])) > 1e-3
"""


@pytest.mark.slow
@pytest.mark.parametrize('flag, changes', EXAMPLES.items(), ids=EXAMPLES)
def test_the_examples_of_methods_work(flag, changes, tmp_path):
    """docs/changing-the-algorithm.md: the printed lines in a copy of the program, in both engines and recomputed; finite differences."""
    with open(os.path.join(ROOT, 'docs', 'changing-the-algorithm.md'), encoding='utf-8') as file:
        diff, = (diff for diff in re.findall(r'```diff\n(.*?)```', file.read(), re.S) if flag in diff)
    shutil.copytree(os.path.join(ROOT, 'runtime'), tmp_path / 'runtime')
    for path in glob.glob(os.path.join(ROOT, '*.py')):
        shutil.copy(path, tmp_path)
    for name, hunk in re.findall(r'@@ (\S+)\n(.*?)(?=^@@|\Z)', diff, re.S | re.M):
        lines = hunk.splitlines(keepends=True)
        before, after = (''.join(line[1:] for line in lines if line[0] != sign) for sign in '+-')
        text = (tmp_path / name).read_text()
        assert text.count(before) == 1, before
        (tmp_path / name).write_text(text.replace(before, after))
    program = EXAMPLE.replace('CHANGES', changes).replace("'FLAG'", repr(flag))
    process = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr


def test_the_page_of_methods_lists_the_presets():
    with open(os.path.join(ROOT, 'docs', 'methods.md'), encoding='utf-8') as file:
        page = file.read()
    for name, entry in methods.PRESETS.items():
        flags = ' '.join(f'--{flag}' if value is True else f'--{flag}={value}' for flag, value in entry.flags.items())
        assert f'| `{name}` | {entry.title} | ' in page and (not flags or f'`{flags}`' in page), name
