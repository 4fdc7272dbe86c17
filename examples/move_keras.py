"""The digits go on in Keras, whoever began: python move_keras.py RUN_DIRECTORY FIRST_EPOCH EPOCHS OF_ALL"""

from __future__ import annotations

import sys
from pathlib import Path

import keras
from digits import STEPS_PER_EPOCH, batches, images
from keras import layers

import polyckpt

run, (first, epochs, of_all) = Path(sys.argv[1]), map(int, sys.argv[2:5])
x, y = images()[0]

model = keras.Sequential([
    layers.Input((8, 8, 1)), layers.Conv2D(16, 3, padding="same", activation="relu"), layers.MaxPooling2D(2),
    layers.Flatten(), layers.Dense(64, activation="relu"), layers.Dense(10),
])  # fmt: skip
model.compile(
    keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(3e-3, of_all * STEPS_PER_EPOCH)),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
restored = polyckpt.load(run / "last", model, continuation="exact")
print(restored.report)

losses = list(restored.extra["losses"])
for epoch in range(first, epochs):
    for _, rows in batches(epoch, 0):
        model.reset_metrics()
        losses.append(float(model.train_on_batch(x[rows], y[rows], return_dict=True)["loss"]))

step = epochs * STEPS_PER_EPOCH
polyckpt.save(run / "last", model, epoch=epochs, step=step, extra={"losses": losses}, probe=x[:4], overwrite=True)
