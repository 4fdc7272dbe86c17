"""The short form of ``python -m tests.fuzz``: the kept corpus, changes of what is valid, and what a grammar makes.

Only errors of ours come out, and time and memory grow no faster than the input, whatever it is.
"""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyckpt.dtypes import DTYPES
from polyckpt.history import FILE_NAME
from tests.fuzz.targets import PLACE, TARGETS, history, manifest, sealed_line, tensor_file
from tests.sealing import seal
from tests.test_manifest import SUM, minimal

CORPUS = Path(__file__).parent / "corpus"
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ODD_NUMBERS = st.sampled_from([0, 1, -1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, True, None, "4"])
NAMES = st.one_of(st.sampled_from(["w", "a.b", "", "__metadata__", "../x", "weights", "\0", "$float"]), st.text(max_size=6))


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_nothing_of_the_corpus_raises_anything_else(name: str) -> None:
    files = sorted((CORPUS / name).iterdir())
    assert len(files) >= 10
    accepted = [TARGETS[name](path.read_bytes()) for path in files]
    assert any(accepted) and not all(accepted), "a corpus of one kind alone reaches little"


# Changes of what is valid.


@st.composite
def changed(draw: st.DrawFn, valid: bytes, words: list[bytes]) -> bytes:
    """`valid` with some pieces replaced, inserted, taken out or repeated."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 12)))
        data[start:end] = draw(st.one_of(st.binary(max_size=4), st.sampled_from(words), st.just(bytes(data[start:end] * 2))))
    return bytes(data)


WORDS = [
    line.split(b'"', 1)[1].rsplit(b'"', 1)[0].replace(b'\\"', b'"')
    for line in (Path(__file__).parent / "words.dict").read_bytes().splitlines()
    if line.startswith(b'"')
]
BODY = seal(minimal()).rpartition(b',\n  "checksum"')[0]
HEADER = json.dumps(
    {
        "__metadata__": {"k": "v"},
        "a": {"dtype": "I8", "shape": [8, 4], "data_offsets": [0, 32]},
        "b": {"dtype": "F32", "shape": [8], "data_offsets": [32, 64]},
    }
).encode()
LINES = b"\n".join(
    [
        b'{"run":"ab"',
        b'{"sequence":1,"time":3,"epoch":1,"step":2,"batch":null,"metrics":{"l":0.5},"name":"step-00000002"',
        b'{"event":"failed","name":"step-00000002"',
        b'{"sequence":1,"time":4,"metrics":{"l":{"$float":"nan"}},"name":null',
    ]
)


@QUICK
@given(changed(BODY, WORDS))
def test_changed_manifests_raise_nothing_else(data: bytes) -> None:
    manifest(data)


@QUICK
@given(changed(HEADER, WORDS))
def test_changed_headers_raise_nothing_else(data: bytes) -> None:
    tensor_file(data)


@QUICK
@given(changed(LINES, WORDS))
def test_changed_histories_raise_nothing_else(data: bytes) -> None:
    history(data)


# What a grammar makes.


TREES = st.recursive(
    st.one_of(ODD_NUMBERS, NAMES),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=8,
)
SIZES = st.lists(st.one_of(st.integers(0, 4), ODD_NUMBERS), max_size=4)
CHUNKS = st.fixed_dictionaries(
    {
        "file": st.sampled_from(["weights.safetensors", "x.safetensors", "../x.safetensors"]),
        "key": NAMES,
        "offset": SIZES,
        "shape": SIZES,
        "checksum": st.just(SUM),
    }
)
TENSORS = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DTYPES, "float128"]), "shape": SIZES, "chunks": st.lists(CHUNKS, max_size=3)}
)
MANIFESTS = st.fixed_dictionaries(
    {},
    optional={
        "tensors": st.dictionaries(
            st.sampled_from(["weights", "optimizer", "state"]), st.dictionaries(NAMES, TENSORS, max_size=3)
        ),
        "files": st.dictionaries(
            NAMES, st.fixed_dictionaries({"size_bytes": ODD_NUMBERS, "header_checksum": st.just(SUM)}), max_size=2
        ),
        "metrics": st.dictionaries(NAMES, st.one_of(ODD_NUMBERS, st.just({"$float": "nan"})), max_size=3),
        "native": st.dictionaries(NAMES, TREES, max_size=3),
        "model": st.fixed_dictionaries(
            {
                "type": NAMES,
                "order": NAMES,
                "layers": st.lists(TREES, max_size=2),
                "aliases": st.dictionaries(NAMES, NAMES, max_size=3),
            }
        ),
        "optimizer": TREES,
        "learning_rate": TREES,
        "progress": TREES,
        "run": TREES,
        "arrays": TREES,
        "unknown": TREES,
    },
)


@QUICK
@given(MANIFESTS)
def test_manifests_of_a_grammar_raise_nothing_else(members: dict[str, Any]) -> None:
    manifest(json.dumps({**minimal(), **members}, indent=2).removesuffix("\n}").encode("utf-8", "surrogatepass"))


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["I8", "F32", "BF16", "C64", "X"]),
        "shape": SIZES,
        "data_offsets": st.one_of(st.sampled_from([[0, 64], [0, 32], [32, 64], [64, 64], [0, 0]]), SIZES),
    }
)


@QUICK
@given(st.dictionaries(NAMES, st.one_of(ENTRIES, TREES), max_size=4))
def test_headers_of_a_grammar_raise_nothing_else(entries: dict[str, Any]) -> None:
    tensor_file(json.dumps(entries).encode("utf-8", "surrogatepass"))


# Growth: input of n pieces of each kind that could be compared, searched or copied too often.


def manifest_of(**members: Any) -> bytes:
    return json.dumps({**minimal(), **members}, indent=2).removesuffix("\n}").encode()


def many_tensors(n: int) -> bytes:
    tensor = minimal()["tensors"]["weights"]["w"]
    chunk = tensor["chunks"][0]
    return manifest_of(
        tensors={
            "weights": {f"w{i}": {"dtype": "int8", "shape": [2, 3], "chunks": [{**chunk, "key": str(i)}]} for i in range(n)}
        }
    )


def many_chunks(n: int) -> bytes:
    chunk = minimal()["tensors"]["weights"]["w"]["chunks"][0]
    listed = [{**chunk, "key": str(i), "offset": [i, 0], "shape": [1, 3]} for i in range(n)]
    return manifest_of(tensors={"weights": {"w": {"dtype": "int8", "shape": [n, 3], "chunks": listed}}})


def many_aliases(n: int) -> bytes:
    return manifest_of(model={"type": "d", "order": "name", "layers": [], "aliases": {f"a{i}": "w" for i in range(n)}})


def many_circles(n: int) -> bytes:
    aliases = {f"a{i}": f"a{(i + 1) % n}" for i in range(n)}
    return manifest_of(model={"type": "d", "order": "name", "layers": [], "aliases": aliases})


def many_unknown(n: int) -> bytes:
    return manifest_of(later={f"u{i}": [{}] for i in range(n)})


def many_spaces(n: int) -> bytes:
    return BODY.replace(b'"native"', b" " * 40 * n + b'"native"')


def many_references(n: int) -> bytes:
    return manifest_of(native={"extra": [{"$tensor": "absent", "kind": "numpy"}] * n})


def many_repeated_names(n: int) -> bytes:
    return BODY + b',\n  "later": {' + b", ".join(b'"k%d": 1' % (i // 2) for i in range(n)) + b"}"


def many_entries(n: int) -> bytes:
    entries = {f"w{i}": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]} for i in range(n)}
    return json.dumps(entries).encode()


def many_lines(n: int) -> bytes:
    return b"\n".join(b'{"sequence":%d,"time":1,"metrics":{},"name":"s%d"' % (i + 1, i) for i in range(n))


def many_returns(n: int) -> bytes:
    return b"\n".join(b'{"sequence":%d,"time":1,"metrics":{},"name":"s%d"' % (i % 50 + 1, i) for i in range(n))


def many_failures(n: int) -> bytes:
    line = b'{"sequence":%d,"time":1,"metrics":{},"name":"s%d"\n{"event":"failed","name":"s%d"'
    return b"\n".join(line % (i + 1, i, i) for i in range(n))


GROWING: list[tuple[Callable[[bytes], bool], Callable[[int], bytes], int]] = [
    *((manifest, made, 500) for made in (many_tensors, many_chunks, many_aliases, many_circles)),
    *((manifest, made, 2000) for made in (many_unknown, many_spaces, many_references, many_repeated_names)),
    (tensor_file, many_entries, 500),
    *((history, made, 700) for made in (many_lines, many_returns, many_failures)),
]


def cost(target: Callable[[bytes], bool], data: bytes) -> tuple[float, int]:
    """Seconds of this process, the least of three; and the most bytes that were held."""
    seconds = []
    for _ in range(3):
        started = time.process_time()
        target(data)
        seconds.append(time.process_time() - started)
    tracemalloc.start()
    target(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return min(seconds), peak


@pytest.mark.parametrize(("target", "made", "n"), GROWING, ids=lambda value: getattr(value, "__name__", ""))
def test_time_and_memory_grow_as_the_input_does(target: Callable[[bytes], bool], made: Callable[[int], bytes], n: int) -> None:
    one, eight = made(n), made(8 * n)
    seconds, peak = cost(target, one)
    seconds_of_eight, peak_of_eight = cost(target, eight)
    assert seconds_of_eight < 24 * max(seconds, 0.001), (seconds, seconds_of_eight)  # 64 where it were quadratic
    assert peak_of_eight < 16 * peak and peak_of_eight < 100 * len(eight), (peak, peak_of_eight, len(eight))


def test_the_targets_accept_what_is_valid() -> None:
    assert manifest(BODY) and tensor_file(HEADER) and history(LINES)
    (PLACE / FILE_NAME).write_bytes(sealed_line(b'{"run":"ab"'))
    assert not tensor_file(struct.pack("<Q", 2) + b"[]")
