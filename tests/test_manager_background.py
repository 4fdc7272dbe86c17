"""Saving in the background, and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyckpt
from polyckpt import CheckpointManager
from polyckpt.errors import RunError, StorageError
from polyckpt.preemption import Preemption
from polyckpt.snapshot import Snapshot


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits until it is set."""
    opened = threading.Event()
    real = Snapshot.write

    def write(self: Snapshot, *arguments: Any, **keywords: Any) -> None:
        assert opened.wait(30)
        real(self, *arguments, **keywords)

    monkeypatch.setattr(Snapshot, "write", write)
    return opened


def numpy_model() -> tuple[Any, Any]:
    model = {"w": np.ones((3, 2)), "b": np.float32(1)}
    return model, lambda: model["w"].__imul__(7)


def torch_model() -> tuple[Any, Any]:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).bfloat16())
    model[0].bias = torch.nn.Parameter(model[0].weight[0].detach())
    model.register_buffer("view", model[1].weight.detach().t())

    def change() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(7).add_(1)

    return model, change


def jax_model() -> tuple[Any, Any]:
    import jax

    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 7 + 1, tree), donate_argnums=0)
    model = step({"w": jax.numpy.ones((300, 200)), "b": jax.numpy.ones(3, "bfloat16")})
    return model, lambda: jax.block_until_ready(step(step(model)))


def keras_model() -> tuple[Any, Any]:
    import keras

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    return model, lambda: [variable.assign(variable.value * 7 + 1) for variable in model.weights]


MODELS = {"numpy": numpy_model, "torch": torch_model, "jax": jax_model, "keras": keras_model}


@pytest.mark.parametrize("framework", MODELS)
def test_what_changes_after_the_call_is_not_saved(
    tmp_path: Path, gate: threading.Event, framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    model, change = MODELS[framework]()
    gate.set()
    expected = dict(polyckpt.inspect(polyckpt.save(tmp_path / "now", model)).weights)
    gate.clear()
    with CheckpointManager(tmp_path / "run", async_save=True) as ckpts:
        ckpts.save(model, step=1)
        change()
        assert not (tmp_path / "run" / "last").exists()
        gate.set()
        ckpts.wait()
        found = dict(polyckpt.inspect(tmp_path / "run" / "last").weights)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert array.dtype == found[name].dtype and array.tobytes() == found[name].tobytes(), name


def test_one_save_at_a_time_in_one_buffer(tmp_path: Path, gate: threading.Event) -> None:
    model = {"w": np.zeros(1000)}
    with CheckpointManager(tmp_path, async_save=True, keep_last=None) as ckpts:
        ckpts.save(model, step=1)
        model["w"] += 1
        second = threading.Thread(target=lambda: ckpts.save(model, step=2))
        second.start()
        second.join(0.2)
        assert second.is_alive(), "the second save did not wait for the first"
        buffer = ckpts._staging._buffer
        gate.set()
        second.join()
        ckpts.wait()
        assert ckpts._staging._buffer is buffer and 8000 <= buffer.nbytes < 16000
    for step in (1, 2):
        assert (polyckpt.inspect(tmp_path / f"step-0000000{step}").weights["w"] == step - 1).all()


def test_the_best_is_there_while_it_is_written(tmp_path: Path, gate: threading.Event) -> None:
    with CheckpointManager(tmp_path, monitor="loss", async_save=True) as ckpts:
        ckpts.save({"w": np.ones(3)}, epoch=1, metrics={"loss": 1})
        assert ckpts.best is not None and ckpts.best.name == "epoch-00000001"
        gate.set()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            start = ckpts.restore_best({"w": np.zeros(3)})
        assert (start.epoch, start.step, start.model["w"][0]) == (1, 0, 1)


def test_what_is_measured_meanwhile_waits_for_nothing(tmp_path: Path, gate: threading.Event) -> None:
    with CheckpointManager(tmp_path, monitor="loss", every=polyckpt.Every(steps=3), async_save=True, patience=2) as ckpts:
        ckpts.save({"w": np.zeros(3)}, step=3, metrics={"loss": 1})
        for step, loss in ((4, 2), (5, 3)):
            assert ckpts.save({"w": np.zeros(3)}, step=step, metrics={"loss": loss}) is None
        assert ckpts.should_stop and ckpts.checkpoints == ()
        gate.set()
        ckpts.wait()
        assert [record.step for record in ckpts.checkpoints] == [3]


def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: Snapshot, *arguments: Any, **keywords: Any) -> None:
        raise StorageError(28, "disk full")

    monkeypatch.setattr(Snapshot, "write", write)


def test_an_error_surfaces_at_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"w": np.zeros(3)}
    ckpts = CheckpointManager(tmp_path, async_save=True, monitor="loss")
    surfaces: list[Callable[[], Any]] = [
        lambda: ckpts.wait(),
        lambda: ckpts.save(model, step=50, metrics={"loss": 1}),
        lambda: ckpts.restore(model),
        lambda: ckpts.close(),
    ]
    for surface in surfaces:
        with monkeypatch.context() as patch:
            failing(patch)
            ckpts.save(model, step=1 + len(ckpts.records), metrics={"loss": 1 / (1 + len(ckpts.records))})
            ckpts._background._thread.join()  # type: ignore[union-attr]
        with pytest.raises(StorageError, match="disk full"):
            surface()
        assert ckpts.checkpoints == ()
        # Who has closed it knows what is on disk alone.
        assert (ckpts.best is None) if surface is surfaces[-1] else (ckpts.best and ckpts.best.name is None)
    ckpts.save(model, step=60, metrics={"loss": 0.01})
    ckpts.wait()
    assert [record.step for record in ckpts.checkpoints] == [60]
    ckpts.close()


