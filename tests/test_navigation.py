"""2-D navigation: navigation.py against an independent program (tests/golden_navigation/README.md), and the program around it."""
import glob
import json
import re
import signal

import numpy as np
import pytest
import tensorflow as tf

import main
import navigation
from conftest import error_of, fixture_files, results_of, run_ok
from data_generator import SOURCES, TaskConfig
from maml import ModelConfig
from navigation import Trajectories
from runtime.jobs import checkpoints
from runtime.jobs import train as training
from runtime.jobs.models import Navigator
from runtime.system.errors import UserError

FIXTURES = fixture_files('golden_navigation', 'MAML_GOLDEN_NAVIGATION')


class Golden:
    """A fixture: its numbers, and the episodes before and after the inner step."""

    def __init__(self, path, dtype='float64'):
        self.arrays, self.dtype = dict(np.load(path)), dtype
        config = json.loads(str(self.arrays.pop('config')))
        self.stop_grad, self.update_lr = config['stop_grad'], config['update_lr']
        self.discounting = config['discount'], config['gae_lambda']
        self.trajectories = [Trajectories(*(tf.cast(self.arrays[name][index], dtype) for name in Trajectories._fields)) for index in (0, 1)]
        self.batches = [(episodes, navigation.advantages(episodes, *self.discounting)) for episodes in self.trajectories]
        self.parameters = self.group('init')
        self.adapted = navigation.adapt(self.parameters, *self.batches[0], self.update_lr, self.stop_grad)
        self.problem = *self.batches, self.adapted, self.update_lr, self.stop_grad

    def group(self, name):
        """{name: tensor} of a group of the fixture."""
        return {key.split('/')[1]: tf.cast(array, self.dtype) for key, array in self.arrays.items() if key.startswith(name + '/')}

    def at(self, distance):
        """The parameters after a step along the fixture's vector."""
        return {name: value + distance * self.group('vector')[name] for name, value in self.parameters.items()}


@pytest.fixture(params=FIXTURES)
def golden(request):
    return Golden(FIXTURES[request.param])


