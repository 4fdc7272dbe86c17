"""The facts of the machine without which no number means anything."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

PACKAGES = (
    "polyckpt",
    "numpy",
    "torch",
    "safetensors",
    "jax",
    "orbax-checkpoint",
    "tensorstore",
    "keras",
    "h5py",
    "xxhash",
)


def facts(directory: Path) -> dict[str, str]:
    """By name. directory: where the checkpoints are written."""
    gpu = {"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "CPUs": f"{os.cpu_count()} ({_cpu()})",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        **gpu,
        "file system": _file_system(directory),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _file_system(directory: Path) -> str:
    """The type of the mount that `directory` lies in: the one with the longest matching path, the last of equals."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(point, kind) for point, kind in mounts if directory.resolve().is_relative_to(point)]
    return max(enumerate(holding), key=lambda item: (len(item[1][0]), item[0]))[1][1]
