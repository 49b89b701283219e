"""The forms in which users have their data: folders of many layouts, lists, tables with any separator. Read, or named with a cure."""
import csv
import io
import itertools
import json
import os
import unicodedata

import numpy as np
import pytest
from test_tables import CLASSES, EVALUATE

import main
from conftest import error_of, results_of, run_ok, write_image_tree
from data_generator import SOURCES
from runtime.cli import stored_run
from runtime.cli.request import resolve
from runtime.cli.run_data import source_and_tasks
from runtime.datasets import class_folders, images, lists, splits
from runtime.datasets.class_folders import ClassFolders
from runtime.datasets.images import BadImages
from runtime.datasets.splits import EmptySplit, split_classes
from runtime.datasets.tables import Columns, Tables, as_number, read_sheet, sheet_values, with_decimal_commas
from runtime.datasets.tasks import SPLITS
from runtime.system.errors import UserError
from runtime.system.files import read_csv

RATIOS = (64, 16, 20)


def own(root, **how):
    return ClassFolders(str(root), split_ratios=RATIOS, **how)


def load(root, split='train', **how):
    return own(root, **how).load(split, (4, 4, 3))


def write(root, *names):
    write_image_tree(root, names, images=2, size=(6, 6, 3))
    return root


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# Folders

SPELLINGS = [('train', 'val', 'test'), ('Train', 'Val', 'Test'), ('TRAIN', 'VALID', 'TEST'), ('training', 'validation', 'testing'),
             ('Training', 'valid', 'test')]


@pytest.mark.parametrize('inner', ['', '/images'])
@pytest.mark.parametrize('beside', ['', 'notes.txt', 'boxes.json'])
@pytest.mark.parametrize('names', SPELLINGS)
def test_folders_of_splits_are_taken_for_what_they_are(names, beside, inner, tmp_path, capsys):
    for split, name in zip(SPLITS, names):
        write(tmp_path, *(f'{name}/{split}{number}{inner}' for number in range(3)))
        if beside:
            (tmp_path / name / f'{split}0' / beside).write_text('')
    for split, name in zip(SPLITS, names):
        examples = load(tmp_path, split)
        assert examples.names == [f'{name}/{split}{number}' for number in range(3)] and examples.counts.tolist() == [2, 2, 2]
        said = capsys.readouterr().out
        suffix = os.path.splitext(beside)[1]
        assert (f'Left out in the {split} split, in {tmp_path}: 1 file of other kinds (1 {suffix}), first {name}/{split}0/{beside}' in said
                if beside else 'Left out' not in said), said


def test_a_split_is_refused_where_folders_say_it(tmp_path):
    write(tmp_path, 'val/a', 'test/b', 'train/c')
    with pytest.raises(UserError, match='says which classes are for train, val and test; leave out --split=64/16/20'):
        own(tmp_path, split_given=True).names('train')


def test_label_column_of_folders_is_refused(tmp_path):
    assert 'add --split_file' in error_of('--datasource=folder', f'--data_path={tmp_path}', '--label_column=breed')


def test_two_folders_of_one_split(tmp_path):
    write(tmp_path, 'val/a', 'valid/b', 'train/c')
    with pytest.raises(UserError, match='holds both val and valid; rename one'):
        load(tmp_path)


def roboflow_list(root):
    write(root, 'train', 'valid', 'test')
    write_text(root / 'train' / '_classes.csv', 'filename, cat, dog\n00.png, 1, 0\n')