def assert_close(actual, expected, **tolerance):
    """Of {name: tensor}."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        np.testing.assert_allclose(value, expected[name], err_msg=name, **tolerance)


def test_golden(golden):
    arrays = golden.arrays
    for index, (episodes, advantages) in enumerate(golden.batches):
        returns = navigation.discounted_sums(episodes.rewards * episodes.mask, golden.discounting[0]) * episodes.mask
        np.testing.assert_allclose(returns, arrays['returns'][index], atol=1e-10, rtol=1e-10)
        np.testing.assert_allclose(advantages, arrays['advantages'][index], atol=1e-10, rtol=1e-10)
    assert_close(golden.adapted, golden.group('fast'), atol=1e-10, rtol=1e-10)
    surrogate, gradient = navigation.surrogate_gradient(golden.parameters, *golden.problem)
    np.testing.assert_allclose(surrogate, arrays['surrogate'], atol=1e-10)
    assert_close(gradient, golden.group('gradient'), atol=1e-8)
    assert_close(navigation.kl_hessian_product(golden.parameters, golden.group('vector'), *golden.problem), golden.group('product'),
                 atol=1e-8)
    before, after, sampled_by, update_lr, stop_grad = golden.problem
    named = navigation.kl_hessian_product(golden.parameters, golden.group('vector'), before=before, after=after, sampled_by=sampled_by,
                                          update_lr=update_lr, stop_grad=stop_grad)
    assert_close(named, golden.group('product'), atol=1e-8)
    moved = navigation.surrogate_and_kl(golden.at(0.05), *golden.problem)
    np.testing.assert_allclose(moved, [arrays['surrogate_moved'], arrays['kl_moved']], atol=1e-8)


@pytest.mark.parametrize('name', [name for name in FIXTURES if 'first_order' not in name])  # which is no derivative
def test_against_central_differences(name):
    """The surrogate's slope along the vector, and the change of the divergence's gradient, away from where ratios are 1. Steps are short:
    where a ReLU turns on, the inner step jumps."""
    golden = Golden(FIXTURES[name])

    def surrogate(distance):
        return navigation.surrogate_and_kl(golden.at(0.05 + distance), *golden.problem)[0]

    def gradient_of_divergence(distance):
        parameters = golden.at(0.05 + distance)
        with tf.GradientTape() as tape:
            tape.watch(parameters)
            divergence = navigation.surrogate_and_kl(parameters, *golden.problem)[1]
        return tape.gradient(divergence, parameters)

    step, vector = 1e-6, golden.group('vector')
    _, gradient = navigation.surrogate_gradient(golden.at(0.05), *golden.problem)
    np.testing.assert_allclose(navigation._dot(gradient, vector), (surrogate(step) - surrogate(-step)) / (2 * step), rtol=1e-6)
    after, before = gradient_of_divergence(step), gradient_of_divergence(-step)
    change = {name: (value - before[name]) / (2 * step) for name, value in after.items()}
    assert_close(navigation.kl_hessian_product(golden.at(0.05), vector, *golden.problem), change, atol=1e-6, rtol=1e-6)


def test_single_precision(golden):
    """The same functions, to single precision."""
    single = Golden(next(path for path in FIXTURES.values() if np.array_equal(np.load(path)['rewards'], golden.arrays['rewards'])),
                    'float32')
    assert all(value.dtype == tf.float32 for value in single.adapted.values())
    assert_close(single.adapted, golden.group('fast'), atol=1e-5)
    assert_close(navigation.kl_hessian_product(single.parameters, single.group('vector'), *single.problem), golden.group('product'),
                 atol=1e-3)


def test_padding_counts_nowhere(golden):
    """Other numbers after the end of episodes change nothing."""
    def with_padding(episodes):
        return Trajectories(*(values + 7 * (1 - tf.reshape(episodes.mask, [*episodes.mask.shape] + [1] * (len(values.shape) - 3)))
                              for values in episodes[:3]), episodes.mask)
    batches = [(episodes, navigation.advantages(episodes, *golden.discounting)) for episodes in map(with_padding, golden.trajectories)]
    for (_, advantages), (_, expected) in zip(batches, golden.batches):
        np.testing.assert_allclose(advantages, expected, atol=1e-9)
    moved = navigation.surrogate_and_kl(golden.at(0.05), *batches, *golden.problem[2:])
    np.testing.assert_allclose(moved, navigation.surrogate_and_kl(golden.at(0.05), *golden.problem), atol=1e-9)


def test_conjugate_gradients():
    matrix = np.array([[3., 1, 0], [1, 2, 0], [0, 0, 5]])
    target = {'a': tf.constant([1., 2], tf.float64), 'b': tf.constant([3.], tf.float64)}

    def product(vector):
        image = tf.linalg.matvec(matrix, tf.concat([vector['a'], vector['b']], axis=0))
        return {'a': image[:2], 'b': image[2:]}

    solution, residual = navigation.conjugate_gradients(product, target)
    np.testing.assert_allclose(np.concatenate(list(solution.values())), np.linalg.solve(matrix, [1, 2, 3]), atol=1e-6)
    assert float(navigation._dot(residual, residual)) < 1e-10


def test_a_step_keeps_its_bound(golden):
    """The surrogate falls, and the divergence is within its bound; without any room for it, nothing changes."""
    step = navigation.trpo_step(golden.parameters, *golden.problem)
    surrogate, divergence = navigation.surrogate_and_kl(step.parameters, *golden.problem)
    assert step.taken and step.finite
    assert surrogate < golden.arrays['surrogate'] and 0 < divergence <= navigation.KL_BOUND
    np.testing.assert_allclose(step.divergence, divergence)


def test_a_step_of_pre_training(golden):
    """The shared policy, which also sampled the episodes, takes a step on them; a gradient that went through both would be 0."""
    before, parameters = golden.batches[0], golden.parameters
    problem = before, before, parameters, 0.0, True
    (trajectories, weights), (_, gradient) = before, navigation.surrogate_gradient(parameters, *problem)
    with tf.GradientTape() as tape:
        tape.watch(parameters)
        weighted = navigation.log_likelihood(parameters, trajectories) * weights * trajectories.mask
        loss = -tf.reduce_mean(tf.reduce_sum(weighted, axis=[1, 2]) / tf.reduce_sum(trajectories.mask, axis=[1, 2]))
    assert_close(gradient, tape.gradient(loss, parameters), atol=1e-12)
    step = navigation.trpo_step(parameters, *problem)
    assert step.taken and 0 < step.divergence <= navigation.KL_BOUND


def test_the_step_sizes_of_an_evaluation(golden):
    """Alpha first, then half of it; each task from its own policy."""
    config = ModelConfig(dim_input=2, dim_output=2, loss='return', update_batch_size=2, update_lr=golden.update_lr, dtype='float64')
    episodes = golden.trajectories[1]
    for number, update_lr in (0, golden.update_lr), (1, golden.update_lr / 2), (3, golden.update_lr / 2):
        found = navigation.evaluation_update(config, golden.adapted, episodes, tf.constant(number))
        assert_close(found, navigation.adapt(golden.adapted, *navigation.with_advantages(episodes), update_lr), rtol=1e-9)


def test_what_an_iteration_reports(eager):
    """Returns of the shared policy, and of the adapted ones on episodes of their own."""
    config = ModelConfig(dim_input=2, dim_output=2, loss='return', update_batch_size=2, update_lr=0.5, dim_hidden=(4,), dtype='float64')
    batch = SOURCES['navigation'].tasks(TaskConfig(5, 2, 2, seed=0), 'train').draw(0, 2)
    parameters = {name: tf.constant(value) for name, value in Navigator(config, seed=3).weights.items()}
    before = navigation.walk(config, parameters, batch.goals, batch.support_keys)
    adapted = navigation.adapt(parameters, *navigation.with_advantages(before), 0.5)
    after = navigation.walk(config, adapted, batch.goals, batch.query_keys)
    found = navigation.iteration(config, 'metatrain', parameters, batch)[1]
    for name, episodes in ('pre_return', before), ('post_return', after):
        np.testing.assert_allclose(found[name], tf.reduce_mean(navigation.average_return(episodes)), rtol=1e-9)
    assert abs(found['post_return'] - found['pre_return']) > 1e-3


def test_a_step_that_fails_changes_nothing(golden, monkeypatch):
    monkeypatch.setattr(navigation, 'LINE_SEARCH_STEPS', 0)
    step = navigation.trpo_step(golden.parameters, *golden.problem)
    assert not step.taken and step.divergence == 0
    assert_close(step.parameters, golden.parameters, rtol=0)


def still(goals, noise, mean=(0., 0.), **options):
    """Episodes of a policy whose mean action is always the same, with a standard deviation of 1."""
    parameters = {'w1': tf.zeros([2, 3]), 'b1': tf.zeros(3), 'w2': tf.zeros([3, 2]), 'b2': tf.constant(mean), 'log_std': tf.zeros(2)}
    return navigation.rollouts(parameters, tf.constant(goals), tf.constant(noise, tf.float32), **options)


def test_rollouts_by_hand():
    """Moves are a tenth of the action, clipped to 0.1; the reward is that of the place after the move; the end is within 0.01."""
    noise = np.zeros([4, 1, 2, 2])
    noise[:, 0, 0] = [[1, 0], [5, 0], [-0.5, 0], [0, 0]]  # the clipped 5 moves by 0.1, to the goal
    noise[:, 0, 1] = [[0, -9], [0, 0], [0, 0], [0, 0]]
    episodes = still([[0.205, 0.0]], noise)
    np.testing.assert_allclose(episodes.actions[0, 0, :2], noise[:2, 0, 0])
    np.testing.assert_allclose(episodes.observations[0, 0, :2], [[0, 0], [0.1, 0]], atol=1e-7)
    np.testing.assert_array_equal(episodes.mask[0], [[1, 1, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_allclose(episodes.rewards[0, 0], [-0.105, -0.005, 0, 0], atol=1e-7)
    np.testing.assert_allclose(episodes.rewards[0, 1], [-np.hypot(0.205, 0.1)] * 4, atol=1e-6)
    np.testing.assert_allclose(navigation.average_return(episodes), [(-0.11 - 4 * np.hypot(0.205, 0.1)) / 2], atol=1e-6)


def test_both_differences_must_be_small():
    np.testing.assert_array_equal(still([[0.1, 0.05]], np.zeros([3, 1, 1, 2]), mean=(1., 0.)).mask[0, 0], [1, 1, 1])
    np.testing.assert_array_equal(still([[0.1, 0.005]], np.zeros([3, 1, 1, 2]), mean=(1., 0.)).mask[0, 0], [1, 0, 0])


def test_goals():
    """Goals of meta-test are the reference's; keys are those of the task alone."""
    config = TaskConfig(num_classes=5, update_batch_size=3, query_shots=4, seed=0)
    test, train = (SOURCES['navigation'].tasks(config, split) for split in ('test', 'train'))
    np.random.seed(1)
    np.testing.assert_array_equal(test.draw(0, 40).goals, np.random.uniform(-0.5, 0.5, (40, 2)).astype(np.float32))
    batch = train.draw(0, 500)
    assert batch.support_keys.shape == (500, 3, 2) and batch.query_keys.shape == (500, 4, 2)
    assert np.abs(batch.goals).max() <= 0.5 and np.abs(batch.goals.mean(axis=0)).max() < 0.05
    assert len(np.unique(np.concatenate([batch.support_keys, batch.query_keys], axis=1).reshape(-1, 2), axis=0)) == 3500


