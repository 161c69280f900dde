"""EMPO: Entropy Minimized Policy Optimization. Zhang et al. 2025, arXiv 2504.05812.

Without labels: an answer earns what share of its group agrees with it, so that the policy's semantic entropy falls.

    p_k = members with answer k / n;   H = -sum_k p_k ln p_k;     rows without an answer are clusters of one
    R_i = p_{k(i)};  0 without an answer;  0 for a whole group in which all answers differ        "math" (TRL)
    A_i = (R_i - mean_g R) / (std_g R + eps), and GRPO's loss

    rule=entropy      p_{k(i)} for everyone (the authors' verl recipe)
    rule=thresholded  as entropy, all 0 when max_k p_k < 0.25
    rule=vote         1 for members of the largest clusters, else 0
    rule=free_form    -0.5 without an answer; 0 for a copy of the question, or when max_k p_k < 0.2 and there are
                      several clusters; else p_{k(i)}

The paper has a lower and an upper threshold on H, the code the upper one only, ln n: entropy_low and entropy_high.
`--set variant=verl` is the authors' other recipe: rule=entropy with GSPO's sequence ratio.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from policy_opt.advantages import GroupNorm
from policy_opt.baselines import answers
from policy_opt.batch import Batch
from policy_opt.mapping import by_id, numbered
from policy_opt.part import Ctx, Part
from policy_opt.recipe import Recipe
from policy_opt.recipes.grpo import recipe as GRPO
from policy_opt.vectors import Vectors


@dataclass(frozen=True)
class AnswerClusters(Part):
    """Rows of a group by final answer: number of the cluster (in order of opening), its share p, and H in nats."""

    stage: ClassVar[str] = "signals"

    facts = frozenset({"answer_B"})
    reads = frozenset({"group_B", "member_B"})
    writes = frozenset({"cluster_B", "cluster_prob_B", "cluster_entropy_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        answer_B, (index_B, count) = b["answer_B"].long(), b.index()
        cluster_B, group_C, p_C = answers(b, torch.where(answer_B < 0, -1 - b.roots(), answer_B))
        entropy_Q = p_C.new_zeros(count).index_add_(0, group_C, torch.special.entr(p_C))
        return b.put(
            cluster_B=self.numbers(b, cluster_B, group_C)[cluster_B],
            cluster_prob_B=p_C[cluster_B],
            cluster_entropy_B=entropy_Q[index_B],
        )

    def numbers(self, b: Batch, cluster_B: Tensor, group_C: Tensor) -> Tensor:
        """Number of each cluster inside its group, in the order of the members that open them: [C]."""
        place_B = torch.empty_like(cluster_B)
        order_B = b.order("group_B", "member_B", "seat_B", "segment_BT")
        place_B[order_B] = torch.arange(b.B, device=place_B.device)
        first_C = torch.full_like(group_C, b.B).scatter_reduce_(0, cluster_B, place_B, "amin")
        rank_C = first_C.argsort().argsort()
        size_Q = torch.bincount(group_C)
        return rank_C - (size_Q.cumsum(0) - size_Q)[group_C]


LARGEST = {"thresholded": 0.25, "free_form": 0.2}
"""A group whose largest cluster has a smaller share earns nothing."""


@dataclass(frozen=True)
class Agreement(Part):
    """The reward of a trajectory: the share of its group that gave its answer."""

    stage: ClassVar[str] = "reward"
    rule: Literal["math", "entropy", "thresholded", "vote", "free_form"] = "math"
    entropy_low: float | None = None
    """math: a group with H at or below this in nats earns nothing; None: off."""
    entropy_high: float | None = None
    """math: a group with H at or above this earns nothing; None: ln n, that is, all answers differ."""

    def check(self) -> None:
        if self.rule != "math" and (self.entropy_low, self.entropy_high) != (None, None):
            raise ValueError(f"entropy_low and entropy_high belong to rule=math, not {self.rule}")

    @property
    def facts(self) -> frozenset[str]:
        return frozenset({"answer_B"} | ({"copies_question_B"} if self.rule == "free_form" else set()))

    reads = frozenset({"cluster_B", "cluster_prob_B", "cluster_entropy_B", "group_B"})
    overwrites = frozenset({"reward_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        p_B, blank_B = b["cluster_prob_B"], b["answer_B"] < 0
        clusters_B = self.most(b, b["cluster_B"]) + 1
        largest_B = self.most(b, p_B)
        ctx.log("semantic_entropy", float(b["cluster_entropy_B"][b.once()].mean()))
        if self.rule == "math":
            reward_B = torch.where(blank_B | self.unreliable(b, clusters_B), 0, p_B)
        elif self.rule == "vote":
            reward_B = (p_B == largest_B).to(p_B.dtype)
        else:
            small_B = largest_B < LARGEST.get(self.rule, 0.0)
            reward_B = torch.where(small_B & (clusters_B > 1), 0, p_B)
        if self.rule == "free_form":
            reward_B = torch.where(blank_B, -0.5, torch.where(b["copies_question_B"] > 0, 0, reward_B))
        return b.over(reward_B=reward_B)

    def unreliable(self, b: Batch, clusters_B: Tensor) -> Tensor:
        """Rows of groups whose entropy is out of bounds: [B]."""
        entropy_B = b["cluster_entropy_B"]
        if self.entropy_high is None:
            index_B, count = b.index()
            out_B = clusters_B == torch.bincount(index_B[b.once()], minlength=count)[index_B]
        else:
            out_B = entropy_B >= self.entropy_high
        return out_B if self.entropy_low is None else out_B | (entropy_B <= self.entropy_low)

    def most(self, b: Batch, value_B: Tensor) -> Tensor:
        """The largest value in each row's group: [B]."""
        index_B, count = b.index()
        return value_B.new_zeros(count).scatter_reduce_(0, index_B, value_B, "amax")[index_B]


