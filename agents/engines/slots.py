"""Key/value memory with a slot per episode, and attention over it for rows of unequal lengths in one forward.

A forward takes all tokens of all rows as one flat sequence: first one token for each row that is decoding,
then the fed tokens of rows that begin a turn. Linear layers see no padding at all. Attention runs in two
parts: decoding rows attend to their slots in place (no copy), fed rows to a gathered copy with a causal
mask. A prefix that all rows share (system message, tools) is kept once: decoding rows read it with one dense
product.

Slots plug into transformers as a `Cache` plus a registered attention function, so that any architecture whose
attention goes through `ALL_ATTENTION_FUNCTIONS` works; `HFEngine` verifies each model numerically at
start-up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache

ATTENTION = "palaestra_slots"  # its name in transformers' table of attention functions
_GROW = 128  # slot length grows in steps of this many tokens


class UnsupportedAttention(RuntimeError):
    """The model's attention asks for something that slots do not provide."""


@dataclass
class Plan:
    """What one forward does. N flat tokens, D rows decoding (one token each), P rows fed (up to C tokens
    each).

    Index tensors live on the model's device.
    """

    ids_N: Tensor
    """Token ids, decoding rows first."""
    pos_N: Tensor
    """Positions in the row, shared prefix included."""
    slot_N: Tensor
    """Slot of each token."""
    index_N: Tensor
    """Place within the slot: the position, less the length of the shared prefix where the row has it."""
    keep_R: Tensor
    """Flat indices whose logits are wanted."""
    n_decode: int
    """Number of decoding rows: the first so many tokens."""
    span: int
    """One more than the highest decoding slot."""
    reach: int
    """One more than the highest place that a decoding row attends to."""
    dense: bool
    """Whether the decoding rows are exactly the slots 0..span-1, in order."""
    fed_slot_P: Tensor | None = None
    """Slots of the fed rows."""
    fed_index_PC: Tensor | None = None
    """Tokens of each fed row, counted after the decoding ones; padded by repeating the row's last."""
    fed_real_N: Tensor | None = None
    """Where each of these tokens stands in the padded [P * C] layout."""
    fed_bias_PCL: Tensor | None = None
    """0 where a fed token may attend, else -inf: shared prefix first, then the slot's places."""
    fed_reach: int = 0
    """One more than the highest place that a fed row attends to."""