LAYOUTS = {
    'alphabets': (lambda root: write(root, *(f'{split}/{name}/{number}' for split in SPLITS for name in ('Greek', 'Latin')
                                             for number in '12')),
                  'train/Greek in .* holds no image, nor do 1 others; its 2 folders do, such as train/Greek/1/00.png: if they are the '
                  'classes, move them one level up, or list them in .*splits.csv, in lines like train,train/Greek/1'),
    'twice train': (lambda root: write(root, *(f'{split}/{split}/{name}' for split in SPLITS for name in 'abc')),
                    'its 3 folders do, such as train/train/a/00.png: '),
    'unread kinds': (lambda root: [write_text(root / 'train' / 'a' / name, '') for name in ('1.dcm', '2.dcm', '3.heic')],
                     'holds 2 .dcm, 1 .heic; convert what are images'),
    'nothing': (lambda root: (root / 'train' / 'a').mkdir(parents=True), 'holds no image; remove it$'),
    'no class folders': (roboflow_list, 'folders test and train and valid without class folders in them; .*train holds 2 .png, 1 .csv, .*'
                                        'if _classes.csv says the labels of images: --split_file='),
    'object detection': (lambda root: [write(root, *(f'{split}/images' for split in SPLITS)), *(
        write_text(root / split / 'labels' / '1.txt', '') for split in SPLITS)],
                         'train/labels in .* holds no image; .* holds 1 .txt; convert'),
    'one level above': (lambda root: write(root, *(f'data/{split}/{name}' for split in SPLITS for name in 'ab')),
                        'with images such as data/[a-z]*/[ab]/00.png; perhaps --data_path=.*/data is meant'),
    'images only': (lambda root: [write(root, 'x'), *((root / 'x' / name).rename(root / name) for name in ('00.png', '01.png')),
                                  (root / 'x').rmdir(), write_text(root / 'labels.csv', 'id,label\n')],
                    'holds 0 class folders, .* holds 2 .png, 1 .csv, with images such as 0..png .*--split_file=.*labels.csv'),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_layouts_that_cannot_be_are_described(name, tmp_path):
    make, words = LAYOUTS[name]
    make(tmp_path)
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(UserError, match=words) as error:
        load(tmp_path)
    assert sorted(tmp_path.rglob('*')) == before and ('remove it' in str(error.value)) == (name == 'nothing')


def test_one_kind_of_kernel_file_is_no_image(tmp_path):
    """It would be waited for: such files look regular."""
    write(tmp_path, 'train/a')
    (tmp_path / 'train' / 'a' / 'log.png').symlink_to('/proc/kmsg')
    with pytest.raises(BadImages, match='log.png cannot be read as an image .*not a regular file'):
        load(tmp_path)


@pytest.mark.parametrize('line', ['{split},{name}', ' {split} , {name} ', '{split},{name}/', '{split}, {name}/ ', '"{split}","{name}"'])
@pytest.mark.parametrize('separator', [',', ';', '\t'])
def test_manifests_as_people_write_them(separator, line, tmp_path):
    write(tmp_path, 'a', 'b b', 'c/d')
    lines = [line.format(split=split, name=name) for split, name in (('Train', 'a'), ('valid', 'b b'), ('test', 'c/d'))]
    write_text(tmp_path / 'splits.csv', '\n'.join(line.replace(',', separator) for line in ['split,class', *lines]))
    assert [load(tmp_path, split).names for split in SPLITS] == [['a'], ['b b'], ['c/d']]


@pytest.mark.parametrize('names', [('Cat', 'cat'), (unicodedata.normalize('NFC', 'é'), unicodedata.normalize('NFD', 'é')), ('a', 'a ')])
def test_classes_that_differ_only_in_how_they_are_written(names, tmp_path, capsys):
    write(tmp_path, *names, 'other', 'another')
    load(tmp_path)
    assert 'differ only in capitals, blanks or Unicode form' in capsys.readouterr().out


@pytest.mark.parametrize('ratios', [(0, 0, 100), (0, 1, 1), (80, 0, 20), (80, 20, 0), (64, 16, 20), (1, 0, 0)])
@pytest.mark.parametrize('count', [3, 10, 37])
def test_proportions_that_are_zero(ratios, count):
    names = [f'class{number}' for number in range(count)]
    classes = split_classes(names, ratios, 'here')
    counts = list(map(len, classes.values()))
    assert list(classes) == list(SPLITS) and sorted(sum(classes.values(), [])) == sorted(names)
    assert [bool(number) for number in counts] == [bool(ratio) for ratio in ratios]
    assert all(abs(number - count * ratio / sum(ratios)) <= 2 for number, ratio in zip(counts, ratios))


def make_read_only(root, monkeypatch):
    """Manifests cannot be written below a folder."""
    write_csv = splits.write_csv

    def refuse(path, rows):
        if str(path).startswith(str(root)):
            raise OSError(30, 'Read-only file system')
        write_csv(path, rows)

    monkeypatch.setattr(splits, 'write_csv', refuse)


def test_the_split_is_kept_with_the_run(tmp_path, monkeypatch, capsys):
    """On a disk that cannot be written to. Classes that come later do not change it."""
    root, kept = write(tmp_path / 'data', *(f'class{number}' for number in range(10))), tmp_path / 'run' / 'splits.csv'
    make_read_only(root, monkeypatch)
    own(root, kept_manifest=str(kept)).record_split({})
    before = [own(root, kept_manifest=str(kept)).names(split) for split in SPLITS]
    assert kept.exists() and f'the list is in {kept}' in capsys.readouterr().out
    write(root, *(f'later{number}' for number in range(10)))
    assert [own(root, kept_manifest=str(kept)).names(split) for split in SPLITS] == before
    with pytest.raises(UserError, match='the split of the classes cannot be written to .* nor to .*make a folder writable'):
        own(root, kept_manifest=str(root / 'run' / 'splits.csv')).record_split({})


def test_bad_images_are_decoded_once(tmp_path, monkeypatch):
    """--skip_bad_images knows at the next start which they are; unless they have changed."""
    write(tmp_path, *(f'{split}/a' for split in SPLITS))
    bad = tmp_path / 'train' / 'a' / 'bad.png'
    bad.write_bytes(b'none')
    first, decode = load(tmp_path, skip_bad_images=True), class_folders.decode_images
    monkeypatch.setattr(class_folders, 'decode_images', None)  # would fail if called
    monkeypatch.chdir(tmp_path)
    again = load('.', skip_bad_images=True)  # the same folder, written in another way
    assert again.counts.tolist() == [2] and again.checksum == first.checksum
    monkeypatch.setattr(class_folders, 'decode_images', decode)
    with pytest.raises(BadImages):
        load(tmp_path)
    bad.write_bytes((tmp_path / 'train' / 'a' / '00.png').read_bytes())
    assert load(tmp_path, skip_bad_images=True).counts.tolist() == [3]
    for text in '', '[]', json.dumps({'fingerprint': 1}):
        bad.write_bytes(b'none')
        (tmp_path / '.cache' / 'train_4x4x3.bad.json').write_text(text)
        assert load(tmp_path, skip_bad_images=True).counts.tolist() == [2]


# Lists of images

def listed(root, nested, suffix, separator, header):
    """Twelve images of four labels, and their list."""
    write_image_tree(root, ['images'], images=12, size=(6, 6, 3))
    folder = 'images/' if nested else ''
    lines = [f'{folder}{number:02d}{".png" if suffix else ""},label{number % 4}' for number in range(12)]
    return write_text(root / 'labels.csv', '\n'.join(line.replace(',', separator) for line in [header, *lines]))


@pytest.mark.parametrize('header', ['filename,label', 'id,breed', 'image_path,Class'])
@pytest.mark.parametrize('nested, suffix, separator', itertools.product([True, False], [True, False], [',', ';', '\t']))
def test_lists_of_images(nested, suffix, separator, header, tmp_path):
    path = listed(tmp_path, nested, suffix, separator, header)
    examples = [load(tmp_path, split, split_file=str(path)) for split in SPLITS]
    assert sorted(name for of in examples for name in of.names) == [f'label{number}' for number in range(4)]
    for of in examples:
        for name, start, count in zip(of.names, of.starts, of.counts):
            files = [str(tmp_path / 'images' / f'{number:02d}.png') for number in range(int(name[-1]), 12, 4)]
            expected = np.concatenate(list(images.decode_images(files, (4, 4, 3), True, '', '')))
            assert (of.values[start:start + count] == expected).all()


def test_lists_with_splits(tmp_path):
    """A column, or one list for each split as Ravi & Larochelle's of MiniImagenet."""
    listed(tmp_path, False, True, ',', 'filename,label')
    with_column = write_text(tmp_path / 'all.csv', 'filename,label,split\n00.png,a,train\n01.png,b,Valid\n02.png,c,test\n')
    assert [load(tmp_path, split, split_file=str(with_column)).names for split in SPLITS] == [['train/a'], ['val/b'], ['test/c']]
    lists = [write_text(tmp_path / f'{split}.csv', f'filename,label\n0{number}.png,n{number}\n') for number, split in enumerate(SPLITS)]
    assert [load(tmp_path, split, split_file=','.join(map(str, lists))).names for split in SPLITS] == [
        ['train/n0'], ['val/n1'], ['test/n2']]


def test_lists_whose_splits_are_not_told(tmp_path):
    """They would be split at random. The name of the column may be in capitals."""
    listed(tmp_path, False, True, ',', 'filename,label')
    lists = [write_text(tmp_path / f'my_{split}.csv', f'filename,label\n0{number}.png,n{number}\n') for number, split in enumerate(SPLITS)]
    with pytest.raises(UserError, match='several lists must be called train.csv, val.csv and test.csv, or have a column split'):
        load(tmp_path, split_file=','.join(map(str, lists)))
    capitals = write_text(tmp_path / 'all.csv', 'Split,filename,label\ntrain,00.png,a\nVal,01.png,b\ntest,02.png,c\n')
    assert [load(tmp_path, split, split_file=str(capitals)).names for split in SPLITS] == [['train/a'], ['val/b'], ['test/c']]


def test_images_behind_links_are_listed(tmp_path):
    write_image_tree(tmp_path / 'elsewhere', ['images'], images=2, size=(6, 6, 3))
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'linked').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'data' / 'circle').symlink_to(tmp_path / 'data')
    path = write_text(tmp_path / 'list.csv', 'filename,label,split\n00.png,a,train\nlinked/images/01.png,b,train\n')
    assert load(tmp_path / 'data', split_file=str(path)).names == ['train/a', 'train/b']
    (tmp_path / 'elsewhere' / 'a_link').symlink_to(tmp_path / 'elsewhere' / 'images')
    path = write_text(tmp_path / 'list.csv', 'filename,label,split\nimages/00.png,a,train\nimages/01.png,b,train\n')
    assert load(tmp_path / 'elsewhere', split_file=str(path)).names == ['train/a', 'train/b']


