"""One-dimensional convolutions on signals: tables whose columns are samples in time, as --input_shape=64,1."""
import keras
from keras import layers


def conv1d(input_shape, outputs, filters=32):
    """Three blocks of convolution over five samples, batch norm, ReLU and pooling; the mean over time; a linear layer."""
    model = keras.Sequential([keras.Input(input_shape)])
    for number in range(1, 4):
        model.add(layers.Conv1D(filters, 5, padding='same', use_bias=False, name=f'conv{number}'))
        model.add(layers.BatchNormalization(name=f'norm{number}'))
        model.add(layers.ReLU())
        model.add(layers.MaxPooling1D(2, padding='same'))
    model.add(layers.GlobalAveragePooling1D())
    model.add(layers.Dense(outputs, name='head'))
    return model
