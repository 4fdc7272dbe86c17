"""What a trace of a JAX model tells: every layer's output as that layer makes it, and that nothing is left behind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.training import train_state

from polyckpt import UnsupportedError
from polyckpt.adapters.jax import JaxAdapter, marks
from tests.adapters.cases.trees import leaves

KEY = jax.random.key(0)


class Recorder:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.outputs: list[tuple[str, np.ndarray]] = []
        self.merged: list[tuple[str, tuple[int, ...]]] = []

    def ran(self, path: str, output: np.ndarray) -> None:
        assert type(output) is np.ndarray
        self.outputs.append((path, output))

    def flattened(self, path: str, shape: tuple[int, ...]) -> None:
        self.merged.append((path, shape))

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.outputs]

    def output(self, path: str) -> np.ndarray:
        (found,) = (output for each, output in self.outputs if each == path)
        return found


@contextmanager
def nothing_left() -> Iterator[None]:
    """The states of Python's and NumPy's random numbers and the settings of JAX are afterwards what they were."""
    before = random.getstate(), np.random.get_state()[1].tobytes(), np.random.get_state()[2:], jax.config.jax_disable_jit
    yield
    after = random.getstate(), np.random.get_state()[1].tobytes(), np.random.get_state()[2:], jax.config.jax_disable_jit
    assert before == after


def traced(model: Any, *arguments: Any, apply: Callable[..., Any] | None = None) -> tuple[Recorder, Sequence[np.ndarray]]:
    """A trace, of layers that are described."""
    recorder, adapter = Recorder(), JaxAdapter()
    with nothing_left():
        outputs = adapter.trace(model, arguments, recorder, apply)
    described = {layer.path for layer in adapter.capture_model(adapter.parts(model, False).model).layers}
    assert set(recorder.paths) <= described
    return recorder, outputs


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def same(found: Any, expected: Any) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, np.asarray(expected), rtol=2e-4, atol=2e-5)


# Flax nnx


class Network(nnx.Module):
    """Of everything that changes in a call: statistics, dropout, a counter, and other random numbers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 4, (2, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.norm.mean.set_value(noise(4))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.again = self.blocks[0]
        self.head = nnx.Linear(5 * 6 * 4, 2, rngs=rngs)
        self.seen = nnx.BatchStat(jnp.zeros((), int))

    def __call__(self, x: Any) -> Any:
        random.random()
        np.random.rand()
        x = self.dropout(jax.nn.relu(self.norm(self.conv(x))))
        self.seen.set_value(self.seen.get_value() + 1)
        x = self.blocks[1](self.blocks[0](x))
        x = nnx.jit(lambda layer, x: layer(x))(self.again, x)
        return {"y": self.head(jax.nn.gelu(self.dropout(x.reshape(x.shape[0], -1)))), "last": (x.mean(), None)}


def test_layers_of_nnx() -> None:
    model, x = Network(nnx.Rngs(0, dropout=1)), noise(3, 5, 6, 3)
    before = leaves(state=nnx.to_pure_dict(nnx.state(model)))
    classes = [type(node) for _, node in nnx.iter_graph(model)]
    recorder, (mean, y) = traced(model, x)
    assert recorder.paths == ["conv", "norm", "dropout", "blocks/0", "blocks/1", "blocks/0", "dropout", "head", ""]
    assert recorder.merged == [("head", (5, 6, 4))]
    # The live model is as it was, and trains on.
    after = leaves(state=nnx.to_pure_dict(nnx.state(model)))
    assert all(np.array_equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert classes == [type(node) for _, node in nnx.iter_graph(model)]
    assert not model.norm.use_running_average and not model.dropout.deterministic
    model.eval()
    expected = model(x)
    same(y, expected["y"])
    same(mean, expected["last"][0])
    same(recorder.output("conv"), model.conv(x))
    same(recorder.output("norm"), model.norm(model.conv(x)))
    first = model.dropout(jax.nn.relu(model.norm(model.conv(x))))
    blocks = [output for path, output in recorder.outputs if path.startswith("blocks")]
    same(blocks[0], model.blocks[0](first))
    same(blocks[2], model.blocks[0](model.blocks[1](model.blocks[0](first))))
    same(recorder.output("head"), expected["y"])


def test_a_model_that_was_compiled_before_is_seen_and_compiled_as_it_was_after() -> None:
    model, x = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1))), noise(5, 3)
    compiled: list[int] = []

    @nnx.jit
    def forward(model: Any, x: Any) -> Any:
        compiled.append(1)
        return model(x)

    expected = forward(model, x)
    recorder, (found,) = traced(model, x, apply=forward)
    assert recorder.paths == ["layers/0", "layers/1"]
    same(found, expected)
    same(recorder.output("layers/0"), model.layers[0](x))
    count = len(compiled)
    same(forward(model, x), expected)
    assert len(compiled) == count


