"""Reads pickles of plain data without trusting them.

The standard unpickler calls whatever a pickle names. Allowing only some of numpy's functions is not enough: with arguments that a
pickle chooses, they can be made to read any address. So this one executes only some of its instructions. It builds numbers,
strings, bytes, lists, tuples, dicts whose keys are strings, and arrays of plain numbers from their bytes, and calls nothing but
the functions below.

The cost of a pickle is bounded. An instruction makes at most one object, and at most MOST_INSTRUCTIONS are executed. A length or
an index that the pickle claims reserves no memory: therefore the unpickler is the standard library's in Python, not the one in C.
Strings that represent bytes are converted once. Nothing nested is ever hashed, compared or printed here, however deep it is.

A list of images that is larger than the memory is not read at all: `spans` finds each image's place in the file.
"""
import io
import math
import os
import pickle
import pickletools
from typing import IO, NamedTuple

import numpy as np

MOST_INSTRUCTIONS = 4_000_000  # CIFAR-100 has 200,000
PLAIN_TYPES = {'b1', 'i1', 'u1', 'i2', 'u2', 'i4', 'u4', 'i8', 'u8', 'f4', 'f8', 'bool', 'int8', 'uint8', 'int16', 'uint16',
               'int32', 'uint32', 'int64', 'uint64', 'float32', 'float64'}
BYTE_ORDERS = {'<', '>', '=', '|'}
LONGEST_AXIS = 2 ** 48
MOST_AXES = 32
MOST_IMAGES = 2_000_000  # in a file of images; tieredImageNet's largest has 448,695
INSTRUCTIONS_PER_IMAGE = 50
SHORTEST_SPAN = 17  # bytes; shorter ones may be names and types
LONGEST_TEXT = 1000  # characters of a name or key; longer ones are refused


class Refused(ValueError):
    """A pickle that is damaged or holds more than plain data. The message says what is wrong with it."""


def load(content: bytes) -> object:
    """The object in a pickle of protocol 0 to 5, as Python 2 or 3 wrote it. Strings of Python 2 are decoded as Latin-1.

    Arrays are read-only, and numbers of numpy's become Python's. Raises Refused if it is damaged, asks for anything but plain data,
    or is too large.
    """
    return _Reader(io.BytesIO(content), len(content)).execute(MOST_INSTRUCTIONS)


class Span(NamedTuple):
    """Bytes within a file."""
    offset: int
    length: int


def spans(file: IO[bytes]) -> list[Span]:
    """The places in its file of a pickled list's images, each bytes, or an array of bytes, that are an image file.

    Raises Refused if it is damaged, or holds anything else; OSError if it cannot be read.
    """
    images = _Reader(file, os.fstat(file.fileno()).st_size, spans=True).execute(MOST_IMAGES * INSTRUCTIONS_PER_IMAGE)
    _require(type(images) is list and len(images) <= MOST_IMAGES and all(type(item) is Span for item in images),
             'it is not a list of images')
    return images


def texts(values: object) -> list[str]:
    """A list of short strings, or of bytes that are strings in Latin-1, as strings. Raises Refused if it is anything else."""
    _require(type(values) in (list, tuple) and
             all(type(value) in (str, bytes) and len(value) <= LONGEST_TEXT for value in values), 'it is not a list of names')
    return [value.decode('latin1') if type(value) is bytes else value for value in values]


def integers(values: object, most: int) -> list[int]:
    """A list or a one-dimensional array of at most `most` integers, as a list. Raises Refused if it is anything else."""
    is_array = type(values) is np.ndarray and values.ndim == 1
    _require(is_array or type(values) in (list, tuple), 'it is not a list of integers')
    _require(len(values) <= most, f'it lists more than {most:,} integers')
    integers = values.tolist() if is_array else list(values)
    _require(all(type(value) is int for value in integers), 'it is not a list of integers')
    return integers