def test_labels_that_are_names_of_images_too(tmp_path):
    path = write_text(listed(tmp_path, False, True, ',', 'x,y'), 'label,id\n00,01\n00,02\n01,03\n02,04\n03,05\n')
    assert sorted(name for split in SPLITS for name in load(tmp_path, split, split_file=str(path)).names) == ['00', '01', '02', '03']


@pytest.mark.parametrize('first', ['id', '', 'species'])
def test_a_column_of_numbers_does_not_name_images(first, tmp_path):
    """Although there are images of these names."""
    write_image_tree(tmp_path, ['images'], images=4, size=(6, 6, 3))
    names = ['03.png', '02.png', '01.png', '00.png']
    lines = [f'0{index},{name},{"dog" if index < 2 else "cat"}' for index, name in enumerate(names)]
    path = write_text(tmp_path / 'list.csv', '\n'.join([f'{first},filename,label', *lines]))
    images = own(tmp_path, split_file=str(path), label_column='label')._labelled[None]
    assert {label: [image.name for image in named] for label, named in images.items()} == {
        'cat': ['images/00.png', 'images/01.png'], 'dog': ['images/02.png', 'images/03.png']}


def test_columns_that_name_images_alike(tmp_path):
    write_image_tree(tmp_path, ['images'], images=2, size=(6, 6, 3))
    path = write_text(tmp_path / 'list.csv', 'id,old,label\n00,01,a\n01,00,b\n')
    with pytest.raises(UserError, match='the columns id and old of .* both name images'):
        load(tmp_path, split_file=str(path))
    path = write_text(tmp_path / 'list.csv', 'id,image,label\n00,01,a\n01,00,b\n')
    images = own(tmp_path, split_file=str(path))._labelled[None]
    assert [image.name for image in images['a']] == ['images/01.png']


