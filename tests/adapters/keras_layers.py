"""What Keras layers are described as, recomputed from the roles alone: ``python -m tests.adapters.keras_layers RESULTS``.

Whatever the backend, the reference is torch.nn.functional over tensors that were moved by the names of their axes.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import torch
import torch.nn.functional as functional
from keras import layers

from polyckpt.adapters.keras import KerasAdapter
from polyckpt.layers import axes, problems
from polyckpt.schema import Layer
from tests.adapters.checks import run_checks


def array(tensor: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(tensor))


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


class Described:
    """One layer as described, and what it makes of a batch of random values."""

    def __init__(self, layer: Any, *shapes: tuple[int, ...], inputs: Any = None) -> None:
        self.inputs = [values(*shape) for shape in shapes] if inputs is None else inputs
        layer(*map(keras.ops.convert_to_tensor, self.inputs))
        generator = np.random.default_rng(1)
        for weight in layer.weights:
            if "int" not in weight.dtype and "seed" not in weight.path:
                weight.assign(generator.uniform(0.2, 1.0, weight.shape).astype(np.float32))
        captured = KerasAdapter().capture_model(layer)
        weights = {name: leaf.read().view(np.float32).reshape(leaf.shape) for name, leaf in captured.weights.items()}
        assert not [
            problem
            for entry in captured.layers
            for problem in problems(entry, {name: leaf.shape for name, leaf in captured.weights.items()})
        ]
        (self.entry,) = [entry for entry in captured.layers if entry.kind != "dropout"]
        self._weights = weights
        outputs = layer(*map(keras.ops.convert_to_tensor, self.inputs), training=False)
        self.output = array(keras.tree.flatten(outputs)[0])

    def __call__(self, role: str, pattern: str, **sizes: int) -> torch.Tensor | None:
        """The tensor of a role with its axes in the order of `pattern`; `sizes` of those that are merged in the stored one."""
        if role not in self.entry.roles:
            return None
        stored = self.entry.roles[role]
        return torch.from_numpy(moved(self._weights[stored.tensor], stored.axes, pattern, sizes))

    def agrees(self, expected: torch.Tensor) -> None:
        found = expected.numpy()
        assert found.shape == self.output.shape, (found.shape, self.output.shape)
        assert np.allclose(found, self.output, atol=2e-5), np.abs(found - self.output).max()


def moved(value: np.ndarray, stored: str, wanted: str, sizes: Mapping[str, int]) -> np.ndarray:
    flat = [axis for group in axes(stored) for axis in group]
    shape = [
        size if len(group) == 1 else sizes[axis]
        for group, size in zip(axes(stored), value.shape, strict=True)
        for axis in group
    ]
    order = [flat.index(axis) for group in axes(wanted) for axis in group]
    split = value.reshape(shape).transpose(order)
    known = dict(zip(flat, shape, strict=True))
    return np.ascontiguousarray(split.reshape([math.prod(known[axis] for axis in group) for group in axes(wanted)]))


def first(x: np.ndarray) -> torch.Tensor:
    """Channels last to channels first."""
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1)


CONVOLUTIONS = [functional.conv1d, functional.conv2d, functional.conv3d]
TRANSPOSED = [functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d]
SPACE = [9, 8, 7]
KERNEL = [2, 3, 4]


def spatial(rank: int) -> str:
    return " ".join(f"k{axis}" for axis in range(1, rank + 1))


def check_dense() -> None:
    found = Described(layers.Dense(5, activation="gelu"), (4, 3))
    assert found.entry.kind == "linear" and found.entry.config == {"activation": "gelu"}
    x = functional.linear(torch.from_numpy(found.inputs[0]), found("kernel", "out in"), found("bias", "out"))
    found.agrees(functional.gelu(x))


def check_convolutions() -> None:
    for rank in (1, 2, 3):
        layer = getattr(layers, f"Conv{rank}D")(6, KERNEL[:rank], groups=2, activation="relu")
        found = Described(layer, (2, *SPACE[:rank], 4))
        assert found.entry.config == {"groups": 2, "channels": "last", "activation": "relu"}
        kernel = found("kernel", f"out in {spatial(rank)}")
        expected = CONVOLUTIONS[rank - 1](first(found.inputs[0]), kernel, found("bias", "out"), groups=2)
        found.agrees(last(expected.relu()))


def check_transposed_convolutions_are_not_flipped() -> None:
    for rank in (1, 2, 3):
        for stride in (1, 2):
            layer = getattr(layers, f"Conv{rank}DTranspose")(5, KERNEL[:rank], strides=stride)
            found = Described(layer, (2, *SPACE[:rank], 3))
            assert found.entry.kind == "conv_transpose" and not found.entry.config.get("flipped")
            assert found.entry.config["channels"] == "last"
            kernel = found("kernel", f"in out {spatial(rank)}")
            found.agrees(last(TRANSPOSED[rank - 1](first(found.inputs[0]), kernel, found("bias", "out"), stride=stride)))


def check_depthwise_convolutions() -> None:
    for rank in (1, 2):
        found = Described(getattr(layers, f"DepthwiseConv{rank}D")(KERNEL[:rank], depth_multiplier=2), (2, *SPACE[:rank], 3))
        assert found.entry.kind == "depthwise_conv" and found.entry.config == {"channels": "last"}
        kernel = found("kernel", f"(in mult) {spatial(rank)}").unsqueeze(1)
        bias = found("bias", "(in mult)", **{"in": 3, "mult": 2})
        found.agrees(last(CONVOLUTIONS[rank - 1](first(found.inputs[0]), kernel, bias, groups=3)))


def check_separable_convolutions() -> None:
    for rank in (1, 2):
        found = Described(getattr(layers, f"SeparableConv{rank}D")(5, KERNEL[:rank], depth_multiplier=2), (2, *SPACE[:rank], 3))
        assert found.entry.kind == "separable_conv" and found.entry.config == {"channels": "last"}
        depthwise = found("depthwise_kernel", f"(in mult) {spatial(rank)}").unsqueeze(1)
        pointwise = found("pointwise_kernel", f"out (in mult) {spatial(rank)}", **{"in": 3, "mult": 2})
        x = CONVOLUTIONS[rank - 1](first(found.inputs[0]), depthwise, groups=3)
        found.agrees(last(CONVOLUTIONS[rank - 1](x, pointwise, found("bias", "out"))))


def check_channels_first() -> None:
    layer = layers.Conv2D(3, 2, data_format="channels_first", name="conv")
    layer.build((None, 2, 5, 5))
    (entry,) = KerasAdapter().capture_model(layer).layers
    assert entry.config == {"groups": 1, "channels": "first"}


def check_norms() -> None:
    found = Described(layers.BatchNormalization(epsilon=0.1), (4, 5, 3))
    assert found.entry.config == {"epsilon": 0.1, "momentum": 0.99, "momentum_is": "share of the old"}
    arguments = [found(role, "c") for role in ("mean", "variance", "scale", "offset")]
    found.agrees(last(functional.batch_norm(first(found.inputs[0]), *arguments, eps=0.1)))
    for axis in (1, -2, [0, 2]):
        layer = layers.LayerNormalization(axis)
        layer.build((4, 5, 3))
        assert [entry.kind for entry in KerasAdapter().capture_model(layer).layers] == ["custom"], axis
    for axis, pattern in [(-1, "n1"), (2, "n1"), ([1, 2], "n1 n2"), ([-2, -1], "n1 n2")]:
        found = Described(layers.LayerNormalization(axis, epsilon=0.1), (4, 5, 3))
        scale = found("scale", pattern)
        assert found.entry.kind == "layer_norm" and found.entry.config == {"epsilon": 0.1}
        x = torch.from_numpy(found.inputs[0])
        found.agrees(functional.layer_norm(x, scale.shape, scale, found("offset", pattern), eps=0.1))
    found = Described(layers.RMSNormalization(epsilon=0.1), (4, 5, 3))
    assert found.entry.kind == "rms_norm"
    found.agrees(functional.rms_norm(torch.from_numpy(found.inputs[0]), (3,), found("scale", "n1"), eps=0.1))
    for groups in (1, 3, -1):
        found = Described(layers.GroupNormalization(groups, epsilon=0.1), (4, 5, 6))
        assert found.entry.config == {"epsilon": 0.1, "groups": groups if groups > 0 else 6}
        arguments = [found(role, "c") for role in ("scale", "offset")]
        count = found.entry.config["groups"]
        found.agrees(last(functional.group_norm(first(found.inputs[0]), count, *arguments, eps=0.1)))


def check_the_rms_scaling_of_a_layer_normalization_is_no_rms_norm() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = layers.LayerNormalization(epsilon=0.1, rms_scaling=True)
        found = Described(layer, (4, 5, 3))
    assert found.entry.kind == "custom"
    x = torch.from_numpy(found.inputs[0])
    (role,) = found.entry.roles
    # What it computes, and so what it must not be called.
    found.agrees(x * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + 0.1) * found(role, "a0"))


def check_embedding() -> None:
    tokens = np.array([[3, 0, 10]])
    found = Described(layers.Embedding(11, 4), inputs=[tokens])
    assert found.entry.kind == "embedding" and found.entry.config == {}
    found.agrees(functional.embedding(torch.from_numpy(tokens), found("embedding", "vocab dim")))


def check_einsum_layers_that_are_linear() -> None:
    for equation, shape, made, kind, stored in [
        ("...x,xy->...y", (4, 2, 3), (5,), "linear", "in out"),
        ("abc,dc->abd", (4, 2, 3), (2, 5), "linear", "out in"),
        ("ab,bc->ac", (4, 3), 5, "linear", "in out"),
        ("abc,cde->abde", (4, 2, 3), (2, 5, 6), "custom", None),
        ("abc,bd->adc", (4, 2, 3), (5, 3), "custom", None),
        ("abc,bcd->abd", (4, 2, 3), (2, 5), "custom", None),
    ]:
        bias = equation[-1]
        layer = layers.EinsumDense(equation, made, bias_axes=bias, activation="relu")
        if kind == "custom":
            layer.build(shape)
            (entry,) = KerasAdapter().capture_model(layer).layers
            assert entry.kind == "custom" and entry.config == {"equation": equation}
            continue
        found = Described(layer, shape)
        assert found.entry.kind == "linear" and found.entry.roles["kernel"].axes == stored
        x = functional.linear(torch.from_numpy(found.inputs[0]), found("kernel", "out in"), found("bias", "out"))
        found.agrees(x.relu())
    wide = layers.EinsumDense("abc,cd->abd", (2, 5), bias_axes="bd")
    wide.build((4, 2, 3))
    assert KerasAdapter().capture_model(wide).layers[0].kind == "custom"


def lstm(found: Described, x: torch.Tensor, units: int) -> torch.Tensor:
    """All hidden states, by torch's own layer, whose gates lie as "i f g o"."""
    assert found.entry.config["gate_order"] == "i f g o"
    sizes = {"gate": 4, "unit": units}
    module = torch.nn.LSTM(x.shape[-1], units, batch_first=True)
    fill(module, found("input_kernel", "(gate unit) in", **sizes), found("recurrent_kernel", "(gate unit) out", **sizes))
    module.bias_ih_l0.data = found("bias", "(gate unit)", **sizes)
    module.bias_hh_l0.data.zero_()
    return module(x)[0].detach()


