"""Batch: trajectories as tensors and named columns.

The suffix of a name is its shape: `reward_B` [rows], `adv_BT` [rows, tokens], `scores_BK` [rows, scores]. B
and T are this batch's sizes, P the number of its pairs, a digit is that very size, any other letter is free.
Entry t of a per-token tensor speaks of token t. Shapes are checked on entry, nothing is broadcast silently,
and writing over a column must be said."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache as memoised
from typing import Any

import torch
from torch import Tensor

from policy_opt.errors import BatchError, unknown

CORE = ("tokens_BT", "real_BT", "mask_BT", "logp_sampler_BT", "version_BT")
UNITS = ("group_B", "task_B", "member_B", "seat_B", "parent_B", "turn_BT", "segment_BT")
_SUFFIX = re.compile(r".*_([A-Z0-9]+)$")


@memoised
def dims(name: str) -> str:
    """`adv_BT` -> `BT`; BatchError where a name has no shape suffix."""
    match = _SUFFIX.match(name)
    if match is None:
        raise BatchError(f"column `{name}` has no shape suffix; call it `{name}_B`, `{name}_BT`, ...")
    return match.group(1)


def is_stem(name: str) -> bool:
    """`adv` is a stem, `adv_BT` a column."""
    return _SUFFIX.match(name) is None


def spellings(name: str) -> tuple[str, ...]:
    """The columns that a name may mean: itself, or for a stem the finer column first."""
    return (f"{name}_BT", f"{name}_B") if is_stem(name) else (name,)


def floating(value: Tensor) -> Tensor:
    """Integers and truth values as the default float type, floats as they are."""
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


@dataclass(frozen=True)
class Batch:
    """B rows (trajectories, or segments of them) of T token positions, padded on the right."""

    tokens_BT: Tensor
    """Token ids, int64; 0 where there is no token."""
    real_BT: Tensor
    """True where a token stands, False on padding."""
    mask_BT: Tensor
    """True on the tokens that the policy sampled: the ones that are trained on."""
    logp_sampler_BT: Tensor
    """Log-prob of each sampled token as the sampler gave it; 0 elsewhere."""
    version_BT: Tensor
    """Policy version (number of optimizer steps) that sampled the token, int64."""
    units: Mapping[str, Tensor] = field(default_factory=dict)
    """Integer ids: per row group_B, task_B, member_B, seat_B and parent_B (the row that this one continues; -1: it
    is a first segment, -2: that row is not in this batch); per token turn_BT, segment_BT."""
    cols: Mapping[str, Tensor] = field(default_factory=dict)
    """Everything else by name."""
    pairs_P2: Tensor | None = None
    """Preference pairs as row indices (preferred, other), int64."""
    media: Mapping[str, Tensor] | None = None
    """Images and the like, each stored once; a name always means the same content."""
    soft: Mapping[str, Tensor] | None = None
    """Records of soft (mixture) tokens, for samplers that take them."""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Labels of a free axis: {"scores_BK": ("correct", "format")}."""
    cache: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Group indices, computed once and kept for as long as the units stay the same."""

    def __post_init__(self) -> None:
        if self.tokens_BT.ndim != 2:
            raise BatchError(f"tokens_BT has shape {tuple(self.tokens_BT.shape)}, expected [B, T]")
        for name in CORE[1:]:
            self._check(name, getattr(self, name))
        for name, value in (*self.units.items(), *self.cols.items()):
            self._check(name, value)
        if self.pairs_P2 is not None:
            self._check("pairs_P2", self.pairs_P2)

    @classmethod
    def build(cls, *, mask_BT: Any, group_B: Any, **columns: Any) -> Batch:
        """A batch from what is at hand; what is not given gets its neutral value (task = group, version 0).

        Columns may be tensors or nested lists; masks become bool, units int64.
        """
        special = {k: columns.pop(k) for k in ("pairs_P2", "media", "soft", "names") if k in columns}
        given = {k: torch.as_tensor(v) for k, v in columns.items()}
        mask_BT = torch.as_tensor(mask_BT).bool()
        group_B = torch.as_tensor(group_B).long()
        none_BT = torch.zeros(mask_BT.shape, dtype=torch.long, device=mask_BT.device)
        none_B = torch.zeros_like(group_B)
        units = {"group_B": group_B, "task_B": group_B, "member_B": none_B, "seat_B": none_B}
        units |= {"parent_B": none_B - 1, "turn_BT": none_BT, "segment_BT": none_BT}
        units |= {k: given.pop(k).long() for k in UNITS if k in given}
        return cls(
            tokens_BT=given.pop("tokens_BT", none_BT),
            real_BT=given.pop("real_BT", mask_BT).bool(),
            mask_BT=mask_BT,
            logp_sampler_BT=given.pop("logp_sampler_BT", none_BT.to(torch.get_default_dtype())),
            version_BT=given.pop("version_BT", none_BT),
            units=units,
            cols=given,
            **special,
        )

    # -- reading ---------------------------------------------------------------------------------------------

    @property
    def B(self) -> int:
        """Rows."""
        return self.tokens_BT.shape[0]

    @property
    def T(self) -> int:
        """Token positions, padding included."""
        return self.tokens_BT.shape[1]

    def __getitem__(self, name: str) -> Tensor:
        if name in self.cols:
            return self.cols[name]
        if name in self.units:
            return self.units[name]
        if name in CORE:
            return getattr(self, name)
        if name == "pairs_P2" and self.pairs_P2 is not None:
            return self.pairs_P2
        raise BatchError(unknown("column", name, self.columns))

    def __contains__(self, name: object) -> bool:
        return (
            name in self.cols
            or name in self.units
            or name in CORE
            or (name == "pairs_P2" and self.pairs_P2 is not None)
        )

    @property
    def columns(self) -> frozenset[str]:
        """Every name that can be read."""
        pairs = ("pairs_P2",) if self.pairs_P2 is not None else ()
        return frozenset((*CORE, *self.units, *self.cols, *pairs))

    def per_token(self, stem: str) -> Tensor:
        """`adv` -> adv_BT, or adv_B spread over the row's tokens: [B, T]. The finer column wins."""
        if f"{stem}_BT" in self:
            return self[f"{stem}_BT"]
        return self[f"{stem}_B"][:, None].expand(self.B, self.T)

    def index(self, unit: str = "group_B") -> tuple[Tensor, int]:
        """Rows of a unit column numbered 0..Q-1 in order of id: (index_B, Q). Ids need not be contiguous."""
        if unit not in self.cache:
            ids, index_B = torch.unique(self[unit], return_inverse=True)
            self.cache[unit] = (index_B, int(ids.numel()))
        return self.cache[unit]

    @property
    def branched(self) -> bool:
        """Does any trajectory have more than one row?"""
        if "branched" not in self.cache:
            self.cache["branched"] = not bool(self.once().all())
        return self.cache["branched"]

    @property
    def opening_BT(self) -> Tensor:
        """True on a row's prompt: the real tokens before the first one that is trained on."""
        return self.real_BT & (self.mask_BT.cumsum(1) == 0)

    def once(self) -> Tensor:
        """True on the first row of each trajectory, for statistics that count a trajectory once: [B]."""
        return self["parent_B"] == -1

    def roots(self) -> Tensor:
        """The row that each row's trajectory starts with, as far as it is in this batch: [B]."""
        here_B = torch.arange(self.B, device=self.mask_BT.device)
        root_B = torch.where(self["parent_B"] >= 0, self["parent_B"], here_B)
        while not torch.equal(root_B[root_B], root_B):
            root_B = root_B[root_B]
        return root_B

    def order(self, *units: str) -> Tensor:
        """Row indices sorted by unit columns, the first one most significant; ties stay in place: [B]."""
        order_B = torch.arange(self.B, device=self.mask_BT.device)
        for name in reversed(units):
            key_B = self[name] if dims(name) == "B" else self[name].amax(1)
            order_B = order_B[key_B[order_B].argsort(stable=True)]
        return order_B

    def mismatched(self, shift: int) -> Tensor:
        """The row whose policy tokens each row is shown under `Mismatched(shift)`: [B].

        The row `shift` places before it, cyclic, in order of (member, seat, segment, group): whatever the
        order of rows, a row of another group where there are several of one size.
        """
        order_B = self.order("member_B", "seat_B", "segment_BT", "group_B")
        return torch.empty_like(order_B).index_copy_(0, order_B, order_B.roll(shift))

    # -- writing ---------------------------------------------------------------------------------------------

    def put(self, **columns: Tensor) -> Batch:
        """A batch with new columns; BatchError where one is there already (see `over`)."""
        taken = [name for name in columns if name in self]
        if taken:
            raise BatchError(f"column `{taken[0]}` is already written; overwrite it explicitly with `over`")
        return self._with(columns)

    def over(self, **columns: Tensor) -> Batch:
        """A batch in which existing columns (or mask_BT, units, ...) are replaced, new ones added."""
        return self._with(columns)

    def _with(self, columns: Mapping[str, Tensor]) -> Batch:
        for name, value in columns.items():
            self._check(name, value)
        core = {k: v for k, v in columns.items() if k in CORE or k == "pairs_P2"}
        units = {k: v for k, v in columns.items() if k in self.units}
        cols = {k: v for k, v in columns.items() if k not in core and k not in units}
        changes: dict[str, Any] = dict(core)
        if cols:
            changes["cols"] = {**self.cols, **cols}
        if units:
            changes["units"] = {**self.units, **units}
        if units or columns.keys() & self.cache.keys():
            changes["cache"] = {}
        return self._like(**changes)

    def _like(self, **changes: Any) -> Batch:
        """`dataclasses.replace` without checking every column again: for changes that are right by construction."""
        found = object.__new__(Batch)
        found.__dict__.update(self.__dict__, **changes)
        return found

    def _check(self, name: str, value: Tensor) -> None:
        sizes = {"B": self.tokens_BT.shape[0], "T": self.tokens_BT.shape[1]}
        if self.pairs_P2 is not None and name != "pairs_P2":
            sizes["P"] = self.pairs_P2.shape[0]
        suffix, shape = dims(name), tuple(value.shape)
        wanted = [int(d) if d.isdigit() else sizes.get(d) for d in suffix]
        fits = len(shape) == len(wanted) and all(w in (None, s) for w, s in zip(wanted, shape, strict=True))
        if not fits:
            expected = [d if w is None else f"{d}={w}" for d, w in zip(suffix, wanted, strict=True)]
            raise BatchError(f"column `{name}` has shape {shape}, expected [{', '.join(expected)}]")

    # -- rows ------------------------------------------------------------------------------------------------

    def rows(self, rows_R: Tensor) -> Batch:
        """The named rows (int64 indices) in that order; pairs keep those whose two rows are both here."""

        def take(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {k: v[rows_R] if dims(k).startswith("B") else v for k, v in values.items()}

        changes: dict[str, Any] = {name: getattr(self, name)[rows_R] for name in CORE}
        units, cols = take(self.units), take(self.cols)
        if self.pairs_P2 is not None or self.branched:
            where_B = torch.full((self.B,), -2, dtype=torch.long, device=self.mask_BT.device)
            where_B[rows_R] = torch.arange(rows_R.numel(), device=where_B.device)
            parent_R = units["parent_B"]
            units["parent_B"] = torch.where(parent_R >= 0, where_B[parent_R.clamp(min=0)], parent_R)
            if self.pairs_P2 is not None:
                moved_P2 = where_B[self.pairs_P2]
                keep_P = (moved_P2 >= 0).all(1)
                changes["pairs_P2"] = moved_P2[keep_P]
                cols = _of_pairs(cols, keep_P)
        return self._like(**changes, units=units, cols=cols, cache={})

    def silence(self, keep_B: Tensor) -> Batch:
        """The same rows with an empty mask where keep_B is False: they leave sums, denominators and pairs."""
        found = self.over(mask_BT=self.mask_BT & keep_B.bool()[:, None])
        if self.pairs_P2 is None:
            return found
        keep_P = keep_B.bool()[self.pairs_P2].all(1)
        return found._like(pairs_P2=self.pairs_P2[keep_P], cols=_of_pairs(self.cols, keep_P))

    def pad(self, width: int) -> Batch:
        """The same rows with T = width >= self.T; every new entry is 0 or False."""
        extra = width - self.T
        if extra < 0:
            raise BatchError(f"cannot pad a batch of width {self.T} to {width}")

        def wider(name: str, value: Tensor) -> Tensor:
            axis = dims(name).find("T")
            if axis < 0:
                return value
            shape = list(value.shape)
            shape[axis] = extra
            return torch.cat([value, value.new_zeros(shape)], axis)

        changes: dict[str, Any] = {name: wider(name, getattr(self, name)) for name in CORE}
        changes["units"] = {k: wider(k, v) for k, v in self.units.items()}
        return replace(self, **changes, cols={k: wider(k, v) for k, v in self.cols.items()})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on a device."""

        def move(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {k: v.to(device) for k, v in values.items()}

        changes: dict[str, Any] = {name: getattr(self, name).to(device) for name in CORE}
        changes["pairs_P2"] = None if self.pairs_P2 is None else self.pairs_P2.to(device)
        changes |= {
            k: move(getattr(self, k))
            for k in ("units", "cols", "media", "soft")
            if getattr(self, k) is not None
        }
        return replace(self, **changes, cache={})

    # -- state -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of tensors and strings, for batches that a recipe carries over (previous, replay)."""
        state: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "cache"}
        state["names"] = {k: list(v) for k, v in self.names.items()}
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in state.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Batch:
        """Inverse of `state_dict`."""
        return cls(**{**state, "names": {k: tuple(v) for k, v in state["names"].items()}})


