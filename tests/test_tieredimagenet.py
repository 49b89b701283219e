"""data/tieredimagenet/proc_images.py on small sources of each of its forms, good and bad."""
import csv
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_hostile_preparation import DTYPE

from conftest import ROOT, module_at, run_process, said_by
from data import pickles
from data_generator import SOURCES

PATH = os.path.join(ROOT, 'data', 'tieredimagenet', 'proc_images.py')
SPLITS = ('train', 'val', 'test')

with open(os.path.join(os.path.dirname(PATH), 'classes.csv'), newline='') as classes_file:
    ROWS = list(csv.DictReader(classes_file))
SOME = {split: [row for row in ROWS if row['split'] == split][:2] for split in SPLITS}


def test_the_list_of_classes():
    for split, classes, images, categories in (
            ('train', 351, 448_695, 20), ('val', 97, 124_261, 6), ('test', 160, 206_209, 8)):
        rows = [row for row in ROWS if row['split'] == split]
        assert (len(rows), sum(int(row['images']) for row in rows), len({row['category'] for row in rows})) == (
            classes, images, categories)
    assert len({row['class'] for row in ROWS}) == len({row['name'] for row in ROWS}) == 608


def pixels(split):
    """Four images of a split, uint8 [4, 84, 84, 3]: of its second class, its first, its second, its first."""
    return np.random.default_rng(SPLITS.index(split)).integers(0, 256, (4, 84, 84, 3), np.uint8)


def png(image, image_format='PNG'):
    content = io.BytesIO()
    Image.fromarray(image).save(content, image_format)
    return content.getvalue()


def python_2(contents):
    """The pickle that Python 2 made of a list of arrays [n, 1] of bytes, by protocol 2."""
    items = b''.join(
        b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01J' + struct.pack('<I', len(content)) + b'K\x01\x86'
        + DTYPE % b'u1' + b'\x89' + (b'U' + bytes([len(content)]) if len(content) < 256 else b'T' + struct.pack('<I', len(content)))
        + content + b'tb' for content in contents)
    return b'\x80\x02](' + items + b'e.'


def labels_of(split, protocol=2, key=str.encode):
    names = [row['name'] for row in SOME[split]]
    return pickle.dumps({key('label_specific'): np.array([1, 0, 1, 0]), key('label_general'): np.zeros(4, int),
                         key('label_specific_str'): names, key('label_general_str'): ['x']}, protocol=protocol)


