"""Full-text search over a handful of little documents by BM25 (rank_bm25)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_WORD = re.compile(r"[a-z0-9]+")
_MAX_QUERY = 400


class Search:
    """A BM25 index over `documents`, built at the first query.

    Args:
        documents: one text each.
        top_k: how many are returned at most, best first; ties in the order given.
    """

    def __init__(self, documents: Sequence[str], top_k: int = 2) -> None:
        self.documents, self.top_k = tuple(documents), top_k
        self._index: Any = None

    def __call__(self, query: str) -> list[str]:
        """The best documents that share a word with the query."""
        words = words_of(query[:_MAX_QUERY])
        if not words or not self.documents:
            return []
        if self._index is None:
            from rank_bm25 import BM25Plus  # its scores are positive for every shared word, however common

            self._index = BM25Plus([words_of(d) or [""] for d in self.documents])
        scores = self._index.get_scores(words)
        asked = set(words)  # BM25+ scores every document; one that shares no word is no hit
        hits = [i for i, d in enumerate(self.documents) if not asked.isdisjoint(words_of(d))]
        hits.sort(key=lambda i: -scores[i])
        return [self.documents[i] for i in hits[: self.top_k]]


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return _WORD.findall(text.lower())
