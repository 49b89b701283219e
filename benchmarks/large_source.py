"""Start-up and memory on a generated source of many images, in packed arrays.

    python benchmarks/large_source.py [--images=200000] [--folder=/tmp/large_source]

Writes tieredImageNet-like arrays of that many random images, then loads its training split and draws tasks in two separate
processes: as a training does, and with --verify. Prints seconds and the peak of resident memory that is not shared
file pages.
"""
import argparse
import dataclasses
import subprocess
import sys
import time

import numpy as np

from workloads import anonymous_megabytes

SHAPE, PER_CLASS = (84, 84, 3), 1000


def write(folder: str, images: int) -> None:
    """Packs images of noise, each of one of 256 patterns."""
    from data import packing, preparation
    patterns = np.random.default_rng(0).integers(0, 256, (256, *SHAPE), np.uint8)
    names = [f'train/class{number:04d}' for number in range(images // PER_CLASS)]
    args = preparation.arguments('', '', folder).parse_args([])
    packing.pack({name: packing.ImageList(PER_CLASS, lambda number: patterns[number % 256]) for name in names},
                 {name: preparation.Class('train', PER_CLASS) for name in names}, SHAPE, args)


def load(folder: str, verify: bool) -> None:
    """Loads and draws as a training does; prints time and memory."""
    from data_generator import SOURCES, TaskConfig
    source = dataclasses.replace(SOURCES['tieredimagenet'], verify=verify)
    before, start = anonymous_megabytes(), time.perf_counter()
    tasks = source.tasks(TaskConfig(num_classes=5, update_batch_size=1, query_shots=15, seed=0, data_path=folder), 'train')
    loaded, start_drawing = time.perf_counter() - start, time.perf_counter()
    for batch in range(100):
        tasks.draw(4 * batch, 4)
    drawing = (time.perf_counter() - start_drawing) / 100
    print(f'{len(tasks.classes.values):,} images{", --verify" * verify}: {loaded:.3f} s until they can be drawn from, '
          f'{drawing * 1000:.1f} ms for a meta-batch of 4 tasks, {anonymous_megabytes() - before:.0f} MB more memory')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=200_000)
    parser.add_argument('--folder', default='/tmp/large_source')
    parser.add_argument('--load', choices=['as usual', 'verify'], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.folder, args.load == 'verify')
    else:
        started = time.perf_counter()
        write(args.folder, args.images)
        print(f'written in {time.perf_counter() - started:.0f} s')
        for how in 'as usual', 'verify':
            subprocess.run([sys.executable, __file__, f'--folder={args.folder}', f'--load={how}'], check=True)
