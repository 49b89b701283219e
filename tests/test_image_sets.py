"""data/image_sets.py on small archives of the real layouts, good and bad: CUB, Flowers, Aircraft, DTD, GTSRB."""
import contextlib
import csv
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import scipy.io
from PIL import Image

from conftest import ROOT, run_process, run_script, said_by
from data import archives, image_sets, mat_files, preparation, reading
from data_generator import SOURCES
from runtime.datasets.class_folders import preparation_record

SPLIT_COUNTS = {('cub', 'chen'): (100, 50, 50), ('cub', 'frn'): (100, 50, 50), ('cub', 'feat'): (100, 50, 50),
                ('cub', 'metadataset'): (140, 30, 30), ('cub', 'dn4'): (130, 20, 50), ('flowers', 'split'): (71, 15, 16),
                ('aircraft', 'metadataset'): (70, 15, 15), ('aircraft', 'frn'): (50, 25, 25), ('dtd', 'split'): (33, 7, 7),
                ('gtsrb', 'split'): (0, 0, 43)}
IMAGES = {'cub': 11_788, 'flowers': 8_189, 'aircraft': 10_000, 'dtd': 5_640, 'gtsrb': 39_209}


def rows_of(source):
    with open(os.path.join(ROOT, 'data', source, 'classes.csv'), newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize('source, split', SPLIT_COUNTS)
def test_class_lists(source, split):
    rows = rows_of(source)
    assert tuple(sum(row[split] == name for row in rows) for name in ('train', 'val', 'test')) == SPLIT_COUNTS[source, split]
    assert sum(int(row['images']) for row in rows) == IMAGES[source]
    assert len({row['class'] for row in rows}) == len(rows) and all(reading.is_plain_name(row['class']) for row in rows)


def test_two_splits_of_cub_swap_their_roles():
    """frn's training classes are exactly those that chen validates and tests on."""
    assert all((row['frn'] == 'train') == (row['chen'] != 'train') for row in rows_of('cub'))


def picture(seed, size=(100, 90), image_format='JPEG'):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)).save(content, image_format)
    return content.getvalue()


def labels_of(numbers):
    content = io.BytesIO()
    scipy.io.savemat(content, {'labels': np.array([numbers], np.uint8)}, do_compression=True)
    return content.getvalue()


BIRDS = ['001.Black_footed_Albatross', '002.Laysan_Albatross', '004.Groove_billed_Ani']


def cub():
    names = [f'{bird}/{bird[4:]}_{number:04d}_{number}.jpg' for bird in BIRDS for number in (1, 2)]
    files = {f'CUB_200_2011/images/{name}': picture(number) for number, name in enumerate(names)}
    files['CUB_200_2011/images.txt'] = ''.join(f'{number} {name}\n' for number, name in enumerate(names, 1)).encode()
    files['CUB_200_2011/bounding_boxes.txt'] = ''.join(f'{number} 10.0 20.0 42.0 63.0\n' for number in range(1, 7)).encode()
    return files | {'attributes.txt': b'1 has_bill_shape', 'CUB_200_2011/README': b'text'}


def flowers():
    return {f'jpg/image_{number:05d}.jpg': picture(number) for number in range(1, 7)}


def aircraft():
    files = {f'fgvc-aircraft-2013b/data/images/{number:07d}.jpg': picture(number) for number in range(6)}
    folder, variants = 'fgvc-aircraft-2013b/data/', ['707-320', 'F-16A/B', 'DHC-8-300', '707-320', 'F-16A/B', 'DHC-8-300']
    lines = [f'{number:07d} {variant}\n' for number, variant in enumerate(variants)]
    files[folder + 'images_variant_trainval.txt'] = ''.join(lines[:4]).encode()
    files[folder + 'images_variant_test.txt'] = ''.join(lines[4:]).encode()
    files[folder + 'images_box.txt'] = ''.join(f'{number:07d} 11 21 52 83\n' for number in range(6)).encode()
    return files


