"""Search: BM25 over little documents."""

from __future__ import annotations

import copy
import pickle

from hypothesis import given
from hypothesis import strategies as st

from tools.search import Search

DOCUMENTS = ("Zanvel: mentor Morika, age 31", "Morika: birthplace Toruna, age 44", "Toruna: leader Zanvel, area 31")


def test_documents_with_more_and_rarer_words_come_first():
    search = Search(DOCUMENTS, top_k=3)
    assert search("birthplace Toruna")[0] == DOCUMENTS[1]
    assert search("leader") == [DOCUMENTS[2]]
    assert search("age 31")[0] == DOCUMENTS[0]


def test_top_k_no_hit_and_nothing_to_search():
    assert len(Search(DOCUMENTS, 1)("age")) == 1
    assert Search(DOCUMENTS)("nothing of this") == []
    assert Search(())("age") == [] and Search(DOCUMENTS)("") == [] and Search(DOCUMENTS)("?!") == []


def test_documents_without_words_are_never_found():
    assert Search(("...", "!!!"))("x") == []
    assert Search(("...", "a b"))("a") == ["a b"]


@given(st.text(max_size=100))
def test_any_query_gives_documents(query):
    search = Search(DOCUMENTS, 2)
    found = search(query)
    assert len(found) <= 2 and set(found) <= set(DOCUMENTS)
    for twin in (copy.deepcopy(search), pickle.loads(pickle.dumps(search))):
        assert twin(query) == found
