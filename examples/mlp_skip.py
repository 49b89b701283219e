"""A fully connected network with skip connections, for tables and functions."""
import keras
from keras import layers


def mlp_skip(input_shape, outputs, width=40, blocks=2):
    """Blocks of two layers, each block added to its input; gelu, no normalisation."""
    x = inputs = keras.Input(input_shape)
    x = layers.Dense(width, name='first')(x)
    for number in range(1, blocks + 1):
        y = layers.Dense(width, activation='gelu', name=f'block{number}_a')(x)
        y = layers.Dense(width, name=f'block{number}_b')(y)
        x = layers.Add()([x, y])
    return keras.Model(inputs, layers.Dense(outputs, name='head')(layers.Activation('gelu')(x)))