def test_episodes_are_a_function_of_keys():
    """Not of the other tasks of a batch; another number makes others."""
    tasks = SOURCES['navigation'].tasks(TaskConfig(5, 2, 2, seed=0), 'train')
    config = ModelConfig(dim_input=2, dim_output=2, loss='return', update_batch_size=2, update_lr=0.1, dim_hidden=(4, 4))
    parameters = {name: tf.constant(value) for name, value in Navigator(config, seed=3).weights.items()}

    def actions(batch, *number):
        return navigation.walk(config, parameters, batch.goals, batch.query_keys, *number).actions

    both, second = actions(tasks.draw(0, 2)), actions(tasks.draw(1, 1))
    np.testing.assert_allclose(both[1], second[0], atol=1e-6)
    assert np.abs(both[0] - both[1]).min() < np.abs(both[0] - both[1]).max() and not np.allclose(second, actions(tasks.draw(1, 1), (0, 1)))


def test_whole_episodes_fill_the_steps():
    """A task's first episodes count until their lengths reach the steps that are asked for: 3 + 2 < 6, so the third one is in, the
    fourth is not; a longer one alone suffices. What is left out is in no mean."""
    lengths = tf.constant([[3, 2, 4, 1], [4, 4, 4, 4]])
    mask = tf.sequence_mask(lengths, 4, tf.float32)
    numbers = tf.reshape(tf.range(32.), [2, 4, 4])
    episodes = navigation.first_episodes(Trajectories(None, None, -numbers, mask), 6)
    np.testing.assert_array_equal(tf.reduce_sum(episodes.mask, axis=-1), [[3, 2, 4, 0], [4, 4, 0, 0]])
    np.testing.assert_allclose(navigation.average_return(episodes), [-(3 + 9 + 38) / 3, -(70 + 86) / 2])


