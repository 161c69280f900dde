"""FSDP2 on two gloo processes gives what one process with whole weights gives."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from agents import lora, warm
from agents.cli import UsageError
from agents.config import LoraConfig, OptimConfig, WarmConfig
from agents.dist import World
from agents.engines.hf import HFEngine
from agents.engines.reference import plain_log_probs
from agents.forward import Convention
from agents.launcher import free_port
from agents.learner import LMLearner
from agents.ledger import Ledger
from agents.models import fingerprint
from agents.sharding import Plan, full, local
from policy_opt.bank import CRITIC, REFERENCE, ModelSpec
from policy_opt.errors import RecipeError
from policy_opt.need import VALUES, KLTo, LogProb, Need
from tests.agents.test_learner import BANNED, ENTROPY, LOGP, batch, loss_of, tiny

KL = Need("kl_BT", KLTo("ref"), when="loss")
REF = Need("logp_ref_BT", LogProb(), model="ref")
EMA = ModelSpec("copy", ema=0.9)


def tied() -> Any:
    """A model whose head is its embedding, and whose matrices have odd numbers of rows: shards are of unequal size."""
    model = tiny(3)
    config = model.config
    config.tie_word_embeddings = True
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return type(model)(config).double().eval()


def trained(world: World, *, model: Any = None, rows: int = 9, optimizer: str = "adamw", bank: Any = None,
            steps: int = 3, pack: str = "auto", recompute: bool = False, lr: float = 0.01) -> LMLearner:
    """After some optimizer steps on a loss that mixes rows, with a critic where the bank has one."""
    b = batch(rows=rows)
    one = LMLearner(
        model or tiny(), OptimConfig(optimizer, lr=lr, clip=0.3, weight_decay=0.1, seed=5),
        convention=Convention(0.8, BANNED), world=world, micro_tokens=40, packing=pack, recompute=recompute,
    )  # fmt: skip
    one.prepare(bank or {}, [], None)
    needs = [LOGP, ENTROPY, *([VALUES] if "critic" in one.bank.members else []),
             *([KL] if "ref" in one.bank.members else [])]
    for _ in range(steps):
        scored = one.score(b, [LOGP, ENTROPY, *([REF] if "ref" in one.bank.members else [])])
        whole = {k: scored[k].clone().requires_grad_() for k in ("logp_BT", "entropy_BT")}
        pulls = dict(zip(whole, torch.autograd.grad(loss_of(whole), list(whole.values())), strict=True))

        def pull(rows_R, live, pulls=pulls):
            out = {k: v[rows_R] for k, v in pulls.items()}
            if "values_BT" in live:
                out["values_BT"] = (live["values_BT"] - 1) * b.mask_BT[rows_R]
            if "kl_BT" in live:
                out["kl_BT"] = 0.3 * b.mask_BT[rows_R].double()
            return out

        one.backward(b, needs, pull)
        one.step()
        if "ema" in one.bank.members:
            one.sync("ema", 0.9)
    return one


def seen(one: LMLearner) -> dict[str, torch.Tensor]:
    """Streams of the last step and weights."""
    out = dict(one.streams)
    for name, member in one.bank.members.items():
        out |= {f"{name}/{k}": full(v).detach() for k, v in member.model.named_parameters()}
    return out


CASES: dict[str, Callable[[World], dict[str, torch.Tensor]]] = {
    "adamw and a critic": lambda w: seen(trained(w, bank={"critic": CRITIC})),
    "tied head, reference and average": lambda w: seen(
        trained(w, model=tied(), bank={"ref": REFERENCE, "ema": EMA}, pack="never")
    ),
    "packed, reference": lambda w: seen(trained(w, bank={"ref": REFERENCE}, pack="always")),
    "recompute": lambda w: seen(trained(w, bank={"critic": CRITIC}, recompute=True)),
    "one row: a process without work": lambda w: seen(trained(w, rows=1, bank={"critic": CRITIC})),
    "noise by name": lambda w: seen(trained(w, optimizer="stosignsgd")),
    "noise by name, of adam": lambda w: seen(trained(w, optimizer="stosignsgd(direction=adam())", lr=1e-3)),
    "lion_k": lambda w: seen(trained(w, optimizer="lion_k(kappa=huber(e=0.05))")),
    "rmsprop": lambda w: seen(trained(w, optimizer="rmsprop", lr=1e-3)),
    "sgd": lambda w: seen(trained(w, optimizer="sgd")),
    "state": lambda w: flat(trained(w, bank={"critic": CRITIC}).state_dict()),
    "taken up again": lambda w: seen(taken_up(w)),
    "fingerprint": lambda w: {"hex": torch.tensor(list(fingerprint(split(w, tiny())).encode()))},
    "warm start": lambda w: warmed(w),
    "sampler": lambda w: sampled(w, tiny()),
    "adapters, critic, reference and average": lambda w: seen(
        trained(w, model=adapted(), bank={"critic": CRITIC, "ref": REFERENCE, "ema": EMA})
    ),
    "adapters, recompute": lambda w: seen(trained(w, model=adapted(), recompute=True)),
    "state of adapters": lambda w: flat(
        trained(w, model=adapted(), bank={"critic": CRITIC, "ref": REFERENCE}).state_dict()
    ),
    "adapters taken up again": lambda w: seen(taken_up(w, adapted)),
    "warm start beneath adapters": lambda w: warmed_beneath(w),
    "sampler with adapters": lambda w: sampled(w, adapted()),
}


def adapted() -> Any:
    model = tiny()
    lora.adapt(model, LoraConfig(rank=3), 0)
    return model


def flat(tree: Any, where: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a state by their place."""
    if isinstance(tree, torch.Tensor):
        return {where: tree.clone()}
    items = tree.items() if isinstance(tree, dict) else ()
    return {k: v for key, value in items for k, v in flat(value, f"{where}/{key}").items()}


