"""From a request to its source and tasks, and the reading of the data."""
import dataclasses
import glob
import os

from data_generator import TableSource
from runtime.cli.request import Request, same_folder
from runtime.datasets.images import BadImages
from runtime.datasets.lists import list_paths
from runtime.datasets.splits import MANIFEST, EmptySplit
from runtime.datasets.tables import COLUMNS_FILE, Columns, Tables, read_columns
from runtime.datasets.tasks import SPLITS, Source, TaskConfig, Tasks, UserTask
from runtime.datasets.user_images import read_user_images
from runtime.datasets.user_tables import read_user_tables
from runtime.system.errors import UserError


def source_and_tasks(request: Request) -> tuple[Source, TaskConfig]:
    """The source, an entry of SOURCES (changed by flags for the user's own images or tables), and what its tasks look like.

    Raises UserError if the data cannot be those of the run.
    """
    source = _with_flags(request)
    if request.is_transfer:
        source = _with_network_of_training(source, request)
    if request.images:
        source = dataclasses.replace(source, skip_bad_images=request.skip_bad_images, verify=request.verify)
    if request.user_images and not request.split_file and request.mode != 'predict':
        _refuse_runs_among_classes(request, source)
    if request.own_data and request.mode != 'predict':
        _refuse_another_split(request, source)
    train = request.mode == 'train'
    usual_query_shots = source.query_shots(request.update_batch_size, train)
    return source, TaskConfig(
        num_classes=request.num_classes,
        update_batch_size=request.update_batch_size,
        query_shots=usual_query_shots if train or request.test_query == -1 else request.test_query,
        seed=request.test_seed if request.mode == 'evaluate' else request.seed,
        baseline='oracle' if request.baseline == 'oracle' else None,
        data_path=request.data_path and os.path.expanduser(request.data_path), inner_batch=request.inner_batch)


def _refuse_runs_among_classes(request, source):
    """Raises UserError if the run's directory would be one of the class folders that are to be split."""
    folders, directory = source.folders(os.path.expanduser(request.data_path or '.')), request.directory
    root = os.path.realpath(folders.root)
    if os.path.commonpath([root, os.path.realpath(directory)]) == root and folders.unsplit():
        raise UserError(f'the directory of the run, {directory}, is in --data_path={request.data_path}, where each folder is a class; '
                        'give another --logdir')


def _refuse_another_split(request, source):
    """Raises UserError if data would be split in proportions, in place of those of the training, which had a --split_file: they may be the
    same, moved, and classes of the training would be tested."""
    before, path = request.trained['split_file'], os.path.expanduser(request.data_path)
    if not before or request.split_file or 'split' in request.given:
        return
    if source.folders(path).unsplit() if request.user_images else os.path.isfile(path):
        raise UserError(f'--data_path={request.data_path} is not that of the training, {request.trained["data_path"]}, which had '
                        f'--split_file={before}: give --split_file, the same one if the data were moved, or --split')


def _with_flags(request):
    """The source of a request as its flags change it, if the data are the user's own."""
    if request.tables:
        targets = tuple(name.strip() for name in request.targets.split(',')) if request.targets else ()
        root = os.path.expanduser(request.data_path or '')
        return dataclasses.replace(request.source, files=Tables(
            root, targets, _known_columns(request), request.group_column, **_splitting(request)))
    if request.user_images:
        return dataclasses.replace(
            request.source, image_shape=(request.image_size, request.image_size, int(request.image_channels)), rotations=request.rotations,
            label_column=request.label_column, **_splitting(request))
    return request.source


def _splitting(request):
    """How the user's own classes are split: fields of ImageSource and of Tables."""
    # The run keeps the split of the data that it was trained on.
    keeps = request.mode == 'train' or same_folder(request.data_path, request.trained['data_path'])
    return dict(split_ratios=tuple(map(int, request.split.split('/'))), split_given='split' in request.given,
                split_file=request.split_file and ','.join(list_paths(request.split_file)),
                kept_manifest=os.path.join(request.directory, MANIFEST) if keeps else None,
                splits_anew=request.mode == 'train' and not _resumes(request))


def _resumes(request):
    """Whether a training has a checkpoint to go on from. Not by `checkpoints.iterations`: data are read before TensorFlow is imported."""
    return request.resume and bool(glob.glob(os.path.join(glob.escape(request.directory), 'model*.index')))


