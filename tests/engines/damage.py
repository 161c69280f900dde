"""What can happen to an engine's weights; each function is sent to vLLM's process and run on its model."""

from __future__ import annotations


def zero(model) -> None:
    """All weights are gone, as after a sleep that drops them."""
    for parameter in model.parameters():
        parameter.data.zero_()


def start_anew(model) -> None:
    """Weights as before training: what an engine has that was waked up without having them loaded again."""
    import torch

    draws = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02, generator=draws)
