"""The preparation scripts on small downloads, good and bad: one clear sentence, and no damage, for each bad one."""
import argparse
import csv
import errno
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, run_process, run_script
from data import archives, preparation
from data_generator import SOURCES
from runtime.system.errors import UserError

SPLITS = ('train', 'val', 'test')


def script(source, *arguments):
    """Runs a preparation script in this process."""
    return run_script(f'data/{source}/proc_images.py', *arguments)


def script_process(source, *arguments):
    return run_process(*arguments, script=f'data/{source}/proc_images.py')


def refusal(source, *arguments, run=script):
    """What a script says that must refuse, with exit status 1 and no traceback."""
    process = run(source, *arguments)
    assert process.returncode == 1 and 'Traceback' not in process.stderr, process.stderr
    return process.stderr


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*')
            if path.is_file() and not path.name.startswith('.')}


def read_classes(source):
    with open(os.path.join(ROOT, 'data', source, 'classes.csv'), newline='') as file:
        return list(csv.DictReader(file))


def picture(seed, size=(84, 84), image_format='JPEG'):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(content, image_format)
    return content.getvalue()


# The lists of classes

@pytest.mark.parametrize('source, counts', [('miniImagenet', [64, 16, 20]), ('cifarfs', [64, 16, 20]), ('fc100', [60, 20, 20])])
def test_class_lists(source, counts):
    rows = read_classes(source)
    assert [sum(row['split'] == split for row in rows) for split in SPLITS] == counts
    assert len({row['class'] for row in rows}) == 100


def test_superclasses_of_fc100_are_disjoint():
    superclasses = [{row['superclass'] for row in read_classes('fc100') if row['split'] == split} for split in SPLITS]
    assert [len(names) for names in superclasses] == [12, 4, 4] and len(set.union(*superclasses)) == 20


def test_cifarfs_and_fc100_split_the_same_classes():
    assert {row['class'] for row in read_classes('cifarfs')} == {row['class'] for row in read_classes('fc100')}


# MiniImagenet

WNIDS = {split: [row['class'] for row in read_classes('miniImagenet') if row['split'] == split][:2] for split in SPLITS}
ROWS = [(split, f'{wnid}{number:08d}.jpg', wnid) for split in SPLITS for wnid in WNIDS[split] for number in (5, 7)]


