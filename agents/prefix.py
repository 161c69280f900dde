"""Openings computed once for several rows, with gradient: the rows attend to one copy of its keys and values.

The gradient that arrives at the keys and values is gathered over all rows and goes on through the opening in one
backward pass, so it is that of the plain computation up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from agents.critic import decoder_of
from agents.vision import Sight, feed

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # many norms are computed in float32 whatever the weights
_COARSE = 0.1


class Openings:
    """Keys and values of a chunk's openings under one model."""

    def __init__(self, model: Any, tokens_GP: Tensor, length_G: Tensor, sight: Sight | None = None):
        self.model, self.length_G = model, length_G
        self.config = decoder_of(model).config
        self.width = tokens_GP.shape[1]
        cache = DynamicCache(config=self.config)
        feed(model, tokens_GP, sight, past_key_values=cache, use_cache=True)
        layers: list[Any] = cache.layers
        self.made: list[Tensor] = [x for layer in layers for x in (layer.keys, layer.values)]
        self.held = [x.detach().requires_grad_(x.requires_grad) for x in self.made]

    def hidden(self, tokens_RS: Tensor, opening_R: Tensor, sight: Sight | None = None) -> Tensor:
        """Last hidden states `[R, S, H]` of the rows' own tokens, which follow their openings."""
        cache = DynamicCache(config=self.config)
        for layer in range(len(self.held) // 2):
            keys, values = self.held[2 * layer : 2 * layer + 2]
            cache.update(keys[opening_R], values[opening_R], layer)
        length_R = self.length_G[opening_R]
        own_RS = torch.ones_like(tokens_RS)
        seen_RP = torch.arange(self.width, device=tokens_RS.device) < length_R[:, None]
        return feed(
            self.model,
            tokens_RS,
            sight,
            past_key_values=cache,
            use_cache=True,
            attention_mask=torch.cat([seen_RP.long(), own_RS], 1),
            position_ids=length_R[:, None] + torch.arange(tokens_RS.shape[1], device=tokens_RS.device),
        ).last_hidden_state

    def push(self) -> None:
        """Send the gradients that the rows left at the keys and values through the openings."""
        pairs = [(x, y.grad) for x, y in zip(self.made, self.held, strict=True) if y.grad is not None]
        if pairs:
            torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])


@torch.no_grad()
def can_share(model: Any) -> bool:
    """Whether the model gives the same hidden states this way, tried on a few tokens of two openings."""
    trunk = decoder_of(model)
    config = trunk.config.get_text_config()
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return False
    weight = next(trunk.parameters())
    draw = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, int(config.vocab_size), (3, 12), generator=draw).to(weight.device)
    tokens_BT[1, :6] = tokens_BT[0, :6]
    opening_R, length_G = torch.tensor([0, 0, 1], device=weight.device), torch.tensor([6, 4], device=weight.device)
    own_RS = torch.stack([tokens_BT[0, 6:11], tokens_BT[1, 6:11], tokens_BT[2, 4:9]])
    try:
        plain_BTH = trunk(input_ids=tokens_BT, use_cache=False).last_hidden_state
        got_RSH = Openings(model, tokens_BT[[0, 2], :6], length_G).hidden(own_RS, opening_R)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, NotImplementedError):
        return False  # a cache of another kind, or none
    want_RSH = torch.stack([plain_BTH[0, 6:11], plain_BTH[1, 6:11], plain_BTH[2, 4:9]])
    error = (got_RSH - want_RSH).abs().max() / want_RSH.abs().max().clamp(min=1e-6)
    return bool(error <= _TOLERANCE.get(weight.dtype, _COARSE))
