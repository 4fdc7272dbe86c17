"""The long form: ``python -m tests.fuzz TARGET tests/fuzz/corpus/TARGET -max_total_time=600`` (libFuzzer's options).

TARGET is manifest, tensor_file or history. It needs ``pip install atheris``, which the tests do not.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["polyckpt"]):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, lambda data: target(data) and None)
    atheris.Fuzz()
