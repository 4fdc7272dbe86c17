"""Folders of Hugging Face: a model in one safetensors file or in shards with an index, and what a Trainer saves beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from polyckpt.adapter import Contents
from polyckpt.errors import CorruptError
from polyckpt.formats import safetensors, table
from polyckpt.formats.archives import Records
from polyckpt.formats.described import Like, contents_of
from polyckpt.formats.table import Format
from polyckpt.formats.writing import Source
from polyckpt.leaves import Leaf
from polyckpt.storage import tensor_file
from polyckpt.storage.tensor_file import TensorFileReader

WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")
"""Names of files that hold a whole model, the one that transformers prefers first."""
INDEX = ".index.json"
TRAINER = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})")
SHARD_BYTES = 5_000_000_000
"""Beyond this a model is written in several files, as transformers does by default."""
_LEFT = {
    "training_args.bin": "the arguments of the Trainer, a pickle of a class of transformers",
}


def recognises(path: Path) -> bool:
    """Whether it is such a folder, or the index of one, or what a Trainer writes its checkpoints into."""
    if path.is_file():
        return path.name.endswith(INDEX) and _weights(path.parent) is not None
    return path.is_dir() and (_weights(path) is not None or bool(steps(path)))


def steps(path: Path) -> list[Path]:
    """The checkpoints in the directory of a Trainer that holds no model of its own, oldest first."""
    if not path.is_dir() or _weights(path) is not None:
        return []
    found = {each: _CHECKPOINT.fullmatch(each.name) for each in path.iterdir() if (each / TRAINER).is_file()}
    numbers = {each: int(matched[1]) for each, matched in found.items() if matched and _weights(each) is not None}
    return sorted(numbers, key=numbers.__getitem__)


def _weights(folder: Path) -> str | None:
    """The file, or index, that holds the weights."""
    return next((name for each in WEIGHTS for name in (each, each + INDEX) if (folder / name).is_file()), None)


def read(path: Path, like: Like | None) -> Contents:
    """The contents of a folder; with a Trainer's optimizer, schedule and progress where it saved them."""
    folder = path.parent if path.is_file() else path
    name = path.name if path.is_file() else _weights(folder)
    assert name is not None
    left_out = [f"{each}: another copy of the weights" for each in _others(folder, name)]
    left_out += [f"{each}: {why}" for each, why in _LEFT.items() if (folder / each).is_file()]
    records = Records()
    weights, adapter = _index(folder, name, left_out, records) if name.endswith(INDEX) else _file(folder, name, records)
    if (folder / TRAINER).is_file() and adapter == "torch":
        found: Contents = table.call(
            "polyckpt.adapters.torch.trainer:contents_of",
            "a folder of a Trainer",
            "polyckpt[torch]",
            folder,
            weights,
            like,
            left_out,
            records,
        )
        return found
    return contents_of(weights, like, adapter=adapter, type=_type(folder), left_out=left_out, check=records.check)


def _others(folder: Path, chosen: str) -> list[str]:
    candidates = [name for each in WEIGHTS for name in (each, each + INDEX)]
    return [name for name in candidates if name != chosen and (folder / name).is_file()]


def _type(folder: Path) -> str:
    """The class that the configuration names."""
    if not (folder / "config.json").is_file():
        return "huggingface"
    architectures = json_of(folder / "config.json").get("architectures")
    return f"transformers.{architectures[0]}" if isinstance(architectures, list) and architectures else "huggingface"


def json_of(path: Path) -> dict[str, Any]:
    """An object of JSON. Raises CorruptError for what is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptError(f"{path}: not an object of JSON: {error}") from error


def _file(folder: Path, name: str, records: Records) -> tuple[dict[str, Leaf], str]:
    """The tensors of one file by name, and the adapter that they are of. records: gets the checksums that it keeps."""
    if name.endswith(".safetensors"):
        reader = TensorFileReader(folder, name)
        return safetensors.leaves(reader), safetensors.ADAPTERS.get(reader.metadata.get("format", "pt"), "torch")
    leaves: dict[str, Leaf] = table.call(
        "polyckpt.adapters.torch.files:leaves_of_file", "a file of torch.save", "polyckpt[torch]", folder / name, records
    )
    return leaves, "torch"


def _index(folder: Path, name: str, left_out: list[str], records: Records) -> tuple[dict[str, Leaf], str]:
    """The tensors of all shards that an index names, each out of the file where it says that it is."""
    told = json_of(folder / name).get("weight_map")
    if not isinstance(told, dict) or not all(isinstance(each, str) for each in told.values()):
        raise CorruptError(f"{folder / name}: no weight_map from names to files")
    shards: dict[str, dict[str, Leaf]] = {}
    adapter = "torch"
    for shard in dict.fromkeys(told.values()):
        if Path(shard).name != shard or shard in (".", ".."):
            raise CorruptError(f"{folder / name}: {shard!r} is not the name of a file in the folder")
        if not (folder / shard).is_file():
            raise CorruptError(f"{folder / shard}: missing, but {name} says that tensors are in it")
        shards[shard], adapter = _file(folder, shard, records)
    absent = [f"{tensor} in {shard}" for tensor, shard in told.items() if tensor not in shards[shard]]
    if absent:
        raise CorruptError(f"{folder / name}: names tensors that are not there: {', '.join(absent[:5])}")
    left_out += [
        f"{tensor} in {shard}: not what {name} names"
        for shard, leaves in shards.items()
        for tensor in leaves
        if told.get(tensor) != shard
    ]
    return {tensor: shards[shard][tensor] for tensor, shard in told.items()}, adapter


def write(source: Source, target: Path) -> None:
    """Write a folder that `from_pretrained` reads: weights in shards of at most SHARD_BYTES, tied ones once.

    The configuration is that of the live model, where one is given that has it; else transformers needs one from elsewhere.
    """
    target.mkdir()
    checkpoint = source.checkpoint
    stored = {
        name: tensor for name, tensor in checkpoint.weights.stored.items() if name not in checkpoint.manifest.model.aliases
    }
    told = {"format": next(name for name, each in safetensors.ADAPTERS.items() if each == "torch")}
    shards: list[dict[str, Leaf]] = [{}]
    held = 0
    for name, tensor in stored.items():
        leaf = safetensors.leaf_of(tensor)
        size = math.prod(leaf.shape) * tensor.itemsize
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = leaf
        held += size
    if len(shards) == 1:
        tensor_file.write(target / "model.safetensors", shards[0], told)
    else:
        _write_shards(target, shards, told)
    save = getattr(getattr(source.model, "config", None), "save_pretrained", None)
    if save is not None:
        save(target)


def _write_shards(target: Path, shards: list[dict[str, Leaf]], told: Mapping[str, str]) -> None:
    where: dict[str, str] = {}
    total = 0
    for number, leaves in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        written = tensor_file.write(target / name, leaves, told)
        total += written.entry.size_bytes
        where |= dict.fromkeys(leaves, name)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (target / f"model.safetensors{INDEX}").write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2))


FOLDER = Format(
    name="huggingface",
    title="a Hugging Face folder",
    adapter="torch",
    recognises=recognises,
    steps=steps,
    reader="polyckpt.formats.huggingface:read",
    writer="polyckpt.formats.huggingface:write",
)
