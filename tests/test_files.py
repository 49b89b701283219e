"""Writing files atomically, and reading only regular ones."""
import os
import threading

import pytest

from runtime.system.files import read_csv, read_json, require_regular_file, write_atomically, write_csv


def test_threads_that_write_one_file(tmp_path):
    """Each has a temporary file of its own: both succeed, and the last to finish stays."""
    path, errors, both_write, first_is_done = tmp_path / 'file', [], threading.Barrier(2), threading.Event()

    def write(name):
        def content(file):
            file.write(name)
            both_write.wait(60)
            if name == b'last':
                first_is_done.wait(60)

        try:
            write_atomically(path, content)
        except OSError as error:
            errors.append(error)
        if name == b'first':
            first_is_done.set()

    threads = [threading.Thread(target=write, args=[name]) for name in (b'first', b'last')]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and path.read_bytes() == b'last' and os.listdir(tmp_path) == ['file']


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    def fail(file):
        file.write(b'half')
        raise ValueError

    write_atomically(tmp_path / 'file', b'old')
    with pytest.raises(ValueError):
        write_atomically(tmp_path / 'file', fail)
    assert (tmp_path / 'file').read_bytes() == b'old' and os.listdir(tmp_path) == ['file']


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'link').symlink_to('pipe')
    for path in tmp_path / 'pipe', tmp_path / 'link', tmp_path, '/dev/zero':
        for read in require_regular_file, read_csv, read_json:
            with pytest.raises(OSError, match='not a regular file'):
                read(path)


@pytest.mark.parametrize('name', ['a\rb', 'a\nb', 'a,b', 'a"b', ' a', 'ü', ''])
def test_csv_files_keep_any_name(name, tmp_path):
    write_csv(tmp_path / 'file.csv', [('split', 'class'), ('train', name)])
    columns, rows = read_csv(tmp_path / 'file.csv')
    assert columns == ['split', 'class'] and list(rows.values()) == [{'split': 'train', 'class': name}]
