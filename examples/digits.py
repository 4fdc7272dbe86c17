"""The handwritten digits that ship inside scikit-learn, and an order of batches that depends on the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from sklearn.datasets import load_digits

BATCH_SIZE = 64
TRAIN_SIZE = 1500
STEPS_PER_EPOCH = TRAIN_SIZE // BATCH_SIZE


def images() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(train, validation) pairs of images (n, 8, 8, 1), float32 in [0, 1], and labels (n,), int32."""
    bunch = load_digits()
    x = (bunch.images[..., None] / 16).astype("float32")
    y = bunch.target.astype("int32")
    order = np.random.default_rng(0).permutation(len(x))
    train, validation = order[:TRAIN_SIZE], order[TRAIN_SIZE:]
    return (x[train], y[train]), (x[validation], y[validation])


def batches(epoch: int, first: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number, row indices) of the batches of an epoch, without the `first` ones, which are consumed already."""
    order = np.random.default_rng([1, epoch]).permutation(TRAIN_SIZE)
    for batch in range(first, STEPS_PER_EPOCH):
        yield batch, order[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE]