class Download:
    """A download of MiniImagenet to be corrupted: images and csv rows, written as a zip file or as a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.images = {f'images/{name}': picture(number) for number, (_, name, _) in enumerate(ROWS)}
        self.rows = {split: [(name, wnid) for other, name, wnid in ROWS if other == split] for split in SPLITS}
        self.header, self.line_end = 'filename,label', '\n'

    def write(self, archive=True, lists=True):
        self.folder.mkdir(exist_ok=True)
        if archive:
            with zipfile.ZipFile(self.folder / 'images.zip', 'w') as file:
                for name, content in self.images.items():
                    file.writestr(name, content)
        else:
            for name, content in self.images.items():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_bytes(content)
        for split, rows in self.rows.items() if lists else ():
            lines = [self.header] + [','.join(row) for row in rows]
            (self.folder / f'{split}.csv').write_bytes(''.join(line + self.line_end for line in lines).encode())
        return self.folder


@pytest.fixture
def download(tmp_path):
    return Download(tmp_path / 'source')


@pytest.fixture
def mini(download, tmp_path):
    """Function that writes the download, prepares it, checks that the source is as before; returns process and tree."""
    def run(*flags, **how):
        source = download.write(**how)
        before = tree(source)
        process = script('miniImagenet', '--source', source, '--destination', tmp_path / 'prepared', *flags)
        assert tree(source) == before and 'Traceback' not in process.stderr
        prepared = tree(tmp_path / 'prepared') if (tmp_path / 'prepared').exists() else {}
        assert not any(name.endswith('.part') for name in prepared)
        return process, prepared
    return run


EXPECTED = sorted(f'{split}/{wnid}/{name}' for split, name, wnid in ROWS)


@pytest.mark.parametrize('archive', [True, False])
@pytest.mark.parametrize('lists', [True, False])
def test_miniimagenet(mini, download, archive, lists):
    """From an archive or a folder, by csv files or by names; 84x84 images are copied byte for byte."""
    process, prepared = mini('--allow_missing', archive=archive, lists=lists)
    assert process.returncode == 0 and sorted(prepared) == EXPECTED
    assert {name.rsplit('/', 1)[1]: content for name, content in prepared.items()} == {
        name.removeprefix('images/'): content for name, content in download.images.items()}
    assert '94 of 100 classes are missing, first test/' in process.stderr
    assert '6 classes / 12 images' in process.stdout and process.stdout.count('84x84') == 3
    assert ('train.csv is not there' in process.stdout) == (not lists)


def test_miniimagenet_by_folders(mini, download):
    """Same file names in every class folder; other folders are ignored."""
    download.images = {f'images/{wnid}/{number}.jpg': picture(number + index) for index, (_, _, wnid) in enumerate(ROWS)
                       for number in (1, 2)} | {'images/n99999999/1.jpg': picture(0), 'images/readme.txt': b'text'}
    _, prepared = mini('--allow_missing', lists=False)
    assert sorted(prepared) == sorted({f'{split}/{wnid}/{number}.jpg' for split, _, wnid in ROWS for number in (1, 2)})
    for split, _, wnid in ROWS:
        assert prepared[f'{split}/{wnid}/1.jpg'] == download.images[f'images/{wnid}/1.jpg']


def test_miniimagenet_by_folders_of_splits(download, tmp_path):
    """As it is found elsewhere: prepared from there; left alone where the program's own folders would be."""
    for split, name, wnid in ROWS:
        path = tmp_path / 'found' / split / wnid / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(0, (100, 90)))
    before = tree(tmp_path / 'found')
    said = refusal('miniImagenet', '--source', tmp_path / 'found', '--destination', tmp_path / 'found')
    assert 'if their images are originals, move them to another folder, and name it with --source' in said
    with pytest.raises(UserError, match='they are not prepared: move them elsewhere and run python .* --source=THAT_FOLDER'):
        SOURCES['miniimagenet'].load('train', str(tmp_path / 'found'))
    process = script('miniImagenet', '--source', tmp_path / 'found', '--destination', tmp_path / 'prepared', '--allow_missing')
    assert process.returncode == 0 and sorted(tree(tmp_path / 'prepared')) == EXPECTED, process.stderr
    assert tree(tmp_path / 'found') == before and 'not prepared' not in process.stderr
    assert len(SOURCES['miniimagenet'].load('train', str(tmp_path / 'prepared')).names) == len({
        wnid for split, _, wnid in ROWS if split == 'train'})


def test_the_csv_files_decide_over_names(mini, download):
    download.rows = {split: [(f'{wnid}/1.jpg' if split == 'train' else '1.jpg', wnid) for wnid in WNIDS[split]]
                     for split in SPLITS}
    download.images = {f'images/{wnid}/1.jpg': picture(index) for index, wnid in enumerate(sum(WNIDS.values(), []))}
    _, prepared = mini('--allow_missing')
    assert prepared == {f'{split}/{wnid}/1.jpg': download.images[f'images/{wnid}/1.jpg']
                        for split in SPLITS for wnid in WNIDS[split]}


def test_no_image_serves_two_classes(mini, download):
    """Neither one in the folder of another class, which is missing in its own, nor one of a flat folder that two lists name."""
    (train, other), test = WNIDS['train'], WNIDS['test'][0]
    download.rows = {'train': [('1.jpg', train), ('2.jpg', other)], 'val': [('3.jpg', WNIDS['val'][0])], 'test': [('1.jpg', test)]}
    download.images = {f'images/{test}/1.jpg': picture(1), f'images/{other}/2.jpg': picture(2), 'images/any/3.jpg': picture(3)}
    process, prepared = mini('--allow_missing')
    assert (f'train/{train}/1.jpg' not in prepared and f'test/{test}/1.jpg' in prepared
            and '1 images are missing, first 1.jpg' in process.stderr)
    download.images = {'images/1.jpg': picture(1), 'images/2.jpg': picture(2), 'images/3.jpg': picture(3)}
    process, _ = mini('--allow_missing', archive=False)
    assert process.returncode == 1 and 'name 1.jpg as an image of the class' in process.stderr.replace('images/', ''), process.stderr


