"""Finding image files in a folder and decoding them."""
import contextlib
import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from runtime.system.errors import UserError, listing
from runtime.system.files import require_regular_file

CHUNK_BYTES = 2 ** 24  # decoded images in memory at a time
SHOWN_BAD_IMAGES = 100  # named in a message
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of a TIFF
LARGE_PIXELS = 2 ** 22  # images of more pixels are decoded one at a time
_large_image = threading.Lock()
Image.core.set_block_size(2 ** 26)  # bytes of Pillow's allocations: malloc returns ones of this size when they are freed

# Pillow refuses to decode images of more than 179 million pixels, and warns from half of that on: here both are refused.
warnings.simplefilter('error', Image.DecompressionBombWarning)
warnings.filterwarnings('ignore', 'Palette images with Transparency')


class BadImages(UserError):
    """Images that cannot be used: [(path, reason)]. `listing` is a text that counts and names them."""

    def __init__(self, images: Sequence[tuple[str, str]], hint: str):
        self.images, self.hint = list(images), hint
        self.listing = (f'{len(self.images)} images: ' if len(self.images) > 1 else '') + listing(
            [f'{path} {reason}' for path, reason in self.images], SHOWN_BAD_IMAGES)
        super().__init__(f'{self.listing}; {hint}, or leave such images out by --skip_bad_images')


class ImageFile(NamedTuple):
    """An image file as the folder lists it, with the data that detect a stale cache of its pixels.

    Size and modification time are not enough: archives restore the time, and two folders may be swapped. A rewritten file has
    another change time, and a file of another folder another inode.
    """
    name: str
    bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int


# Formats that are opened at all. Pillow knows others that run an interpreter (EPS passes the file to Ghostscript) or that are not
# images (HDF5, MPEG); it looks at the content, so checking suffixes would not help.
PREPARED_FORMATS = ('PNG', 'JPEG')
USER_FORMATS = (*PREPARED_FORMATS, 'GIF', 'BMP', 'DIB', 'TIFF', 'WEBP', 'PPM', 'TGA', 'ICO', 'PCX', 'JPEG2000', 'MPO', 'AVIF')


def available_formats(names: Sequence[str]) -> list[str]:
    """Those of some formats that this installation of Pillow can read."""
    Image.init()  # Pillow registers its formats when they are first needed
    return [name for name in names if name in Image.OPEN]


def readable_suffixes() -> set[str]:
    """The file name suffixes, with the dot and in lower case, of the formats that users' images may have."""
    formats = available_formats(USER_FORMATS)
    return {suffix for suffix, image_format in Image.registered_extensions().items() if image_format in formats}


class Contents(NamedTuple):
    """What a folder holds, except hidden files; each sorted."""
    images: list[ImageFile]
    others: list[str]        # names of files of other kinds
    folders: list[str]


def folder_contents(folder: str, suffixes: set[str]) -> Contents:
    """The contents of a folder; files with these suffixes are images.

    A broken symbolic link counts as an image, which cannot be read.
    """
    contents = Contents([], [], [])
    for entry in os.scandir(folder):
        if entry.name.startswith('.'):
            continue
        broken = is_broken(entry)  # of which nothing else can be asked
        if not broken and entry.is_dir():
            contents.folders.append(entry.name)
        elif os.path.splitext(entry.name)[1].lower() not in suffixes:
            contents.others.append(entry.name)
        elif broken or entry.is_file():
            contents.images.append(image_file(entry.name, entry.stat(follow_symlinks=not broken)))
    return Contents(*map(sorted, contents))