def test_recurrent_layers_of_nnx_make_whole_sequences() -> None:
    rngs, x = nnx.Rngs(0), noise(2, 5, 3)

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.both = nnx.Bidirectional(nnx.RNN(nnx.LSTMCell(3, 4, rngs=rngs)), nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs)))
            self.last = nnx.RNN(nnx.OptimizedLSTMCell(8, 6, rngs=rngs), return_carry=True)
            self.cell = nnx.SimpleCell(6, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            _, x = self.last(self.both(x))
            return self.cell(jnp.zeros((2, 3)), x[:, -1])[1]

    model = Model()
    recorder, (y,) = traced(model, x)
    assert recorder.paths == ["both/forward_rnn/cell", "both/backward_rnn/cell", "last/cell", "cell"]
    both = model.both(x)
    same(recorder.output("both/forward_rnn/cell"), both[..., :4])
    same(recorder.output("both/backward_rnn/cell"), both[..., 4:])
    same(recorder.output("last/cell"), model.last(both)[1])
    same(recorder.output("cell"), y)


def test_modules_within_other_containers_and_mapped_ones() -> None:
    layers = [nnx.Linear(3, 3, rngs=nnx.Rngs(seed)) for seed in range(2)]
    x = noise(4, 3)
    recorder, (y,) = traced({"b": layers, "a": layers[0]}, x, apply=lambda tree, x: tree["b"][1](tree["a"](x)))
    assert len(recorder.outputs) == 2 and recorder.paths[1] == "b/1"
    same(y, layers[1](layers[0](x)))

    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(key: Any) -> Any:
        return nnx.Linear(3, 3, rngs=nnx.Rngs(key))

    model = stacked(jax.random.split(KEY, 4))
    recorder, (y,) = traced(model, noise(4, 2, 3), apply=lambda model, x: nnx.vmap(lambda m, x: m(x))(model, x))
    same(recorder.output(""), y)
    assert y.shape == (4, 2, 3)


# Equinox


class Vision(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    attention: eqx.nn.MultiheadAttention
    dropout: eqx.nn.Dropout
    cell: eqx.nn.LSTMCell
    mlp: eqx.nn.MLP

    def __init__(self, key: Any) -> None:
        keys = jax.random.split(key, 4)
        self.conv = eqx.nn.Conv2d(3, 4, 2, key=keys[0])
        self.norm = eqx.nn.BatchNorm(4, "batch", mode="ema")
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=keys[1])
        self.dropout = eqx.nn.Dropout(0.5)
        self.cell = eqx.nn.LSTMCell(4, 5, key=keys[2])
        self.mlp = eqx.nn.MLP(4 * 3 * 5, 2, 7, 1, key=keys[3])

    def __call__(self, x: Any, state: Any, *, key: Any) -> Any:
        x, state = self.norm(self.conv(x), state)
        tokens = x.reshape(4, -1).T
        tokens = self.attention(tokens, tokens, tokens)
        zeros = jnp.zeros(5)
        (h, _), _ = jax.lax.scan(lambda carry, x: (self.cell(x, carry), None), (zeros, zeros), tokens[:3])
        return self.mlp(self.dropout(jnp.ravel(jax.nn.relu(x)), key=key)) + h.sum(), state


def _vision() -> tuple[Any, Any]:
    model, state = eqx.filter_jit(eqx.nn.make_with_state(Vision))(KEY)
    statistics = jax.tree.map(lambda leaf: jnp.asarray(noise(*leaf.shape) ** 2 + 0.5) if leaf.ndim else leaf, state)
    return model, statistics


def test_layers_of_equinox() -> None:
    pair, x = _vision(), noise(6, 3, 4, 6)
    structure = jax.tree.structure(pair)
    recorder, (y,) = traced(pair, x)
    steps = ["0/cell"] * 3
    rest = ["0/dropout", "0/mlp/layers/0", "0/mlp/layers/1"]
    assert recorder.paths == ["0/conv", "0/norm", "0/attention/dropout", "0/attention", *steps, *rest]
    assert recorder.merged == [("0/mlp/layers/0", (4, 3, 5))]
    assert jax.tree.structure(pair) == structure and not pair[0].dropout.inference
    model, state = eqx.nn.inference_mode(pair)
    expected = jax.vmap(lambda x: model(x, state, key=None)[0])(x)
    same(y, expected)
    convolved = jax.vmap(model.conv)(x)
    same(recorder.output("0/conv"), convolved)
    same(recorder.output("0/norm"), jax.vmap(lambda x: model.norm(x, state)[0])(convolved))
    hidden = dict(recorder.outputs)["0/cell"]
    same(hidden.sum(-1)[:, None] + recorder.output("0/mlp/layers/1"), expected)


def test_an_equinox_model_that_is_mapped_by_its_user_or_compiled() -> None:
    pair, x = _vision(), noise(6, 3, 4, 6)
    by_default, (expected,) = traced(pair, x)

    @eqx.filter_jit
    def forward(pair: Any, x: Any) -> Any:
        mapped = eqx.filter_vmap(lambda model, x, state: model(x, state, key=None), in_axes=(None, 0, None), out_axes=(0, None))
        return mapped(pair[0], x, pair[1])

    forward(eqx.nn.inference_mode(pair), x)
    recorder, (y,) = traced(pair, x, apply=forward)
    same(y, expected)
    assert recorder.paths == by_default.paths and recorder.merged == by_default.merged
    for (_, found), (_, other) in zip(recorder.outputs, by_default.outputs, strict=True):
        same(found, other)


def test_layers_of_equinox_that_are_mapped_over_more_than_the_batch() -> None:
    class Text(eqx.Module):
        embedding: eqx.nn.Embedding
        norm: eqx.nn.LayerNorm
        scale: jax.Array

        def __call__(self, tokens: Any, other: Any) -> Any:
            assert tokens.dtype == jnp.int32
            return jax.vmap(lambda token: self.norm(self.embedding(token)))(tokens) * self.scale + other

    model = Text(eqx.nn.Embedding(7, 3, key=KEY), eqx.nn.LayerNorm(3), jnp.asarray(noise(3)))
    tokens, other = np.array([[0, 6, 2, 2], [1, 4, 5, 3]]), noise(2, 4, 3)
    recorder, (y,) = traced(model, tokens, other)
    assert recorder.paths == ["embedding", "norm", ""]
    same(recorder.output("embedding"), np.asarray(model.embedding.weight)[tokens])
    same(recorder.output(""), y)
    same(y, jax.vmap(model)(tokens, other))


# Trees


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x + nn.Dense(4)(nn.LayerNorm()(x))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.Conv(4, (2, 2))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        tokens = x.reshape(x.shape[0], -1, 4)
        tokens = nn.MultiHeadDotProductAttention(2, name="mixing")(tokens)
        tokens = nn.RNN(nn.OptimizedLSTMCell(4))(tokens)
        tokens = Block(name="z")(Block(name="a")(tokens))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(jnp.tanh(tokens.reshape(x.shape[0], -1))))


