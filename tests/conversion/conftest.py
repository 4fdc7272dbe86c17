"""Modules that run in processes of their own, on a Keras backend of their own, are not looked through for doctests."""

collect_ignore = ["zoo.py", "matrix.py", "applications.py", "twins.py"]
