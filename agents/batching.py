"""Trajectories as the tensors that policy optimization works on: one row per segment of a token record."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.ledger import Ledger, Segment
from agents.pictures import Picture
from agents.trajectory import Trajectory
from policy_opt.batch import Batch

OWN = (
    "reward_B", "correct_B", "length_B", "turns_B", "truncated_B", "failed_B", "finished_B", "temperature_B",
    "answer_B", "first_call_B", "level_B",
)  # fmt: skip
"""Columns of one number per row that every batch has; a fact of one of these names is left out."""


def batch_of(
    trajectories: Sequence[Trajectory],
    *,
    scores: Sequence[str] | None = None,
    facts: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    sees: bool = False,
) -> Batch:
    """One row per segment, padded on the right, in the order of the trajectories and of their segments.

    Columns, the same for all segments of a trajectory:
        reward_B: the verdict's; the rollout's error reward where the environment failed.
        correct_B: the verdict's score `correct`, 0 if there is none.
        scores_BK, with names: all scores; 0 where a verdict lacks one.
        <fact>_B: one for every numeric or boolean fact of the verdicts; 0 where a verdict lacks it.
        length_B: sampled tokens of the trajectory. turns_B: its policy turns.
        truncated_B: 1 where it was cut for want of tokens. failed_B: 1 where it ended without a verdict.
        finished_B: 0 where its token budget cut it off, to be gone on with; reward, scores and facts are then 0.
        answer_B: a number of the verdict's fact `answer_key`, equal where the keys are equal, in any batch,
            process or run; -1 where there is no answer.
        first_call_B: sampled tokens of the trajectory before its first tool call; -1 where there is no call.
        level_B: difficulty level of the task. temperature_B: that its tokens are scored at.
        picture_BT, of models that read pictures: the key of the picture that a placeholder stands for, else 0; media
            has its patches under the key, its grid under `<key>.grid`.
    Units: parent_B is the row that a segment continues, -1 for first segments; segment_BT counts within the
    trajectory. Per-token entries are 0 (False) on padding, sampler log-probs also where mask_BT is False.

    Args:
        trajectories: with token records.
        scores: names of scores_BK in order; None takes all that occur, sorted. Name them to get the same
            columns in every batch of a run, whatever its verdicts happen to hold.
        facts: names of the facts that become columns; None takes all that occur.
        dtype: of log-probs and verdict numbers.
        sees: whether the model reads pictures.

    Raises:
        ValueError: no trajectory, or one without a token record.
    """
    ledgers = _ledgers(trajectories)
    rows = [(i, j, s) for i, ledger in enumerate(ledgers) for j, s in enumerate(ledger.segments)]
    first = np.cumsum([0, *(len(ledger.segments) for ledger in ledgers)])
    owner_B = torch.tensor([i for i, _, _ in rows])
    units = {
        "group_B": torch.tensor([t.group for t in trajectories])[owner_B],
        "task_B": torch.tensor([t.task_index for t in trajectories])[owner_B],
        "member_B": torch.tensor([t.member for t in trajectories])[owner_B],
        "seat_B": torch.tensor([t.seat for t in trajectories])[owner_B],
        "parent_B": torch.tensor([-1 if s.parent is None else int(first[i]) + s.parent for i, _, s in rows]),
    }
    columns, names = _verdict_columns(trajectories, scores, facts, dtype)
    tokens = _token_columns([s for _, _, s in rows], dtype)
    number_B1 = torch.tensor([j for _, j, _ in rows])[:, None]
    pictures = [p for ledger in ledgers for p in ledger.pictures.values()]
    return Batch.build(
        **tokens,
        **(picture_columns([s for _, _, s in rows], pictures, tokens["tokens_BT"].shape[1]) if sees else {}),
        **units,
        segment_BT=torch.where(tokens["real_BT"], number_B1, 0),
        **{name: value[owner_B] for name, value in columns.items()},
        names=names,
    )


def _ledgers(trajectories: Sequence[Trajectory]) -> list[Ledger]:
    if not trajectories:
        raise ValueError("no trajectories to make a batch of")
    ledgers = []
    for t in trajectories:
        if t.ledger is None:
            raise ValueError(
                f"the trajectory of task {t.task_id or t.task_index} has no token record; only episodes that "
                f"a token engine played can be trained on"
            )
        ledgers.append(t.ledger)
    return ledgers


def _token_columns(segments: Sequence[Segment], dtype: torch.dtype) -> dict[str, Tensor]:
    """The core columns and turn_BT."""
    length_B = np.array([len(s) for s in segments])
    width = max(1, int(length_B.max()))
    real_BT = np.arange(width) < length_B[:, None]

    def spread(values: Iterable[Sequence[Any]], kind: Any) -> Tensor:
        out_BT = np.zeros(real_BT.shape, dtype=kind)
        out_BT[real_BT] = np.fromiter((x for row in values for x in row), dtype=kind, count=int(length_B.sum()))
        return torch.from_numpy(out_BT)

    mask_BT = spread((s.mask for s in segments), np.bool_)
    return {
        "tokens_BT": spread((s.ids for s in segments), np.int64),
        "real_BT": torch.from_numpy(real_BT),
        "mask_BT": mask_BT,
        "logp_sampler_BT": spread((s.logp for s in segments), np.float64).to(dtype),
        "version_BT": torch.where(mask_BT, spread((s.version for s in segments), np.int64), 0),
        "turn_BT": spread((s.turn for s in segments), np.int64),
    }


def picture_columns(segments: Sequence[Segment], pictures: Sequence[Picture], width: int) -> dict[str, Any]:
    """picture_BT, and the pictures as the batch's media: each once, whatever the number of rows that show it."""
    media = {str(p.key): p.patches_PD for p in pictures}
    media |= {f"{p.key}.grid": torch.tensor(p.grid) for p in pictures}
    picture_BT = torch.zeros(len(segments), width, dtype=torch.long)
    for row, segment in enumerate(segments):
        for span in segment.spans:
            if span.kind == "image":
                if str(span.ref) not in media:
                    raise ValueError(f"a token record speaks of picture {span.ref}, which did not come with it")
                picture_BT[row, span.start : span.start + span.length] = span.ref
    return {"picture_BT": picture_BT, "media": media or None}


