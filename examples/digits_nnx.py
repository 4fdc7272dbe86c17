"""A Flax nnx loop that can be killed at any moment: python digits_nnx.py RUN_DIRECTORY [EPOCHS]"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import STEPS_PER_EPOCH, batches, images
from flax import nnx

import polyckpt

run, epochs = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4
(x, y), (x_val, y_val) = images()


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.hidden = nnx.Linear(16 * 4 * 4, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), strides=(2, 2))
        x = self.dropout(nnx.relu(self.hidden(self.dropout(x.reshape(len(x), -1)))))
        return self.head(x)


def cross_entropy(model: Net, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model: Net, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(cross_entropy)(model, x, y)
    optimizer.update(model, gradients)
    return loss


random.seed(0)
np.random.seed(0)
model = Net(nnx.Rngs(params=0, dropout=1))
schedule = optax.cosine_decay_schedule(3e-3, epochs * STEPS_PER_EPOCH)
optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)

epoch, batch, total, metrics = 0, 0, 0.0, {}
if (run / "last").exists():
    restored = polyckpt.load(run / "last", model, optimizer)
    epoch, batch, total, metrics = restored.epoch, restored.batch, restored.extra["loss_total"], restored.metrics
    print(f"nnx: resumed in epoch {epoch + 1} after {batch} batches", flush=True)

for epoch in range(epoch, epochs):
    model.train()
    for batch, rows in batches(epoch, batch):
        total += float(train_step(model, optimizer, x[rows], y[rows]))
        polyckpt.save(
            run / "last", model, optimizer, epoch=epoch, batch=batch + 1, step=epoch * STEPS_PER_EPOCH + batch + 1,
            metrics=metrics, extra={"loss_total": total}, overwrite=True,
        )  # fmt: skip
    model.eval()
    logits = model(jnp.asarray(x_val))
    metrics = {
        "loss": total / STEPS_PER_EPOCH,
        "val_loss": float(optax.softmax_cross_entropy_with_integer_labels(logits, y_val).mean()),
        "val_accuracy": float((logits.argmax(-1) == y_val).mean()),
    }
    batch, total = 0, 0.0
    print(f"nnx: epoch {epoch + 1}/{epochs} " + " ".join(f"{k} {v:.4f}" for k, v in metrics.items()), flush=True)

polyckpt.save(run / "final", model, optimizer, epoch=epochs, metrics=metrics, overwrite=True)
