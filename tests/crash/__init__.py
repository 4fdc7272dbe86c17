"""Savers that are killed at random instants, again and again: ``python -m tests.crash --kills 1000``."""
