"""Bytes that nobody meant: only a PolyckptError may come of them. ``python -m tests.fuzz`` is the long form, with atheris."""