def image_file(name: str, status: os.stat_result) -> ImageFile:
    """A file as the folder lists it."""
    return ImageFile(name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def is_broken(entry: os.DirEntry) -> bool:
    """Whether an entry of a folder is a broken symbolic link."""
    return entry.is_symlink() and not os.path.exists(entry.path)


@contextlib.contextmanager
def open_image(file: str | BinaryIO, formats: Sequence[str]) -> Iterator[Image.Image]:
    """Opens an image, to be decoded within this context. Of large images only one is open at a time, so that the memory that
    several threads need does not grow with their number.
    """
    with Image.open(file, formats=formats) as image:
        with _large_image if math.prod(image.size) > LARGE_PIXELS else contextlib.nullcontext():
            yield image


def decode_images(paths: Sequence[str], image_shape: tuple[int, int, int], resize: bool, hint: str,
                  progress_label: str) -> Iterator[np.ndarray]:
    """Decodes image files on all cores, to grey for one channel and to RGB for three.

    Yields uint8 arrays [count, *image_shape], in the order of `paths`, CHUNK_BYTES or one image at a time.

    Args:
        image_shape: (height, width, channels).
        resize: True: turn images upright, put transparent ones on white and resize them with a Lanczos filter, not keeping
            the aspect ratio. False: refuse images of another size.
        hint: what to do about a bad image; the end of the error message.

    Raises BadImages if some files are not images or have another size; all have been tried.
    """
    height, width, channels = image_shape
    formats = available_formats(USER_FORMATS if resize else PREPARED_FORMATS)

    def decode(path):
        try:
            require_regular_file(path)
            with open_image(path, formats) as image:
                file_format, tags = image.format, getattr(image, 'tag_v2', {})
                image = _on_white(ImageOps.exif_transpose(_with_scaled_transparency(image))) if resize else image
                size, pixels = image.size, _eight_bits(image, file_format, tags).convert('L' if channels == 1 else 'RGB')
                if resize and size != (width, height):
                    size, pixels = (width, height), pixels.resize((width, height), Image.Resampling.LANCZOS)
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises almost any exception on damaged images
            bad.append((path, f'cannot be read as an image ({error})'))
            return None
        if size != (width, height):
            bad.append((path, f'is {size[0]}x{size[1]} pixels, not {width}x{height}'))
            return None
        return np.asarray(pixels).reshape(image_shape)

    per_chunk, bad = max(1, CHUNK_BYTES // math.prod(image_shape)), []
    with ThreadPoolExecutor() as pool, tqdm(desc=progress_label, total=len(paths), unit=' images', leave=False,
                                            disable=None) as progress:
        for start in range(0, len(paths), per_chunk):
            chunk = list(pool.map(decode, paths[start:start + per_chunk]))
            progress.update(len(chunk))
            if not bad:
                yield np.stack(chunk)
    if bad:
        raise BadImages(sorted(bad), hint)


def _with_scaled_transparency(image):
    """An opened image. Pillow scales the pixels of PNG files of 2, 4 or 3 x 16 bits to 8 bits, but not the transparent value."""
    kind = image.tile[0][3] if image.format == 'PNG' and image.tile else None
    scaled = {'L;2': lambda grey: 85 * grey, 'L;4': lambda grey: 17 * grey, 'RGB;16B': lambda colour: tuple(value >> 8 for value in colour)}
    if kind in scaled and 'transparency' in image.info:
        image.info['transparency'] = scaled[kind](image.info['transparency'])
    return image


def _on_white(image):
    """The image on a white background, if it is transparent anywhere."""
    if image.mode not in ('RGBA', 'LA', 'PA', 'RGBa', 'La') and 'transparency' not in image.info:
        return image
    if image.mode.startswith('I'):  # 16-bit grey with one transparent value
        grey = np.asarray(image)
        return Image.fromarray(np.where(grey == image.info['transparency'], 65535, grey).astype(np.int32))
    image = image.convert('RGBA')
    return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)


def resized(images: np.ndarray, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Decoded images, uint8 [..., height, width, channels], resized as by `decode_images`, and made grey or RGB."""
    height, width, channels = image_shape
    grey = images.shape[-1] == 1
    small = [Image.fromarray(image[..., 0] if grey else image).convert('L' if channels == 1 else 'RGB').resize(
        (width, height), Image.Resampling.LANCZOS) for image in images.reshape(-1, *images.shape[-3:])]
    return np.stack(small).reshape(*images.shape[:-3], *image_shape)


def _eight_bits(image, file_format, tags):
    """Grey images of 9 to 16 bits, which Pillow would clip, scaled to 8 bits; raises ValueError for other numbers than of 8 to 16 bits.
    `tags` are those of a TIFF."""
    if image.mode == 'F':
        raise ValueError('its pixels are floating-point numbers, of unknown range')
    if image.mode == 'I' and file_format not in ('PNG', 'PPM'):  # which Pillow reads as 32 bits, and which have 16
        raise ValueError('its pixels are 32-bit numbers, of unknown range')
    if image.mode.startswith('I'):
        bits, white_is_zero = tags.get(BITS_PER_SAMPLE, (16,))[0], tags.get(PHOTOMETRIC) == 0
        values = np.asarray(image).clip(0, 2 ** bits - 1).astype(np.int64) * 255 // (2 ** bits - 1)
        return Image.fromarray((255 - values if white_is_zero else values).astype(np.uint8))
    return image
