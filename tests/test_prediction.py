"""--predict: somebody's own folders of images, adapted to and classified."""
import csv
import os
import shutil
import types

import numpy as np
import pytest
from PIL import Image

from conftest import error_of, run_ok, write_image_tree

FLAGS = ['--datasource=cifarfs', '--update_batch_size=1', '--num_filters=4', '--meta_batch_size=4', '--update_lr=0.1', '--stop_grad']


@pytest.fixture(scope='module')
def trained(small_data, tmp_path_factory):
    """Flags of a trained 5-way network."""
    flags = [*FLAGS, f'--logdir={tmp_path_factory.mktemp("trained")}']
    run_ok(*flags, f'--data_path={small_data["cifarfs"]}', '--metatrain_iterations=100', '--log=False', '--validation_tasks=10')
    return flags


@pytest.fixture
def folders(tmp_path):
    """Support and query folders of three new classes, in another size than the network's."""
    for name, images in ('all', 5),:
        write_image_tree(tmp_path / name, ['cat', 'dog, big', 'ünï'], images=images, size=(32, 32, 3), seed=5)
    for name in os.listdir(tmp_path / 'all'):
        for kind, numbers in ('support', [0, 1]), ('query', [2, 3, 4]):
            os.makedirs(tmp_path / kind / name)
            for number in numbers:
                image = Image.open(tmp_path / 'all' / name / f'{number:02d}.png')
                image.resize((64, 48), Image.Resampling.NEAREST).save(tmp_path / kind / name / f'{number}.png')
    return tmp_path / 'support', tmp_path / 'query'


def predict(flags, support, query, *more):
    """What is printed, and the rows of the csv file."""
    output = run_ok(*flags, '--predict', f'--support_dir={support}', f'--query_dir={query}', *more)
    path = output.split('Written: ')[1].split(' and')[0]
    with open(path, newline='', encoding='utf-8', errors='surrogateescape') as file:
        rows = list(csv.reader(file))
    with Image.open(path[:-3] + 'png') as picture:
        assert min(picture.size) > 300
    return output, rows


@pytest.mark.slow
def test_prediction(trained, folders):
    output, (header, *rows) = predict(trained, *folders)
    assert header == ['image', 'class', 'predicted', *(f'probability of {name}' for name in ('cat', 'dog, big', 'ünï'))] and len(rows) == 9
    for image, label, answer, *probabilities in rows:
        assert os.path.basename(os.path.dirname(image)) == label and os.path.exists(image)
        probabilities = np.array(probabilities, float)
        assert probabilities.sum() == pytest.approx(1, abs=2e-4) and header[3 + np.argmax(probabilities)] == f'probability of {answer}'
    right = sum(row[1] == row[2] for row in rows)
    assert f'{right} of 9 labelled images classified correctly' in output
    assert right >= 7  # the classes are far apart: chance is 3


def test_a_wrong_prediction_shows_the_true_class(trained, folders):
    """Here images of other classes in the folder of one."""
    support, query = folders
    shutil.rmtree(query / 'cat')
    os.rename(query / 'dog, big', query / 'cat')
    output, (_, *rows) = predict(trained, support, query)
    wrong = [row for row in rows if row[1] == 'cat' != row[2]]
    assert wrong and output.count(', but its class is cat') == len(wrong)
    assert output.count('but its class is') == sum(row[1] != row[2] for row in rows)


def test_images_by_themselves_and_together(trained, folders, tmp_path):
    """If not told otherwise, an answer does not depend on what else is asked."""
    support, query = folders
    _, (_, *together) = predict(trained, support, query)
    (tmp_path / 'one').mkdir()
    shutil.copy(together[4][0], tmp_path / 'one' / 'x.png')
    _, (_, alone) = predict(trained, support, tmp_path / 'one')
    assert alone[1:3] == ['', together[4][2]]
    np.testing.assert_allclose(np.array(alone[3:], float), np.array(together[4][3:], float), atol=2e-4)
    _, (_, *transductive) = predict(trained, support, query, '--query_norm=batch')
    assert [row[3:] for row in transductive] != [row[3:] for row in together]


def test_uneven_folders_without_labels(trained, folders):
    support, query = folders
    os.remove(support / 'cat' / '0.png')
    for name in os.listdir(query):
        for image in os.listdir(query / name):
            os.rename(query / name / image, query / f'{name} {image}')
    (query / 'notes.txt').write_text('not an image')
    output, (_, *rows) = predict(trained, support, query)
    assert len(rows) == 9 and {row[1] for row in rows} == {''} and 'classified correctly' not in output


def test_names_that_are_hard_to_draw(trained, folders):
    """Formulas to matplotlib, bytes that are no text, other scripts."""
    support, query = folders
    os.rename(support / 'cat', support / 'cost $5_$6')
    os.rename(support / 'ünï', support / '日本')
    shutil.move(query / 'cat' / '2.png', query / '$\\foo$.png')
    shutil.move(query / 'cat' / '3.png', os.fsencode(query) + b'/\xff\xfe.png')
    _, rows = predict(trained, support, query)
    assert len(rows) == 10


def test_many_images_at_a_time(trained, folders, monkeypatch):
    from runtime.jobs import learner
    _, once = predict(trained, *folders)
    monkeypatch.setattr(learner, 'ROWS_AT_A_TIME', 4)
    _, parts = predict(trained, *folders)
    np.testing.assert_allclose(np.array([row[3:] for row in parts[1:]], float), np.array([row[3:] for row in once[1:]], float),
                               atol=2e-4)


@pytest.mark.parametrize('query_norm, sizes', [('batch', [7]), ('support', [3, 2, 2]), ('each', [3, 2, 2])])
def test_independent_images_take_bounded_memory(query_norm, sizes, monkeypatch):
    from runtime.jobs import learner
    monkeypatch.setattr(learner, 'ROWS_AT_A_TIME', 3)
    seen = []

    def outputs(predictor, rows, tensors):
        seen.append(len(rows))
        return rows

    monkeypatch.setattr(learner.Predictor, '_outputs', outputs)
    predictor = learner.Predictor(types.SimpleNamespace(query_norm=query_norm), [{}], None, None, learner.Inputs(1, None, False, None))
    assert predictor(np.arange(7.0).reshape(7, 1))[:, 0].tolist() == list(range(7)) and seen == sizes


def test_refusals(trained, folders, tmp_path):
    support, query = folders

    def error(*more, support=support, query=query):
        return error_of(*trained, '--predict', f'--support_dir={support}', f'--query_dir={query}', *more)

    assert '--support_dir=/nowhere is not a folder' in error(support='/nowhere')
    assert '--query_dir=/nowhere is not a folder' in error(query='/nowhere')
    assert 'only this folder and its direct subfolders are searched' in error(query=tmp_path)  # those below are deeper
    assert 'there are 0' in error(support=support / 'cat')
    assert '--query_norm=both is for evaluation' in error('--query_norm=both')
    assert '--predict needs --query_dir' in error_of(*trained, '--predict', f'--support_dir={support}')
    assert 'sinusoid has none' in error_of('--predict', f'--support_dir={support}', f'--query_dir={query}')
    assert 'there is no checkpoint' in error('--test_iter=7')
    for name in 'abc':
        (support / name).mkdir()
    assert 'a has no image' in error()
    for name in 'abc':
        shutil.copy(support / 'cat' / '1.png', support / name)
    message = error()
    assert 'holds 6 classes, and the network has 5 outputs' in message and '--num_classes=6' in message
    (query / 'cat' / '2.png').write_bytes(b'')
    assert '2.png cannot be read as an image' in error()