@pytest.mark.slow
def test_an_evaluation_collects_steps():
    """Where the robot arrives early, more episodes are walked than `query_keys` has; a task's are those that it has alone."""
    config = ModelConfig(dim_input=2, dim_output=2, loss='return', update_batch_size=2, update_lr=0., dim_hidden=(4, 4))
    model, tasks = Navigator(config), SOURCES['navigation'].tasks(TaskConfig(5, 2, 3, seed=0), 'train')
    model.weights['log_std'].assign([-9, -9])
    model.weights['w3'].assign(tf.zeros([4, 2]))
    model.weights['b3'].assign([1, 0])  # always 0.1 to the right
    batch = tasks.draw(0, 2)._replace(goals=np.array([[0.2, 0], [0.5, 0.5]], np.float32))
    both = list(model.trajectories(batch, 1))
    for episodes in both:
        np.testing.assert_array_equal(tf.reduce_sum(episodes.mask[..., 0], axis=1), [150, 3])
    alone = list(model.trajectories(tf.nest.map_structure(lambda array: array[1:], batch), 1))
    np.testing.assert_allclose(navigation.average_return(both[1])[1:], navigation.average_return(alone[1]), rtol=1e-5)
    before, after = model.paths(batch, 1, shown=2)
    assert [len(task) for task in before + after] == [2, 2, 2, 2]
    np.testing.assert_allclose(before[0][0], [[0, 0], [0.1, 0], [0.2, 0]], atol=1e-3)  # the arrival too
    assert before[1][0].shape == (101, 2)
    assert model.evaluate(batch, 0).returns.shape == (1, 2) and model.replicas.count == 1