def _known_columns(request):
    """The columns of tables that the model was trained with; None if a training starts from scratch."""
    train, directory, resumes = request.mode == 'train', request.directory, _resumes(request)
    if request.load_from and not (train and resumes):
        folder = os.path.dirname(os.path.expanduser(request.load_from)) or '.'
        columns = read_columns(folder)
        if columns is None:
            raise UserError(f'there is no {COLUMNS_FILE} in {folder}, which says what the columns of the model of --load_from are, and how '
                            'they are scaled; copy it there from the directory of its training')
        return columns
    return read_columns(directory) if not train or resumes else None


def _with_network_of_training(source, request):
    """A source whose tasks are given to a model of another source, with that model's network."""
    trained = _with_flags(request.training)
    source = dataclasses.replace(source, head=trained.head, clip=trained.clip)
    if trained.image_shape == source.image_shape:
        return source
    if request.resize:
        return dataclasses.replace(source, image_shape=trained.image_shape, stored_shape=source.image_shape)
    training_shape, shape = ('x'.join(map(str, images.image_shape)) for images in (trained, source))
    raise UserError(f'a model of {request.trained["datasource"]} ({training_shape}) cannot be evaluated on {request.datasource} ({shape}): '
                    f'their images differ in shape; --resize makes those of {request.datasource} fit')


def read_data(request: Request, source: Source, tasks: TaskConfig) -> dict[str, Tasks] | UserTask:
    """{split: tasks}: for a training those of train and val, for an evaluation those of its split; for a prediction the user's task.
    Raises BadImages if images of any of these splits cannot be used; UserError if the data are not there or do not suffice."""
    if request.mode == 'predict':
        if source.image_shape:
            return read_user_images(source, os.path.expanduser(request.support_dir), os.path.expanduser(request.query_dir))
        return read_user_tables(source, os.path.expanduser(request.support_csv), os.path.expanduser(request.query_csv))
    if request.mode == 'evaluate':
        return _evaluation_data(source, tasks, 'test' if request.test_set else 'val')
    data, bad, hint = {}, [], ''
    for split in SPLITS if source.image_shape else ('train', 'val'):
        try:
            data[split] = source.tasks(_validation_config(request, source, tasks) if split == 'val' else tasks, split)
        except BadImages as error:
            bad, hint = bad + error.images, error.hint
        except UserError as error:
            if split == 'val' and isinstance(error, EmptySplit) and request.own_data:
                print('Note: there are no classes or tasks for validation: nothing is validated, and no checkpoint can be the best')
            elif split != 'test':  # a training needs none; its images are read so that a bad one is not found after the training
                raise
    if bad:
        raise BadImages(bad, hint)
    data.pop('test', None)
    return data


def _evaluation_data(source, tasks, split):
    try:
        return {split: source.tasks(tasks, split)}
    except EmptySplit as error:
        raise UserError(f'{error}' + ('; or evaluate on meta-test: --test_set' if split == 'val' else '')) from error


def _validation_config(request, source, tasks):
    """What a validation task of a training looks like: like those of the training, or with all classes if the split has fewer.

    Published splits cannot be changed: DoubleMNIST, which is trained 20-way, has 16 classes to validate on. Users can split their
    own images again. A model whose last layer is computed for each task is meant to be trained with more classes than it is tested on.
    """
    if not (source.image_shape and (source.validate_on_fewer or request.computes_head)):
        return tasks
    available = len(source.folders(tasks.data_path).names('val'))
    return dataclasses.replace(tasks, num_classes=available) if 1 < available < tasks.num_classes else tasks


def record_split(source: Source, tasks: TaskConfig, data: dict[str, Tasks]) -> None:
    """Writes down how the user's class folders are split, now that flags and checkpoints are known to fit them.
    Raises UserError if they are not those that `data`, from `read_data`, was read from, or it cannot be written."""
    if isinstance(source, TableSource) or source.image_shape and source.user_images:
        source.folders(tasks.data_path).record_split({split: split_tasks.classes.names for split, split_tasks in data.items()})


def columns_of(source: Source) -> Columns | None:
    """The columns of a source of tables, for `stored_run.write`; None for others."""
    return source.files.columns if isinstance(source, TableSource) else None
