"""Samples many episodes at once from a transformers causal LM: the same module that the trainer updates.

Each open row keeps its keys and values between turns (`Slots`), so a turn costs only the tokens it adds. One
forward serves every row that has tokens pending: rows in the middle of a turn bring one, rows that begin a
turn bring the environment's text. Nothing is padded except inside attention.

What is sampled does not depend on scheduling: uniforms belong to (run seed, group, member, turn), and rows
are admitted and reported in the order of their keys.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from agents.critic import decoder_of
from agents.engines.base import Key, Sampled, SampleParams
from agents.engines.dense import DenseForward
from agents.engines.gallery import Gallery
from agents.engines.plan import Fed, Plan, build_plan
from agents.engines.recompute import recompute_turns
from agents.engines.reference import log_prob_gap
from agents.engines.rows import Decoding, Row
from agents.engines.sampling import banned_row, draw
from agents.engines.slots import ATTENTION, Slots, attention_of
from agents.ledger import common_prefix
from agents.pictures import Picture, PictureFormat
from policy_opt.protocols import Sampler
from policy_opt.sampling import RULES

_MIN_PREFIX = 16  # a shared prefix shorter than this is not worth a forward of its own
_FED_TOKENS = 4096  # environment tokens per forward; bounds the attention mask's size
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # of log-probs, in the check at start-up
_COARSE = 0.25  # the same for half precisions
_GATHER = 8  # rows in a turn per waiting row at which the waiting ones are fed
_SPARSE = 1.3  # slots per row in a turn above which rows are moved together


class HFEngine:
    """Engine over a transformers causal LM.

    Args:
        model: any causal LM; used as it stands, so that weight updates are seen at once (call `reset` after
            one).
        stop_ids: sampled ids that end a turn.
        banned_ids: ids that get probability 0; the trainer must remove the same ones.
        params: temperature, top-k, top-p and the longest turn.
        rows: slots for episodes; more may be opened, they wait.
        max_context: tokens per row at most; None takes the model's maximum.
        version: version of the weights, written into the token record.
        pictures: how the model reads images; None: it reads none.

    Attributes:
        reuse: whether keys and values are kept between turns. Verified on this very model when the engine is
            built; if its attention cannot work from slots, every turn is computed anew, with a warning.
        hooks: sampler rules that it serves: all.
    """

    hooks = frozenset(RULES)

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: Sequence[int],
        banned_ids: Sequence[int] = (),
        params: SampleParams | None = None,
        rows: int = 128,
        max_context: int | None = None,
        version: int = 0,
        pictures: PictureFormat | None = None,
    ) -> None:
        if not stop_ids:
            raise ValueError("an engine needs at least one stop id, or no turn could end")
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        self.model, self.rows, self.version = model, rows, version
        self.params = params or SampleParams()
        self.max_context = _context_of(model, max_context)
        self.stop_ids, self.banned_ids = tuple(stop_ids), tuple(banned_ids)
        head = model.get_output_embeddings().weight
        self.device, self.vocab_size = head.device, int(head.shape[0])
        self._banned_V = banned_row(banned_ids, self.vocab_size, self.device)
        with torch.inference_mode():
            self._slots = Slots(rows, self.max_context, self.device)
            self._decoding = Decoding(rows, stop_ids, self.vocab_size, self.device)
        self._dense: DenseForward | None = None
        self._gallery = Gallery(model, pictures) if pictures is not None else None
        self.reuse = True
        self.reset()
        self._verify()

    # ------------------------------------------------------------------ protocol

    def turn(
        self,
        key: Key,
        ids: Sequence[int],
        seed: Key,
        max_new_tokens: int,
        sampler: Sampler | None = None,
        pictures: Sequence[Picture] = (),
    ) -> None:
        """Feed ids to row `key` (a new key opens a row), then sample one turn from the stream named by
        `seed`; `sampler` in place of the engine's temperature, `pictures` for the placeholders among the ids.

        Raises:
            ValueError: the row is in the middle of a turn, or a new row is fed nothing, or its pictures do not fit
                its placeholders.
        """
        row = self._open.setdefault(key, Row(key))
        if row.busy:
            raise ValueError(f"row {key} has not finished its turn")
        if not row.ids and not len(ids):
            raise ValueError(f"row {key} is new and was fed no tokens")
        if self._gallery is None:
            row.ids.extend(ids)
        else:
            row.ids.extend(self._gallery.named(ids, pictures))
            row.pictures.extend(pictures)
            self._gallery.place(row)
        row.budget = min(max_new_tokens, self.max_context - len(row.ids))
        row.seed, row.sampler, row.busy = seed, sampler, True
        (self._waiting if row.budget > 0 else self._full)[key] = row

    def run(self) -> list[tuple[Key, Sampled]]:
        """Advance until at least one row finished its turn. Ordered by key.

        [] if no row has a turn to finish, or if those that have one wait for slots of rows that nobody
        closes.

        Raises:
            FloatingPointError: the model's logits are not finite.
        """
        done: list[tuple[Row, Sampled]] = []
        if self._full:
            done = [(row, Sampled((), (), "context")) for row in self._full.values()]
            self._full.clear()
        elif self._waiting or self._decoding.rows:
            with attention_of(decoder_of(self.model), ATTENTION if self.reuse else None), torch.inference_mode():
                while not done and (self._decoding.rows or self._feedable()):
                    done = self._step() if self.reuse else self._recompute()
        for row, _ in done:
            row.busy = False
        return sorted(((row.key, sampled) for row, sampled in done), key=lambda pair: pair[0])

    def close(self, key: Key) -> None:
        """Drop a row and its slot; unknown keys are ignored."""
        row = self._open.pop(key, None)
        if row is None:
            return
        self._waiting.pop(key, None)
        self._full.pop(key, None)
        if row.slot >= 0:
            self._by_slot[row.slot] = None
            with torch.inference_mode():
                self._decoding.drop([row])
                self._slots.clear(row.slot)

    def reset(self) -> None:
        """Drop all rows and everything computed with the weights of before."""
        self._open: dict[Key, Row] = {}
        self._waiting: dict[Key, Row] = {}
        self._full: dict[Key, Row] = {}
        self._by_slot: list[Row | None] = [None] * self.rows
        with torch.inference_mode():
            self._decoding.clear()
            self._slots.clear_all()
            if self._dense is not None:
                self._dense.refresh()
            if self._gallery is not None:
                self._gallery.reset()

    # ------------------------------------------------------------------ one forward

    def _step(self) -> list[tuple[Row, Sampled]]:
        """One forward over all pending tokens, one new token per row; the rows whose turn is over."""
        self._place()
        fed, copies = self._select()
        leaders = {f.row: i for i, f in enumerate(fed)}
        repeats = [leaders[leader] for leader, _ in copies]
        plan = self._plan(fed, repeats, len(self._slots.prefix_ids))
        logits_RV = self._forward(plan)
        self._decoding.fed()
        for item in fed:
            item.row.stored += len(item.ids)
        self._copy(copies)
        begun = [f.row for f in fed if f.last] + [follower for _, follower in copies]
        for row in begun:
            del self._waiting[row.key]
        self._decoding.begin(begun)
        if not self._decoding.rows and not begun:  # a long text that is fed in parts
            return []
        slot_R, u_R = self._decoding.current()
        id_R, logp_R = draw(logits_RV, u_R, self.params, self._banned_V, self._decoding.samplers())
        return [self._finish(*over) for over in self._decoding.record(slot_R, id_R, logp_R)]

    def _plan(self, fed: Sequence[Fed], repeats: Sequence[int], prefix: int) -> Plan:
        return build_plan(self._decoding, fed, repeats, prefix, axes=self._gallery is not None)

    def _forward(self, plan: Plan) -> Tensor:
        """Logits [R, V] at the plan's wanted tokens; keys and values are stored on the way."""
        self._slots.begin(plan)
        if self._gallery is not None:
            hidden_NH = self._gallery.forward(plan, past_key_values=self._slots, use_cache=True, slots=self._slots)
            return self.model.get_output_embeddings()(hidden_NH[plan.keep_R])
        if self._dense is not None and not torch.is_autocast_enabled(self.device.type):
            return self._dense(plan, self._slots)
        out = self.model(
            input_ids=plan.ids_N[None],
            position_ids=plan.pos_N[None],
            past_key_values=self._slots,
            use_cache=True,
            logits_to_keep=plan.keep_R,
            slots=self._slots,
        )
        return out.logits[0]

    def _finish(self, row: Row, ids: list[int], logps: list[float]) -> tuple[Row, Sampled]:
        if not math.isfinite(sum(logps)):
            raise FloatingPointError(f"row {row.key}: the model's logits are not finite (version {self.version})")
        row.ids.extend(ids)
        row.stored += len(ids) - 1  # the last one is fed with the next turn
        full = len(row.ids) >= self.max_context
        return row, Sampled(
            tuple(ids), tuple(logps), "stop" if ids[-1] in self.stop_ids else "context" if full else "length"
        )

    def _recompute(self) -> list[tuple[Row, Sampled]]:
        """Finish the turns of the first waiting rows of one length, from scratch."""
        waiting = sorted(self._waiting.values(), key=lambda row: row.key)
        rows = [row for row in waiting if len(row.ids) == len(waiting[0].ids)][: self.rows]
        for row in rows:
            del self._waiting[row.key]
        turns = recompute_turns(self.model, rows, self.stop_ids, self.params, self._banned_V)
        return [self._finish(*turn) for turn in turns]

    # ------------------------------------------------------------------ start-up

    def _verify(self) -> None:
        """Find the fastest forward that reproduces the model's log-probs over two short turns on four rows."""
        limit = _TOLERANCE.get(next(self.model.parameters()).dtype, _COARSE)
        ways = [lambda: DenseForward(self.model, self.max_context)] if DenseForward.suits(self.model) else []
        problem = ""
        for way in (*ways, lambda: None):
            try:
                self._dense = way()
                gap = log_prob_gap(self)
            except Exception as error:  # foreign architectures fail in their own ways
                problem = f"{type(error).__name__}: {error}"
            else:
                problem = "" if gap <= limit else f"log-probs differ by {gap:.2g}"
            self.reset()
            if not problem:
                return
        self._dense, self.reuse = None, False
        warnings.warn(
            f"{type(self.model).__name__} cannot keep keys and values per episode ({problem}); every turn is "
            f"computed anew from its first token, which costs time in proportion to the number of turns",
            stacklevel=3,
        )
        if self._gallery is not None:
            raise ValueError(f"{type(self.model).__name__} cannot be shown pictures this way ({problem})")

    # ------------------------------------------------------------------ who is fed

    def _place(self) -> None:
        """Give free slots to waiting rows in key order; move rows together where slots have thinned out."""
        homeless = sorted((row for row in self._waiting.values() if row.slot < 0), key=lambda row: row.key)
        if homeless:
            if not any(row is not None and row.stored for row in self._by_slot):
                self._share_prefix(homeless)
            free = [slot for slot, row in enumerate(self._by_slot) if row is None]
            for row, slot in zip(homeless, free, strict=False):
                self._by_slot[slot], row.slot = row, slot
                self._adopt_prefix(row)
        elif self._decoding.span > _SPARSE * len(self._decoding.rows) + 4:
            self._compact()

    def _feedable(self) -> bool:
        """Whether a waiting row has a slot or can get one. If none has, idle rows hold them all."""
        free = not self.reuse or None in self._by_slot
        return any(free or row.slot >= 0 for row in self._waiting.values())

    def _share_prefix(self, fresh: list[Row]) -> None:
        """Compute the prefix that all these rows have in common once, if it is worth it. No slot is in use."""
        first, last = min(row.ids for row in fresh), max(row.ids for row in fresh)
        shared = common_prefix(first, last)  # what the least and the greatest share, all share
        shared = min([shared, *(len(row.ids) - 1 for row in fresh)])  # each row must feed a token of its own
        prefix = tuple(first[:shared])
        if len(fresh) < 2 or len(prefix) < _MIN_PREFIX or prefix == self._slots.prefix_ids:
            return
        self._slots.clear_all()
        carrier = Row((), slot=0, place_3T=fresh[0].place_3T)
        for start in range(0, len(prefix), _FED_TOKENS):
            chunk = Fed(carrier, prefix[start : start + _FED_TOKENS], last=True)
            self._forward(self._plan([chunk], [], 0))
            carrier.stored += len(chunk.ids)
        self._slots.lift_prefix(0, prefix)

    def _adopt_prefix(self, row: Row) -> None:
        """Let a fresh row read the shared prefix where its tokens begin with it."""
        prefix = self._slots.prefix_ids
        shares = bool(prefix) and len(row.ids) > len(prefix) and tuple(row.ids[: len(prefix)]) == prefix
        row.base = row.stored = len(prefix) if shares else 0
        self._slots.shares_S[row.slot] = 0.0 if shares else float("-inf")

    def _select(self) -> tuple[list[Fed], list[tuple[Row, Row]]]:
        """What to feed now, in key order, and (leader, follower) pairs of fresh rows that are fed the same."""
        fed: list[Fed] = []
        copies: list[tuple[Row, Row]] = []
        if len(self._waiting) * _GATHER < len(self._decoding.rows):
            return fed, copies
        seen: dict[tuple[int, ...], Row] = {}
        room = _FED_TOKENS
        for row in sorted(self._waiting.values(), key=lambda row: row.key):
            if row.slot < 0 or room == 0:
                continue
            pending = row.ids[row.stored :]
            fresh = tuple(pending) if row.stored == row.base else None
            if fresh in seen and seen[fresh].base == row.base:
                copies.append((seen[fresh], row))
                continue
            fed.append(Fed(row, pending[:room], last=len(pending) <= room))
            room -= len(fed[-1].ids)
            if fresh is not None and fed[-1].last:
                seen[fresh] = row
        return fed, copies

    def _copy(self, copies: list[tuple[Row, Row]]) -> None:
        """Followers take over what was computed for their leaders."""
        if not copies:
            return
        places = [(leader.slot, follower.slot) for leader, follower in copies]
        source, target = torch.tensor(places, device=self.device).T
        self._slots.copy(source, target, max(leader.stored - leader.base for leader, _ in copies))
        for leader, follower in copies:
            follower.stored = leader.stored

    def _compact(self) -> None:
        """Move the rows in the highest slots to the lowest free ones, so that attention spans fewer slots."""
        used = [row for row in self._by_slot if row is not None]
        free = [slot for slot in range(len(used)) if self._by_slot[slot] is None]
        movers = [row for row in used if row.slot >= len(used)]
        if not movers:
            return
        source, target = torch.tensor([(r.slot, s) for r, s in zip(movers, free, strict=True)], device=self.device).T
        self._slots.copy(source, target, min(self._slots.length, max(row.stored + row.budget for row in movers)))
        for row, slot in zip(movers, free, strict=True):
            self._slots.clear(row.slot)
            self._by_slot[row.slot], self._by_slot[slot] = None, row
            row.slot = slot
        self._decoding.move(source, target)


def _context_of(model: Any, asked: int | None) -> int:
    """Tokens per row: what was asked for, at most what the model's positions allow."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is not None and asked < 2:
        raise ValueError(f"max_context must be at least 2, got {asked}")
    if limit is None:
        return asked or 4096
    if asked is not None and asked > limit:
        raise ValueError(f"max_context {asked} exceeds the model's {limit} positions")
    return asked or int(limit)
