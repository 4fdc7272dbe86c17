"""Hugging Face folders: those of a Trainer and of save_pretrained, in shards too, and what from_pretrained reads of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, SequentialSampler

import polyckpt
from polyckpt import CorruptError, MismatchError, UnsupportedError
from polyckpt.formats import huggingface
from tests.formats.torch_nets import equal, equal_slots
from tests.sealing import run_python

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

CONFIG = BertConfig(
    vocab_size=20,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
    num_labels=3,
)
"""With dropout, so that a run goes on exactly with its random states alone."""


class Sentences(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(0, 20, (8,), generator=generator), "labels": torch.tensor(index % 3)}


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(Sentences())


def bert(seed: int = 1) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(CONFIG)


def trainer(directory: Path, model: Any) -> Trainer:
    arguments = TrainingArguments(
        str(directory),
        max_steps=6,
        per_device_train_batch_size=4,
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        logging_steps=1,
        learning_rate=0.01,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    return InOrder(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of one epoch, saved after the third and the last."""
    directory = tmp_path_factory.mktemp("trainer")
    trainer(directory, bert(0)).train()
    return directory


def test_a_trainer_run_goes_on_bit_for_bit(run: Path, tmp_path: Path) -> None:
    there = bert()
    live = trainer(tmp_path, there)
    live.create_optimizer_and_scheduler(6)
    restored = polyckpt.load(run / "checkpoint-3", there, live.optimizer, scheduler=live.lr_scheduler)
    assert restored.skipped == () and restored.lr == (0.005, 0.005)
    there.train()
    for step in range(3, 6):
        examples = [Sentences()[index] for index in range(step * 4, step * 4 + 4)]
        batch = {name: torch.stack([each[name] for each in examples]) for name in examples[0]}
        there(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(there.parameters(), 1.0)
        live.optimizer.step()
        live.lr_scheduler.step()
        live.optimizer.zero_grad()
    ended = BertForSequenceClassification.from_pretrained(run / "checkpoint-6")
    last = trainer(tmp_path, ended)
    last.create_optimizer_and_scheduler(6)
    last.optimizer.load_state_dict(torch.load(run / "checkpoint-6/optimizer.pt"))
    assert equal(there, ended) and equal_slots(live.optimizer, last.optimizer)
    assert live.lr_scheduler.state_dict() == torch.load(run / "checkpoint-6/scheduler.pt")


def test_progress_and_metrics_are_those_of_the_step(run: Path) -> None:
    opened = polyckpt.open(run / "checkpoint-3")
    history = json.loads((run / "checkpoint-3/trainer_state.json").read_text())["log_history"]
    expected = {name: entry[name] for entry in history if entry["step"] == 3 for name in ("loss", "eval_loss") if name in entry}
    progress = opened.manifest.progress
    assert (progress.epoch, progress.step) == (0, 3) and dict(opened.manifest.metrics) == expected
    assert len(expected) == 2 and opened.manifest.model.type == "state_dict"
    restored = polyckpt.load(run / "checkpoint-6", bert())
    assert (restored.epoch, restored.step) == (1, 6)
    assert restored.extra["trainer_state"]["epoch"] == 1.0 and len(restored.extra["trainer_state"]["log_history"]) == 8


def test_a_model_tells_whose_the_slots_of_a_trainer_are(run: Path) -> None:
    alone = polyckpt.open(run / "checkpoint-3")
    assert alone.manifest.optimizer is None and any("which number is which weight" in each for each in alone.left_out)
    told = polyckpt.open(run / "checkpoint-3", like=bert())
    groups = told.manifest.optimizer.groups
    assert [group.hyperparameters["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all("bias" in name or "LayerNorm" in name for name in groups[1].parameters)
    raw = torch.load(run / "checkpoint-3/optimizer.pt", weights_only=True)["state"]
    first = groups[1].parameters[0]
    assert np.array_equal(told.optimizer[f"exp_avg/{first}"], raw[len(groups[0].parameters)]["exp_avg"])


def test_the_directory_of_a_trainer_opens_at_its_newest_checkpoint(run: Path) -> None:
    assert polyckpt.open(run).manifest.progress.step == 6
    assert huggingface.steps(run) == [run / "checkpoint-3", run / "checkpoint-6"]


def sharded(folder: Path) -> tuple[BertForSequenceClassification, list[str]]:
    model = bert(0)
    model.save_pretrained(folder, max_shard_size="6KB")
    return model, sorted(path.name for path in folder.glob("model-*.safetensors"))


def torch_shards(folder: Path) -> BertForSequenceClassification:
    """Shards as transformers 4 wrote them."""
    model = bert(0)
    state = model.state_dict()
    names = list(state)
    told = {}
    for number, part in enumerate((names[:20], names[20:]), 1):
        shard = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / shard)
        told |= dict.fromkeys(part, shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": told}))
    return model


def test_shards_are_one_model(tmp_path: Path) -> None:
    model, shards = sharded(tmp_path)
    assert len(shards) > 2
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        there = bert()
        polyckpt.load(path, there)
        assert equal(model, there)
    assert polyckpt.open(tmp_path).manifest.model.type == "transformers.BertForSequenceClassification"


def test_shards_of_torch_save_are_one_model(tmp_path: Path) -> None:
    model, there = torch_shards(tmp_path), bert()
    restored = polyckpt.load(tmp_path, there)
    assert equal(model, there) and restored.checkpoint.left_out == ()


def test_of_two_copies_one_is_read_and_the_other_is_said(tmp_path: Path) -> None:
    model = bert(0)
    model.save_pretrained(tmp_path)
    torch.save(bert(5).state_dict(), tmp_path / "pytorch_model.bin")
    there = bert()
    restored = polyckpt.load(tmp_path, there)
    assert equal(model, there)
    assert restored.checkpoint.left_out == ("pytorch_model.bin: another copy of the weights",)


def test_tied_weights_that_stand_there_once_are_tied(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0)
    model, there = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    polyckpt.load(tmp_path, there)
    assert equal(model, there) and there.lm_head.weight is there.transformer.wte.weight


def test_a_base_model_and_its_head_load_into_each_other_where_that_is_wanted(tmp_path: Path) -> None:
    model, base = bert(0), BertModel(CONFIG)
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(MismatchError) as error:
        polyckpt.load(tmp_path / "whole", base)
    assert {each.name for each in error.value.problems} == {"classifier.weight", "classifier.bias"}
    polyckpt.load(tmp_path / "whole", base, strict=False)
    assert equal(model.bert, base)
    base.save_pretrained(tmp_path / "base")
    there = bert()
    head = there.classifier.weight.clone()
    assert len(polyckpt.load(tmp_path / "base", there, strict=False).skipped) == 2
    assert equal(there.bert, base) and torch.equal(there.classifier.weight, head)


BAD_INDEX: dict[str, tuple[Callable[[dict[str, str], list[str]], Any], str]] = {
    "outside": (lambda told, shards: {**told, "classifier.bias": "../outside.safetensors"}, "is not the name of a file"),
    "absolute": (lambda told, shards: {**told, "classifier.bias": "/etc/passwd"}, "is not the name of a file"),
    "missing shard": (lambda told, shards: {**told, "classifier.bias": "nowhere.safetensors"}, "nowhere.safetensors: missing"),
    "missing tensor": (lambda told, shards: {**told, "nothing": shards[0]}, "not there: nothing in "),
    "no names": (lambda told, shards: {"classifier.bias": 3}, "no weight_map"),
    "no map": (lambda told, shards: [1, 2], "no weight_map"),
}


@pytest.mark.parametrize("what", BAD_INDEX)
def test_an_index_that_is_wrong_is_refused(what: str, tmp_path: Path) -> None:
    _, shards = sharded(tmp_path / "model")
    (tmp_path / "outside.safetensors").write_bytes((tmp_path / "model" / shards[0]).read_bytes())
    index = tmp_path / "model/model.safetensors.index.json"
    told = json.loads(index.read_text())
    change, message = BAD_INDEX[what]
    index.write_text(json.dumps({**told, "weight_map": change(told["weight_map"], shards)}))
    with pytest.raises(CorruptError, match=message):
        polyckpt.open(tmp_path / "model")


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json", "trainer_state.json"])
def test_json_that_is_none_is_refused(name: str, run: Path, tmp_path: Path) -> None:
    sharded(tmp_path)
    for damaged in (b"", b"{", b"[1]", b'{"a": "\xff"}', b"[" * 100_000):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(CorruptError, match=f"{name}: not an object of JSON"):
            polyckpt.open(tmp_path)


class Canary:
    """A pickle that would run code: it names a function and what to call it with."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_no_file_of_a_folder_can_run_code(name: str, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    held = [] if name == "pytorch_model.bin" else ["model.safetensors", "trainer_state.json"]
    for each in held:
        (folder / each).write_bytes((run / "checkpoint-3" / each).read_bytes())
    torch.save({"a": torch.ones(2), "b": Canary(tmp_path / "ran")}, folder / name)
    with pytest.raises(UnsupportedError, match=rf"{name}: it is a pickle that needs posix.system.*(?s:.*)add_safe_globals"):
        polyckpt.load(folder, bert())
    assert not (tmp_path / "ran").exists()


ALONE = """
import sys
sys.modules["polyckpt"] = None
import torch
from transformers import BertForSequenceClassification
expected = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model, told = BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
"""


def test_from_pretrained_reads_what_is_exported_without_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert(0)
    torch.save(model.state_dict(), tmp_path / "expected.pt")
    polyckpt.save(tmp_path / "run", model)
    polyckpt.export(tmp_path / "run", tmp_path / "whole", bert(), to="huggingface")
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 6_000)
    polyckpt.export(tmp_path / "run", tmp_path / "shards", bert(), to="huggingface")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    done = run_python(ALONE, tmp_path / "expected.pt", tmp_path / "whole", tmp_path / "shards")
    assert done.returncode == 0, done.stderr
    for name in ("whole", "shards"):
        there = bert()
        polyckpt.load(tmp_path / name, there)
        assert equal(model, there)