def test_a_class_without_images_is_no_class(mini, download, tmp_path):
    """Its only picture is damaged: the program can use the others. And a link to nothing among the class folders."""
    broken = WNIDS['train'][0]
    for _, name, wnid in ROWS:
        if wnid == broken:
            download.images[f'images/{name}'] = b'no picture'
    process, _ = mini('--allow_missing')
    assert process.returncode == 0 and not (tmp_path / 'prepared' / 'train' / broken).exists()
    assert SOURCES['miniimagenet'].load('train', str(tmp_path / 'prepared')).names == [f'train/{WNIDS["train"][1]}']
    os.symlink('/nowhere', tmp_path / 'prepared' / 'train' / 'old')
    process, _ = mini('--allow_missing')
    assert process.returncode == 1 and 'train/old is a broken symbolic link' in process.stderr


def test_larger_images_are_resized(mini, download):
    download.images['images/' + ROWS[0][1]] = picture(3, size=(120, 200))
    _, prepared = mini('--allow_missing')
    with Image.open(io.BytesIO(prepared[EXPECTED[4]])) as image, Image.open(
            io.BytesIO(download.images['images/' + ROWS[0][1]])) as original:
        assert EXPECTED[4].endswith(ROWS[0][1])
        small = original.resize((84, 84), Image.Resampling.LANCZOS)
        assert (image.format, image.size) == ('JPEG', (84, 84))
        assert np.abs(np.asarray(image, float) - np.asarray(small, float)).mean() < 20


def test_line_ends_marks_spaces_and_unicode(mini, download):
    """CRLF, a byte order mark, and awkward names of images."""
    name, awkward = ROWS[0][1], 'Ünï cødé (1).jpg'
    download.images[f'images/{awkward}'] = download.images.pop(f'images/{name}')
    download.rows['train'] = [(awkward if row == name else row, wnid) for row, wnid in download.rows['train']]
    download.line_end, download.header = '\r\n', '\ufefffilename,label'
    process, prepared = mini('--allow_missing')
    assert process.returncode == 0 and f'train/{ROWS[0][2]}/{awkward}' in prepared and len(prepared) == len(ROWS)


def test_each_missing_pickle_is_named(tmp_path):
    (tmp_path / 'mini-imagenet-cache-validation.pkl').write_bytes(b'')
    said = refusal('miniImagenet', '--source', tmp_path)
    assert f'{tmp_path} lacks mini-imagenet-cache-train.pkl, mini-imagenet-cache-test.pkl: put all three there' in said


def test_from_the_cached_pickles(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 84, 84, 3), np.uint8)
    for split, protocol, key in zip(SPLITS, (2, 4, 5), (str, str.encode, str)):
        data = {'image_data': images, 'class_dict': {key(wnid): [2 * number, 2 * number + 1]
                                                     for number, wnid in enumerate(WNIDS[split])}}
        (tmp_path / f'mini-imagenet-cache-{split}.pkl').write_bytes(pickle.dumps(data, protocol=protocol))
    process = script('miniImagenet', '--source', tmp_path, '--destination', tmp_path / 'prepared', '--allow_missing')
    prepared = tree(tmp_path / 'prepared')
    assert process.returncode == 0 and len(prepared) == 12
    wnid = WNIDS['val'][1]
    with Image.open(io.BytesIO(prepared[f'val/{wnid}/{wnid}00000001.png'])) as image:
        np.testing.assert_array_equal(np.asarray(image), images[3])


def corrupt(**changes):
    return lambda download: download.__dict__.update(changes)


def corrupt_row(row):
    return lambda download: download.rows['train'].append(row)


def corrupt_image(content):
    return lambda download: download.images.update({'images/' + ROWS[0][1]: content})