@pytest.mark.parametrize('header, words', [
    ('filename,category,label', 'name the one with the labels by --label_column'),
    ('filename,label,label', 'names the column label twice')])
def test_columns_that_could_both_be_meant(header, words, tmp_path):
    path = write_text(listed(tmp_path, False, True, ',', 'x,y'), header + '\n00.png,train,train\n')
    with pytest.raises(UserError, match=words):
        load(tmp_path, split_file=str(path))


def test_a_list_without_a_header(tmp_path):
    """Its first image would be the name of a column, and lost."""
    path = write_text(listed(tmp_path, False, True, ',', 'x,y'), '00.png,dog\n01.png,dog\n')
    with pytest.raises(UserError, match='the first line of .* names an image, 00.png; put a line before it that names the columns'):
        load(tmp_path, split_file=str(path))


def test_lines_with_too_many_cells(tmp_path):
    """They were cut, so that two classes became one."""
    path = write_text(listed(tmp_path, False, True, ',', 'x,y'), 'filename,label\n00.png,dog, small\n01.png,dog, large\n')
    with pytest.raises(UserError, match='line 2 has 3 cells, and the first line 2; put quotes around a cell with a comma'):
        load(tmp_path, split_file=str(path))
    assert read_csv(write_text(tmp_path / 'empty.csv', 'a,b\n1,2,,\n'))[1] == {2: {'a': '1', 'b': '2'}}, 'empty cells are none'


def test_a_single_list_is_split_whatever_its_name_is(tmp_path):
    path = listed(tmp_path, True, True, ',', 'filename,label').rename(tmp_path / 'train.csv')
    assert [len(load(tmp_path, split, split_file=str(path)).names) for split in SPLITS] == [2, 1, 1]


def test_what_a_run_keeps_comes_before_a_later_split_of_the_folder(tmp_path):
    """Another training, or user, may have split the folder in the meantime; then it is not as the data were read, either."""
    write(tmp_path / 'data', *'abcdef')
    kept = write_text(tmp_path / 'run' / 'splits.csv', 'split,class\n' + ''.join(f'train,{name}\n' for name in 'abcd') + 'val,e\ntest,f\n')
    loaded = {split: own(tmp_path / 'data').names(split) for split in SPLITS}
    write_text(tmp_path / 'data' / 'splits.csv', 'split,class\n' + ''.join(f'train,{name}\n' for name in 'cdef') + 'val,b\ntest,a\n')
    assert own(tmp_path / 'data', kept_manifest=str(kept)).names('test') == ['f'] and own(tmp_path / 'data').names('test') == ['a']
    with pytest.raises(UserError, match='or how they are split, have changed since they were read'):
        own(tmp_path / 'data').record_split(loaded)


def test_a_manifest_may_have_further_columns(tmp_path):
    """Unless a class is there more than once: then it is a list of images."""
    write_image_tree(tmp_path, ['a', 'b', 'c'], images=2, size=(6, 6, 3))
    path = write_text(tmp_path / 'mine.csv', 'class,split,images\nb,train,2\na,val,2\nc,test,2\n')
    assert [load(tmp_path, split, split_file=str(path)).names for split in SPLITS] == [['b'], ['a'], ['c']]
    path = write_text(tmp_path / 'list.csv', 'class,split,image\nb,train,a/00.png\nb,train,a/01.png\nb,val,b/00.png\nb,test,c/00.png\n')
    assert [load(tmp_path, split, split_file=str(path)).names for split in SPLITS] == [['train/b'], ['val/b'], ['test/b']]


