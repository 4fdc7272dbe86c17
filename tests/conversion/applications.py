"""Models that other people wrote twice: transformers' in torch and Keras Applications'. Converts them and prints JSON.

Run as: python -m tests.conversion.applications, with KERAS_BACKEND set.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import torch
import transformers
from torch import nn

import polyckpt
from tests.conversion.mutants import randomize

CLASSES, SIZE = 50, 64
KERAS: dict[str, Any] = {
    "weights": None,
    "classes": CLASSES,
    "classifier_activation": None,
    "input_shape": (SIZE, SIZE, 3),
}


def resnet50() -> tuple[nn.Module, Any]:
    config = transformers.ResNetConfig(downsample_in_bottleneck=True, num_labels=CLASSES)
    return transformers.ResNetForImageClassification(config), keras.applications.ResNet50(**KERAS)


def mobilenet_v2() -> tuple[nn.Module, Any]:
    config = transformers.MobileNetV2Config(num_labels=CLASSES, tf_padding=True)
    return transformers.MobileNetV2ForImageClassification(config), keras.applications.MobileNetV2(**KERAS)


def efficientnet_b0() -> tuple[nn.Module, Any]:
    config = transformers.EfficientNetConfig(
        width_coefficient=1.0, depth_coefficient=1.0, image_size=SIZE, hidden_dim=1280, num_labels=CLASSES
    )
    model = keras.applications.EfficientNetB0(**KERAS)
    # Without the part that normalises images, which the other has outside the model.
    inner = keras.Model(model.get_layer("stem_conv_pad").input, model.output)
    return transformers.EfficientNetForImageClassification(config), inner


def convnext_tiny() -> tuple[nn.Module, Any]:
    model = keras.applications.ConvNeXtTiny(**KERAS, include_preprocessing=False)
    return transformers.ConvNextForImageClassification(transformers.ConvNextConfig(num_labels=CLASSES)), model


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "ResNet-50": resnet50,
    "MobileNetV2": mobilenet_v2,
    "EfficientNet-B0": efficientnet_b0,
    "ConvNeXt-Tiny": convnext_tiny,
}


def converted(name: str) -> dict[str, Any]:
    """error: relative, of the logits. unlike: the same before. report: what the load said of parity."""
    torch.manual_seed(0)
    ours, theirs = MODELS[name]()
    randomize(ours, torch.Generator().manual_seed(1))
    ours.eval()
    batch = np.random.default_rng(0).random((2, 3, SIZE, SIZE), dtype=np.float32)
    with torch.no_grad():
        expected = ours(torch.from_numpy(batch)).logits.numpy()
    turned = np.moveaxis(batch, 1, -1)
    before = keras.ops.convert_to_numpy(theirs(turned, training=False))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        report = polyckpt.load(polyckpt.save(f"{directory}/c", ours, probe=batch), theirs).report
    found = keras.ops.convert_to_numpy(theirs(turned, training=False))
    scale = np.abs(expected).max()
    return {
        "error": float(np.abs(found - expected).max() / scale),
        "unlike": float(np.abs(before - expected).max() / scale),
        "report": str(report and report.parity),
        "tensors": len(report.rows) if report else 0,
        "seconds": round(time.perf_counter() - began, 1),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    sys.stdout.write(json.dumps({name: converted(name) for name in MODELS}))