class Source:
    """A folder with a small tieredImageNet of one of the forms."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def pickled(self, dump=python_2):
        for split in SPLITS:
            (self.folder / f'{split}_images_png.pkl').write_bytes(dump([png(image) for image in pixels(split)]))
            (self.folder / f'{split}_labels.pkl').write_bytes(labels_of(split))

    def npz(self, save=np.savez, channels=slice(None, None, -1)):
        for split in SPLITS:
            save(self.folder / f'{split}_images.npz', images=pixels(split)[..., channels])
            (self.folder / f'{split}_labels.pkl').write_bytes(labels_of(split, 4, str))

    def folders(self, where='{split}/{wnid}', image_format='PNG'):
        for split in SPLITS:
            for number, image in enumerate(pixels(split)):
                folder = self.folder / where.format(split=split, wnid=SOME[split][1 - number % 2]['class'])
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f'{number}.{image_format}').write_bytes(png(image, image_format))


@pytest.fixture
def source(tmp_path):
    return Source(tmp_path / 'source')


@pytest.fixture
def prepare(source, tmp_path):
    """Function that prepares the source in this process; returns what the script said if it refused."""
    def run(*flags):
        return said_by(module_at(PATH).main, '--source', source.folder, '--destination', tmp_path / 'prepared', *flags)
    return run


def check(prepared):
    """That the images are those of `pixels`, in the right classes."""
    for split in SPLITS:
        found = SOURCES['tieredimagenet'].load(split, str(prepared))
        assert found.names == [f'{split}/{row["class"]}' for row in SOME[split]] and found.counts.tolist() == [2, 2]
        np.testing.assert_array_equal(found.values, pixels(split)[[1, 3, 0, 2]])


DUMPS = {'python 2': python_2, **{f'protocol {protocol}': lambda contents, protocol=protocol: pickle.dumps(
    [np.frombuffer(content, np.uint8)[:, None] for content in contents], protocol=protocol) for protocol in (3, 4, 5)},
    'bytes': pickle.dumps}


@pytest.mark.parametrize('dump', DUMPS.values(), ids=DUMPS)
def test_from_pickles(dump, source, prepare, tmp_path, capsys):
    source.pickled(dump)
    assert prepare('--allow_missing') is None
    check(tmp_path / 'prepared')
    printed = capsys.readouterr()
    assert '6 classes / 12 images' in printed.out and '602 of 608 classes are missing' in printed.err
    assert '6 classes have another number of images than they should' in printed.err


@pytest.mark.parametrize('rename', [
    lambda folder: [path.rename(folder / f'tiered-imagenet-{path.name}') for path in list(folder.iterdir())],  # Zenodo's names
    lambda folder: [folder.rename(folder.parent / 'tiered-imagenet'), folder.mkdir(),
                    (folder.parent / 'tiered-imagenet').rename(folder / 'tiered-imagenet')]],  # as Ren's archive unpacks
    ids=['zenodo', 'unpacked'])
def test_pickles_elsewhere(rename, source, prepare, tmp_path):
    source.pickled()
    rename(source.folder)
    assert prepare('--allow_missing') is None
    check(tmp_path / 'prepared')


def test_from_npz_files(source, prepare, tmp_path):
    source.npz()
    assert prepare('--allow_missing') is None
    check(tmp_path / 'prepared')
    for split in SPLITS:
        np.savez(source.folder / f'{split}_images.npz', images=pixels(split))
    assert prepare('--allow_missing', '--channels=rgb') is None  # another recipe: made again
    check(tmp_path / 'prepared')


@pytest.mark.parametrize('where', ['{split}/{wnid}', 'train/{wnid}', '{wnid}'])
def test_from_folders(where, source, prepare, tmp_path):
    source.folders(where)
    (source.folder / 'train' / 'n99999999').mkdir(parents=True)
    assert prepare('--allow_missing') is None
    check(tmp_path / 'prepared')


def test_the_val_of_ilsvrc_is_not_taken(source, prepare, tmp_path):
    """Its folders of classes have a few other pictures of each."""
    source.folders('train/{wnid}')
    for row in SOME['val']:
        folder = source.folder / 'val' / row['class']
        folder.mkdir(parents=True)
        shutil.copy(next((source.folder / 'train' / row['class']).iterdir()), folder)
    assert prepare('--allow_missing') is None
    check(tmp_path / 'prepared')


def test_larger_images_are_resized(source, prepare, tmp_path):
    large = Image.fromarray(pixels('train')[0]).resize((500, 375))
    folder = source.folder / 'train' / SOME['train'][0]['class']
    folder.mkdir(parents=True)
    large.convert('CMYK').save(folder / 'a.JPEG')
    assert prepare('--allow_missing') is None
    found = SOURCES['tieredimagenet'].load('train', str(tmp_path / 'prepared')).values
    assert found.shape == (1, 84, 84, 3) and np.abs(found[0].astype(float) - np.asarray(large.resize((84, 84), 1))).mean() < 20


def put(name, content):
    return lambda source: (source.folder / name).write_bytes(content)


PNGS = [png(image) for image in pixels('train')]


class Hostile:
    def __reduce__(self):
        return os.system, ('touch escaped',)


@pytest.mark.parametrize('change, words', [
    (put('train_images_png.pkl', python_2(PNGS)[:-9000]), 'cannot be read as a pickled list of images (it is damaged or cut off)'),
    (put('train_images_png.pkl', b''), 'cannot be read as a pickled list'),
    (put('train_images_png.pkl', b'<!DOCTYPE html>'), 'cannot be read as a pickled list'),
    (put('train_images_png.pkl', pickle.dumps([Hostile()])), "asks for 'posix.system'"),
    (put('train_images_png.pkl', pickle.dumps({'a': PNGS[0]})), 'it is not a list of images'),
    (put('train_images_png.pkl', pickle.dumps([1, 2, 3, 4])), 'it is not a list of images'),
    (put('train_images_png.pkl', pickle.dumps([np.zeros(50)] * 4)), 'something other than bytes'),
    (put('train_images_png.pkl', b'\x80\x02](T\xff\xff\xff\x7fabce.'), 'cannot be read as a pickled list'),
    (put('train_images_png.pkl', b'\x80\x04](\x8e' + b'\xff' * 8 + b'abce.'), 'cannot be read as a pickled list'),
    (put('train_images_png.pkl', python_2([*PNGS[:3], b'x' * 300])), '1 images cannot be decoded, first image 1 of train/'),
    (put('train_images_png.pkl', python_2([*PNGS[:3], PNGS[3][:500]])), '1 images cannot be decoded, first image 1 of train/'),
    (put('train_images_png.pkl', python_2([*PNGS[:3], png(pixels('train')[0], 'GIF')])), '1 images cannot be decoded'),
    (put('train_images_png.pkl', python_2(PNGS[:3])), 'lists more than 3 integers'),
    (put('train_images_png.pkl', python_2(PNGS * 2)), 'do not fit its 8 images and 2 names'),
    (put('val_labels.pkl', b''), 'val_labels.pkl cannot be read as a pickle'),
    (put('val_labels.pkl', pickle.dumps({'label_specific': [0, 0, 0, 2], 'label_specific_str': ['a', 'b']})), 'do not fit its 4 images'),
    (put('val_labels.pkl', pickle.dumps({'label_specific': [0, 0, 0, -1], 'label_specific_str': ['a', 'b']})), 'do not fit its 4 images'),
    (put('val_labels.pkl', pickle.dumps({'label_specific': 'abcd', 'label_specific_str': ['a']})),
     'cannot be used (it is not a list of int'),
    (put('val_labels.pkl', pickle.dumps({'label_specific': [0] * 4})), 'cannot be used (it is not a list of names)'),
    (put('val_labels.pkl', pickle.dumps({'label_specific': [0] * 4, 'label_specific_str': ['../a']})), "names a class '../a'"),
    (put('val_labels.pkl', pickle.dumps({'label_specific': [0] * 4, 'label_specific_str': ['stranger']})),
     '1 classes are not known, first val/stranger'),
    (lambda source: (source.folder / 'val_labels.pkl').unlink(), 'val_labels.pkl cannot be read'),
    (lambda source: [path.unlink() for path in source.folder.iterdir()], 'holds neither train_images_png.pkl nor')])
def test_corrupted_pickles(change, words, source, prepare, tmp_path):
    source.pickled()
    change(source)
    said = prepare()
    assert said and words in said, said
    assert not os.path.exists('escaped') and not list(tmp_path.rglob('*.part'))


@pytest.mark.parametrize('save, words', [
    (np.savez_compressed, 'it is compressed; write it again by numpy.savez'),
    (lambda path, images: np.savez(path, pictures=images), 'cannot be used ("There is no item named'),
    (lambda path, images: np.savez(path, images=images.astype(float)), 'holds float64 [4, 84, 84, 3] instead of bytes'),
    (lambda path, images: np.savez(path, images=images[:, 1:]), 'holds uint8 [4, 83, 84, 3] instead of bytes'),
    (lambda path, images: np.savez(path, images=np.array([None])), 'it holds objects'),
    (lambda path, images: path.write_bytes(b'<html>'), 'cannot be used'),
    (lambda path, images: np.savez(path, images=images[:3]), 'lists more than 3 integers')])
def test_corrupted_npz_files(save, words, source, prepare, tmp_path):
    source.npz()
    save(source.folder / 'train_images.npz', images=pixels('train'))
    said = prepare()
    assert said and words in said and not (tmp_path / 'prepared').exists(), said


def test_an_npz_file_that_is_cut_off(source, prepare):
    source.npz()
    path = source.folder / 'train_images.npz'
    path.write_bytes(path.read_bytes()[:-1000])
    assert 'train_images.npz cannot be used' in prepare()


def test_folders_with_what_is_no_image(source, prepare):
    source.folders()
    folder = source.folder / 'train' / SOME['train'][0]['class']
    (folder / 'a.jpg').write_bytes(b'text')
    (folder / 'b.txt').write_bytes(b'text')
    os.mkfifo(folder / 'c.jpg')
    assert '2 images cannot be decoded, first image 2 of train/' in prepare()


def test_spans_need_no_memory(tmp_path):
    """Of a list of 200 megabytes, little more than places is kept."""
    with open(tmp_path / 'large.pkl', 'wb') as file:
        pickle.dump([bytes(2 ** 20)] + [bytes(2 ** 20 + number) for number in range(200)], file)
    program = (f'import sys; sys.path.insert(0, {ROOT!r})\nimport re\nfrom data import pickles\nbefore = open("/proc/self/status").read()\n'
               f'print(len(pickles.spans(open({str(tmp_path / "large.pkl")!r}, "rb"))))\n'
               'peak = lambda text: int(re.search(r"VmHWM:\\s+(\\d+)", text)[1])\n'
               'print((peak(open("/proc/self/status").read()) - peak(before)) // 1024)')
    process = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    count, megabytes = map(int, process.stdout.split())
    assert count == 201 and megabytes < 20


def test_the_script_says_where_to_get_it(tmp_path):
    (tmp_path / 'tiered_imagenet.tar').write_bytes(b'no tar file')
    process = run_process('--download', '--source', tmp_path, script=PATH)
    assert process.returncode == 1 and 'tiered-imagenet.tar must be downloaded by hand' in process.stdout, process.stderr
    assert 'its md5 is e07e811b' in process.stdout
    assert 'tiered_imagenet.tar does not match the recorded checksum' in process.stdout
    assert 'holds neither train_images_png.pkl nor train_images.npz nor folders' in process.stderr


def test_a_pickle_that_never_ends_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, 'MOST_IMAGES', 10)
    (tmp_path / 'a.pkl').write_bytes(b']' * 1000)
    with open(tmp_path / 'a.pkl', 'rb') as file, pytest.raises(pickles.Refused, match='more than 500 instructions'):
        pickles.spans(file)
