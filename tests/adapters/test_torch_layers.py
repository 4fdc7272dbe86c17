"""What torch modules are described as: subclasses, modules of other libraries, and models of transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from polyckpt import layers
from polyckpt.adapters.torch import TorchAdapter
from polyckpt.schema import Layer
from tests.adapters.test_torch_tracing import traced


def described(model: nn.Module) -> dict[str, Layer]:
    return {layer.path: layer for layer in TorchAdapter().capture_model(model).layers}


def kinds(model: nn.Module) -> list[str]:
    return [layer.kind for layer in described(model).values()]


def axes(layer: Layer) -> dict[str, str]:
    return {role: entry.axes for role, entry in layer.roles.items()}


class Same(nn.Conv2d):
    """It pads as TensorFlow does and calls the function itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, groups=self.groups)


class Standardised(nn.ConvTranspose1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv_transpose1d(x, self.weight / self.weight.std(), self.bias, groups=self.groups)


class Activated(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


class Channels(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Scaled(nn.Embedding):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Packed(nn.Linear):
    """Two numbers in each byte, as quantized layers have them."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Adapted(nn.Linear):
    """With a tensor more."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.low_rank = nn.Parameter(torch.zeros(2, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Unfinished(nn.Linear):
    """Without the attributes of its class."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.zeros(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Recurrent(nn.LSTM):
    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        return x


@pytest.mark.parametrize(
    "module, kind, found",
    [
        (Same(2, 6, (3, 5), groups=2), "conv", {"kernel": "out in k1 k2", "bias": "out"}),
        (Standardised(4, 6, 3, groups=2, bias=False), "conv_transpose", {"kernel": "in out k1"}),
        (Activated(5, affine=False), "custom", None),
        (
            Activated(5),
            "batch_norm",
            {"scale": "c", "offset": "c", "mean": "c", "variance": "c", "count": ""},
        ),
        (Channels((4, 3)), "layer_norm", {"scale": "n1 n2", "offset": "n1 n2"}),
        (Scaled(11, 3), "embedding", {"embedding": "vocab dim"}),
        (Packed(), "custom", None),
        (Adapted(), "custom", None),
        (Unfinished(), "custom", None),
        (Recurrent(3, 4), "custom", None),
    ],
)
def test_subclasses_with_a_forward_of_their_own(module: nn.Module, kind: str, found: dict[str, str] | None) -> None:
    (layer,) = described(nn.Sequential(module)).values()
    assert layer.kind == kind and layer.type.endswith(type(module).__qualname__)
    if found is not None:
        assert axes(layer) == found
    assert {role.tensor for role in layer.roles.values()} == {f"0.{key}" for key in module.state_dict()}


def test_convolutions_say_where_their_channels_are() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.ConvTranspose3d(4, 6, 2), Same(2, 3, 2))
    assert [layer.config for layer in described(model).values()] == [
        {"groups": 2, "channels": "first"},
        {"groups": 1, "channels": "first"},
        {"groups": 1, "channels": "first"},
    ]


def test_recurrent_layers_and_cells_and_their_subclasses() -> None:
    class Own(nn.GRU):
        pass

    class OwnCell(nn.GRUCell):
        pass

    gru = {"gate_order": "r z n", "reset_after": True}
    for module, config in [
        (Own(3, 4), {**gru, "direction": "forward"}),
        (OwnCell(3, 4), gru),
        (nn.LSTMCell(3, 4), {"gate_order": "i f g o"}),
        (nn.RNNCell(3, 4, nonlinearity="relu"), {"gate_order": "h", "activation": "relu"}),
        (nn.RNN(3, 4), {"gate_order": "h", "activation": "tanh", "direction": "forward"}),
    ]:
        (layer,) = described(module).values()
        assert layer.config == config, module
    projected = described(nn.LSTM(3, 4, proj_size=2, bidirectional=True))
    assert {path: layer.config["direction"] for path, layer in projected.items()} == {"l0": "forward", "l0_reverse": "backward"}
    assert axes(projected["l0"])["recurrent_kernel"] == "(gate unit) out" and axes(projected["l0"])["projection"] == "out unit"


def test_a_transformer_layer() -> None:
    model = nn.TransformerEncoderLayer(6, 2, 9)
    found = described(model)
    kinds = {path: layer.kind for path, layer in found.items() if layer.kind != "dropout"}
    assert kinds == {
        "self_attn": "attention",
        "linear1": "linear",
        "linear2": "linear",
        "norm1": "layer_norm",
        "norm2": "layer_norm",
    }
    assert found["self_attn"].config == {"heads": 2} and axes(found["linear1"])["kernel"] == "out in"
    names = {role.tensor for layer in found.values() for role in layer.roles.values()}
    assert names == set(model.state_dict())


class FrozenBatchNorm2d(nn.Module):
    """As several libraries have it, each its own."""

    def __init__(self, epsilon: float | None) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(5))
        if epsilon is not None:
            self.eps = epsilon


def test_frozen_batch_norms() -> None:
    (layer,) = described(FrozenBatchNorm2d(1e-4)).values()
    assert layer.kind == "batch_norm" and layer.config == {"epsilon": 1e-4}
    assert axes(layer) == {"scale": "c", "offset": "c", "mean": "c", "variance": "c"}
    assert described(FrozenBatchNorm2d(None))[""].config == {}
    other = FrozenBatchNorm2d(1e-4)
    other.register_buffer("calls", torch.zeros(()))
    assert kinds(other) == ["custom"]


def _rms_norm(compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dtype: torch.dtype = torch.float32) -> nn.Module:
    class OwnRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(0.5, 2, 7, dtype=dtype))
            self.variance_epsilon = 1e-3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return compute(x, self.weight)

    return OwnRMSNorm()


def _rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-3)).to(x.dtype) * weight


@pytest.mark.parametrize(
    "module, kind",
    [
        (_rms_norm(_rms), "rms_norm"),
        (_rms_norm(_rms, torch.bfloat16), "rms_norm"),
        (_rms_norm(lambda x, weight: _rms(x, 1 + weight)), "custom"),
        (_rms_norm(lambda x, weight: _rms(x - x.mean(-1, keepdim=True), weight)), "custom"),
        (_rms_norm(lambda x, weight: x * torch.rsqrt(x.var(-1, keepdim=True) + 1e-3) * weight), "custom"),
        (_rms_norm(lambda x, weight: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-1) * weight), "custom"),
        (_rms_norm(lambda x, weight: x @ weight), "custom"),
        (_rms_norm(lambda x, weight: x[9] * weight), "custom"),
    ],
)
def test_rms_norms_of_other_libraries_are_told_by_what_they_compute(module: nn.Module, kind: str) -> None:
    called: list[Any] = []
    module.register_forward_hook(lambda *arguments: called.append(arguments))
    (layer,) = described(module).values()
    assert layer.kind == kind and not called
    if kind == "rms_norm":
        assert layer.config == {"epsilon": 1e-3} and axes(layer) == {"scale": "n1"}


SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
TEXT = {**SMALL, "vocab_size": 101}


def _bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT))


def _resnet() -> Any:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2])
    return transformers.ResNetForImageClassification(config)


def _mobilenet() -> Any:
    config = transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=32)
    return transformers.MobileNetV2ForImageClassification(config)


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=3, vocab_size=101, n_positions=20, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **TEXT))


TOKENS = np.array([[3, 1, 100, 7, 9]])
IMAGE = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)


@pytest.mark.parametrize(
    "build, batch, counts",
    [
        (_bert, TOKENS, {"linear": 14, "layer_norm": 6, "embedding": 3}),
        (_resnet, IMAGE, {"conv": 11, "batch_norm": 11, "linear": 1}),
        (_mobilenet, IMAGE, {"conv": 52, "batch_norm": 52, "linear": 1}),
        (_gpt2, TOKENS, {"linear": 9, "layer_norm": 5, "embedding": 2}),
        (_llama, TOKENS, {"linear": 15, "rms_norm": 5, "embedding": 1}),
    ],
)
def test_models_of_transformers(build: Callable[[], Any], batch: np.ndarray, counts: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = build()
    found = described(model)
    assert Counter(layer.kind for layer in found.values() if layer.kind != "dropout") == counts
    state = model.state_dict(keep_vars=True)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert not [problem for layer in found.values() for problem in layers.problems(layer, shapes)]
    tensors = {id(state[role.tensor]) for layer in found.values() for role in layer.roles.values()}
    assert tensors == {id(tensor) for tensor in state.values()}
    outputs, log = traced(model, batch)
    model.eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(batch)).logits.numpy()
    assert np.array_equal(outputs[0], expected)
    # Dropouts inside the function of an attention are not called.
    assert {path for path, layer in found.items() if layer.roles} <= set(log.paths) <= set(found)


def test_the_linear_layers_of_gpt2_are_transposed() -> None:
    layer = described(_gpt2())["transformer.h.0.mlp.c_fc"]
    assert axes(layer) == {"kernel": "in out", "bias": "out"}
    module = _gpt2().transformer.h[0].mlp.c_fc
    x = torch.rand(5, 24)
    assert torch.allclose(functional.linear(x, module.weight.T, module.bias), module(x), atol=1e-6)


def test_a_module_that_only_holds_a_layers_tensor_once_more_is_no_layer() -> None:
    class Head(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3))
            self.decoder = nn.Linear(2, 3)
            if tied:
                self.decoder.bias = self.bias

    assert set(described(Head(tied=True))) == {"decoder"}
    assert set(described(Head(tied=False))) == {"", "decoder"}