def split(world: World, model: Any) -> Any:
    if world.sharding is not None:
        world.sharding.shard(model)
    return model


def taken_up(world: World, make: Callable[[], Any] = tiny) -> LMLearner:
    """A state that one process saved, taken up by this many, and trained on."""
    state = trained(World(), model=make(), bank={"critic": CRITIC}, steps=2).state_dict()
    one = trained(world, model=make(), bank={"critic": CRITIC}, steps=0)
    one.load_state_dict(state)
    for part in (one.bank.policy, one.bank["critic"]):
        part.optimizer.zero_grad()
    again = trained(world, model=one.model, steps=0)
    assert again.bank.policy.sharded is one.bank.policy.sharded
    b = batch(rows=4)
    one.backward(b, [LOGP, VALUES], lambda rows, live: {k: b.mask_BT[rows].double() for k in live})
    one.step()
    return one


def warmed(world: World) -> dict[str, torch.Tensor]:
    """Imitation, which all processes do together; the second call finds what the first one kept."""
    out = {}
    for name in ("trained", "cached"):
        model = split(world, tiny())
        assert warm_start(world, model) == name
        out |= {f"{name}/{k}": full(v).detach() for k, v in model.named_parameters()}
    return out


def warm_start(world: World, model: Any, epochs: int = 1) -> str:
    ledgers = []
    for row in range(4):
        ledger = Ledger()
        ledger.observe([8, 9, 10 + row], 0)
        ledger.act([11, 12, 13 + row], [0.0] * 3, 0, 0)
        ledgers.append(ledger)
    return warm.warm_start(model, ledgers, WarmConfig(epochs=epochs, batch=2), Convention(1.0, BANNED), seed=0,
                           micro_tokens=64, world=world, on_step=lambda *_: None)


