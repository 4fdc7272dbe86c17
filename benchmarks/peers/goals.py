"""What is to be reached: medians of polyckpt, each in relation to that of a peer in the same run, or absolute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.peers.measuring import Measured


@dataclass(frozen=True)
class Goal:
    """At most `limit` times what `against` takes, or at most `limit` where there is none.

    key: of the work. factor: from the unit that is measured in to that of the limit, whose name is `unit`.
    """

    what: str
    key: str
    ours: str
    limit: float
    against: str | None = None
    unit: str = "x"
    factor: float = 1.0

    @property
    def text(self) -> str:
        """As it is put to people."""
        return f"≤ {self.limit:g}{self.unit} {self.against}" if self.against else f"≤ {self.limit:g} {self.unit}"


@dataclass(frozen=True)
class Outcome:
    """What was measured for a goal."""

    goal: Goal
    value: float

    @property
    def reached(self) -> bool:
        """Whether the goal is."""
        return self.value <= self.goal.limit


_DURABLE = "save (a), durable, checksummed"
_VERIFIED = "load (a) into live model and optimizer, verified"
_UNVERIFIED = "load (a), verify=False"
_BLOCKED = "async save (a): training blocked"
_FULL = "polyckpt, full save"

BOUNDS = {
    "a/durable": (
        "The disk: a raw write and fsync of the same bytes takes no less. A third of what DCP takes, or a fifth of what Orbax "
        "takes, would be about half of that."
    ),
    "a/load": (
        "`torch.load(mmap=True)` + `load_state_dict` leaves the moments, two thirds of the bytes, in the map that it "
        'made: they are read by the next training step. polyckpt copies them into the live slots. "+ copy_" is the '
        "comparison of equal work."
    ),
    "a/blocked": "Beside the copy itself: capturing the run (names, layers, groups) and the hand-over to the thread.",
    "b/save": (
        "Making 40 JAX arrays readable, describing them and writing two files and a manifest is some 15,000 calls of "
        "Python; no single one stands out (`python -X importtime`, cProfile)."
    ),
    "b/load": (
        "Of 2.4 ms in a loop of nothing else, one call of `jax.device_put` for the 40 arrays takes 0.9, opening and checking "
        "the files 0.5, naming, comparing and rebuilding the tree 0.3; the rest is spread."
    ),
    "c/save": (
        "Some 12 µs of Python for each tensor beside the writing: 4 to describe it (1.3 of them for NumPy to tell where it "
        "lies), 1 to know shared ones, 5 for its place, its bytes and their checksum, 2 for its entry in the manifest. "
        "safetensors does all, with the writing, in Rust in 7 µs."
    ),
    "c/load": (
        "Some 12 µs of Python for each tensor beside the copy: 3.5 to decode and check its entry in the manifest, 1.5 for that "
        "in the header, 2 to compare it with the live one, 4 to find, hash and wrap its bytes. safetensors makes the array in "
        "Rust in 7 µs and checks nothing but the header."
    ),
    "c/inspect": (
        "Two documents of 100,000 entries (49 MB of manifest, 10 MB of header) are decoded, compared with how they are "
        "spelled, so that no name stands twice, and checked entry by entry: 3.5 and 1.5 µs each. `safe_open` parses the one "
        "header in Rust."
    ),
    "d/time": (
        "To know what is unchanged, each byte is compared with that on the disk (memcmp in two threads: 30 ms for 400 MB, "
        "beside 20 ms of page faults), and what changed is synced. A full save takes so little because the disk works "
        "beside it."
    ),
    "startup": (
        "Importing Python, Typer with pydantic, Rich and polyckpt takes 0.17 s; reading 1,000 manifests, and the sizes of "
        "their files, 0.06 s."
    ),
}
"""Key of the work -> what stands in the way where a goal is not reached, by profiles of the machine in RESULTS.md."""

GOALS = (
    Goal(_DURABLE, "a/durable", "polyckpt", 1.10, "raw write"),
    Goal(_DURABLE, "a/durable", "polyckpt", 0.5, "torch.save"),
    Goal(_DURABLE, "a/durable", "polyckpt", 0.33, "DCP"),
    Goal(_DURABLE + ", JAX arrays", "a/durable", "polyckpt (JAX)", 0.2, "Orbax"),
    Goal(_VERIFIED, "a/load", "polyckpt", 1.2, "raw read"),
    Goal(_VERIFIED, "a/load", "polyckpt", 1.0, "torch.load + load_state_dict"),
    Goal(_UNVERIFIED, "a/load", "polyckpt, verify=False", 1.1, "torch.load(mmap=True) + load_state_dict"),
    Goal(_UNVERIFIED, "a/load", "polyckpt, verify=False", 1.0, "safetensors load_file + copy_"),
    Goal(_BLOCKED, "a/blocked", "polyckpt", 1.1, "one copy"),
    Goal(_BLOCKED, "a/blocked", "polyckpt", 0.2, "DCP async_save"),
    Goal(_BLOCKED + ", JAX arrays", "a/blocked", "polyckpt (JAX)", 5, unit="ms", factor=1000),
    Goal("save (b), not durable", "b/save", "polyckpt (JAX)", 3, unit="ms", factor=1000),
    Goal("load (b)", "b/load", "polyckpt (JAX)", 2, unit="ms", factor=1000),
    Goal("save (c), not durable", "c/save", "polyckpt", 1.5, "safetensors"),
    Goal("load (c)", "c/load", "polyckpt", 1.5, "safetensors"),
    Goal("inspect (c)", "c/inspect", "polyckpt", 1.5, "safetensors"),
    Goal("2nd save (d): bytes written", "d/bytes", "polyckpt, 2nd save of a run", 0.06, _FULL),
    Goal("3rd save (d): bytes written", "d/bytes", "polyckpt, 3rd save of a run", 0.06, _FULL),
    Goal("2nd save (d): time", "d/time", "polyckpt, 2nd save of a run", 0.15, _FULL),
    Goal("3rd save (d): time", "d/time", "polyckpt, 3rd save of a run", 0.15, _FULL),
    Goal("extra memory of a sync save (a)", "a/memory", "polyckpt.save", 64, unit="MB"),
    Goal("extra memory of a load (a)", "a/memory", "polyckpt.load", 64, unit="MB"),
    Goal("import polyckpt, new process", "startup", "import polyckpt", 150, unit="ms", factor=1000),
    Goal("polyckpt ls of 1,000 checkpoints, new process", "startup", "polyckpt ls", 300, unit="ms", factor=1000),
)


def outcomes(results: Mapping[str, Measured]) -> Iterator[Outcome]:
    """The goals of everything that was measured; `results` by the key of the work."""
    for goal in GOALS:
        if goal.key in results:
            found = results[goal.key]
            value = found.median(goal.ours) * goal.factor
            yield Outcome(goal, value / found.median(goal.against) if goal.against else value)
