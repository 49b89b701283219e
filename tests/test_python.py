"""`load`, `adapt` and predict from Python: the numbers of --predict and of MAML.predict, saved predictors, the page docs/python.md."""
import csv
import os
import pathlib
import re

import numpy as np
import pytest
import scipy.special
from PIL import Image

from conftest import ROOT, run_ok
from data_generator import SOURCES, TaskBatch, TaskConfig
from main import load, load_predictor
from maml import MAML, ModelConfig
from runtime.jobs.learner import Inputs, Predictor, adapted_tensors
from runtime.system.errors import UserError

OMNIGLOT, SINE = os.path.join(ROOT, 'logs', 'omniglot5way'), os.path.join(ROOT, 'logs', 'sine')


@pytest.fixture(scope='module')
def learner():
    return load(OMNIGLOT)


@pytest.fixture
def drawings():
    """Support and query drawings of three classes, uint8 [9, 28, 28, 1] each, and their names."""
    rng = np.random.default_rng(0)
    patterns = rng.random((3, 28, 28, 1)) < 0.5
    draw = lambda: 255 * (np.repeat(patterns, 3, axis=0) ^ (rng.random((9, 28, 28, 1)) < 0.1)).astype(np.uint8)
    return draw(), draw(), np.repeat(['cat', 'dog', 'emu'], 3)


def test_the_numbers_of_predict(learner, drawings, tmp_path):
    support, query, names = drawings
    for kind, images in ('support', support), ('query', query):
        for number, (image, name) in enumerate(zip(images, names)):
            os.makedirs(tmp_path / kind / name, exist_ok=True)
            Image.fromarray(image[..., 0]).save(tmp_path / kind / name / f'{number}.png')
    output = run_ok(f'--run={OMNIGLOT}', '--predict', f'--support_dir={tmp_path / "support"}', f'--query_dir={tmp_path / "query"}')
    path = output.split('Written: ')[1].split(' and')[0]
    try:
        with open(path, newline='', encoding='utf-8') as file:
            printed = [row[3:] for row in list(csv.reader(file))[1:]]
    finally:
        for suffix in '.csv', '.png':
            os.remove(path[:-4] + suffix)
    predictor = learner.adapt(support, names)
    assert predictor.classes == ['cat', 'dog', 'emu']
    probabilities = predictor(query)
    np.testing.assert_allclose(probabilities, np.array(printed, float), atol=1e-4)
    assert (probabilities.argmax(axis=1) == np.repeat([0, 1, 2], 3)).sum() >= 8  # the patterns are far apart
    np.testing.assert_allclose(predictor(query[4:5]), probabilities[4:5], atol=1e-5)  # a row by itself
    np.testing.assert_allclose(learner.adapt(support / 255, names)(query / 255), probabilities, atol=1e-5)
    np.testing.assert_allclose(learner.adapt(support[..., 0], names)(query[..., 0]), probabilities, atol=1e-6)


@pytest.mark.slow
def test_the_numbers_of_the_model():
    """A regression, with the paper's inner steps."""
    learner = load(SINE)
    batch = SOURCES['sinusoid'].tasks(TaskConfig(num_classes=5, update_batch_size=10, query_shots=10, seed=3), 'test').draw(0, 2)
    outputs = learner.model.predict(batch, 4).post
    for task in range(2):
        for updates in 1, 4:
            predictor = learner.adapt(batch.support_x[task], batch.support_y[task], updates)
            np.testing.assert_allclose(predictor(batch.query_x[task]), outputs[updates - 1][task], rtol=1e-4, atol=1e-5)
        unadapted = learner.adapt(batch.support_x[task], batch.support_y[task], 0)(batch.query_x[task])
        np.testing.assert_allclose(unadapted, learner.model.predict(batch, 0).post[0][task], rtol=1e-4, atol=1e-5)


def test_more_shots_than_in_training_learn_at_the_same_pace(learner, drawings):
    """The loss is divided by the shots that are given: three copies of one example are one example."""
    support, query, names = drawings
    once, thrice = slice(0, 9, 3), np.repeat(np.arange(0, 9, 3), 3)
    np.testing.assert_allclose(learner.adapt(support[thrice], names[thrice])(query), learner.adapt(support[once], names[once])(query),
                               atol=1e-3)


