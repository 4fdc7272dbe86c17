"""A Flax nnx training loop that can be stopped in mid-epoch and started again: python nnx_loop.py [DIRECTORY] [--epochs N]"""

from __future__ import annotations

import argparse
import logging

import jax
import optax
from digits import batches, images
from flax import nnx

import polyckpt


class CNN(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.hidden = nnx.Linear(16 * 4 * 4, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), strides=(2, 2))
        return self.head(nnx.relu(self.hidden(self.dropout(x.reshape(len(x), -1)))))


def loss_fn(model: CNN, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = model(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), logits


@nnx.jit
def train_step(model: CNN, optimizer: nnx.Optimizer, average: nnx.metrics.Average, x: jax.Array, y: jax.Array) -> None:
    (loss, _), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, x, y)
    average.update(loss=loss)
    optimizer.update(model, grads)


@nnx.jit
def evaluate(model: CNN, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    loss, logits = loss_fn(model, x, y)
    return loss, (logits.argmax(-1) == y).mean()


def main(directory: str, epochs: int) -> None:
    (x, y), validation = images()
    model = CNN(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    average = nnx.metrics.Average("loss")

    every = polyckpt.Every(epochs=1, minutes=10)
    with polyckpt.CheckpointManager(
        directory, monitor="val_loss", mode="min", keep_best=3, keep_last=2, every=every, patience=5, min_delta=1e-4,
        preemption=True,
    ) as ckpts:  # fmt: skip
        start = ckpts.restore(model, optimizer, extra={"average": average})
        step, consumed = start.step, start.batch or 0
        for epoch in range(start.epoch, epochs):
            if ckpts.should_stop:
                break
            model.train()
            for batch, rows in batches(epoch, consumed):
                train_step(model, optimizer, average, x[rows], y[rows])
                step += 1
                # It saves when ten minutes have passed or SIGTERM has come, and costs next to nothing otherwise.
                ckpts.save(model, optimizer, epoch=epoch, batch=batch + 1, step=step, extra={"average": average})
            consumed, loss = 0, average.compute()
            average.reset()
            model.eval()
            val_loss, val_acc = map(float, evaluate(model, *validation))
            print(f"epoch {epoch + 1}: loss {loss:.4f}, val_loss {val_loss:.4f}, val_acc {val_acc:.4f}", flush=True)
            metrics = {"val_loss": val_loss, "val_acc": val_acc}
            ckpts.save(model, optimizer, epoch=epoch + 1, step=step, metrics=metrics, extra={"average": average})
        best = ckpts.restore_best(model)

    model.eval()
    _, accuracy = evaluate(model, *validation)
    print(f"best: epoch {best.epoch}, val_acc {accuracy:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", default="runs/nnx_loop", help="where the checkpoints are")
    parser.add_argument("--epochs", type=int, default=30)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    main(**vars(parser.parse_args()))