PATHS = [
    "Conv_0",
    "BatchNorm_0",
    "mixing",
    "OptimizedLSTMCell_0",
    "a/LayerNorm_0",
    "a/Dense_0",
    "z/LayerNorm_0",
    "z/Dense_0",
    "Dense_0",
]


@pytest.fixture(scope="module")
def variables() -> Any:
    return jax.jit(Linen().init)(KEY, noise(3, 2, 3, 3))


def _forward(variables: Any, x: Any) -> Any:
    return Linen().apply(variables, x)


def test_layers_of_linen_in_the_order_in_which_they_run(variables: Any) -> None:
    x = noise(3, 2, 3, 3)
    recorder, (y,) = traced(variables, x, apply=_forward)
    assert recorder.paths == [f"params/{path}" for path in PATHS]
    assert recorder.merged == [("params/Dense_0", (6, 4))]
    expected, seen = Linen().apply(variables, x, capture_intermediates=True)
    same(y, expected)
    within = seen["intermediates"]
    same(recorder.output("params/mixing"), within["mixing"]["__call__"][0])
    same(recorder.output("params/a/Dense_0"), within["a"]["Dense_0"]["__call__"][0])
    same(recorder.output("params/z/Dense_0"), within["z"]["Dense_0"]["__call__"][0])
    same(recorder.output("params/OptimizedLSTMCell_0"), within["RNN_0"]["__call__"][0])
    same(recorder.output("params/BatchNorm_0"), within["BatchNorm_0"]["__call__"][0])