def dtd():
    return {f'dtd/images/{name}/{name}_{number:04d}.jpg': picture(number) for name in ('banded', 'blotchy', 'polka-dotted')
            for number in (1, 2)} | {'dtd/images/banded/.directory': b'[Dolphin]', 'dtd/labels/train1.txt': b'banded/banded_0001.jpg'}


def gtsrb():
    return {f'GTSRB/Final_Training/Images/{label:05d}/{track:05d}_00000.ppm': picture(track, (40, 45), 'PPM') for label in (0, 1, 42)
            for track in (0, 1)} | {'GTSRB/Final_Training/Images/00000/GT-00000.csv': b'Filename;Width'}


MAKE = {'cub': cub, 'flowers': flowers, 'aircraft': aircraft, 'dtd': dtd, 'gtsrb': gtsrb}
FOLDERS = {'cub': BIRDS, 'flowers': ['001', '002', '102'], 'aircraft': ['707-320', 'DHC-8-300', 'F-16A_B'],
           'dtd': ['banded', 'blotchy', 'polka-dotted'], 'gtsrb': ['00000', '00001', '00042']}


def write(source, folder, files, unpacked=False):
    """Writes a download: the archive of a set, or what it unpacks to."""
    folder.mkdir(exist_ok=True)
    if source == 'flowers':
        (folder / 'imagelabels.mat').write_bytes(labels_of([1, 2, 102, 1, 2, 102]))
    path = folder / image_sets.SETS[source].archive
    if unpacked:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    elif path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w') as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, 'w:gz') as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture
def prepare(tmp_path):
    """Function that prepares a set in this process; returns what the script said if it refused, and the files that there are."""
    def run(source, folder, *flags):
        said = said_by(lambda: image_sets.main('', os.path.join(ROOT, 'data', source)),
                       '--source', folder, '--destination', tmp_path / 'prepared', *flags)
        classes = tmp_path / 'prepared' / 'classes'
        return said, {path.relative_to(classes).as_posix(): path.read_bytes() for path in classes.rglob('*') if path.is_file()}
    return run


@pytest.mark.parametrize('unpacked', [False, True])
@pytest.mark.parametrize('source', MAKE)
def test_from_archive_to_tasks(source, unpacked, tmp_path, prepare, capsys):
    said, files = prepare(source, write(source, tmp_path / 'source', MAKE[source](), unpacked), '--allow_missing')
    assert said is None and sorted({name.split('/')[0] for name in files}) == FOLDERS[source] and len(files) == 6
    printed = capsys.readouterr()
    assert f'of {len(rows_of(source))} classes are missing' in printed.err and '3 classes / 6 images' in printed.out
    side = image_sets.SETS[source].size
    for content in files.values():
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == (side, side) and image.format == ('PNG' if source == 'gtsrb' else 'JPEG')
    split = 'test' if source == 'gtsrb' else 'train'
    key = 'split' if 'split' in rows_of(source)[0] else list(rows_of(source)[0])[2]
    wanted = [f'classes/{row["class"]}' for row in rows_of(source) if row[key] == split and row['class'] in FOLDERS[source]]
    loaded = SOURCES[source].load(split, str(tmp_path / 'prepared'))
    assert loaded.names == sorted(wanted) and loaded.values.shape == (2 * len(wanted), side, side, 3)


def pixels(content, size=(84, 84), box=None):
    with Image.open(io.BytesIO(content)) as image:
        image = image.crop(box) if box else image
        return np.asarray(image.convert('RGB').resize(size, Image.Resampling.LANCZOS), float)


@pytest.mark.parametrize('source, flags, box', [
    ('aircraft', [], (10, 20, 52, 83)), ('aircraft', ['--no-crop'], None), ('cub', ['--crop'], (10, 20, 52, 83)), ('cub', [], None)])
