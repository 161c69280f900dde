"""A value model: a causal LM's trunk with a scalar head on its hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from agents import lora


class Critic(nn.Module):
    """Values of the states *before* each token, from a trunk of its own that starts as a copy of the policy's.

    The head starts at zero, so that the first values are 0 whatever the trunk says.

    Args:
        base: identities of base weights under adapters, which the trunk shares with the policy.
    """

    def __init__(self, policy: Any, base: frozenset[int] = frozenset()):
        super().__init__()
        self.trunk = lora.twin(trunk_of(policy), base)
        weight = next(self.trunk.parameters())
        width = policy.get_output_embeddings().weight.shape[1]
        self.head = nn.Linear(width, 1, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.bias.zero_()

    def value_N(self, hidden_NH: Tensor) -> Tensor:
        """One value per hidden state."""
        return self.head(hidden_NH.to(self.head.weight.dtype)).squeeze(-1)


def trunk_of(model: Any) -> Any:
    """The part of a model that ends in hidden states; a vision-language model's includes the tower."""
    if isinstance(model, Critic):
        return model.trunk
    if getattr(model.config, "vision_config", None) is not None:
        return model.base_model
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if decoder is not None else model.base_model


def decoder_of(model: Any) -> Any:
    """The part of the trunk that tokens go through: all of it, or a vision-language model's text side."""
    trunk = trunk_of(model)
    return trunk.language_model if getattr(trunk.config, "vision_config", None) is not None else trunk
