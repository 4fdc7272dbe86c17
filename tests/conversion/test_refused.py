"""Conversions that must not happen: one error says what is wrong, and the model keeps its weights, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import polyckpt
from polyckpt import AmbiguityError, MismatchError, ParityError, PlanError, parity
from polyckpt.converted import Converted


class Source(nn.Module):
    """Three equal layers between two others."""

    def __init__(self, middle: int = 3, activation: Callable[[torch.Tensor], torch.Tensor] = torch.tanh) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(middle))
        self.last = nn.Linear(6, 3)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.first(x))
        for block in self.blocks:
            x = self.activation(block(x))
        return self.last(x)


class Target(nn.Module):
    """The same under other names."""

    def __init__(self, middle: int = 3, width: int = 6, activation: Any = torch.tanh, order: list[int] | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        for number in order or range(middle):
            self.add_module(f"layer_{number}", nn.Linear(width, width))
        self.top = nn.Linear(width, 3)
        self.middle, self.activation = middle, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.stem(x))
        for number in range(self.middle):
            x = self.activation(getattr(self, f"layer_{number}")(x))
        return self.top(x)


BATCH = np.random.default_rng(0).standard_normal((5, 4)).astype("float32")
RULES = {"blocks.{i}": "layer_{i}"}


@pytest.fixture
def source() -> Iterator[Source]:
    torch.manual_seed(0)
    yield Source()


@pytest.fixture
def plain(source: Source, tmp_path: Path) -> Path:
    return polyckpt.save(tmp_path / "plain", source)


@pytest.fixture
def probed(source: Source, tmp_path: Path) -> Path:
    return polyckpt.save(tmp_path / "probed", source, probe=BATCH)


def refused(error: type[Exception], match: str, path: Path, target: nn.Module, **options: Any) -> str:
    """The error's text; the target is as it was, to the last bit."""
    before = {name: value.clone() for name, value in target.state_dict().items()}
    flags = [module.training for module in target.modules()]
    with pytest.raises(error, match=match) as caught:
        polyckpt.load(path, target, **options)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())
    assert flags == [module.training for module in target.modules()]
    return str(caught.value)


def same(source: nn.Module, target: nn.Module) -> bool:
    return parity.compare(source, target, BATCH).agrees


# What cannot be told.


def test_twins_are_refused_with_the_ways_to_settle_it(source: Source, plain: Path) -> None:
    text = refused(AmbiguityError, "is not guessed", plain, Target())
    for part in ("blocks.0, blocks.1, blocks.2", "layer_0, layer_1, layer_2", "probe=", "rules=", "plan=", "accept="):
        assert part in text


def test_each_way_settles_it(source: Source, plain: Path, probed: Path, tmp_path: Path) -> None:
    plan = polyckpt.plan(plain, Target())
    assert not plan.settled and "not settled" in str(plan)
    plan.save(tmp_path / "plan.json")
    for path, options in (
        (probed, {}),
        (plain, {"rules": RULES}),
        (plain, {"rules": {"blocks.0": "layer_0", "blocks.1": "layer_1"}}),
        (plain, {"plan": plan}),
        (plain, {"plan": tmp_path / "plan.json"}),
        (plain, {"accept": {"names and order"}}),
    ):
        target = Target()
        report = polyckpt.load(path, target, **options).report  # type: ignore[arg-type]
        assert same(source, target), options
        assert report is not None and (report.parity is not None) == (path == probed)


def test_names_that_contradict_the_order_are_not_accepted(plain: Path) -> None:
    refused(AmbiguityError, "disagree", plain, Target(order=[2, 0, 1]), accept={"names and order"})


def test_an_edited_plan_is_followed(source: Source, plain: Path, tmp_path: Path) -> None:
    polyckpt.plan(plain, Target()).save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    for pair in document["pairs"]:
        pair["source"] = {"blocks.0": "blocks.1", "blocks.1": "blocks.0"}.get(pair["source"], pair["source"])
    (tmp_path / "plan.json").write_text(json.dumps(document))
    target = Target()
    polyckpt.load(plain, target, plan=tmp_path / "plan.json")
    assert torch.equal(target.layer_0.weight, source.blocks[1].weight)


def test_a_layer_that_the_probe_does_not_reach_is_refused(tmp_path: Path) -> None:
    """Two equal heads of which none runs: the outputs agree whichever is which."""
    source, target = Source(), Target()
    source.spare, source.other = nn.Linear(6, 9), nn.Linear(6, 9)
    target.aux_0, target.aux_1 = nn.Linear(6, 9), nn.Linear(6, 9)
    path = polyckpt.save(tmp_path / "c", source, probe=BATCH)
    refused(AmbiguityError, "have no part in them", path, target)
    polyckpt.load(path, target, rules={"spare": "aux_1", "other": "aux_0"})
    assert torch.equal(target.aux_1.weight, source.spare.weight) and same(source, target)


# What does not fit.