def test_crops(source, flags, box, tmp_path, prepare):
    files = MAKE[source]()
    _, prepared = prepare(source, write(source, tmp_path / 'source', files), '--allow_missing', *flags)
    original = next(content for name, content in files.items() if name.endswith('.jpg'))
    found = prepared['707-320/0000000.jpg' if source == 'aircraft' else f'{BIRDS[0]}/{BIRDS[0][4:]}_0001_1.jpg']
    assert np.abs(pixels(found) - pixels(original, box=box)).mean() < 25 < np.abs(
        pixels(found) - pixels(original, box=None if box else (10, 20, 52, 83))).mean()
    facts = preparation_record(tmp_path / 'prepared')['facts']
    assert facts == {'split': 'chen' if source == 'cub' else 'metadataset', 'crop': box is not None}


def test_another_split_moves_no_picture(tmp_path, prepare, capsys):
    source, folder = write('cub', tmp_path / 'source', cub()), tmp_path / 'prepared'
    _, before = prepare('cub', source, '--allow_missing')
    times = {path: path.stat().st_mtime_ns for path in folder.rglob('*.jpg')}
    assert SOURCES['cub'].folders(str(folder)).names('train') == [f'classes/{BIRDS[0]}']
    _, after = prepare('cub', source, '--allow_missing', '--split=frn')
    assert after == before and times == {path: path.stat().st_mtime_ns for path in folder.rglob('*.jpg')}
    assert SOURCES['cub'].folders(str(folder)).names('train') == [f'classes/{BIRDS[1]}', f'classes/{BIRDS[2]}']
    assert 'split frn, crop False' in capsys.readouterr().out
    assert json.loads((folder / '.prepared.json').read_text()) == {
        'recipe': 'crop=False', 'source': preparation.identity([source / 'CUB_200_2011.tgz']), 'complete': True, 'missing': True,
        'content': ['classes'], 'facts': {'split': 'frn', 'crop': False}}


def test_pictures_of_that_size_are_copied_and_digits_of_colour_kept(tmp_path, prepare):
    small = picture(0, (84, 84))
    _, prepared = prepare('dtd', write('dtd', tmp_path / 'source', dtd() | {'dtd/images/banded/banded_0001.jpg': small}), '--allow_missing')
    assert prepared['banded/banded_0001.jpg'] == small
    sign = picture(0, (32, 32), 'PPM')
    (tmp_path / 'other').mkdir()
    _, prepared = prepare('gtsrb', write('gtsrb', tmp_path / 'other', {'GTSRB/Final_Training/Images/00000/00000_00000.ppm': sign}),
                          '--allow_missing')
    np.testing.assert_array_equal(pixels(prepared['00000/00000_00000.png'], (32, 32)), pixels(sign, (32, 32)))


def without(name):
    return lambda files: files.pop(name)


def with_file(name, content):
    return lambda files: files.update({name: content})


BOXES, LABELS = 'CUB_200_2011/bounding_boxes.txt', 'fgvc-aircraft-2013b/data/images_variant_test.txt'