# The program --------------------------------------------------------------------------------------------------------

@pytest.fixture
def eager(monkeypatch):
    """Short episodes without compilation, and few validation tasks."""
    monkeypatch.setattr(navigation, 'HORIZON', 5)
    monkeypatch.setattr(training, 'REPORTED_TASKS', 2)
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


FLAGS = ['--datasource=navigation', '--meta_batch_size=2', '--update_batch_size=3', '--update_lr=0.5', '--hidden=4,4',
         '--validation_tasks=2']
TEST = ['--train=False', '--test_set=True', '--num_test_tasks=4', '--test_query=2']


def weights_of(logdir, iteration):
    path, = glob.glob(f'{logdir}/*/model{iteration}.index')
    reader = tf.train.load_checkpoint(path.removesuffix('.index'))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map() if name != 'record'}


def interrupted_after(monkeypatch, number):
    """Iteration `number` gets a SIGTERM while it is computed."""
    step, count = Navigator.train_steps, []

    def train_steps(*arguments):
        count.append(None)
        if len(count) == number:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(Navigator, 'train_steps', train_steps)


@pytest.mark.slow
def test_the_program(tmp_path, monkeypatch, eager):
    """Training, resuming bit for bit after an interruption within an iteration, evaluation, comparison, pictures."""
    whole = run_ok(*FLAGS, '--metatrain_iterations=3', f'--logdir={tmp_path / "whole"}')
    lines = re.findall(r'^Iteration (\d): (-[\d.]+), (-[\d.]+), kl ([\d.]+), taken ([01])$', whole, re.M)
    assert [line[0] for line in lines] == ['1', '2', '3'] and 'norm' not in whole.split('network')[1].split('\n')[0]
    assert all(0 <= float(divergence) <= navigation.KL_BOUND for *_, divergence, _ in lines) and '1' in {line[-1] for line in lines}

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted_after(patch, 2)
        run_ok(*FLAGS, '--metatrain_iterations=3', f'--logdir={tmp_path / "parts"}')
    assert 'model2' in run_ok(*FLAGS, '--metatrain_iterations=3', f'--logdir={tmp_path / "parts"}')
    assert_close(weights_of(tmp_path / 'parts', 3), weights_of(tmp_path / 'whole', 3), rtol=0)

    run = ['--run=' + glob.glob(f'{tmp_path}/whole/*')[0]]
    printed = run_ok(*run, *TEST, '--plot', '--log=False')
    assert 'average return' in printed and re.findall(r'^ +4 +-[\d.]+ ± [\d.]+$', printed, re.M)
    run_ok(*run, *TEST, '--test_iter=0', '--log=False')
    trained, initial = results_of(run[0].removeprefix('--run='))
    assert (trained.metric, trained.setting.headline_updates, trained.tasks.query_shots) == ('return', 1, 2)
    assert (initial.checkpoint, initial.training.method) == ('model0', 'random initialisation')
    assert np.shape(trained.scores) == (4, 5) and np.all(np.array(trained.scores) < 0)
    with pytest.raises(UserError, match='learns from episodes'):
        main.load(run[0].removeprefix('--run='))
    compared = run_ok('--compare', run[0].removeprefix('--run='), '--plot')
    assert 'random initialisation' in compared and 'Drawn' in compared
    assert len(glob.glob(f'{tmp_path}/whole/*/evaluation_test_model3_*.png')) == 2


