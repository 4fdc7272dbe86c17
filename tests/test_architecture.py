"""The arrows of the design: who may import whom, what an import costs, and that nothing unpickles."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sealing import REPOSITORY, run_python

CORE = sorted((REPOSITORY / "polyckpt").rglob("*.py"))
ADAPTERS = sorted((REPOSITORY / "adapters").rglob("*.py"))

CORE_MAY_IMPORT = {"numpy", "ml_dtypes", "msgspec", "xxhash", "scipy"}
COMMAND_LINE_MAY_IMPORT = {"typer", "rich", "matplotlib"}
MAY_IMPORT_BESIDE = {"storage.zarr_arrays": {"tensorstore"}, "formats.keras_files": {"h5py"}}
FRAMEWORKS = {"torch", "keras", "tensorflow", "jax", "jaxlib", "flax", "optax", "equinox", "haiku", "orbax"}
ADAPTER_MAY_IMPORT = {
    "numpy": set(),
    "torch": {"torch"},
    "keras": {
        "keras",
        "h5py",
        "torch",
        "tensorflow",
        "jax",
        "msgspec",
    },  # its file format; its backends, one of which a model is on
    "jax": {"jax", "jaxlib", "flax", "optax", "equinox", "haiku", "orbax"},
}

CONSUMERS = {"keras/model_checkpoint.py", "keras/written.py", "keras/backup.py", "keras/early_stopping.py"}
"""Modules beside an adapter that are no part of it: they call the library as its users do."""

LAYERS = [
    ["errors"],
    ["schema", "checksums", "names", "dtypes"],
    ["leaves", "layers", "layouts", "optimizers", "scalars", "policy", "background", "preemption", "collecting", "parallel"],
    ["heads", "residue", "staging", "rules", "units", "updates"],
    ["formulas"],
    ["matching", "moves"],
    ["sides", "translation"],
    ["path_rules"],
    ["plans"],
    ["manifest"],
    ["storage", "storage.local"],
    ["storage.tensor_file"],
    ["history"],
    ["storage.zarr_arrays"],
    ["storage.array_directory"],
    ["storage.run_directory"],
    ["checkpoint", "run"],
    ["unchanged"],
    ["sections"],
    ["adapter"],
    ["registry"],
    ["objects", "parity", "converted", "native"],
    ["slots"],
    ["continuation"],
    ["conversion"],
    ["differences"],
    ["snapshot"],
    ["formats", "formats.table", "formats.described", "formats.archives"],
    ["formats.reading"],
    ["formats.opened", "formats.writing", "formats.detyped"],
    ["formats.npz", "formats.safetensors", "formats.torch_files", "formats.keras_files", "formats.tensorflow_files"],
    ["formats.huggingface", "formats.flax_msgpack", "formats.equinox_files", "formats.orbax"],
    ["api"],
    ["manager"],
    ["cli.screen", "cli.pictures", "cli.factories"],
    ["cli.runs"],
    ["cli.commands"],
    ["cli.convert"],
    ["cli"],
]
"""The core from the bottom up; a module imports at run time only what stands below it, or beside it in `storage`."""

FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "copyreg"}
FORBIDDEN_CALLS = {
    ("torch", "load"),  # but with weights_only=True, which builds tensors and containers alone
    ("torch", "save"),
    ("np", "load"),
    ("np", "save"),
    ("np", "savez"),
    ("numpy", "load"),
    ("jnp", "load"),
    ("np", "fromfile"),
    ("yaml", "load"),
}
PICKLES_OF_OTHERS = {
    "adapters/torch/files.py": ("torch", "save"),  # which is the format that is written there
    "adapters/torch/distributed_files.py": "pickle",  # an index, of which a list of classes may be built
}


def imports(path: Path, *, type_checking: bool = False) -> Iterator[str]:
    """Every module that a file imports anywhere, full names; those for type checkers only where asked for."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not type_checking:
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text()))


def top(name: str) -> str:
    return name.partition(".")[0]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY / "polyckpt").with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_core_imports_no_framework_and_no_adapter(path: Path) -> None:
    for name in imports(path, type_checking=True):
        assert not name.startswith("polyckpt.adapters"), name
        beside = COMMAND_LINE_MAY_IMPORT if name_of(path).startswith("cli") else MAY_IMPORT_BESIDE.get(name_of(path), set())
        assert top(name) in sys.stdlib_module_names | CORE_MAY_IMPORT | beside | {"polyckpt"}, name


@pytest.mark.parametrize("path", [path for path in CORE if name_of(path) != "__init__"], ids=name_of)
def test_imports_run_downward(path: Path) -> None:
    level = {name: index for index, row in enumerate(LAYERS) for name in row}
    own = name_of(path)
    assert own in level, f"{own}: give it a place in LAYERS"
    for name in imports(path):
        if top(name) != "polyckpt":
            continue
        rest = name.removeprefix("polyckpt.")
        imported = next((part for part in (rest, rest.rpartition(".")[0]) if part in level), None)
        if imported is None:
            assert rest.startswith("__"), name  # __version__ of the package itself
        else:
            assert level[imported] < level[own], f"{own} imports {imported}"


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: "/".join(path.relative_to(REPOSITORY / "adapters").parts))
def test_an_adapter_imports_its_own_framework_alone(path: Path) -> None:
    folder = path.relative_to(REPOSITORY / "adapters").parts[0]
    own = ADAPTER_MAY_IMPORT.get(folder, set())
    for name in imports(path, type_checking=True):
        assert top(name) in sys.stdlib_module_names | CORE_MAY_IMPORT | {"polyckpt"} | own, name
        if name.startswith("polyckpt.adapters."):
            assert name.split(".")[2] == folder, name
        if "/".join(path.parts[-2:]) not in CONSUMERS:
            how = ("polyckpt.api", "polyckpt.manager", "polyckpt.snapshot", "polyckpt.storage")
            assert not name.startswith(how), f"{name}: an adapter decides what is stored, not how"


