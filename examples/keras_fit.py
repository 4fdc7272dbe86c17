"""Keras model.fit that can be killed at any batch and started again: python keras_fit.py [DIRECTORY] [--epochs N]"""

from __future__ import annotations

import argparse
import logging
import math

import keras
import numpy as np
from digits import BATCH_SIZE, images
from keras import layers

from polyckpt.adapters.keras import BackupAndRestore, EarlyStopping, ModelCheckpoint


class Shuffled(keras.utils.PyDataset):
    """The order of an epoch is drawn from NumPy's random state, which is in the backup; that of tf.data cannot be read."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        super().__init__()
        self.x, self.y, self.order = x, y, np.arange(len(x))

    def __len__(self) -> int:
        return math.ceil(len(self.x) / BATCH_SIZE)

    def __getitem__(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.order[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE]
        return self.x[rows], self.y[rows]

    def on_epoch_begin(self) -> None:
        self.order = np.random.permutation(len(self.x))


def build() -> keras.Model:
    model = keras.Sequential([
        layers.Input((8, 8, 1)), layers.Conv2D(16, 3, padding="same", activation="relu"), layers.MaxPooling2D(2),
        layers.Flatten(), layers.Dropout(0.3), layers.Dense(64, activation="relu"), layers.Dense(10),
    ])  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(3e-3), loss, metrics=["accuracy"])
    return model


def main(directory: str, epochs: int) -> None:
    train, validation = images()
    keras.utils.set_random_seed(0)
    model = build()

    plateau = keras.callbacks.ReduceLROnPlateau(patience=2, factor=0.5)
    callbacks = [
        plateau,
        ModelCheckpoint(f"{directory}/best.keras", save_best_only=True),
        EarlyStopping(patience=5, min_delta=1e-4, directory=f"{directory}/early_stopping"),
        # Last, so that the others have seen the end of an epoch before it is backed up.
        BackupAndRestore(f"{directory}/backup", save_freq=10, delete_checkpoint=False, callbacks=[plateau]),
    ]
    model.fit(Shuffled(*train), epochs=epochs, validation_data=validation, callbacks=callbacks, verbose=2)

    best = keras.saving.load_model(f"{directory}/best.keras")
    _, accuracy = best.evaluate(*validation, verbose=0)
    print(f"best: val_accuracy {accuracy:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", default="runs/keras_fit", help="where the backup and the best model are")
    parser.add_argument("--epochs", type=int, default=20)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    main(**vars(parser.parse_args()))
