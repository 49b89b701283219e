"""Bad input of every kind, much of it generated: one clear sentence and exit status 1, and nothing damaged; never a traceback."""
import dataclasses
import io
import os
import string
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import main
from conftest import ROOT, error_of, module_at, run_main, said_by, write_image_tree
from data import cifar100, reading
from data_generator import SOURCES
from runtime.cli import request, rules
from runtime.cli.flags import FLAGS
from runtime.datasets import class_folders, images, splits
from runtime.system.errors import UserError

EACH = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def corrupted(content, count, seed=0):
    """Copies of a file's content: cut off at `count` lengths, and with bytes changed at as many places."""
    rng = np.random.default_rng(seed)
    for length in np.linspace(0, len(content) - 1, count, dtype=int):
        yield content[:length]
    for _ in range(count):
        changed = bytearray(content)
        for at in rng.integers(len(content), size=4):
            changed[at] ^= int(rng.integers(1, 256))
        yield bytes(changed)


# Flags

def sentence(*arguments):
    """What main.py says of these flags before it looks at data, or None where it takes them."""
    try:
        line = main.parse(['main.py', *arguments])
        assert not line.rest
        rules.check_flags(request.resolve(line))
    except (UserError, flags.Error) as error:
        assert str(error) and '\n' not in str(error).strip(), error
        return str(error)
    return None


NAMES = sorted(FLAGS.flags_by_module_dict()[main.__name__], key=lambda flag: flag.name)
NUMBERS = [flag.name for flag in NAMES if flag.flag_type() in ('int', 'float')]
CHOICES = [flag.name for flag in NAMES if flag.flag_type() in ('bool', 'string enum')]
BAD = [(name, value) for name in NUMBERS for value in ('', 'x', '-7', '1e999', 'nan', '--', '1,000', '10**9')]
BAD += [(name, value) for name in CHOICES for value in ('', 'x', 'Tru', '0.5')]


def test_there_are_many():
    assert len(BAD) > 150 and {'seed', 'update_lr'} <= set(NUMBERS) and {'datasource', 'train', 'norm'} <= set(CHOICES)


@pytest.mark.parametrize('name', NUMBERS + CHOICES)
def test_values_that_are_none(name):
    for other, value in BAD:
        if other == name:
            said = sentence(f'--{name}={value}')
            assert said and name in said, (name, value, said)


@EACH
@given(st.sampled_from([flag.name for flag in NAMES]), st.text(st.characters(blacklist_characters='\0\n\r')))
def test_any_text_as_a_value(name, value):
    """Is taken or refused."""
    sentence(f'--{name}={value}')


@EACH
@given(st.text(string.ascii_lowercase + '_-', min_size=1, max_size=12))
def test_any_flag(name):
    if not name.startswith('-') and name not in FLAGS and name.removeprefix('no') not in FLAGS:
        assert sentence(f'--{name}=1')


@pytest.mark.slow
def test_numbers_without_measure(tmp_path):
    """Too large for any machine."""
    names = [f'{split}/class{number}' for split in ('train', 'val') for number in range(5)]
    write_image_tree(tmp_path, names, 16, (32, 32, 3))
    flags = '--datasource=cifarfs', '--update_batch_size=1', f'--data_path={tmp_path}', '--num_filters=2000000000'
    with pytest.raises(MemoryError, match='OOM'):
        run_main(*flags, f'--logdir={tmp_path}/logs')
    assert '--meta_batch_size=99999999999' in error_of('--meta_batch_size=99999999999')


# Manifests and names

ROWS_OF_MANIFESTS = st.tuples(
    st.sampled_from(['train', 'val', 'test', 'x']),
    st.lists(st.sampled_from(['..', '.', '', 'a', 'b c', 'd']), min_size=1, max_size=4).map('/'.join)).map(','.join)


@EACH
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: ('split,class\n' + text).encode(errors='replace'))
       | st.lists(ROWS_OF_MANIFESTS, max_size=3).map(lambda rows: '\n'.join(['split,class', *rows]).encode()))
