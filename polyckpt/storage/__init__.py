"""Bytes on disk: tensor files and the local store that commits a directory of them atomically."""
