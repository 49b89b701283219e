"""--download against a server on this machine that does what servers do."""
import collections
import contextlib
import csv
import hashlib
import http.server
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from test_preparation import cifar_parts, write_cifar

from conftest import ROOT, run_ok
from data import download, preparation
from data.download import File

CONTENT = os.urandom(300_000)
PAGE = b'\n<!DOCTYPE html>' + b' ' * 3000


@pytest.fixture(autouse=True)
def little_patience(monkeypatch):
    for name, value in ('TIMEOUT', 0.3), ('ATTEMPTS', 3), ('PAUSE', 0.01), ('PERIOD', 0.5), ('RATE', 100_000):
        monkeypatch.setattr(download, name, value)


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`, {path: bytes}, by the function in `behaviours` of a path's next request, or else rightly."""
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files, self.requests = {'/file': CONTENT}, []
        self.behaviours = collections.defaultdict(list)
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def url(self, name='file'):
        return f'http://127.0.0.1:{self.server_port}/{name}'

    def handle_error(self, request, client_address):
        pass  # the client has gone


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get('Range')))
        waiting = self.server.behaviours[self.path]
        (waiting.pop(0) if waiting else serve)(self)

    def answer(self, status, content, **headers):
        self.send_response(status)
        for name, value in {'Content_Length': len(content), **headers}.items():
            if value is not None:
                self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        self.wfile.write(content)


def serve(handler, upto=None, **headers):
    """The right answer, or its beginning up to a byte of the file."""
    content, wanted = handler.server.files[handler.path], handler.headers.get('Range')
    start = int(re.fullmatch(r'bytes=(\d+)-', wanted)[1]) if wanted else 0
    if wanted:
        headers = {'Content_Range': f'bytes {start}-{len(content) - 1}/{len(content)}', **headers}
    handler.answer(206 if wanted else 200, content[start:upto], **{'Content_Length': len(content) - start, **headers})


def break_off_at(byte):
    return lambda handler: serve(handler, upto=byte)


def ignore_range(handler):
    handler.answer(200, handler.server.files[handler.path])


def status(code):
    return lambda handler: handler.answer(code, b'', Content_Range='bytes */9')


def send(content, code=200, **headers):
    return lambda handler: handler.answer(code, content, **headers)


def hang_at(byte):
    def behave(handler):
        serve(handler, upto=byte)
        time.sleep(2)
    return behave


def redirect(path):
    return lambda handler: handler.answer(302, b'', Location=path)


def chunked(content, ends=True):
    def behave(handler):
        handler.protocol_version = 'HTTP/1.1'
        handler.answer(200, b'%x\r\n' % len(content) + content + b'\r\n' + b'0\r\n\r\n' * ends, Transfer_Encoding='chunked',
                       Connection='close', Content_Length=None)
    return behave


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def file_of(*urls, content=CONTENT, algorithm='sha256'):
    return File('file', len(content), algorithm, hashlib.new(algorithm, content).hexdigest(), urls, 'https://example.org')


@pytest.fixture
def get(server, tmp_path):
    """Function that fetches the server's file; returns what the folder then holds, and how the program ended."""
    def run(*behaviours, file=None):
        server.behaviours['/file'] += behaviours
        try:
            download.fetch_files([file or file_of(server.url())], str(tmp_path))
            said = None
        except SystemExit as error:
            said = error.code
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}, said
    return run


RIGHT = {'file': CONTENT}


def test_a_good_server_is_asked_once(get, server):
    assert get() == (RIGHT, None) and get() == (RIGHT, None)
    assert server.requests == [('/file', None)]


def test_md5_where_only_that_is_known(get, server):
    assert get(file=file_of(server.url(), algorithm='md5')) == (RIGHT, None)


@pytest.mark.parametrize('behaviours, asked', [
    ([break_off_at(100_000), break_off_at(200_000)], [None, 'bytes=100000-', 'bytes=200000-']),
    ([break_off_at(0), break_off_at(0)], [None, None, None]),
    ([break_off_at(100_000), ignore_range], [None, 'bytes=100000-']),
    ([hang_at(100_000)], [None, 'bytes=100000-']),
    ([status(503), status(429)], [None] * 3),
    ([break_off_at(100_000), status(416)], [None, 'bytes=100000-', None]),
    ([break_off_at(100_000), send(CONTENT[5:], 206, Content_Range='bytes 5-/300000')], [None, 'bytes=100000-', None]),
    ([break_off_at(100_000), send(b'x' * 200_000, 206, Content_Range='bytes 100000-/300000')], [None, 'bytes=100000-', None]),
    ([redirect('/other')], [None, None]),
    ([chunked(CONTENT)], [None]),
    ([chunked(CONTENT[:1000], ends=False)], [None, 'bytes=1000-']),
    ([send(CONTENT, Content_Length=400_000)], [None]),   # claims more than it has
    ([send(CONTENT, Content_Length='many')], [None]),
], ids=['breaks off', 'brings nothing', 'ignores Range', 'hangs', 'overloaded', 'nothing there', 'another range', 'another file',
        'redirects', 'chunked', 'chunked and breaks off', 'claims more', 'no length'])
def test_servers_that_give_the_file_in_the_end(behaviours, asked, get, server):
    server.files['/other'] = CONTENT
    files, said = get(*behaviours)
    assert (files, said) == (RIGHT, None) and [wanted for _, wanted in server.requests] == asked


def test_a_later_run_goes_on(get, server):
    files, said = get(break_off_at(100_000), *[break_off_at(100_000)] * 3)
    assert files == {'file.part': CONTENT[:100_000]}
    assert ('broke off after 100,000 of 300,000 bytes, 3 attempts in a row without progress' in said
            and 'Run the same command to resume' in said)
    assert get() == (RIGHT, None) and server.requests[-1] == ('/file', 'bytes=100000-')


@pytest.mark.parametrize('behaviour, found', [
    (send(PAGE), f'found a web page, {len(PAGE):,} bytes'), (chunked(PAGE), f'found a web page, {len(PAGE):,} bytes'),
    (send(CONTENT[:-1] + b'x'), 'found 300,000 bytes with'), (send(CONTENT + b'more'), 'found 300,001 bytes with'),
    (send(CONTENT[:10], Content_Length=10), 'found 10 bytes with'), (send(b''), 'found 0 bytes')],
    ids=['page', 'chunked page', 'other bytes', 'more', 'less', 'nothing'])
def test_wrong_files_are_kept_and_described(behaviour, found, get):
    files, said = get(behaviour)
    assert list(files) == ['file.rejected'] and found in said and 'Traceback' not in said
    assert f'expected 300,000 bytes with the sha256 {hashlib.sha256(CONTENT).hexdigest()}' in said


@pytest.mark.parametrize('first', [send(PAGE), status(404), status(503), redirect('/file'), hang_at(0), redirect('file:///etc/passwd')],
                         ids=['page', 'gone', 'overloaded', 'circle', 'hangs', 'redirects to a file'])
def test_a_mirror_takes_over(first, get, server):
    server.files['/mirror'] = CONTENT
    files, said = get(*[first] * 40, file=file_of(server.url(), server.url('mirror')))
    assert said is None and files['file'] == CONTENT


def endless(piece, head=b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n', pause=0.002):
    """Sends pieces for as long as the client listens; at most for some seconds."""
    def behave(handler):
        end = time.monotonic() + 5
        handler.wfile.write(head)
        while time.monotonic() < end:
            handler.wfile.write(piece)
            time.sleep(pause)
    return behave


def one_byte(handler):
    """The right answer, cut off after one byte."""
    start = int(re.fullmatch(r'bytes=(\d+)-', handler.headers.get('Range') or 'bytes=0-')[1])
    serve(handler, upto=start + 1)


def growing():
    """Ignores Range, and breaks off a byte later each time."""
    rounds = itertools.count(1000)
    return lambda handler: handler.answer(200, CONTENT[:next(rounds)], Content_Length=len(CONTENT))


HOLDING = {'continue': (endless(b'HTTP/1.1 100 Continue\r\n\r\n', b''), 'too slow'),
           'flood of continue': (endless(b'HTTP/1.1 100 Continue\r\n\r\n' * 10_000, b'', 0), 'sends far more'),
           'drops': (endless(b'x', pause=0.02), 'too slow'), 'one byte a request': (one_byte, 'too slow'),
           'growing': (growing(), 'too slow'),
           'body of a redirection': (endless(b'x' * 100_000, b'HTTP/1.1 302 Found\r\nLocation: /mirror\r\n\r\n', 0), 'sends far more'),
           'another part without one': (send(CONTENT[5:], 206, Content_Range='bytes 5-/300000'), 'another part of the file'),
           'digits': (send(b'', 206, Content_Range=f'bytes {"9" * 5000}-/300000', Content_Length=len(CONTENT)), 'broke off after 0'),
           'ftp': (redirect('ftp://127.0.0.1/file'), 'unknown url type: ftp')}


@pytest.mark.parametrize('name', HOLDING)
def test_a_server_cannot_hold_a_download(name, get, server):
    """Nor end it: what another server has is fetched then."""
    behave, said = HOLDING[name]
    _, reason = get(*[behave] * 2000)
    assert said in reason and 'Traceback' not in reason
    server.behaviours['/file'] = [behave] * 2000
    server.files['/mirror'] = CONTENT
    assert get(file=file_of(server.url(), server.url('mirror')))[0]['file'] == CONTENT


def test_what_follows_the_file_is_not_waited_for(get, server):
    head = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n' + b'%x\r\n' % len(CONTENT) + CONTENT + b'\r\n0\r\n'
    assert get(endless(b'X-Trailer: yes\r\n', head)) == (RIGHT, None) and len(server.requests) == 1


def test_a_name_that_nobody_knows_is_not_asked_for_again(get, server, monkeypatch):
    def unknown(*arguments, **others):
        asked.append(arguments)
        raise socket.gaierror(-3, 'Temporary failure in name resolution')

    asked = []
    monkeypatch.setattr(socket, 'getaddrinfo', unknown)
    assert 'cannot be reached (' in get(file=file_of('http://nowhere.invalid/file'))[1] and len(asked) == 1


def test_addresses_that_lead_nowhere(get, server):
    _, said = get(status(403), file=file_of('http://127.0.0.1:1/x', 'http://[', server.url()))
    assert 'http://127.0.0.1:1/x cannot be reached (' in said and 'http://[ cannot be' in said and 'answered with status 403' in said


def test_a_wrong_file_of_that_name_stays_until_there_is_a_right_one(get, tmp_path, capsys):
    (tmp_path / 'file').write_bytes(b'mine')
    assert get(status(404))[0] == {'file': b'mine'}
    assert get() == (RIGHT | {'file.rejected': b'mine'}, None)
    assert 'is not the right file (expected 300,000 bytes' in capsys.readouterr().out


def test_a_part_that_is_longer_than_the_file(get, tmp_path):
    (tmp_path / 'file.part').write_bytes(bytes(400_000))
    assert get() == (RIGHT, None)


def test_no_room(get, server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: shutil._ntuple_diskusage(1, 1, 1000))
    assert 'and the download needs 0 MB' in get()[1] and not server.requests


def test_a_folder_that_cannot_be(server, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit, match='writing to .* failed'):
        download.fetch_files([file_of(server.url())], str(tmp_path / 'file'))


def write_table(path, rows):
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, ['group', 'file', 'bytes', 'sha256', 'md5', 'urls', 'page'])
        writer.writeheader()
        writer.writerows({'md5': '', 'page': 'https://example.org', **row} for row in rows)
    return path


def row_of(group, name, content, *urls):
    return {'group': group, 'file': name, 'bytes': len(content), 'sha256': hashlib.sha256(content).hexdigest(), 'urls': ' '.join(urls)}


@pytest.mark.parametrize('change, words', [
    ({'file': '../file'}, 'is not the name of a file'), ({'file': ''}, 'is not the name of a file'), ({'sha256': 'abc'}, 'no sha256'),
    ({'bytes': 'x'}, 'invalid literal'), ({'bytes': ''}, 'invalid literal'), ({'urls': 'file:///etc/passwd'}, 'neither http://'),
    ({'group': 'other'}, 'no line for omniglot')])
def test_tables_that_cannot_be(change, words, tmp_path):
    table = write_table(tmp_path / 'table.csv', [row_of('omniglot', 'a', b'x', 'http://x') | change])
    with pytest.raises(SystemExit, match=words):
        download.read_table(str(table), 'omniglot')


def test_the_shipped_table():
    with open(os.path.join(ROOT, 'data', 'downloads.csv'), newline='') as file:
        rows = list(csv.DictReader(file))
    for group in {row['group'] for row in rows}:
        for file in download.read_table(os.path.join(ROOT, 'data', 'downloads.csv'), group):
            assert all(url.startswith('https://') for url in file.urls) and file.page.startswith('https://')


# The scripts

def command(script, *arguments):
    return [sys.executable, os.path.join(ROOT, 'data', script), '--download', *map(str, arguments)]


@pytest.fixture
def cifar_table(server, tmp_path):
    """A table of a small CIFAR-100 on the server."""
    archive = write_cifar(tmp_path / 'origin', cifar_parts(per_class=10)) / 'cifar-100-python.tar.gz'
    server.files['/cifar'] = archive.read_bytes()
    return write_table(tmp_path / 'table.csv', [row_of('cifar100', archive.name, archive.read_bytes(), server.url('cifar'))])


def test_from_nothing_to_class_folders(server, cifar_table, tmp_path):
    """One command, and a broken transfer in the middle."""
    server.behaviours['/cifar'] = [break_off_at(100_000)]
    process = subprocess.run(command('cifarfs/proc_images.py', '--downloads', cifar_table, '--source', tmp_path / 'source',
                                     '--destination', tmp_path / 'prepared', '--allow_missing'), capture_output=True, text=True)
    assert process.returncode == 0 and 'comes from https://example.org, whose terms apply' in process.stdout, process.stderr
    assert len(list((tmp_path / 'prepared').rglob('*.png'))) == 2000
    assert [wanted for _, wanted in server.requests] == [None, 'bytes=100000-']


def test_what_is_prepared_is_not_fetched_again(server, tmp_path):
    """Unless it is another preparation, or something was missing."""
    args = preparation.arguments('', str(tmp_path / 'source'), str(tmp_path / 'prepared')).parse_args(['--download', '--allow_missing'])
    args.downloads = write_table(tmp_path / 'table.csv', [row_of('mine', 'file', CONTENT, server.url())])

    def asked(recipe='', facts=None):
        shutil.rmtree(tmp_path / 'source', ignore_errors=True)
        server.requests.clear()
        with contextlib.suppress(SystemExit):
            download.fetch('mine', args, recipe, facts)
        return len(server.requests)

    picture = preparation.Picture('train/a/0.png', lambda: b'content')
    for expected, asks in (2, True), (1, False):
        assert asked('small') == 1
        preparation.prepare([picture], {'train/a': preparation.Class('train', expected)}, (4, 4), args, 'small', facts={'split': 'one'})
        assert asked('small', {'split': 'one'}) == asks
    assert asked('large', {'split': 'one'}) == asked('small', {'split': 'other'}) == 1
    args.force = True
    assert asked('small', {'split': 'one'}) == 1


SHARED = os.environ.get('MAML_DATA', os.path.join(ROOT, os.pardir, 'shared', 'data'))  # real archives, too large for the repository
REAL = {'omniglot': ('omniglot_resized/resize_images.py', 'omniglot', ['images_background.zip', 'images_evaluation.zip'], 32460),
        'cifarfs': ('cifarfs/proc_images.py', 'cifar100', ['cifar-100-python.tar.gz'], 60000)}


@pytest.mark.slow
@pytest.mark.parametrize('source', REAL)
def test_real_archives_from_nothing_to_training(source, server, tmp_path):
    """One command, a transfer that breaks off in the middle, all images; then a training starts."""
    script, folder, names, images = REAL[source]
    if not os.path.isdir(os.path.join(SHARED, folder)):
        pytest.skip(f'there is no {folder} in {SHARED}')
    rows = []
    for name in names:
        with open(os.path.join(SHARED, folder, name), 'rb') as file:
            content = server.files[f'/{name}'] = file.read()
        server.behaviours[f'/{name}'] = [break_off_at(len(content) // 2)]
        rows.append(row_of(folder, name, content, server.url(name)))
    process = subprocess.run(command(script, '--downloads', write_table(tmp_path / 'table.csv', rows), '--source', tmp_path / 'source',
                                     '--destination', tmp_path / 'prepared'), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert len(list((tmp_path / 'prepared').rglob('*.png'))) == images
    assert {wanted is None for _, wanted in server.requests} == {True, False} and len(server.requests) == 2 * len(names)
    output = run_ok(f'--datasource={source}', f'--data_path={tmp_path / "prepared"}', '--conv=False', '--update_batch_size=1',
                    '--meta_batch_size=2', '--metatrain_iterations=1', '--hidden=4', '--engine=map', '--validation_tasks=2',
                    f'--logdir={tmp_path / "logs"}')
    assert f'Training 5-way 1-shot {source}' in output and 'The last checkpoint is' in output


def test_ctrl_c_keeps_what_has_come(server, cifar_table, tmp_path):
    server.behaviours['/cifar'] = [hang_at(100_000)]
    process = subprocess.Popen(command('fc100/proc_images.py', '--downloads', cifar_table, '--source', tmp_path / 'source'),
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    part = tmp_path / 'source' / 'cifar-100-python.tar.gz.part'
    while process.poll() is None and download.size(part) < 50_000:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130 and 'Interrupted. Run the same command to resume' in error and 'Traceback' not in error
    assert part.read_bytes() == server.files['/cifar'][:download.size(part)]


def test_what_must_be_fetched_by_hand(tmp_path):
    (tmp_path / 'images.zip').write_bytes(b'not the known file')
    (tmp_path / 'mini-imagenet-cache-validation.pkl').write_bytes(b'of which no checksum is known')
    process = subprocess.run(command('miniImagenet/proc_images.py', '--source', tmp_path), capture_output=True, text=True)
    assert 'mini-imagenet-cache-train.pkl must be downloaded by hand: if you need it, get it from https://' in process.stdout
    assert 'mini-imagenet-cache-val.pkl must be' in process.stdout and 'its md5 is f87ddf9b5211920dd73520274371eb6a\n' in process.stdout
    assert 'mini-imagenet-cache-validation.pkl has no recorded checksum; its contents will be validated\n' in process.stdout
    assert 'images.zip does not match the recorded checksum (expected the md5 987d2dfe' in process.stdout
    assert process.returncode == 1 and 'images.zip is damaged' in process.stderr


def test_the_program_names_the_command(tmp_path):
    from data_generator import SOURCES
    from runtime.system.errors import UserError
    with pytest.raises(UserError, match='prepare the images with: python data/omniglot_resized/resize_images.py --download'):
        SOURCES['omniglot'].folders(str(tmp_path / 'nowhere')).names('train')


def test_make_omniglot_fetches_prepares_and_evaluates():
    process = subprocess.run(['make', '-n', 'omniglot', 'VENV=/nowhere'], cwd=ROOT, capture_output=True, text=True)
    assert re.search(r'resize_images.py --download\n.*main.py --run=logs/omniglot5way --train=False --test_set=True', process.stdout)