def warmed_beneath(world: World) -> dict[str, torch.Tensor]:
    """Imitation of the weights under adapters, and training of the adapters over them."""
    out = {}
    for name in ("trained", "cached"):
        model = split(world, adapted())
        before = {k: full(v).detach().clone() for k, v in model.named_parameters()}
        with lora.beneath(model, world.sharding) as plain:
            assert warm_start(world, plain, epochs=2) == name
        if world.sharding is not None:
            assert plain not in world.sharding.models
        moved = {k for k, v in model.named_parameters() if not torch.equal(full(v).detach(), before[k])}
        assert moved == {k for k in before if ".lora_" not in k}, "all of the base, and no adapter"
        assert {k for k, v in model.named_parameters() if v.requires_grad} == set(before) - moved
        out |= {f"{name}/{k}": v for k, v in seen(trained(world, model=model)).items()}
    return out


def sampled(world: World, model: Any) -> dict[str, torch.Tensor]:
    """What an engine draws from gathered weights, before and after an update, and that nothing is left behind."""
    one = trained(world, model=model, steps=0)
    open_ = one.bank.policy.whole
    with open_() as model:
        engine = HFEngine(model, stop_ids=[1], banned_ids=list(BANNED), rows=2, max_context=32)
    out = {}
    for turn in range(2):
        with open_() as model:
            engine.reset()
            engine.turn((0, 0), [8, 9, 10], (0, 0, turn), 6)
            ((_, got),) = engine.run()
            engine.reset()
            out[f"ids/{turn}"], out[f"logps/{turn}"] = torch.tensor(got.ids), torch.tensor(got.logps)
            out[f"plain/{turn}"] = plain_log_probs(model, [8, 9, 10, *got.ids], BANNED)
        if one.bank.policy.sharded is not None:
            assert all(p.is_meta for p in model.parameters())
            assert sum(local(p).numel() for p in one.model.parameters()) < 0.6 * sum(
                p.numel() for p in one.model.parameters()
            )
        one.backward(batch(rows=3), [LOGP], lambda rows, live: {"logp_BT": batch(rows=3).mask_BT[rows].double()})
        one.step()
    return out


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "PALAESTRA_CACHE": f"{folder}/split",
    }  # fmt: skip
    world = World.start(timeout_s=60)
    torch.set_num_threads(1)
    assert world.sharding is not None
    found = {name: case(world) for name, case in CASES.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    for name in ("lion_k(kappa=topk(k=2))", "stosignsgd(direction=adafactor())"):
        with pytest.raises(RecipeError, match="whole tensors"):
            trained(world, optimizer=name, steps=0)
    world.close()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("split")
    mp.start_processes(worker, (free_port(), str(folder)), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_split_weights_equal_whole_ones(found, name, tmp_path, monkeypatch):
    monkeypatch.setenv("PALAESTRA_CACHE", str(tmp_path))
    want = CASES[name](World())
    for rank, got in enumerate(found):
        if name.startswith("state") and rank:
            assert not any(v.numel() for k, v in got[name].items() if v.ndim), "the first process alone keeps it"
            continue
        assert got[name].keys() == want.keys()
        for key, value in want.items():
            torch.testing.assert_close(got[name][key], value, rtol=1e-6, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize("variables, words", [
    ({"FSDP_VERSION": "1"}, "fsdp_version: 2"),
    ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--recompute"),
    ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading"),
    ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "TRANSFORMER_BASED_WRAP"),
    ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "whole"),
])  # fmt: skip
def test_settings_that_would_be_ignored_are_refused(monkeypatch, variables, words):
    for name, value in {**LAUNCHED, **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=words):
        Plan.of_launcher()


def test_the_launchers_settings_are_taken_over(monkeypatch):
    assert Plan.of_launcher() is None
    named = {"FSDP_TRANSFORMER_CLS_TO_WRAP": "A,B", "FSDP_RESHARD_AFTER_FORWARD": "false"}
    for name, value in {**LAUNCHED, **named}.items():
        monkeypatch.setenv(name, value)
    assert Plan.of_launcher() == Plan(reshard=False, blocks=("A", "B"))
