"""What was checked is what is read: archives with a file twice, archives beside unpacked folders, and another source."""
import contextlib
import hashlib
import io
import os
import struct
import tarfile
import threading
import tracemalloc
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image
from test_image_sets import MAKE, picture, write
from test_preparation import cifar_parts, write_cifar

from conftest import ROOT, said_by
from data import archives, cifar100, image_sets, mnist, preparation
from data.omniglot_resized import resize_images
from data_generator import SOURCES
from runtime.datasets import images as decoding

DRAWINGS = {'images_background': 'Latin/character01/0001_01.png', 'images_evaluation': 'Mayan_(old)/character01/1000_01.png'}


def run(main, source, destination, *flags):
    """Runs a preparation in this process; returns what it said if it refused, and {path: content} of the pictures."""
    said = said_by(main, '--source', source, '--destination', destination, '--allow_missing', *flags)
    return said, {path.relative_to(destination).as_posix(): path.read_bytes() for path in destination.rglob('*.??g')}


def photographs(name):
    return lambda: image_sets.main('', os.path.join(ROOT, 'data', name))


def cifarfs():
    cifar100.main('', os.path.join(ROOT, 'data', 'cifarfs'))


def drawing(value):
    content = io.BytesIO()
    Image.new('1', (105, 105), value).save(content, 'PNG')
    return content.getvalue()


def write_omniglot(folder, value=1, extra=()):
    """The two archives, one drawing each, and further members of the second."""
    folder.mkdir(exist_ok=True)
    for part, name in DRAWINGS.items():
        with zipfile.ZipFile(folder / f'{part}.zip', 'w') as archive:
            archive.writestr(f'{part}/{name}', drawing(value))
            for path in extra if part == 'images_evaluation' else ():
                archive.writestr(path, drawing(0))
    return folder


def table(folder, group, *names):
    """A table of downloads with the files in a folder, as verified ones that need not be fetched."""
    rows = ['group,file,bytes,sha256,md5,urls,page']
    for name in names:
        content = (folder / name).read_bytes()
        rows.append(f'{group},{name},{len(content)},{hashlib.sha256(content).hexdigest()},,http://127.0.0.1:9/,')
    path = folder.parent / 'downloads.csv'
    path.write_text('\n'.join(rows))
    return '--download', '--downloads', path


# Archives that hold a file twice

@pytest.mark.parametrize('path', ['images_background/' + DRAWINGS['images_background'],
                                  'images_evaluation/' + DRAWINGS['images_evaluation'],
                                  'python/images_background/' + DRAWINGS['images_background']])