@pytest.mark.parametrize('data', ['folders', 'list', 'table'])
def test_moved_data_are_split_as_in_the_training(data, tmp_path):
    """A split anew could test classes of the training. Data that are divided into train, val and test need no split."""
    root = write(tmp_path / 'old', *'abcde')
    text = 'split,class\n' + ''.join(f'{split},{name}\n' for split, name in zip(['train', 'train', 'train', 'val', 'test'], 'edcba'))
    flags, split_file = ['--datasource=folder'], write_text(tmp_path / 'mine.csv', text)
    if data == 'list':
        write_text(split_file, 'filename,label\n' + ''.join(f'{name}/00.png,{name}\n' for name in 'abcde'))
    if data == 'table':
        root, flags = one_table(root / 'all.csv', 'abcde'), ['--datasource=table', '--label_column=species']
    run, moved = tmp_path / 'run', root.rename(tmp_path / ('moved.csv' if data == 'table' else 'moved'))
    flags += [f'--data_path={root}', f'--split_file={split_file}']
    write_text(run / 'run.flags', stored_run.description(main.parse(['main.py', *flags]).values))

    def source(*more):
        request = resolve(main.parse(['main.py', f'--run={run}', f'--data_path={moved}', '--train=False', '--num_classes=1', *more]))
        return source_and_tasks(request)[0]

    with pytest.raises(UserError, match=f'is not that of the training, {root}, which had --split_file={split_file}: give --split_file'):
        source()
    source('--split=0/0/100')
    again = source(f'--split_file={split_file}')
    if data == 'folders':
        assert [again.folders(str(moved)).names(split) for split in SPLITS] == [['c', 'd', 'e'], ['b'], ['a']]
        divided = write(tmp_path / 'divided', 'train/a', 'val/b', 'test/c')
        source(f'--data_path={divided}')


def test_an_evaluation_of_other_data_needs_no_split_that_is_written(tmp_path, monkeypatch, capsys):
    listed(tmp_path, False, True, ',', 'filename,label')
    folders = own(tmp_path, split_file=str(tmp_path / 'labels.csv'))  # without a run that keeps it
    folders.record_split({'test': folders.names('test')})
    make_read_only(tmp_path, monkeypatch)
    own(write(tmp_path / 'folders', *'abcde')).record_split({})
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('label', ['.', '..'])
def test_labels_that_are_no_names_of_folders(label, tmp_path):
    path, kept = listed(tmp_path, False, True, ',', 'filename,label'), tmp_path / 'run' / 'splits.csv'
    write_text(path, path.read_text().replace('label2', label))
    folders = own(tmp_path, split_file=str(path), kept_manifest=str(kept))
    names = {split: folders.names(split) for split in SPLITS}
    folders.record_split({})
    assert names == {split: own(tmp_path, split_file=str(path), kept_manifest=str(kept)).names(split) for split in SPLITS}
    assert label in sum(names.values(), [])


def test_lists_that_change_after_a_training(tmp_path, capsys):
    """The split of the run names the labels; a training that starts anew splits those of now."""
    path, kept = listed(tmp_path, False, True, ',', 'filename,label'), tmp_path / 'run' / 'splits.csv'
    folders = own(tmp_path, split_file=str(path), kept_manifest=str(kept))
    folders.record_split({'train': folders.names('train')})
    text = path.read_text()
    write_text(path, text.replace('11.png,label3', '11.png,new'))
    names = {split: load(tmp_path, split, split_file=str(path), kept_manifest=str(kept)).names for split in SPLITS}
    assert f'Ignored labels in {path} not listed in {kept}: new\n' in capsys.readouterr().out
    assert names == {split: folders.names(split) for split in SPLITS}
    write_text(path, text.replace('label3', 'other'))
    with pytest.raises(UserError, match='splits.csv lists label3, which is no label in .*labels.csv; restore it'):
        load(tmp_path, split_file=str(path), kept_manifest=str(kept))
    anew = [load(tmp_path, split, split_file=str(path), kept_manifest=str(kept), splits_anew=True).names for split in SPLITS]
    assert sorted(sum(anew, [])) == ['label0', 'label1', 'label2', 'other']


@pytest.mark.parametrize('flags, anew', [([], True), (['--resume=False'], True), (['--train=False'], False)])
def test_who_reads_the_split_that_a_run_keeps(flags, anew, tmp_path):
    line = ['main.py', '--datasource=folder', f'--data_path={tmp_path}/data', f'--logdir={tmp_path}/logs', *flags]
    request = resolve(main.parse(line))
    assert source_and_tasks(request)[0].splits_anew == anew
    write_text(tmp_path / 'logs' / os.path.basename(request.directory) / 'model2.index', '')
    assert source_and_tasks(request)[0].splits_anew == (flags == ['--resume=False'])


def test_a_class_folder_of_a_manifest_is_gone(tmp_path):
    write(tmp_path, *'abcdef').joinpath('splits.csv').write_text('split,class\ntrain,a\ntrain,gone\nval,b\ntest,c\n')
    with pytest.raises(UserError, match='1 of the 2 class folders .* first gone, which .*splits.csv lists; restore it'):
        load(tmp_path)


def test_what_to_do_about_a_split_of_few_classes(tmp_path):
    """A hint about --split where that made the split, only."""
    assert 'for --split=64/16/20' in own(write(tmp_path / 'a', *'abcdef')).too_few_hint(5)
    assert own(write(tmp_path / 'b', 'train/a', 'val/b')).too_few_hint(5) == 'lower it, or add classes to that split'
    (tmp_path / 'd').mkdir()
    hint = own(tmp_path / 'd', split_file=str(listed(tmp_path / 'd', False, True, ',', 'filename,label'))).too_few_hint(5)
    assert 'have 32 labels or more' in hint and 'delete' not in hint
    table = one_table(tmp_path / 'c' / 'all.csv')
    assert 'change --split=64/16/20' in Tables(str(table), (), None, 'species').too_few_hint(5)
    assert 'add tasks to that split' in Tables(str(tmp_path / 'c'), ('y',), None, 'species').too_few_hint(5)
    with pytest.raises(UserError, match='column species of x holds 2 classes, which cannot be split'):
        split_classes(list('ab'), RATIOS, 'the column species of x', 'classes')


