"""A network of one's own, --network=FILE.py:FUNCTION: the file, the modules that it imports from its folder, and who may run them.

All of it is part of a run's identity, by a checksum, and copied into the run's directory, from where --run=DIR takes it. That copy is
code, so it is run only if this user has trained with the same code, or says --trust_network.
"""
import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import BuiltinImporter, FrozenImporter
from typing import Any

from runtime.system.errors import UserError, first_line
from runtime.system.files import open_regular, write_atomically
from runtime.system.interruption import Interrupted

FOLDER = 'network'  # of the copy, in a run's directory


@dataclasses.dataclass(frozen=True)
class NetworkFile:
    """A function that makes a network."""
    folder: str    # of the file that defines it
    name: str      # of that file
    function: str
    checksum: str  # SHA-256 of the names and contents of `files`
    # {path in the folder: content} of the file and of the modules of its folder that it imports, one from the other
    files: dict[str, bytes] = dataclasses.field(compare=False, repr=False)

    @property
    def identity(self) -> str:
        """What --network is recorded as: the code, wherever it lies."""
        return f'{self.name}:{self.function}@{self.checksum[:12]}'


def label(identity: str) -> str:
    """A network's part in the name of a run's directory, which leaves open what its code is."""
    return '.' + re.sub(r'[^\w.+-]', '-', identity.partition('@')[0].replace('.py:', '-'))[:60]


def read(value: str) -> NetworkFile:
    """The NetworkFile that --network=value names; with '@' and a checksum, it must have that one. Raises UserError."""
    match = re.fullmatch(r'(.*\.py):(\w+)(?:@([0-9a-f]{12}))?', value)
    if not match:
        raise UserError(f'--network={value} must be FILE.py:FUNCTION, like examples/conv4.py:conv4')
    folder, name = os.path.split(os.path.expanduser(match[1]))
    if '.' in name[:-3] or any(finder.find_spec(name[:-3]) for finder in (BuiltinImporter, FrozenImporter)):
        raise UserError(f'--network={value}: Python cannot import a file called {name}; rename it')
    files: dict[str, bytes] = {}
    _add_file(files, folder, name)
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
    if match[3] and not digest.startswith(match[3]):
        raise UserError(f'{os.path.join(folder, name)}, or a module that it imports, has changed: it is not the code of --network={value}')
    return NetworkFile(os.path.abspath(folder), name, match[2], digest, files)


def read_copy(directory: str, identity: str, trusted: bool) -> NetworkFile:
    """The copy in a run's directory of the network with which it was trained. Raises UserError if it has changed, or if this user
    has not trained with it and it is not trusted."""
    network = read(os.path.join(directory, FOLDER, os.path.basename(identity)))
    if not trusted and network.checksum not in _trusted():
        raise UserError(f'{os.path.join(network.folder, network.name)} is code, and you have not trained with it as this user: read it, '
                        'and add --trust_network to run it')
    return network


def write_copy(directory: str, network: NetworkFile) -> None:
    """Copies a network into a run's directory, instead of an earlier one, and notes that this user runs it; raises UserError."""
    folder = os.path.join(directory, FOLDER)
    try:
        if os.path.abspath(folder) != network.folder and not _is_copied(folder, network):
            shutil.rmtree(folder, ignore_errors=True)
            for path, content in network.files.items():
                os.makedirs(os.path.dirname(os.path.join(folder, path)), exist_ok=True)
                write_atomically(os.path.join(folder, path), content)
    except OSError as error:
        raise UserError(f'the network cannot be copied to {folder}: {error.strerror}') from error
    trusted = _trusted()
    if network.checksum not in trusted:
        try:
            os.makedirs(os.path.dirname(_list_of_trusted()), exist_ok=True)
            write_atomically(_list_of_trusted(), ''.join(f'{checksum}\n' for checksum in [*trusted, network.checksum]).encode())
        except OSError as error:
            print(f'{_list_of_trusted()} cannot be written ({error.strerror}): --run={directory} will need --trust_network')


def _is_copied(folder, network):
    """Whether a folder has the files of a network and no others, as a training that goes on finds it: it must not lose its only copy."""
    with contextlib.suppress(OSError):
        copied = {path.relative_to(folder).as_posix() for path in pathlib.Path(folder).rglob('*.py')}
        return copied == set(network.files) and all(
            pathlib.Path(folder, path).read_bytes() == content for path, content in network.files.items())
    return False


def _list_of_trusted():
    """The file of the checksums of the networks with which this user has trained."""
    return os.path.join(os.path.expanduser(os.environ.get('XDG_STATE_HOME') or '~/.local/state'), 'maml', 'networks')


def _trusted():
    try:
        with open(_list_of_trusted(), encoding='ascii') as file:
            return file.read().split()
    except (OSError, ValueError):
        return []


def _add_file(files, folder, path):
    """Adds a file of a folder to {path: content}, and the files of the folder that it imports."""
    full = os.path.join(folder, path)
    try:
        with open_regular(full, 'rb') as file:
            files[path] = file.read()
        tree = ast.parse(files[path])
    except OSError as error:
        raise UserError(f'--network: {full} cannot be read: {error.strerror}') from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f' in line {error.lineno}' if isinstance(error, SyntaxError) else ''
        raise UserError(f'--network: {full} is not valid Python: '
                        f'{getattr(error, "msg", None) or first_line(error)}{line}') from error
    for parts in _imported(tree, os.path.dirname(path).split('/') if '/' in path else []):
        for end in range(1, len(parts) + 1):
            for candidate in ('/'.join(parts[:end]) + '.py', '/'.join([*parts[:end], '__init__.py'])):
                if candidate not in files and os.path.isfile(os.path.join(folder, candidate)):
                    _add_file(files, folder, candidate)


def _imported(tree, package):
    """The names of modules, as lists of their parts, that a file of a package may import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split('.') for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) + 1 - node.level] if node.level else []
            module = [*base, *(node.module.split('.') if node.module else [])]
            yield from ([*module, alias.name] for alias in node.names)


@functools.cache
def load(network: NetworkFile) -> Callable[..., Any]:
    """The function, which runs the file. Raises UserError if that does not work, or there is no such function."""
    modules: dict[str, Any] = {}
    path = os.path.join(network.folder, network.name)
    with _importing(network, modules):
        try:
            module = importlib.import_module(network.name.removesuffix('.py'))
        except Interrupted:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f'{path} raises {type(error).__name__} when it is imported: {first_line(error)}') from error
    function = getattr(module, network.function, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value) and getattr(value, '__module__', None) == module.__name__]
        raise UserError(f'{path} defines no function {network.function}; it has {", ".join(names) or "none"}')

    @functools.wraps(function)
    def with_its_modules(input_shape, outputs):
        with _importing(network, modules):
            return function(input_shape, outputs)

    return with_its_modules


@contextlib.contextmanager
def _importing(network: NetworkFile, modules: dict[str, Any]) -> Iterator[None]:
    """While entered, the modules of a network's folder are those that Python finds under their names; `modules` keeps them."""
    names = {path.split('/')[0].removesuffix('.py') for path in network.files}
    path, writes_no_bytecode = list(sys.path), sys.dont_write_bytecode

    def taken():
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split('.')[0] in names}

    others = taken()
    sys.modules.update(modules)
    sys.path.insert(0, network.folder)
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        yield
    finally:
        modules.update(taken())
        sys.modules.update(others)
        sys.path[:], sys.dont_write_bytecode = path, writes_no_bytecode