def test_a_drawing_under_the_name_of_another(path, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        source = write_omniglot(tmp_path / 'source', extra=[path])
    said, files = run(resize_images.main, source, tmp_path / 'prepared')
    assert ('2 times instead of once' in said or '1 file names stand for more than one image' in said) and not files


@pytest.mark.parametrize('name', ['gtsrb', 'dtd'])
def test_a_member_twice(name, tmp_path):
    """The first and the last of them counted, depending on who read it."""
    source = write(name, tmp_path / 'source', MAKE[name]())
    path = source / image_sets.SETS[name].archive
    twice = next(member for member in MAKE[name]() if member.endswith(('.ppm', '.jpg')))
    if name == 'gtsrb':
        with warnings.catch_warnings(), zipfile.ZipFile(path, 'a') as archive:
            warnings.simplefilter('ignore')
            archive.writestr(twice, picture(9, image_format='PPM'))
    else:
        with tarfile.open(path, 'w:gz') as archive:
            for member, content in [*MAKE[name]().items(), (twice, picture(9))]:
                header = tarfile.TarInfo(member)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
    said, files = run(photographs(name), source, tmp_path / 'prepared')
    assert f"{path} holds '{twice}' 2 times instead of once; download it again" == said and not files


@pytest.mark.parametrize('name', ['cifar-100-python/train', 'other/train'])
def test_a_part_of_cifar_twice(name, tmp_path):
    source = write_cifar(tmp_path / 'source', cifar_parts())
    path = source / cifar100.ARCHIVE
    with tarfile.open(path) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(path, 'w:gz') as archive:
        for member, content in [*members, (name, dict(members)['cifar-100-python/test'])]:
            header = tarfile.TarInfo(member)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    said, files = run(cifarfs, source, tmp_path / 'prepared')
    assert f"{path} holds 'train' 2 times instead of once" in said and not files


# Archives beside unpacked folders

def test_verified_archives_come_before_folders(tmp_path):
    """After --download; without it the folder does, as before."""
    source = write_omniglot(tmp_path / 'source', value=0)
    for part, name in DRAWINGS.items():
        path = source / part / name
        path.parent.mkdir(parents=True)
        path.write_bytes(drawing(1))
    _, folders = run(resize_images.main, source, tmp_path / 'prepared')
    _, verified = run(resize_images.main, source, tmp_path / 'prepared', *table(source, 'omniglot', *(f'{part}.zip' for part in DRAWINGS)))
    assert len(folders) == 2 and folders.keys() == verified.keys()
    for files, value in (folders, 255), (verified, 0):
        for content in files.values():
            assert Image.open(io.BytesIO(content)).convert('L').getextrema() == (value, value)


def test_verified_tar_files_come_before_folders(tmp_path):
    files = MAKE['dtd']()
    source = write('dtd', tmp_path / 'source', files)
    write('dtd', source, {name: picture(77) if name.endswith('.jpg') else content for name, content in files.items()}, unpacked=True)
    _, folder = run(photographs('dtd'), source, tmp_path / 'prepared')
    _, verified = run(photographs('dtd'), source, tmp_path / 'prepared', *table(source, 'dtd', 'dtd-r1.0.1.tar.gz'))
    assert len(set(folder.values())) == 1 < len(set(verified.values()))
    parts = cifar_parts()
    source = write_cifar(tmp_path / 'cifar', parts)
    parts['train'][b'data'] = 255 - parts['train'][b'data']
    write_cifar(source, parts, archive=False)
    _, folder = run(cifarfs, source, tmp_path / 'small')
    _, verified = run(cifarfs, source, tmp_path / 'small', *table(source, 'cifar100', cifar100.ARCHIVE))
    assert folder.keys() == verified.keys() and folder != verified


def test_verified_idx_files_come_before_unpacked_ones(tmp_path):
    for name in 'a-ubyte', 'a-ubyte.gz':
        (tmp_path / name).touch()
    args = preparation.arguments('', '', '').parse_args(['--source', str(tmp_path)])
    assert mnist.find_idx(args, ['a-ubyte']) == [str(tmp_path / 'a-ubyte')]
    args.download = True
    assert mnist.find_idx(args, ['a-ubyte']) == [str(tmp_path / 'a-ubyte.gz')]


# Another source

def test_another_source_is_noticed(tmp_path):
    """Everything is made again; the same archive elsewhere, or packed again, is the same source."""
    first, second = (write_omniglot(tmp_path / name, value) for name, value in (('first', 1), ('second', 0)))
    _, before = run(resize_images.main, first, tmp_path / 'prepared')
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / 'prepared').rglob('*.png')}
    first.rename(tmp_path / 'moved')
    for path in (tmp_path / 'moved').iterdir():
        os.utime(path, (1e9, 1e9))
    assert run(resize_images.main, tmp_path / 'moved', tmp_path / 'prepared') == (None, before)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / 'prepared').rglob('*.png')}
    _, after = run(resize_images.main, second, tmp_path / 'prepared')
    assert after == run(resize_images.main, second, tmp_path / 'fresh')[1] != before


def test_folders_of_earlier_versions_stay(tmp_path):
    """Their records do not say from where they were made."""
    source = write_omniglot(tmp_path / 'source')
    run(resize_images.main, source, tmp_path / 'prepared')
    (tmp_path / 'prepared' / '.prepared.json').write_text('{"recipe": "antialias=False", "complete": true}')
    path, = (tmp_path / 'prepared').glob('Latin/*/*.png')
    path.write_bytes(b'mine')
    assert run(resize_images.main, source, tmp_path / 'prepared')[0] is None and path.read_bytes() == b'mine'


# Memory

