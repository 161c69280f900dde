"""The whole loop in the open: GRPO on tool_qa with the bundled model, without the parts that make it general.

    python docs/flat_loop.py [ITERATIONS]

`agents.train` does the same through `policy_opt.loop`, and adds what a run needs: a warm start, evaluation,
any recipe, micro-batches, checkpoints, several processes, a report. Suffixes are shapes: B episodes, T
tokens, V words.
"""

from __future__ import annotations

import sys

import torch

import envs
from agents import bundled
from agents.batching import batch_of
from agents.chat import ChatFormat
from agents.engines.base import SampleParams
from agents.engines.hf import HFEngine
from agents.rollout import Limits, play
from policy_opt.protocols import Job

GROUPS, MEMBERS, CLIP, LR, SEED = 8, 8, 0.2, 3e-4, 0

torch.set_num_threads(1)  # tiny matrices: a second thread only waits
model, tokenizer = bundled.load()
chat = ChatFormat(tokenizer, vocab_size=model.config.vocab_size)
params = SampleParams(max_new_tokens=64)
engine = HFEngine(model, stop_ids=chat.stop_ids, banned_ids=chat.banned_ids, params=params)
banned_W = torch.tensor(sorted(chat.banned_ids))
optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
limits = Limits(max_turns=8, max_new_tokens=64, max_context=512)

for iteration in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
    # Rollout: MEMBERS episodes from the same start state for each of GROUPS tasks, all in one batch.
    jobs = [
        Job(task_index=group, group=group, member=member)
        for group in range(iteration * GROUPS, (iteration + 1) * GROUPS)
        for member in range(MEMBERS)
    ]
    with torch.no_grad():
        episodes = play(jobs, lambda: envs.make("tool_qa"), chat, engine, limits, SEED, iteration)
    b = batch_of(episodes)  # the very tokens that were sampled, with the sampler's log-probs

    # Advantage: reward against the mean and spread of the episode's own group.
    reward_GM = b["reward_B"].view(GROUPS, MEMBERS)  # the jobs stand group by group
    adv_GM = (reward_GM - reward_GM.mean(1, keepdim=True)) / (reward_GM.std(1, keepdim=True) + 1e-6)
    adv_B1 = adv_GM.reshape(-1, 1)

    # Log-probs of the sampled tokens by the sampler's convention: ids that may not be sampled are masked.
    logits_BTV = model(b.tokens_BT).logits[:, :-1].index_fill(2, banned_W, -torch.inf)
    logp_BT = torch.zeros_like(b.logp_sampler_BT)
    logp_BT[:, 1:] = logits_BTV.log_softmax(2).gather(2, b.tokens_BT[:, 1:, None]).squeeze(2)
    logp_BT = torch.where(b.mask_BT, logp_BT, 0.0)  # tokens of the environment are not the policy's
    gap = (logp_BT - b.logp_sampler_BT).abs().max().item()

    # Loss: clipped ratio, mean over the tokens of an episode, then over episodes.
    ratio_BT = (logp_BT - logp_BT.detach()).exp()
    loss_BT = -torch.minimum(adv_B1 * ratio_BT, adv_B1 * ratio_BT.clamp(1 - CLIP, 1 + CLIP))
    length_B = b.mask_BT.sum(1).clamp(min=1)
    loss = ((loss_BT * b.mask_BT).sum(1) / length_B).mean()

    # Update.
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    engine.version = iteration + 1
    reward = reward_GM.mean().item()
    print(f"iteration {iteration + 1}: reward {reward:.3f}, gradient {norm:.3f}, log-prob gap {gap:.1e}")