def concat(batches: Sequence[Batch]) -> Batch:
    """Rows of several batches under each other, padded to the widest.

    They must have the same columns; pairs are moved along. BatchError names the columns that some lack.
    """
    if not batches:
        raise BatchError("cannot concatenate zero batches")
    if len(batches) == 1:
        return batches[0]
    everywhere = frozenset.intersection(*(b.columns for b in batches))
    lacking = frozenset.union(*(b.columns for b in batches)) - everywhere - {"pairs_P2"}
    if lacking:
        raise BatchError(f"cannot concatenate: {sorted(lacking)} are not in all batches")
    width = max(b.T for b in batches)
    wide = [b.pad(width) for b in batches]
    starts = [sum(b.B for b in wide[:i]) for i in range(len(wide))]
    pairs = [b.pairs_P2 + start for b, start in zip(wide, starts, strict=True) if b.pairs_P2 is not None]
    changes: dict[str, Any] = {name: torch.cat([getattr(b, name) for b in wide]) for name in CORE}
    changes["pairs_P2"] = torch.cat(pairs) if pairs else None
    changes["media"] = _union([b.media for b in wide if b.media is not None])
    changes["soft"] = _merge([b.soft for b in wide if b.soft is not None])
    units = _stack([b.units for b in wide])
    shift_B = torch.cat(
        [torch.full_like(b["parent_B"], start) for b, start in zip(wide, starts, strict=True)]
    )
    units["parent_B"] = torch.where(units["parent_B"] >= 0, units["parent_B"] + shift_B, units["parent_B"])
    return replace(wide[0], **changes, units=units, cols=_stack([b.cols for b in wide]), cache={})