def test_an_error_surfaces_as_the_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch)
    with pytest.raises(StorageError, match="disk full"), CheckpointManager(tmp_path / "a", async_save=True) as ckpts:
        ckpts.save({"w": np.zeros(3)}, step=1)
    with pytest.raises(KeyError) as caught, CheckpointManager(tmp_path / "b", async_save=True) as ckpts:
        ckpts.save({"w": np.zeros(3)}, step=1)
        raise KeyError("of the loop")
    assert any("the background save failed as well" in note and "disk full" in note for note in caught.value.__notes__)


UNSEEN = """
import sys, numpy as np, polyckpt
from polyckpt.snapshot import Snapshot
def write(self, *arguments, **keywords):
    raise polyckpt.StorageError(28, "disk full")
if sys.argv[2] == "fail":
    Snapshot.write = write
ckpts = polyckpt.CheckpointManager(sys.argv[1], async_save=True)
ckpts.save({"w": np.zeros(100000)}, step=1)
"""


def test_at_exit_a_save_is_finished_and_its_error_printed(tmp_path: Path) -> None:
    for mode in ("fail", "work"):
        command = [sys.executable, "-c", UNSEEN, str(tmp_path / mode), mode]
        done = subprocess.run(command, capture_output=True, text=True)
        assert ("disk full" in done.stderr) == (mode == "fail"), done.stderr
    assert polyckpt.inspect(tmp_path / "work" / "last").weights["w"].shape == (100000,)


TRAINING = """
import os, signal, sys, time, numpy as np, polyckpt
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started this process without
signals = {"term": [signal.SIGTERM], "both": [signal.SIGTERM, signal.SIGINT], "none": False}[sys.argv[2]]
if sys.argv[3:] == ["chained"]:
    signal.signal(signal.SIGTERM, lambda number, frame: print("earlier handler", flush=True))
with polyckpt.CheckpointManager(sys.argv[1], every=polyckpt.Every(steps=1000), preemption=signals, async_save=True) as ckpts:
    model = {"w": np.zeros(3)}
    for step in range(1, 100000):
        model["w"] += 1
        print("step", flush=True)
        time.sleep(0.01)
        if ckpts.reached_preemption(step):
            print("asked", flush=True)
        ckpts.save(model, step=step)
        print("saved", flush=True)
"""


@pytest.mark.parametrize(
    ("asked", "sent", "code"),
    [
        ("term", signal.SIGTERM, 143),
        ("both", signal.SIGINT, 130),
        ("both", signal.SIGTERM, 143),
        ("none", signal.SIGTERM, -15),
        ("term", signal.SIGINT, -2),
    ],
)
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path: Path, asked: str, sent: signal.Signals, code: int) -> None:
    command = [sys.executable, "-c", TRAINING, str(tmp_path), asked, *(["chained"] if code == 143 else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for _ in range(7):
            process.stdout.readline()
        process.send_signal(sent)
        out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    if code > 0:
        # It finished its step, saved it, and went no further.
        assert out.rstrip().endswith("asked") and (code != 143 or "earlier handler" in out)
        restored = polyckpt.load(tmp_path / "last", {"w": np.zeros(3)})
        assert restored.step is not None and restored.step >= 3 and (restored.model["w"] == restored.step).all()
    else:
        assert not list(tmp_path.glob("step-*"))


def test_handlers_are_chained_and_put_back(tmp_path: Path) -> None:
    heard: list[int] = []

    def handler(number: int, frame: Any) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGUSR1, handler), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        CheckpointManager(tmp_path)
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before[1:], "nothing is installed unasked"
        ckpts = CheckpointManager(tmp_path, preemption=[signal.SIGUSR1])
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1] * 2 and ckpts.reached_preemption(5)
        with pytest.raises(SystemExit) as caught:
            ckpts.save({"w": np.zeros(3)}, step=5)
        assert caught.value.code == 128 + signal.SIGUSR1
        assert signal.getsignal(signal.SIGUSR1) is handler
        later = CheckpointManager(tmp_path, preemption=[signal.SIGUSR1])
        other = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        later.close()
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN and other is not None, "a later handler is left alone"
    finally:
        signal.signal(signal.SIGUSR1, before[0] or signal.SIG_DFL)


def test_a_signal_after_the_last_save_ends_the_process_too(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught, CheckpointManager(tmp_path / "a", preemption=[signal.SIGUSR1]):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert caught.value.code == 128 + signal.SIGUSR1
    with pytest.raises(KeyError), CheckpointManager(tmp_path / "b", preemption=[signal.SIGUSR1]):
        os.kill(os.getpid(), signal.SIGUSR1)
        raise KeyError
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_second_interrupt_does_not_wait() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have taken away
    preemption = Preemption([signal.SIGINT])
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.signal is signal.SIGINT and preemption.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)
    finally:
        preemption.restore()
        assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_signals_need_the_main_thread(tmp_path: Path) -> None:
    found: list[BaseException] = []

    def make() -> None:
        try:
            CheckpointManager(tmp_path, preemption=True)
        except RunError as error:
            found.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "main thread" in str(found[0])