class Slots(Cache):
    """Keys and values of `rows` episodes for every layer, plus one shared prefix."""

    def __init__(self, rows: int, layers: int, capacity: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.rows, self.n_layers, self.capacity, self.device = rows, layers, capacity, device
        self.length = 0  # places allocated per slot
        self.keys: list[Tensor | None] = [None] * layers  # each [rows, Hkv, length, D]
        self.values: list[Tensor | None] = [None] * layers
        self.prefix_ids: tuple[int, ...] = ()
        self.prefix_keys: list[Tensor] = []  # each [Hkv, P, D]
        self.prefix_values: list[Tensor] = []
        self.open_SL = torch.full((rows, 0), float("-inf"), device=device)  # 0 where a place is filled
        self.shares_S = torch.zeros(rows, device=device)  # 0 where a slot reads the shared prefix, else -inf
        self.plan: Plan | None = None
        self._flat: Tensor | None = None
        self._bias_S1L: Tensor | None = None
        self._prefix_by_head: dict[int, tuple[Tensor, Tensor]] = {}

    # ------------------------------------------------------------------ memory

    def reserve(self, length: int) -> None:
        """Make room for `length` places per slot."""
        if length <= self.length:
            return
        new = min(self.capacity, -(-length // _GROW) * _GROW)
        pad = new - self.length
        self.keys = [None if k is None else F.pad(k, (0, 0, 0, pad)) for k in self.keys]
        self.values = [None if v is None else F.pad(v, (0, 0, 0, pad)) for v in self.values]
        self.open_SL = F.pad(self.open_SL, (0, pad), value=float("-inf"))
        self.length = new

    def clear(self, slot: int) -> None:
        """Forget a slot's contents."""
        self.open_SL[slot] = float("-inf")

    def clear_all(self) -> None:
        """Forget all slots and the shared prefix."""
        self.open_SL.fill_(float("-inf"))
        self.shares_S.zero_()
        self.prefix_ids, self.prefix_keys, self.prefix_values, self._prefix_by_head = (), [], [], {}

    def copy(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the first `length` places of slots `source` [n] to slots `target` [n]."""
        for store in (self.keys, self.values):
            for layer in store:
                if layer is not None:
                    layer[target, :, :length] = layer[source, :, :length]
        self.open_SL[target] = self.open_SL[source]
        self.shares_S[target] = self.shares_S[source]

    def lift_prefix(self, slot: int, ids: tuple[int, ...]) -> None:
        """Make the first len(ids) places of a slot the shared prefix; the slot is forgotten."""
        n = len(ids)
        self.prefix_ids = ids
        self.prefix_keys = [k[slot, :, :n].clone() for k in self.keys if k is not None]
        self.prefix_values = [v[slot, :, :n].clone() for v in self.values if v is not None]
        self.clear(slot)

    def begin(self, plan: Plan) -> None:
        """Announce the next forward."""
        self.plan, self._flat, self._bias_S1L = plan, None, None
        self.open_SL[plan.slot_N, plan.index_N] = 0.0

    # ------------------------------------------------------------------ transformers' cache protocol

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Store new keys and values [1, Hkv, N, D] in their slots; returned unchanged, attention reads
        slots.
        """
        self.write(key_states[0].transpose(0, 1), value_states[0].transpose(0, 1), layer_idx)
        return key_states, value_states

    def write(self, key_NHD: Tensor, value_NHD: Tensor, layer: int) -> None:
        """Store keys and values of the plan's N tokens in layer `layer`."""
        if self.keys[layer] is None:
            shape = (self.rows, key_NHD.shape[1], self.length)
            # zeros, not empty: masked places must hold finite numbers
            self.keys[layer] = key_NHD.new_zeros(*shape, key_NHD.shape[2])
            self.values[layer] = value_NHD.new_zeros(*shape, value_NHD.shape[2])
        keys, values = self.keys[layer], self.values[layer]
        flat = self._flat_index(key_NHD.shape[1])
        keys.view(-1, keys.shape[-1]).index_copy_(0, flat, key_NHD.reshape(-1, keys.shape[-1]).to(keys.dtype))
        values.view(-1, values.shape[-1]).index_copy_(
            0, flat, value_NHD.reshape(-1, values.shape[-1]).to(values.dtype)
        )

    def _flat_index(self, heads: int) -> Tensor:
        """Places of the plan's tokens in the flattened [rows * heads * length] memory, token-major."""
        if self._flat is None or len(self._flat) != heads * len(self.plan.slot_N):
            head_H = torch.arange(heads, device=self.device)
            row_NH = (self.plan.slot_N[:, None] * heads + head_H) * self.length
            self._flat = (row_NH + self.plan.index_N[:, None]).flatten()
        return self._flat

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given, so no model needs this."""
        return 0

    # ------------------------------------------------------------------ attention

    def attend(self, query_NHE: Tensor, layer: int, scale: float) -> Tensor:
        """Attention of the plan's N tokens in layer `layer`: [N, H, E] -> [N, H, E of the values]."""
        if scale != 1.0:
            query_NHE = query_NHE * scale
        d = self.plan.n_decode
        if d == len(query_NHE):
            return self._decode(query_NHE, layer)
        fed = self._fed(query_NHE[d:], layer)
        return fed if d == 0 else torch.cat([self._decode(query_NHE[:d], layer), fed])

    def _decode(self, query_DHE: Tensor, layer: int) -> Tensor:
        """One query per row, against the slots in place and the shared prefix; one softmax over both."""
        plan, keys, values = self.plan, self.keys[layer], self.values[layer]
        span, reach, (heads, e) = plan.span, plan.reach, query_DHE.shape[1:]
        if plan.dense:
            query_SHE = query_DHE.contiguous()
        else:
            query_SHE = query_DHE.new_zeros(span, heads, e).index_copy_(
                0, plan.slot_N[: plan.n_decode], query_DHE
            )
        each = span * keys.shape[1]  # a small product for every slot and key head
        packed = query_SHE.view(each, -1, e)
        score = torch.bmm(packed, keys.flatten(0, 1)[:each, :reach].transpose(1, 2)).view(span, heads, reach)
        p = len(self.prefix_ids)
        if p:
            prefix_key, prefix_value = self._prefix_of(layer, heads)
            shared = torch.bmm(query_SHE.transpose(0, 1), prefix_key)  # one dense product per head
            score = torch.cat([shared.transpose(0, 1), score], -1)
        weight = score.add_(self._bias(score.dtype)).softmax(-1)
        own = torch.bmm(weight.view(each, -1, p + reach)[..., p:], values.flatten(0, 1)[:each, :reach])
        out = own.view(span, heads, -1)
        if p:
            out = out.add_(torch.bmm(weight[..., :p].transpose(0, 1), prefix_value).transpose(0, 1))
        return out if plan.dense else out.index_select(0, plan.slot_N[: plan.n_decode])

    def _fed(self, query_NHE: Tensor, layer: int) -> Tensor:
        """Several queries per row, against a copy of the rows' slots."""
        plan, keys, values = self.plan, self.keys[layer], self.values[layer]
        heads, e = query_NHE.shape[1:]
        rows, longest = plan.fed_index_PC.shape
        kv_heads = keys.shape[1]
        group = heads // kv_heads
        query = query_NHE.index_select(0, plan.fed_index_PC.flatten()).view(rows, longest, kv_heads, group, e)
        query = query.permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, group * longest, e)
        k, v = keys[plan.fed_slot_P, :, : plan.fed_reach], values[plan.fed_slot_P, :, : plan.fed_reach]
        if self.prefix_ids:
            k = torch.cat([self.prefix_keys[layer].expand(rows, -1, -1, -1), k], 2)
            v = torch.cat([self.prefix_values[layer].expand(rows, -1, -1, -1), v], 2)
        bias = plan.fed_bias_PCL.to(query.dtype)
        bias = bias.repeat(1, group, 1) if group > 1 else bias
        out = F.scaled_dot_product_attention(query, k, v, attn_mask=bias[:, None], scale=1.0)
        out = out.view(rows, kv_heads, group, longest, -1).permute(0, 3, 1, 2, 4)
        return out.reshape(rows * longest, heads, -1).index_select(0, plan.fed_real_N)

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
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    slots: Slots | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface over `Slots`, which the engine passes through the model's
    keywords.
    """
    if slots is None:
        raise UnsupportedAttention("the model does not pass keywords on to its attention")
    for name in ("softcap", "s_aux", "position_bias", "sliding_window"):
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(f"the model's attention uses {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_NHD = slots.attend(query[0].transpose(0, 1), module.layer_idx, scale)
    return out_NHD[None], None


AttentionInterface.register(ATTENTION, slot_attention)


_users: dict[int, int] = {}  # id of a model -> engines that are sampling from it now, in threads of their own
_before: dict[int, tuple[list[str | None], bool]] = {}
_users_lock = Lock()


@contextmanager
def attention_of(model: Any, name: str | None) -> Iterator[None]:
    """Evaluation mode for a while, and attention through the registered function `name` (None: as it is).

    Several threads may do so at once with one model and one name; the last one restores what was.
    """
    configs = (
        [model.config, *(getattr(model.config, sub) for sub in model.config.sub_configs)] if name else []
    )
    with _users_lock:
        _users[id(model)] = _users.get(id(model), 0) + 1
        if _users[id(model)] == 1:
            _before[id(model)] = [c._attn_implementation_internal for c in configs], model.training
            if model.training:
                model.eval()
            for config in configs:
                config._attn_implementation_internal = name
    try:
        yield
    finally:
        with _users_lock:
            _users[id(model)] -= 1
            if _users[id(model)] == 0:
                del _users[id(model)]
                before, training = _before.pop(id(model))
                for config, old in zip(configs, before, strict=True):
                    config._attn_implementation_internal = old
                if training:
                    model.train()
