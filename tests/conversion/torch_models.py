"""Models in torch, by other people and by us, with a batch for each: small, with unequal dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn


def bert() -> tuple[nn.Module, np.ndarray]:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=41,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=16,
    )
    return BertModel(config), np.random.default_rng(0).integers(0, 41, (2, 7))


def gpt2() -> tuple[nn.Module, np.ndarray]:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        vocab_size=41, n_embd=24, n_layer=3, n_head=3, n_positions=16, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    return GPT2Model(config), np.random.default_rng(0).integers(0, 41, (2, 7))


def resnet() -> tuple[nn.Module, np.ndarray]:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[2, 2, 2, 1], layer_type="bottleneck")
    return ResNetModel(config), image(2, 3, 40, 36)


def mobilenet() -> tuple[nn.Module, np.ndarray]:
    from transformers import MobileNetV2Config, MobileNetV2Model

    return MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.35, image_size=40)), image(2, 3, 40, 36)


def unet() -> tuple[nn.Module, np.ndarray]:
    return UNet(), image(2, 3, 16, 12)


def tagger() -> tuple[nn.Module, np.ndarray]:
    return Tagger(), np.random.default_rng(0).integers(0, 31, (3, 9))


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).random(shape, dtype=np.float32)


class Block(nn.Module):
    """Two convolutions with norms."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(x)))


class UNet(nn.Module):
    """Down twice and up twice, with skip connections and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = Block(3, 6), Block(6, 10), Block(10, 14)
        self.up2, self.merge2 = nn.ConvTranspose2d(14, 10, 2, stride=2), Block(20, 10)
        self.up1, self.merge1 = nn.ConvTranspose2d(10, 6, 2, stride=2), Block(12, 6)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.down1(x)
        two = self.down2(nn.functional.max_pool2d(one, 2))
        x = self.middle(nn.functional.max_pool2d(two, 2))
        x = self.merge2(torch.cat([two, self.up2(x)], 1))
        x = self.merge1(torch.cat([one, self.up1(x)], 1))
        return self.head(x)


class Tagger(nn.Module):
    """Three bidirectional LSTM layers over embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 7)
        self.first = nn.LSTM(7, 5, batch_first=True, bidirectional=True)
        self.second = nn.LSTM(10, 5, batch_first=True, bidirectional=True)
        self.third = nn.LSTM(10, 5, batch_first=True, bidirectional=True)
        self.hidden1 = nn.Linear(10, 10)
        self.hidden2 = nn.Linear(10, 10)
        self.scores = nn.Linear(10, 6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.third(self.second(self.first(self.embedding(tokens))[0])[0])[0]
        return self.scores(torch.tanh(self.hidden2(torch.tanh(self.hidden1(x)))))


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "ResNet": resnet,
    "MobileNetV2": mobilenet,
    "BERT": bert,
    "GPT-2": gpt2,
    "U-Net": unet,
    "BiLSTM tagger": tagger,
}
"""Name -> model and batch."""
