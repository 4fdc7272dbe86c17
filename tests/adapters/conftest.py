"""Modules that run in processes of their own: importing one here would choose a Keras backend for all other tests."""

collect_ignore = ["keras_backup.py", "keras_callbacks.py", "keras_layers.py", "keras_tracing.py"]
