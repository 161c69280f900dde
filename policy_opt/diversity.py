"""Diversity of what a policy says to one task: distinct n-grams, self-BLEU, edit distance (VAS, arXiv 2509.21268).

Everything is computed on the policy's own tokens, for all groups at once. `Said` holds N responses of Q groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from policy_opt.batch import Batch, side_by_side

SMOOTHING = 0.1
"""Stands for a number of matches that is 0, so that BLEU has a logarithm."""


class Said(NamedTuple):
    """Responses as token sequences, filled up on the right."""

    tokens_NL: Tensor
    """Token ids numbered 0..V-1."""
    length_N: Tensor
    group_N: Tensor
    """Group number 0..Q-1."""
    groups: int
    """Q."""

    @classmethod
    def of(cls, b: Batch, unit: str = "group_B") -> Said:
        """The trajectories' policy tokens; segments of one trajectory follow each other."""
        index_B, count = b.index(unit)
        root_B = b.roots()
        ids = torch.unique(b.tokens_BT[b.mask_BT], return_inverse=True)[1]
        row_M, place_M = b.mask_BT.nonzero().unbind(1)
        for key_BT in (b["segment_BT"], root_B[:, None].expand(b.B, b.T)):
            order_M = key_BT[row_M, place_M].argsort(stable=True)
            row_M, place_M, ids = row_M[order_M], place_M[order_M], ids[order_M]
        first_N = (root_B == torch.arange(b.B, device=root_B.device)).nonzero().squeeze(1)
        number_B = torch.zeros_like(root_B).index_copy_(
            0, first_N, torch.arange(first_N.numel(), device=root_B.device)
        )
        item_M = number_B[root_B[row_M]]
        length_N = torch.bincount(item_M, minlength=first_N.numel())
        start_N = length_N.cumsum(0) - length_N
        width = int(length_N.max()) if length_N.numel() else 0
        tokens_NL = ids.new_zeros(first_N.numel(), width)
        tokens_NL[item_M, torch.arange(item_M.numel(), device=item_M.device) - start_N[item_M]] = ids
        return cls(tokens_NL, length_N, index_B[first_N], count)

    def sizes(self) -> Tensor:
        """Responses of each group: [Q]."""
        return torch.bincount(self.group_N, minlength=self.groups)

    def grams(self, n: int) -> tuple[Tensor, Tensor]:
        """(item_M, gram_M): every n-gram of every response, numbered so that equal ones have one number."""
        width = self.tokens_NL.shape[1] - n + 1
        if width <= 0:
            none = self.length_N.new_zeros(0)
            return none, none
        place_L = torch.arange(width, device=self.length_N.device)
        item_M, place_M = (place_L + n <= self.length_N[:, None]).nonzero().unbind(1)
        gram_M = torch.zeros_like(item_M)
        vocabulary = int(self.tokens_NL.max()) + 1
        for shift in range(n):
            # Both factors are below 2^31, so the pair has a number of its own.
            pair_M = gram_M * vocabulary + self.tokens_NL[item_M, place_M + shift]
            gram_M = torch.unique(pair_M, return_inverse=True)[1]
        return item_M, gram_M


