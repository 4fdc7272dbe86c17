"""Loading into another framework beside loading into the same one, as ratios: python benchmarks/conversion.py [MiB] [rounds]

Layers of 2048 x 2048 in float32, transposed on the way. What a conversion may cost is a load into the framework that saved, and
the fastest transposing copy of the same bytes that an installed library makes. Medians, interleaved; checksums are verified.
"extra" is the most private memory that one more run takes at any time; a load into nnx makes new arrays beside the old ones.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
from flax import nnx
from rich.console import Console
from rich.table import Table

import polyckpt

WIDTH = 2048


class Stack(nnx.Module):
    def __init__(self, count: int) -> None:
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=nnx.Rngs(0)) for _ in range(count)])


def extra_mib(job: Callable[[], object]) -> float:
    """The most private memory that the process takes during `job` beyond what it had, in MiB (Linux)."""

    def private() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed would hide what this one takes
    began, peak, done = private(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, private())

    watcher = threading.Thread(target=watch)
    watcher.start()
    job()
    done.set()
    watcher.join()
    return peak - began


def main(size_mib: int, rounds: int) -> None:
    count = max(1, size_mib * (1 << 20) // (4 * WIDTH * WIDTH))
    source = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))}
    )
    same = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))})
    flax = Stack(count)
    arrays = [parameter.detach().numpy() for parameter in source.parameters()]
    into = [torch.empty(WIDTH, WIDTH) for _ in arrays]
    rule = {"layers.{i}": "layers/{i}"}
    with tempfile.TemporaryDirectory() as directory:
        path = polyckpt.save(Path(directory) / "c", source)

        def flax_load() -> None:
            jax.block_until_ready([layer.kernel.get_value() for layer in polyckpt.load(path, flax, rules=rule).model.layers])

        def torch_load() -> None:
            polyckpt.load(back, same, rules={"layers/{i}": "layers.{i}"})

        jobs: dict[str, Callable[[], object]] = {
            "torch -> torch": lambda: polyckpt.load(path, same),
            "torch -> nnx": flax_load,
            "nnx -> torch": torch_load,
            "nnx -> nnx": lambda: polyckpt.load(back, flax),
            "transposing copy, torch": lambda: [a.copy_(torch.from_numpy(b).T) for a, b in zip(into, arrays, strict=True)],
            "transposing copy, NumPy": lambda: [np.ascontiguousarray(b.T) for b in arrays],
        }
        back = polyckpt.save(Path(directory) / "back", flax)
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(rounds + 1):
            for name, job in jobs.items():
                began = time.perf_counter()
                job()
                times[name].append(time.perf_counter() - began)
        extra = {name: extra_mib(job) for name, job in jobs.items() if "->" in name}
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    fastest = min(value for name, value in medians.items() if name.startswith("transposing"))
    table = Table("work", "seconds", "GB/s", "of the same framework + 1.3 x the fastest copy", "extra MiB")
    for name, seconds in medians.items():
        target = medians[{"torch -> nnx": "nnx -> nnx", "nnx -> torch": "torch -> torch"}.get(name, name)]
        ratio = f"{seconds / (target + 1.3 * fastest):.2f}" if name in ("torch -> nnx", "nnx -> torch") else ""
        table.add_row(
            name,
            f"{seconds:.3f}",
            f"{count * 4 * WIDTH * WIDTH / seconds / 1e9:.2f}",
            ratio,
            f"{extra[name]:.0f}" if name in extra else "",
        )
    Console().print(table)


if __name__ == "__main__":
    main(*(int(argument) for argument in (*sys.argv[1:], *("400", "7")[len(sys.argv) - 1 :])))
