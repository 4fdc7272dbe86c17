"""A Keras loop that can be killed at any moment: python digits_keras.py RUN_DIRECTORY [EPOCHS]"""

from __future__ import annotations

import sys
from pathlib import Path

import keras
from digits import STEPS_PER_EPOCH, batches, images
from keras import layers

import polyckpt

run, epochs = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4
(x, y), (x_val, y_val) = images()

keras.utils.set_random_seed(0)
model = keras.Sequential([
    layers.Input((8, 8, 1)), layers.Conv2D(16, 3, padding="same", activation="relu"), layers.BatchNormalization(),
    layers.MaxPooling2D(2), layers.Flatten(), layers.Dropout(0.3), layers.Dense(64, activation="relu"),
    layers.Dropout(0.3), layers.Dense(10),
])  # fmt: skip
model.compile(
    keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(3e-3, epochs * STEPS_PER_EPOCH)),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)

epoch, batch, total, metrics = 0, 0, 0.0, {}
if (run / "last").exists():
    restored = polyckpt.load(run / "last", model)
    epoch, batch, total, metrics = restored.epoch, restored.batch, restored.extra["loss_total"], restored.metrics
    print(f"keras: resumed in epoch {epoch + 1} after {batch} batches", flush=True)

for epoch in range(epoch, epochs):
    for batch, rows in batches(epoch, batch):
        model.reset_metrics()
        total += float(model.train_on_batch(x[rows], y[rows], return_dict=True)["loss"])
        polyckpt.save(
            run / "last", model, epoch=epoch, batch=batch + 1, step=epoch * STEPS_PER_EPOCH + batch + 1,
            metrics=metrics, extra={"loss_total": total}, overwrite=True,
        )  # fmt: skip
    validated = model.evaluate(x_val, y_val, verbose=0, return_dict=True)
    metrics = {"loss": total / STEPS_PER_EPOCH, "val_loss": validated["loss"], "val_accuracy": validated["accuracy"]}
    batch, total = 0, 0.0
    print(f"keras: epoch {epoch + 1}/{epochs} " + " ".join(f"{k} {v:.4f}" for k, v in metrics.items()), flush=True)

polyckpt.save(run / "final", model, epoch=epochs, metrics=metrics, overwrite=True)
