"""Bundles: units above the question. B questions form a bundle, a paper is one response to each of them, and the sum
of its rewards is what is judged; the judgement is then shared out to the responses.

A bundle's papers are as many as its question with the fewest responses has; responses beyond that are left over:
they are in no paper and have advantage 0. Ren et al. 2025, arXiv 2510.00911.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from policy_opt.advantages import groups
from policy_opt.baselines import spread, starts
from policy_opt.batch import Batch, floating
from policy_opt.part import Ctx, Part


@dataclass(frozen=True)
class Bundle(Part):
    """bundle_B: every `size` groups, in the order of their ids, are a bundle; the last one may be smaller."""

    stage: ClassVar[str] = "signals"
    size: int = 5
    """B, questions per bundle. 1: every question is its own bundle."""

    def check(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, not {self.size}")

    reads = frozenset({"group_B"})
    writes = frozenset({"bundle_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        return b.put(bundle_B=b.index()[0] // self.size)


@dataclass(frozen=True)
class PaperScore(Part):
    """paper_B: which paper a response is in (-1: left over), and paper_score_B: the sum of that paper's rewards."""

    stage: ClassVar[str] = "reward"
    permute: bool = True
    """Deal each question's responses in an order of their own; False: the k-th responses of all questions are a
    paper, which is the same in law where responses are independent."""

    reads = frozenset({"reward_B", "group_B", "member_B", "bundle_B"})
    writes = frozenset({"paper_B", "paper_score_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        row_N, group_N = starts(b, "member_B")
        bundle_B, bundles = b.index("bundle_B")
        size_Q = torch.bincount(group_N, minlength=b.index()[1])
        place_N = torch.arange(row_N.numel(), device=row_N.device) - (size_Q.cumsum(0) - size_Q)[group_N]
        if self.permute:
            ids = b["group_B"][row_N[place_N == 0]].tolist()
            places = zip(size_Q.tolist(), ids, strict=True)
            place_N = torch.cat([torch.randperm(n, generator=ctx.generator("paper", i)) for n, i in places])
            place_N = place_N.to(row_N.device)
        # A bundle has as many papers as its smallest question has responses.
        count_D = size_Q.new_full((bundles,), b.B).scatter_reduce(0, bundle_B[row_N], size_Q[group_N], "amin")
        dealt_N = place_N < count_D[bundle_B[row_N]]
        paper_N = torch.where(dealt_N, (count_D.cumsum(0) - count_D)[bundle_B[row_N]] + place_N, -1)
        reward_N = torch.where(dealt_N, floating(b["reward_B"])[row_N], 0)
        score_P = reward_N.new_zeros(int(count_D.sum()) + 1).index_add_(0, paper_N + 1, reward_N)
        paper_B = torch.full_like(bundle_B, -1).index_copy_(0, row_N, paper_N)[b.roots()]
        return b.put(paper_B=paper_B, paper_score_B=score_P[paper_B + 1])


class Papers(NamedTuple):
    """The papers of a batch and their bundles."""

    score_P: Tensor
    bundle_P: Tensor
    """Number of the paper's bundle, as in b.index("bundle_B")."""
    questions_D: Tensor
    """Questions of each bundle."""


def papers(b: Batch) -> Papers:
    """Papers from the columns that PaperScore writes."""
    bundle_B, bundles = b.index("bundle_B")
    group_B, groups_ = b.index()
    paper_B, count = b["paper_B"], int(b["paper_B"].max()) + 1
    row_R = (paper_B >= 0).nonzero().squeeze(1)
    score_P = b["paper_score_B"].new_zeros(count).index_copy_(0, paper_B[row_R], b["paper_score_B"][row_R])
    bundle_P = bundle_B.new_zeros(count).index_copy_(0, paper_B[row_R], bundle_B[row_R])
    bundle_Q = bundle_B.new_zeros(groups_).index_copy_(0, group_B, bundle_B)
    return Papers(score_P, bundle_P, torch.bincount(bundle_Q, minlength=bundles))


def quantile(value_P: Tensor, unit_P: Tensor, units: int, level: float) -> Tensor:
    """The level's quantile of each unit's values, interpolated linearly; 0 for a unit without any: [units]."""
    order_P = value_P.argsort(stable=True)
    order_P = order_P[unit_P[order_P].argsort(stable=True)]
    size_D = torch.bincount(unit_P, minlength=units)
    start_D = size_D.cumsum(0) - size_D
    place_D = level * (size_D - 1).clamp(min=0).to(value_P.dtype)
    low_D = place_D.floor().long()
    high_D = torch.minimum(low_D + 1, (size_D - 1).clamp(min=0))
    sorted_P = torch.cat([value_P[order_P], value_P.new_zeros(1)])
    below_D, above_D = sorted_P[start_D + low_D], sorted_P[start_D + high_D]
    return torch.where(size_D > 0, below_D + (place_D - low_D) * (above_D - below_D), 0)


@dataclass(frozen=True)
class TailRisk(Part):
    """The advantage of a paper: the gradient's weight in a risk measure of its score S, with quantiles a < b.

        g(S)     = (S - a)^+ - (S - b)^+ + a - b
        paper:     A = -(1 + omega) (a - S)^+ + g(S)
        release:   A = (w_mix C + g(S) / (beta - alpha + eps)) / (w_mix + 1),   C = -(a - S)^+ / (alpha + eps)
        seeking:   the same with C = (S - b)^+ / (1 - beta + eps), a control

    `paper` is (1 + omega) times the integral of the quantile function up to level alpha, plus that from alpha to beta:
    low scores count most, scores above b not at all. a and b are tracked over iterations, per size of bundle:

        q_s <- q_s + rate (s - share of the batch's papers with S < q_s),   at first: the batch's quantile
    """

    stage: ClassVar[str] = "advantage"
    alpha: float = 0.2
    """Level of the lower quantile a."""
    beta: float = 0.8
    """Level of the upper quantile b."""
    form: Literal["paper", "release", "seeking"] = "paper"
    omega: float = 0.5
    """Extra weight of the lower tail, in the form `paper`."""
    w_mix: float = 1.5
    """Weight of the tail, in the other forms."""
    natural: bool = True
    """Keep `a - b` in g: no advantage is then positive."""
    normalise: bool = False
    """Divide by the standard deviation of the scores of the bundle's papers."""
    floor: float = 1e-3
    """A standard deviation up to this is taken as 1; 0: only that of a single paper is, as in the released code."""
    quantiles: Literal["tracked", "batch"] = "tracked"
    """batch: each bundle's own papers, linearly interpolated."""
    rate: float = 0.1
    """Step of the tracker."""
    levels: tuple[float, ...] = ()
    """Levels that are tracked, the ones nearest to alpha and beta are used (release: 0.05 .. 0.95); empty: alpha and
    beta themselves."""
    eps: float = 1e-6

    def check(self) -> None:
        if not 0 <= self.alpha < self.beta <= 1 or not all(0 <= s <= 1 for s in self.levels):
            raise ValueError(
                f"0 <= alpha < beta <= 1 and levels in [0, 1], not {self.alpha}, {self.beta}, {self.levels}"
            )
        if self.rate < 0 or self.floor < 0 or self.eps <= 0:
            raise ValueError(f"rate >= 0, floor >= 0, eps > 0, not {self.rate}, {self.floor}, {self.eps}")

    reads = frozenset({"paper_B", "paper_score_B", "bundle_B", "group_B"})
    writes = frozenset({"adv_B", "quantile_low_B", "quantile_high_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        p = papers(b)
        low_D, high_D = (self.edge(p, level, ctx) for level in (self.alpha, self.beta))
        adv_P = self.weigh(p.score_P, low_D[p.bundle_P], high_D[p.bundle_P])
        if self.normalise:
            adv_P = adv_P / (self.spread(p) + self.eps)[p.bundle_P]
        adv_B = torch.cat([adv_P.new_zeros(1), adv_P])[b["paper_B"] + 1]
        bundle_B = b.index("bundle_B")[0]
        return b.put(adv_B=adv_B, quantile_low_B=low_D[bundle_B], quantile_high_B=high_D[bundle_B])

    def weigh(self, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """A of scores, given their quantiles."""
        middle = (s - a).clamp(min=0) - (s - b).clamp(min=0) + (a - b if self.natural else 0)
        below = -(a - s).clamp(min=0)
        if self.form == "paper":
            return (1 + self.omega) * below + middle
        above = (s - b).clamp(min=0)
        tail = below / (self.alpha + self.eps) if self.form == "release" else above / (1 - self.beta + self.eps)
        return (self.w_mix * tail + middle / (self.beta - self.alpha + self.eps)) / (self.w_mix + 1)

    def spread(self, p: Papers) -> Tensor:
        """Sample standard deviation of each bundle's scores, 1 where there is too little of it: [D]."""
        size_D = torch.bincount(p.bundle_P, minlength=p.questions_D.numel()).to(p.score_P.dtype)
        zero_D = torch.zeros_like(size_D)
        mean_D = zero_D.index_add(0, p.bundle_P, p.score_P) / size_D.clamp(min=1)
        square_D = zero_D.index_add(0, p.bundle_P, (p.score_P - mean_D[p.bundle_P]).square())
        std_D = (square_D / (size_D - 1).clamp(min=1)).sqrt()
        return torch.where((size_D < 2) | (std_D <= self.floor) & (self.floor > 0), 1, std_D)

    # -- quantiles ----------------------------------------------------------------------------------------

    def edge(self, p: Papers, level: float, ctx: Ctx) -> Tensor:
        """The quantile that is used for each bundle: [D]."""
        if self.quantiles == "batch":
            return quantile(p.score_P, p.bundle_P, p.questions_D.numel(), level)
        state = ctx.state(self)
        found_D = torch.zeros_like(p.questions_D, dtype=p.score_P.dtype)
        for size in p.questions_D.unique().tolist():
            table_L2 = state.get(str(size), self.first(p, size))
            nearest = int((table_L2[:, 0] - level).abs().argmin())
            found_D[p.questions_D == size] = table_L2[nearest, 1].to(found_D)
        return found_D

    def first(self, p: Papers, size: int) -> Tensor:
        """(level, quantile) of the batch's papers of bundles of one size: [L, 2]."""
        score_P = self.scores(p, size)
        levels = self.levels or (self.alpha, self.beta)
        one_P = torch.zeros(score_P.numel(), dtype=torch.long, device=score_P.device)
        q_L = torch.cat([quantile(score_P, one_P, 1, level) for level in levels])
        return torch.stack([q_L.new_tensor(levels), q_L], 1)

    def scores(self, p: Papers, size: int) -> Tensor:
        """Scores of the papers of bundles of one size."""
        return p.score_P[p.questions_D[p.bundle_P] == size].double()

    def observe(self, b: Batch, ctx: Ctx) -> None:
        """Move the tracked quantiles, after they were used."""
        p, state = papers(b), ctx.state(self)
        for size in p.questions_D.unique().tolist() if self.quantiles == "tracked" else ():
            score_P = self.scores(p, size)
            if str(size) not in state:
                state[str(size)] = self.first(p, size)
            elif score_P.numel():
                level_L, q_L = state[str(size)].unbind(1)
                below_L = (score_P[None] < q_L[:, None]).double().mean(1)
                state[str(size)] = torch.stack([level_L, q_L + self.rate * (level_L - below_L)], 1)


@dataclass(frozen=True)
class ShareOut(Part):
    """A paper's advantage shared out to its responses, by what each of them earned.

    uniform:   A
    std:       A / (std of the question's rewards + eps); a std up to 1e-3 is taken as 1
    sum_mean:  A d_i / sum d, d = R_i - mean of the question's rewards; equal parts where |sum d| <= eps
    score:     A / 2 where R_i > 0, else 3 A / 2
    """

    stage: ClassVar[str] = "advantage"
    rule: Literal["uniform", "std", "sum_mean", "score"] = "std"
    eps: float = 1e-6

    reads = frozenset({"adv_B", "paper_B", "reward_B", "group_B"})
    overwrites = frozenset({"adv_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        g, adv_B = groups(b), b["adv_B"]
        if self.rule == "uniform":
            return b
        if self.rule == "score":
            return b.over(adv_B=adv_B * torch.where(g.reward_B > 0, 0.5, 1.5))
        if self.rule == "std":
            std_Q = spread(g)
            return b.over(adv_B=adv_B / (torch.where(std_Q <= 1e-3, 1, std_Q) + self.eps)[g.index_B])
        paper_B = b["paper_B"] + 1
        member_B = b.once().to(adv_B.dtype)
        zero_P = adv_B.new_zeros(int(paper_B.max()) + 1)
        sum_B = zero_P.index_add(0, paper_B, g.centred_B * member_B)[paper_B]
        count_B = zero_P.index_add(0, paper_B, member_B)[paper_B]
        by_gap_B = g.centred_B / sum_B.where(sum_B != 0, 1)
        return b.over(adv_B=adv_B * torch.where(sum_B.abs() > self.eps, by_gap_B, 1 / count_B.clamp(min=1)))