def test_any_manifest(tmp_path, content):
    path = tmp_path / 'splits.csv'
    path.write_bytes(content)
    try:
        names = splits.names_of(splits.read_manifest(str(path)))
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert all('..' not in name.split('/') and name for name in names)


@EACH
@given(st.text(max_size=30), st.sampled_from(['train', 'val', 'test']))
def test_no_manifest_names_a_folder_elsewhere(tmp_path, name, split):
    """What a manifest lists lies below the data, whatever it is called."""
    path = tmp_path / 'splits.csv'
    splits.write_manifest(str(path), [(split, name.replace('\0', ''))]) if name.isprintable() else path.write_text('x')
    try:
        names = splits.read_manifest(str(path))[split]
    except UserError:
        return
    for found in names:
        assert os.path.commonpath([tmp_path, os.path.normpath(os.path.join(tmp_path, found))]) == str(tmp_path)


FOLDER_NAMES = st.text(st.characters(blacklist_characters='/\0', blacklist_categories=['Cs']), min_size=1, max_size=20)


@EACH
@given(st.lists(FOLDER_NAMES.filter(lambda name: name not in ('.', '..')), min_size=3, max_size=20, unique=True))
def test_class_folders_of_any_name_come_back(tmp_path, names):
    path = str(tmp_path / 'splits.csv')
    classes = splits.split_classes(names, (64, 16, 20), 'here')
    splits.write_manifest(path, [(split, name) for split, members in classes.items() for name in members])
    assert splits.read_manifest(path) == classes


@EACH
@given(st.text(max_size=40))
def test_plain_names_stay_where_they_are_put(name):
    if reading.is_plain_name(name):
        assert os.path.dirname(os.path.normpath(os.path.join('/data/train', name))) == '/data/train'


# Images

def png(size=(20, 20)):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(content, 'PNG')
    return content.getvalue()