@pytest.mark.parametrize("prepare", ["params alone", "a train state", "compiled, other values", "two models"])
def test_trees_of_linen_wherever_they_lie(variables: Any, prepare: str) -> None:
    x = noise(3, 2, 3, 3)
    statistics = variables["batch_stats"]
    prefix, model, apply = "params/", variables, _forward
    if prepare == "params alone":
        prefix, model = "", variables["params"]

        def apply(params: Any, x: Any) -> Any:
            return _forward({"params": params, "batch_stats": statistics}, x)

    elif prepare == "a train state":
        import optax

        class State(train_state.TrainState):
            batch_stats: Any

        model = State.create(apply_fn=Linen().apply, params=variables["params"], tx=optax.adam(1.0), batch_stats=statistics)

        def apply(state: Any, x: Any) -> Any:
            return state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, x)

    elif prepare == "compiled, other values":

        @jax.jit
        def apply(variables: Any, x: Any) -> Any:
            return _forward(jax.tree.map(lambda leaf: leaf * 1, variables), x)

        apply(variables, x)
    else:
        prefix = "b/params/"
        model = {"a": jax.tree.map(lambda leaf: leaf + 1, variables), "b": variables}

        def apply(both: Any, x: Any) -> Any:
            return _forward(both["b"], x)

    recorder, (y,) = traced(model, x, apply=apply)
    assert recorder.paths == [prefix + path for path in PATHS]
    same(y, _forward(variables, x))


def test_a_tree_that_is_one_layer() -> None:
    module, x = nn.Dense(2), noise(4, 3)
    variables = module.init(KEY, x)
    recorder, (y,) = traced(variables, x, apply=module.apply)
    assert recorder.paths == ["params"]
    same(recorder.output("params"), y)


def _haiku(x: Any, train: bool = False) -> Any:
    x = hk.BatchNorm(False, False, 0.9, name="bare")(hk.Conv2D(4, 2)(x), is_training=train)
    x = hk.BatchNorm(True, True, 0.9)(x, is_training=train)
    x = hk.nets.MLP([6, 3])(hk.Flatten()(jnp.tanh(x)))
    core = hk.LSTM(5)
    states, _ = hk.dynamic_unroll(core, jnp.stack([x, 2 * x]), core.initial_state(len(x)))
    return states


def test_layers_of_haiku() -> None:
    x = noise(3, 2, 4, 3)
    transformed = hk.without_apply_rng(hk.transform_with_state(_haiku))
    params, state = jax.jit(transformed.init, static_argnums=2)(KEY, x, True)
    model = {"params": params, "state": state}
    recorder, (y,) = traced(model, x, apply=lambda model, x: transformed.apply(model["params"], model["state"], x)[0])
    assert recorder.paths == [
        "params/conv2_d",
        "state/bare~1~0~1mean_ema",
        "params/batch_norm",
        "params/mlp~1~0~1linear_0",
        "params/mlp~1~0~1linear_1",
        "params/lstm~1linear",
        "params/lstm~1linear",
    ]
    assert recorder.merged == [("params/mlp~1~0~1linear_0", (2, 4, 4))]
    same(y, transformed.apply(params, state, x)[0])
    same(np.stack([output for path, output in recorder.outputs if "lstm" in path]), y)
    first = recorder.output("params/mlp~1~0~1linear_0")
    other = params["mlp/~/linear_1"]
    same(recorder.output("params/mlp~1~0~1linear_1"), np.maximum(first, 0) @ other["w"] + other["b"])


# What is flattened


