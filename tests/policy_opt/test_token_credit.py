"""Facts of the specifications of hapo, progrpo, earl, d3s and gtpo, on random batches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import policy_opt
from policy_opt import Batch, BatchError, Ctx, Loop, RecipeError, RunSize
from policy_opt.advantages import GroupNorm
from policy_opt.controllers import Annealed
from policy_opt.protocols import Sampler
from policy_opt.recipes.earl import Staged
from policy_opt.recipes.gtpo import Conflicts, EntropyFilter
from policy_opt.recipes.hapo import EntropyPlace, RedistributedClip, WidenByPlace
from policy_opt.recipes.progrpo import ConfidenceShift
from policy_opt.sampling import RULES, entropy_temperature, temperatures
from policy_opt.table import TableActor, TableLearner, World
from policy_opt.terms import Loss
from policy_opt.token_credit import KeepTop, MaxVariance, TokenGroupNorm, confidence
from policy_opt.trust import Widths

quick = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10**6)
B, T, V, D = 9, 6, 3, 4


def random_batch(seed: int, **columns) -> Batch:
    """Three groups with gaps in their ids, holes in the mask, every row with a token, two prompt tokens each."""
    g = torch.Generator().manual_seed(seed)
    double = {"generator": g, "dtype": torch.float64}
    mask = torch.rand(B, T, generator=g) < 0.7
    mask[torch.arange(B), torch.randint(2, T, (B,), generator=g)] = True
    mask[:, :2] = False
    columns = {
        "reward_B": torch.randint(0, 3, (B,), generator=g).double(),
        "member_B": torch.arange(B),
        "tokens_BT": torch.randint(0, V, (B, T), generator=g),
        "real_BT": torch.ones(B, T),
        "logp_sampler_BT": torch.zeros(B, T, dtype=torch.float64),
        "logp_old_BT": -torch.rand(B, T, **double),
        "logp_ref_BT": -torch.rand(B, T, **double),
        "logp_prompt_BT": -torch.rand(B, T, **double),
        "entropy_old_BT": torch.rand(B, T, **double) + 0.01,
        "hidden_now_BTD": torch.randn(B, T, D, **double),
        "top_logp_now_BTK": torch.randn(B, T, V, **double).log_softmax(-1),
        "top_ids_now_BTK": torch.rand(B, T, V, generator=g).argsort(-1),
        **columns,
    }
    for name in ("entropy_now_BT", "entropy_floored_BT"):
        columns.setdefault(name, columns["entropy_old_BT"])
    return Batch.build(mask_BT=mask, group_B=torch.arange(B) % 3 * 5 + 1, **columns)


def stream(seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed + 1)
    return -torch.rand(B, T, generator=g, dtype=torch.float64)


def columns_of(recipe, b: Batch, ctx: Ctx | None = None) -> Batch:
    """The batch after signals, reward, advantage and credit."""
    ctx = ctx or Ctx(recipe=recipe.slug)
    for stage in ("signals", "reward", "advantage", "credit"):
        for part in getattr(recipe, stage):
            b = part(b, ctx)
    return b


def pulled(recipe, b: Batch, logp_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, d loss / d logp) of a recipe on a batch."""
    b = columns_of(recipe, b)
    total, found = Loss.of(recipe.terms, b, Ctx(), torch.float64).cotangents({"logp_BT": logp_BT}, b)
    return total, found.get("logp_BT", torch.zeros_like(logp_BT))


def get(slug: str, *settings: str):
    return policy_opt.get(slug).set(*settings)


def assert_same_step(one, other, b: Batch, logp_BT: torch.Tensor) -> None:
    torch.testing.assert_close(pulled(one, b, logp_BT), pulled(other, b, logp_BT), rtol=1e-9, atol=1e-12)


CLIP_HIGHER = ("terms.policy.agg=token_mean", "terms.clip_high=0.28")

# -- KeepTop and EARL -----------------------------------------------------------------------------------


@quick
@given(seed=seeds, rho=st.floats(0.01, 1.0))
def test_the_most_uncertain_tokens_of_each_response_are_kept(seed, rho):
    b = random_batch(seed)
    found = KeepTop(fraction=rho)(b, Ctx())
    keep_BT, entropy_BT = found["keep_BT"], b["entropy_old_BT"]
    assert not (keep_BT & ~b.mask_BT).any()
    for i in range(B):
        count = math.ceil(rho * int(b.mask_BT[i].sum()))
        assert int(keep_BT[i].sum()) == count >= 1
        out = b.mask_BT[i] & ~keep_BT[i]
        assert not out.any() or entropy_BT[i][out].max() < entropy_BT[i][keep_BT[i]].min()
    monotone = b.over(entropy_old_BT=(entropy_BT * 3).exp())
    assert torch.equal(KeepTop(fraction=rho)(monotone, Ctx())["keep_BT"], keep_BT)