@pytest.mark.parametrize(
    ("target", "listed"),
    [
        (lambda: Target(middle=4, order=[0, 1, 2, 3]), "missing"),
        (lambda: Target(middle=2, order=[0, 1]), "unexpected"),
        (lambda: Target(width=7), "missing .*7, 7.*unexpected"),
        (lambda: nn.Sequential(nn.Conv1d(4, 6, 1, bias=False), nn.PReLU(6)), "unexpected"),
    ],
    ids=["more layers", "fewer layers", "another width", "other kinds"],
)
def test_what_has_no_counterpart_is_listed(target: Callable[[], nn.Module], listed: str, plain: Path) -> None:
    refused(MismatchError, f"(?s){listed}", plain, target())


def test_what_fits_is_loaded_where_that_is_asked_for(source: Source, plain: Path) -> None:
    target = Target()
    target.top = nn.Linear(6, 5)
    result = polyckpt.load(plain, target, rules=RULES, strict=False)
    assert torch.equal(target.stem.weight, source.first.weight) and torch.equal(target.layer_2.bias, source.blocks[2].bias)
    assert {problem.name for problem in result.skipped} == {"top.weight", "top.bias", "last.weight", "last.bias"}


def test_a_bias_without_a_place_must_be_zero(source: Source, plain: Path, tmp_path: Path) -> None:
    target = Target()
    target.stem = nn.Linear(4, 6, bias=False)
    refused(MismatchError, "first.bias: .* not all 0, live object has no place", plain, target, rules=RULES)
    with torch.no_grad():
        source.first.bias.zero_()
    polyckpt.load(polyckpt.save(tmp_path / "zero", source), target, rules=RULES)
    assert same(source, target)


def test_a_narrower_type_is_rounded_only_on_request(source: Source, plain: Path) -> None:
    refused(MismatchError, "cast=True", plain, Target().to(torch.bfloat16), rules=RULES)
    target = Target().to(torch.bfloat16)
    report = polyckpt.load(plain, target, rules=RULES, cast=True).report
    assert torch.equal(target.stem.weight, source.first.weight.to(torch.bfloat16)) and "approximate" in str(report)
    wide = Target().double()
    polyckpt.load(plain, wide, rules=RULES)
    assert torch.equal(wide.stem.weight, source.first.weight.double())


# Rules and plans.


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ({"block.{i}": "layer_{i}"}, "'block.{i}' fits nothing"),
        ({"blocks.{i}": "stage_{i}"}, "nothing of .* has this path"),
        ({"blocks.{i}": "layer_{j}"}, "j stands on the right only"),
        ({"first": "layer_0"}, "nothing of .* has this path and fits"),
        ({"blocks.0": "layer_0", "blocks.{i}": "layer_2"}, "several rules hold for it|stands twice"),
    ],
    ids=["no source", "no target", "unknown name", "another shape", "contradiction"],
)
def test_rules_that_cannot_be_followed(rules: dict[str, str], match: str, plain: Path) -> None:
    refused(PlanError, match, plain, Target(), rules=rules)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda document: document["pairs"][0].update(source="nowhere"), "'nowhere' -> 'stem': 'nowhere' is not in"),
        (lambda document: document["pairs"].append(document["pairs"][0]), "'first' stands twice as source"),
        (lambda document: document["pairs"][0].update(target="layer_0"), "is not layer_0"),
        (lambda document: document.update(polyckpt_plan=2), "version 2"),
        (lambda document: document.update(pairs=3), "not a plan"),
    ],
    ids=["path", "twice", "shape", "version", "type"],
)
def test_plans_that_cannot_be_followed(change: Callable[[Any], Any], match: str, plain: Path, tmp_path: Path) -> None:
    polyckpt.plan(plain, Target()).save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    change(document)
    (tmp_path / "plan.json").write_text(json.dumps(document))
    refused(PlanError, match, plain, Target(), plan=tmp_path / "plan.json")


def test_a_plan_that_is_not_there(plain: Path, tmp_path: Path) -> None:
    refused(PlanError, "no such plan", plain, Target(), plan=tmp_path / "absent.json")


# The probe.


def test_a_model_that_computes_otherwise_is_refused_by_its_first_layer(probed: Path) -> None:
    text = refused(ParityError, "does not compute", probed, Target(activation=torch.relu))
    assert "the first layer that diverges is layer_0" in text


def test_a_tolerance_lets_through_what_is_known_to_differ(source: Source, probed: Path) -> None:
    target = Target(activation=torch.relu)
    report = polyckpt.load(probed, target, rules=RULES, tolerance=10.0).report
    assert torch.equal(target.layer_1.weight, source.blocks[1].weight)
    assert report is not None and report.parity is not None and 1e-3 < report.parity.error < 10


def test_rules_that_name_the_wrong_layers_are_caught_by_the_probe(probed: Path) -> None:
    refused(ParityError, "diverges is layer_0", probed, Target(), rules={"blocks.0": "layer_1", "blocks.1": "layer_0"})


