"""torch tensors to leaves and back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from polyckpt.checkpoint import StoredTensor
from polyckpt.dtypes import DTYPES
from polyckpt.errors import UnsupportedError
from polyckpt.leaves import Leaf
from polyckpt.parallel import in_threads

KIND = "torch"

DTYPE_NAMES: dict[torch.dtype, str] = {
    dtype: name for name in DTYPES if isinstance(dtype := getattr(torch, name, None), torch.dtype)
}
"""torch's element types that the format holds, by their neutral name (the two vocabularies agree)."""

# torch names these too, but has neither a view nor a copy of them.
for _name in ("int2", "int4", "uint2", "uint4"):
    DTYPE_NAMES.pop(getattr(torch, _name, None), None)  # type: ignore[arg-type]

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def leaf(tensor: torch.Tensor, what: str) -> Leaf:
    """The leaf of any dense tensor on any device; tensors that view the same memory alike have one identity.

    Raises UnsupportedError, naming `what`, for a tensor that has no dense values of its own to store.
    """
    if reason := _unsupported(tensor):
        raise UnsupportedError(f"{what}: {reason}")
    identity = None
    if tensor.numel():
        place = (str(tensor.device), tensor.data_ptr(), tensor.is_conj(), tensor.is_neg())
        identity = (*place, tuple(tensor.shape), tensor.stride())

    def read() -> np.ndarray:
        values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        return values.reshape(-1).view(torch.uint8).numpy()

    kind = ".".join([KIND, *map(str, axes)]) if (axes := _axes_in_memory(tensor)) else KIND
    return Leaf(
        dtype=DTYPE_NAMES[tensor.dtype],
        shape=tuple(tensor.shape),
        read=read,
        identity=identity,
        kind=kind,
        frozen=tensor.device.type != "cpu",  # read() copies it to the host
    )


def mapped(stored: StoredTensor) -> torch.Tensor:
    """A stored tensor as a CPU tensor over the file's private map: to be copied from, not kept."""
    values = stored.strided()
    if any(stride < 0 for stride in values.strides):
        values = np.ascontiguousarray(values)
    if values.dtype.isbuiltin != 1:
        values = values.view(f"i{values.itemsize}")  # torch knows the type, NumPy does not
    return torch.from_numpy(values).view(_DTYPES[stored.dtype])


def write_all(pairs: Iterable[tuple[torch.Tensor, StoredTensor]]) -> None:
    """Copy stored tensors into live ones of their types and shapes, wherever these lie."""
    flat = []
    with torch.no_grad():
        for live, stored in pairs:
            if live.device.type == "cpu" and live.is_contiguous() and not (live.is_conj() or live.is_neg()):
                flat.append((live.detach().reshape(-1).view(torch.uint8).numpy(), stored))
            else:
                live.copy_(mapped(stored))
    # Twice as fast as torch's own copy, which reads what it is about to overwrite.
    in_threads(flat, lambda pair: np.copyto(pair[0], pair[1].raw()), size=lambda pair: pair[0].size)


def copied(stored: StoredTensor, kind: str = KIND) -> torch.Tensor:
    """A stored tensor as a new CPU tensor of its own, in the memory layout that `kind` may name."""
    axes = [int(axis) for axis in kind.split(".")[1:]]
    # What is made for training must not be an inference tensor, wherever it is made.
    with torch.inference_mode(False):
        if not axes:
            return mapped(stored).clone()
        back = sorted(range(len(axes)), key=axes.__getitem__)
        return mapped(stored).permute(axes).contiguous().clone().permute(back)


def laid_out_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`tensor` in the memory layout of `parameter`: fused optimizers walk both as flat memory."""
    if tensor.shape != parameter.shape or tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype, device=tensor.device, requires_grad=False).copy_(tensor)


def loadable(stored: StoredTensor) -> bool:
    """Whether torch has the element type."""
    return stored.dtype in _DTYPES


def show(tensor: torch.Tensor) -> str:
    """A live tensor as errors show it: `float32[2, 3]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _axes_in_memory(tensor: torch.Tensor) -> list[int]:
    """The axes of a dense tensor from the outermost in memory to the innermost; none where that is their own order."""
    if tensor.is_contiguous() or not tensor.numel():
        return []
    axes = sorted(range(tensor.ndim), key=lambda axis: (-tensor.stride()[axis], -tensor.shape[axis]))
    return axes if tensor.permute(axes).is_contiguous() else []


def _unsupported(tensor: torch.Tensor) -> str | None:
    kind = type(tensor)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        return "a lazy parameter without a shape yet: run one forward pass first"
    if name.startswith("torch.distributed.tensor"):
        return "a DTensor, which holds one process's shard: save full_tensor() of it"
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"a {name}, a tensor subclass whose values only its own code can read: convert it to a plain tensor"
    if tensor.is_meta:
        return "a tensor on the meta device, which holds no values: materialise it first"
    if tensor.is_quantized:
        return f"a quantized tensor ({tensor.dtype}): save int_repr(), scale and zero point instead"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}: only dense ones are stored; save to_dense() of it"
    if tensor.is_nested:
        return "a nested tensor: save its parts"
    if tensor.dtype not in DTYPE_NAMES:
        return f"element type {tensor.dtype} is not part of the format: view it as an integer type of the same size"
    return None
