"""A custom Keras training loop, on any backend, that can be started again: python keras_loop.py [DIRECTORY] [--epochs N]"""

from __future__ import annotations

import argparse
import logging

import keras
import numpy as np
from digits import BATCH_SIZE, images
from keras import layers

import polyckpt


def build() -> keras.Model:
    model = keras.Sequential([
        layers.Input((8, 8, 1)), layers.Conv2D(16, 3, padding="same", activation="relu"), layers.MaxPooling2D(2),
        layers.Flatten(), layers.Dropout(0.3), layers.Dense(64, activation="relu"), layers.Dense(10),
    ])  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(3e-3), loss, metrics=["accuracy"])
    return model


def main(directory: str, epochs: int) -> None:
    (x, y), validation = images()
    keras.utils.set_random_seed(0)
    model = build()

    ckpts = polyckpt.CheckpointManager(
        directory, monitor="val_loss", mode="min", keep_best=3, keep_last=2, patience=5, min_delta=1e-4
    )
    start = ckpts.restore(model)  # the optimizer is the one that the model was compiled with
    for epoch in range(start.epoch, epochs):
        if ckpts.should_stop:
            break
        # NumPy's random state is part of every checkpoint, and so is the order of the batches.
        order = np.random.permutation(len(x))
        losses = []
        for first in range(0, len(x), BATCH_SIZE):
            rows = order[first : first + BATCH_SIZE]
            losses.append(model.train_on_batch(x[rows], y[rows], return_dict=True)["loss"])
        val = model.evaluate(*validation, verbose=0, return_dict=True)
        print(
            f"epoch {epoch + 1}: loss {np.mean(losses):.4f}, val_loss {val['loss']:.4f}, val_acc {val['accuracy']:.4f}",
            flush=True,
        )
        metrics = {"val_loss": val["loss"], "val_acc": val["accuracy"]}
        ckpts.save(model, epoch=epoch + 1, step=int(model.optimizer.iterations), metrics=metrics)

    best = ckpts.restore_best(model)
    accuracy = model.evaluate(*validation, verbose=0, return_dict=True)["accuracy"]
    print(f"best: epoch {best.epoch}, val_acc {accuracy:.4f}")
    ckpts.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", default="runs/keras_loop", help="where the checkpoints are")
    parser.add_argument("--epochs", type=int, default=20)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    main(**vars(parser.parse_args()))
