"""NumPy dicts, with no framework at all."""

from tests.adapters.suite import AdapterSuite


class TestNumpy(AdapterSuite):
    cases = "tests.adapters.cases.numpy"