def test_ties_are_all_kept_or_the_first_ones_whatever_the_order_of_rows():
    b = random_batch(3, entropy_old_BT=torch.ones(B, T, dtype=torch.float64))
    assert torch.equal(KeepTop(fraction=0.1)(b, Ctx())["keep_BT"], b.mask_BT)
    part = KeepTop(fraction=0.3, scope="batch", ties="first")
    keep_BT = part(b, Ctx())["keep_BT"]
    wanted = math.ceil(0.3 * int(b.mask_BT.sum()))
    assert keep_BT.flatten().nonzero().squeeze(1).tolist() == b.mask_BT.flatten().nonzero().squeeze(1).tolist()[:wanted]
    rows_R = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    assert torch.equal(part(b.rows(rows_R), Ctx())["keep_BT"], keep_BT[rows_R])


@quick
@given(seed=seeds)
def test_earl(seed):
    b, logp_BT = random_batch(seed), stream(seed)
    dapo = get("grpo", *CLIP_HIGHER, "terms.kl.coef=0.001", "terms.kl.agg=token_mean")
    assert_same_step(get("earl", "credit.fraction=1.0"), dapo, b, logp_BT)
    gated = pulled(get("earl", "terms.kl.coef=0"), b, logp_BT)[1]
    assert not gated[~columns_of(get("earl"), b)["keep_BT"]].any()
    equal = b.over(reward_B=torch.ones(B, dtype=torch.float64))
    only_kl = get("earl").replace(terms=get("earl").terms[1:])
    assert torch.equal(pulled(get("earl"), equal, logp_BT)[1], pulled(only_kl, equal, logp_BT)[1])