class Flattening(nnx.Module):
    def __init__(self, before: Callable[[Any], Any], after: Callable[[Any], Any]) -> None:
        self.before, self.after = before, after
        self.head = nnx.Linear(24, 2, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.head(self.after(self.before(x)))


def _flat(x: Any) -> Any:
    return x.reshape(len(x), -1)


@pytest.mark.parametrize(
    "before, after, shape",
    [
        (_flat, lambda x: x, (2, 3, 4)),
        (lambda x: jnp.transpose(x, (0, 3, 1, 2)), _flat, (4, 2, 3)),
        (_flat, lambda x: jax.nn.silu(jax.nn.relu(x) * 2 + 1), (2, 3, 4)),
        (_flat, lambda x: x + jnp.tanh(x), (2, 3, 4)),
        (_flat, lambda x: x[:, ::-1], None),
        (_flat, lambda x: jnp.sort(x), None),
        (_flat, lambda x: x @ jnp.eye(24), None),
        (_flat, lambda x: x + _flat(x.reshape(5, 4, 6)), None),
        (lambda x: x.reshape(10, -1, 4), lambda x: jnp.tile(x.mean(1), 6), None),
        (lambda x: x.reshape(1, -1, 24), lambda x: x, None),
    ],
)
def test_flattened(before: Callable[[Any], Any], after: Callable[[Any], Any], shape: tuple[int, ...] | None) -> None:
    recorder, _ = traced(Flattening(before, after), noise(5, 2, 3, 4))
    assert recorder.merged == ([("head", shape)] if shape else [])


def test_what_a_model_that_decides_by_values_flattens_is_not_known() -> None:
    recorder, (y,) = traced(Flattening(_flat, lambda x: x if x.sum() > 1e9 else -x), noise(5, 2, 3, 4))
    assert recorder.paths == ["head"] and not recorder.merged
    same(recorder.output("head"), y)


def test_layers_in_what_is_recomputed_mapped_or_differentiated_are_seen() -> None:
    model, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), noise(4, 5, 3)
    expected = model(x)
    for apply in (
        lambda model, x: jax.checkpoint(lambda x: model(x))(x),
        lambda model, x: jax.vmap(model, in_axes=1, out_axes=1)(x),
        lambda model, x: jax.lax.map(model, x),
        lambda model, x: jax.lax.cond(True, model, lambda x: x[..., :2], x),
    ):
        recorder, (y,) = traced(model, x, apply=apply)
        same(y, expected)
        assert set(recorder.paths) == {""}
        sizes = sum(output.size for _, output in recorder.outputs)
        assert sizes == expected.size
    recorder, (gradient,) = traced(model, x, apply=lambda model, x: jax.grad(lambda x: model(x).sum())(x))
    same(gradient, jnp.broadcast_to(model.kernel[...].sum(1), x.shape))
    assert recorder.paths == [""]


def test_marks_that_are_compiled_tell_nobody() -> None:
    recorder = Recorder()
    with marks.watching(recorder), jax.disable_jit(False):
        assert float(jax.jit(lambda x: marks.ran(x, "a"))(2.0)) == 2.0
    assert not recorder.outputs


# Values in and out


def test_small_floating_types_are_told_as_float32() -> None:
    model = nnx.Linear(3, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    recorder, (y,) = traced(model, noise(4, 3))
    assert y.dtype == recorder.output("").dtype == np.float32
    same(y, np.asarray(model(noise(4, 3)).astype(jnp.float32)))


def test_trees_of_arguments_and_outputs_that_are_no_numbers() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def apply(model: Any, batch: Any, lengths: Any) -> Any:
        assert lengths.dtype == jnp.int32 and batch["mask"].dtype == bool
        return {"b": model(batch["x"]), "a": lengths, "key": jax.random.key(0), "name": "text"}

    batch = {"x": noise(4, 3), "mask": np.ones(4, bool)}
    _, (a, b) = traced(model, batch, np.arange(4), apply=apply)
    same(a, np.arange(4))
    same(b, model(batch["x"]))


# What cannot be run


@pytest.mark.parametrize("model", [{"params": {"kernel": jnp.ones((3, 2))}}, [jnp.ones(2)], nnx.Dict(a=nnx.Param(jnp.ones(2)))])
def test_what_cannot_be_called_asks_for_apply(model: Any) -> None:
    with pytest.raises(UnsupportedError, match="cannot be called: pass apply="):
        JaxAdapter().trace(model, (noise(4, 3),), Recorder(), None)


def test_a_model_that_fails_is_left_as_it_was() -> None:
    class Failing(nnx.Module):
        def __init__(self) -> None:
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            random.random()
            np.random.rand()
            raise ZeroDivisionError(f"of {self.norm(x).shape}")

    model = Failing()
    message = r"model: it cannot be run on the batch: ZeroDivisionError: of \(4, 3\)"
    with nothing_left(), pytest.raises(UnsupportedError, match=message) as caught:
        JaxAdapter().trace(model, (noise(4, 3),), Recorder(), None)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert not model.norm.use_running_average and type(model.norm) is nnx.BatchNorm
    tree = {"params": {"kernel": jnp.ones((5, 2))}}
    with pytest.raises(UnsupportedError, match="ScopeParamShapeError"):
        JaxAdapter().trace(tree, (noise(4, 3),), Recorder(), nn.Dense(2, use_bias=False).apply)
    # Interceptors are gone.
    recorder = Recorder()
    with marks.watching(recorder):
        nn.Dense(2, use_bias=False).apply(tree, noise(4, 5))
    assert not recorder.outputs
