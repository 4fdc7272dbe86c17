"""Attacks by whoever can give somebody a checkpoint or a run's directory: ``python -m tests.attacks [NAME...]``.

Each module is one: its docstring says what the attacker wants, `attack(directory)` builds it and lets the victim act, and
REFUSED is what must be raised instead. `harm(directory)`, where there is one, tells what the attacker got nevertheless.
"""
