"""Where an agent acts: `ChatEnv`, a registry of environments, and a checker of the whole contract.

env = envs.make("tool_qa")          # or gymnasium.make("palaestra/ToolQA-v0")
obs, info = env.reset(seed=7)
obs, reward, terminated, truncated, info = env.step('<tool_call>{"name": ...}</tool_call>')
"""

from envs import siblings

siblings.verify()

from envs.checker import Report, check  # noqa: E402
from envs.contract import CheckError  # noqa: E402
from envs.core import ChatEnv, Message, Reply, Task, Verdict, fingerprint  # noqa: E402
from envs.registry import (  # noqa: E402
    EnvConflict,
    UnknownEnv,
    list_envs,
    make,
    register_with_gymnasium,
    resolve,
)

register_with_gymnasium()

__all__ = [
    "ChatEnv",
    "CheckError",
    "EnvConflict",
    "Message",
    "Reply",
    "Report",
    "Task",
    "UnknownEnv",
    "Verdict",
    "check",
    "fingerprint",
    "list_envs",
    "make",
    "resolve",
]