def fill(module: Any, kernel: Any, recurrent: Any) -> None:
    module.weight_ih_l0.data, module.weight_hh_l0.data = kernel, recurrent


def check_recurrent_layers() -> None:
    tanh = {"activation": "tanh"}
    gates = {**tanh, "recurrent_activation": "sigmoid"}
    found = Described(layers.LSTM(4, return_sequences=True), (2, 5, 3))
    assert found.entry.config == {"gate_order": "i f g o", "direction": "forward", **gates}
    x = torch.from_numpy(found.inputs[0])
    found.agrees(lstm(found, x, 4))
    backward = Described(layers.LSTM(4, return_sequences=True, go_backwards=True), (2, 5, 3))
    assert backward.entry.config["direction"] == "backward"
    backward.agrees(lstm(backward, x.flip(1), 4))

    found = Described(layers.GRU(4, return_sequences=True), (2, 5, 3))
    assert found.entry.config == {"gate_order": "z r n", "reset_after": True, "direction": "forward", **gates}
    sizes = {"gate": 3, "unit": 4}

    def torch_gates(role: str, pattern: str) -> torch.Tensor:
        return found(role, f"gate {pattern}", **sizes)[[1, 0, 2]]  # z r n -> r z n

    module = torch.nn.GRU(3, 4, batch_first=True)
    fill(
        module,
        torch_gates("input_kernel", "unit in").reshape(12, 3),
        torch_gates("recurrent_kernel", "unit out").reshape(12, 4),
    )
    bias = torch_gates("bias", "which unit")
    module.bias_ih_l0.data, module.bias_hh_l0.data = bias[:, 0].reshape(-1), bias[:, 1].reshape(-1)
    found.agrees(module(x)[0].detach())

    found = Described(layers.SimpleRNN(4, return_sequences=True, activation="relu"), (2, 5, 3))
    assert found.entry.config == {"gate_order": "h", "direction": "forward", "activation": "relu"}
    plain = torch.nn.RNN(3, 4, nonlinearity="relu", batch_first=True)
    fill(plain, found("input_kernel", "unit in"), found("recurrent_kernel", "unit out"))
    plain.bias_ih_l0.data, plain.bias_hh_l0.data = found("bias", "unit"), torch.zeros(4)
    found.agrees(plain(x)[0].detach())