@pytest.mark.parametrize('corrupt, words', [
    (corrupt(header='name,label'), ['line 2 of', 'train.csv has no filename']),
    (corrupt(header='filename'), ['train.csv cannot be read', 'line 2 has 2 cells']),
    (corrupt_row(('', 'n01532829')), ['line 6 of', 'train.csv has no filename']),
    (corrupt(rows={**dict.fromkeys(SPLITS, [('a.jpg', 'a')]), 'val': []}), ['val.csv names no images']),
    (corrupt_row((ROWS[0][1], '../../escaped')), ['line 6 of', "'../../escaped'"]),
    (corrupt_row((ROWS[0][1], '/escaped')), ['line 6 of', "'/escaped'"]),
    (corrupt_row((ROWS[0][1], 'c:\\escaped')), ['line 6 of', 'escaped']),
    (corrupt_row(('../../escaped.jpg', WNIDS['train'][0])), ['line 6 of', "'../../escaped.jpg'"]),
    (corrupt_row((ROWS[0][1] + '\0', WNIDS['train'][0])), ['line 6 of']),
    (corrupt_row((ROWS[0][1], ROWS[0][2])), [ROWS[0][1], 'listed twice']),
    (corrupt_row((ROWS[8][1], ROWS[8][2])), [ROWS[8][1], 'listed twice, in train.csv and test.csv']),
    (corrupt_row(('other.jpg', WNIDS['test'][0])), ['is in train.csv and in test.csv']),
    (corrupt_row(('other.jpg', WNIDS['train'][0])), ['1 images are missing, first other.jpg']),
    (corrupt_row((ROWS[0][1], 'n99999999')), ['1 classes are not known, first train/n99999999']),
    (corrupt(images={'images/other.jpg': picture(0)}), ['none of the 12 images']),
    (corrupt(images={'images/readme.txt': b'text'}), ['there are no images in']),
    (corrupt_image(b'a text'), ['1 images cannot be decoded, first', ROWS[0][1]]),
    (corrupt_image(b''), ['1 images cannot be decoded, first', ROWS[0][1]]),
    (corrupt_image(picture(0)[:2000]), ['1 images cannot be decoded, first', ROWS[0][1]]),
    (corrupt_image(picture(0, image_format='PNG')[:-100]), ['1 images cannot be decoded, first', ROWS[0][1]]),
])
def test_corrupted_downloads(corrupt, words, mini, download, tmp_path):
    corrupt(download)
    process, prepared = mini()
    assert process.returncode == 1 and all(word in process.stderr for word in words), process.stderr
    assert not [path for path in tmp_path.rglob('*escaped*')]
    # Whatever was written is whole.
    assert all(content in download.images.values() for content in prepared.values())


def test_a_count_that_is_wrong_is_named(mini, download):
    process, _ = mini(lists=False)
    assert process.returncode == 1
    assert '6 classes have another number of images than they should, first test/' in process.stderr
    assert 'with 2 instead of 600' in process.stderr and '--allow_missing' in process.stderr


