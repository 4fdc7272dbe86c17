"""Layers that one model holds packed and the other apart, by rules that name some of the outputs of a layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import polyckpt
from polyckpt import PlanError, parity
from tests.conversion.torch_models import gpt2

WIDTH = 24
TOKENS = gpt2()[1]

APART = {
    "h.{i}.attn.c_attn[:24]": "blocks/{i}/attention/query",
    "h.{i}.attn.c_attn[24:48]": "blocks/{i}/attention/key",
    "h.{i}.attn.c_attn[48:]": "blocks/{i}/attention/value",
}


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.before = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, WIDTH, decode=False, rngs=rngs)
        self.between = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.wide = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.narrow = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.before(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.narrow(nnx.gelu(self.wide(self.between(x)), approximate=True))


class Decoder(nnx.Module):
    """GPT-2 as Flax writes it, with queries, keys and values apart."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Embed(41, WIDTH, rngs=rngs)
        self.places = nnx.Embed(16, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(3)])
        self.last = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.places(np.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@pytest.fixture
def hidden_states() -> nn.Module:
    """transformers' GPT-2 with the packed projection, random biases too, as a function from tokens to hidden states."""
    torch.manual_seed(0)
    model = gpt2()[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_a_packed_projection_becomes_three_layers_and_back(hidden_states: nn.Module, tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "packed", hidden_states, probe=TOKENS)
    model = Decoder(nnx.Rngs(1))
    report = polyckpt.load(path, model, rules=APART).report
    assert report is not None and report.parity is not None and report.parity.agrees
    expected = hidden_states(torch.from_numpy(TOKENS)).last_hidden_state.detach().numpy()
    assert np.abs(np.asarray(model(TOKENS)) - expected).max() < 1e-5 * np.abs(expected).max()

    back = gpt2()[0]
    polyckpt.save(tmp_path / "apart", model, probe=TOKENS)
    polyckpt.load(tmp_path / "apart", back, rules={there: here for here, there in APART.items()})
    for name, value in hidden_states.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_a_plan_with_parts_is_saved_and_followed(hidden_states: nn.Module, tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "packed", hidden_states)
    plan = polyckpt.plan(path, Decoder(nnx.Rngs(1)), rules=APART)
    plan.save(tmp_path / "plan.json")
    model = Decoder(nnx.Rngs(1))
    polyckpt.load(path, model, plan=tmp_path / "plan.json")
    packed = hidden_states.h[1].attn.c_attn.weight.detach().numpy()
    kernel = np.asarray(model.blocks[1].attention.key.kernel).reshape(WIDTH, WIDTH)
    assert np.array_equal(kernel, packed[:, WIDTH : 2 * WIDTH])


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(5, 10)
        self.conv = nn.Conv1d(5, 4, 3, groups=1)
        self.lstm = nn.LSTM(3, 4)


class Apart(nn.Module):
    """Keys and values share what queries have twice: parts of unequal sizes, and a convolution in two."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(5, 6), nn.Linear(5, 2), nn.Linear(5, 2)
        self.left, self.right = nn.Conv1d(5, 1, 3), nn.Conv1d(5, 3, 3)
        self.rnn = nn.LSTM(3, 4)


UNEQUAL = {"qkv[0:6]": "q", "qkv[6:8]": "k", "qkv[8:10]": "v", "conv[:1]": "left", "conv[1:]": "right"}


def test_parts_may_be_of_unequal_sizes(tmp_path: Path) -> None:
    one, two = Packed(), Apart()
    polyckpt.load(polyckpt.save(tmp_path / "a", one), two, rules=UNEQUAL)
    assert torch.equal(torch.cat([two.q.weight, two.k.weight, two.v.weight]), one.qkv.weight)
    assert torch.equal(torch.cat([two.left.bias, two.right.bias]), one.conv.bias)
    third = Packed()
    polyckpt.load(polyckpt.save(tmp_path / "b", two), third, rules={there: here for here, there in UNEQUAL.items()})
    for name, value in one.state_dict().items():
        assert torch.equal(third.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ({**UNEQUAL, "qkv[5:8]": "k"}, "none twice"),
        ({**UNEQUAL, "qkv[8:11]": "v"}, r"qkv\[8:11\]: of 10 outputs"),
        ({**UNEQUAL, "qkv[3:3]": "v"}, "some each"),
        ({**UNEQUAL, "lstm.l0[0:2]": "rnn"}, "only the outputs of linear"),
        ({**UNEQUAL, "nothing[0:2]": "q"}, "fits nothing"),
        ({**UNEQUAL, "qkv[6:8]": "q"}, "has this path and fits"),
    ],
)
def test_parts_that_cannot_be_are_refused(rules: dict[str, str], match: str, tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "a", Packed())
    target = Apart()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(PlanError, match=match):
        polyckpt.load(path, target, rules=rules)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_what_no_rule_names_is_not_lost_in_silence(tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "a", nn.ModuleDict({"qkv": nn.Linear(5, 10)}))
    target = nn.ModuleDict({"q": nn.Linear(5, 6), "k": nn.Linear(5, 2)})
    with pytest.raises(polyckpt.MismatchError, match=r"qkv\.weight"):
        polyckpt.load(path, target, rules={"qkv[0:6]": "q", "qkv[6:8]": "k"})


# A bias that the model lacks.


class Biased(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, bias=bias)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3, bias=bias)
        self.norm2 = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))


def biased() -> Biased:
    torch.manual_seed(0)
    model = Biased(bias=True).eval()
    for norm in (model.norm1, model.norm2):
        nn.init.normal_(norm.weight)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return model


IMAGE = np.random.default_rng(0).random((2, 3, 8, 9), dtype=np.float32)


def test_a_bias_goes_into_the_norm_where_that_is_asked_for(tmp_path: Path) -> None:
    source, target = biased(), Biased(bias=False)
    path = polyckpt.save(tmp_path / "a", source, probe=IMAGE)
    with pytest.raises(polyckpt.MismatchError, match=r"conv1\.bias: .*folded bias"):
        polyckpt.load(path, target, rules={"{a}": "{a}"})
    report = polyckpt.load(path, target, rules={"{a}": "{a}"}, accept={"folded bias"}).report
    assert parity.compare(source, target.eval(), IMAGE).agrees
    assert report is not None
    assert {row.target: str(row.exactness) for row in report.rows if "running_mean" in row.target} == {
        "norm1.running_mean": "folded",
        "norm2.running_mean": "folded",
    }


def test_a_bias_that_something_else_reads_too_is_not_folded_in_silence(tmp_path: Path) -> None:
    class Between(Biased):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm2(torch.relu(self.conv2(self.norm1(torch.relu(self.conv1(x))))))

    source, target = Between(bias=True), Between(bias=False)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    for error, probe in ((polyckpt.AmbiguityError, None), (polyckpt.ParityError, IMAGE)):
        path = polyckpt.save(tmp_path / "a", source.eval(), probe=probe, overwrite=True)
        with pytest.raises(error):
            polyckpt.load(path, target, rules={"{a}": "{a}"}, accept={"folded bias"})
        assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_a_bias_without_a_norm_after_it_is_refused_all_the_same(tmp_path: Path) -> None:
    path = polyckpt.save(tmp_path / "a", nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6)))
    target = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.GroupNorm(2, 6))
    with pytest.raises(polyckpt.MismatchError, match=r"0.bias: .*no place"):
        polyckpt.load(path, target, rules={"{a}": "{a}"}, accept={"folded bias"})