@pytest.mark.parametrize('text, words', [
    ('filename,label\n00.png,a\n01.png,"b\n02.png,c\n', 'bad.csv cannot be read: unexpected end of data'),
    ('filename,label\n00.png,a\n99.png,b\n', '1 of the 2 images that are listed are not in .*first 99.png .line 3 of'),
    ('filename,label\n\n00.png,a\n\n\n99.png,b\n', 'first 99.png .line 6 of'),
    ('filename,label\n00.png,a\nimages/00.png,b\n', 'images/00.png is in line 2 of .* and in line 3'),
    ('filename,label\nx,a\n', 'no column of .* names images below .*, such as '),
    ('split,label\ntrain,a\n', 'no column of .* names images'), ('filename,label\n00.png,\n', 'line 2 of .* lacks an image, a label'),
    ('filename,one,two\n00.png,a,b\n', 'has the columns filename, one, two; name the one with the labels by --label_column'),
    ('filename,label,split\n00.png,a,somewhere\n', 'line 2 of .* lacks'), ('filename,label\n', 'lists no images'), ('', 'lists no images'),
])
def test_lists_that_cannot_be(text, words, tmp_path):
    listed(tmp_path, False, True, ',', 'filename,label')
    with pytest.raises(UserError, match=words):
        load(tmp_path, split_file=str(write_text(tmp_path / 'bad.csv', text)))


# Tables

def table_text(rows, separator, comma, quoting):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, quoting=csv.QUOTE_ALL if quoting else csv.QUOTE_MINIMAL)
    writer.writerows([[cell.replace('.', ',') if comma and number else cell for cell in row] for number, row in enumerate(rows)])
    return text.getvalue()


@pytest.mark.parametrize('quoting', [True, False])
@pytest.mark.parametrize('separator, comma', [(',', False), (';', False), (';', True), ('\t', False), ('\t', True)])
def test_tables_with_any_separator(separator, comma, quoting, tmp_path):
    rng = np.random.default_rng(0)
    for case in range(20):
        values = rng.normal(0, 10.0 ** rng.integers(-3, 5), (5, 3)).round(rng.integers(1, 7))
        rows = [['x', 'y', 'z'], *([repr(float(value)) for value in row] for row in values)]
        path = write_text(tmp_path / f'{case}.csv', table_text(rows, separator, comma, quoting))
        sheet, = with_decimal_commas([read_sheet(str(path))], 'xyz'.__contains__)
        assert sheet.columns == ['x', 'y', 'z'] and (sheet_values(sheet, 'xyz') == values).all()


@pytest.mark.parametrize('text', [
    'x;height, cm;weight, kg\n1;2;3\n', 'x\theight, cm\tweight, kg\n1\t2\t3\n', '\nx;y;z\n1;2;3\n', 'x;y, cm;z, kg\n\n1;2;3\n',
    '\ufeffx,y;cm,z;kg\n1,2,3\n', '"x";"y, cm";"z"\n1,0;2,0;3,0\n', 'x;y, cm;z, kg\n1;2,0;3,00\n'])
def test_names_of_columns_with_separators(text, tmp_path):
    sheet, = with_decimal_commas([read_sheet(str(write_text(tmp_path / 'x.csv', text)))], lambda name: True)
    assert sheet_values(sheet, sheet.columns).tolist() == [[1, 2, 3]]
    columns, rows = read_csv(tmp_path / 'x.csv')
    assert columns == sheet.columns and len(rows) == 1 and list(rows) == sheet.lines


def test_decimal_commas_are_shared(tmp_path):
    """By files read together, and whatever a column says that is not read as numbers."""
    texts = 'name;x\n1.5;1,5\n2.5;2,25\n', 'name;x\na;1,500\n', 'name;x\na;1.500\n', 'name,x\na,1\n'
    sheets = [read_sheet(str(write_text(tmp_path / f'{number}.csv', text))) for number, text in enumerate(texts)]
    assert [sheet.decimal_comma for sheet in with_decimal_commas(sheets, 'x'.__eq__)] == [True, True, False, False]
    assert [sheet.decimal_comma for sheet in with_decimal_commas(sheets[1:], 'x'.__eq__)] == [False] * 3
    path = write_text(tmp_path / 'all.csv', 'dose;x\n' + ''.join(f'{number}.5;{number},25\n' for number in range(10)))
    tables = Tables(str(path), (), None, 'dose')
    assert sorted(value for of_split in tables._values[1].values() for value in np.concatenate(list(of_split.values())).ravel()) == [
        number + 0.25 for number in range(10)]


def test_a_task_in_two_splits_is_reported(tmp_path, capsys):
    for split, tasks in ('train', (1, 2)), ('val', (3, 4)), ('test', (1, 5)):
        write_text(tmp_path / f'{split}.csv', 'p,x,y\n' + ''.join(f'{task},{row},{row}\n' for task in tasks for row in range(4)))
    Tables(str(tmp_path), ('y',), None, 'p').load('train')
    assert f'Note: {tmp_path} has a task 1 in train and in test' in capsys.readouterr().out


