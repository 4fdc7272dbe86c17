"""polyckpt beside what others save and load with: one process, every contender in turn, medians and ratios.

usage: python -m benchmarks.peers [--scale 0.01] [--rounds 7] [--only a,b,c,d,startup] [--directory DIR] [--write]
"""

import os

# Before any framework is imported. JAX arrays stay on the host even where torch has a GPU.
os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="3")