@pytest.mark.parametrize('source, change, words', [
    ('cub', without('CUB_200_2011/images.txt'), 'holds images.txt 0 times instead of once'),
    ('cub', with_file('other/images.txt', b''), 'holds images.txt 2 times'),
    ('cub', with_file(BOXES, b'1\n'), "has a line '1' where there should be two parts"),
    ('cub', with_file(BOXES, b'1 a b c d\n'), "has a box 'a b c d' instead of four numbers"),
    ('cub', with_file(BOXES, b'1 2 3 4\n'), "has a box '2 3 4' instead of four numbers"),
    ('cub', with_file(BOXES, b'\xff\xfe'), 'bounding_boxes.txt in the download cannot be read'),
    ('cub', with_file(BOXES, b'1 500.0 500.0 10.0 10.0\n2 0 0 9 9\n3 0 0 9 9\n4 nan 0 9 9\n5 1e999 0 9 9\n'),
     '4 images cannot be decoded, first classes/001.Black_footed_Albatross/Black_footed_Albatross_0001_1.jpg (its box holds no pixel)'),
    ('aircraft', without(LABELS), 'holds data/images_variant_test.txt 0 times'),
    ('aircraft', with_file(LABELS, b'0000004 ../../escaped\n'), "names a class '.._.._escaped', which cannot be the name of a folder"),
    ('aircraft', with_file(LABELS, b'0000004 \x07bell\n'), 'which cannot be the name of a folder'),
    ('aircraft', with_file(LABELS, b''), '1 classes are not known, first classes/unknown'),
    ('dtd', with_file('dtd/images/banded/banded_0001.jpg', b'text'), '1 images cannot be decoded, first classes/banded/banded_0001.jpg'),
    ('dtd', with_file('dtd/images/banded/banded_0001.jpg', picture(0)[:900]), '1 images cannot be decoded'),
    ('dtd', with_file('dtd/images/banded/banded_0001.jpg', picture(0, image_format='GIF')), '1 images cannot be decoded'),
    ('dtd', with_file('dtd/images/stranger/a.jpg', picture(0)), '1 classes are not known, first classes/stranger'),
    ('dtd', with_file('other/images/banded/banded_0001.jpg', picture(0)), '1 file names stand for more than one image'),
    ('dtd', lambda files: files.clear(), 'there are no pictures like those of dtd-r1.0.1.tar.gz'),
    ('gtsrb', with_file('GTSRB/Final_Training/Images/00000/00000_00000.ppm', b'P6 9 9 255 '), '1 images cannot be decoded'),
    ('gtsrb', with_file('GTSRB/Final_Training/Images/00000/00000_00000.ppm', picture(0)), '1 images cannot be decoded')])
def test_corrupted_downloads(source, change, words, tmp_path, prepare):
    files = MAKE[source]()
    change(files)
    flags = ['--crop'] if source == 'cub' else []
    said, _ = prepare(source, write(source, tmp_path / 'source', files), *flags)
    assert said and words in said
    assert not list(tmp_path.rglob('*escaped*')) and not list(tmp_path.rglob('*.part'))


def test_counts_that_differ_are_named(tmp_path, prepare):
    said, _ = prepare('dtd', write('dtd', tmp_path / 'source', dtd()))
    assert '44 of 47 classes are missing, first classes/braided' in said
    assert '3 classes have another number of images than they should, first classes/banded with 2 instead of 120' in said


@pytest.mark.parametrize('source', MAKE)
def test_members_that_would_escape_stay_where_they_are(source, tmp_path, prepare):
    suffix = 'ppm' if source == 'gtsrb' else 'jpg'
    hostile = {f'../../images/../escaped.{suffix}': picture(0), f'/escaped.{suffix}': picture(0), f'images/../../escaped/a.{suffix}': b'',
               f'dtd/images/..\\escaped/a.{suffix}': b'', 'CUB_200_2011/images/001.x\\..\\escaped/a.jpg': b''}
    said, files = prepare(source, write(source, tmp_path / 'source', MAKE[source]() | hostile), '--allow_missing')
    assert said is None and len(files) == 6 and not list(tmp_path.rglob('*escaped*')) and not os.path.exists(f'/escaped.{suffix}')


