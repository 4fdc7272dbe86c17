"""The digits go on in Flax nnx, whoever began: python move_nnx.py RUN_DIRECTORY FIRST_EPOCH EPOCHS OF_ALL"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import optax
from digits import STEPS_PER_EPOCH, batches, images
from flax import nnx

import polyckpt

run, (first, epochs, of_all) = Path(sys.argv[1]), map(int, sys.argv[2:5])
x, y = images()[0]


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(16 * 4 * 4, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.conv(x)), (2, 2), strides=(2, 2))
        return self.head(nnx.relu(self.hidden(x.reshape(len(x), -1))))


@nnx.jit
def train_step(model: Net, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    def cross_entropy(model: Net) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, gradients = nnx.value_and_grad(cross_entropy)(model)
    optimizer.update(model, gradients)
    return loss


model = Net(nnx.Rngs(1))
tx = optax.adamw(optax.cosine_decay_schedule(3e-3, of_all * STEPS_PER_EPOCH), weight_decay=0.01)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
restored = polyckpt.load(run / "last", model, optimizer)
print(restored.report)

losses = list(restored.extra["losses"])
for epoch in range(first, epochs):
    for _, rows in batches(epoch, 0):
        losses.append(float(train_step(model, optimizer, x[rows], y[rows])))

step = epochs * STEPS_PER_EPOCH
polyckpt.save(run / "last", model, optimizer, epoch=epochs, step=step, extra={"losses": losses}, overwrite=True)