@pytest.mark.parametrize("path", [*CORE, *ADAPTERS], ids=lambda path: "/".join(path.relative_to(REPOSITORY).parts))
def test_nothing_can_unpickle(path: Path) -> None:
    allowed = {PICKLES_OF_OTHERS.get(path.relative_to(REPOSITORY).as_posix())}
    assert not {top(name) for name in imports(path, type_checking=True)} & FORBIDDEN_MODULES - allowed
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            weights_only = any(ast.unparse(keyword) == "weights_only=True" for keyword in node.keywords)
            forbidden = FORBIDDEN_CALLS - allowed - ({("torch", "load")} if weights_only else set())
            assert (node.func.value.id, node.func.attr) not in forbidden, ast.unparse(node)
            used = node.func.value.id == "pickle" and node.func.attr in {"load", "loads", "dump", "dumps", "Unpickler"}
            assert not used, ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile", "__import__"}, ast.unparse(node)


IMPORT = f"""
import sys, time
started = time.perf_counter()
import polyckpt
took = time.perf_counter() - started
loaded = sorted({{name.partition('.')[0] for name in sys.modules}} & {FRAMEWORKS})
assert not loaded, loaded
print(took)
"""


def test_importing_costs_next_to_nothing() -> None:
    took = []
    for _ in range(5):
        done = run_python(IMPORT)
        assert done.returncode == 0, done.stderr
        took.append(float(done.stdout))
    assert min(took) < 0.15


GUARD = """
import sys, tempfile

def forbid(event, arguments):
    if event == "pickle.find_class":
        raise RuntimeError(f"unpickling {arguments}")

IMPORTS
import pickle

def refuse(*arguments, **keywords):
    raise RuntimeError("pickle was used")

class Refuse:  # libraries may derive from it, none may use it
    __init__ = refuse

pickle.loads = pickle.load = pickle.dumps = pickle.dump = refuse
pickle.Unpickler = pickle.Pickler = Refuse
np.load = refuse
sys.addaudithook(forbid)
BODY
"""

NUMPY_BODY = """
def build(value):
    return {"w": np.full((3, 2), value), "n": [np.float32(value), {"x": np.array(1)}]}, {"m": np.full(3, value)}, \
        {"r": random.Random(value), "g": np.random.default_rng(value), "v": {1: (np.arange(3), {2.5, None}, b"x")}}

model, optimizer, extra = build(1)
path = polyckpt.save(tempfile.mkdtemp() + "/c", model, optimizer, extra=extra, metrics={"a": np.float32(1)})
model, optimizer, extra = build(2)
restored = polyckpt.load(path, model, optimizer, extra={name: extra[name] for name in "rg"})
assert (restored.model["w"] == 1).all()
polyckpt.inspect(path).verify()
"""

TORCH_BODY = """
def build(value):
    torch.manual_seed(value)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)

model, optimizer, scheduler = build(1)
path = polyckpt.save(tempfile.mkdtemp() + "/c", model, optimizer, scheduler=scheduler, extra={"g": torch.Generator()})
other, optimizer, scheduler = build(2)
polyckpt.load(path, other, optimizer, scheduler=scheduler, extra={"g": torch.Generator()})
assert torch.equal(model[0].weight, other[0].weight)
"""

JAX_BODY = """
def build(value):
    params = {"w": jnp.full((3, 2), value)}
    return params, optax.adam(1e-3).init(params)

params, state = build(1.0)
path = polyckpt.save(tempfile.mkdtemp() + "/c", params, state, extra={"key": jax.random.key(0)})
restored = polyckpt.load(path, *build(2.0), extra={"key": jax.random.key(1)})
assert (restored.model["w"] == 1).all()
"""

KERAS_BODY = """
def build(value):
    keras.utils.set_random_seed(value)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dropout(0.5)])
    model.compile("adam", "mse", run_eagerly=True)
    model.train_on_batch(np.ones((4, 3)), np.ones((4, 2)))
    return model

model, other = build(1), build(2)
path = polyckpt.save(tempfile.mkdtemp() + "/c", model, extra={"g": keras.random.SeedGenerator(1)})
polyckpt.load(path, other, extra={"g": keras.random.SeedGenerator(2)})
assert (other.layers[0].kernel.numpy() == model.layers[0].kernel.numpy()).all()
"""

GUARDED = {
    "numpy": ("", NUMPY_BODY),
    "torch": ("import torch", TORCH_BODY),
    "jax": ("import jax, jax.numpy as jnp, optax", JAX_BODY),
    "keras": ("import os; os.environ['KERAS_BACKEND'] = 'torch'; import keras", KERAS_BODY),
}


@pytest.mark.parametrize("framework", GUARDED)
def test_saving_and_loading_never_pickle(framework: str) -> None:
    needed, body = GUARDED[framework]
    names = f"import random\nimport numpy as np\nimport polyckpt, polyckpt.api\n{needed}\n"
    done = run_python(GUARD.replace("IMPORTS", names).replace("BODY", body))
    assert done.returncode == 0, done.stderr
    broken = run_python(GUARD.replace("IMPORTS", names).replace("BODY", "import copyreg; pickle.loads(b'N.')"))
    assert "pickle was used" in broken.stderr, "the guard guards nothing"