def bomb(width, height):
    """A PNG file of some bytes that claims to be an image of any size."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'\0' * 100)) + chunk(b'IEND', b'')


def formats():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    for image_format in 'PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WEBP', 'PPM', 'ICO', 'DDS', 'BLP', 'SGI', 'TGA', 'PCX':
        content = io.BytesIO()
        (image.quantize() if image_format == 'BLP' else image).save(content, image_format)
        yield image_format, content.getvalue()


@pytest.mark.parametrize('image_format, content', formats())
def test_corrupted_images(image_format, content, tmp_path):
    """Named in the error, or decoded to what the program wants."""
    path = tmp_path / f'image.{image_format.lower()}'
    refused = 0
    for damaged in corrupted(content, 15):
        path.write_bytes(damaged)
        try:
            array, = images.decode_images([str(path)], (20, 20, 3), True, 'remove it', '')
            assert array.shape == (1, 20, 20, 3)
        except UserError as error:
            assert str(path) in str(error) and 'remove it' in str(error)
            refused += 1
    assert refused >= 5


@pytest.mark.parametrize('size', [(10_000, 10_000), (50_000, 50_000), (2 ** 31 - 1, 2 ** 31 - 1)])
def test_decompression_bombs(size, tmp_path):
    path = tmp_path / 'image.png'
    path.write_bytes(bomb(*size))
    with pytest.raises(UserError, match='image.png cannot be read as an image'):
        list(images.decode_images([str(path)], (20, 20, 3), True, 'remove it', ''))


# Caches

def test_corrupted_caches(tmp_path):
    """Made again, whatever they hold."""
    write_image_tree(tmp_path, [f'class{number}' for number in range(4)], images=3, size=(20, 20, 3))
    source = dataclasses.replace(SOURCES['folder'], image_shape=(20, 20, 3))
    wanted = np.array(source.load('train', str(tmp_path)).values)
    cache, = (tmp_path / '.cache').glob('train*.npy')
    for path in cache, cache.with_suffix('.json'):
        content = path.read_bytes()
        headers = [content[:10] + header + b' ' * (len(content) - 10 - len(header)) for header in (
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (4", b"{'descr': '|u1", b"{1: 2, 'a': 3}\n",
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,)}\n" % 2 ** 70)]
        for damaged in [*corrupted(content, 15), *headers, b'[]', b'null', b'{"fingerprint": 3}', b'\x93NUMPY' + b'\xff' * 200,
                        b'PK\x03\x04' + content, b'[' * 100_000]:
            path.write_bytes(damaged)
            np.testing.assert_array_equal(source.load('train', str(tmp_path)).values, wanted)


# Downloads

def load_script(path):
    return module_at(os.path.join(ROOT, 'data', path))


MINI = load_script('miniImagenet/proc_images.py')


def archives():
    content = io.BytesIO()
    with zipfile.ZipFile(content, 'w', zipfile.ZIP_DEFLATED) as file:
        for number in range(4):
            file.writestr(f'images/n0153282900000{number}.jpg', png((84, 84)))
    yield MINI.main, 'images.zip', content.getvalue()
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode='w:gz') as file:
        for name in 'train', 'test', 'meta':
            member = tarfile.TarInfo(f'cifar-100-python/{name}')
            member.size = 3000
            file.addfile(member, io.BytesIO(os.urandom(3000)))
    yield (lambda: cifar100.main('', os.path.join(ROOT, 'data', 'cifarfs'))), 'cifar-100-python.tar.gz', content.getvalue()


@pytest.mark.parametrize('script, name, content', archives())
def test_corrupted_archives(script, name, content, tmp_path, capsys):
    for damaged in [content, *corrupted(content, 15)]:
        (tmp_path / name).write_bytes(damaged)
        assert said_by(script, '--source', tmp_path, '--destination', tmp_path / 'prepared')
    assert {path.name for path in tmp_path.iterdir()} <= {name, 'prepared'}
    assert all(path.suffix in ('.jpg', '.json') for path in (tmp_path / 'prepared').rglob('*') if path.is_file())


@EACH
@given(st.lists(st.tuples(st.text(max_size=15), st.text(max_size=15)), max_size=4), st.booleans())
def test_any_csv_row(tmp_path, rows, header):
    path = tmp_path / 'train.csv'
    text = '\n'.join(['filename,label'] * header + [','.join(row) for row in rows])
    path.write_bytes(text.encode(errors='replace'))
    try:
        found = list(MINI.read_rows(str(path)))
    except SystemExit as error:
        assert str(path) in error.code
    else:
        assert all(reading.is_plain_name(label) for _, label in found)


@EACH
@given(st.binary(max_size=300))
def test_any_pickle(content):
    try:
        assert isinstance(reading.load_pickle(content, 'it'), dict)
    except SystemExit as error:
        assert str(error.code).startswith('it ')


def test_any_record_of_a_preparation(tmp_path):
    for content in b'[' * 100_000, b'', b'[]', b'{}', b'null', b'{"complete": 1', b'\xff\xfe', b'{"complete": false}':
        (tmp_path / class_folders.PREPARATION_RECORD).write_bytes(content)
        (tmp_path / 'train').mkdir(exist_ok=True)
        error = error_of('--datasource=cifarfs', f'--data_path={tmp_path}', f'--logdir={tmp_path}/logs')
        assert 'was interrupted or found something missing; run it again: python data/cifarfs' in error


def test_nothing_is_damaged(tmp_path):
    """A refusal leaves the user's folder as it was."""
    write_image_tree(tmp_path / 'data', [f'class{number}' for number in range(13)], images=3, size=(20, 20, 3))
    (tmp_path / 'data' / 'class2' / '01.png').write_bytes(b'no image')
    before = tree(tmp_path / 'data')
    for flag, words in (('--num_classes=12', 'asks for more classes than the'), ('--split=1/11/1', 'asks for more classes than the 1 '),
                        ('--update_batch_size=40', 'needs 80 images of a class'), ('--update_batch_size=1', 'cannot be read as an image')):
        assert words in error_of('--datasource=folder', f'--data_path={tmp_path}/data', f'--logdir={tmp_path}/logs', '--num_classes=2',
                                 flag)
        after = tree(tmp_path / 'data')
        assert {name: after[name] for name in before} == before
        assert {name.split('/')[0] for name in after.keys() - before.keys()} <= {'splits.csv', '.cache'}