def answer_number(key: Any) -> int:
    """A number that stands for an answer, the same wherever the answer comes up; -1 for none.

    48 bits of a hash, so that two answers of a batch of thousands meet by chance once in ten million batches, and
    float64 holds the number exactly.
    """
    if not isinstance(key, str):
        return -1
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=6).digest(), "little")


def _verdict_columns(
    trajectories: Sequence[Trajectory],
    scores: Sequence[str] | None,
    facts: Sequence[str] | None,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Columns of one number per trajectory, scores [trajectories, K], and the names of the scores."""
    score_maps = [t.verdict.scores if t.verdict is not None else {} for t in trajectories]
    fact_maps = [numbers_of(t.verdict.facts) if t.verdict is not None else {} for t in trajectories]
    score_names = tuple(scores) if scores is not None else tuple(sorted(set().union(*score_maps)))
    fact_names = tuple(facts) if facts is not None else tuple(sorted(set().union(*fact_maps)))
    numbers: dict[str, list[float]] = {
        "reward_B": [t.reward for t in trajectories],
        "correct_B": [float(s.get("correct", 0.0)) for s in score_maps],
        "length_B": [t.length for t in trajectories],
        "turns_B": [len(t.turns) for t in trajectories],
        "truncated_B": [float(t.cut) for t in trajectories],
        "failed_B": [float(t.verdict is None and not t.unfinished) for t in trajectories],
        "finished_B": [float(not t.unfinished) for t in trajectories],
        "temperature_B": [t.sampler.temperature or 1.0 for t in trajectories],
    }
    keys = [t.verdict.facts.get("answer_key") if t.verdict is not None else None for t in trajectories]
    whole = {
        "answer_B": [answer_number(key) for key in keys],
        "first_call_B": [-1 if t.first_call is None else t.first_call for t in trajectories],
        "level_B": [t.level for t in trajectories],
    }
    for name in fact_names:
        if f"{name}_B" not in OWN and f"{name}_B" not in (
            "group_B",
            "task_B",
            "member_B",
            "seat_B",
            "parent_B",
        ):
            numbers[f"{name}_B"] = [f.get(name, 0.0) for f in fact_maps]
    columns = {name: torch.tensor(values, dtype=dtype) for name, values in numbers.items()}
    columns |= {name: torch.tensor(values) for name, values in whole.items()}
    table = [[float(s.get(name, 0.0)) for name in score_names] for s in score_maps]
    columns["scores_BK"] = torch.tensor(table, dtype=dtype).reshape(len(trajectories), len(score_names))
    return columns, {"scores_BK": score_names}


def numbers_of(facts: Mapping[str, Any]) -> dict[str, float]:
    """Those facts that are numbers; True counts as 1."""
    return {name: float(value) for name, value in facts.items() if isinstance(value, Real)}