@pytest.mark.parametrize('damage', [lambda content: content[:len(content) // 2], lambda content: b'', lambda content: b'text'])
def test_damaged_archives(download, tmp_path, damage):
    archive = download.write() / 'images.zip'
    archive.write_bytes(damage(archive.read_bytes()))
    error = refusal('miniImagenet', '--source', download.folder, '--destination', tmp_path / 'prepared')
    assert f'{archive} is damaged' in error and 'download it again' in error


def test_a_member_with_wrong_content_is_named(download, tmp_path):
    """A flipped byte within an archive, which its checksum tells."""
    archive = download.write() / 'images.zip'
    content = bytearray(archive.read_bytes())
    content[300] ^= 1
    archive.write_bytes(content)
    assert '1 images cannot be decoded, first' in refusal(
        'miniImagenet', '--source', download.folder, '--destination', tmp_path / 'prepared')


def test_sources_that_are_not_there(tmp_path):
    assert 'holds neither images.zip nor a folder images' in refusal('miniImagenet', '--source', tmp_path, run=script_process)
    assert 'holds neither cifar-100-python.tar.gz nor' in refusal('cifarfs', '--source', tmp_path / 'nowhere', run=script_process)


def test_destinations_that_cannot_be(download, tmp_path):
    source = download.write(archive=False)
    (tmp_path / 'file').touch()
    for place in tmp_path / 'file', tmp_path / 'file' / 'below', '/proc/prepared':
        assert f'writing to {place} failed' in refusal('miniImagenet', '--source', source, '--destination', place)
    before = tree(source)
    assert 'lies within the originals' in refusal('miniImagenet', '--source', source, '--destination', source / 'images')
    assert tree(source) == before


def test_class_folders_of_another_preparation_are_noticed(mini, tmp_path):
    (tmp_path / 'prepared' / 'train' / 'stranger').mkdir(parents=True)
    process, _ = mini()
    assert 'holds 1 further class folders, first train/stranger; remove them' in process.stderr


def test_images_of_another_preparation_are_noticed(mini, tmp_path):
    mini('--allow_missing')
    (tmp_path / 'prepared' / EXPECTED[0]).with_suffix('.png').write_bytes(picture(0, image_format='PNG'))
    process, _ = mini()
    assert f'holds 1 further files in its class folders, first {EXPECTED[0][:-4]}.png; remove them' in process.stderr


def test_the_program_is_told_whether_all_is_there(mini, tmp_path):
    for flags, complete in ([], False), (['--allow_missing'], True):
        mini(*flags)
        assert json.loads((tmp_path / 'prepared' / '.prepared.json').read_text())['complete'] == complete


# CIFAR-100 and its two splits

CIFAR_CLASSES = sorted(row['class'] for row in read_classes('cifarfs'))


def cifar_parts(per_class=2):
    """The three pickles' contents: each image a random one, named by its class and number."""
    rng, parts = np.random.default_rng(0), {}
    for part, start in ('train', 0), ('test', per_class):
        labels = np.repeat(np.arange(100), per_class)
        names = [f'{CIFAR_CLASSES[label]}_s_{start + number % per_class:06d}.png' for number, label in enumerate(labels)]
        order = rng.permutation(len(labels))
        parts[part] = {b'data': rng.integers(0, 256, (len(labels), 3072), np.uint8)[order],
                       b'fine_labels': [int(label) for label in labels[order]],
                       b'filenames': [names[index].encode() for index in order]}
    parts['meta'] = {b'fine_label_names': [name.encode() for name in CIFAR_CLASSES]}
    return parts


def write_cifar(folder, parts, archive=True):
    folder.mkdir(exist_ok=True)
    contents = {name: part if isinstance(part, bytes) else pickle.dumps(part, protocol=2) for name, part in parts.items()}
    if archive:
        with tarfile.open(folder / 'cifar-100-python.tar.gz', 'w:gz') as file:
            for name, content in contents.items():
                member = tarfile.TarInfo(name if '/' in name else f'cifar-100-python/{name}')
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    else:
        (folder / 'cifar-100-python').mkdir()
        for name, content in contents.items():
            (folder / 'cifar-100-python' / name).write_bytes(content)
    return folder


@pytest.mark.parametrize('archive', [True, False])
@pytest.mark.parametrize('source, counts', [('cifarfs', (64, 16, 20)), ('fc100', (60, 20, 20))])
def test_cifar(source, counts, archive, tmp_path):
    parts = cifar_parts()
    folder = write_cifar(tmp_path / 'cifar100', parts, archive)
    run = script if archive else script_process
    process = run(source, '--source', folder, '--destination', tmp_path / 'prepared', '--allow_missing')
    assert process.returncode == 0, process.stderr
    prepared = tree(tmp_path / 'prepared')
    assert [sum(name.startswith(split + '/') for name in prepared) for split in SPLITS] == [4 * count for count in counts]
    assert '100 classes / 400 images' in process.stdout and '100 classes have another number' in process.stderr
    split_of = {row['class']: row['split'] for row in read_classes(source)}
    for part in 'train', 'test':
        for pixels, label, name in list(zip(*parts[part].values()))[:5]:
            path = f'{split_of[CIFAR_CLASSES[label]]}/{CIFAR_CLASSES[label]}/{name.decode()}'
            with Image.open(io.BytesIO(prepared[path])) as image:
                np.testing.assert_array_equal(np.asarray(image), pixels.reshape(3, 32, 32).transpose(1, 2, 0))


class Hostile:
    """Pickled, it asks the reader to run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('change, words', [
    (lambda parts, _: [parts.pop('meta'), parts.pop('test')], ['has no file test, meta']),
    (lambda parts, _: parts.update(train=pickle.dumps(parts['train'])[:-5000]), ['train in', 'cannot be read as a pickle']),
    (lambda parts, _: parts.update(train=b''), ['cannot be read as a pickle']),
    (lambda parts, _: parts.update(train=pickle.dumps([1, 2])), ['holds a list instead of a dict']),
    (lambda parts, path: parts.update(test=pickle.dumps({'data': Hostile(path / 'escaped')})), ['posix.system']),
    (lambda parts, _: parts.update(test=pickle.dumps({'data': np.array([len], object)})), ['builtins.len']),
    (lambda parts, _: parts['train'].pop(b'filenames'), ['has no entry filenames']),
    (lambda parts, _: parts['train'].update({b'data': parts['train'][b'data'][:, :100]}), ['shape [200, 100]']),
    (lambda parts, _: parts['train'].update({b'data': parts['train'][b'data'][:-1]}), ['do not fit its 199 images']),
    (lambda parts, _: parts['train'][b'fine_labels'].append(7), ['do not fit its 200 images']),
    (lambda parts, _: parts['train'][b'fine_labels'].__setitem__(0, 100), ['do not fit']),
    (lambda parts, _: parts['train'][b'filenames'].__setitem__(0, b'../../escaped.png'), ["'../../escaped.png'"]),
    (lambda parts, _: parts['meta'][b'fine_label_names'].__setitem__(0, b'../escaped'), ['cannot be the name of a file']),
    (lambda parts, _: parts['meta'][b'fine_label_names'].__setitem__(0, b'stranger'),
     ['1 classes are not known, first unknown/stranger', '1 of 100 classes are missing']),
])
def test_corrupted_cifar(change, words, tmp_path):
    parts = cifar_parts()
    change(parts, tmp_path)
    folder = write_cifar(tmp_path / 'cifar100', parts)
    error = refusal('cifarfs', '--source', folder, '--destination', tmp_path / 'prepared')
    assert all(word in error for word in words), error
    assert not list(tmp_path.rglob('*escaped*')) and not list(tmp_path.rglob('*.part'))


def test_members_that_would_escape_are_not_unpacked(tmp_path):
    parts = cifar_parts() | {'../../escaped': b'x', '/escaped': b'x'}
    folder = write_cifar(tmp_path / 'cifar100', parts)
    process = script('cifarfs', '--source', folder, '--destination', tmp_path / 'prepared', '--allow_missing')
    assert process.returncode == 0 and not list(tmp_path.rglob('*escaped*')) and not os.path.exists('/escaped')


@pytest.mark.parametrize('end', [0, 100, -1000])
def test_damaged_tar_files(tmp_path, end):
    archive = write_cifar(tmp_path / 'cifar100', cifar_parts()) / 'cifar-100-python.tar.gz'
    archive.write_bytes(archive.read_bytes()[:end])
    assert f'{archive} is damaged' in refusal('cifarfs', '--source', archive.parent, '--destination', tmp_path / 'prepared')


def test_members_that_are_too_large_are_not_read(tmp_path):
    folder = write_cifar(tmp_path / 'cifar100', {'train': b'0' * 2 ** 21})
    with pytest.raises(SystemExit, match='train in .* would unpack to 2 MB'):
        archives.read_tar_members(folder / 'cifar-100-python.tar.gz', ['train'], limit=2 ** 20)


# Interruptions

def many_parts(tmp_path):
    """Enough images to be interrupted in the middle."""
    return write_cifar(tmp_path / 'cifar100', cifar_parts(per_class=25))


@pytest.mark.slow
@pytest.mark.parametrize('kill, status', [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_run_that_was_interrupted_goes_on(kill, status, tmp_path):
    command = [sys.executable, os.path.join(ROOT, 'data/fc100/proc_images.py'), '--source', str(many_parts(tmp_path)),
               '--destination', str(tmp_path / 'prepared'), '--allow_missing']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored in the background
    while process.poll() is None and not any((tmp_path / 'prepared').rglob('*.png')):
        time.sleep(0.005)
    process.send_signal(kill)
    error = process.communicate()[1]
    assert (process.returncode, 'Traceback' in error) == (status, False), error
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / 'prepared').rglob('*.png')}
    assert 0 < len(done) < 5000
    for path in done:
        with Image.open(path) as image:
            image.load()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert sum(1 for _ in (tmp_path / 'prepared').rglob('*.png')) == 5000
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())


def test_a_full_disk(tmp_path, monkeypatch):
    """The disk fills up in the middle: one sentence, nothing half-written, and what is done stays done; in the folder of the script, which
    is the default destination."""
    (tmp_path / 'proc_images.py').touch()
    args = preparation.arguments('', '', str(tmp_path)).parse_args([])
    content, room = picture(0), 20 * len(picture(0))
    pictures = [preparation.Picture(f'train/a/{number}.jpg', lambda: content) for number in range(50)]
    classes = {'train/a': preparation.Class('train', 50)}
    replace, written = os.replace, []

    def full(source, destination):
        if sum(written) + os.path.getsize(source) > room:
            raise OSError(errno.ENOSPC, 'No space left on device')
        written.append(os.path.getsize(source))
        replace(source, destination)

    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(SystemExit, match='No space left on device.*run the same command to resume'):
        preparation.prepare(pictures, classes, (84, 84), args)
    monkeypatch.undo()
    files = tree(tmp_path / 'train')
    assert 0 < len(files) < 50 and set(files.values()) == {content}
    done = {name: (tmp_path / 'train' / name).stat().st_mtime_ns for name in files}
    preparation.prepare(pictures, classes, (84, 84), args)
    assert len(tree(tmp_path / 'train')) == 50
    assert {name: (tmp_path / 'train' / name).stat().st_mtime_ns for name in files} == done


def test_force_makes_everything_again(mini, tmp_path):
    _, prepared = mini('--allow_missing')
    path = tmp_path / 'prepared' / EXPECTED[0]
    path.write_bytes(b'other')
    mini('--allow_missing')
    assert path.read_bytes() == b'other'
    assert mini('--allow_missing', '--force')[1] == prepared
    path.write_bytes(b'of unknown origin')
    (tmp_path / 'prepared' / '.prepared.json').unlink()
    assert mini('--allow_missing')[1] == prepared


def test_what_is_gone_is_not_prepared(tmp_path):
    args = argparse.Namespace(destination=str(tmp_path), force=False, allow_missing=False)

    def write(destination, again):
        for name in 'train', 'val':
            os.makedirs(os.path.join(destination, name), exist_ok=True)
        return []

    archive = tmp_path / 'archive.zip'
    archive.touch()
    preparation.run_preparation(args, 'recipe', [], write, ['train', 'val'])
    archive.unlink()
    assert preparation.is_prepared(args, 'recipe', {}), 'the download is not needed any more'
    record = json.loads((tmp_path / '.prepared.json').read_text())
    del record['content']  # as in version 2.0.0
    (tmp_path / '.prepared.json').write_text(json.dumps(record))
    assert preparation.is_prepared(args, 'recipe', {})
    preparation.run_preparation(args, 'recipe', [], write, ['train', 'val'])
    (tmp_path / 'val').rmdir()
    assert not preparation.is_prepared(args, 'recipe', {})
    (tmp_path / 'train').rmdir()
    assert not preparation.is_prepared(args, 'recipe', {})


def test_a_closed_pipe_is_no_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation.console, 'protect', lambda: None)
    monkeypatch.setattr(preparation.console.os, 'dup2', lambda *_: None)

    def main():
        with preparation.locked_folder(str(tmp_path), 'busy', '--destination'):
            raise BrokenPipeError

    with pytest.raises(SystemExit) as end:
        preparation.run_script(main)
    assert end.value.code == 141


@pytest.mark.parametrize('source', ['miniImagenet', 'cifarfs', 'fc100'])
def test_help(source):
    text = script_process(source, '--help').stdout
    assert all(option in text for option in ('--source', '--destination', '--allow_missing', '--force', 'train,val,test'))
