"""Adapters, one folder per framework, each importing that framework alone. Found through polyckpt.registry."""
