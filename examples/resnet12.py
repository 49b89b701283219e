"""ResNet-12, the usual network of few-shot papers after Conv-4, for images of any size from 16 pixels.

narrow: 64-128-256-512 filters, 8.0 million weights (TADAM: Oreshkin et al., 2018, arXiv:1805.10123).
wide: 64-160-320-640 filters, 12.4 million (MetaOptNet: Lee et al., 2019, arXiv:1904.03758).
small: 16-32-64-128 filters, 0.5 million, for a CPU.
wide_dropblock: with DropBlock (Ghiasi et al., 2018, arXiv:1810.12890) in the last two blocks.
"""
import math

import keras
from keras import layers


def small(input_shape, outputs):
    return resnet12(input_shape, outputs, (16, 32, 64, 128))


def narrow(input_shape, outputs):
    return resnet12(input_shape, outputs, (64, 128, 256, 512))


def wide(input_shape, outputs):
    return resnet12(input_shape, outputs, (64, 160, 320, 640))


def wide_dropblock(input_shape, outputs):
    return resnet12(input_shape, outputs, (64, 160, 320, 640), drop=0.1)


def resnet12(input_shape, outputs, filters, drop=0.):
    """Four residual blocks, the mean over space, and a linear layer.

    A block: three 3x3 convolutions without bias, each with batch norm, leaky ReLU 0.1 between them; a 1x1 shortcut with batch norm;
    after their sum leaky ReLU and 2x2 pooling; then DropBlock in the last two, if `drop`, the fraction that is dropped, is not 0.
    """
    x = inputs = keras.Input(input_shape)
    for number, size in enumerate(filters, start=1):
        y = x
        for part in 'abc':
            y = layers.Conv2D(size, 3, padding='same', use_bias=False, name=f'block{number}_conv_{part}')(y)
            y = layers.BatchNormalization(epsilon=1e-5, name=f'block{number}_norm_{part}')(y)
            y = layers.LeakyReLU(0.1)(y) if part != 'c' else y
        x = layers.Conv2D(size, 1, use_bias=False, name=f'block{number}_shortcut')(x)
        x = layers.BatchNormalization(epsilon=1e-5, name=f'block{number}_shortcut_norm')(x)
        x = layers.MaxPooling2D(2)(layers.LeakyReLU(0.1)(layers.Add()([x, y])))
        if drop and number > 2:
            x = DropBlock(drop, 5, name=f'block{number}_drop')(x)
    return keras.Model(inputs, layers.Dense(outputs, name='head')(layers.GlobalAveragePooling2D()(x)))


class DropBlock(layers.Layer):
    """Sets squares of a channel to 0 in training, and scales the rest up: [rows, height, width, channels]."""

    def __init__(self, rate, size, **kwargs):
        super().__init__(**kwargs)
        self.rate, self.size, self.seeds = rate, size, keras.random.SeedGenerator()

    def call(self, x, training=False):
        if not training:
            return x
        height, width = x.shape[1:3]
        size = min(self.size, height, width)
        # A square starts at each position where a whole one fits, so often that about `rate` of all numbers are dropped.
        places = height - size + 1, width - size + 1
        starts = keras.random.uniform((keras.ops.shape(x)[0], *places, x.shape[3]), dtype=x.dtype, seed=self.seeds) < (
            self.rate * height * width / size ** 2 / math.prod(places))
        padded = keras.ops.pad(keras.ops.cast(starts, x.dtype), [(0, 0), (size - 1, size - 1), (size - 1, size - 1), (0, 0)])
        dropped = keras.ops.max_pool(padded, size, 1, 'valid')
        kept = 1 - dropped
        return x * kept / keras.ops.maximum(keras.ops.mean(kept), 1e-6)
