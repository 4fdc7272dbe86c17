"""Kill a training run in PyTorch, Keras and JAX in the middle of an epoch, resume it, and compare every bit.

For each framework one child process trains without interruption. Another trains the same, is killed with SIGKILL in the
middle of an epoch while it writes a checkpoint, is started again and finishes. Then the two final checkpoints are compared:
weights, optimizer slots, random states, metrics. Exits with 1 if one bit differs.

usage: python examples/demo.py [torch] [keras] [nnx]
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from digits import STEPS_PER_EPOCH
from rich.console import Console
from rich.table import Table

import polyckpt

EXAMPLES = Path(__file__).parent
FRAMEWORKS = {"torch": "PyTorch", "keras": "Keras", "nnx": "JAX (Flax nnx)"}
EPOCHS = 3
KILL_TIMEOUT_S = 300


@dataclass(frozen=True)
class Killed:
    """Where a run was killed: completed epochs, batches of the next one, and whether a checkpoint was half written."""

    epoch: int
    batch: int
    while_saving: bool


def start(framework: str, run: Path) -> subprocess.Popen[bytes]:
    """A child process that trains, resuming from what is in `run`."""
    # TensorFlow's parallel sums are not reproducible by themselves, and a comparison of bits needs a run that is.
    defaults = {"KERAS_BACKEND": "tensorflow", "TF_DETERMINISTIC_OPS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment = {**defaults, **os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / f"digits_{framework}.py"), str(run), str(EPOCHS)]
    return subprocess.Popen(command, env=environment, stderr=None if os.environ.get("DEMO_VERBOSE") else subprocess.PIPE)


def finish(child: subprocess.Popen[bytes]) -> None:
    """Wait for a child; stops the demo with its errors if it failed."""
    _, errors = child.communicate()
    if child.returncode:
        sys.exit(f"{child.args} exited with {child.returncode}\n{(errors or b'').decode()}")


def kill_while_saving(child: subprocess.Popen[bytes], run: Path, step: int) -> Killed:
    """SIGKILL the child when it has passed `step`, is inside an epoch, and has a temporary directory open."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    armed = False
    while time.monotonic() < deadline and child.poll() is None:
        saving = any(run.glob(".polyckpt-tmp-*"))
        if armed and saving:
            child.send_signal(signal.SIGKILL)
            child.wait()
            _, epoch, batch = progress(run)
            return Killed(epoch, batch, while_saving=any(run.glob(".polyckpt-tmp-*")))
        if not saving:
            reached, _, batch = progress(run)
            # Not among the last batches: the kill comes one or two saves later and must still be inside the epoch.
            armed = reached >= step and 0 < batch < STEPS_PER_EPOCH - 4
    child.kill()
    finish(child)
    raise SystemExit(f"{child.args} could not be killed in the middle of an epoch")


def progress(run: Path) -> tuple[int, int, int]:
    """(step, epoch, batch) of the last checkpoint, zeros where there is none."""
    try:
        found = polyckpt.inspect(run / "last").manifest.progress
    except polyckpt.PolyckptError:
        return 0, 0, 0
    return found.step or 0, found.epoch or 0, found.batch or 0


def differences(first: Path, second: Path) -> dict[str, tuple[int, list[str]]]:
    """By section: how many entries were compared, and the names of those that differ in a single bit."""
    a, b = polyckpt.inspect(first), polyckpt.inspect(second)
    found = {}
    for section in ("weights", "optimizer", "state"):
        left, right = getattr(a, section), getattr(b, section)
        names = sorted({*left, *right})
        differing = [
            name
            for name in names
            if name not in left or name not in right or left[name].tobytes() != right[name].tobytes()
        ]  # fmt: skip
        found[section] = (len(names), differing)
    metrics = {**a.manifest.metrics, **b.manifest.metrics}
    found["metrics"] = (
        len(metrics),
        [name for name in metrics if a.manifest.metrics.get(name) != b.manifest.metrics.get(name)],
    )
    return found


def main(frameworks: list[str]) -> int:
    console = Console(width=max(112, Console().width))
    table = Table(title="Killed, resumed, and compared with a run that was never stopped")
    for column in ("framework", "killed in", "weights", "slots", "state", "metrics", "verdict"):
        table.add_column(column)
    failed = False
    with tempfile.TemporaryDirectory() as directory:
        for framework in frameworks:
            straight, killed = Path(directory, framework, "straight"), Path(directory, framework, "killed")
            console.print(f"[bold]{FRAMEWORKS[framework]}[/bold], never stopped:")
            finish(start(framework, straight))
            console.print(f"[bold]{FRAMEWORKS[framework]}[/bold], killed and resumed:")
            step = random.randrange(STEPS_PER_EPOCH, (EPOCHS - 1) * STEPS_PER_EPOCH)
            where = kill_while_saving(start(framework, killed), killed, step)
            finish(start(framework, killed))
            compared = differences(straight / "final", killed / "final")
            same = all(count and not names for count, names in compared.values())
            failed |= not same
            table.add_row(
                FRAMEWORKS[framework],
                f"epoch {where.epoch + 1}, batch {where.batch + 1}" + (", mid-save" if where.while_saving else ""),
                *(f"{count} equal" if not names else f"{len(names)}/{count} differ" for count, names in compared.values()),
                "[green]bit-identical" if same else "[red]DIFFERENT",
            )
            for section, (_, names) in compared.items():
                for name in names[:10]:
                    console.print(f"[red]{FRAMEWORKS[framework]}: {section}: {name} differs")
    console.print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(FRAMEWORKS)))
