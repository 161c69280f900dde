"""What can be set when training: frozen dataclasses, a line under each field. The CLI and TOML files read these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from agents.cli import Count, Fraction, Natural, NonNegative, Positive


@dataclass(frozen=True)
class OptimConfig:
    """How one model's weights are stepped."""

    name: str = "adamw"
    """lion, lion_k, momentum, stosignsgd, or one of torch.optim: adamw, adam, sgd, ...; with options of its own as
    NAME(OPTION=VALUE), e.g. lion_k(kappa=huber(e=0.05)) or stosignsgd(direction=adam)."""
    lr: Positive | None = None
    """Peak learning rate; none: 5e-4 for models below 20 million parameters, else 1e-6; ten times that for adapters."""
    beta1: Fraction = 0.9
    """Momentum, where the optimizer has one."""
    beta2: Fraction = 0.99
    """Decay of the squared gradient, where the optimizer has one."""
    weight_decay: NonNegative = 0.0
    """Decoupled decay of matrices; vectors (norms, biases) are never decayed."""
    clip: NonNegative = 1.0
    """Largest gradient norm; 0 = no clipping."""
    warmup: Count = 0
    """Optimizer steps over which the rate rises linearly from zero."""
    seed: Count | None = None
    """Of the noise that stochastic optimizers draw; none: the run's."""


@dataclass(frozen=True)
class WarmConfig:
    """The warm start: imitation of the environment's demonstrators, for the bundled model only unless asked."""

    when: Literal["auto", "always", "never"] = "auto"
    """auto: the bundled model on an environment with demonstrators."""
    scripts: tuple[str, ...] = ()
    """Scripts to imitate and their shares, NAME=SHARE; may be given several times; none: as the environment has it."""
    episodes: Natural = 400
    """Demonstrations at most; each is of another training task."""
    epochs: Natural = 2
    """Passes over them."""
    batch: Natural = 8
    """Conversations per optimizer step."""
    lr: Positive = 2e-3
    """Peak learning rate; it rises over a tenth of the steps and falls linearly to a tenth."""
    cache: bool = True
    """Keep the result under the cache folder, by content of model, environment and these settings."""


@dataclass(frozen=True)
class RolloutConfig:
    """How episodes are played."""

    rows: Natural = 128
    """Episodes that are played at the same time."""
    max_turns: Natural | None = None
    """Turns per episode; none: the environment's own bound."""
    max_new_tokens: Natural = 64
    """Sampled tokens per turn at most."""
    max_context: Natural | None = None
    """Tokens per episode at most, all included; none: 512 for tiny models, else 4,096, or what the model has."""
    temperature: NonNegative = 1.0
    """Softmax temperature of sampler and trainer."""
    top_k: Count = 0
    """Sample among the k likeliest tokens; 0: all. Training needs 0."""
    top_p: Fraction = 1.0
    """Sample among the likeliest tokens of this total probability. Training needs 1."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in the place of full weights (extra `lora`)."""

    rank: Count = 0
    """Rank of the adapters; 0: all weights are trained."""
    alpha: Positive | None = None
    """Scale: the adapters' product is multiplied by alpha / rank; none: 2 x rank."""
    targets: tuple[str, ...] = ()
    """Names of the layers that get adapters; may be given several times; none: every linear layer but the head."""


@dataclass(frozen=True)
class VllmConfig:
    """The engine `vllm` (extra `vllm`)."""

    servers: tuple[str, ...] = ()
    """Addresses of running servers, http://HOST:PORT, as `python -m agents.serve` starts them; may be given several
    times; none: an engine of this run's own, on its device."""
    memory: Fraction = 0.4
    """Share of the GPU's memory for weights and keys and values of a colocated engine."""
    kv_gib: Positive = 1.0
    """GiB of keys and values where there is no GPU."""
    tensor_parallel: Natural = 1
    """GPUs that one colocated engine is spread over."""
    eager: bool = False
    """Without CUDA graphs: starts faster, decodes slower."""
    gap: Positive | None = None
    """Largest difference of log-probs that the check after each weight sync accepts; none: 1e-3 in float32, 0.25 in
    half precisions."""
    merge: bool = False
    """With --lora.rank: deliver whole weights with the adapters merged into them, instead of the adapters alone."""
    exchange: str | None = None
    """With servers: a folder that they see under the same name, where weights are written for them; none: this
    machine's folder for temporary files."""
    timeout_s: Positive = 600.0
    """With servers: seconds that one turn may take."""
    retries: Count = 3
    """With servers: further attempts after a lost connection, a time-out or a refusal for load."""


@dataclass(frozen=True)
class WorkerConfig:
    """A process that steps environments."""

    memory_gib: Positive = 2.0
    """GiB that it and the processes it starts may hold; above, it is ended and its episodes fail."""
    timeout_s: Positive = 60.0
    """Seconds that a step or reset may take; after that it is ended and its episodes fail."""
    ray: str | None = None
    """Address of a Ray cluster (`auto`: the one that this machine belongs to) whose nodes run the workers (extra
    `ray`); none: processes of this machine."""


