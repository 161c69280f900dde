"""Unfinished episodes of the table's world: rows cut at their job's budget of tokens, and gone on with later."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from policy_opt.batch import Batch, dims
from policy_opt.errors import RecipeError
from policy_opt.protocols import Job


class Partial:
    """What has been sampled of each unfinished episode, by (group, member)."""

    def __init__(self) -> None:
        self.waiting: dict[tuple[int, int], tuple[int, dict[str, Tensor]]] = {}

    def resume(self, jobs: Sequence[Job], b: Batch) -> Batch:
        """Freshly sampled rows, with what a resumed episode holds already (token, log-prob, version) in its place.

        RecipeError where a job goes on with an episode that is not waiting.
        """
        rank_BT = b.mask_BT.cumsum(1)
        for i, job in enumerate(jobs):
            if not job.resume:
                continue
            if (job.group, job.member) not in self.waiting:
                raise RecipeError(f"no unfinished episode of group {job.group} has member {job.member}")
            done, held = self.waiting[job.group, job.member]
            old_T = rank_BT[i] <= done
            b = b.over(**{name: _with_row(b[name], i, torch.where(old_T, v, b[name][i])) for name, v in held.items()})
        return b

    def cut(self, jobs: Sequence[Job], b: Batch) -> Batch:
        """Rows beyond their budget lose the rest, and every number of their verdict, until they are finished."""
        done_B = torch.tensor([self.done(job) for job in jobs])
        limit_B = done_B + torch.tensor([b.T if job.budget is None else job.budget for job in jobs])
        rank_BT = b.mask_BT.cumsum(1)
        open_B = rank_BT[:, -1] > limit_B
        for i, job in enumerate(jobs):
            self.waiting.pop((job.group, job.member), None)
            if open_B[i]:
                held = {name: b[name][i].clone() for name in ("tokens_BT", "logp_sampler_BT", "version_BT")}
                self.waiting[job.group, job.member] = int(limit_B[i]), held
        if not open_B.any():
            return b
        gone_BT = open_B[:, None] & (rank_BT > limit_B[:, None])
        kept = {name: b[name].masked_fill(gone_BT, 0) for name in ("tokens_BT", "logp_sampler_BT", "version_BT")}
        verdict = {
            name: torch.where(open_B if value.ndim == 1 else open_B[:, None], 0, value)
            for name, value in b.cols.items()
            if dims(name)[0] == "B" and name != "hint_B"
        }
        none = {name: torch.where(open_B, -1, b[name]) for name in ("answer_B", "first_call_B")}
        level = {"level_B": b["level_B"], "length_B": b["length_B"] - gone_BT.sum(1)}
        whole = {"mask_BT": b.mask_BT & ~gone_BT, "real_BT": b.real_BT & ~gone_BT}
        return b.over(**{**verdict, **none, **level, **kept, **whole})

    def done(self, job: Job) -> int:
        """Tokens that the job's episode has sampled in earlier calls."""
        return self.waiting[job.group, job.member][0] if job.resume else 0


def _with_row(value_BT: Tensor, i: int, row_T: Tensor) -> Tensor:
    return value_BT.index_copy(0, torch.tensor([i]), row_T[None])