@pytest.mark.parametrize('source', MAKE)
def test_damaged_archives(source, tmp_path, prepare):
    path = write(source, tmp_path / 'source', MAKE[source]()) / image_sets.SETS[source].archive
    whole = path.read_bytes()
    for content in b'', b'<!DOCTYPE html>', whole[:len(whole) // 2], whole[:-5000] if len(whole) > 9000 else whole[:-30]:
        path.write_bytes(content)
        said, files = prepare(source, path.parent, '--allow_missing')
        assert f'{path} is damaged' in said and 'download it again' in said and not files, said


def test_links_in_a_tar_file_are_not_followed(tmp_path, prepare):
    folder = write('dtd', tmp_path / 'source', dtd())
    secret = tmp_path / 'secret.jpg'
    secret.write_bytes(picture(0))
    with tarfile.open(folder / 'dtd-r1.0.1.tar.gz', 'w:gz') as archive:
        for kind in tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE:
            member = tarfile.TarInfo(f'dtd/images/banded/{kind.decode()}.jpg')
            member.type, member.linkname = kind, str(secret)
            archive.addfile(member)
    assert 'there are no pictures like those' in prepare('dtd', folder)[0]


@pytest.mark.parametrize('content', [b'', b'<!DOCTYPE html>', labels_of([])[:-40], labels_of([1, 2]), bytes(2 ** 17), None])
def test_labels_of_flowers_that_cannot_be(content, tmp_path, prepare):
    path = write('flowers', tmp_path / 'source', flowers()) / 'imagelabels.mat'
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    said, _ = prepare('flowers', path.parent)
    assert 'imagelabels.mat cannot be read' in said or 'first classes/unknown' in said, said


@pytest.mark.parametrize('dtype', ['u1', 'i2', 'f8'])
@pytest.mark.parametrize('compressed', [True, False])
@pytest.mark.parametrize('count', [1, 3, 9])
def test_arrays_of_matlab_files(dtype, compressed, count):
    """As scipy writes them: small elements, names of other lengths, other arrays before."""
    content = io.BytesIO()
    array = np.arange(count, dtype=dtype)
    scipy.io.savemat(content, {'a': np.ones(5), 'labels': array, 'a_long_name': array + 1}, do_compression=compressed)
    for name, expected in ('labels', array), ('a_long_name', array + 1):
        np.testing.assert_array_equal(mat_files.read_array(content.getvalue(), name), expected)
    with pytest.raises(ValueError, match='no array'):
        mat_files.read_array(content.getvalue(), 'label')


def test_damaged_matlab_files():
    """Every byte replaced by others: an array, or an error of Python."""
    rng, content = np.random.default_rng(0), labels_of([1, 2, 3])
    for position in range(120, len(content)):
        for value in rng.integers(0, 256, 20):
            damaged = bytearray(content)
            damaged[position] = value
            with contextlib.suppress(ValueError, struct.error, zlib.error):
                assert mat_files.read_array(bytes(damaged), 'labels').size <= 2 ** 20
            with contextlib.suppress(ValueError, struct.error, zlib.error):
                mat_files.read_array(bytes(damaged[:position]), 'labels')


@pytest.mark.parametrize('source', MAKE)
def test_the_scripts(source, tmp_path):
    path = f'data/{source}/proc_images.py'
    process = run_script(path, '--source', tmp_path)
    assert process.returncode == 1 and f'{tmp_path} holds neither {image_sets.SETS[source].archive} nor a folder' in process.stderr
    text = run_process('--help', script=path).stdout
    assert ('--split' in text) == (source in ('cub', 'aircraft')) == ('--crop' in text) and '--download' in text


# Tar

@pytest.fixture
def tar(tmp_path):
    contents = {f'{number:03d}.jpg': bytes([number]) * 1000 for number in range(100)}
    with tarfile.open(tmp_path / 'a.tar', 'w') as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return archives.Tar(tmp_path / 'a.tar'), contents


def test_members_in_any_order(tar, monkeypatch):
    monkeypatch.setattr(archives, 'STASH_BYTES', 5000)
    archive, contents = tar
    assert archive.names() == list(contents)
    for name in [*archive.names(), *np.random.default_rng(0).permutation(archive.names()), '050.jpg', '050.jpg', '049.jpg']:
        assert archive.read(name) == contents[name]
        assert sum(map(len, archive._stash.values())) <= 5000


def test_members_that_are_too_large(tar, monkeypatch):
    monkeypatch.setattr(archives, 'LARGEST_PICTURE', 999)
    with pytest.raises(ValueError, match='unpack to more than'):
        tar[0].read('003.jpg')