def with_text_keys(entries: dict) -> dict:
    """A dict from a pickle, its keys as strings. Raises Refused if two keys become the same."""
    keys = texts(list(entries))
    _require(len(set(keys)) == len(keys), 'two of its keys are the same text')
    return dict(zip(keys, entries.values()))


class _Type:
    """A numpy.dtype that a pickle describes. Whether it is plain is only checked when an array is made of it."""

    def __init__(self, name, align=False, copy=False):
        self._name, self._order, self._plain = name, None, False

    def build(self, state):
        """Takes (version, byte order, subarray, names, fields, ...)."""
        _require(type(state) is tuple and len(state) >= 5, 'it describes a type of numbers in an unknown way')
        self._order, self._plain = state[1], all(entry is None for entry in state[2:5])

    def dtype(self):
        plain = self._plain and type(self._name) is str and type(self._order) is str
        _require(plain and self._name in PLAIN_TYPES and self._order in BYTE_ORDERS,
                 'it holds an array of something other than plain numbers')
        return np.dtype(self._name).newbyteorder(self._order)


class _Unbuilt:
    """An array of which the pickle has not yet given the content."""
    array = None


class _Memo(dict):
    """The objects that a pickle refers to again; of an array, what it has become."""

    def __getitem__(self, index):
        value = super().__getitem__(index)
        return value.array if type(value) is _Unbuilt and value.array is not None else value


def _require(condition, sentence):
    if not condition:
        raise Refused(sentence)


_NDARRAY = 'numpy ndarray'  # stands for the class, which no pickle can call
_INSTRUCTIONS = {getattr(pickle, name) for name in (
    'INT LONG FLOAT BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE '
    'SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET '
    'PROTO FRAME NONE NEWTRUE NEWFALSE EMPTY_LIST EMPTY_DICT EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 MARK LIST TUPLE DICT APPEND '
    'APPENDS SETITEM SETITEMS MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD').split()}
# {instruction that holds bytes: bytes of their length, which comes first}
_LENGTHS = {pickle.SHORT_BINSTRING: 1, pickle.SHORT_BINBYTES: 1, pickle.BINSTRING: 4, pickle.BINBYTES: 4, pickle.BINBYTES8: 8,
            pickle.BYTEARRAY8: 8}
# {instruction that adds to a dict: where the keys are on the stack}
_KEYS = {pickle.SETITEM: slice(-2, -1), pickle.SETITEMS: slice(None, None, 2), pickle.DICT: slice(None, None, 2)}


