"""A softmax table as policy, model and world: the actor and learner protocols in their smallest form.

Tasks are rows of a table; an episode is `turns` turns of `actions` sampled tokens, with one observed token
(mask 0) between turns. The last turn is the answer, right where every token of it is the task's own; token 0
in an earlier turn is a tool call, which helps nobody. A recipe that learns anything learns this within a
second, and the tests drive the same loop with it that trains language models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy_opt.bank import ModelSpec, Optim
from policy_opt.batch import Batch
from policy_opt.errors import RecipeError
from policy_opt.need import (
    Entropy,
    Hidden,
    KLTo,
    LogProb,
    MaskedImage,
    Mismatched,
    Need,
    OtherPrompt,
    Probe,
    Same,
    TopKIds,
    TopKLogProb,
    Value,
    View,
)
from policy_opt.part import Ctx
from policy_opt.partial import Partial
from policy_opt.protocols import Ask, Job, JudgeFailure, Pull, Sampler
from policy_opt.sampling import RULES, temperatures
from policy_opt.vocabulary import evaluate

_SAME = Same()


@dataclass(frozen=True)
class World:
    """What the table's episodes look like."""

    tasks: int = 8
    """Size of the pool."""
    vocab: int = 4
    """Token ids 0..vocab-1."""
    turns: int = 2
    """The last one is the answer."""
    actions: int = 2
    """Sampled tokens per turn."""
    seed: int = 0
    """Seed of all sampling."""

    @property
    def width(self) -> int:
        """Positions of an episode: sampled tokens, and one observation between turns."""
        return self.turns * self.actions + self.turns - 1

    def mask_T(self) -> Tensor:
        """True on sampled tokens."""
        return torch.arange(self.width) % (self.actions + 1) < self.actions

    def turn_T(self) -> Tensor:
        """Turn of each position; an observation belongs to the turn before it."""
        return torch.arange(self.width) // (self.actions + 1)

    def truth_BT(self, task_B: Tensor) -> Tensor:
        """Right tokens: a function of task and position, never token 0."""
        return 1 + (task_B[:, None] + torch.arange(self.width)) % (self.vocab - 1)


