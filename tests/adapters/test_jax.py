"""JAX through the shared suite: nnx, linen, Equinox, Haiku and every optax state."""

from tests.adapters.suite import AdapterSuite

# Nearly all the time goes into compiling; what is compiled must be the same in both processes and may be slow.
ENV = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}


class TestNnx(AdapterSuite):
    cases = "tests.adapters.cases.nnx"
    env = ENV


class TestLinen(AdapterSuite):
    cases = "tests.adapters.cases.linen"
    env = ENV


class TestEquinox(AdapterSuite):
    cases = "tests.adapters.cases.equinox"
    env = ENV


class TestHaiku(AdapterSuite):
    cases = "tests.adapters.cases.haiku"
    env = ENV


class TestOptax(AdapterSuite):
    cases = "tests.adapters.cases.optax"
    env = ENV
