"""Begin in PyTorch, go on in Keras on JAX, end in Flax nnx, and compare the losses with a run that never left PyTorch.

Two epochs in each framework, every one in a process of its own, with nothing but a checkpoint between them: weights, moments,
step and learning rate of AdamW under a cosine schedule. Writes both curves as a picture. Exits with 1 if they differ by more
than what float32 rounds.

usage: python examples/move.py [PICTURE.png]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
from digits import STEPS_PER_EPOCH
from rich.console import Console
from rich.table import Table

import polyckpt

EXAMPLES = Path(__file__).parent
EPOCHS = 6
LEGS = [("torch", "PyTorch"), ("keras", "Keras on JAX"), ("nnx", "Flax nnx")]
BOUND = 1e-4
"""Rounding grows from step to step; measured are 2e-6, and a lost moment or rate costs 1e-2 and more."""


def train(framework: str, run: Path, first: int, epochs: int) -> None:
    """Some epochs in a framework, in a process of its own. Stops with its errors if it fails."""
    environment = {**os.environ, "KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / f"move_{framework}.py"), str(run), str(first), str(epochs), str(EPOCHS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command} exited with {done.returncode}\n{done.stdout}{done.stderr}")


def losses(run: Path) -> np.ndarray:
    """The loss of every step so far."""
    return np.array(polyckpt.inspect(run / "last").manifest.native["extra"]["losses"]["state"])


def draw(stayed: np.ndarray, moved: np.ndarray, picture: Path) -> None:
    """Both curves, and the difference below."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 6), height_ratios=(3, 1), layout="constrained")
    above.plot(stayed, color="0.7", linewidth=5, label="PyTorch all the way")
    each = len(moved) // len(LEGS)
    for index, (_, name) in enumerate(LEGS):
        steps = range(index * each, (index + 1) * each)
        above.plot(steps, moved[steps.start : steps.stop], linewidth=1.5, label=name)
        below.axvline(steps.start, color="0.8", linewidth=0.8)
        above.axvline(steps.start, color="0.8", linewidth=0.8)
    above.set(ylabel="training loss", title="One run of AdamW, three frameworks")
    above.legend()
    below.semilogy(np.maximum(np.abs(moved - stayed), 1e-9), color="black", linewidth=0.8)
    below.set(xlabel="step", ylabel="|difference|")
    figure.savefig(picture, dpi=120)


def main(picture: Path) -> int:
    console = Console(width=max(100, Console().width))
    with tempfile.TemporaryDirectory() as directory:
        stay, go = Path(directory, "stay"), Path(directory, "go")
        console.print("[bold]PyTorch[/bold], all the way")
        train("torch", stay, 0, EPOCHS)
        for index, (framework, name) in enumerate(LEGS):
            first = index * EPOCHS // len(LEGS)
            console.print(f"[bold]{name}[/bold], epochs {first + 1} to {first + EPOCHS // len(LEGS)}")
            train(framework, go, first, first + EPOCHS // len(LEGS))
        stayed, moved = losses(stay), losses(go)
    table = Table(title="A run that moves from PyTorch to Keras to Flax, and one that stays")
    for column in ("epoch", "in", "loss, stayed", "loss, moved", "largest difference of a step"):
        table.add_column(column)
    for epoch in range(EPOCHS):
        part = slice(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
        apart = np.abs(stayed[part] - moved[part]).max()
        name = LEGS[epoch * len(LEGS) // EPOCHS][1]
        table.add_row(str(epoch + 1), name, f"{stayed[part].mean():.6f}", f"{moved[part].mean():.6f}", f"{apart:.1e}")
    console.print(table)
    draw(stayed, moved, picture)
    largest = float(np.abs(stayed - moved).max())
    right = len(stayed) == len(moved) == EPOCHS * STEPS_PER_EPOCH and largest < BOUND and stayed[-1] < stayed[0] / 3
    console.print(
        f"{picture.resolve()}: largest difference {largest:.1e}, {'as it should be' if right else f'[red]more than {BOUND}'}"
    )
    return int(not right)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "moved.png")))
