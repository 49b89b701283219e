"""Conv-4, the network of the paper, in ten lines of Keras: its meta-gradient is that of this program's own to the last digits."""
import keras
from keras import layers


def conv4(input_shape, outputs, filters=32):
    """Four blocks of 3x3 convolution, batch norm, ReLU and 2x2 pooling, and a linear layer (`--num_filters=32 --max_pool=True`)."""
    model = keras.Sequential([keras.Input(input_shape)])
    for number in range(1, 5):
        model.add(layers.Conv2D(filters, 3, padding='same', name=f'conv{number}'))
        model.add(layers.BatchNormalization(scale=False, name=f'norm{number}'))
        model.add(layers.ReLU())
        model.add(layers.MaxPooling2D(2))
    model.add(layers.Flatten())
    model.add(layers.Dense(outputs, name='head'))
    return model
