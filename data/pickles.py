"""Reads pickles of plain data without trusting them.

The standard unpickler calls whatever a pickle names. Allowing only some of numpy's functions is not enough: with arguments that a
pickle chooses, they can be made to read any address. So this module has its own loop over the instructions. It builds numbers,
strings, bytes, lists, tuples, dicts whose keys are strings, and arrays of plain numbers from their bytes, and calls nothing but
the functions below.

The cost of a pickle is bounded. An instruction makes at most one object, and at most MOST_INSTRUCTIONS are executed. A length or
an index that the pickle claims reserves no memory. Strings that represent bytes are converted once. Nothing nested is ever
hashed, compared or printed here, however deep it is.

A list of images that is larger than the memory is not read at all: `spans` finds each image's place in the file.
"""
import codecs
import io
import math
import os
import pickletools
from typing import BinaryIO, NamedTuple

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

    Arrays are read-only, and numbers of numpy's become Python's.

    Raises:
        Refused: it is damaged, asks for anything but plain data, or is too large.
    """
    try:
        return _Reader(io.BytesIO(content), len(content)).load(MOST_INSTRUCTIONS)
    except (Refused, MemoryError):
        raise
    except Exception as error:  # damaged pickles raise almost anything
        raise Refused('it is damaged') from error


class Span(NamedTuple):
    """Bytes within a file."""
    offset: int
    length: int


def spans(file: BinaryIO) -> list[Span]:
    """The places in its file of a pickled list's images, each bytes, or an array of bytes, that are an image file.

    Raises:
        Refused: it is damaged, or holds anything else.
        OSError: it cannot be read.
    """
    try:
        images = _Reader(file, os.fstat(file.fileno()).st_size, spans=True).load(MOST_IMAGES * INSTRUCTIONS_PER_IMAGE)
    except (Refused, MemoryError, OSError):
        raise
    except Exception as error:
        raise Refused('it is damaged') from error
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
    if type(values) is np.ndarray:
        _require(values.ndim == 1 and values.dtype.kind in 'iu', 'it is not a list of integers')
    else:
        _require(type(values) in (list, tuple) and all(type(value) is int for value in values), 'it is not a list of integers')
    _require(len(values) <= most, f'it lists more than {most:,} integers')
    return values.tolist() if type(values) is np.ndarray else list(values)


def with_text_keys(entries: dict) -> dict:
    """A dict from a pickle, its keys as strings. Raises Refused if two keys become the same."""
    keys = texts(list(entries))
    _require(len(set(keys)) == len(keys), 'two of its keys are the same text')
    return dict(zip(keys, entries.values()))


class _Name(str):
    """A function or class that a pickle asks for, as '<module> <name>'."""


class _Type:
    """A numpy.dtype that a pickle describes. Whether it is plain is only checked when an array is made of it."""

    def __init__(self, name):
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


def _require(condition, sentence):
    if not condition:
        raise Refused(sentence)


class _Reader:
    """Executes the instructions of a pickle."""

    def __init__(self, file, size, spans=False):
        self._file, self._size, self._spans = file, size, spans
        self._stack, self._marks, self._memo = [], [], {}
        self._room = size  # bytes that may still be made from strings

    def load(self, most):
        """Executes at most `most` instructions; returns the object."""
        for _ in range(most):
            code = self._file.read(1)
            if code == b'.':
                return self._stack[-1]
            if code not in _INSTRUCTIONS:
                raise Refused(_unknown(code))
            if self._spans and code in _LENGTHS and self._skip(_LENGTHS[code]):
                continue
            read, follow = _INSTRUCTIONS[code]
            follow(self, read(self._file) if read else None)
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
        self._stack.append(Span(start + width, length))
        return True

    def as_bytes(self, value):
        """Bytes, or a string that represents them, as bytes."""
        if type(value) is str:
            self._room -= len(value)
            _require(self._room >= 0, 'it would unpack to more than it holds')
            return value.encode('latin1')
        _require(type(value) is bytes, 'it has no bytes where there should be some')
        return value

    # The instructions: methods of the argument that follows the instruction, or None.

    def ignore(self, _):
        pass

    def push(self, value):
        self._stack.append(value)

    def push_bytes(self, value):
        self._stack.append(bytes(value))

    def mark(self, _):
        self._marks.append(len(self._stack))

    def make_list(self, _):
        self._stack.append(self._since_mark())

    def make_tuple(self, _):
        self._stack.append(tuple(self._since_mark()))

    def tuple_of(self, count):
        items = self._stack[-count:]
        _require(len(items) == count, 'it is damaged')
        self._stack[-count:] = [tuple(items)]

    def make_dict(self, _):
        items = self._since_mark()
        self._stack.append({})
        self._set(items)

    def append(self, _):
        self._extend([self._stack.pop()])

    def appends(self, _):
        self._extend(self._since_mark())

    def set_item(self, _):
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def set_items(self, _):
        self._set(self._since_mark())

    def put(self, index):
        self._memo[index] = self._stack[-1]

    def memoize(self, _):
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, index):
        value = self._memo[index]
        self._stack.append(value.array if type(value) is _Unbuilt and value.array is not None else value)

    def global_name(self, name):
        if name not in _CALLS and name != _NDARRAY:
            raise Refused(f'it asks for {ascii(name.replace(" ", ".", 1)[:100])}, which data do not need')
        self._stack.append(_Name(name))

    def stack_global(self, _):
        name, module = self._stack.pop(), self._stack.pop()
        _require(type(name) is str and type(module) is str, 'it is damaged')
        self.global_name(f'{module} {name}')

    def reduce(self, _):
        arguments, name = self._stack.pop(), self._stack.pop()
        _require(type(name) is _Name and name in _CALLS and type(arguments) is tuple, 'it calls something other than an allowed function')
        self._stack.append(_CALLS[name](self, *arguments))

    def build(self, _):
        state, unbuilt = self._stack.pop(), self._stack[-1]
        if type(unbuilt) is _Type:
            unbuilt.build(state)
        else:
            _require(type(unbuilt) is _Unbuilt and type(state) is tuple and len(state) == 5, 'it builds what data do not need')
            _, shape, kind, columns_first, content = state
            self._stack[-1] = unbuilt.array = _array(self, content, kind, shape, 'F' if columns_first is True else 'C')

    def _since_mark(self):
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _extend(self, items):
        _require(type(self._stack[-1]) is list, 'it is damaged')
        self._stack[-1].extend(items)

    def _set(self, items):
        keys, values = items[::2], items[1::2]
        _require(type(self._stack[-1]) is dict and len(keys) == len(values), 'it is damaged')
        _require(all(type(key) in (str, bytes) for key in keys), 'a key of a dict in it is not text')
        self._stack[-1].update(zip(keys, values))


# What a pickle may call: functions of the reader and the pickle's arguments.

def _array(reader, content, kind, shape, order, axes=None):
    """An array of plain numbers from as many bytes as its shape needs; from a Span, the Span."""
    content = content if type(content) is Span else reader.as_bytes(content)
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


def _reconstruct(reader, kind, shape, code):
    _require(type(kind) is _Name and kind == _NDARRAY, 'it holds an array of an unknown class')
    return _Unbuilt()


def _scalar(reader, kind, content):
    return _array(reader, content, kind, (), 'C').item()


def _type(reader, name, align=False, copy=False):
    return _Type(name)


def _encode(reader, text, encoding):
    """Bytes, as Python 3 writes them for Python 2."""
    _require(type(encoding) is str and encoding == 'latin1', 'it holds bytes in an unknown encoding')
    return reader.as_bytes(text)


def _no_bytes(reader):
    return b''


_NDARRAY = 'numpy ndarray'
_CALLS = {'numpy dtype': _type, '_codecs encode': _encode, '__builtin__ bytes': _no_bytes}
for _core in 'numpy.core', 'numpy._core':
    _CALLS |= {f'{_core}.multiarray _reconstruct': _reconstruct, f'{_core}.multiarray scalar': _scalar,
               f'{_core}.numeric _frombuffer': _array}


def _read_python2_text(file):
    """The argument of the instruction STRING: a quoted string on its own line. (pickletools decodes ASCII only.)"""
    return codecs.escape_decode(pickletools.read_stringnl(file, decode=False))[0].decode('latin1')


def _unknown(code):
    names = [opcode.name for opcode in pickletools.opcodes if opcode.code.encode('latin1') == code]
    return f'it uses the instruction {names[0]}, which data do not need' if names else 'it is damaged or cut off'


def _instructions() -> dict[bytes, tuple]:
    """{code: (function that reads its argument from a file, or None; method of _Reader)} of what plain data need."""
    def all_of(names, follow):
        return dict.fromkeys(names.split(), follow)

    follow = {
        **all_of('INT LONG FLOAT BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE '
                 'SHORT_BINUNICODE BINUNICODE8', _Reader.push),
        **all_of('BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8', _Reader.push_bytes),
        **all_of('PUT BINPUT LONG_BINPUT', _Reader.put), **all_of('GET BINGET LONG_BINGET', _Reader.get),
        **all_of('PROTO FRAME', _Reader.ignore),
        'NONE': lambda reader, _: reader.push(None), 'NEWTRUE': lambda reader, _: reader.push(True),
        'NEWFALSE': lambda reader, _: reader.push(False), 'EMPTY_LIST': lambda reader, _: reader.push([]),
        'EMPTY_DICT': lambda reader, _: reader.push({}), 'EMPTY_TUPLE': lambda reader, _: reader.push(()),
        'TUPLE1': lambda reader, _: reader.tuple_of(1), 'TUPLE2': lambda reader, _: reader.tuple_of(2),
        'TUPLE3': lambda reader, _: reader.tuple_of(3),
        'MARK': _Reader.mark, 'LIST': _Reader.make_list, 'TUPLE': _Reader.make_tuple, 'DICT': _Reader.make_dict, 'APPEND': _Reader.append,
        'APPENDS': _Reader.appends, 'SETITEM': _Reader.set_item, 'SETITEMS': _Reader.set_items, 'MEMOIZE': _Reader.memoize,
        'GLOBAL': _Reader.global_name, 'STACK_GLOBAL': _Reader.stack_global, 'REDUCE': _Reader.reduce, 'BUILD': _Reader.build}
    readers = {opcode.name: opcode.arg.reader for opcode in pickletools.opcodes if opcode.arg} | {'STRING': _read_python2_text}
    return {opcode.code.encode('latin1'): (readers.get(opcode.name), follow[opcode.name])
            for opcode in pickletools.opcodes if opcode.name in follow}


_INSTRUCTIONS = _instructions()
# {code: bytes of the length} of the instructions that hold bytes.
_LENGTHS = {opcode.code.encode('latin1'): width for opcode in pickletools.opcodes for names, width in
            ((('SHORT_BINSTRING', 'SHORT_BINBYTES'), 1), (('BINSTRING', 'BINBYTES'), 4), (('BINBYTES8', 'BYTEARRAY8'), 8))
            if opcode.name in names}
