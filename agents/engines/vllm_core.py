"""The process that holds vLLM: `python -m agents.engines.vllm_core FD`, started by `agents.engines.vllm`.

It answers calls that come over a connection, one after the other, and does nothing in between: what vLLM batches
together is then a function of the calls, not of the clock. It ends when the other side of the connection is gone.

A process of its own, because vLLM seeds global generators, sets thread counts and joins process groups, and because
an engine that crashes must not take the trainer along.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any


@dataclass(frozen=True)
class Convention:
    """What holds for every turn."""

    top_k: int
    top_p: float
    stop_ids: tuple[int, ...]
    banned_ids: tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """One turn to sample."""

    name: str
    """Of the request, unique."""
    ids: tuple[int, ...]
    """The whole row so far, one placeholder per picture."""
    seed: int
    """Of its random stream."""
    budget: int
    """Tokens at most."""
    temperature: float
    """0: the likeliest token."""
    pictures: tuple[int, ...] = ()
    """Names of the row's pictures, in order; `Core.show` brought them."""


Done = tuple[str, list[int], list[float], list[int]]
"""A finished turn: its name, ids and their log-probs, and the prompt with its pictures' placeholders expanded."""


class Core:
    """vLLM's offline engine and the calls that are answered."""

    def __init__(self, options: Mapping[str, Any], convention: Convention):
        from vllm import LLM

        if "limit_mm_per_prompt" in options:
            _import_torchvision()
        self.llm = LLM(**options)
        self.convention = convention
        self.adapter: Any = None
        self.images: dict[int, Any] = {}

    def show(self, images: Mapping[int, Any]) -> None:
        """Take pictures, PIL images by name, that turns ask for; kept until the next `forget`."""
        self.images |= images

    def turns(self, turns: Sequence[Turn], dropped: Sequence[str]) -> list[Done]:
        """Admit turns, drop others, and step until at least one turn is over; [] if there is none to finish."""
        engine = self.llm.llm_engine
        engine.abort_request(list(dropped))
        for turn in turns:
            prompt = self._prompt(turn.ids, turn.pictures)
            engine.add_request(turn.name, prompt, self._params(turn), lora_request=self.adapter)
        done: list[Done] = []
        while not done and engine.has_unfinished_requests():
            done = [_done(out) for out in engine.step() if out.finished]
        return done

    def _prompt(self, ids: Sequence[int], pictures: Sequence[int]) -> Any:
        """What vLLM is fed. It keeps what it computed of a picture, and of all that follows, under the name."""
        prompt: dict[str, Any] = {"prompt_token_ids": list(ids)}
        if pictures:
            prompt["multi_modal_data"] = {"image": [self.images[name] for name in pictures]}
            prompt["multi_modal_uuids"] = {"image": [str(name) for name in pictures]}
        return prompt

    def _params(self, turn: Turn) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        how = self.convention
        params = SamplingParams(
            temperature=turn.temperature, top_k=how.top_k, top_p=how.top_p, seed=turn.seed, max_tokens=turn.budget,
            stop_token_ids=list(how.stop_ids), ignore_eos=True, logprobs=0, flat_logprobs=True, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        if how.banned_ids:  # minus infinity, exactly: what the OpenAI protocol's range of -100 to 100 cannot say
            params.logit_bias = dict.fromkeys(how.banned_ids, float("-inf"))
        return params

    def log_probs(self, ids: Sequence[int], pictures: Sequence[int]) -> list[float]:
        """Log-prob of each id but the first, placeholders expanded; never from kept keys and values."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        prompt = self._prompt(ids, pictures)
        out = self.llm.generate([prompt], params, use_tqdm=False, lora_request=self.adapter)[0]
        return _flat(out.prompt_logprobs)[1:]

    def load(self, folder: str) -> None:
        """Take weights from a folder, and drop keys and values of the old ones."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self.forget()

    def adapt(self, folder: str, number: int) -> None:
        """Sample with the adapter of a folder in the place of the last one; every `number` is another adapter's."""
        from vllm.lora.request import LoRARequest

        if self.adapter is not None:
            self.llm.llm_engine.remove_lora(self.adapter.lora_int_id)
        self.adapter = LoRARequest(f"version-{number}", number, folder)
        self.forget()

    def forget(self) -> None:
        """Drop all turns and pictures, and all that was computed and kept for later prompts."""
        engine = self.llm.llm_engine
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
        while engine.has_unfinished_requests():
            engine.step()
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not let go of keys and values of older weights")
        engine.reset_encoder_cache()  # what older weights made of pictures
        self.images = {}

    def rpc(self, method: str, *arguments: Any) -> list[Any]:
        """A method of vLLM's workers."""
        return self.llm.collective_rpc(method, args=arguments)


def _import_torchvision() -> None:
    """RuntimeError where vLLM could not read pictures; it would say only that it cannot inspect the model."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # a build for another torch raises the latter
        first = str(error).strip().split("\n")[0]
        raise RuntimeError(
            f"it reads pictures with torchvision, which cannot be imported ({first}): install the build that goes "
            f"with its torch, pip install torchvision"
        ) from error


def _done(out: Any) -> Done:
    """A finished request as plain values; RuntimeError where vLLM gave it up."""
    (sampled,) = out.outputs
    if sampled.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a turn with {sampled.finish_reason!r}")
    return out.request_id, list(sampled.token_ids), _flat(sampled.logprobs), list(out.prompt_token_ids)


def _flat(logprobs: Any) -> list[float]:
    """The log-prob of each position's own token, which vLLM writes first; NaN where a position has none."""
    places = zip(logprobs.start_indices, logprobs.end_indices, strict=True)
    return [logprobs.logprobs[start] if start < end else float("nan") for start, end in places]


def serve(connection: Connection) -> None:
    """Answer calls `(method, arguments)` with `(True, result)` or `(False, what went wrong)` until nobody listens."""
    core: Any = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            if core is None:
                core, result = Core(*arguments), None
            else:
                result = getattr(core, method)(*arguments)
            reply = (True, result)
        except Exception as error:  # the other side decides what it means
            reply = (False, f"{type(error).__name__}: {str(error).strip()}")
        try:
            connection.send(reply)
        except BrokenPipeError:
            return


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
