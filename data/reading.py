"""Reads files of downloads without trusting them: pictures, pickles and names."""
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from data import pickles
from runtime.datasets.images import PREPARED_FORMATS, open_image
from runtime.system.files import open_regular, read_csv

MEGABYTE = 2 ** 20
LARGEST_PICTURE = 64 * MEGABYTE  # as a file; more is an attempt to fill the memory
LONGEST_NAME = 150  # in bytes, of a file or folder; the file's temporary name is longer, and most systems end at 255
# What reading a damaged or hostile picture or archive raises: Pillow, zipfile and tarfile raise almost anything.
DAMAGE = Exception


def read_classes(path: str) -> list[dict[str, Any]]:
    """Rows of a csv file that ships with the scripts, as dicts."""
    return list(read_csv(path)[1].values())


def read_file(path: str, limit: int | None = None) -> bytes:
    """A file's content.

    Raises OSError if it cannot be read, is larger than the limit in bytes, or is not a regular file: a pipe may never end.
    """
    with open_regular(path, 'rb') as file:
        if limit is not None and os.path.getsize(path) > limit:
            raise OSError(errno.EFBIG, f'Larger than {limit // MEGABYTE} MB', path)
        return file.read()


def read_picture(path: str) -> bytes:
    """The content of a picture's file; raises one of DAMAGE."""
    return read_file(path, LARGEST_PICTURE)


def read_part(path: str) -> bytes:
    """The content of a file without which there is nothing to prepare. Raises SystemExit if it cannot be read."""
    try:
        return read_file(path)
    except OSError as error:
        sys.exit(f'{path} cannot be read ({error.strerror}); put the downloaded file there, readable')


def reason(error: BaseException) -> str:
    """The message of an error on damaged input, on one line, short and printable, because parts may come from the input."""
    text = ' '.join(str(error).split())
    text = text if ' ' in text else f'{type(error).__name__} {text}'.strip()
    text = ''.join(character if character.isprintable() else '?' for character in text)
    return text if len(text) <= 200 else text[:200] + '...'


@contextlib.contextmanager
def refusing(problem: str, errors: type[Exception] | tuple = DAMAGE, advice: str = 'download it again') -> Iterator[None]:
    """While entered, raises SystemExit instead of some errors: with the problem, its reason and what to do."""
    try:
        yield
    except errors as error:
        sys.exit(f'{problem} ({reason(error)}); {advice}')


def is_plain_name(name: str) -> bool:
    """Whether a name from a download may become the name of a file or folder: one component, not hidden, printable, short."""
    return (bool(name) and not name.startswith('.') and name.isprintable() and not set(name) & set('/\\:')
            and len(name.encode()) <= LONGEST_NAME)


def encode(image: Image.Image, image_format: str = 'PNG') -> bytes:
    """The content of an image file; JPEG at quality 95."""
    content = io.BytesIO()
    image.save(content, image_format, quality=95)
    return content.getvalue()


def fit(content: bytes, size: tuple[int, int], box: tuple[float, float, float, float] | None = None,
        formats: Sequence[str] = PREPARED_FORMATS) -> bytes:
    """The content of an image file of a given size, from another: the same content where nothing has to be changed.

    Raises one of DAMAGE if it cannot be decoded, or the box lies outside the image.

    Args:
        size: (width, height), to which it is resized with a Lanczos filter.
        box: (left, upper, right, lower) in pixels, to which it is cropped before.
        formats: what the file may be.
    """
    with open_image(io.BytesIO(content), formats) as image:
        image.load()
        if image.size == size and box is None and image.format in PREPARED_FORMATS:
            return content
        image_format = image.format if image.format in PREPARED_FORMATS else 'PNG'
        pixels = image.convert('RGB')
        if box is not None:
            left, upper = (max(0, round(edge)) for edge in box[:2])
            right, lower = (min(side, round(edge)) for side, edge in zip(pixels.size, box[2:]))
            if right <= left or lower <= upper:
                raise ValueError('its box holds no pixel')
            pixels = pixels.crop((left, upper, right, lower))
        return encode(pixels if pixels.size == size else pixels.resize(size, Image.Resampling.LANCZOS), image_format)


def load_pickle(content: bytes, path: str) -> dict:
    """The dict in a pickle of plain data, as Python 2 or 3 wrote it, with its keys as strings; runs no code.

    Raises SystemExit if it is damaged, asks for anything but plain data, or is not a dict. `path` is its name in messages.
    """
    with refusing(f'{path} cannot be read as a pickle of plain data', pickles.Refused):
        data = pickles.load(content)
        if not isinstance(data, dict):
            sys.exit(f'{path} holds a {type(data).__name__} instead of a dict; download it again')
        return pickles.with_text_keys(data)
