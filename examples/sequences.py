"""Networks on sequences: tables whose columns are the numbers of each moment, one moment after the other, as --input_shape=6,3."""
import keras
from keras import layers


def gru(input_shape, outputs, units=32):
    """A recurrent network; the state after the last moment goes into a linear layer."""
    return keras.Sequential([keras.Input(input_shape), layers.GRU(units, name='gru'), layers.Dense(outputs, name='head')])


def transformer(input_shape, outputs, width=32, heads=4, blocks=2):
    """Blocks of attention and a hidden layer, with layer norm before each; learned positions; the mean over moments; a linear layer."""
    x = inputs = keras.Input(input_shape)
    x = Positions(name='positions')(layers.Dense(width, name='embed')(x))
    for number in range(1, blocks + 1):
        y = layers.LayerNormalization(name=f'norm{number}_a')(x)
        x = layers.Add()([x, layers.MultiHeadAttention(heads, width // heads, name=f'attention{number}')(y, y)])
        y = layers.LayerNormalization(name=f'norm{number}_b')(x)
        y = layers.Dense(2 * width, activation='gelu', name=f'hidden{number}')(y)
        x = layers.Add()([x, layers.Dense(width, name=f'back{number}')(y)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization(name='norm')(x))
    return keras.Model(inputs, layers.Dense(outputs, name='head')(x))


class Positions(layers.Layer):
    """Adds a learned vector for each position: [rows, positions, width]."""

    def build(self, shape):
        self.vectors = self.add_weight(shape=shape[1:], initializer=keras.initializers.RandomNormal(stddev=0.02), name='vectors')

    def call(self, x):
        return x + self.vectors
