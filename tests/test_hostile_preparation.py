"""Downloads made to harm a preparation, or damaged in ways that libraries report badly; two preparations at once; Ctrl-C."""
import io
import json
import lzma
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from test_hostile_input import MINI
from test_preparation import SPLITS, WNIDS, cifar_parts, write_cifar

from conftest import ROOT, run_process, said_by
from data import cifar100, preparation, reading

SCRIPTS = {'miniImagenet': 'miniImagenet/proc_images.py', 'cifarfs': 'cifarfs/proc_images.py', 'fc100': 'fc100/proc_images.py',
           'omniglot': 'omniglot_resized/resize_images.py', 'doublemnist': 'doublemnist/proc_images.py',
           'tieredimagenet': 'tieredimagenet/proc_images.py', 'dtd': 'dtd/proc_images.py', 'gtsrb': 'gtsrb/proc_images.py'}


def script(name, *arguments):
    """Runs a preparation script in a process of its own, which must end; returns its status and what it said."""
    process = subprocess.run([sys.executable, os.path.join(ROOT, 'data', SCRIPTS[name]), *map(str, arguments)], text=True,
                             capture_output=True, timeout=100)
    return process.returncode, process.stderr


def cifar():
    cifar100.main('', os.path.join(ROOT, 'data', 'cifarfs'))


def load(content):
    """What `load_pickle` makes of a pickle in a process of its own: its status, what it said, and its peak memory in megabytes.

    The peak is from /proc: that of getrusage may be this process's, from before the other program was started.
    """
    process = subprocess.run(
        [sys.executable, '-c', f'import sys; sys.path.insert(0, {ROOT!r})\nimport re, resource\nfrom data import reading\n'
         'resource.setrlimit(resource.RLIMIT_AS, (2 ** 32, 2 ** 32))\n'
         'try:\n    reading.load_pickle(sys.stdin.buffer.read(), "it")\n'
         'finally:\n    print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)'],
        input=content, capture_output=True, timeout=60)
    return process.returncode, process.stderr.decode(), int(process.stdout or 0)


# Pickles

DTYPE = b"cnumpy\ndtype\n(S'%b'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
FROM_BUFFER = b'cnumpy.core.numeric\n_frombuffer\n('


def entry(value):
    """The pickle of {'a': value}."""
    return b'}' + b"S'a'\n" + value + b's.'


def test_no_pickle_chooses_an_address(tmp_path):
    """A type that says it holds no objects while it does, and an array of it: its elements are addresses."""
    parts = cifar_parts(per_class=1)
    parts['train'].pop(b'fine_labels')
    labels = FROM_BUFFER + b'B' + struct.pack('<I', 800) + b'\xef\xbe\xad\xde\0\0\0\0' * 100 + DTYPE % b'O8' + b"(I100\ntS'C'\ntR"
    parts['train'] = pickle.dumps(parts['train'], protocol=2)[:-1] + b"S'fine_labels'\n" + labels + b's.'
    status, said = script('cifarfs', '--source', write_cifar(tmp_path / 'cifar', parts, archive=False), '--destination', tmp_path)
    assert status == 1 and 'an array of something other than plain numbers' in said


@pytest.mark.parametrize('content, words', [
    (b'})' + b'\x85' * 2_000_000 + b'K\x01s.', 'a key of a dict in it is not text'),  # would be hashed by recursion
    (entry(FROM_BUFFER + b"C\x03abc" + DTYPE % b'u1' + b"(I2\ntS'C'\ntR"), 'does not fit its shape'),
    (entry(FROM_BUFFER + b"C\x00" + DTYPE % b'u1' + b"(I-1\ntS'C'\ntR"), 'an array without a shape'),
    (entry(FROM_BUFFER + b"C\x01a" + DTYPE % b'u1' + b"(I1\ntS'Z'\ntR"), 'an array in an unknown order'),
    (entry(DTYPE % b'u1' + b'(I3\nS"|"\n(tNNI-1\nI-1\nI0\ntb' + b'0' + b'N'), 'the instruction POP'),
    (entry(b"(S'x'\nios\nsystem\n"), 'the instruction INST'),
    (entry(b'cos\nsystem\n(tR'), "asks for 'os.system'"),
    (entry(b'cnumpy\nndarray\n(I8\ntR'), 'calls something other than an allowed function'),
    (b'\x80\x02}q\x00(X\x01\x00\x00\x00aK\x01C\x01aK\x02u.', 'two of its keys are the same'),
    (b'.', 'damaged'), (b'', 'damaged or cut off'), (b'\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff.', 'damaged')])