@pytest.mark.parametrize('rows', ['1,500;2\n3,250;4', '1.5;2\n1,5;4', '1.234,5;2'])
def test_numbers_that_may_mean_two_things_are_refused(rows, tmp_path):
    sheet, = with_decimal_commas([read_sheet(str(write_text(tmp_path / 'x.csv', f'x;y\n{rows}\n')))], 'xy'.__contains__)
    with pytest.raises(UserError, match='not a? ?finite number') as error:
        sheet_values(sheet, ['x', 'y'])
    assert ('write 1,500 as 1500 or 1.500' in str(error.value)) == rows.startswith('1,500')


def test_decimal_commas_are_numbers_of_one_comma():
    assert (as_number('-1,5e3', True) == -1500
            and not np.isfinite([as_number('1,5'), as_number('1,5,2', True), as_number('1.2,3', True)]).any())


def one_table(path, names='abcdefgh', group='species'):
    rng = np.random.default_rng(0)
    rows = [[name, *map(str, rng.normal(ord(name), 1, 2))] for name in names for _ in range(8)]
    return write_text(path, table_text([[group, 'x', 'y'], *rows], ',', False, False))


def test_one_table_with_a_column_of_labels(tmp_path):
    path, kept = one_table(tmp_path / 'all.csv'), tmp_path / 'run' / 'splits.csv'

    def tables(**how):
        return Tables(str(path), (), None, 'species', kept_manifest=str(kept), **how)

    first = tables()
    names = [first.load(split).names for split in SPLITS]
    assert sorted(sum(names, [])) == list('abcdefgh') and [len(of) for of in names] == [6, 1, 1]
    first.record_split({})
    one_table(path, 'abcdefghijklmnop')
    assert [tables().load(split).names for split in SPLITS] == names
    with pytest.raises(UserError, match='does not match --split=1/1/1'):
        tables(split_ratios=(1, 1, 1), split_given=True).load('train')
    manifest = write_text(tmp_path / 'mine.csv', 'split,class\ntrain,a\ntrain,b\ntest,h\n')
    with pytest.raises(UserError, match='the train split of .* is empty, and there is no trained model'):
        Tables(str(path), (), None, 'species', split_ratios=(0, 0, 100)).load('test')
    given = tables(split_file=str(manifest))
    assert given.load('train').names == ['a', 'b'] and given.load('test').names == ['h']
    with pytest.raises(EmptySplit):
        given.load('val')
    with pytest.raises(UserError, match='--label_column names the one'):
        Tables(str(path)).load('train')
    assert SOURCES['table'].files.group_column is None


def test_values_of_a_column_that_are_no_names_of_folders(tmp_path):
    """They are kept as they are, by the run too."""
    path, kept, names = tmp_path / 'all.csv', tmp_path / 'run' / 'splits.csv', ['/data/a', 'b/', '..', 'd e', '.', 'f//g', 'h']
    write_text(path, 'species,x\n' + ''.join(f'{name},{row}\n' for name in names for row in range(4)))
    for _ in range(2):
        tables = Tables(str(path), (), None, 'species', kept_manifest=str(kept))
        assert sorted(name for split in SPLITS for name in tables.load(split).names) == sorted(names)
        tables.record_split({})
    assert kept.exists()
    with pytest.raises(UserError, match='the manifest typo.csv cannot be read'):  # and not the one of the run
        Tables(str(path), (), None, 'species', kept_manifest=str(kept), split_file='typo.csv').load('test')


def test_files_of_one_folder_whose_columns_differ(tmp_path):
    """In their order only: numbers go by the names. A column may be called class, where another one has the label."""
    for split, label in zip(SPLITS, 'abc'):
        write_text(tmp_path / split / 'p.csv', f'x,class,label\n1,2,{label}\n3,4,{label}\n')
        write_text(tmp_path / split / 'q.csv', f'label,class,x\n{label},200,100\n{label},400,300\n')
    tables = Tables(str(tmp_path), (), None, 'label')
    np.testing.assert_allclose(tables._values[1]['train']['a'], [[1, 2], [3, 4], [100, 200], [300, 400]])
    assert tables._values[0] == ['x', 'class']
    write_text(tmp_path / 'val' / 'r.csv', 'x;class;label\n1,5;2,5;b\n')
    with pytest.raises(UserError, match='p.csv and .*r.csv have lines of b, and only one of them has decimal commas'):
        Tables(str(tmp_path), (), None, 'label').load('train')
    for text, words in ('x,z,label\n1,2,b\n', 'r.csv has no column class, which .*p.csv has'), (
            'x,class,z,label\n1,2,3,b\n', 'r.csv has a column z, which .*p.csv lacks'):
        write_text(tmp_path / 'val' / 'r.csv', text)
        with pytest.raises(UserError, match=words):
            Tables(str(tmp_path), (), None, 'label').load('train')


