"""Rows end to end in one long row: no padding, and what several rows begin with stands there once.

A packed row is a sequence of segments: an opening that several rows share, the own tokens of a row that begins with
such an opening, or a whole row. Positions restart with every row. A segment's tokens attend to what stands before
them in their own row: to the segment itself, and where it follows an opening, to all of that. Keys and values of an
opening are there once, with gradient, so that a packed row is one forward and one backward pass.

The attention of a transformers model is replaced through its own registry while the packed row is in the forward
pass. Nothing of the size tokens x tokens of the packed row is ever built: on a GPU in half precision a
variable-length flash kernel runs over all segments at once, elsewhere `scaled_dot_product_attention` one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from agents.critic import decoder_of
from agents.vision import Sight, feed

NAME = "palaestra_packed"
"""In transformers' registry of attention functions. It has no entry among the mask functions: no mask is made."""
REFUSED = ("softcap", "sliding_window", "s_aux", "position_bias")
"""Arguments of a model's attention that would change its result and that the packed attention does not know."""
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # many norms are computed in float32 whatever the weights
_COARSE = 0.1


@dataclass(frozen=True)
class Layout:
    """How a packed row is made of S segments, in their order."""

    length_S: tuple[int, ...]
    """Tokens of each."""
    opening_S: tuple[int, ...]
    """For each, the segment that it follows in its row; -1: it begins a row."""
    device: torch.device

    @cached_property
    def start_S(self) -> list[int]:
        """Where each begins in the packed row."""
        return [0, *torch.tensor(self.length_S).cumsum(0).tolist()][:-1]

    @cached_property
    def before_S(self) -> list[int]:
        """Tokens of its row before each."""
        return [self.length_S[o] if o >= 0 else 0 for o in self.opening_S]

    @cached_property
    def position_1N(self) -> Tensor:
        """Places within rows."""
        each = [torch.arange(p, p + n) for p, n in zip(self.before_S, self.length_S, strict=True)]
        return torch.cat(each)[None].to(self.device)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """For variable-length kernels: ends of queries and of keys `[S + 1]`, the longest of either."""
        seen_S = [p + n for p, n in zip(self.before_S, self.length_S, strict=True)]
        ends = [torch.tensor([0, *x]).cumsum(0).to(self.device, torch.int32) for x in (self.length_S, seen_S)]
        return ends[0], ends[1], max(self.length_S), max(seen_S)

    @cached_property
    def seen_M(self) -> Tensor | None:
        """Which tokens each segment attends to, one after the other; None: the packed row as it is."""
        if not any(self.before_S):
            return None
        index: list[Tensor] = []
        for start, n, o in zip(self.start_S, self.length_S, self.opening_S, strict=True):
            if o >= 0:
                index.append(torch.arange(self.start_S[o], self.start_S[o] + self.length_S[o]))
            index.append(torch.arange(start, start + n))
        return torch.cat(index).to(self.device)


def hidden_of(model: Any, tokens_1N: Tensor, layout: Layout, sight: Sight | None = None) -> Tensor:
    """Last hidden states of a packed row, `[N, H]`; `sight`: of one that shows pictures."""
    with attention(decoder_of(model).config, NAME):
        out = feed(model, tokens_1N, sight, position_ids=layout.position_1N, use_cache=False, packed_layout=layout)
    return out.last_hidden_state[0]


@contextmanager
def attention(config: Any, name: str) -> Iterator[None]:
    """Another of the registered attention functions for a model, by its configuration."""
    usual = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = usual


