"""Documents → rows of token ids with a weight per token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from agents.bundled import mixture
from agents.bundled.chat import END
from agents.bundled.corpus.marks import strip
from agents.bundled.tokenizer import token_id


@dataclass(frozen=True)
class Rows:
    """A batch of packed rows."""

    ids_BT: Tensor
    """Token ids."""
    weight_BT: Tensor
    """Weight of predicting a token: 1 where the context determines it and for a share of the rest, else 0."""


def encode(tokenizer: PreTrainedTokenizerBase, marked: str) -> tuple[list[int], list[int]]:
    """(token ids, for each token the number of the mark in which it begins, from 1; 0 outside of marks)."""
    text, spans = strip(marked)
    inside = np.zeros(len(text) + 1, dtype=np.int32)
    for number, (start, end) in enumerate(spans, start=1):
        inside[start:end] = number
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    starts = np.fromiter((start for start, _ in encoding.offsets), dtype=np.int64, count=len(encoding.ids))
    return encoding.ids, inside[starts].tolist()


def rows(
    tokenizer: PreTrainedTokenizerBase,
    rng: np.random.Generator,
    progress: float,
    tokens: int,
    length: int,
    background: float,
) -> Rows:
    """`tokens // length` rows; documents follow each other with END between, and each row begins with one."""
    end = token_id(tokenizer, END)
    ids_BT = np.empty((tokens // length, length), dtype=np.int64)
    marks_BT = np.empty(ids_BT.shape, dtype=np.int64)
    for b in range(len(ids_BT)):
        ids: list[int] = []
        marks: list[int] = []
        while len(ids) < length:
            more, inside = encode(tokenizer, mixture.document(rng, progress))
            ids += [*more, end]
            marks += [*inside, 0]
        ids_BT[b], marks_BT[b] = ids[:length], marks[:length]
    weight_BT = (marks_BT > 0) | (rng.random(ids_BT.shape) < background)
    return Rows(torch.from_numpy(ids_BT), torch.from_numpy(weight_BT.astype(np.float32)))
