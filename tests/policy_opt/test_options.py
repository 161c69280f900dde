"""--set: one grammar, safe values, suggestions; and the check of what fits together."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import policy_opt
from policy_opt import Need, Part, RecipeError
from policy_opt.advantages import GAE, GroupCentre, GroupNorm, Whiten
from policy_opt.aggregate import TokenMean
from policy_opt.controllers import Annealed
from policy_opt.credits import TIS
from policy_opt.curriculum import Mixed
from policy_opt.need import Entropy, LogProb
from policy_opt.registry import shipped
from policy_opt.surrogates import Clip
from policy_opt.terms import Term
from policy_opt.tool_rewards import LeanCalls

GRPO, DAPO, PPO = (policy_opt.get(slug) for slug in ("grpo", "dapo", "ppo"))


def test_parts_and_options():
    assert GRPO.set("advantage=group_centre()").advantage == (GroupCentre(),)
    assert GRPO.set("advantage=group_centre").advantage == (GroupCentre(),)
    assert GRPO.set("advantage=(gae(0.9, lam=1), whiten())").advantage == (GAE(0.9, 1.0), Whiten())
    assert GRPO.set("credit+=tis(cap=3)", "credit+=mis").credit[0] == TIS(cap=3.0)
    assert GRPO.set("credit+=tis", "credit-=tis").credit == ()
    assert DAPO.set("reward=none").reward == () and DAPO.set("reward=None").reward == ()
    assert GRPO.set("terms.clip_high=0.28").terms[0].loss == Clip(0.2, 0.28)
    assert GRPO.set("terms.policy.clip_high=0.28") == GRPO.set("terms.policy.loss.clip.clip_high=0.28")
    assert GRPO.set("terms.0.clip_low=1").terms[0].loss.clip_low == 1.0
    assert GRPO.set("terms.policy.agg=token_mean").terms[0].agg == TokenMean()
    assert GRPO.set("terms.kl.coef=annealed(0.1, 0, 50)").terms[1].coef == Annealed(0.1, 0.0, 50)
    assert GRPO.set("terms-=kl").terms == GRPO.terms[:1]
    assert len(GRPO.set("terms+=term(negative_entropy(), coef=0.01, name=entropy)").terms) == 3
    assert GRPO.set("curriculum.accept=mixed(by='correct_B')").curriculum.accept == Mixed()
    assert GRPO.set("curriculum=curriculum(max_rounds=3)").curriculum.max_rounds == 3
    assert DAPO.set("curriculum.accept=none").curriculum.accept is None
    assert GRPO.set("schedule.epochs=4", "schedule.minibatches=2").schedule.steps[0].epochs == 4
    assert GRPO.set("sampler.temperature=0.8").sampler.temperature == 0.8
    assert GRPO.set("optimizer=sgd(lr=0.1)", "optimizer.weight_decay=0.2").optimizer.weight_decay == 0.2
    assert GRPO.set("reward+=lean_calls(c=3)").reward == (LeanCalls(c=3.0),)
    assert PPO.set("bank.critic.optimizer.lr_scale=5").models["critic"].optimizer.lr_scale == 5.0
    assert policy_opt.get("rloo").set("variant=clip").terms[1].on
    assert policy_opt.get("dapo").set("reward.length_of=all").reward[0].length_of == "all"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("advantge=group_norm()", "unknown stage `advantge`; did you mean `advantage`"),
        ("advantage=group_nrm()", "unknown advantage part `group_nrm`; did you mean `group_norm`"),
        ("advantage=group_norm(epz=1)", "unknown option of group_norm `epz`; did you mean `eps`"),
        ("advantage.epz=1", "unknown option `advantage.epz`; did you mean `advantage.eps`"),
        ("advantage=tis()", "`tis` stands at `credit`, not at `advantage`"),
        ("terms.coef=1", "`terms.policy.coef` or `terms.kl.coef`; name one"),
        ("terms.clip_high=wide", "`terms.clip_high` takes float, not 'wide'"),
        ("terms.clip_high='0.3'", "`terms.clip_high` takes float, not '0.3'"),
        ("terms.clip_high=True", "takes float, not True"),
        ("terms.clip_high=-1", "widths >= 0"),
        ("terms.policy.agg=3", "takes Part, not 3"),
        ("terms.policy.agg=none", "takes Part, not None"),
        ("terms.kl.coef=none", "takes float, not None"),
        ("advantage.ddof=1.5", "takes int, not 1.5"),
        ("advantage.ddof=3", "ddof is 0 or 1"),
        ("advantage=group_norm(1, 2, 3, 4)", "takes at most 3 options"),
        ("advantage=group_norm(*(1,))", "takes at most 3 options"),
        ("advantage=group_norm(**{})", "unknown option of group_norm `None`"),
        ("advantage=3", "expected a part at `advantage`, found '3'"),
        ("advantage=__import__('os').system('x')", "expected a part at `advantage`"),
        ("advantage=", "cannot read the setting"),
        ("advantage", "cannot read the setting"),
        ("terms.clip_high=0.2)", "cannot read the value"),
        ("terms.clip_high=open('x')", "takes float"),
        ("variant=x", "unknown variant `x`; known: none"),
        ("credit-=tis", "unknown credit part `tis`"),
        ("schedule-=x", "-= is for"),
        ("schedule.epochs+=1", "holds one value"),
        ("reward=lean_cals()", "did you mean `lean_calls`"),
        ("reward=otc_grpo.lean_calls()", "unknown reward part of otc_grpo `lean_calls`"),
        ("reward=otc_grop.lean_calls()", "did you mean `otc_grpo`"),
        ("credit=tis(level='tokens')", "`tis.level` takes 'token' or 'sequence', not 'tokens'"),
        ("credit=tis(cap=-1)", "tis: cap must be positive"),
        ("curriculum.accept=3", "takes None, not 3"),
        ("curriculum=none", "takes Part, not None"),
        ("sampler=3", "unknown option `sampler`"),
        ("schedule.steps=(1,)", "takes"),
        ("optimizer.betas=(1, 2, 3)", "optimizer"),
        ("optimizer=sgd(betas=[1])", "takes tuple"),
        ("optimizer=sgd(name='adam')", "unknown option of sgd `name`"),
    ],
)
def test_wrong_settings_say_what_is_wrong(spec, said):
    with pytest.raises(RecipeError) as error:
        GRPO.set(spec)
    assert said in str(error.value)


def test_bad_literals_of_every_type():
    with pytest.raises(RecipeError, match="takes tuple"):
        GRPO.set("optimizer=sgd()", "optimizer.betas=(1, 2, 3)")
    assert GRPO.set("optimizer=sgd()", "optimizer.betas=(0.5, 0.9)").optimizer.betas == (0.5, 0.9)
    assert GRPO.set("optimizer=sgd(0.1)").optimizer.lr == 0.1
    assert GRPO.set("optimizer=sgd(0.1)", "optimizer.lr=None").optimizer.lr is None


def test_whole_numbers_and_floats_stand_for_each_other():
    """Also inside tuples; a number that is not whole is no whole number, and a truth value is none."""
    betas = GRPO.set("optimizer=adam(betas=(0, 0.9))").optimizer.betas
    assert betas == (0.0, 0.9) and all(type(beta) is float for beta in betas)
    assert GRPO.set("reward=weighted_scores(weights=(1, 0.5))").reward[0].weights == (1.0, 0.5)
    epochs = GRPO.set("schedule.epochs=4.0").schedule.steps[0].epochs
    assert epochs == 4 and type(epochs) is int
    for wrong in ("schedule.epochs=4.5", "schedule.epochs=True", "schedule.epochs=1e999"):
        with pytest.raises(RecipeError, match="takes int"):
            GRPO.set(wrong)
    with pytest.raises(RecipeError, match="takes tuple"):
        GRPO.set("reward=weighted_scores(weights=(1, True))")


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(max_size=60),
    path=st.sampled_from(["advantage", "terms.clip_high", "terms.kl.coef", "credit"]),
)
def test_no_text_gets_past_the_parser(text, path):
    """Whatever stands behind the equals sign: a recipe or a RecipeError."""
    for operator in ("=", "+=", "-="):
        try:
            GRPO.set(f"{path}{operator}{text}")
        except RecipeError:
            pass


def test_deep_nesting_is_refused():
    with pytest.raises(RecipeError, match="cannot read the value"):
        GRPO.set("advantage=" + "(" * 10_000)


@pytest.mark.parametrize("slug", shipped())
def test_every_option_can_be_addressed_by_its_full_name(slug):
    """And setting an option to what it is changes nothing."""
    from policy_opt.options import addresses, assign

    recipe = policy_opt.get(slug)
    found = list(addresses(recipe))
    assert len({a.full for a in found}) == len(found)
    first = next(a.full for a in found if a.names[-1] == "epochs")
    assert assign(recipe, first, 3).schedule.steps[0].epochs == 3
    if len(recipe.schedule.steps) == 1:
        assert assign(recipe, "schedule.epochs", 3).schedule.steps[0].epochs == 3


# -- what fits together ---------------------------------------------------------------------------------


def test_incompatible_parts_are_refused_with_the_reason():
    cases = {
        (
            "gspo",
            "reward=token_reward()",
            "advantage=reward_to_go()",
        ): "reads `adv_B`, which nothing before it writes; there is `adv_BT` by advantage.0:RewardToGo",
        (
            "grpo",
            "advantage=gae()",
        ): "advantage.0:GAE reads `token_reward_BT`, which nothing before it writes",
        (
            "grpo",
            "advantage+=group_centre()",
        ): "writes `adv_B`, which advantage.0:GroupNorm has written already",
        ("gspo", "credit+=tis()"): "has one loss per row, so credit.0:TIS cannot weight its tokens",
        ("grpo", "reward+=token_reward()"): "writes `token_reward_BT`, but nothing after it reads that",
        (
            "grpo",
            "reward=token_reward()",
            "advantage+=reward_to_go()",
        ): "writes `adv_B`, but nothing after it reads",
        ("grpo", "terms+=term(clip())"): "two terms have one name",
        ("grpo", "terms.policy.num=pivotal"): "reads `pivotal_BT`, which nothing before it writes",
        ("grpo", "credit+=mis(low=3)"): "0 <= low <= high",
    }
    for (slug, *specs), said in cases.items():
        with pytest.raises(RecipeError) as error:
            policy_opt.get(slug).set(*specs).check()
        assert said in str(error.value), specs


def test_compatible_compositions_pass():
    for slug, spec in (
        ("gspo", "credit+=tis(level='sequence')"),
        ("gspo_token", "credit+=tis()"),
        ("ppo", "credit+=mis()"),
        ("dapo", "credit+=mask_truncated()"),
        ("cispo", "advantage=leave_one_out()"),
        ("rloo", "advantage+=whiten()"),
    ):
        policy_opt.get(slug).set(spec).check()


@pytest.mark.parametrize("slug", shipped())
def test_any_recipe_takes_importance_weights(slug):
    """Per token where the loss has tokens, per row where it is per row; a loss over pairs or groups has neither."""
    recipe = policy_opt.get(slug)
    if any(term.on and term.loss.gives == "" for term in recipe.terms):
        with pytest.raises(RecipeError, match=r"has one loss per batch, so credit.* cannot weight its"):
            recipe.set("credit+=tis(level='sequence')").check()
        return
    rows = any(term.on and term.loss.gives == "B" for term in recipe.terms)
    recipe.set(f"credit+=tis(level={'sequence' if rows else 'token'})").check()
    recipe.set("credit+=mis(level='sequence')").check()


def test_facts_must_be_delivered():
    recipe = policy_opt.get("otc_grpo")
    recipe.check()
    recipe.check({"tool_calls_B"})
    with pytest.raises(RecipeError, match="fact `tool_calls_B`, which the environment does not deliver"):
        recipe.check({"hops_B"})


class Asks(Part):
    """Needs whatever it is told to."""

    stage = "signals"

    def __init__(self, *needs):
        self.asked = needs

    @property
    def needs(self):
        return self.asked


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        ([Need("entropy_old_B", Entropy())], "its name must end in _BT"),
        ([Need("logp_x_BT", LogProb(), model="teacher")], "model `teacher`, which is not in the bank"),
        ([Need("x_BT", LogProb()), Need("x_BT", Entropy())], "needs `x_BT` as"),
        ([Need("reward_BT", LogProb()), Need("logp_sampler_BT", LogProb())], "writes `logp_sampler_BT`"),
    ],
)
def test_needs_are_checked(needs, said):
    with pytest.raises(RecipeError, match=said):
        GRPO.replace(signals=(Asks(*needs),)).check()


def test_an_accept_rule_cannot_need_a_model():
    class Peeks(Asks):
        stage = "accept"

    recipe = GRPO.replace(curriculum=policy_opt.curriculum.Curriculum(accept=Peeks(Need("x_BT", LogProb()))))
    with pytest.raises(RecipeError, match="asked before anything is scored"):
        recipe.check()


def test_models_of_two_parts_must_agree():
    class Frozen(Asks):
        models = {"ref": policy_opt.ModelSpec("teacher", source="x")}  # noqa: RUF012

    recipe = GRPO.set("terms.kl.coef=0.1").replace(signals=(Frozen(),))
    with pytest.raises(RecipeError, match="wants model `ref` as"):
        recipe.check()
    assert recipe.replace(bank={"ref": policy_opt.ModelSpec("copy")}).models == {
        "ref": policy_opt.ModelSpec("copy")
    }


def test_phases_are_checked_each():
    Phase = policy_opt.Phase
    good = GRPO.replace(phases=(Phase("warm", GRPO, 2), Phase("main", DAPO)))
    good.check()
    assert not good.privileged
    with pytest.raises(RecipeError, match="only the last phase"):
        GRPO.replace(phases=(Phase("warm", GRPO), Phase("main", DAPO))).check()
    with pytest.raises(RecipeError, match="nothing before it writes"):
        GRPO.replace(phases=(Phase("warm", GRPO.set("advantage=none")),)).check()


def test_a_term_of_a_step_of_its_own_is_checked():
    from policy_opt.schedule import Schedule, Step

    alone = GRPO.replace(terms=(), schedule=Schedule((Step(terms=(Term(Clip()),)),)))
    alone.check()
    with pytest.raises(RecipeError, match="no term of the loss is on"):
        GRPO.replace(schedule=Schedule((Step(), Step(terms=())))).check()
    assert GroupNorm.stage == "advantage"