def test_text_files_of_a_tar_file_are_kept_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, 'TEXT_BYTES', 2 ** 20)
    monkeypatch.setattr(archives, 'LONGEST_TEXT', 2 ** 18)
    with tarfile.open(tmp_path / 'a.tar', 'w:gz') as archive:
        for number in range(40):
            header = tarfile.TarInfo(f'{number}.txt')
            header.size = 2 ** 20 if number == 1 else 2 ** 17
            archive.addfile(header, io.BytesIO(b'%d ' % (number % 10) * (header.size // 2)))
    tracemalloc.start()
    archive = archives.Tar(tmp_path / 'a.tar')
    assert tracemalloc.get_traced_memory()[1] < 4 * 2 ** 20
    tracemalloc.stop()
    for number in 0, 1, 39, 5:
        assert archive.read(f'{number}.txt')[:2] == b'%d ' % (number % 10)


@pytest.mark.parametrize('pixels, at_once', [(decoding.LARGE_PIXELS + 1000, 1), (100, 4)])
def test_large_images_are_decoded_one_at_a_time(pixels, at_once, monkeypatch):
    """However many threads there are; small ones as before."""
    content = io.BytesIO()
    Image.new('L', (pixels // 10, 10)).save(content, 'PNG')
    open_now, most, lock, barrier, inside = 0, 0, threading.Lock(), threading.Barrier(4), threading.Barrier(4)

    def work():
        nonlocal open_now, most
        barrier.wait()
        with decoding.open_image(io.BytesIO(content.getvalue()), ['PNG']):
            with lock:
                open_now += 1
                most = max(most, open_now)
            with contextlib.suppress(threading.BrokenBarrierError):
                inside.wait(10 if at_once == 4 else 0.05)
            with lock:
                open_now -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == at_once


# Transparency

@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_transparent_grey_is_put_on_white(bits, tmp_path):
    """PNG files of few bits, whose transparent grey counts in these bits."""
    (tmp_path / 'images' / 'train' / 'a').mkdir(parents=True)
    grey = 1 if bits > 1 else 0
    path = tmp_path / 'images' / 'train' / 'a' / '0.png'
    path.write_bytes(png([grey, 0 if bits > 1 else 1], bits, grey))
    shown = SOURCES['folder'].folders(str(tmp_path / 'images')).load('train', (1, 2, 1)).values
    assert shown.ravel().tolist() == [255, 0 if bits > 1 else 255]


def test_transparent_colour_of_16_bits_is_put_on_white(tmp_path):
    """Which Pillow reads as 8 bits, but not the transparent value."""
    (tmp_path / 'images' / 'train' / 'a').mkdir(parents=True)
    path, colour = tmp_path / 'images' / 'train' / 'a' / '0.png', [0x1234, 0x5678, 0x9abc]
    path.write_bytes(png([*colour, 0x1200, 0x5600, 0xffff], 16, *colour))
    shown = SOURCES['folder'].folders(str(tmp_path / 'images')).load('train', (1, 2, 3)).values
    assert shown.ravel().tolist() == [255, 255, 255, 0x12, 0x56, 255]


@pytest.mark.parametrize('bits, photometric, pixels, expected', [
    (16, 1, struct.pack('<2H', 0x4000, 0xffff), [0x3f, 255]), (16, 0, struct.pack('<2H', 0x4000, 0xffff), [255 - 0x3f, 0]),
    (12, 1, bytes([0x40, 0x0f, 0xff]), [63, 255])])
def test_grey_tiffs_of_many_bits(bits, photometric, pixels, expected, tmp_path):
    """Those of 12 bits, as of microscopes, are not almost black, and those where white is zero are not negatives."""
    (tmp_path / 'images' / 'train' / 'a').mkdir(parents=True)
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1), (279, len(pixels))]
    directory = struct.pack('<H', len(tags)) + b''.join(struct.pack('<HHIHH', tag, 3, 1, value, 0) for tag, value in tags) + bytes(4)
    (tmp_path / 'images' / 'train' / 'a' / '0.tif').write_bytes(struct.pack('<2sHI', b'II', 42, 8 + len(pixels)) + pixels + directory)
    shown = SOURCES['folder'].folders(str(tmp_path / 'images')).load('train', (1, 2, 1)).values
    assert shown.ravel().tolist() == expected


def png(row, bits, *transparent):
    """A PNG file of one row, grey, or of colours, if three numbers are transparent."""

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    packed, channels = np.packbits([int(bit) for value in row for bit in f'{value:0{bits}b}']).tobytes(), len(transparent)
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', len(row) // channels, 1, bits, channels - 1, 0, 0, 0))
            + chunk(b'tRNS', struct.pack(f'>{channels}H', *transparent)) + chunk(b'IDAT', zlib.compress(b'\0' + packed))
            + chunk(b'IEND', b''))