def test_three_tables_with_a_column_of_tasks(tmp_path):
    for split, names in zip(('train', 'valid', 'test'), ('abc', 'de', 'f')):
        one_table(tmp_path / f'{split}.csv', names, 'patient')
    tables = Tables(str(tmp_path), ('y',), None, 'patient')
    assert [tables.load(split).names for split in SPLITS] == [list('abc'), list('de'), ['f']] and list(tables.columns.features) == ['x']
    for flag, how in ('--split=64/16/20', {'split_given': True}), ('--split_file', {'split_file': 'mine.csv'}):
        with pytest.raises(UserError, match=f'says which tasks are for train, val and test; leave out {flag}'):
            Tables(str(tmp_path), ('y',), None, 'patient', **how).load('train')


def test_many_columns_are_not_all_named():
    features = {f'p{number}': (0.0, 1.0) for number in range(12)}
    assert Columns(features, {'y': (0.0, 1.0)}).text == 'p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, and 2 more → y'


def test_whole_numbers_that_would_be_rounded(tmp_path, capsys):
    for number, noted in ((2 ** 53, False), (2 ** 53 + 1, True), (10 ** 17, False), (10 ** 17 + 1, True)):
        for split in SPLITS:
            write_text(tmp_path / str(number) / split / 'a.csv', f'x,id\n1,{number}\n2,3\n')
        Tables(str(tmp_path / str(number))).load('train')
        assert ('whole numbers beyond 2^53' in capsys.readouterr().out) == noted


@pytest.mark.slow
def test_a_table_without_validation(tmp_path, few_tasks, monkeypatch):
    """From training to meta-test; the split is the run's."""
    flags = [*CLASSES, f'--data_path={one_table(tmp_path / "all.csv")}', '--label_column=species', '--split=5/0/3',
             f'--logdir={tmp_path / "logs"}', '--metatrain_iterations=2']
    output = run_ok(*flags)
    assert 'nothing is validated' in output and 'Split the values of species into 5 / 0 / 3' in output and 'did best' not in output
    run, = (tmp_path / 'logs').iterdir()
    assert 'metaval' not in (run / 'metrics.csv').read_text()
    assert 'trained on' not in run_ok(f'--run={run}', '--metatrain_iterations=3')
    monkeypatch.chdir(tmp_path)
    run_ok(f'--run={run}', '--data_path=all.csv', *EVALUATE)
    assert results_of(run)[-1].tasks.split == 'test'
    assert 'add' not in error_of(f'--run={run}', '--train=False') and '--test_set' in error_of(f'--run={run}', '--train=False')
    for more, words in (['--split=0/0/100'], 'leaves no classes to train on'), (['--targets=x'], '--label_column is for classification'), (
            ['--task_column=x'], 'give one'):
        assert words in error_of(*flags, *more)


def test_class_folders_that_cannot_be_written_to(tmp_path, few_tasks, monkeypatch):
    """A training of a folder on a read-only disk, and its evaluation on all classes of another one."""
    root = write(tmp_path / 'data', *(f'class{number}' for number in range(8)))
    make_read_only(root, monkeypatch)
    flags = ['--datasource=folder', '--image_size=20', '--conv=False', '--hidden=4', '--engine=map', '--meta_batch_size=2',
             '--update_batch_size=1', '--num_classes=2', '--test_query=1', '--metatrain_iterations=2', f'--data_path={root}',
             '--split=4/2/2', f'--logdir={tmp_path / "logs"}']
    assert 'Split the classes into 4 / 2 / 2' in run_ok(*flags)
    run, = (tmp_path / 'logs').iterdir()
    assert len((run / 'splits.csv').read_text().splitlines()) == 9
    other = write(tmp_path / 'other', 'a', 'b', 'c')
    output = run_ok(f'--run={run}', f'--data_path={other}', '--split=0/0/100', '--test_query=1', *EVALUATE)
    assert 'Split' not in output and not (other / 'splits.csv').exists()
    assert results_of(run)[-1].tasks.split == 'test'


def test_the_run_names_its_lists_from_everywhere(tmp_path, monkeypatch):
    """Lists of the training are for its images, however their folder is written."""
    monkeypatch.chdir(tmp_path)
    assert lists.list_paths('a.csv, ~/b.csv') == ['a.csv', os.path.expanduser('~/b.csv')]
    (tmp_path / 'x,y.csv').touch()
    assert lists.list_paths('x,y.csv') == ['x,y.csv']
    (tmp_path / 'images').mkdir()
    values = main.parse(['main.py', '--datasource=folder', '--data_path=images', '--split_file=train.csv,val.csv',
                        '--label_column=breed']).values
    text = stored_run.description(values)
    assert f'--split_file={tmp_path}/train.csv,{tmp_path}/val.csv\n' in text and f'--data_path={tmp_path}/images\n' in text
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'run.flags').write_text(text)
    for more, kept in (([], True), (['--data_path=images'], True), (['--data_path=.', '--split=0/0/100'], False),
                       (['--data_path=.', '--split_file=mine.csv'], 'mine.csv')):
        request = resolve(main.parse(['main.py', '--run=run', '--train=False', *more]))
        assert request.split_file == (f'{tmp_path}/train.csv,{tmp_path}/val.csv' if kept is True else kept or None)
        assert request.label_column == (None if kept is False else 'breed'), 'a column of the lists'