def test_a_stage_counts_only_where_all_before_it_hold():
    scores = [[1, 1, 1, 0.5], [1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]
    names = {"scores_BK": ("functional", "format", "interface", "compiles")}
    order = torch.tensor([3, 0, 2, 1])
    b = Batch.build(mask_BT=torch.ones(4, 1), group_B=[0] * 4, names=names, scores_BK=torch.tensor(scores)[:, order])
    assert Staged()(b, Ctx())["reward_B"].tolist() == pytest.approx([0.7, 0.1, 0.0, 1.0])
    with pytest.raises(BatchError, match="no score `format`"):
        Staged()(Batch.build(mask_BT=torch.ones(1, 1), group_B=[0], scores_BK=torch.ones(1, 2)), Ctx())


# -- MaxVariance and D3S --------------------------------------------------------------------------------


@quick
@given(seed=seeds, n=st.integers(1, 10), scope=st.sampled_from(["group", "batch"]))
def test_no_other_subset_has_a_larger_variance(seed, n, scope):
    b = GroupNorm()(random_batch(seed), Ctx())
    selected_B = MaxVariance(fraction=n, size=1, scope=scope)(b, Ctx())["selected_B"]
    units = [list(range(B))] if scope == "batch" else [list(range(k, B, 3)) for k in range(3)]
    for unit in units:
        wanted = min(3 * n if scope == "batch" else n, len(unit))
        adv = b["adv_B"][unit]
        chosen = adv[selected_B[unit]]
        assert len(chosen) == wanted
        best = max(float(adv[list(s)].var(correction=0)) for s in itertools.combinations(range(len(unit)), wanted))
        assert float(chosen.var(correction=0)) == pytest.approx(best, abs=1e-9)
        assert wanted < 2 or float(chosen.var(correction=0)) >= float(adv.var(correction=0)) - 1e-9


@quick
@given(seed=seeds, p=st.floats(0, 1), scale=st.floats(0.1, 10))
def test_d3s(seed, p, scale):
    b, logp_BT = random_batch(seed), stream(seed)
    token_mean = get("grpo", "terms.policy.agg=token_mean")
    done = get("d3s", "credit.max_variance.fraction.begin=1", "credit.keep_top.fraction.begin=1")
    assert_same_step(done, token_mean, b, logp_BT)
    now = get("d3s", f"credit.max_variance.fraction.begin={p}", f"credit.keep_top.fraction.begin={p}")
    found = columns_of(now, b)
    keep_BT, some_BT = found["keep_BT"], b.mask_BT & found["selected_B"][:, None]
    assert torch.equal(found.mask_BT, some_BT) and not (keep_BT & ~some_BT).any()
    share = Annealed(0.2, 1.0, 100, begin=p).value(Ctx())
    assert int(keep_BT.sum()) == math.ceil(share * int(some_BT.sum()))
    assert torch.equal(columns_of(now, b.over(entropy_old_BT=b["entropy_old_BT"] * scale))["keep_BT"], keep_BT)


def test_a_group_without_contrast_is_chosen_last():
    reward = torch.tensor([1.0, 1, 1, 0, 1, 1, 1, 1, 0]).double()
    b = columns_of(get("d3s", "credit.max_variance.fraction=0.5", "credit.keep_top.fraction=0.5"),
                   random_batch(1, reward_B=reward))  # fmt: skip
    assert not b["adv_B"][1::3].any() and not b["selected_B"][1::3].any()


# -- ProGRPO --------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, alpha=st.floats(0.01, 1), fraction=st.floats(0.01, 1))
def test_confidence_shift(seed, alpha, fraction):
    b = GroupNorm()(random_batch(seed), Ctx())
    found = ConfidenceShift(alpha=alpha, low_prob_fraction=fraction)(b, Ctx())
    shift_B = found["adv_B"] - b["adv_B"]
    for name in ("confidence_prompt_B", "confidence_answer_B"):
        assert ((found[name] > 0) & (found[name] <= 1)).all()
    assert (shift_B.abs() < alpha).all()
    right_B = torch.zeros(16, dtype=torch.double).index_add_(0, b["group_B"], b["reward_B"])[b["group_B"]] > 0
    torch.testing.assert_close(
        shift_B, right_B * alpha * (found["confidence_prompt_B"] - found["confidence_answer_B"])
    )
    whole_B = confidence(b["logp_old_BT"], b.mask_BT, 1.0)
    mean_B = (b["logp_old_BT"] * b.mask_BT).sum(1) / b.mask_BT.sum(1)
    torch.testing.assert_close(whole_B, mean_B.exp())


@quick
@given(seed=seeds)
def test_progrpo(seed):
    b, logp_BT = random_batch(seed), stream(seed)
    assert_same_step(get("progrpo", "advantage.alpha=0.0"), get("grpo", *CLIP_HIGHER), b, logp_BT)
    wrong = columns_of(get("progrpo"), b.over(reward_B=torch.zeros(B, dtype=torch.float64)))
    assert not wrong["adv_B"].any()
    prompt_BT = torch.full((B, T), -0.7, dtype=torch.float64)
    right = columns_of(get("progrpo"), b.over(reward_B=torch.ones(B, dtype=torch.float64), logp_prompt_BT=prompt_BT))
    order = right["confidence_answer_B"].argsort()
    assert (right["adv_B"][order].diff() < 0).all()
    equal = b.over(reward_B=torch.ones(B, dtype=torch.float64))
    mixed = columns_of(get("progrpo", "advantage.eligible=mixed_only"), equal)
    assert not mixed["adv_B"].any()
    # The prompt's confidence moves a group as one.
    other = columns_of(get("progrpo"), b.over(logp_prompt_BT=prompt_BT))["adv_B"]
    gap = (other - columns_of(get("progrpo"), b.over(logp_prompt_BT=prompt_BT * 2))["adv_B"]).view(3, 3)
    torch.testing.assert_close(gap, gap[:1].expand(3, 3))


# -- GTPO -----------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, weight=st.sampled_from([1.0, 2.0, 1.5]))
def test_gtpo(seed, weight):
    b, logp_BT = random_batch(seed), stream(seed)
    recipe = get("gtpo", f"credit.weight={weight}")
    found = columns_of(recipe, b)
    raw_B = recipe.advantage[0](b, Ctx())["adv_B"]
    lambda_BT = found["lambda_BT"]
    assert set(lambda_BT.flatten().tolist()) <= {0.0, 1.0, weight, weight**2}
    assert not (lambda_BT == 0)[raw_B >= 0].any() and not (lambda_BT > 1)[raw_B <= 0].any()
    total, gradient = pulled(recipe, b, logp_BT)
    length_B = b.mask_BT.sum(1)
    mean_B = (lambda_BT * b.mask_BT).sum(1) / length_B
    torch.testing.assert_close(total, -(found["adv_B"] * mean_B).mean())
    torch.testing.assert_close(gradient, -found["adv_B"][:, None] * lambda_BT * b.mask_BT / (length_B[:, None] * B))
    rows_R = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(columns_of(recipe, b.rows(rows_R))["lambda_BT"], lambda_BT[rows_R])
    # Ids of its own for every row: nothing is shared.
    alone = b.over(tokens_BT=torch.arange(B)[:, None].expand(B, T).contiguous())
    plain = get("gtpo", "credit.entropy_coef=0.0", "credit.initial=9.0")
    dr = get("grpo", "advantage=group_centre()", "terms.policy.loss=on_policy()")
    assert_same_step(plain, dr, alone, logp_BT)


def test_a_first_token_of_all_is_in_the_forward_set_of_right_and_wrong_answers():
    b = random_batch(0, reward_B=torch.tensor([0.0, 1, 1] * 2 + [1.0, 0, 1]).double())
    b = b.over(tokens_BT=torch.where(b.mask_BT.cumsum(1) <= 1, 1, torch.arange(B * T).view(B, T) + 2))
    found = Conflicts()(policy_opt.get("gtpo").advantage[0](b, Ctx()), Ctx())
    first_BT = b.mask_BT & (b.mask_BT.cumsum(1) == 1)
    contrast_B = found["adv_B"] != 0
    assert torch.equal(found["forward_BT"], first_BT & contrast_B[:, None])
    assert contrast_B.tolist() == [True, True, False] * 3


def test_equal_rewards_still_lower_the_entropy():
    found = columns_of(get("gtpo", "credit.initial=9.0"), random_batch(0, reward_B=torch.ones(B)))
    torch.testing.assert_close(found["adv_B"], -0.1 * found["entropy_mean_B"])
    assert bool((found["lambda_BT"] == 1).all())


def test_the_filter_looks_at_the_first_batch_unless_told():
    sure = GroupNorm()(random_batch(0), Ctx())
    unsure = sure.over(entropy_floored_BT=sure["entropy_floored_BT"] + 1)
    part, ctx = EntropyFilter(), Ctx()
    assert part(sure, ctx)["certain_B"].any() and not part(unsure, ctx)["certain_B"].any()
    assert part(unsure, Ctx())["certain_B"].all()
    assert not EntropyFilter(always=True)(unsure, Ctx())["certain_B"].any()


# -- HAPO -----------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, scale=st.floats(0.5, 2), power=st.floats(0.5, 2))
def test_place_of_an_entropy(seed, scale, power):
    b = random_batch(seed)
    part = EntropyPlace()
    place_BT = part(b, Ctx())["place_BT"]
    assert float(place_BT.abs().max()) <= 1 + 1e-12 and not place_BT[~b.mask_BT].any()
    assert int((place_BT[b.mask_BT] == 0).sum()) == 1
    moved = b.over(entropy_now_BT=scale * b["entropy_now_BT"] ** power)
    torch.testing.assert_close(part(moved, Ctx())["place_BT"], place_BT, rtol=1e-6, atol=1e-9)
    published = EntropyPlace(signed=False)(b, Ctx())["place_BT"]
    torch.testing.assert_close(published, place_BT.abs())


@quick
@given(seed=seeds)
def test_token_level_group_statistics(seed):
    b = random_batch(seed)
    adv_B, length_B = TokenGroupNorm(limit=math.inf)(b, Ctx())["adv_B"], b.mask_BT.sum(1)
    sums = torch.zeros(16, dtype=torch.double).index_add_(0, b["group_B"], adv_B * length_B)
    assert float(sums.abs().max()) < 1e-6
    equal = TokenGroupNorm()(b.over(reward_B=torch.full((B,), 0.1, dtype=torch.float64)), Ctx())
    assert not equal["adv_B"].any()
    same_length = b.over(mask_BT=(torch.arange(T) > 2).expand(B, T))
    torch.testing.assert_close(
        TokenGroupNorm()(same_length, Ctx())["adv_B"], GroupNorm(ddof=0)(same_length, Ctx())["adv_B"]
    )


def test_a_wild_advantage_sends_its_group_back_to_grpo():
    mask_BT = torch.ones(4, 60)
    mask_BT[0, 1:] = 0
    b = Batch.build(mask_BT=mask_BT, group_B=[0, 0, 1, 1], reward_B=torch.tensor([1.0, 0, 1, 0]).double())
    adv_B = TokenGroupNorm()(b, Ctx())["adv_B"]
    torch.testing.assert_close(adv_B[:2], GroupNorm()(b, Ctx())["adv_B"][:2])
    assert TokenGroupNorm(limit=math.inf)(b, Ctx())["adv_B"][0] > 5
    assert adv_B[2:].tolist() == pytest.approx([1, -1], abs=1e-5)


@quick
@given(seed=seeds)
def test_hapo(seed):
    b, logp_BT = random_batch(seed), stream(seed)
    found = columns_of(get("hapo"), b)
    for name in ("eps_low_BT", "eps_high_BT"):
        assert float(found[name].min()) >= 0.2 and float(found[name].max()) <= 0.4 + 1e-12
    rho_BT = (logp_BT - b["logp_old_BT"]).exp()
    surrogate = RedistributedClip()
    moved_BT = surrogate.advantage(rho_BT, found)
    assert (moved_BT.abs() <= 2 * found["adv_B"].abs()[:, None] + 1e-12).all()
    lowest_BT = found["place_BT"] < -1 + 1e-12
    at_rest = surrogate.advantage(torch.ones_like(rho_BT), found)[lowest_BT]
    assert at_rest.numel() and float(at_rest.abs().max()) < 1e-9
    off = get("hapo", "signals.tau=0.0", "credit.alpha=0.0", "terms.beta=0.0", "advantage=group_norm(ddof=0)")
    plain = get("grpo", "terms.policy.agg=token_mean", "terms.dual_clip=10.0", "advantage.ddof=0")
    assert_same_step(off, plain, b, logp_BT)


def test_widths_compose_with_rules_per_row():
    b = Widths(0.2, 0.3)(EntropyPlace()(random_batch(0), Ctx()), Ctx())
    b = b.over(eps_low_B=b["eps_low_B"] * torch.arange(1, B + 1))
    found = WidenByPlace(alpha=0.0)(b, Ctx())
    torch.testing.assert_close(found["eps_low_BT"], b["eps_low_B"][:, None].expand(B, T))


@quick
@given(seed=seeds, tau=st.floats(0.01, 0.5), warm=st.floats(0.3, 2))
def test_temperature_rule(seed, tau, warm):
    b, part, ctx = random_batch(seed), EntropyPlace(tau=tau), Ctx()
    plain = Sampler(temperature=warm)
    assert part.sampling(plain, ctx) == plain
    part.observe(b, ctx)
    sampler = part.sampling(plain, ctx)
    assert sampler.hook in RULES and sampler.temperature == warm
    entropy = torch.rand(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 9
    found = RULES[sampler.hook](entropy, warm, sampler.options)
    assert float(found.min()) >= warm * (1 - tau) - 1e-12 and float(found.max()) <= warm * (1 + tau) + 1e-12
    assert (found[entropy.argsort()].diff() >= 0).all()
    assert torch.equal(entropy_temperature(entropy, warm, {}), torch.full_like(entropy, warm))


def test_temperature_from_logits_with_banned_ids():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [1.0, 1.0, 1.0]])
    options = {"median": 0.0, "std": 1.0, "scale_pos": 1.0, "scale_neg": 1.0, "tau": 0.5}
    found = temperatures(Sampler(hook="entropy_temperature", options=options), logits)
    assert found.tolist() == pytest.approx([1 + 0.5 * math.log(math.log(2)), 1 + 0.5 * math.log(math.log(3))], rel=1e-5)
    with pytest.raises(RecipeError, match="unknown sampler rule"):
        temperatures(Sampler(hook="entropy_temprature"), logits)