def distinct(said: Said, n: int) -> Tensor:
    """Different n-grams / all n-grams of each group, 0 where there are none: [Q], float64."""
    item_M, gram_M = said.grams(n)
    group_M = said.group_N[item_M]
    total_Q = torch.bincount(group_M, minlength=said.groups)
    kinds = int(gram_M.max()) + 1 if gram_M.numel() else 1
    different_Q = torch.bincount(torch.unique(group_M * kinds + gram_M) // kinds, minlength=said.groups)
    return different_Q.double() / total_Q.clamp(min=1)


def self_bleu(said: Said, orders: tuple[int, ...] = (1, 2, 3)) -> Tensor:
    """Mean over a group's responses of BLEU against the others, equal weights; 0 for a group of one: [Q], float64."""
    log_N = torch.stack([precision(said, n).log() for n in orders]).mean(0)
    score_N = log_N.exp() * brevity(said)
    sums_Q = score_N.new_zeros(said.groups).index_add_(0, said.group_N, score_N)
    size_Q = said.sizes()
    return torch.where(size_Q > 1, sums_Q / size_Q.clamp(min=1), 0)


def precision(said: Said, n: int) -> Tensor:
    """n-grams of a response that another one of the group has too, at most as often as there, / its n-grams: [N]."""
    item_M, gram_M = said.grams(n)
    kinds = int(gram_M.max()) + 1 if gram_M.numel() else 1
    own_U, count_U = torch.unique(item_M * kinds + gram_M, return_counts=True)
    item_U = own_U // kinds
    shared_U = torch.unique(said.group_N[item_U] * kinds + own_U % kinds, return_inverse=True)[1]
    most_S = count_U.new_zeros(own_U.numel()).scatter_reduce_(0, shared_U, count_U, "amax")
    leads_U = count_U == most_S[shared_U]
    leaders_S = torch.zeros_like(most_S).index_add_(0, shared_U, leads_U.long())
    rest_U = torch.where(leads_U, 0, count_U)
    second_S = torch.zeros_like(most_S).scatter_reduce_(0, shared_U, rest_U, "amax")
    alone_U = leads_U & (leaders_S[shared_U] == 1)
    others_U = torch.where(alone_U, second_S[shared_U], most_S[shared_U])
    match_N = torch.zeros_like(said.length_N).index_add_(0, item_U, torch.minimum(count_U, others_U))
    match_N = torch.where(match_N > 0, match_N.double(), SMOOTHING)
    return match_N / torch.bincount(item_M, minlength=said.length_N.numel()).clamp(min=1)


def brevity(said: Said) -> Tensor:
    """exp(1 - r / c) for a response of c tokens shorter than the closest other length r, else 1: [N].

    Of two lengths as close, the shorter one is r.
    """
    items_QG, there_QG = side_by_side(said.group_N, said.groups, torch.ones_like(said.group_N, dtype=torch.bool))
    length_QG = said.length_N[items_QG]
    gap_QGG = length_QG[:, None, :] - length_QG[:, :, None]
    itself_GG = torch.eye(items_QG.shape[1], dtype=torch.bool, device=items_QG.device)
    far = 4 * (int(said.length_N.max()) + 1)
    rank_QGG = torch.where(there_QG[:, None, :] & ~itself_GG, 2 * gap_QGG.abs() + (gap_QGG > 0), far)
    nearest_QG = rank_QGG.argmin(2)
    r_QG = length_QG.gather(1, nearest_QG).double()
    c_QG = length_QG.double()
    factor_QG = torch.where(c_QG < r_QG, (1 - r_QG / c_QG).exp(), 1.0)
    return factor_QG.new_ones(said.group_N.numel()).index_copy_(0, items_QG[there_QG], factor_QG[there_QG])


def edit_distance(said: Said, relative: bool = False) -> Tensor:
    """Mean Levenshtein distance over a group's pairs, 0 for a group of one: [Q], float64.

    relative: each divided by the longer length, so that it lies in [0, 1].
    """
    items_QG, there_QG = side_by_side(said.group_N, said.groups, torch.ones_like(said.group_N, dtype=torch.bool))
    first_P, second_P = torch.triu_indices(items_QG.shape[1], items_QG.shape[1], 1, device=items_QG.device)
    group_R, pair_R = (there_QG[:, first_P] & there_QG[:, second_P]).nonzero().unbind(1)
    a_R, b_R = items_QG[group_R, first_P[pair_R]], items_QG[group_R, second_P[pair_R]]
    distance_R = levenshtein(said, a_R, b_R).double()
    if relative:
        distance_R = distance_R / torch.maximum(said.length_N[a_R], said.length_N[b_R]).clamp(min=1)
    pairs_Q = torch.bincount(group_R, minlength=said.groups).clamp(min=1)
    return distance_R.new_zeros(said.groups).index_add_(0, group_R, distance_R) / pairs_Q


def levenshtein(said: Said, a_R: Tensor, b_R: Tensor) -> Tensor:
    """Edits from response a to response b, for R pairs at once, one anti-diagonal of the table after the other: [R]."""
    width = said.tokens_NL.shape[1]
    a_RL, b_RL = said.tokens_NL[a_R].int(), said.tokens_NL[b_R].int().flip(1)
    length_R = said.length_N[a_R]
    end_R = length_R + said.length_N[b_R]
    # Entry i of diagonal k is the distance of the first i tokens of a from the first k - i of b.
    far = 2 * width + 2
    before_RI = a_RL.new_full((a_R.numel(), width + 1), far)
    now_RI = before_RI.clone()
    now_RI[:, 0] = 0
    found_R = a_RL.new_zeros(a_R.numel())
    for k in range(1, 2 * width + 1):
        low, high = max(k - width, 1), min(k - 1, width)
        next_RI = torch.full_like(now_RI, far)
        differs_RI = a_RL[:, low - 1 : high] != b_RL[:, width - k + low : width - k + high + 1]
        one_RI = torch.minimum(now_RI[:, low - 1 : high], now_RI[:, low : high + 1]) + 1
        next_RI[:, low : high + 1] = torch.minimum(one_RI, before_RI[:, low - 1 : high] + differs_RI)
        if k <= width:
            next_RI[:, 0] = next_RI[:, k] = k
        before_RI, now_RI = now_RI, next_RI
        found_R = torch.where(end_R == k, now_RI.gather(1, length_R[:, None]).squeeze(1), found_R)
    return found_R.long()
