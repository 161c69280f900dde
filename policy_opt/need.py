"""Needs: what a part asks of the model side, as data.

A need is a quantity of a named model under a named view at a named time. The learner computes equal needs
once, and reduces whatever has the size of the vocabulary chunk by chunk; a part never sees a `[B, T, V]`
tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

When = Literal["rollout", "step", "loss"]
Where = Literal["actions", "prompt", "all"]


# -- what: functionals of the model at a token ---------------------------------------------------------------


@dataclass(frozen=True)
class LogProb:
    """log p(token t | tokens before it), under the sampler's convention (temperature, banned ids): [B, T]."""


@dataclass(frozen=True)
class Entropy:
    """Entropy in nats of the distribution that token t was drawn from, -sum p log max(p, floor): [B, T]."""

    floor: float = 0.0
    """Lower bound of the logarithm's argument; 0: none."""


@dataclass(frozen=True)
class TopKLogProb:
    """The k largest log-probs of that distribution, descending: [B, T, k]."""

    k: int


@dataclass(frozen=True)
class TopKIds:
    """The token ids that go with TopKLogProb(k), int64: [B, T, k]."""

    k: int


@dataclass(frozen=True)
class KLTo:
    """Exact KL(need's model || other) over the vocabulary, both under the need's view: [B, T]."""

    model: str


@dataclass(frozen=True)
class Hidden:
    """Hidden state that predicts token t, from the given layer (-1 = last): [B, T, D]."""

    layer: int = -1


@dataclass(frozen=True)
class Value:
    """Value of the state before token t, from a model with a value head: [B, T]."""


What = LogProb | Entropy | TopKLogProb | TopKIds | KLTo | Hidden | Value
SHAPE: dict[type, str] = {
    LogProb: "BT",
    Entropy: "BT",
    TopKLogProb: "BTK",
    TopKIds: "BTK",
    KLTo: "BT",
    Hidden: "BTD",
    Value: "BT",
}
"""Suffix that the name of a need must have."""


# -- views: which text or image the model is shown -----------------------------------------------------------


@dataclass(frozen=True)
class Same:
    """The very tokens of the batch."""


@dataclass(frozen=True)
class MaskedImage:
    """The same tokens, every image with patches of `size` pixels blackened with probability `p`."""

    size: int = 14
    p: float = 0.5


@dataclass(frozen=True)
class OtherPrompt:
    """The same policy tokens after another prompt (`kind`: hint, rubric, teacher, ...): privileged text."""

    kind: str


@dataclass(frozen=True)
class Probe:
    """The row's text up to each turn's end with `text` appended; entries speak of the probe's tokens."""

    text: str


@dataclass(frozen=True)
class Mismatched:
    """Each row's prompt with the policy tokens of the row `shift` places before it: `Batch.mismatched(shift)`.

    Entries stand where those tokens stand in their own row.
    """

    shift: int = 1


View = Same | MaskedImage | OtherPrompt | Probe | Mismatched


class Need(NamedTuple):
    """A quantity, and the column or stream that it is known by."""

    name: str
    """Column (when = rollout, step) or stream (when = loss); its suffix is SHAPE[type(what)]."""
    what: What
    model: str = "policy"
    """A model of the bank."""
    view: View = Same()
    when: When = "rollout"
    """rollout: once after the rollout; step: before each optimizer step with its weights; loss: with
    gradient.
    """
    where: Where = "actions"
    """actions: entries outside mask_BT are 0; prompt: outside the opening prompt; all: every real token."""

    @property
    def quantity(self) -> tuple[What, str, View, Where]:
        """What two equal needs share: computed once even under two names."""
        return self.what, self.model, self.view, self.where


LOGP = Need("logp_BT", LogProb(), when="loss")
"""Log-probs of the sampled tokens under the policy that is being trained: the stream of most losses."""
LOGP_OLD = Need("logp_old_BT", LogProb())
"""Log-probs under the policy that stood at the start of the iteration."""
LOGP_REF = Need("logp_ref_BT", LogProb(), model="ref")
ENTROPY = Need("entropy_BT", Entropy(), when="loss")
ENTROPY_OLD = Need("entropy_old_BT", Entropy())
"""Entropies under the policy that stood at the start of the iteration: a constant."""
ENTROPY_NOW = Need("entropy_now_BT", Entropy(), when="step")
"""Entropies under the weights that the optimizer step starts from: a constant."""
VALUES = Need("values_BT", Value(), model="critic", when="loss")
VALUES_OLD = Need("values_old_BT", Value(), model="critic")