@pytest.mark.slow
def test_baselines(tmp_path, eager, monkeypatch):
    """The oracle and pre-training are trained jointly; the oracle's observations have the goal, and it is judged before an update."""
    monkeypatch.setattr(training, 'validate', lambda *_: (-1.0, -2.0))
    for flags, inputs, score in ([], 2, -2.0), (['--baseline=oracle'], 4, -1.0):
        joint = [*FLAGS, *flags, '--pretrain_iterations=1', '--metatrain_iterations=0', f'--logdir={tmp_path / str(inputs)}', '--log=False']
        printed = run_ok(*joint)
        assert 'Pretrain Iteration 1: ' in printed and f'{inputs}-4-4-2' in printed
        assert weights_of(tmp_path / str(inputs), 1)['w1'].shape == (inputs, 4)
        directory, = glob.glob(f'{tmp_path}/{inputs}/*/')
        assert checkpoints.ranking_of(checkpoints.find(directory, None).record) == [{'iteration': 1, 'score': score, 'tasks': 2}]
        run_ok(*joint, *TEST)
    run_ok(f'--run={tmp_path / "4"}', *TEST, '--test_updates=0', '--log=False')
    with_updates, without = results_of(glob.glob(f'{tmp_path}/4/*/')[0])
    assert (without.headline_column, np.shape(without.scores)) == (0, (4, 1))
    np.testing.assert_allclose(without.scores, np.array(with_updates.scores)[:, :1])
    assert f'{tmp_path}/2' in run_ok('--compare', f'{tmp_path / "4"}', f'{tmp_path / "2"}')


def test_divergence_ends_in_a_sentence(tmp_path, eager):
    sentence = error_of(*FLAGS, '--update_lr=1e30', '--metatrain_iterations=3', f'--logdir={tmp_path}')
    assert 'not finite' in sentence and sentence.endswith('Lower --update_lr')


def test_no_step_for_many_iterations_ends_in_a_sentence(tmp_path, eager, monkeypatch):
    """As with a step size of 50: gradients are finite, but no step is short enough."""
    monkeypatch.setattr(navigation, 'LINE_SEARCH_STEPS', 0)
    monkeypatch.setattr(training, 'IDLE_ITERATIONS', 2)
    sentence = error_of(*FLAGS, '--metatrain_iterations=5', f'--logdir={tmp_path}')
    assert 'training stopped: in iteration 2 ' in sentence and 'no outer step was found in 2 iterations in a row' in sentence
    assert sentence.endswith('Lower --update_lr')
    joint = error_of(*FLAGS, '--baseline=oracle', '--metatrain_iterations=5', f'--logdir={tmp_path}')
    assert 'training stopped: ' in joint and '--update_lr' not in joint  # it has no inner step


@pytest.mark.parametrize('flag', ['--norm=batch_norm', '--meta_lr=0.1', '--num_updates=2', '--inner_weights=head', '--engine=map',
                                  '--num_classes=3', '--method=anil', '--strategy=mirrored', '--ensemble=2', '--predict',
                                  '--learn_lr=layer', '--method=boil', '--method=reptile'])
def test_flags_that_mean_nothing_are_refused(flag, tmp_path):
    sentence = error_of(*FLAGS, flag, '--metatrain_iterations=3', f'--logdir={tmp_path}')
    assert 'navigation' in sentence and flag.split('=')[0][2:] in sentence.replace('method', 'inner_weights method')
