"""A Flax linen training loop with a TrainState that can be started again: python linen_loop.py [DIRECTORY] [--epochs N]"""

from __future__ import annotations

import argparse
import functools
import logging
from typing import Any

import jax
import numpy as np
import optax
from digits import BATCH_SIZE, STEPS_PER_EPOCH, images
from flax import linen as nn
from flax.training import train_state

import polyckpt


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.max_pool(nn.relu(nn.Conv(16, (3, 3))(x)), (2, 2), strides=(2, 2)).reshape(len(x), -1)
        x = nn.Dropout(0.3, deterministic=not train)(x)
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


class TrainState(train_state.TrainState):
    key: jax.Array


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def train_step(state: TrainState, x: jax.Array, y: jax.Array) -> tuple[TrainState, jax.Array]:
    def loss_fn(params: dict[str, Any]) -> jax.Array:
        dropout_key = jax.random.fold_in(state.key, state.step)
        return cross_entropy(state.apply_fn({"params": params}, x, train=True, rngs={"dropout": dropout_key}), y)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


@jax.jit
def evaluate(state: TrainState, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = state.apply_fn({"params": state.params}, x, train=False)
    return cross_entropy(logits, y), (logits.argmax(-1) == y).mean()


def main(directory: str, epochs: int) -> None:
    (x, y), validation = images()
    params_key, dropout_key, data_key = jax.random.split(jax.random.key(0), 3)
    model = CNN()
    params = jax.jit(functools.partial(model.init, train=False))(params_key, x[:1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(3e-3), key=dropout_key)

    with polyckpt.CheckpointManager(
        directory, monitor="val_loss", mode="min", keep_best=3, keep_last=2, patience=5, min_delta=1e-4, async_save=True
    ) as ckpts:
        start = ckpts.restore(state, extra={"data_key": data_key})
        state, data_key = start.model, start.extra["data_key"]  # values of JAX come back new
        for epoch in range(start.epoch, epochs):
            if ckpts.should_stop:
                break
            data_key, shuffle_key = jax.random.split(data_key)
            order = jax.random.permutation(shuffle_key, len(x))[: STEPS_PER_EPOCH * BATCH_SIZE]
            losses = []
            for rows in np.asarray(order).reshape(STEPS_PER_EPOCH, BATCH_SIZE):
                state, loss = train_step(state, x[rows], y[rows])
                losses.append(loss)
            val_loss, val_acc = map(float, evaluate(state, *validation))
            print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}, val_loss {val_loss:.4f}, val_acc {val_acc:.4f}", flush=True)
            metrics = {"val_loss": val_loss, "val_acc": val_acc}
            ckpts.save(state, epoch=epoch + 1, step=int(state.step), metrics=metrics, extra={"data_key": data_key})
        best = ckpts.restore_best(state)

    _, accuracy = evaluate(best.model, *validation)
    print(f"best: epoch {best.epoch}, val_acc {accuracy:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", default="runs/linen_loop", help="where the checkpoints are")
    parser.add_argument("--epochs", type=int, default=30)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    main(**vars(parser.parse_args()))