def check_directions() -> None:
    layer = layers.Bidirectional(layers.GRU(4, reset_after=False))
    layer.build((None, 5, 3))
    stacked = layers.RNN([layers.LSTMCell(3), layers.LSTMCell(2)], go_backwards=True)
    stacked.build((None, 5, 3))
    cell = layers.SimpleRNNCell(3)
    cell.build((None, 2))
    told = [
        [entry.config.get("direction") for entry in KerasAdapter().capture_model(each).layers]
        for each in (layer, stacked, cell)
    ]
    assert told == [["forward", "backward"], ["backward", "backward"], [None]]


def check_attention() -> None:
    found = Described(layers.MultiHeadAttention(2, 5), (3, 4, 6), (3, 7, 6))
    assert found.entry.config == {"heads": 2}
    query, memory = map(torch.from_numpy, found.inputs)

    def project(name: str, x: torch.Tensor, heads: int, repeat: int = 1) -> torch.Tensor:
        hidden = "head group hd" if "group" in found.entry.roles[f"{name}_kernel"].axes else "head hd"
        sizes = {"head": heads, "group": repeat if "group" in hidden else 1, "hd": 5}
        kernel = found(f"{name}_kernel", f"in ({hidden})", **sizes)
        bias = found(f"{name}_bias", f"({hidden})", **sizes)
        made = (x @ kernel + bias).unflatten(-1, (-1, 5)).transpose(1, 2)
        return made if "group" in hidden else made.repeat_interleave(repeat, 1)

    made = functional.scaled_dot_product_attention(
        project("query", query, 2), project("key", memory, 2), project("value", memory, 2)
    )
    found.agrees(
        made.transpose(1, 2).flatten(2) @ found("output_kernel", "(head hd) out") + found("output_bias", "out"),
    )
    found = Described(layers.GroupQueryAttention(5, 6, 2), (3, 4, 8), (3, 7, 8))
    assert found.entry.config == {"heads": 6, "key_heads": 2}
    query, memory = map(torch.from_numpy, found.inputs)
    made = functional.scaled_dot_product_attention(
        project("query", query, 2, 3), project("key", memory, 2, 3), project("value", memory, 2, 3)
    )
    kernel = found("output_kernel", "(head group hd) out", head=2, group=3)
    found.agrees(made.transpose(1, 2).flatten(2) @ kernel + found("output_bias", "out"))