@dataclass(frozen=True)
class AheadConfig:
    """Asynchronous rollouts, one step off: iteration k + 1 is played while k is learned."""

    on: bool = False
    """Off: play, then learn; the reference."""
    correction: Literal["tis", "mis", "none"] = "tis"
    """Importance weights pi_old / sampler, per token where the loss is: truncated at `cap` (tis), masked outside
    [1 / cap, cap] (mis), or none. A recipe that has some of its own keeps those."""
    cap: Positive = 2.0
    """Of the importance weights; at least 1."""
    staleness: Natural = 2
    """Iterations that a token's policy may be behind the one that learns from it. What is played ahead is 1 behind;
    an episode that a token budget cut off and that went on later holds older tokens. Trajectories with a token beyond
    this are dropped and counted."""


@dataclass(frozen=True)
class EvalConfig:
    """The evaluations before and after training."""

    episodes: Natural = 500
    """Held-out tasks, one episode each."""
    hard_episodes: Count = 200
    """Held-out tasks of a harder level than was trained on; 0: no such row."""
    hard_level: str | None = "hard"
    """That level, as the environment names it; left out where the environment has none of the name."""
    every: Count = 0
    """Iterations between small evaluations during training; 0: none."""
    every_episodes: Natural = 100
    """Episodes of a small evaluation."""


@dataclass(frozen=True)
class SaveConfig:
    """What is kept while training."""

    every: Natural = 10
    """Iterations between checkpoints; the last iteration and an interruption always write one."""
    keep: Natural = 2
    """Checkpoints kept."""
    trajectories: Count = 5
    """Store the episodes of every so many iterations (and of the first and the last); 0: none."""
    eval_trajectories: Count = 100
    """Episodes of each evaluation to store beside them."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a language-model agent on an environment by policy optimization."""

    env: str = "tool_qa"
    """Environment: a name (python -m envs), package.module:Class, or jsonl:FILE."""
    env_args: tuple[str, ...] = ()
    """Arguments of the environment, NAME=VALUE; may be given several times."""
    reward: str | None = None
    """Reward function of a jsonl environment, module:function."""
    level: str | None = None
    """Difficulty to train and evaluate on; none: the environment's default mix."""
    model: str = "bundled"
    """Policy to start from: bundled, a run or model folder, or a Hugging Face id."""
    algo: str = "grpo"
    """Recipe (python -m policy_opt)."""
    set: tuple[str, ...] = ()
    """Change to the recipe, STAGE=PART(OPTION=VALUE); may be given several times."""
    seed: Count = 0
    """Every random stream of the run derives from it."""
    steps: Natural = 100
    """Iterations."""
    groups: Natural = 16
    """Tasks per iteration."""
    group_size: Natural = 8
    """Episodes per task."""
    train_tasks: Natural = 2000
    """Size of the pool of training tasks, with stable ids."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(warmup=5))
    """The policy's optimizer."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How episodes are played."""
    engine: Literal["hf", "vllm"] = "hf"
    """What samples: hf, the trainable model itself; vllm, an engine of its own that gets the weights after each
    update."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """The engine vllm."""
    workers: Count = 0
    """Processes that step environments, over all processes of the run; 0: environments live in the run's own, which
    is faster below a millisecond a step."""
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    """Each of them."""
    ahead: AheadConfig = field(default_factory=AheadConfig)
    """Asynchronous rollouts."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""
    warm: WarmConfig = field(default_factory=WarmConfig)
    """The warm start."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluations."""
    save: SaveConfig = field(default_factory=SaveConfig)
    """Checkpoints and stored episodes."""
    micro_tokens: Natural | None = None
    """Tokens of a training micro-batch, padding included; none: 1,024 for tiny models, else 8,192."""
    packing: Literal["auto", "always", "never"] = "auto"
    """Rows of a micro-batch end to end without padding; auto: where the model can and it saves work."""
    recompute: bool = False
    """Gradient checkpointing: activations are computed again in the backward pass; less memory, a third more time."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Weights. bfloat16: float32 weights, computed with in bfloat16 where the device can."""
    threads: Natural | None = None
    """Threads per process; none: 1 for tiny models (below 20 million parameters), else torch's choice."""
    processes: Natural | None = None
    """Processes of this machine that share episodes and rows; none: 2 for the bundled model where there are two cores,
    else 1. Left out where accelerate launch starts them (docs/scaling.md)."""
    peer_timeout_s: Positive = 1800.0
    """Seconds that a process waits for the others, when they start and in every message, before the run ends with an
    error; more than their rollouts may differ by."""
    run: str | None = None
    """Folder of the run; none: a new one under `runs`."""
    runs: str = "runs"
    """Where new run folders go."""
    resume: str | None = None
    """Go on with this run, exactly where its last checkpoint stands. Takes no other options but steps."""
    from_step: Count | None = None
    """With resume: the checkpoint of this step instead of the last one."""
    dry_run: bool = False
    """Print tokens, memory and time to expect, and stop."""
    json: bool = False
    """End with one line of JSON: success_before, success_after, run, report."""
    plain: bool = False
    """Plain lines instead of the live display."""
