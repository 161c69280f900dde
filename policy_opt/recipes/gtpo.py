"""GTPO: group-relative trajectory-based policy optimization. Simoni et al. 2025, arXiv 2508.03772.

Tokens that open or close right and wrong answers alike (a format, say) are pushed up and down at once; the
wrong answers let go of them, the right ones push harder. Uncertain answers are left out.

    A_i   = R_i - mean_g R;   pos: A > 0,  neg: A < 0
    forward set of i: the longest run, from its first token on, of tokens whose id stands at the same position
            (counted from the start) in at least one pos and one neg answer of the group; backward set: the same
            from the last token on, positions counted from each answer's own end
    lambda_{i,t} = f_fwd f_bwd,  f = 1 outside the set, W (pos) or 0 (neg) inside;  1 where A_i = 0
    delta_i = 1 if <H>_ini > ln 2 or <H>_i <= ln 2, else 0;   A~_i = delta_i (A_i - gamma <H>_i)
    L     = -(1/N) sum_i (1/|o_i|) sum_t A~_i lambda_{i,t} r_{i,t},   r = exp(logp - sg[logp]) = 1

<H>_i is the mean token entropy (-sum p log max(p, 1e-6)) of the answer, <H>_ini that of the initial policy: by
default the mean over the first batch. Positions count the policy's tokens only. One optimizer step per rollout;
for more take `--set terms.loss=clip()`.

The authors' code departs from their equation. It divides each answer by its number of conflict tokens, counted
as the union of the k-th from the start and the k-th from the end (the longer of the two runs), and sums over
answers: `variant=scaled_as_published`. It always filters, at 0.7: `--set credit.always=True --set
credit.threshold=0.7`, with which a policy that is uncertain everywhere learns nothing. Its entropy is of the
same pass as the loss; ours is too, as the weights have not moved.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from policy_opt.advantages import GroupCentre
from policy_opt.aggregate import SequenceMean
from policy_opt.batch import Batch, side_by_side
from policy_opt.credits import weigh
from policy_opt.need import Entropy, LogProb, Need
from policy_opt.part import Ctx, Part
from policy_opt.recipe import Recipe
from policy_opt.surrogates import OnPolicy
from policy_opt.terms import Term
from policy_opt.vectors import OUTPUTS, Form, Trace, Vectors
from policy_opt.vocabulary import evaluate

FLOORED = Entropy(floor=1e-6)
ENTROPY_FLOORED = Need("entropy_floored_BT", FLOORED)


def shared_run(
    tokens_BT: Tensor, place_BT: Tensor, mask_BT: Tensor, sign_B: Tensor, units: tuple[Tensor, int]
) -> Tensor:
    """Length of each row's run of shared tokens from place 0 on; 0 where sign is 0: [B]."""
    rows_QG, there_QG = side_by_side(*units, sign_B != 0)
    if not there_QG.any():
        return torch.zeros_like(sign_B)
    # Tokens by place, ids doubled so that the last bit can hold the sign; -2 where there is none.
    T = tokens_BT.shape[1]
    key_BT = 2 * tokens_BT + (sign_B > 0)[:, None]
    placed_BT = torch.full((len(sign_B), T + 1), -2, device=tokens_BT.device)
    placed_BT.scatter_(1, place_BT.masked_fill(~mask_BT, T), key_BT)
    # Most runs are short: look at a few places first.
    width = min(T, 16)
    while True:
        run_QG = opening_run(torch.where(there_QG[..., None], placed_BT[:, :width][rows_QG], -2))
        if width == T or not (run_QG == width).any():
            return torch.zeros_like(sign_B).index_copy_(0, rows_QG[there_QG], run_QG[there_QG])
        width = min(T, 4 * width)


def opening_run(key_QGT: Tensor) -> Tensor:
    """How many keys from place 0 on have, at the same place of the group, the key that differs in the last bit."""
    key_QTG = key_QGT.transpose(1, 2).contiguous()
    ranked_QTG, other_QTG = key_QTG.sort(dim=-1).values, key_QTG ^ 1
    at_QTG = torch.searchsorted(ranked_QTG, other_QTG).clamp(max=key_QTG.shape[-1] - 1)
    shared_QTG = (ranked_QTG.gather(-1, at_QTG) == other_QTG) & (key_QTG >= 0)
    return shared_QTG.long().cumprod(1).sum(1)


