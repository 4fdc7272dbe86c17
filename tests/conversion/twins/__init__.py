"""The models of torch_models, written again as people write them in other frameworks: other names, another structure, the
same function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

VOCABULARY, POSITIONS, WIDTH, HEADS, BLOCKS, HIDDEN = 41, 16, 24, 3, 3, 40
"""Those of BERT and GPT-2; the hidden layers of GPT-2 are four times as wide as the others."""


@dataclass(frozen=True)
class Twin:
    """model: what save and load take. call: a model and a batch -> output, or several. apply: as in `polyckpt.load`.

    channels_last: how it wants images.
    """

    model: Any
    call: Callable[[Any, Any], Any]
    apply: Callable[[Any, Any], Any] | None = None
    channels_last: bool = True


def causal(packed: jax.Array) -> jax.Array:
    """Attention of queries, keys and values that lie side by side."""
    heads = packed.reshape(*packed.shape[:-1], 3, HEADS, WIDTH // HEADS)
    query, key, value = (heads[..., part, :, :] for part in range(3))
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return mixed.reshape(*packed.shape[:-1], WIDTH)