class TableLearner:
    """Policy and bank as tables: logits [tasks + 1, positions, vocab], values [tasks + 1, positions].

    The last row is what a masked image shows.
    """

    def __init__(
        self,
        world: World,
        lr: float = 0.3,
        optimizer: Optim | None = None,
        micro_rows: int | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.world, self.lr, self.micro_rows, self.dtype = world, lr, micro_rows, dtype
        self.optim = optimizer or Optim("adam", betas=(0.9, 0.99))
        self.version = 0
        shape = (world.tasks + 1, world.width)
        self.tables = {"policy": torch.zeros(*shape, world.vocab, dtype=dtype, requires_grad=True)}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.forwards = 0

    def prepare(
        self, models: Mapping[str, ModelSpec], needs: Sequence[Need], optimizer: Optim | None
    ) -> None:
        """Build tables for the bank; a probe view has no meaning here and is refused."""
        for need in needs:
            if isinstance(need.view, Probe):
                raise RecipeError(f"need `{need.name}`: a softmax table has no text to append a probe to")
        named = [("policy", self.tables["policy"])]
        self.optimizers.setdefault(
            "policy", (optimizer or self.optim).build(named, self.lr, self.world.seed)
        )
        for name, spec in models.items():
            if name in self.tables:
                continue
            policy = self.tables["policy"].detach()
            table = policy[..., 0].clone().zero_() if spec.role == "critic" else policy.clone()
            self.tables[name] = table.requires_grad_(spec.optimizer is not None)
            if spec.optimizer is not None:
                self.optimizers[name] = spec.optimizer.build([(name, table)], self.lr, self.world.seed)

    def score(self, b: Batch, needs: Sequence[Need]) -> dict[str, Tensor]:
        """Whole batch, no gradient."""
        self.forwards += 1
        with torch.no_grad():
            return {need.name: self.quantity(need, b) for need in needs}

    def backward(self, b: Batch, needs: Sequence[Need], pull: Pull) -> dict[str, Tensor]:
        """Micro-batches of `micro_rows` rows; gradients add up in the tables."""
        streams: dict[str, list[Tensor]] = {need.name: [] for need in needs}
        for rows_R in torch.arange(b.B).split(self.micro_rows or b.B):
            some = b.rows(rows_R)
            live = {need.name: self.quantity(need, some) for need in needs}
            cotangents = pull(rows_R, {name: value.detach() for name, value in live.items()})
            total = sum(
                ((live[name] * c).sum() for name, c in cotangents.items()), torch.zeros((), dtype=self.dtype)
            )
            if isinstance(total, Tensor) and total.requires_grad:
                total.backward()
            for name, value in live.items():
                streams[name].append(value.detach())
        return {name: torch.cat(values) for name, values in streams.items()}

    def step(self, lr_scale: float = 1.0) -> dict[str, float]:
        """Every optimizer once."""
        norms = [t.grad.norm() for t in self.tables.values() if t.grad is not None]
        for optimizer in self.optimizers.values():
            rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] *= lr_scale
            optimizer.step()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            optimizer.zero_grad()
        self.version += 1
        return {"grad_norm": float(torch.stack(norms).norm()) if norms else 0.0}

    def sync(self, name: str, decay: float = 0.0) -> None:
        """Bank model towards the policy."""
        with torch.no_grad():
            self.tables[name].lerp_(self.tables["policy"], 1 - decay)

    # -- forwards --------------------------------------------------------------------------------------------

    def quantity(self, need: Need, b: Batch) -> Tensor:
        """A need for the rows of b, 0 outside the mask."""
        tokens_BT = b.tokens_BT
        mask_BT = {"actions": b.mask_BT, "prompt": b.opening_BT, "all": b.real_BT}[need.where]
        if isinstance(need.view, Mismatched):
            other_B = b.mismatched(need.view.shift)
            tokens_BT, mask_BT = tokens_BT[other_B], mask_BT[other_B]
        if isinstance(need.what, Value):
            found = self.look(need.model, b, need.view)
        else:
            logp_BTV = self.look(need.model, b, need.view).log_softmax(-1)
            found = self.functional(need, logp_BTV, tokens_BT, b)
        mask = mask_BT if found.ndim == 2 else mask_BT[..., None]
        return torch.where(mask, found, found.new_zeros(()))

    def functional(self, need: Need, logp_BTV: Tensor, tokens_BT: Tensor, b: Batch) -> Tensor:
        """Reduce the vocabulary axis as the need says."""
        what = need.what
        if isinstance(what, LogProb | Entropy | TopKLogProb | TopKIds):
            return evaluate(what, logp_BTV, tokens_BT)
        if isinstance(what, KLTo):
            other_BTV = self.look(what.model, b, need.view).log_softmax(-1)
            return (logp_BTV.exp() * (logp_BTV - other_BTV)).sum(-1)
        assert isinstance(what, Hidden)
        return logp_BTV

    def look(self, model: str, b: Batch, view: View = _SAME) -> Tensor:
        """Entries of a model's table for every position of b: [B, T] or [B, T, vocab]."""
        at_T = torch.arange(b.T).clamp(max=self.world.width - 1)
        row_B = b["task_B"]
        if isinstance(view, MaskedImage):
            row_B = torch.full_like(row_B, self.world.tasks)
        if isinstance(view, OtherPrompt):
            row_B = (row_B + 1) % self.world.tasks
        found = self.tables[model][row_B][:, at_T]
        if "hint_B" in b and found.ndim == 3:
            truth_BT = self.world.truth_BT(b["task_B"])[:, at_T]
            right_BTV = torch.nn.functional.one_hot(truth_BT, self.world.vocab)
            found = found + b["hint_B"][:, None, None] * right_BTV
        return found


