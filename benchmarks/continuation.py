"""How exactly training goes on in another framework: every optimizer family, every ordered pair, measured.

Writes docs/continuation.md, whose verdicts the tests compare with what they find.

usage: python benchmarks/continuation.py
"""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from tests.continuation import table  # noqa: E402

if __name__ == "__main__":
    outcomes = table.measured("float64", "jax")
    (REPOSITORY / "docs").mkdir(exist_ok=True)
    (REPOSITORY / "docs" / "continuation.md").write_text(table.document(outcomes))
    sys.stdout.write(f"{len(outcomes)} continuations\n")