def check_prelu() -> None:
    found = Described(layers.PReLU(shared_axes=[1]), (4, 5, 3))
    x = torch.from_numpy(found.inputs[0])
    found.agrees(torch.where(x > 0, x, found("slope", "n1 n2") * x))


class Padded(layers.Conv2D):
    """It pads by itself."""

    def call(self, x: Any) -> Any:
        return super().call(keras.ops.pad(x, [[0, 0], [0, 1], [1, 0], [0, 0]]))


class Scored(layers.Dense):
    def build(self, shape: Any) -> None:
        super().build(shape)
        self.score = self.add_weight(shape=(1,), name="score")


class Odd(layers.LSTMCell):
    def call(self, x: Any, states: Any, training: bool = False) -> Any:
        return super().call(x, states, training=training)


class Own(layers.GRU):
    """The same under another name."""


def check_subclasses() -> None:
    found = Described(Padded(3, 2), (2, 4, 5, 6))
    assert found.entry.kind == "conv" and found.entry.type.endswith("Padded")
    x = functional.pad(first(found.inputs[0]), (1, 0, 0, 1))
    found.agrees(last(functional.conv2d(x, found("kernel", "out in k1 k2"), found("bias", "out"))))
    for layer, kind in [(Scored(3), "custom"), (layers.RNN(Odd(3)), "custom"), (Own(3), "gru")]:
        layer.build((2, 3) if kind == "custom" and isinstance(layer, Scored) else (2, 4, 3))
        assert [entry.kind for entry in KerasAdapter().capture_model(layer).layers] == [kind], layer


