"""data/omniglot_resized/resize_images.py on small archives."""
import os
import zipfile
from functools import partial

import numpy as np
import pytest
from PIL import Image

from conftest import run_process, run_script
from data_generator import SOURCES

SCRIPT = 'data/omniglot_resized/resize_images.py'
DRAWINGS = {'images_background': ['Latin/character01/0001_01.png', 'Latin/character02/0002_20.png'],
            'images_evaluation': ['Mayan_(old)/character01/1000_01.png']}


def run(*arguments):
    return run_script(SCRIPT, *arguments)


@pytest.fixture(params=['archives', 'folders'])
def source(request, tmp_path):
    """The originals as people have them: 1-bit, 105x105, some clutter beside them."""
    rng, root = np.random.default_rng(0), tmp_path / 'source'
    root.mkdir()
    for part, names in DRAWINGS.items():
        for name in names:
            path = root / part / name
            path.parent.mkdir(parents=True)
            Image.fromarray(rng.random((105, 105)) < 0.8).save(path)
        (root / part / '.DS_Store').write_bytes(b'clutter')
        if request.param == 'archives':
            with zipfile.ZipFile(root / f'{part}.zip', 'w') as archive:
                for folder, _, files in os.walk(root / part):
                    for file in files:
                        path = os.path.join(folder, file)
                        archive.write(path, os.path.relpath(path, root))
                        os.remove(path)
                archive.writestr(f'__MACOSX/{part}/Latin/character01/._0001_01.png', b'clutter')
                archive.writestr('../../character01/0666_01.png', b'an attempt to escape')
            for folder, _, _ in os.walk(root / part, topdown=False):
                os.rmdir(folder)
    return root


def originals(source):
    """{drawing: image}, read independently of the script."""
    found = {}
    for part, names in DRAWINGS.items():
        for name in names:
            if (source / part).is_dir():
                found[name] = Image.open(source / part / name).copy()
            else:
                with zipfile.ZipFile(source / f'{part}.zip') as archive, archive.open(f'{part}/{name}') as file:
                    found[name] = Image.open(file).copy()
    return found


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*')
            if path.is_file() and path.name != '.prepared.json'}


def test_images(source, tmp_path):
    """Nearest neighbour, 1 bit, whatever Pillow's filter is called; with --antialias grey."""
    before, destination = tree(source), tmp_path / 'small'
    process = run('--source', source, '--destination', destination)
    written = tree(destination)
    assert sorted(written) == sorted(name for names in DRAWINGS.values() for name in names)
    for name, original in originals(source).items():
        image = Image.open(destination / name)
        assert (image.mode, image.size) == ('1', (28, 28))
        centres = ((np.arange(28) + 0.5) * 105 / 28).astype(int)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(original)[np.ix_(centres, centres)])
    assert tree(source) == before
    # It is not the whole of Omniglot, and says so.
    assert '2 alphabets / 3 characters / 3 images' in process.stdout
    assert process.returncode == 1 and 'Traceback' not in process.stderr
    assert '1621 of 1623 classes are missing, first Alphabet_of_the_Magi/character01' in process.stderr
    assert '1 classes are not known, first Mayan_(old)/character01' in process.stderr
    assert '2 classes have another number of images than they should, first Latin/character01 with 1 instead of 20' in (
        process.stderr)

    run('--source', source, '--destination', destination)
    assert tree(destination) == written
    run('--source', source, '--destination', destination, '--antialias')
    image = Image.open(destination / 'Latin/character01/0001_01.png')
    assert image.mode == 'L' and len(np.unique(image)) > 50


def test_what_is_there_can_be_used(source, tmp_path):
    """With --allow_missing a manifest of the characters there are is written, and taken back by a run without."""
    arguments = ['--source', source, '--destination', tmp_path / 'small']
    assert run(*arguments, '--allow_missing').returncode == 0
    manifest = tmp_path / 'small' / 'splits.partial.csv'
    names = SOURCES['omniglot'].folders(str(tmp_path / 'small')).names('train')
    assert names == ['Latin/character01', 'Latin/character02'] and manifest.exists()
    assert run(*arguments).returncode == 1 and not manifest.exists()


def test_one_of_the_two_archives(source, tmp_path):
    """Enough with --allow_missing; none at all is not."""
    for name in 'images_evaluation', 'images_background':
        for path in source / name, source / f'{name}.zip':
            if path.exists():
                path.rename(path.with_name(f'{path.name}.away'))
        process = run('--source', source, '--destination', tmp_path / 'small', '--allow_missing')
        assert (process.returncode, 'Traceback' in process.stderr) == (name == 'images_background', False)
        assert run('--source', source, '--destination', tmp_path / 'other').returncode == 1
    assert SOURCES['omniglot'].folders(str(tmp_path / 'small')).names('train') == ['Latin/character01', 'Latin/character02']


def test_a_damaged_drawing_is_named_and_the_others_are_made(source, tmp_path):
    if not (source / 'images_background').is_dir():
        pytest.skip('folders only')
    (source / 'images_background' / 'Latin/character02/0002_20.png').write_bytes(b'not an image')
    process = run('--source', source, '--destination', tmp_path / 'small')
    assert process.returncode == 1 and 'Traceback' not in process.stderr
    assert '1 images cannot be decoded, first Latin/character02/0002_20.png' in process.stderr
    assert sorted(tree(tmp_path / 'small')) == ['Latin/character01/0001_01.png', 'Mayan_(old)/character01/1000_01.png']


def refusal(*arguments, run=run):
    process = run(*arguments)
    assert process.returncode == 1 and 'Traceback' not in process.stderr
    return process.stderr


def test_sources_that_are_not_there_or_damaged(source, tmp_path):
    assert 'holds neither images_background.zip nor' in refusal('--source', tmp_path / 'nowhere', run=partial(run_process, script=SCRIPT))
    archive = source / 'images_background.zip'
    if archive.exists():
        content = archive.read_bytes()
        archive.write_bytes(content[:len(content) // 2])
        assert f'{archive} is damaged' in refusal('--source', source, '--destination', tmp_path / 'small')


def test_destinations_that_cannot_be(source, tmp_path):
    (tmp_path / 'file').touch()
    assert 'failed' in refusal('--source', source, '--destination', tmp_path / 'file' / 'small')
    if (source / 'images_background').is_dir():
        before = tree(source)
        assert 'lies within' in refusal('--source', source, '--destination', source / 'images_background')
        assert tree(source) == before