def test_pickles_that_are_refused(content, words):
    status, said, _ = load(content)
    assert status == 1 and words in said and 'Traceback' not in said and said.count('\n') == 1, said


def test_lists_of_any_depth_are_harmless():
    """Neither reading nor freeing them needs the stack."""
    assert load(entry(b']' * 1_000_000 + b'a' * 999_999))[0] == 0


@pytest.mark.parametrize('content', [
    entry(b'N' + b'r' + struct.pack('<I', 2 ** 26)),             # an index of the memo
    entry(b'\x96' + struct.pack('<Q', 2 ** 31) + b'abc'),        # a length of what is not there
    entry(b'X' + struct.pack('<I', 10 ** 6) + b'x' * 10 ** 6 + b'q\0(' + b'c_codecs\nencode\nh\0S\'latin1\'\n\x86R' * 1500 + b'l'),
    entry(b']' * 8_000_000)], ids=['memo', 'length', 'conversions', 'objects'])
def test_a_pickle_takes_no_more_memory_than_it_deserves(content):
    status, said, megabytes = load(content)
    assert status in (0, 1) and 0 < megabytes < 750 and 'Traceback' not in said


@pytest.mark.parametrize('protocol', range(6))
def test_plain_data_are_read_in_every_protocol(protocol):
    array = np.arange(24, dtype='f8').reshape(2, 3, 4)
    data = {'bytes': np.arange(6, dtype='u1').reshape(2, 3), 'columns first': array.T, 'mixed': array.transpose(1, 0, 2),
            'big': np.arange(3, dtype='>i4'), 'empty': np.zeros([0, 4], 'f4'), 'flags': np.array([True, False])}
    plain = {'numbers': [0, -1, 2 ** 31, 10 ** 30, 1.5, True, None], 'texts': ['Ünï\n\\', ''], 'bytes': [b'\xff', b'x' * 300, b''],
             'nested': {'a': (1, (2, (), [3]))}, 'from numpy': [3, 0.5, True]}
    scalars = {'from numpy': [np.int64(3), np.float32(0.5), np.bool_(True)]}
    found = reading.load_pickle(pickle.dumps({'arrays': data, **plain, **scalars}, protocol=protocol), 'it')
    arrays = found.pop('arrays')
    assert found == plain and [type(value) for value in found['from numpy']] == [int, float, bool]
    for name, wanted in data.items():
        assert arrays[name].dtype == wanted.dtype
        np.testing.assert_array_equal(arrays[name], wanted)


def test_python_2_wrote_arrays_as_texts():
    content = (b"(dp0\nS'data'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\ntp4\nS'b'\np5\ntp6\nRp7\n"
               b"(I1\n(L2L\nI2\ntp8\n" + DTYPE % b'u1' + b"p9\nI00\nS'\\xff\\x00\\n\\''\np10\ntp11\nbp12\nsS'again'\ng7\ns.")
    found = reading.load_pickle(content, 'it')
    assert found['data'].tolist() == [[255, 0], [10, 39]] and found['again'] is found['data']


WRONG = [None, 3, 1.5, True, 'text', [[1]], [None], [1.5], {'a': 1}, [True], np.zeros([2, 2]), np.zeros(100)]


