from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from polyckpt import registry
from polyckpt.errors import AdapterError
from tests.sealing import run_python

FRAMEWORKS = ("torch", "keras", "tensorflow", "jax", "flax", "optax")

UNUSED = f"""
import sys, tempfile, random, numpy as np, polyckpt
extra = {{"r": random.Random(1), "v": [1]}}
path = polyckpt.save(tempfile.mkdtemp() + "/c", {{"w": np.ones(2)}}, {{"m": np.ones(2)}}, extra=extra)
polyckpt.load(path, {{"w": np.ones(2)}}, {{"m": np.ones(2)}}, extra={{"r": random.Random(1)}})
polyckpt.inspect(path).verify()
loaded = [name for name in {FRAMEWORKS} if name in sys.modules]
assert not loaded, loaded
"""

BLOCKED = """
import sys, numpy as np, polyckpt

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, Block())

class Tensor: ...
Tensor.__module__ = "torch"

for action in (lambda: polyckpt.save(sys.argv[1] + "/c", {"w": Tensor()}), lambda: polyckpt.load(sys.argv[2], {"w": Tensor()})):
    try:
        action()
    except polyckpt.AdapterError as error:
        print(error)
"""

THIRD = """
import sys
sys.path.insert(0, sys.argv[1])
import tinyframework, polyckpt
path = polyckpt.save(sys.argv[1] + "/c", tinyframework.Model([1.0, 2.0]))
assert polyckpt.inspect(path).manifest.producer.adapter == "tinyframework"
model = tinyframework.Model([0.0, 0.0])
polyckpt.load(path, model)
assert model.values == [1.0, 2.0]
try:
    polyckpt.load(path, tinyframework.Model([0.0]))
except polyckpt.MismatchError as error:
    print(error)
"""

TINY = """
import numpy as np
from polyckpt.adapter import ModelCapture, Parts, Restore
from polyckpt.errors import Problem
from polyckpt.leaves import array_leaf

class Model:
    def __init__(self, values): self.values = values

class Adapter:
    name = "tinyframework"
    def versions(self): return {"tinyframework": "1"}
    def recognises(self, value): return False
    def parts(self, model, optimizer, tx=None): return Parts(model=model, optimizer=optimizer)
    def capture_model(self, model):
        return ModelCapture(type="Model", weights={"values": array_leaf(np.array(model.values))})
    def prepare_model(self, model, stored, *, rng):
        values = stored.weights["values"]
        problems = [] if values.shape == (len(model.values),) else [
            Problem("shape", "weights", "values", stored=str(values), live=str(len(model.values)))]
        def apply():
            model.values = values.numpy().tolist()
            return model
        return Restore(apply=apply, problems=problems, tensors=[values])
    def capture_object(self, value): return None
    def capture_rng(self): return None
    def leaf(self, value): return None
"""


def test_no_framework_is_imported_until_an_object_of_it_arrives() -> None:
    done = run_python(UNUSED)
    assert done.returncode == 0, done.stderr


def test_a_missing_framework_names_the_command(tmp_path: Path) -> None:
    import polyckpt

    path = polyckpt.save(tmp_path / "there", {"w": np.ones(1)})
    done = run_python(BLOCKED, tmp_path, path)
    assert done.returncode == 0, done.stderr
    assert "pip install 'polyckpt[torch]'" in done.stdout
    assert not (tmp_path / "c").exists()


def test_a_third_party_adapter_needs_no_change_of_the_core(tmp_path: Path) -> None:
    (tmp_path / "tinyframework.py").write_text(TINY)
    info = tmp_path / "tinyframework-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tinyframework\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[polyckpt.adapters]\ntinyframework = tinyframework:Adapter\n")
    done = run_python(THIRD, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "shape" in done.stdout
    assert "values: checkpoint has float64[2]" in done.stdout


def test_the_nearest_known_package_decides() -> None:
    class Mine(np.ndarray): ...

    assert registry.by_class(np.zeros(1).view(Mine)).name == "numpy"
    assert registry.by_class(3) is None
    assert registry.find({"a": [1, (np.zeros(1),)]}).name == "numpy"
    assert registry.find({"a": [1, "x", None]}) is None


def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(AdapterError, match=r"'absent'; there are adapters for .*jax.*numpy.*torch"):
        registry.named("absent")


def test_trees_that_contain_themselves_are_searched_once() -> None:
    loop: list[object] = []
    loop += [loop, loop, {"x": loop}]
    assert registry.find(loop) is None
    deep: object = np.zeros(1)
    for _ in range(100_000):
        deep = [deep]
    assert registry.find(deep).name == "numpy"
    while isinstance(deep, list):  # taken apart by hand: freeing it at once would recurse
        deep = deep.pop()
