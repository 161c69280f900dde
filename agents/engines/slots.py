"""Key/value memory with a slot per episode, and attention over it for rows of unequal lengths in one forward.

A forward takes all tokens of all rows as one flat sequence: first one token for each row that is decoding, then
the fed tokens of rows that begin a turn. Linear layers see no padding at all. Attention runs in two parts:
decoding rows attend to their slots in place (no copy), fed rows to a gathered copy with a causal mask. A prefix
that all rows share (system message, tools) is kept once: decoding rows read it with one dense product.

Slots plug into transformers as a `Cache` plus a registered attention function, so that any architecture whose
attention goes through `ALL_ATTENTION_FUNCTIONS` works; `HFEngine` verifies each model numerically at start-up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from agents.engines.plan import FedPlan, Plan

ATTENTION = "palaestra_slots"  # its name in transformers' table of attention functions
_GROW = 128  # slots grow in steps of this many places


class UnsupportedAttention(RuntimeError):
    """The model's attention asks for something that slots do not provide."""


class Slots(Cache):
    """Keys and values of `rows` episodes for every layer, plus one shared prefix.

    Places of a slot count from the end of the shared prefix for rows that read it. Tensors are made when the first
    forward shows their shapes.
    """

    plan: Plan
    """The forward that is under way; set by `begin`."""
    prefix_ids: tuple[int, ...]
    """The shared prefix; empty if there is none."""
    prefix_keys: dict[int, Tensor]
    """Its keys by layer: [Hkv, P, E]."""
    prefix_values: dict[int, Tensor]
    """Its values by layer: [Hkv, P, E]."""
    _prefix_by_head: dict[int, tuple[Tensor, Tensor]]

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.rows, self.capacity, self.device = rows, capacity, device
        self.length = 0  # places allocated per slot
        self.keys: dict[int, Tensor] = {}  # by layer: [rows, Hkv, length, E]
        self.values: dict[int, Tensor] = {}
        self.open_SL = torch.full((rows, 0), float("-inf"), device=device)  # 0 where a place is filled
        self.shares_S = torch.zeros(rows, device=device)  # 0 where a slot's row reads the shared prefix, else -inf
        self._forget_prefix()

    # ------------------------------------------------------------------ memory

    def reserve(self, length: int) -> None:
        """Make room for `length` places per slot."""
        if length <= self.length:
            return
        new = min(self.capacity, -(-length // _GROW) * _GROW)
        pad = new - self.length
        for store in (self.keys, self.values):
            for layer, tensor in store.items():
                store[layer] = F.pad(tensor, (0, 0, 0, pad))
        self.open_SL = F.pad(self.open_SL, (0, pad), value=float("-inf"))
        self.length = new

    def clear(self, slot: int) -> None:
        """Forget a slot's contents."""
        self.open_SL[slot] = float("-inf")

    def clear_all(self) -> None:
        """Forget all slots and the shared prefix."""
        self.open_SL.fill_(float("-inf"))
        self.shares_S.zero_()
        self._forget_prefix()

    def copy(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the first `length` places of slots `source` [n] to slots `target` [n]."""
        for store in (self.keys, self.values):
            for tensor in store.values():
                tensor[target, :, :length] = tensor[source, :, :length]
        self.open_SL[target] = self.open_SL[source]
        self.shares_S[target] = self.shares_S[source]

    def lift_prefix(self, slot: int, ids: tuple[int, ...]) -> None:
        """Make the first len(ids) places of a slot the shared prefix; the slot is forgotten."""
        n = len(ids)
        self.prefix_ids = ids
        self.prefix_keys = {layer: k[slot, :, :n].clone() for layer, k in self.keys.items()}
        self.prefix_values = {layer: v[slot, :, :n].clone() for layer, v in self.values.items()}
        self.clear(slot)

    def _forget_prefix(self) -> None:
        self.prefix_ids, self.prefix_keys, self.prefix_values, self._prefix_by_head = (), {}, {}, {}

    # ------------------------------------------------------------------ one forward

    def begin(self, plan: Plan) -> None:
        """Announce the next forward."""
        self.reserve(plan.longest)
        self.plan = plan
        self._flat: dict[int, Tensor] = {}
        self._bias_S1L: Tensor | None = None
        self.open_SL[plan.slot_N, plan.index_N] = 0.0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """transformers' hook: keys and values [1, Hkv, N, E]. Returned as they came; attention reads the slots."""
        self.write(key_states[0].transpose(0, 1), value_states[0].transpose(0, 1), layer_idx)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given, so no model needs this."""
        return 0

    def write(self, key_NHE: Tensor, value_NHE: Tensor, layer: int) -> None:
        """Store keys and values of the plan's N tokens in layer `layer`."""
        for store, new in ((self.keys, key_NHE), (self.values, value_NHE)):
            if layer not in store:  # zeros, not empty: masked places must hold finite numbers
                store[layer] = new.new_zeros(self.rows, new.shape[1], self.length, new.shape[2])
            flat = store[layer].view(-1, new.shape[2])
            flat.index_copy_(0, self._places(new.shape[1]), new.reshape(-1, new.shape[2]).to(flat.dtype))

    def _places(self, heads: int) -> Tensor:
        """Places of the plan's tokens in memory flattened to [rows * heads * length], token by token."""
        if heads not in self._flat:
            head_H = torch.arange(heads, device=self.device)
            row_NH = (self.plan.slot_N[:, None] * heads + head_H) * self.length
            self._flat[heads] = (row_NH + self.plan.index_N[:, None]).flatten()
        return self._flat[heads]

    # ------------------------------------------------------------------ attention

    def attend(self, query_NHE: Tensor, layer: int, scale: float) -> Tensor:
        """Attention of the plan's N tokens in layer `layer`: [N, H, E] -> [N, H, E of the values]."""
        if scale != 1.0:
            query_NHE = query_NHE * scale
        d, fed = self.plan.decoding, self.plan.fed
        if fed is None:
            return self._decode(query_NHE, layer)
        out = self._feed(query_NHE[d:], fed, layer)
        return torch.cat([self._decode(query_NHE[:d], layer), out]) if d else out

    def _decode(self, query_DHE: Tensor, layer: int) -> Tensor:
        """One query per row, against the slots in place and the shared prefix; one softmax over both."""
        plan, keys, values = self.plan, self.keys[layer], self.values[layer]
        span, reach, (heads, e) = plan.span, plan.reach, query_DHE.shape[1:]
        if plan.dense:
            query_SHE = query_DHE.contiguous()
        else:
            query_SHE = query_DHE.new_zeros(span, heads, e).index_copy_(0, plan.slot_D, query_DHE)
        each = span * keys.shape[1]  # a small product for every slot and key head
        packed = query_SHE.view(each, -1, e)
        score = torch.bmm(packed, keys.flatten(0, 1)[:each, :reach].transpose(1, 2)).view(span, heads, reach)
        p = len(self.prefix_ids)
        if p:
            prefix_key, prefix_value = self._prefix_of(layer, heads)
            shared = torch.bmm(query_SHE.transpose(0, 1), prefix_key)  # a dense product for every head
            score = torch.cat([shared.transpose(0, 1), score], -1)
        weight = score.add_(self._bias(score.dtype)).softmax(-1)
        own = torch.bmm(weight.view(each, -1, p + reach)[..., p:], values.flatten(0, 1)[:each, :reach])
        out = own.view(span, heads, -1)
        if p:
            out = out.add_(torch.bmm(weight[..., :p].transpose(0, 1), prefix_value).transpose(0, 1))
        return out if plan.dense else out.index_select(0, plan.slot_D)

    def _feed(self, query_NHE: Tensor, fed: FedPlan, layer: int) -> Tensor:
        """Several queries per row, against a copy of the rows' slots."""
        keys, values = self.keys[layer], self.values[layer]
        heads, e = query_NHE.shape[1:]
        rows, longest = fed.index_PC.shape
        kv_heads = keys.shape[1]
        group = heads // kv_heads
        query = query_NHE.index_select(0, fed.index_PC.flatten()).view(rows, longest, kv_heads, group, e)
        query = query.permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, group * longest, e)
        k, v = keys[fed.slot_P, :, : fed.reach], values[fed.slot_P, :, : fed.reach]
        if self.prefix_ids:
            k = torch.cat([self.prefix_keys[layer].expand(rows, -1, -1, -1), k], 2)
            v = torch.cat([self.prefix_values[layer].expand(rows, -1, -1, -1), v], 2)
        bias = fed.bias_PCL.to(query.dtype)
        bias = bias.repeat(1, group, 1) if group > 1 else bias
        out = F.scaled_dot_product_attention(query, k, v, attn_mask=bias[:, None], scale=1.0)
        out = out.view(rows, kv_heads, group, longest, -1).permute(0, 3, 1, 2, 4)
        return out.reshape(rows * longest, heads, -1).index_select(0, fed.real_N)

    def _bias(self, dtype: torch.dtype) -> Tensor:
        """What decoding rows may attend to, as 0 or -inf: [span, 1, prefix + reach]; one for all layers."""
        if self._bias_S1L is None:
            open_SL = self.open_SL[: self.plan.span, : self.plan.reach]
            if self.prefix_ids:
                shares = self.shares_S[: self.plan.span, None].expand(-1, len(self.prefix_ids))
                open_SL = torch.cat([shares, open_SL], -1)
            self._bias_S1L = open_SL.to(dtype)[:, None]
        return self._bias_S1L

    def _prefix_of(self, layer: int, heads: int) -> tuple[Tensor, Tensor]:
        """The shared prefix for every query head: keys [H, E, P] and values [H, P, E]."""
        if layer not in self._prefix_by_head:
            key, value = self.prefix_keys[layer], self.prefix_values[layer]
            group = heads // len(key)
            by_head = key.repeat_interleave(group, 0).transpose(1, 2), value.repeat_interleave(group, 0)
            self._prefix_by_head[layer] = by_head
        return self._prefix_by_head[layer]


def slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    slots: Slots | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over `Slots`, which the engine passes through the model's keywords."""
    if slots is None:
        raise UnsupportedAttention("the model does not pass keywords on to its attention")
    for name in ("softcap", "s_aux", "position_bias", "sliding_window"):
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(f"the model's attention uses {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return slots.attend(query[0].transpose(0, 1), module.layer_idx, scale)[None], None


AttentionInterface.register(ATTENTION, slot_attention)

_lock = Lock()
_users: dict[int, int] = {}  # id of a model -> threads that sample from it now
_before: dict[int, tuple[list[str | None], bool]] = {}  # id of a model -> what the last of them restores


@contextmanager
def attention_of(model: Any, name: str | None) -> Iterator[None]:
    """Evaluation mode for a while, and attention through the registered function `name` (None: as it is).

    Several threads may do so at once with one model and one name.
    """
    configs = [model.config, *(getattr(model.config, sub) for sub in model.config.sub_configs)] if name else []
    with _lock:
        _users[id(model)] = _users.get(id(model), 0) + 1
        if _users[id(model)] == 1:
            _before[id(model)] = [config._attn_implementation_internal for config in configs], model.training
            if model.training:
                model.eval()
            for config in configs:
                config._attn_implementation_internal = name
    try:
        yield
    finally:
        with _lock:
            _users[id(model)] -= 1
            if not _users[id(model)]:
                del _users[id(model)]
                before, training = _before.pop(id(model))
                for config, old in zip(configs, before, strict=True):
                    config._attn_implementation_internal = old
                if training:
                    model.train()
