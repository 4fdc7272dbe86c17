"""A run that goes on in another framework goes on as it would have: every family, every ordered pair."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tests.continuation import table
from tests.continuation.table import Outcome
from tests.sealing import REPOSITORY

ROUNDING = {"float64": 1e-10, "float32": 1e-5}
SINGLE_INSIDE = {"Adafactor", "Adafactor, not factored"}
"""What Keras and optax compute in float32 whatever the type of the weights: means and decays of Adafactor."""


@cache
def outcomes(dtype: str, backend: str) -> list[Outcome]:
    return table.measured(dtype, backend)


def allowed(outcome: Outcome, dtype: str) -> float:
    return 1e-8 if outcome["case"] in SINGLE_INSIDE and dtype == "float64" else ROUNDING[dtype]


def shown(found: list[Outcome]) -> str:
    return "\n".join(
        f"{each['case']}, {each['pair']}, {each['scale']}, {each['rate']}, {each['continuation']}: {each['items']} predicted "
        f"{each['predicted']:.1e}, {each['way']:.1e} of the way, {each['weights']:.1e} of the weights {each['refused']}"
        for each in found
    )


RUNS = [("float64", "jax"), ("float32", "tensorflow")]


@pytest.fixture(params=RUNS, ids=" on ".join, scope="module")
def run(request: pytest.FixtureRequest) -> tuple[str, list[Outcome]]:
    dtype, backend = request.param
    return dtype, outcomes(dtype, backend)


def wrong(run: tuple[str, list[Outcome]], of: Callable[[Outcome], bool], right: Callable[[Outcome], bool]) -> list[Outcome]:
    chosen = [each for each in run[1] if of(each)]
    assert len(chosen) > 100
    return [each for each in chosen if not right(each)]


def test_none_is_refused(run: tuple[str, list[Outcome]]) -> None:
    assert not (found := [each for each in run[1] if each["verdict"] in ("refused", "default")]), shown(found)


def test_what_is_called_exact_is(run: tuple[str, list[Outcome]]) -> None:
    def exact(each: Outcome) -> bool:
        return bool(each["verdict"].startswith("exact") and each["steady"])

    found = wrong(run, exact, lambda each: each["weights"] <= allowed(each, run[0]))
    assert not found, shown(found)


def test_what_is_called_approximate_is_within_the_size_that_was_told(run: tuple[str, list[Outcome]]) -> None:
    def approximate(each: Outcome) -> bool:
        return bool(each["verdict"] == "approximate" and each["steady"])

    # In float32 two programs of one formula differ too.
    found = wrong(
        run,
        approximate,
        lambda each: each["way"] <= each["predicted"] or (run[0] == "float32" and each["weights"] <= ROUNDING["float32"]),
    )
    assert not found, shown(found)


def test_what_is_predicted_is_not_the_sky(run: tuple[str, list[Outcome]]) -> None:
    """A size that is told for safety's sake alone would tell nothing: the median is within two orders of what comes."""
    told = [each for each in run[1] if each["verdict"] == "approximate" and each["steady"] and each["way"] > 1e-6]
    ratios = sorted(each["predicted"] / each["way"] for each in told)
    assert len(ratios) > 20 and ratios[len(ratios) // 2] < 100


def test_on_request_all_is_exact_under_any_rate(run: tuple[str, list[Outcome]]) -> None:
    found = wrong(
        run,
        lambda each: each["continuation"] == "exact",
        lambda each: each["steady"] and each["verdict"].startswith("exact") and each["weights"] <= allowed(each, run[0]),
    )
    assert not found, shown(found)


def test_the_document_says_what_is_found() -> None:
    written = table.read((REPOSITORY / "docs" / "continuation.md").read_text())
    assert written == [table.verdicts(outcomes("float64", "jax"), continuation) for continuation in ("stock", "exact")]
