"""JAX through the shared suite: nnx, linen, Equinox, Haiku and every optax state."""

from tests.adapters.suite import AdapterSuite


class TestNnx(AdapterSuite):
    cases = "tests.adapters.cases.nnx"


class TestLinen(AdapterSuite):
    cases = "tests.adapters.cases.linen"


class TestEquinox(AdapterSuite):
    cases = "tests.adapters.cases.equinox"


class TestHaiku(AdapterSuite):
    cases = "tests.adapters.cases.haiku"


class TestOptax(AdapterSuite):
    cases = "tests.adapters.cases.optax"