class Listening(TableActor):
    """Keeps the samplers of its jobs."""

    def play(self, jobs):
        self.samplers = [*getattr(self, "samplers", []), *{id(job.sampler): job.sampler for job in jobs}.values()]
        return super().play(jobs)


def test_the_loop_hands_the_statistics_to_the_next_rollout():
    world = World(tasks=4)
    learner = TableLearner(world)
    learner.tables["policy"].data += torch.randn(
        learner.tables["policy"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    actor = Listening(world, learner)
    loop = Loop(policy_opt.get("hapo"), actor, learner, RunSize(4, groups=2, group_size=4))
    first, _ = loop.iterate()
    loop.iterate()
    before, after = actor.samplers
    assert before.hook is None and after.hook == "entropy_temperature"
    log_N = first["entropy_old_BT"][first.mask_BT].clamp(min=1e-8).log()
    assert after.options["median"] == float(log_N.sort().values[round(0.8 * (len(log_N) - 1))])
    assert after.options["tau"] == 0.05

    class Plain(TableActor):
        hooks = frozenset()

    with pytest.raises(RecipeError, match="no sampler rule `entropy_temperature`"):
        Loop(policy_opt.get("hapo"), Plain(world, learner), learner, RunSize(4))
    Loop(get("hapo", "signals.tau=0.0"), Plain(world, learner), learner, RunSize(4))