@pytest.mark.parametrize('part, field', [('train', b'data'), ('train', b'fine_labels'), ('test', b'filenames'),
                                         ('meta', b'fine_label_names')])
def test_entries_of_wrong_types_in_cifar(part, field, tmp_path):
    for number, value in enumerate(WRONG):
        parts = cifar_parts(per_class=1)
        parts[part][field] = value
        said = said_by(cifar, '--source', write_cifar(tmp_path / str(number), parts, archive=False),
                       '--destination', tmp_path / 'prepared')
        assert said and part in said and 'download CIFAR-100 again' in said, (value, said)
    assert not (tmp_path / 'prepared').exists()


def test_classes_of_one_name_in_cifar(tmp_path):
    parts = cifar_parts(per_class=1)
    parts['meta'][b'fine_label_names'][3] = parts['meta'][b'fine_label_names'][4]
    folder = write_cifar(tmp_path / 'cifar', parts, archive=False)
    said = said_by(cifar, '--source', folder, '--destination', tmp_path / 'prepared')
    assert 'two classes the same name' in said and not (tmp_path / 'prepared').exists()


def write_mini(folder, names=('train', 'val', 'test'), **change):
    """The three cached pickles, two images for each of two classes; `change` is for the entries of the first."""
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (4, 84, 84, 3), np.uint8)
    for split, name in zip(SPLITS, names):
        data = {'image_data': images, 'class_dict': {wnid: [2 * number, 2 * number + 1]
                                                     for number, wnid in enumerate(WNIDS[split])}}
        data.update(change if split == 'train' else {})
        (folder / f'mini-imagenet-cache-{name}.pkl').write_bytes(pickle.dumps(data))
    return folder


FIRST, SECOND = WNIDS['train']
MEMBERS = [{FIRST: value} for value in (None, 3, 'text', [0.0], [True], [[0]], {0: 1}, [None], np.zeros(2), [4], [-1], [2 ** 70])]
MEMBERS += [{FIRST: [0, 0]}, {FIRST: [0, 1], SECOND: [1, 2]}, {FIRST.encode(): [0], FIRST: [1]}, {'../x': [0]}, {'x' * 151: [0]}]


def test_entries_of_wrong_types_in_the_cached_pickles(tmp_path):
    changes = [{'image_data': value} for value in WRONG] + [{'class_dict': value} for value in WRONG if type(value) is not dict]
    changes += [{'class_dict': members} for members in MEMBERS]
    for number, change in enumerate(changes):
        source = write_mini(tmp_path / str(number), **change)
        said = said_by(MINI.main, '--source', source, '--destination', tmp_path / 'prepared')
        assert said and 'train.pkl' in said and 'download it again' in said, (change, said)
    assert not (tmp_path / 'prepared').exists()


@pytest.mark.parametrize('names', [['train', 'validation', 'test'], ['train', 'val', 'test']])
def test_both_names_of_the_pickle_of_validation(names, tmp_path):
    """If both are there, -validation is not even opened."""
    source = write_mini(tmp_path / 'source', names)
    if 'val' in names:
        (source / 'mini-imagenet-cache-validation.pkl').write_bytes(b'no pickle')
    flags = '--source', source, '--destination', tmp_path / 'prepared', '--allow_missing'
    assert said_by(MINI.main, *flags) is None
    assert len(list((tmp_path / 'prepared' / 'val').rglob('*.png'))) == 4


# Archives and images

def picture():
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (84, 84, 3), np.uint8)).save(content, 'PNG')
    return content.getvalue()


def zip_with(change=lambda content: content, name='n0153282900000005.jpg', compression=zipfile.ZIP_STORED):
    content = io.BytesIO()
    with zipfile.ZipFile(content, 'w', compression) as file:
        file.writestr(name, picture())
    return change(content.getvalue())


def set_bytes(start, offset, value):
    """Function that changes a zip file: what lies at an offset from the last occurrence of `start`."""
    def change(content):
        at = content.rindex(start) + offset
        return content[:at] + value + content[at + len(value):]
    return change


