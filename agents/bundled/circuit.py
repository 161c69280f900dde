"""Initial weights that already copy: a previous-token head below, induction heads above (Olsson et al. 2022,
arXiv 2209.11895).

Copying out of the context needs two layers that agree, which gradient descent finds late on so little text.
Here the residual stream starts as three orthogonal subspaces: a direction common to all tokens, the token
itself, and the two tokens before it. Layer 0 fills the third by position alone; layer 1 looks for places that
followed the same token and writes what stands there, in the coordinates that the output layer reads. All else
starts small and random, and nothing is frozen.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

SHARP = 2.0


def initialise(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Overwrites every matrix of `model`; 3 or more heads of 32, width >= 128, 2 or more layers."""
    config = model.config
    size, width = config.head_dim, config.hidden_size
    if size != 32 or width < 4 * size or config.num_key_value_heads != config.num_attention_heads:
        raise ValueError("the induction circuit needs heads of 32, width >= 128 and as many key as query heads")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.normal_(0.0, 0.3 * width**-0.5, generator=generator)
            if "o_proj" in name or "down_proj" in name:
                p.mul_((2 * config.num_hidden_layers) ** -0.5)
        basis_DD = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
        common_D, before_DS, token_DE = (
            basis_DD[:, 0],
            basis_DD[:, 1 : 1 + 2 * size],
            basis_DD[:, 1 + 2 * size :],
        )
        table_VE = _embed(model, tokenizer, common_D, token_DE, generator)
        turn_EE = torch.linalg.qr(torch.randn(token_DE.shape[1], token_DE.shape[1], generator=generator))[0]
        model.lm_head.weight.copy_(0.1 * table_VE @ turn_EE @ token_DE.T)
        views_SD = torch.linalg.qr(torch.randn(token_DE.shape[1], size, generator=generator))[0].T @ token_DE.T
        _previous_tokens(model, common_D, before_DS, views_SD)
        _induction(model, before_DS, views_SD, token_DE, turn_EE, generator)


def _embed(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    common_D: Tensor,
    token_DE: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Random embeddings beside the common direction, " word" beside "word"; returns the random part."""
    vocabulary = tokenizer.get_vocab()
    dims = token_DE.shape[1]
    table_VE = torch.randn(model.config.vocab_size, dims, generator=generator) * 0.5 * (2.0**0.5)
    for token, i in vocabulary.items():
        if token[0] == "Ġ" and token[1:].isalpha() and token[1:] in vocabulary:
            table_VE[i] = 0.85 * table_VE[vocabulary[token[1:]]] + 0.5 * table_VE[i]
    model.model.embed_tokens.weight.copy_(table_VE @ token_DE.T + 4.0 * common_D)
    return table_VE


def _frequencies(model: Qwen3ForCausalLM) -> Tensor:
    return cast(Tensor, model.model.rotary_emb.inv_freq).detach().float().cpu()


def _previous_tokens(model: Qwen3ForCausalLM, common_D: Tensor, before_DS: Tensor, views_SD: Tensor) -> None:
    """Layer 0: head 0 looks one back, head 1 two back, by the fast rotary frequencies; both copy a token."""
    attention = model.model.layers[0].self_attn
    size, half = views_SD.shape[0], views_SD.shape[0] // 2
    fast = _frequencies(model)[:4]
    for gain in (attention.q_norm, attention.k_norm):
        gain.weight.fill_(SHARP)
    for head, distance in ((0, 1.0), (1, 2.0)):
        own = slice(head * size, (head + 1) * size)
        query_S, key_S = torch.zeros(size), torch.zeros(size)
        query_S[:4], query_S[half : half + 4] = torch.cos(fast * distance), -torch.sin(fast * distance)
        key_S[:4] = 1.0
        attention.q_proj.weight[own] += 2.0 * torch.outer(query_S, common_D)
        attention.k_proj.weight[own] += 2.0 * torch.outer(key_S, common_D)
        attention.v_proj.weight[own] = views_SD
        attention.o_proj.weight[:, own] = before_DS[:, own]


def _induction(
    model: Qwen3ForCausalLM,
    before_DS: Tensor,
    views_SD: Tensor,
    token_DE: Tensor,
    turn_EE: Tensor,
    generator: torch.Generator,
) -> None:
    """Layer 1: heads 0 and 1 look for places after this token, head 2 for places two after the last one.

    Contents are compared on the slow rotary frequencies, which distance turns little.
    """
    attention = model.model.layers[1].self_attn
    size = views_SD.shape[0]
    half, quarter = size // 2, size // 4
    slow = torch.cat([torch.arange(quarter, half), torch.arange(half + quarter, size)])
    for gain in (attention.q_norm, attention.k_norm):
        gain.weight.fill_(SHARP)
    last_SD, older_SD = before_DS[:, :size].T, before_DS[:, size:].T
    pairs = (
        (views_SD[:half], last_SD[:half]),
        (views_SD[half:], last_SD[half:]),
        (last_SD[:half], older_SD[:half]),
    )
    for head, (query_HD, key_HD) in enumerate(pairs):
        own = slice(head * size, (head + 1) * size)
        attention.q_proj.weight[own][slow] += query_HD
        attention.k_proj.weight[own][slow] += key_HD
        read_ES = torch.linalg.qr(torch.randn(token_DE.shape[1], size, generator=generator))[0]
        attention.v_proj.weight[own] = (token_DE @ read_ES).T
        attention.o_proj.weight[:, own] = token_DE @ turn_EE.T @ read_ES
