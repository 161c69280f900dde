"""One whole GRPO iteration beside TRL's GRPOTrainer: same model, prompts and settings. A table, then JSON.

    python -m tests.benchmarks.trl [--venv FOLDER] [--steps 6]

64 rollouts (8 prompts in groups of 8) of exactly 32 tokens, the bundled model in float32, one thread, one optimizer
step with clip and KL to a reference model. First both sides compute the loss of the same fixed numbers (tokens,
advantages, old and reference log-probs), and its gradient: they must agree to 1e-5. Then each side runs whole
iterations in a process of its own: sampling, rewards, reference log-probs, backward, step; the best of the steps
after the first counts, by CPU time. Memory is the peak of the process, and what of it came after importing and
building everything. Aim: at most half of TRL's time and memory; no bound is enforced.

TRL has an environment of its own, made under a temporary folder unless --venv names one to keep: torch first, of our
version, so that its small CPU build is taken where one is offered. TRL multiplies its KL term by the ratio by default
(use_bias_correction_kl); that is switched off here, and loss_type is set to "grpo".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

VERSION = "1.16.0"
PROMPTS, GROUP, NEW = 8, 8, 32
BETA, CLIP, LR = 0.04, 0.2, 1e-5
AIM = 0.5


def reward(text: str) -> float:
    """Something that differs between completions: share of different characters."""
    return len(set(text)) / max(1, len(text))


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most."""
    with open("/proc/self/status") as handle:
        return next(int(line.split()[1]) / 1024 for line in handle if line.startswith(field))


# -- TRL: runs in its own environment, so nothing of ours is imported -----------------------------------------