def layers_of(model: Any) -> tuple[list[Layer], str]:
    captured = KerasAdapter().capture_model(model)
    return list(captured.layers), captured.order


def check_layers_of_graphs_come_in_the_order_of_execution() -> None:
    first_input, second_input = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    # Made in another order than they run in.
    late, early, middle = layers.Dense(4, name="late"), layers.Dense(4, name="early"), layers.Dense(4, name="middle")
    within_out, within_in = layers.Dense(4, name="within_out"), layers.Dense(4, name="within_in")
    inner_input = keras.Input((4,))
    inner = keras.Model(inner_input, within_out(within_in(inner_input)), name="inner")
    chain = keras.Sequential([layers.Dense(4, name="chained"), inner], name="chain")
    x = chain(middle(early(first_input) + second_input))
    model = keras.Model([second_input, first_input], late(x), name="net")
    found, order = layers_of(model)
    assert order == "execution"
    names = [entry.path.rpartition("/")[2] for entry in found]
    assert names == ["early", "middle", "chained", "within_in", "within_out", "late"], names


class Twisted(layers.Layer):
    """Its layers run in another order than they are made in."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = layers.Dense(4), layers.Dense(4)

    def call(self, x: Any) -> Any:
        return self.second(self.first(x))


class Single(layers.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.only = layers.Dense(4)

    def call(self, x: Any) -> Any:
        return keras.ops.relu(self.only(x))


def check_a_layer_of_the_users_in_a_graph_has_its_own_order() -> None:
    for inside, expected in [(Twisted(), "definition"), (Single(), "execution"), (layers.LSTM(3), "execution")]:
        sequence = keras.Input((3, 4))
        nested = keras.Sequential([inside, layers.Dropout(0.1)])
        assert layers_of(keras.Model(sequence, layers.Dense(2)(nested(sequence))))[1] == expected

    class Graph(keras.Model):
        def call(self, x: Any, training: bool = False, mask: Any = None) -> Any:
            return super().call(x)

    sequence = keras.Input((4,))
    graph = Graph(sequence, layers.Dense(2)(layers.Dense(3)(sequence)))
    assert layers_of(graph)[1] == "definition"


if __name__ == "__main__":
    run_checks(globals(), sys.argv[1])
