"""What must be found after a call of a save or a load has failed: each function fails for a finding of tests.faults.single."""

from __future__ import annotations

import re
from typing import Any

from tests.faults.single import NEW, NEXT, OLD

MISSING = "NotACheckpointError"
COMMITTED = "CheckpointExistsError: /target: a checkpoint is there already"
Finding = dict[str, Any]


def check_outcomes(action: str, finding: Finding) -> None:
    """The same work once more succeeds after what failed; a call of which a checkpoint is made never fails unnoticed."""
    name, _, path = finding["call"].partition(" ")
    first, *second = finding["outcomes"]
    if action == "kill":
        assert [first, *second] == ["killed"]
        return
    assert first in ("done", "refused"), finding
    assert second in ([], ["done"]) or second[0].startswith(COMMITTED), finding
    holds = re.search(r"\.(safetensors|json)$", path) and ".polyckpt-replaced" not in path
    makes = finding["changes"] and name not in ("unlink", "rmdir")
    # Python itself repeats a write that was interrupted.
    if action not in ("short", "EINTR") and makes and (holds or name == "rename"):
        assert first == "refused", finding
    if action == "short" and not path.endswith("history.jsonl"):
        assert first == "done", finding


def check_target(work: str, action: str, finding: Finding) -> None:
    """A checkpoint that is saved or replaced is whole or as it was, and the one beside it is untouched."""
    check_outcomes(action, finding)
    assert finding["target"] in (MISSING if work == "save" else OLD, NEW), finding
    assert finding["earlier"] == OLD
    if finding["outcomes"] == ["done"]:
        assert finding["target"] == NEW, finding
    assert finding["next"] == {"target": NEXT, "earlier": OLD, "there": ["earlier", "target"]}, finding


def check_run(work: str, action: str, finding: Finding) -> None:
    """A manager loses no checkpoint and goes on from the newest; its best is known."""
    check_outcomes(action, finding)
    aside = [name for name in finding["there"] if name.startswith("corrupt-")]
    # A disk that cannot read a checkpoint gives the one before; the one it could not read is kept.
    assert not aside or (len(aside) == 1 and action == "EIO" and not finding["changes"]), finding
    steps = finding["steps"]
    assert set(steps) | {float(name[-1]) for name in aside} >= {2.0, 4.0}, finding
    assert 5.0 in steps or finding["outcomes"][0] != "done", finding
    then = finding["next"]
    assert then["best_step"] == 2 and then["warned"] == []
    assert then["resumed"] >= (5 if 5.0 in steps or finding["outcomes"][-1] == "done" else 4), finding
    assert then["steps"][-2:] == [then["resumed"] + 1, then["resumed"] + 2]
    best = 3.0 if aside == ["corrupt-step-00000002"] else 2.0
    assert then["best"] == best and best in then["steps"]
    there = {name for name in then["there"] if not name.startswith("corrupt-")}
    assert there == {".polyckpt-lock", "best", "history.jsonl", "last"}, then["there"]


def check_load(work: str, action: str, finding: Finding) -> None:
    """The load itself fails where live objects are half-loaded."""
    check_outcomes(action, finding)


CHECKS = {"save": check_target, "overwrite": check_target, "plain": check_target, "manager": check_run, "load": check_load}
