"""Batch: shapes by suffix, writing once, rows, padding, pairs, state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_opt import Batch, BatchError, Store, concat
from policy_opt.batch import dims
from policy_opt.state import decode, encode


def some(rows: int = 3, width: int = 4, first_group: int = 0, **columns) -> Batch:
    mask = torch.arange(width).expand(rows, -1) < torch.arange(1, rows + 1)[:, None]
    return Batch.build(
        mask_BT=mask,
        group_B=first_group + torch.arange(rows) // 2,
        tokens_BT=torch.arange(rows * width).view(rows, width),
        reward_B=torch.arange(rows) / 2,
        scores_BK=torch.ones(rows, 2),
        names={"scores_BK": ("correct", "format")},
        **columns,
    )


@pytest.mark.parametrize(
    ("column", "shape"),
    [("a_B", (2,)), ("a_BT", (3, 3)), ("a_BT", (3, 4, 1)), ("a_BK", (3,)), ("pairs_P2", (5, 3))],
)
def test_wrong_shapes_name_the_column(column, shape):
    with pytest.raises(BatchError, match=rf"column `{column}` has shape \({shape[0]}"):
        some().put(**{column: torch.zeros(*shape)})


def test_no_silent_broadcast_between_rows_and_tokens():
    with pytest.raises(BatchError, match=r"expected \[B=3, T=4\]"):
        some().put(adv_BT=torch.zeros(3, 1))
    with pytest.raises(BatchError, match="no shape suffix"):
        some().put(adv=torch.zeros(3))
    with pytest.raises(BatchError, match="tokens_BT has shape"):
        Batch(*[torch.zeros(3)] * 5)


def test_a_column_is_written_once_unless_said():
    b = some().put(adv_B=torch.zeros(3))
    with pytest.raises(BatchError, match="`adv_B` is already written"):
        b.put(adv_B=torch.ones(3))
    assert b.over(adv_B=torch.ones(3))["adv_B"].sum() == 3
    assert b["adv_B"].sum() == 0
    with pytest.raises(BatchError, match="did you mean `reward_B`"):
        _ = b["rewards_B"]


def test_over_replaces_masks_and_units():
    b = some()
    assert b.index()[1] == 2
    assert b.over(group_B=torch.tensor([7, 5, 7])).index()[0].tolist() == [1, 0, 1]
    assert b.silence(torch.tensor([True, False, True])).mask_BT.sum(1).tolist() == [1, 0, 3]


def test_per_token_takes_the_finer_column():
    b = some().put(adv_B=torch.tensor([1.0, 2.0, 3.0]))
    assert b.per_token("adv")[1].tolist() == [2.0] * 4
    assert b.put(adv_BT=torch.zeros(3, 4)).per_token("adv").sum() == 0


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(5)), keep=st.integers(1, 5), extra=st.integers(0, 3))
def test_rows_and_padding_commute_and_keep_every_column(order, keep, extra):
    b = some(5, w_BT=torch.rand(5, 4), pairs_P2=torch.tensor([[0, 1], [4, 2]]))
    rows = torch.tensor(order[:keep])
    one, other = b.pad(4 + extra).rows(rows), b.rows(rows).pad(4 + extra)
    assert one.columns == b.columns
    for name in one.columns:
        assert torch.equal(one[name], other[name])
    wanted = [[order.index(i), order.index(j)] for i, j in ((0, 1), (4, 2)) if {i, j} <= set(order[:keep])]
    assert one.pairs_P2.tolist() == wanted
    assert not one.mask_BT[:, 4:].any() and not one["w_BT"][:, 4:].any()


def test_concat_pads_moves_pairs_and_merges_media():
    image = torch.zeros(2)
    a = some(2, 3, pairs_P2=torch.tensor([[0, 1]]), media={"g0": image}, soft={"r0": image})
    c = some(3, 5, first_group=9, pairs_P2=torch.tensor([[2, 0]]), media={"g9": image})
    both = concat([a, c])
    assert (both.B, both.T) == (5, 5)
    assert both.pairs_P2.tolist() == [[0, 1], [4, 2]]
    assert set(both.media) == {"g0", "g9"} and set(both.soft) == {"r0"}
    assert both.index()[1] == 3 and both.names == a.names
    assert concat([a]) is a
    with pytest.raises(BatchError, match="adv_B"):
        concat([a, c.put(adv_B=torch.zeros(3))])
    with pytest.raises(BatchError, match="stand in two batches"):
        concat([a, a])
    with pytest.raises(BatchError, match="zero batches"):
        concat([])
    with pytest.raises(BatchError, match="cannot pad"):
        a.pad(2)


def test_branched_trajectories_are_known():
    assert not some().branched
    b = some(parent_B=torch.tensor([-1, 0, -1]))
    assert b.branched and b.once().tolist() == [True, False, True]
    assert b.rows(torch.tensor([2, 1, 0]))["parent_B"].tolist() == [-1, 2, -1]
    assert b.rows(torch.tensor([1, 2]))["parent_B"].tolist() == [-2, -1]
    assert b.rows(torch.tensor([1, 2])).branched
    assert concat([b, b.over(group_B=b["group_B"] + 5)])["parent_B"].tolist() == [-1, 0, -1, -1, 3, -1]


def test_state_round_trip_and_device():
    b = some(pairs_P2=torch.tensor([[0, 1]]), media={"g0": torch.ones(1)}).to("cpu")
    state = {
        "batch": b,
        "store": Store({3: 1.5, 1: 2.0}),
        "list": [1, "a", None, True],
        "map": {"x": torch.ones(2)},
    }
    again = decode(encode(state))
    for name in b.columns:
        assert torch.equal(again["batch"][name], b[name])
    assert again["batch"].names == b.names and torch.equal(again["batch"].media["g0"], b.media["g0"])
    assert again["store"].values == {3: 1.5, 1: 2.0} and len(again["store"]) == 2
    assert again["list"] == state["list"] and torch.equal(again["map"]["x"], torch.ones(2))
    with pytest.raises(ValueError, match="keeps a set"):
        encode({"x": {1, 2}})


def test_store_columns():
    store = Store()
    store.put(4, 2)
    assert store.get(4) == 2.0 and store.get(5) is None
    assert store.column(torch.tensor([4, 5]), -1.0).tolist() == [2.0, -1.0]


@pytest.mark.parametrize(
    ("name", "suffix"), [("a_B", "B"), ("logp_old_BT", "BT"), ("pairs_P2", "P2"), ("x_BTK", "BTK")]
)
def test_suffixes(name, suffix):
    assert dims(name) == suffix
