"""Checkpoints of tf.train.Checkpoint and of Saver: `ckpt-1.index` and `ckpt-1.data-00000-of-00001`, together `ckpt-1`."""

from __future__ import annotations

import re
from pathlib import Path

from polyckpt.formats.table import Format

INDEX = ".index"
STATE = "checkpoint"
_LATEST = re.compile(r'^model_checkpoint_path:\s*"(?:[^"\n]*/)?([^"/\\\n]+)"', re.MULTILINE)
"""The name of the latest in the file of this state; wherever it says that is, it is taken to lie beside."""


def recognises(path: Path) -> bool:
    """Whether a prefix, the index of one, or a directory with one, is such a checkpoint."""
    return prefix_of(path) is not None


def prefix_of(path: Path) -> Path | None:
    """What the names of its files begin with; of a directory, that of its latest, or its only, checkpoint."""
    if path.is_dir():
        state = path / STATE
        if state.is_file() and (match := _LATEST.search(state.read_text(errors="replace"))):
            return prefix_of(path / match[1])
        found = [each for each in path.glob(f"*{INDEX}") if _has_data(each)]
        return _without(found[0]) if len(found) == 1 else None
    index = path if path.name.endswith(INDEX) else path.with_name(path.name + INDEX)
    return _without(index) if index.is_file() and _has_data(index) else None


def _without(index: Path) -> Path:
    return index.with_name(index.name.removesuffix(INDEX))


def _has_data(index: Path) -> bool:
    prefix = _without(index).name
    return any(each.name.startswith(f"{prefix}.data-") for each in index.parent.iterdir())


CHECKPOINT = Format(
    name="tensorflow",
    title="a checkpoint of TensorFlow",
    adapter="keras",
    recognises=recognises,
    reader="polyckpt.adapters.keras.tensorflow_files:read",
    needs="tensorflow",
)
