"""Answers: found in the last tag; equal only if they say the truth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.answers import extract, key, number, same


@pytest.mark.parametrize("text, answer", [
    ("<answer>a</answer>", "a"), ("x <answer>a</answer> y <answer> b </answer> z", " b "), ("<answer></answer>", ""),
    ("a", None), ("<answer>a", None), ("a</answer>", None), ("</answer><answer>", None),
    ("<answer><answer>a</answer>", "a"), ("<answer>a</answer></answer>", "a</answer>"),
])  # fmt: skip
def test_extraction(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize("answer, truth", [
    ("Toruna", "Toruna"), (" toruna. ", "Toruna"), ('"Toruna"', "Toruna"), ("TORUNA", "Toruna"), ("1,240", "1240"),
    ("1240.0", "1240"), ("+12", "12"), ("-3.50", "-3.5"), ("14  May", "14 May"), ("007", "7"), ("Zoë", "Zoë"),
])  # fmt: skip
def test_the_truth_in_other_clothes(answer, truth):
    assert same(answer, truth)


@pytest.mark.parametrize("answer, truth", [
    ("Toruna Morika", "Toruna"), ("Toruna, Morika", "Toruna"), ("Toruna or Morika", "Toruna"), ("", "Toruna"),
    ("Тoruna", "Toruna"), ("Ｔoruna", "Toruna"), ("Toru\u200bna", "Toruna"), ("Toruna" + " " * 80, "Toruna"),
    ("12 13", "12"), ("12 or 13", "12"), ("12 euros", "12"), ("１２", "12"), ("1,2", "12"), ("12e0", "12"),
    ("0x0c", "12"), ("24/2", "12"), ("nan", "12"), ("1 2", "12"),
    ("12" + "0" * 70, "12"), ("twelve", "12"), ("\u212aelvin", "Kelvin"), ("12.0000001", "12"),
    ("correct: true", "true"), ("zoë", "Zoë"),
])  # fmt: skip
def test_what_is_not_the_truth(answer, truth):
    assert not same(answer, truth)


@given(st.text(max_size=70), st.sampled_from(["Toruna", "12", "14 May", "yes"]))
def test_comparison_never_raises_and_is_reflexive(answer, truth):
    same(answer, truth)
    assert same(truth, truth)


SHORT = st.lists(st.sampled_from("0123,.-+ aA\"'/"), max_size=6).map("".join)


@given(SHORT, st.sampled_from(["1.5", "-0", "a a", "1,000"]))
def test_keys_are_equal_where_answers_are(answer, truth):
    assert (key(answer) == key(truth)) == same(answer, truth)
    assert key(" ") is None and key("x" * 65) is None and key("007.50") == "7.5"


@given(st.integers(-(10**9), 10**9))
def test_numbers_with_and_without_commas(n):
    assert number(f"{n:,}") == number(str(n)) == n