def damage_middle(content):
    return content[:2000] + bytes(100) + content[2100:]


@pytest.mark.parametrize('content, words', [
    (zip_with(set_bytes(b'PK\x01\x02', 6, b'\x63\x00')), 'zip file version 9.9'),
    (zip_with(set_bytes(b'n01532829', 3, b'\xff'), name='n0153282900000005ü.jpg'), 'is damaged'),
    (zip_with(set_bytes(b'PK\x01\x02', 10, b'\x63\x00')), 'cannot be decoded'),  # an unknown compression
    (zip_with(set_bytes(b'PK\x01\x02', 8, b'\x01\x00')), 'cannot be decoded'),   # encrypted
    (zip_with(damage_middle, compression=zipfile.ZIP_LZMA), 'cannot be decoded'),
    (zip_with(damage_middle, compression=zipfile.ZIP_BZIP2), 'cannot be decoded')])
def test_zip_files_that_are_reported_badly(content, words, tmp_path):
    (tmp_path / 'images.zip').write_bytes(content)
    said = said_by(MINI.main, '--source', tmp_path, '--destination', tmp_path / 'prepared')
    assert words in said and ('images.zip' in said or 'n01532829' in said)


def tar_with(pax_headers=None):
    """A tar file of one empty member."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode='w', format=tarfile.PAX_FORMAT) as file:
        member = tarfile.TarInfo('train')
        member.pax_headers = pax_headers or {}
        file.addfile(member)
    return content.getvalue()


def negative_size():
    """A second member that ends where it begins, so that reading on from there never ends."""
    first, content = tar_with()[:512], bytearray(tar_with())
    content[124:136] = (-512).to_bytes(12, 'big', signed=True)
    content[148:156] = b' ' * 8
    content[148:156] = b'%06o\0 ' % sum(content[:512])
    return first + bytes(content)


@pytest.mark.parametrize('content', [
    lzma.compress(tar_with() + bytes(os.urandom(5000)))[:-3000], damage_middle(lzma.compress(os.urandom(5000))),
    tar_with(pax_headers={'GNU.sparse.map': 'x'}), tar_with(pax_headers={'GNU.sparse.map': '1,2,3', 'GNU.sparse.size': 'x'}),
    tar_with(pax_headers={'GNU.sparse.major': '1', 'GNU.sparse.minor': '0', 'GNU.sparse.realsize': '9'}),
    tar_with(pax_headers={'size': 'x'}), negative_size()],
    ids=['cut xz', 'damaged xz', 'sparse map', 'sparse size', 'sparse 1.0', 'size', 'negative size'])
def test_tar_files_that_are_reported_badly(content, tmp_path):
    (tmp_path / cifar100.ARCHIVE).write_bytes(content)
    status, said = script('cifarfs', '--source', tmp_path, '--destination', tmp_path / 'prepared')
    assert status == 1 and said.startswith(str(tmp_path)) and said.count('\n') == 1, said
    assert 'is damaged' in said or 'has no file' in said


def prepare(destination, encode=None, count=2, **more):
    """Prepares a class of small pictures in this process."""
    args = preparation.arguments('', '', str(destination)).parse_args([f'--{name}' for name in more])
    pictures = [preparation.Picture(f'train/a/{number}.png', encode or picture) for number in range(count)]
    preparation.prepare(pictures, {'train/a': preparation.Class('train', count)}, (84, 84), args)


@pytest.mark.parametrize('error', [KeyError('x'), RuntimeError(), NotImplementedError('no'), struct.error('unpack'), IndexError(),
                                   MemoryError(), OverflowError(), lzma.LZMAError('x'), ValueError('\x1b[2J ' + 'x' * 10_000)])
def test_whatever_pillow_raises_is_a_damaged_image(error, tmp_path):
    def encode():
        raise error

    with pytest.raises(SystemExit, match=r'2 images cannot be decoded, first train/a/0.png \(') as refused:
        prepare(tmp_path, encode)
    assert len(refused.value.code) < 800 and '\x1b' not in refused.value.code


PIPES = [('miniImagenet', 'images.zip'), ('miniImagenet', 'images/n0153282900000005.jpg'), ('miniImagenet', 'train.csv'),
         ('miniImagenet', 'mini-imagenet-cache-train.pkl'), ('cifarfs', cifar100.ARCHIVE), ('cifarfs', 'cifar-100-python/train'),
         ('doublemnist', 'train-images-idx3-ubyte'), ('tieredimagenet', 'train_images_png.pkl'), ('dtd', 'dtd-r1.0.1.tar.gz'),
         ('dtd', 'dtd/images/banded/banded_0001.jpg'), ('gtsrb', 'GTSRB_Final_Training_Images.zip'),
         ('omniglot', 'images_background.zip'), ('omniglot', 'images_background/Latin/character01/0001_01.png')]


MORE_FILES = [{f'mini-imagenet-cache-{split}.pkl' for split in SPLITS},
              {f'{part}-{content}-ubyte' for part in ('train', 't10k') for content in ('images-idx3', 'labels-idx1')}]


@pytest.mark.parametrize('name, pipe', PIPES)
def test_pipes_are_not_waited_for(name, pipe, tmp_path):
    if pipe == 'train.csv':
        (tmp_path / 'images.zip').write_bytes(zip_with())
        for split in SPLITS:
            (tmp_path / f'{split}.csv').write_text('filename,label\nx.jpg,n01532829\n')
        (tmp_path / pipe).unlink()
    if name == 'omniglot':
        (tmp_path / 'images_evaluation').mkdir()
    for others in MORE_FILES:  # which must be there, too
        if pipe in others:
            for other in others - {pipe}:
                (tmp_path / other).write_bytes(b'')
    (tmp_path / pipe).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(tmp_path / pipe)
    status, said = script(name, '--source', tmp_path, '--destination', tmp_path / 'prepared')
    assert status == 1 and 'Traceback' not in said, said
    assert 'not a regular file' in said, said


# The folder that is written to

def test_one_preparation_at_a_time(tmp_path):
    refused = []

    def encode():
        with pytest.raises(SystemExit) as error:
            prepare(tmp_path, force=True)
        refused.append(error.value.code)
        return picture()

    prepare(tmp_path, encode)
    assert len(refused) == 2 and f'another preparation is writing to {tmp_path}; wait for its end' in refused[0]
    assert sorted(path.name for path in tmp_path.rglob('*') if path.is_file()) == ['.prepared.json', '0.png', '1.png']
    prepare(tmp_path, force=True)


def test_a_killed_preparation_locks_nothing_and_its_parts_go(tmp_path):
    program = (f'import sys, os; sys.path[:0] = [{ROOT!r}, {ROOT + "/tests"!r}]\nfrom data import preparation\n'
               'def encode():\n    os.kill(os.getpid(), 9)\n'
               f'args = preparation.arguments("", "", {str(tmp_path)!r}).parse_args([])\n'
               'preparation.prepare([preparation.Picture("train/a/0.png", encode)], {}, (4, 4), args)')
    assert subprocess.run([sys.executable, '-c', program]).returncode == -signal.SIGKILL
    left = [tmp_path / '.prepared.json.my.host.12.part', tmp_path / 'train' / 'a' / '0.png.my.host.123.part']
    mine = tmp_path / 'train' / 'a' / 'my notes.part'
    for path in [*left, mine]:
        path.write_bytes(b'half')
    prepare(tmp_path)
    assert not any(path.exists() for path in left) and mine.exists()
    assert not (tmp_path / '.lock').exists()


@pytest.mark.parametrize('record', [b'[' * 100_000, b'{"recipe":' * 100_000, b'[]', b'null', b'3', b'"x"', b'\xff', b'',
                                    b'{"recipe": {}}'])
def test_any_record_of_an_earlier_preparation(record, tmp_path):
    prepare(tmp_path)
    (tmp_path / '.prepared.json').write_bytes(record)
    prepare(tmp_path)
    assert json.loads((tmp_path / '.prepared.json').read_text()) == {
        'recipe': '', 'source': [], 'complete': True, 'content': ['train']}


@pytest.mark.parametrize('name', SCRIPTS)
def test_ctrl_c_before_anything_is_written(name, tmp_path):
    """Here while the script reads the list of classes; it might as well be the download."""
    program = (f'import os, runpy, signal, sys; sys.path.insert(0, {ROOT!r})\nfrom data import reading\n'
               'signal.signal(signal.SIGINT, signal.default_int_handler)\n'
               'reading.read_classes = lambda path: os.kill(os.getpid(), signal.SIGINT)\n'
               f'sys.argv = ["script", "--source", {str(tmp_path)!r}]\n'
               f'runpy.run_path({os.path.join(ROOT, "data", SCRIPTS[name])!r}, run_name="__main__")')
    if name == 'miniImagenet':
        (tmp_path / 'images.zip').write_bytes(zip_with())
    for part in 'images_background', 'images_evaluation':
        (tmp_path / part).mkdir()
    process = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert process.returncode == 130 and process.stderr == 'Interrupted. Run the same command to resume.\n'


def test_little_memory_and_unreadable_files_are_sentences():
    def raises(error):
        raise error

    for error, words in (MemoryError(), 'not enough memory'), (PermissionError(13, 'Permission denied', '/x'), "denied: '/x'"):
        with pytest.raises(SystemExit, match=words):
            preparation.run_script(lambda error=error: raises(error))


def test_names_too_long_for_a_disk_are_no_plain_names():
    """The temporary name is longer, by the number of the write and a suffix."""
    assert reading.is_plain_name('é' * 75) and not reading.is_plain_name('é' * 76)


# Where nothing can be printed

@pytest.mark.parametrize('shell, environment', [
    ('>/dev/full', {}), ('2>/dev/full', {}), ('>&-', {}), ('2>&-', {}), ('', {'PYTHONIOENCODING': 'ascii'}),
    ('', {'PYTHONIOENCODING': 'utf-8:strict'})])
def test_printing_never_stops_a_preparation(shell, environment, small_cifar, tmp_path):
    """All images are written, and the record says so, under a name that no encoding here has."""
    destination = os.fsencode(tmp_path / 'prepared') + 'é'.encode() + b'\xff'
    command = f'exec "$0" "$1" --allow_missing --source "$2" --destination "$3" {shell}'
    process = subprocess.run(['bash', '-c', command, sys.executable, os.path.join(ROOT, 'data', 'cifarfs', 'proc_images.py'), small_cifar,
                              destination], capture_output=True, env={**os.environ, **environment})
    assert process.returncode == 0 and b'Traceback' not in process.stderr, process.stderr
    with open(os.path.join(destination, b'.prepared.json'), encoding='utf-8') as file:
        assert json.load(file)['complete'] is True
    assert sum(len(files) for _, _, files in os.walk(destination)) > 200


def test_file_names_cannot_steer_the_terminal_in_a_preparation(small_cifar, tmp_path):
    stray = tmp_path / 'prepared' / 'train' / 'apple' / '\x1b[31mred.png'
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b'')
    process = run_process('--allow_missing', '--source', small_cifar, '--destination', tmp_path / 'prepared',
                          script='data/cifarfs/proc_images.py')
    assert '\x1b' not in process.stdout + process.stderr and r'\x1b[31mred.png' in process.stdout + process.stderr


@pytest.fixture
def small_cifar(tmp_path):
    write_cifar(tmp_path / 'source', cifar_parts())
    return tmp_path / 'source'