class TableActor:
    """Plays episodes with the learner's table."""

    columns = frozenset({"answer_B", "level_B", "tool_calls_B", "hint_B", "finished_B", "first_call_B", "proximity_B"})
    """Facts it delivers besides the standard columns."""
    hooks = frozenset(RULES)
    """Sampler rules that it serves."""

    def __init__(self, world: World, learner: TableLearner, answers: Mapping[str, str] | None = None) -> None:
        self.world, self.learner, self.answers = world, learner, answers or {}
        self.seeds = Ctx(seed=world.seed)
        self.played: dict[tuple[int, int], Tensor] = {}
        self.partial = Partial()
        self.sent: Batch | None = None

    def send(self, jobs: Sequence[Job]) -> None:
        """A table's episodes cost nothing, so they are played at once, with the weights as they are now."""
        self.sent = self.play(jobs)

    def collect(self) -> Batch:
        """The batch that was sent."""
        assert self.sent is not None
        found, self.sent = self.sent, None
        return found

    def play(self, jobs: Sequence[Job]) -> Batch:
        """All jobs at once; each draws from a generator of its own."""
        world, learner = self.world, self.learner
        count = len(jobs)
        mask_BT = world.mask_T().expand(count, -1)
        task_B = torch.tensor([job.task_index for job in jobs])
        blank = Batch.build(
            mask_BT=mask_BT,
            group_B=torch.tensor([job.group for job in jobs]),
            task_B=task_B,
            member_B=torch.tensor([job.member for job in jobs]),
            turn_BT=world.turn_T().expand(count, -1),
            real_BT=torch.ones_like(mask_BT),
            hint_B=torch.tensor([float(job.hint or 0.0) for job in jobs], dtype=learner.dtype),
        )
        with torch.no_grad():
            logits_BTV = learner.look("policy", blank)
            warm_B = torch.tensor([job.sampler.temperature if job.sampler else 1.0 for job in jobs])
            logp_BTV = (logits_BTV / warm_B[:, None, None]).log_softmax(-1)
            p_BTV = (logits_BTV / self.warmth(jobs, logits_BTV)[..., None]).softmax(-1)
        draw_BT = torch.stack([torch.rand(world.width, generator=self.stream(job)) for job in jobs])
        tokens_BT = (p_BTV.cumsum(-1) < draw_BT[..., None]).sum(-1).clamp(max=world.vocab - 1)
        tokens_BT = self.given(jobs, tokens_BT, world.truth_BT(task_B))
        logp_BT = logp_BTV.gather(-1, tokens_BT[..., None]).squeeze(-1) * mask_BT
        version_BT = torch.full_like(tokens_BT, learner.version)
        b = blank.over(tokens_BT=tokens_BT, logp_sampler_BT=logp_BT, version_BT=version_BT)
        b = self.partial.resume(jobs, b)
        for job, tokens_T in zip(jobs, b.tokens_BT, strict=True):
            self.played[job.group, job.member] = tokens_T
        return self.partial.cut(jobs, self.graded(b))

    def warmth(self, jobs: Sequence[Job], logits_BTV: Tensor) -> Tensor:
        """Temperature that each token is drawn at; jobs of one sampler at once: [B, T]."""
        found_BT = torch.empty_like(logits_BTV[..., 0])
        for sampler in {id(job.sampler): job.sampler for job in jobs}.values():
            here_B = torch.tensor([job.sampler is sampler for job in jobs])
            found_BT[here_B] = temperatures(sampler or Sampler(), logits_BTV[here_B])
        return found_BT

    def stream(self, job: Job) -> torch.Generator:
        """One generator per episode; an edited one is another episode."""
        return self.seeds.generator("episode", job.group, job.member, int(job.edit is not None))

    def given(self, jobs: Sequence[Job], tokens_BT: Tensor, truth_BT: Tensor) -> Tensor:
        """Tokens that are not sampled: demonstrations, re-scored episodes, what stands before an edit."""
        for i, job in enumerate(jobs):
            if job.demo:
                tokens_BT[i] = truth_BT[i]
            if job.rescore:
                tokens_BT[i] = self.played[job.group, job.member]
            if job.edit is not None:
                before_T = self.world.turn_T() < job.edit.turn
                tokens_BT[i] = torch.where(before_T, self.played[job.edit.parent], tokens_BT[i])
        return tokens_BT

    def graded(self, b: Batch) -> Batch:
        """The verdict's columns."""
        last_BT = b.mask_BT & (b["turn_BT"] == self.world.turns - 1)
        right_BT = b.tokens_BT == self.world.truth_BT(b["task_B"])
        correct_B = (right_BT | ~last_BT).all(1).to(self.learner.dtype)
        call_BT = b.mask_BT & ~last_BT & (b.tokens_BT == 0)
        before_B = (b.mask_BT & (call_BT.cumsum(1) == 0)).sum(1)
        near_B = (right_BT & last_BT).sum(1) / last_BT.sum(1)
        digit_T = self.world.vocab ** (torch.arange(b.T) % (self.world.actions + 1))
        return b.over(
            reward_B=correct_B,
            correct_B=correct_B,
            scores_BK=torch.stack([correct_B, near_B], 1),
            proximity_B=near_B,
            length_B=b.mask_BT.sum(1),
            truncated_B=torch.zeros_like(correct_B),
            finished_B=torch.ones_like(correct_B),
            tool_calls_B=call_BT.sum(1),
            first_call_B=torch.where(call_BT.any(1), before_B, -1),
            level_B=b["task_B"] % 2,
            answer_B=(b.tokens_BT * last_BT * digit_T).sum(1),
        )

    def judge(self, asks: Sequence[Ask]) -> list[str | JudgeFailure]:
        """Answers from a fixed list."""
        return [self.answers.get(ask.text, JudgeFailure("unparsed")) for ask in asks]

    def privileged(self, task_index: int, kind: str, level: int) -> str | None:
        """A hint is the number that is added to the right tokens' logits."""
        return str(float(level)) if kind == "hint" else None


def episodes(world: World, learner: TableLearner, per_task: int = 8) -> Iterator[Batch]:
    """Fresh episodes of every task, for measuring a policy; group ids are negative, unlike training's."""
    actor = TableActor(world, learner)
    for task in range(world.tasks):
        yield actor.play([Job(task, -1 - task, member) for member in range(per_task)])