class _Reader(pickle._Unpickler):
    """Executes the instructions of a pickle."""

    def __init__(self, file, size, spans=False):
        super().__init__(file, encoding='latin1')
        self._file, self._size, self._spans = file, size, spans
        self._room = size  # bytes that may still be made from strings
        self.read, self.readline, self.memo = file.read, file.readline, _Memo()
        self.stack, self.metastack = [], []
        self.append = self.stack.append
        self._names = {_NDARRAY: _NDARRAY, 'numpy dtype': _Type, '_codecs encode': self.encode, '__builtin__ bytes': lambda: b''}
        for core in 'numpy.core', 'numpy._core':
            self._names |= {f'{core}.multiarray _reconstruct': self.reconstruct, f'{core}.multiarray scalar': self.scalar,
                            f'{core}.numeric _frombuffer': self.array}

    def execute(self, most):
        """Executes at most `most` instructions; returns the object. Raises Refused, or OSError if the file cannot be read."""
        try:
            for _ in range(most):
                code = self.read(1)
                if code == pickle.STOP:
                    return self.stack[-1]
                if code not in _INSTRUCTIONS:
                    opcode = pickletools.code2op.get(code.decode('latin1'))
                    raise Refused(f'it uses the instruction {opcode.name}, which data do not need' if opcode else
                                  'it is damaged or cut off')
                if code in _KEYS:
                    _require(all(type(key) in (str, bytes) for key in self.stack[_KEYS[code]]), 'a key of a dict in it is not text')
                if not (self._spans and code in _LENGTHS and self._skip(_LENGTHS[code])):
                    self.dispatch[code[0]](self)
        except (Refused, MemoryError, OSError):
            raise
        except Exception as error:  # damaged pickles raise almost anything
            raise Refused('it is damaged') from error
        raise Refused(f'it has more than {most:,} instructions')

    def _skip(self, width):
        """Pushes the Span of bytes whose length comes first, as a number of `width` bytes; or does nothing, if they are few."""
        start = self._file.tell()
        length = int.from_bytes(self._file.read(width), 'little')
        if length < SHORTEST_SPAN:
            self._file.seek(start)
            return False
        _require(start + width + length <= self._size, 'it is damaged or cut off')
        self._file.seek(start + width + length)
        self.append(Span(start + width, length))
        return True

    # The instructions that are more, or less, than the standard ones.

    def load_frame(self):
        self.read(8)

    def find_class(self, module, name):
        if f'{module} {name}' not in self._names:
            raise Refused(f'it asks for {ascii(f"{module}.{name}"[:100])}, which data do not need')
        return self._names[f'{module} {name}']

    def load_reduce(self):
        _require(callable(self.stack[-2]) and type(self.stack[-1]) is tuple, 'it calls something other than an allowed function')
        super().load_reduce()

    def load_build(self):
        state, unbuilt = self.stack.pop(), self.stack[-1]
        if type(unbuilt) is _Type:
            unbuilt.build(state)
        else:
            _require(type(unbuilt) is _Unbuilt and type(state) is tuple and len(state) == 5, 'it builds what data do not need')
            _, shape, kind, columns_first, content = state
            self.stack[-1] = unbuilt.array = self.array(content, kind, shape, 'F' if columns_first is True else 'C')

    dispatch = pickle._Unpickler.dispatch | {
        pickle.FRAME[0]: load_frame, pickle.REDUCE[0]: load_reduce, pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8}

    # What a pickle may call.

    def array(self, content, kind, shape, order, axes=None):
        """An array of plain numbers from as many bytes as its shape needs; from a Span, the Span."""
        content = content if type(content) is Span else self._as_bytes(content)
        _require(type(kind) is _Type, 'it holds an array without a type')
        dtype = kind.dtype()
        _require(type(shape) is tuple and len(shape) <= MOST_AXES and
                 all(type(length) is int and 0 <= length < LONGEST_AXIS for length in shape), 'it holds an array without a shape')
        size = content.length if type(content) is Span else len(content)
        _require(math.prod(shape) * dtype.itemsize == size, 'the content of an array in it does not fit its shape')
        if type(content) is Span:
            _require(dtype == np.uint8, 'it holds an array of something other than bytes')
            return content
        _require(type(order) is str and order in ('C', 'F', 'K'), 'it holds an array in an unknown order')
        array = np.ndarray(shape, dtype, buffer=content, order='F' if order == 'F' else 'C')
        return array if axes is None else array.transpose(integers(axes, MOST_AXES))

    def reconstruct(self, kind, shape, code):
        _require(kind is _NDARRAY, 'it holds an array of an unknown class')
        return _Unbuilt()

    def scalar(self, kind, content):
        return self.array(content, kind, (), 'C').item()

    def encode(self, text, encoding):
        """Bytes, as Python 3 writes them for Python 2."""
        _require(type(encoding) is str and encoding == 'latin1', 'it holds bytes in an unknown encoding')
        return self._as_bytes(text)

    def _as_bytes(self, value):
        """Bytes, or a string that represents them, as bytes."""
        if type(value) is str:
            self._room -= len(value)
            _require(self._room >= 0, 'it would unpack to more than it holds')
            return value.encode('latin1')
        _require(type(value) is bytes, 'it has no bytes where there should be some')
        return value
