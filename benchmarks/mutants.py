"""How often the right weights reach mutants of real models: python benchmarks/mutants.py [seeds]

Each mutant computes what its model does under other names and in another order of definition. Without a probe it must be
refused, with one it should get the right weights; a wrong mapping in silence must never happen.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.conversion.mutants import KINDS
from tests.conversion.torch_models import MODELS
from tests.conversion.trials import outcomes


def main(seeds: int) -> None:
    warnings.simplefilter("ignore")
    table = Table("model", "mutation", "with a probe", "without")
    total: Counter[str] = Counter()
    trials = [(name, kind) for name in MODELS for kind in KINDS]
    for name, kind in track(trials, "mutants", console=Console(stderr=True)):
        shown = []
        for probe in (True, False):
            with tempfile.TemporaryDirectory() as directory:
                counts = outcomes(name, kind, range(seeds), Path(directory), probe=probe)
            total.update({f"{key} {'with' if probe else 'without'} a probe": count for key, count in counts.items()})
            shown.append(", ".join(f"{count} {key}" for key, count in sorted(counts.items())))
        table.add_row(name, kind, *shown)
    console = Console()
    console.print(table)
    console.print(", ".join(f"{count} {key}" for key, count in sorted(total.items())))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