def trl_trainer(work: Path, steps: int) -> Any:
    """A GRPOTrainer on the model and prompts of the work folder."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    config = GRPOConfig(
        output_dir=str(work / "out"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", seed=0,
        logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False, dataloader_pin_memory=False,
        per_device_train_batch_size=PROMPTS * GROUP, gradient_accumulation_steps=1, num_generations=GROUP,
        max_steps=steps, max_completion_length=NEW, generation_kwargs={"min_new_tokens": NEW}, temperature=1.0,
        learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, num_iterations=1,
        beta=BETA, use_bias_correction_kl=False, epsilon=CLIP, loss_type="grpo", scale_rewards="group",
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": p} for p in json.loads((work / "prompts.json").read_text())])

    def rewards(completions: list[Any], **_: Any) -> list[float]:
        return [reward(c[0]["content"]) for c in completions]

    return GRPOTrainer(
        model=model, reward_funcs=[rewards], args=config, train_dataset=prompts,
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
    )  # fmt: skip


def trl_check(work: Path) -> dict[str, float]:
    """Loss and norm of the gradient of the fixed case."""
    import torch

    trainer = trl_trainer(work, 1)
    case = {k: torch.tensor(v) for k, v in json.loads((work / "case.json").read_text()).items()}
    ones = torch.ones_like(case["completion_ids"])
    trainer.model.eval()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, {
        "prompt_ids": case["prompt_ids"], "prompt_mask": torch.ones_like(case["prompt_ids"]),
        "completion_ids": case["completion_ids"], "completion_mask": ones, "advantages": case["advantages"],
        "old_per_token_logps": case["old"], "ref_per_token_logps": case["ref"],
        "num_items_in_batch": ones.sum(),
    })  # fmt: skip
    loss.backward()
    square = sum(float(p.grad.double().square().sum()) for p in trainer.model.parameters() if p.grad is not None)
    return {"loss": float(loss), "norm": square**0.5}


def trl_run(work: Path, steps: int) -> dict[str, float]:
    """Seconds of the best step after the first, and memory."""
    from transformers import TrainerCallback

    stamps: list[float] = []

    class Stamp(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            stamps.append(time.process_time())

    trainer = trl_trainer(work, steps)
    trainer.add_callback(Stamp())
    before = memory("VmRSS")
    trainer.train()
    return measured(stamps, before)


def measured(stamps: list[float], before: float) -> dict[str, float]:
    """From the CPU times at the end of each step."""
    seconds = min(b - a for a, b in pairwise(stamps))
    peak = memory("VmHWM")
    return {"seconds": seconds, "peak_mib": peak, "grown_mib": peak - before}


# -- ours -----------------------------------------------------------------------------------------------------


def our_check(work: Path) -> dict[str, float]:
    """The same through the recipe's terms and the learner's backward pass."""
    import torch

    import policy_opt
    from agents.learner import LMLearner
    from agents.models import load_model
    from policy_opt.batch import Batch
    from policy_opt.part import Ctx
    from policy_opt.terms import Loss

    torch.set_num_threads(1)
    model, _ = load_model(str(work / "model"), torch.float32)
    case = {k: torch.tensor(v) for k, v in json.loads((work / "case.json").read_text()).items()}
    tokens_BT = torch.cat([case["prompt_ids"], case["completion_ids"]], 1)
    mask_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT) >= case["prompt_ids"].shape[1]

    def behind_prompt(value_BC: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros(case["prompt_ids"].shape), value_BC], 1)

    b = Batch.build(
        mask_BT=mask_BT, real_BT=torch.ones_like(mask_BT), tokens_BT=tokens_BT,
        group_B=torch.arange(len(tokens_BT)) // GROUP, adv_B=case["advantages"],
        logp_old_BT=behind_prompt(case["old"]), logp_ref_BT=behind_prompt(case["ref"]),
        logp_sampler_BT=behind_prompt(case["old"]),
    )  # fmt: skip
    recipe = policy_opt.get("grpo").set(f"terms.kl.coef={BETA}")
    loss = Loss.of(recipe.terms, b, Ctx(), torch.float32)
    needs = tuple({need.name: need for term in loss.terms for need in term.needs if need.when == "loss"}.values())
    learner = LMLearner(model)
    learner.prepare({}, needs, None)
    streams = learner.backward(b, needs, lambda rows_R, live: loss.cotangents(live, b.rows(rows_R), rows_R)[1])
    square = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    return {"loss": float(loss.cotangents(streams, b)[0]), "norm": square**0.5}


def our_run(work: Path, steps: int) -> dict[str, float]:
    """Iterations of the loop that `agents.train` runs, with its engine, actor and learner."""
    import torch

    import policy_opt
    from agents.actor import LMActor, Player
    from agents.chat import ChatFormat
    from agents.config import OptimConfig
    from agents.engines.base import SampleParams
    from agents.engines.hf import HFEngine
    from agents.forward import Convention
    from agents.learner import LMLearner
    from agents.models import load_model
    from agents.rollout import Limits
    from policy_opt.loop import Loop, RunSize

    torch.set_num_threads(1)
    model, tokenizer = load_model(str(work / "model"), torch.float32)
    chat = ChatFormat(tokenizer, vocab_size=model.get_output_embeddings().weight.shape[0])
    banned = sorted({*chat.banned_ids, *chat.stop_ids})  # every turn has its full length
    prompts = json.loads((work / "prompts.json").read_text())
    longest = max(len(tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False)) for p in prompts)
    room = longest + NEW + 8
    engine = HFEngine(
        model, stop_ids=chat.stop_ids, banned_ids=banned, params=SampleParams(max_new_tokens=NEW),
        rows=PROMPTS * GROUP, max_context=room,
    )  # fmt: skip
    limits = Limits(max_turns=1, max_new_tokens=NEW, max_context=room)
    player = Player(environment(prompts), chat, engine, limits, seed=0)
    learner = LMLearner(model, OptimConfig(lr=LR), convention=Convention(1.0, tuple(banned)), micro_tokens=1024)
    player.version = lambda: learner.version
    actor = LMActor(player)
    recipe = policy_opt.get("grpo").set(f"terms.kl.coef={BETA}")
    loop = Loop(recipe, actor, learner, RunSize(PROMPTS, groups=PROMPTS, group_size=GROUP))
    before = memory("VmRSS")
    stamps = [time.process_time()]
    for _ in range(steps):
        actor.begin()
        batch, _ = loop.iterate()
        stamps.append(time.process_time())
        assert int(batch.mask_BT.sum()) == PROMPTS * GROUP * NEW, "not the same work"
    return measured(stamps[1:], before)


def environment(prompts: list[list[dict[str, str]]]) -> Any:
    """A function that makes an environment of one turn over the prompts."""
    from envs import ChatEnv, Task, Verdict

    class Prompts(ChatEnv):
        name = "prompts"

        def task(self, split: str, index: int, level: Any = None) -> Task:
            return Task(f"prompts/{split}/{index}", split, index, 1, {"messages": prompts[index]}, {}, str(index))

        def opening(self, task: Task) -> Any:
            return task.prompt["messages"]

        def judge(self, task: Task, final: str | None) -> Verdict:
            value = reward(final or "")
            return Verdict(value, {"correct": float(value > 0.5)}, {})

    return Prompts


# -- both ---------------------------------------------------------------------------------------------------


def lay_out(work: Path) -> int:
    """Model, prompts and the fixed case; returns the prompts' length in tokens."""
    import torch

    from agents import bundled
    from agents.models import load_model

    model, tokenizer = load_model(str(bundled.path()), torch.float32)
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    names = ("Zanvel", "Torun", "Mireth", "Oskal", "Belin", "Harvo", "Quist", "Lenar")
    prompts = [
        [{"role": "user", "content": f"Who is the mentor of {name}, and where does the sister of {name} work today?"}]
        for name in names
    ]
    (work / "prompts.json").write_text(json.dumps(prompts))
    ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]
    width = min(map(len, ids))
    draw = torch.Generator().manual_seed(0)
    rows = PROMPTS * GROUP
    completion = torch.randint(10, len(tokenizer), (rows, NEW), generator=draw)
    prompt = torch.tensor([ids[i // GROUP][-width:] for i in range(rows)])
    with torch.no_grad():
        logits = model(torch.cat([prompt, completion], 1)).logits[:, width - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, completion[..., None])[..., 0]

    def near() -> list[list[float]]:
        return (logp + 0.3 * torch.randn(logp.shape, generator=draw)).tolist()

    case = {"prompt_ids": prompt.tolist(), "completion_ids": completion.tolist(), "old": near(), "ref": near()}
    case["advantages"] = torch.randn(rows, generator=draw).tolist()
    (work / "case.json").write_text(json.dumps(case))
    return max(map(len, ids))


def install(venv: Path) -> Path:
    """The Python of an environment that holds TRL, made where it is not there."""
    from importlib.metadata import version

    python = venv / "bin" / "python"
    torch_version = version("torch").partition("+")[0]
    if not python.exists():
        print(f"installing TRL {VERSION} into {venv} (some minutes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        for package in (f"torch=={torch_version}", f"trl=={VERSION}"):
            subprocess.run([str(python), "-m", "pip", "install", "-q", package], check=True)
    return python


def call(python: Path | str, side: str, what: str, work: Path, steps: int) -> dict[str, float]:
    """Run one side in a process of its own; the last line that it prints."""
    # -P: this file's folder must not come first on the path, for this file is called like the package.
    module = ["-m", "tests.benchmarks.trl"] if side == "ours" else ["-P", str(Path(__file__).resolve())]
    command = [str(python), *module, "--side", side, "--what", what, "--work", str(work), "--steps", str(steps)]
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if side == "trl":
        surroundings.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(venv: Path, work: Path, steps: int) -> None:
    """Check, measure, print."""
    from rich.console import Console
    from rich.table import Table

    python = install(venv)
    length = lay_out(work)
    ours, theirs = (call(p, side, "check", work, 1) for p, side in ((sys.executable, "ours"), (python, "trl")))
    for name in ("loss", "norm"):
        assert abs(ours[name] - theirs[name]) <= 1e-5 * abs(theirs[name]), f"{name} differs: {ours}, {theirs}"
    print(f"equal {name}s checked: loss {ours['loss']:.7f} and {theirs['loss']:.7f}, "
          f"gradient norm {ours['norm']:.6f} and {theirs['norm']:.6f}")  # fmt: skip
    mine, its = (call(p, side, "run", work, steps) for p, side in ((sys.executable, "ours"), (python, "trl")))
    ratios = {name: mine[name] / its[name] for name in mine}
    labels = {"seconds": "CPU seconds an iteration", "peak_mib": "peak of the process, MiB",
              "grown_mib": "peak beyond imports and models, MiB"}  # fmt: skip
    title = f"GRPO iteration: {PROMPTS * GROUP} rollouts x {NEW} tokens, prompts of {length}, 1 thread"
    table = Table("", "ours", f"TRL {VERSION}", "ratio", "aim", title=title)
    for name, label in labels.items():
        table.add_row(label, f"{mine[name]:.3f}", f"{its[name]:.3f}", f"{ratios[name]:.2f} x", f"≤ {AIM}")
    Console().print(table)
    print(json.dumps({
        "benchmark": "trl", "check": {"ours": ours, "trl": theirs}, "ours": mine, "trl": its, "threads": 1,
        "ratio": {k: round(v, 4) for k, v in ratios.items()}, "machine": platform.machine(),
        "load": round(os.getloadavg()[0], 2),
    }))  # fmt: skip


def main() -> None:
    """The whole comparison, or with --side one side of it in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, help="environment with TRL, made where it is not there; none: temporary")
    parser.add_argument("--steps", type=int, default=6, help="iterations of each side; the first one does not count")
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=("check", "run"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.steps < 3 and given.what != "check":
        parser.error("--steps must be at least 3")
    if given.side:
        run = {("ours", "check"): lambda: our_check(given.work), ("trl", "check"): lambda: trl_check(given.work),
               ("ours", "run"): lambda: our_run(given.work, given.steps),
               ("trl", "run"): lambda: trl_run(given.work, given.steps)}[given.side, given.what]  # fmt: skip
        print(json.dumps(run()))
        return
    with tempfile.TemporaryDirectory(prefix="palaestra-trl-") as folder:
        work = Path(folder)
        compare(given.venv or work / "venv", work, given.steps)


if __name__ == "__main__":
    main()