@pytest.mark.parametrize(
    ("axes", "match"),
    [("b c h -> b h c", "write the axes"), ("b f", "write the axes"), (["b f -> f b"] * 2, "2 patterns for 1 arguments")],
)
def test_axes_that_are_not_those_of_the_probe(axes: Any, match: str, probed: Path) -> None:
    refused(PlanError, match, probed, Target(), probe_axes=axes)


def test_a_probe_that_the_model_cannot_take(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(4, 3))
    path = polyckpt.save(tmp_path / "c", source, probe=BATCH)

    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    refused(polyckpt.UnsupportedError, "cannot be run", path, Strange())


class Lazy(nn.Module):
    """Layers that learn their inputs from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LazyLinear(6)
        self.outer = nn.LazyLinear(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x)))


def test_what_is_not_built_yet_is_built_by_the_probe(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    target = Lazy()
    polyckpt.load(polyckpt.save(tmp_path / "probed", source, probe=BATCH), target)
    assert same(source, target)
    plain = polyckpt.save(tmp_path / "plain", source)
    with pytest.raises(polyckpt.UnsupportedError, match=r"inner.weight: .*(lazy|uninitialized|batch)"):
        polyckpt.load(plain, Lazy())
    with pytest.raises(polyckpt.UnsupportedError, match=r"weight: .*(lazy|uninitialized|batch)"):
        polyckpt.load(plain, nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(3)))


def test_arrays_with_a_function_take_part(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tree = {"w": rng.standard_normal((4, 3)).astype("float32"), "b": rng.standard_normal(3).astype("float32")}

    def apply(tree: dict[str, np.ndarray], batch: np.ndarray) -> np.ndarray:
        return batch @ tree["w"] + tree["b"]

    path = polyckpt.save(tmp_path / "c", tree, probe=BATCH, apply=apply)
    swapped = {"first": np.zeros((4, 3), "float32"), "second": np.zeros(3, "float32")}
    result = polyckpt.load(path, swapped, apply=lambda tree, batch: batch @ tree["first"] + tree["second"])
    assert np.array_equal(result.model["first"], tree["w"]) and result.report and result.report.parity
    with pytest.raises(polyckpt.UnsupportedError, match="pass apply="):
        polyckpt.save(tmp_path / "d", tree, probe=BATCH)


def test_an_optimizer_that_was_not_saved_is_missing(plain: Path) -> None:
    target = Target()
    with pytest.raises(MismatchError, match="missing    optimizer"):
        polyckpt.load(plain, target, torch.optim.SGD(target.parameters(), 0.1), rules=RULES)


def test_a_flipped_bit_is_found_before_anything_is_written(plain: Path) -> None:
    file = plain / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    refused(polyckpt.CorruptError, "changed after they were written", plain, Target(), rules=RULES)


def test_a_plan_that_leaves_elements_open_is_refused() -> None:
    with pytest.raises(PlanError, match="0 of its 6 elements"):
        Converted("w", "float32", (2, 3), [], {})


def test_what_is_converted_is_verified_before_it_is_written(source: Source, plain: Path) -> None:
    made, _ = polyckpt.plan(plain, Target()).moves()
    file = plain / "weights.safetensors"
    values = source.last.weight.detach().numpy().tobytes()
    file.write_bytes(file.read_bytes().replace(values, bytes([values[0] ^ 1]) + values[1:]))
    stored = polyckpt.inspect(plain, verify=False).weights.stored
    Converted("stem.weight", "float32", (6, 4), made["stem.weight"], stored).verify()
    with pytest.raises(polyckpt.CorruptError, match=r"last\.weight"):
        Converted("top.weight", "float32", (3, 6), made["top.weight"], stored).verify()


@pytest.mark.parametrize("shape", [(2, 6, 5, 3), (2, 6, 6, 6)])  # it cannot be run, or computes something else
def test_a_batch_whose_axes_nothing_tells_gives_a_hint(shape: tuple[int, ...], tmp_path: Path) -> None:
    import haiku as hk
    import jax

    norm = nn.BatchNorm2d(6)
    torch.nn.init.normal_(norm.running_mean)
    batch = np.random.default_rng(0).random(shape, dtype=np.float32)
    path = polyckpt.save(tmp_path / "norm", nn.Sequential(norm).eval(), probe=batch)
    norms = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, is_training=hk.running_init()))
    params, state = norms.init(jax.random.key(0), np.moveaxis(batch, 1, -1))

    def apply(model: Any, x: Any) -> Any:
        return norms.apply(*model, None, x)[0]

    with pytest.raises((polyckpt.UnsupportedError, ParityError), match=r'probe_axes="b c h w -> b h w c"'):
        polyckpt.load(path, (params, state), apply=apply)
    restored = polyckpt.load(path, (params, state), apply=apply, probe_axes="b c h w -> b h w c")
    assert restored.report is not None and restored.report.parity is not None and restored.report.parity.agrees


@pytest.mark.parametrize("accept", ["names and order", {"name and order"}, ["folded bias", "x"]])
def test_what_cannot_be_accepted_is_refused(accept: Any, plain: Path) -> None:
    refused(PlanError, "accept=.*'folded bias', 'names and order'", plain, Target(), accept=accept)