def side_by_side(index_N: Tensor, count: int, keep_N: Tensor) -> tuple[Tensor, Tensor]:
    """(items_QG, there_QG): the kept items of each of `count` groups next to each other, in order.

    index_N: each item's group; G is the largest group's size; there_QG is False on filling.
    """
    order_N = torch.where(keep_N, index_N, count).argsort(stable=True)
    size_Q = torch.bincount(index_N[keep_N], minlength=count)
    place_G = torch.arange(int(size_Q.max()) if count else 0, device=index_N.device)
    start_Q = size_Q.cumsum(0) - size_Q
    items_QG = order_N[(start_Q[:, None] + place_G).clamp(max=max(index_N.numel() - 1, 0))]
    return items_QG, place_G < size_Q[:, None]


def _of_pairs(cols: Mapping[str, Tensor], keep_P: Tensor) -> dict[str, Tensor]:
    """Columns per pair of the pairs that stay, other columns as they are."""
    return {k: v[keep_P] if dims(k).startswith("P") else v for k, v in cols.items()}


def _stack(values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Columns per row or pair under each other; others as the first batch has them."""
    first = values[0]
    return {k: torch.cat([v[k] for v in values]) if dims(k)[0] in "BP" else first[k] for k in first}


def _merge(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    """Dicts of tensors joined by key; a key in two of them is an error."""
    if not parts:
        return None
    merged: dict[str, Tensor] = {}
    for part in parts:
        again = merged.keys() & part.keys()
        if again:
            raise BatchError(f"cannot concatenate: {sorted(again)} stand in two batches")
        merged.update(part)
    return merged


def _union(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    """Media of several batches; what two of them have must be the same."""
    if not parts:
        return None
    merged: dict[str, Tensor] = {}
    for part in parts:
        other = [name for name in merged.keys() & part.keys() if not torch.equal(merged[name], part[name])]
        if other:
            raise BatchError(f"cannot concatenate: media {sorted(other)} differ between two batches")
        merged.update(part)
    return merged
