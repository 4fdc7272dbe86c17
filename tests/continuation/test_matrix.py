"""A run that goes on in another framework goes on as it would have: every family, every ordered pair."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tests.continuation import table
from tests.continuation.table import Outcome
from tests.sealing import REPOSITORY

ROUNDING = {"float64": 1e-10, "float32": 1e-5}
SINGLE_INSIDE = {"Adafactor", "Adafactor, not factored", "Muon", "Muon, Nesterov"}
"""What Keras and optax compute in float32 whatever the type of the weights: means and decays of Adafactor, norms of Muon."""


@cache
def outcomes(dtype: str, backend: str) -> list[Outcome]:
    return table.measured(dtype, backend)


def shown(found: list[Outcome]) -> str:
    return "\n".join(
        f"{each['case']}, {each['pair']}, {each['scale']}, {each['rate']}, {each['continuation']}: {each['items']} predicted "
        f"{each['predicted']:.1e}, {each['way']:.1e} of the way, {each['weights']:.1e} of the weights {each['refused']}"
        for each in found
    )


def is_bfloat16(each: Outcome) -> bool:
    return bool(each["case"].startswith("Muon") and each["pair"].startswith("torch"))


class _Continued:
    """What holds of all outcomes of one type, with Keras on one backend."""

    dtype: str
    backend: str

    @property
    def found(self) -> list[Outcome]:
        return outcomes(self.dtype, self.backend)

    def wrong(self, of: Callable[[Outcome], bool], right: Callable[[Outcome], bool]) -> list[Outcome]:
        chosen = [each for each in self.found if of(each)]
        assert len(chosen) > 100
        return [each for each in chosen if not right(each)]

    def is_rounding(self, each: Outcome) -> bool:
        single = each["case"] in SINGLE_INSIDE and self.dtype == "float64"
        return bool(each["weights"] <= (1e-8 if single else ROUNDING[self.dtype]))

    def test_none_is_refused(self) -> None:
        assert not (found := [each for each in self.found if each["verdict"] in ("refused", "default")]), shown(found)

    def test_what_is_called_exact_is(self) -> None:
        found = self.wrong(lambda each: each["verdict"].startswith("exact") and each["steady"], self.is_rounding)
        assert not found, shown(found)

    def test_what_is_called_approximate_is_within_the_size_that_was_told(self) -> None:
        def within(each: Outcome) -> bool:
            # In float32 two programs of one formula differ too.
            return bool(each["way"] <= each["predicted"] or (self.dtype == "float32" and self.is_rounding(each)))

        found = self.wrong(lambda each: each["verdict"] == "approximate" and each["steady"], within)
        assert not found, shown(found)

    def test_what_is_predicted_is_not_the_sky(self) -> None:
        """A size that is told for safety's sake alone would tell nothing: the median is within two orders of what comes."""
        told = [each for each in self.found if each["verdict"] == "approximate" and each["steady"] and each["way"] > 1e-6]
        ratios = sorted(each["predicted"] / each["way"] for each in told)
        assert len(ratios) > 20 and ratios[len(ratios) // 2] < 100

    def test_on_request_all_is_exact_under_any_rate(self) -> None:
        def exact(each: Outcome) -> bool:
            return bool(each["steady"] and each["verdict"].startswith("exact") and self.is_rounding(each))

        def possible(each: Outcome) -> bool:
            return each["continuation"] == "exact" and not is_bfloat16(each)

        assert not (found := self.wrong(possible, exact)), shown(found)

    def test_what_cannot_be_exact_even_then_is_called_so(self) -> None:
        """torch's Muon multiplies matrices in bfloat16, which nothing else does in the same order."""
        found = [each for each in self.found if each["continuation"] == "exact" and is_bfloat16(each)]
        assert len(found) == 20
        assert all(sorted(set(each["items"])) == ["continuation: exact", "precision: approximate"] for each in found)


class TestDouble(_Continued):
    dtype, backend = "float64", "jax"

    def test_the_document_says_what_is_found(self) -> None:
        written = table.read((REPOSITORY / "docs" / "continuation.md").read_text())
        assert written == [table.verdicts(self.found, continuation) for continuation in ("stock", "exact")]


class TestSingle(_Continued):
    dtype, backend = "float32", "tensorflow"