@pytest.mark.slow
def test_a_saved_predictor(learner, drawings, tmp_path):
    support, query, names = drawings
    predictor = learner.adapt(support, names)
    predictor.save(tmp_path / 'three.npz')
    again = load_predictor(tmp_path / 'three.npz')
    assert np.array_equal(again(query), predictor(query)) and again.classes == predictor.classes and again.config == predictor.config
    (tmp_path / 'three.npz').write_bytes((tmp_path / 'three.npz').read_bytes()[:-100])
    np.savez(tmp_path / 'other.npz', x=np.ones(3))
    for name in 'three.npz', 'other.npz', 'missing.npz':
        with pytest.raises(UserError, match=f'{name} cannot be read, or Predictor.save did not write it'):
            load_predictor(tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize('targets', [['--targets=c'], ['--num_classes=3']], ids=['regression', 'classification'])
def test_tables_in_their_own_units(targets, small_data, tmp_path):
    """The same as --predict from csv files."""
    run_ok('--datasource=table', f'--data_path={small_data["table"]}', *targets, '--update_batch_size=3', '--metatrain_iterations=20',
           '--norm=None', '--meta_batch_size=2', '--engine=map', f'--logdir={tmp_path / "run"}')
    run, = (tmp_path / 'run').iterdir()
    rng, regression = np.random.default_rng(0), targets == ['--targets=c']
    support, query = rng.normal(2, 5, (2, 6, 3))
    labels = np.array(['x', 'y'] * 3)
    header = 'a,b,c' if regression else 'a,b,c,class'
    lines = [','.join(map(str, row)) + ('' if regression else f',{label}') for row, label in zip(support, labels)]
    (tmp_path / 'support.csv').write_text('\n'.join([header, *lines]))
    (tmp_path / 'query.csv').write_text('\n'.join(['a,b' if regression else 'a,b,c'] + [
        ','.join(map(str, row[:2] if regression else row)) for row in query]))
    run_ok(f'--run={run}', '--predict', f'--support_csv={tmp_path / "support.csv"}', f'--query_csv={tmp_path / "query.csv"}')
    with open(run / 'predict_support_query.csv', newline='', encoding='utf-8') as file:
        printed = [row[-1 if regression else -2:] for row in list(csv.reader(file))[1:]]
    predictor = load(run).adapt(support[:, :2], support[:, 2]) if regression else load(run).adapt(support, labels)
    np.testing.assert_allclose(predictor(query[:, :2] if regression else query), np.array(printed, float), rtol=1e-4, atol=1e-4)
    predictor.save(tmp_path / 'predictor.npz')
    again = load_predictor(tmp_path / 'predictor.npz')
    assert np.array_equal(again(query[:, :predictor.inputs.dim_input]), predictor(query[:, :predictor.inputs.dim_input]))


@pytest.mark.parametrize('x, y, words', [
    (np.zeros([4, 20, 20, 1], np.uint8), [0, 0, 1, 1], 'and must be numbers of shape [rows, 28, 28, 1]'),
    (np.zeros([4, 28, 28, 1]) + 7, [0, 0, 1, 1], 'floats from 0 to 1'),
    (np.zeros([4, 28, 28, 1], str), [0, 0, 1, 1], 'must be numbers'),
    (np.zeros([4, 28, 28, 1], np.uint8), [0, 0, 1], 'support_x has 4 rows and support_y 3'),
    (np.zeros([0, 28, 28, 1], np.uint8), [], 'at least 1'),
    (np.zeros([4, 28, 28, 1], np.uint8), [0, 0, 0, 0], 'must name 2 to 5 classes'),
    (np.zeros([6, 28, 28, 1], np.uint8), range(6), 'must name 2 to 5 classes'),
    (np.zeros([2, 28, 28, 1], np.uint8), np.eye(2), 'one for each row'),
    (np.full([2, 28, 28, 1], np.nan), [0, 1], 'not finite'),
    (np.zeros([2, 28, 28, 1], np.uint8), 5., 'support_y is one float'),
    (np.zeros([2, 28, 28, 1], np.uint8), [[0], [0, 1]], 'different shapes'),
    (np.zeros([2, 28, 28, 1], np.uint8), [0., np.nan], 'by a number or a text'),
    (np.zeros([2, 28, 28, 1], np.uint8), [None, 'a'], 'by a number or a text'),
    (np.zeros([2, 28, 28, 1], np.uint8), [b'a', b'b'], 'by a number or a text')])
def test_refusals(learner, x, y, words):
    with pytest.raises(UserError) as error:
        learner.adapt(x, y)
    assert words in str(error.value)


@pytest.mark.parametrize('updates', [-1, 2.5, '3'])
def test_numbers_of_updates_that_cannot_be(learner, drawings, updates):
    for function in lambda: load(OMNIGLOT, updates=updates), lambda: learner.adapt(drawings[0], drawings[2], updates=updates):
        with pytest.raises(UserError, match='must be a whole number, 0 or more'):
            function()


def test_nothing_to_predict(drawings):
    for query_norm in 'support', 'batch', 'each':
        predictor = load(OMNIGLOT, query_norm=query_norm).adapt(drawings[0], drawings[2], updates=0)
        assert predictor(drawings[1][:0]).shape == (0, 3)


def test_predictions_of_a_model_that_diverged(drawings):
    learner = load(SINE, updates=1)
    learner.model.weights['w1'].assign(learner.model.weights['w1'] * 1e30)
    with pytest.raises(UserError, match='the adaptation diverged'):
        learner.adapt(np.ones([3, 1]), np.ones(3))(np.ones([2, 1]))


def test_what_cannot_be_loaded(tmp_path):
    for run, more, words in ((tmp_path / 'nothing', {}, 'no such folder'), (SINE, {'checkpoint': 7}, 'model7')):
        with pytest.raises(UserError, match=words):
            load(run, **more)


@pytest.mark.slow
def test_the_page(drawings, tmp_path, monkeypatch):
    """The code of docs/python.md, one block after the other, with arrays under the names that it does not define."""
    page = pathlib.Path(ROOT, 'docs', 'python.md').read_text(encoding='utf-8')
    names = dict(zip(('images', 'others', 'labels'), drawings))
    for block in re.findall(r'```python\n(.*?)```', page, re.S):
        block = block.replace("'logs/omniglot5way'", repr(OMNIGLOT)).replace("'five_characters.npz'", repr(str(tmp_path / 'five.npz')))
        exec(compile(block, 'docs/python.md', 'exec'), names)
    assert names['probabilities'].shape == (9, 3) and names['metrics'].post_losses.shape == (10, 25)


@pytest.mark.parametrize('query_norm', ['batch', 'support', 'each'])
def test_a_predictor_computes_what_the_model_predicts(query_norm):
    """With the step sizes and the normalisation of each inner step."""
    config = ModelConfig(dim_input=4, dim_output=3, dim_hidden=(5,), loss='xent', update_batch_size=2, update_lr=0.1, num_updates=3,
                         learn_lr='step', norm_per_step=True, query_norm=query_norm)
    rng = np.random.default_rng(0)
    model, labels = MAML(config), np.tile(np.eye(3, dtype=np.float32), (2, 1))
    for variable in model.parameters().values():
        variable.assign(variable + rng.normal(0, 0.1, variable.shape))
    support, query = rng.normal(size=(2, 6, 4)).astype(np.float32)
    tensors = adapted_tensors(model, support, labels, 3)
    predictor = Predictor(model.config, [tensors], support, [0, 1, 2], Inputs(4, None, False, None))
    expected = model.predict(TaskBatch(*(array[None] for array in (support, labels, query, labels))), 3).post[-1, 0]
    np.testing.assert_allclose(predictor(query), scipy.special.softmax(expected, axis=-1), rtol=1e-4, atol=1e-6)