def kernel(device: torch.device, dtype: torch.dtype) -> str:
    """What computes the attention of packed rows: flash-attn, torch-varlen or sdpa."""
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or not half or torch.cuda.get_device_capability(device) < (8, 0):
        return "sdpa"
    return "flash-attn" if find_spec("flash_attn") else "torch-varlen"


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query `[1, heads, N, D]`, result `[1, N, heads, D]`.

    NotImplementedError where the model asks for more than causal attention within rows.
    """
    asked = [name for name in REFUSED if options.get(name) is not None]
    if asked or attention_mask is not None or dropout or packed_layout is None:
        raise NotImplementedError(f"packed attention with {asked or 'a mask or dropout'}")
    if torch.is_autocast_enabled(query.device.type):  # norms and rotations come out in float32
        kind = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    chosen = kernel(query.device, query.dtype)
    if chosen == "sdpa":
        return _one_by_one(query, key, value, scaling, packed_layout), None
    return _at_once(_varlen(chosen), query, key, value, scaling, packed_layout), None


AttentionInterface.register(NAME, _attend)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, layout: Layout) -> Tensor:
    """One call per segment: on a CPU faster than any batch that needs padding or a gather."""
    queries, keys, values = (list(x.split(layout.length_S, 2)) for x in (q, k, v))
    out: list[Tensor] = []
    for i, o in enumerate(layout.opening_S):
        mask: Any = None
        key, value = keys[i], values[i]
        if o >= 0:
            key, value = torch.cat([keys[o], key], 2), torch.cat([values[o], value], 2)
            mask = causal_lower_right(layout.length_S[i], key.shape[2])
        seen = scaled_dot_product_attention(
            queries[i], key, value, attn_mask=mask, is_causal=o < 0, scale=scaling, enable_gqa=True
        )
        out.append(seen.transpose(1, 2))
    return torch.cat(out, 1)


def _at_once(varlen: Callable, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, layout: Layout) -> Tensor:
    """One kernel over all segments; keys and values of an opening are read again for each row that begins with it."""
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    if layout.seen_M is not None:
        k, v = k.index_select(0, layout.seen_M), v.index_select(0, layout.seen_M)
    return varlen(q.contiguous(), k.contiguous(), v.contiguous(), scaling, layout)[None]


def _varlen(name: str) -> Callable[[Tensor, Tensor, Tensor, float | None, Layout], Tensor]:
    """A variable-length causal kernel, aligned to the last token of queries and keys; heads of keys may be fewer."""
    if name == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        def flash(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, layout: Layout) -> Tensor:
            return flash_attn_varlen_func(q, k, v, *layout.bounds, softmax_scale=scaling, causal=True)

        return flash
    from torch.nn.attention.varlen import varlen_attn

    def ours(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, layout: Layout) -> Tensor:
        found = varlen_attn(q, k, v, *layout.bounds, scale=scaling, window_size=(-1, 0), enable_gqa=True)
        assert isinstance(found, Tensor)  # nothing else was asked for
        return found

    return ours


def _agrees(config: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel that will be used gives what attention one by one gives, on heads like the model's.

    Tried apart from the model, because in half precision a random model hardly shows what it attends to.
    """
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    name = kernel(device, dtype)
    if name == "sdpa":
        return True
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return same_attention(_varlen(name), heads, kv_heads, size, device, dtype)


def same_attention(
    varlen: Callable, heads: int, kv_heads: int, size: int, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether a variable-length kernel attends as packed rows should, and sends gradients where they belong."""
    layout = Layout((5, 4, 2, 7), (-1, 0, 0, -1), device)
    draw = torch.Generator().manual_seed(0)
    total = sum(layout.length_S)
    q, k, v, g = (torch.randn(1, n, total, size, generator=draw) for n in (heads, kv_heads, kv_heads, heads))
    found = []
    try:
        for attend in (_one_by_one, partial(_at_once, varlen)):
            a, b, c = (x.to(device, dtype).requires_grad_() for x in (q, k, v))
            with torch.enable_grad():
                out = attend(a, b, c, size**-0.5, layout)
                grads = torch.autograd.grad(out, (a, b, c), g.transpose(1, 2).to(out))
            found.append([x.double() for x in (out.detach(), *grads)])
    except (TypeError, ValueError, RuntimeError, ImportError, NotImplementedError):
        return False  # a kernel that this device or these heads do not suit
    return all(bool((a - b).norm() <= _COARSE * a.norm()) for a, b in zip(*found, strict=True))


@torch.no_grad()
def can_pack(model: Any) -> bool:
    """Whether the model gives the same hidden states this way, tried on a few tokens with and without an opening."""
    trunk = decoder_of(model)
    config = trunk.config.get_text_config()
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return False
    weight = next(trunk.parameters())
    if not _agrees(config, weight.device, weight.dtype):
        return False
    draw = torch.Generator().manual_seed(0)
    tokens_RT = torch.randint(0, int(config.vocab_size), (3, 9), generator=draw).to(weight.device)
    tokens_RT[1, :5] = tokens_RT[0, :5]
    layout = Layout((5, 4, 2, 7), (-1, 0, 0, -1), weight.device)
    packed_1N = torch.cat([tokens_RT[0], tokens_RT[1, 5:7], tokens_RT[2, :7]])[None]
    try:
        plain_RTH = trunk(input_ids=tokens_RT, use_cache=False).last_hidden_state
        got_NH = hidden_of(model, packed_1N, layout)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError):
        return False  # another attention, or one that takes no further arguments
    want_NH = torch.cat([plain_RTH[0], plain_RTH[1, 5:7], plain_RTH[2, :7]])
    error = (got_NH - want_NH).abs().max() / want_NH.abs().max().clamp(min=1e-6)
    exact = 0 if torch.is_autocast_enabled(weight.device.type) else _TOLERANCE.get(weight.dtype, _COARSE)
    return bool(error <= (exact or _COARSE))