@dataclass(frozen=True)
class Conflicts(Part):
    """w <- w lambda: what right and wrong answers of a group begin or end with in common.

    forward_BT and backward_BT are the sets. Every row stands for itself, also a further segment.
    """

    stage: ClassVar[str] = "credit"
    weight: float = 2.0
    """W: weight of a conflict token in a right answer; twice in conflict: W^2."""
    divide: bool = False
    """As in the authors' code: w also divided by max(1, the row's count of conflict tokens)."""

    reads = frozenset({"adv_B", "group_B", "tokens_BT"})
    writes = frozenset({"forward_BT", "backward_BT", "lambda_BT", "conflicts_B"})
    overwrites = frozenset({"w_BT"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        sign_B = b["adv_B"].sign().long()
        start_BT = b.mask_BT.cumsum(1) - 1
        end_BT = b.mask_BT.sum(1, keepdim=True) - 1 - start_BT
        forward_B, backward_B = (
            shared_run(b.tokens_BT, place_BT, b.mask_BT, sign_B, b.index()) for place_BT in (start_BT, end_BT)
        )
        forward_BT = b.mask_BT & (start_BT < forward_B[:, None])
        backward_BT = b.mask_BT & (end_BT < backward_B[:, None])
        excess_B1 = torch.where(sign_B > 0, self.weight - 1, -1.0).to(b["adv_B"].dtype)[:, None]
        lambda_BT = (1 + forward_BT * excess_B1) * (1 + backward_BT * excess_B1)
        conflicts_B = torch.maximum(forward_B, backward_B)
        weight_BT = lambda_BT / conflicts_B.clamp(min=1)[:, None] if self.divide else lambda_BT
        found = weigh(b, weight_BT)
        return found.put(forward_BT=forward_BT, backward_BT=backward_BT, lambda_BT=lambda_BT, conflicts_B=conflicts_B)


@dataclass(frozen=True)
class EntropyFilter(Part):
    """A <- delta (A - coef <H>): certain rows stay, and pay for their mean token entropy; the others get 0."""

    stage: ClassVar[str] = "credit"
    threshold: float = math.log(2)
    """In nats."""
    entropy_coef: float = 0.1
    """gamma: price of a nat."""
    initial: float | None = None
    """<H>_ini: above the threshold all rows stay. None: mean token entropy of the first batch."""
    always: bool = False
    """Filter whatever <H>_ini, as in the authors' code."""

    needs = (ENTROPY_FLOORED,)
    reads = frozenset({"adv_B"})
    writes = frozenset({"entropy_mean_B", "certain_B"})
    overwrites = frozenset({"adv_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        entropy_BT = b[ENTROPY_FLOORED.name] * b.mask_BT
        mean_B = entropy_BT.sum(1) / b.mask_BT.sum(1).clamp(min=1)
        first = float(entropy_BT.sum() / b.mask_BT.sum().clamp(min=1))
        initial = ctx.state(self).setdefault("initial", first) if self.initial is None else self.initial
        certain_B = mean_B <= self.threshold
        if initial > self.threshold and not self.always:
            certain_B = torch.ones_like(certain_B)
        ctx.log("uncertain_rows", float((~certain_B).double().mean()))
        adv_B = torch.where(certain_B, b["adv_B"] - self.entropy_coef * mean_B, 0)
        return b.over(adv_B=adv_B).put(entropy_mean_B=mean_B, certain_B=certain_B)


SCALED = ("credit.divide=True", "terms.agg=sequence_mean(across='sum')")


def distribution(t: Trace) -> None:
    """Log-probs and entropies from the file's logits, as the learner would give them."""
    logp_BTV = torch.tensor(t.inputs["logits_new"], dtype=torch.float64).log_softmax(-1)
    tokens_BT = torch.tensor(t.inputs["token_ids"]).clamp(0, logp_BTV.shape[-1] - 1)
    mask_BT = torch.tensor(t.inputs["mask"])
    t.streams["logp_BT"] = evaluate(LogProb(), logp_BTV, tokens_BT)
    entropy_BT = evaluate(FLOORED, logp_BTV, tokens_BT) * mask_BT
    t.inputs = {**t.inputs, "entropy_floored": entropy_BT.tolist()}


recipe = Recipe(
    slug="gtpo",
    title="openings and endings shared by right and wrong answers are protected, uncertain answers left out",
    level="token",
    cite="Simoni et al. 2025, arXiv 2508.03772",
    evidence="objective and filter: authors' equation in their README; conflict sets, entropy, shaped advantage and "
    "constants: read in code (winstonsmith1897/GTPO)",
    deviations="the equation, not the code (see above); <H>_ini is measured on the first batch",
    advantage=(GroupCentre(),),
    credit=(Conflicts(weight=2.0), EntropyFilter()),
    terms=(Term(OnPolicy(), agg=SequenceMean(across="all")),),
    variants={"scaled_as_published": SCALED, "clipped": ("terms.loss=clip()",)},
    vectors=Vectors(
        params={
            "conflict_weight": "credit.weight",
            "entropy_threshold": "credit.threshold",
            "entropy_coef": "credit.entropy_coef",
            "initial_entropy": "credit.initial",
            "pad_id": (),
        },
        prime=distribution,
        columns={"token_ids": ("tokens_BT",), "entropy_floored": ("entropy_floored_BT",)},
        outputs={
            "logp_new": lambda t: t.streams["logp_BT"],
            "entropy_tok": lambda t: t["entropy_floored_BT"],
            "entropy_mean": lambda t: t["entropy_mean_B"],
            "advantages_raw": lambda t: t.after(GroupCentre)["adv_B"],
            "lambda_": lambda t: t.per_token("lambda"),
            "conflict_forward": lambda t: t["forward_BT"],
            "conflict_backward": lambda t: t["backward_BT"],
            "paper": Form(
                (),
                {
                    "completion_weight_delta": lambda t: t["certain_B"],
                    "advantages_shaped": lambda t: t["adv_B"],
                    "loss": OUTPUTS["loss"],
                    "grad_logp_new": OUTPUTS["grad_logp_new"],
                },
            ),
            "as_published_code": Form(
                (*SCALED, "credit.always=True"),
                {
                    "advantages_shaped": lambda t: t["adv_B"],
                    "n_conflict": lambda t: t["conflicts_B"],
                    "loss_sum_over_completions": OUTPUTS["loss"],
                    "grad_logp_new": OUTPUTS["grad_logp_new"],
                },
            ),
        },
    ),
)
