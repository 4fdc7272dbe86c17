"""Run the benchmarks: see the package's docstring."""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import tempfile
import warnings
from pathlib import Path

from rich.console import Console

from benchmarks.peers import machine, report
from benchmarks.peers.goals import outcomes
from benchmarks.peers.measuring import Measured, measure
from benchmarks.peers.workloads import WORKLOADS

RESULTS = Path(__file__).parents[1]
MEMORY = Path("/dev/shm")
WIDTH = 150
"""Columns of the tables in a file or a pipe."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="polyckpt beside its peers")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes of (a), (c), (d) and the run that is listed")
    parser.add_argument("--rounds", type=int, default=7, help="that count; one more warms up")
    parser.add_argument("--only", default=",".join(WORKLOADS), help=f"some of {','.join(WORKLOADS)}")
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="on the disk to measure, by default here")
    parser.add_argument(
        "--write", type=Path, nargs="?", const=RESULTS, metavar="DIR", help="write RESULTS.md and results.png, into benchmarks/"
    )
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(WORKLOADS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: there are {', '.join(WORKLOADS)}")
    if arguments.write is not None:
        arguments.write.mkdir(parents=True, exist_ok=True)  # now, not when all is measured
    warnings.simplefilter("ignore")  # of the peers, about themselves
    gc.collect()
    gc.freeze()  # the objects of all frameworks at once, which nobody else has to look through
    console, results = Console(), dict[str, Measured]()
    if not console.is_terminal:
        console.width = WIDTH
    for name in chosen:
        parent = MEMORY if name == "b" else arguments.directory
        with tempfile.TemporaryDirectory(prefix="polyckpt-benchmark-", dir=parent) as directory:
            for work in WORKLOADS[name](arguments.scale, Path(directory)):
                with Console(stderr=True).status(work.title):
                    results[work.key] = measure(work, arguments.rounds)
                console.print(report.screen_table(results[work.key]))
    reached = list(outcomes(results))
    console.print(report.screen_summary(reached))
    if arguments.write is not None:
        command = shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]])
        text = report.markdown(results, reached, machine.facts(arguments.directory), arguments.rounds, command)
        (arguments.write / "RESULTS.md").write_text(text)
        report.picture(results, arguments.write / "results.png")


if __name__ == "__main__":
    main()
