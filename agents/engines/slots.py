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
    """What one forward does. Index tensors live on the model's device. N flat tokens, D rows decoding, P
    fed.
    """

    ids_N: Tensor
    """Token ids, decoding rows first."""
    pos_N: Tensor
    """Positions in the row, shared prefix included."""
    slot_N: Tensor
    """Slot of each token."""
    index_N: Tensor
    """Place within the slot: position minus the length of the shared prefix, for rows that have it."""
    keep_R: Tensor
    """Flat indices whose logits are wanted."""
    n_decode: int
    """Number of decoding rows: the first so many tokens."""
    span: int
    """One more than the highest decoding slot."""
    reach: int
    """One more than the highest place that a decoding row attends to."""
    dense: bool
    """Whether the decoding rows are exactly the slots 0..span-1 in order."""
    fed_slot_P: Tensor | None = None
    """Slots of the fed rows."""
    fed_index_PC: Tensor | None = None
    """Flat index, counted after the decoding tokens, of each fed row's tokens; padded by repeating the
    last.
    """
    fed_real_N: Tensor | None = None
    """Where the tokens after the decoding ones stand in the padded [P * C] layout."""
    fed_mask_PCL: Tensor | None = None
    """True where a fed token may attend: shared prefix first, then the slot's places."""
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
        self.prefix_ids, self.prefix_keys, self.prefix_values = (), [], []

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
        self.plan, self._flat = plan, None
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
        values.view(-1, values.shape[-1]).index_copy_(0, flat, value_NHD.reshape(-1, values.shape[-1]).to(values.dtype))

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

    def attend(self, query_NHD: Tensor, layer: int, scale: float) -> Tensor:
        """Attention of the plan's N tokens in layer `layer`: [N, H, D] -> [N, H, Dv]."""
        d = self.plan.n_decode
        if d == len(query_NHD):
            return self._decode(query_NHD, layer, scale)
        fed = self._fed(query_NHD[d:], layer, scale)
        return fed if d == 0 else torch.cat([self._decode(query_NHD[:d], layer, scale), fed])

    def _decode(self, query_DHE: Tensor, layer: int, scale: float) -> Tensor:
        plan, keys, values = self.plan, self.keys[layer], self.values[layer]
        span, reach, kv_heads = plan.span, plan.reach, keys.shape[1]
        d, heads, e = query_DHE.shape
        query_DHE = query_DHE * scale
        if plan.dense:
            query_SHE = query_DHE
        else:
            query_SHE = query_DHE.new_zeros(span, heads, e)
            query_SHE[plan.slot_N[:d]] = query_DHE
        packed = query_SHE.reshape(span * kv_heads, heads // kv_heads, e)
        k = keys.view(-1, *keys.shape[2:])[: span * kv_heads, :reach]
        v = values.view(-1, *values.shape[2:])[: span * kv_heads, :reach]
        score = torch.bmm(packed, k.transpose(1, 2)).view(span, heads, reach)
        score = score + self.open_SL[:span, None, :reach].to(score.dtype)
        if not self.prefix_ids:
            weight = score.softmax(-1)
            out = torch.bmm(weight.view(span * kv_heads, -1, reach), v)
        else:
            out = self._with_prefix(packed, score, v, layer)
        out = out.view(span, heads, -1)
        return out if plan.dense else out[plan.slot_N[:d]]

    def _with_prefix(self, packed: Tensor, score_SHL: Tensor, v: Tensor, layer: int) -> Tensor:
        """One softmax over the shared prefix and the slot; the prefix part is a dense product over all
        rows.
        """
        pk, pv = self.prefix_keys[layer], self.prefix_values[layer]
        span, heads, reach = score_SHL.shape
        kv_heads, p = pk.shape[:2]
        group, e = heads // kv_heads, packed.shape[-1]
        by_head = packed.view(span, kv_heads, group, e).transpose(0, 1).reshape(kv_heads, span * group, e)
        shared = torch.bmm(by_head, pk.transpose(1, 2)).view(kv_heads, span, group, p).transpose(0, 1)
        shared = shared.reshape(span, heads, p) + self.shares_S[:span, None, None].to(shared.dtype)
        weight = torch.cat([shared, score_SHL], -1).softmax(-1)
        own = torch.bmm(weight[..., p:].reshape(span * kv_heads, group, reach), v)
        weight_p = weight[..., :p].reshape(span, kv_heads, group, p).transpose(0, 1)
        common = torch.bmm(weight_p.reshape(kv_heads, span * group, p), pv)
        common = common.view(kv_heads, span, group, -1).transpose(0, 1).reshape(own.shape)
        return own + common

    def _fed(self, query_NHE: Tensor, layer: int, scale: float) -> Tensor:
        plan, keys, values = self.plan, self.keys[layer], self.values[layer]
        heads, e = query_NHE.shape[1:]
        rows, longest = plan.fed_index_PC.shape
        kv_heads, group = keys.shape[1], heads // keys.shape[1]
        query = query_NHE[plan.fed_index_PC.flatten()].view(rows, longest, kv_heads, group, e)
        query = query.permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, group * longest, e)
        k = keys[plan.fed_slot_P, :, : plan.fed_reach]
        v = values[plan.fed_slot_P, :, : plan.fed_reach]
        if self.prefix_ids:
            k = torch.cat([self.prefix_keys[layer].expand(rows, -1, -1, -1), k], 2)
            v = torch.cat([self.prefix_values[layer].expand(rows, -1, -1, -1), v], 2)
        mask = plan.fed_mask_PCL.repeat(1, group, 1)[:, None]
        out = F.scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scale)
        out = out.view(rows, kv_heads, group, longest, -1).permute(0, 3, 1, 2, 4)
        return out.reshape(rows * longest, heads, -1)[plan.fed_real_N]


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


@contextmanager
def attention_of(model: Any, name: str | None) -> Iterator[None]:
    """Evaluation mode for a while, and attention through the registered function `name` (None: as it is)."""
    configs = (
        [model.config, *(getattr(model.config, sub) for sub in model.config.sub_configs)] if name else []
    )
    before = [config._attn_implementation_internal for config in configs]
    training = model.training
    if training:
        model.eval()
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation_internal = old
        if training:
            model.train()