def by_rule(rule: Any) -> Any:
    """The reward that another rule gives on the same clusters."""
    return lambda t: Agreement(rule)(t.after(AnswerClusters), t.ctx)["reward_B"]


def arrange(inputs: Any) -> dict[str, Any]:
    """Canonical answers as numbers, -1 for a blank one."""
    pairs = zip(inputs["answers"], numbered(inputs["canonical"]), strict=True)
    return {**inputs, "answers": [number if answer else -1 for answer, number in pairs]}


recipe: Recipe = GRPO.replace(
    slug="empo",
    title="GRPO without labels: an answer earns the share of its group that agrees with it",
    cite="Zhang et al. 2025, arXiv 2504.05812",
    evidence="clusters, rewards of both implementations and settings read in official code (QingyangZhang/EMPO)",
    deviations="an answer joins one cluster (TRL's loop may move it); blank answers never agree",
    signals=(AnswerClusters(),),
    reward=(Agreement(),),
    advantage=(GroupNorm(eps=1e-4, ddof=1, single="zero"),),
    variants={"verl": ("reward.rule=entropy", "terms.policy.loss=sequence_clip(3e-4, 4e-4)")},
    learns="none: it sharpens its own majority, right or wrong",
    vectors=Vectors(
        params={"adv_eps": "advantage.eps"},
        columns={"answers": ("answer_B",)},
        arrange=arrange,
        outputs={
            "semantic_ids": lambda t: t["cluster_B"],
            "cluster_prob": lambda t: t["cluster_prob_B"],
            "entropy": lambda t: by_id(t, t["cluster_entropy_B"]),
            "reward_trl_math": lambda t: t["reward_B"],
            "reward_verl_entropy": by_rule("entropy"),
            "reward_verl_thresholded": by_rule("thresholded"),
            "reward_majority_vote": by_rule("vote"),
            "advantages_trl_math": lambda t: t["adv_B"],
        },
        stages=("signals", "reward", "advantage"),
    ),
)
