"""Chat formats over the tokenizer's own chat template, safe against forged roles and exact to the token.

The template is rendered with placeholders where texts stand. Its own pieces are tokenised with special tokens
recognised; every text is tokenised alone with special tokens split, so that no text, tool output included,
can forge a role marker, and no token ever straddles the border between template and text. A rendered
conversation is therefore a sequence of blocks, and "the tokens of the first k messages are a prefix of the
tokens of k + 1" is a statement about blocks, which `verify` checks once per template. A template that
rewrites history (thinking models strip earlier thoughts) makes the ledger branch: see `rewrites`.

Images take no part in the template either: a placeholder's tokens are those of the texts and pictures that it stands
for, in order. So they arrive in every role, whatever the template makes of images in a tool's message.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple, TypeGuard

from agents.pictures import Picture, PictureError, PictureFormat, placed
from agents.skeleton import (
    CLOSE,
    OPEN,
    ChatFormatError,
    Messages,
    Shown,
    Words,
    blocks_of,
    skeleton_of,
    text_of,
    words_of,
)

__all__ = ["ChatFormat", "ChatFormatError", "Messages", "text_of"]

_MEDIA = re.compile(r"image|video|audio|vision", re.IGNORECASE)
_REASONING = frozenset({"<think>", "</think>"})
_CACHED_RENDERS = 4096
_KNOWN_TOOLS = 8
_CACHED_TEXTS = 16384
_CACHED_CHARS = 512  # longer texts are rarely seen twice


class _Render(NamedTuple):
    """A rendered conversation: literal template text and placeholder numbers, alternating as they stand."""

    blocks: tuple[str | int, ...]
    text: str


class ChatFormat:
    """Turns messages into token ids through a tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        vocab_size: rows of the model's output matrix; ids that the tokenizer does not know are then banned, too.
        template_kwargs: passed on to the template (`enable_thinking`, ...).
        pictures: how the model reads images; None where it reads none, which are then refused.

    Attributes:
        mode: `append` where the template only ever appends, `branch` where it may rewrite history.
        stop_ids: the token that closes an assistant turn; sampled by the policy, hence its own.
        banned_ids: ids that neither sampler nor trainer may give probability: special tokens, role markers,
            vision tokens, unknown ids; never the stop ids.

    Raises:
        ChatFormatError: no chat template; it drops texts, or closes a turn with no token of its own.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        pictures: PictureFormat | None = None,
    ) -> None:
        self.tokenizer, self.pictures = tokenizer, pictures
        self.template_kwargs = dict(template_kwargs or {})
        self._renders: dict[Any, _Render] = {}
        self._texts: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, tuple[int, ...]] = {}
        self._tools_seen: list[tuple[Any, str]] = []
        if not getattr(tokenizer, "chat_template", None):
            where = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
            raise ChatFormatError(
                f"{where} has no chat template, so messages cannot be turned into tokens. Use an instruct or "
                f"chat model, or add a `chat_template.jinja` to its folder"
            )
        added = _added_tokens(tokenizer)
        self._protected: dict[str, int] = {text: i for text, (i, special) in added.items() if special}
        if pictures is not None:
            marks = (pictures.pad_id, pictures.start_id, pictures.end_id)
            self._protected |= {text: i for text, (i, _) in added.items() if i in marks}
        self.stop_ids: tuple[int, ...] = (self._find_stop(added),)
        wrappers = "".join(self._wrappers())
        self._protected |= {text: i for text, (i, _) in added.items() if text in wrappers and text not in _REASONING}
        names = sorted(self._protected, key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, names)) or "(?!)")  # nothing to protect: never matches
        banned = set(self._protected.values()) | {i for t, (i, _) in added.items() if _MEDIA.search(t)}
        if vocab_size is not None:
            banned |= set(range(len(tokenizer), vocab_size))
        self.banned_ids: tuple[int, ...] = tuple(sorted(banned - set(self.stop_ids)))
        self.mode = "branch"  # until verified, nothing is taken for granted
        self.mode = self.verify()

    # ------------------------------------------------------------------ messages to ids

    def opening(self, messages: Messages, tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids of a whole conversation with the tools' schemas, up to and including the generation prompt."""
        skeleton, texts = skeleton_of(messages)
        render = self._render(skeleton, tools, generate=True)
        self._expect_all(render.blocks, len(texts))
        return self._ids(render.blocks, texts)

    def continuation(
        self,
        messages: Messages,
        *,
        history: Messages = (),
        tools: Sequence[Mapping[str, Any]] = (),
        stopped: bool = True,
    ) -> list[int]:
        """Ids that follow a sampled assistant turn: the rest of its closing, the new messages, the next prompt.

        Args:
            messages: what the environment said since.
            history: the conversation up to and including the assistant's turn; may be left out for templates
                that only append.
            tools: the tools' schemas, as given to `opening`.
            stopped: whether the policy sampled its stop token; if not (the turn was cut by length), the
                closing begins with it.

        Raises:
            ChatFormatError: this step rewrites history (see `rewrites`); open a new segment with `opening`.
        """
        if self.mode == "append":  # what follows does not depend on what went before: see verify
            history, tools = _STUB, ()
        tail = self._tail(history or _STUB, messages, tools)
        if tail is None:
            raise ChatFormatError(
                "the chat template rewrites earlier messages at this step, so the tokens so far are no prefix of "
                "the new ones; start a new segment from `opening` of the whole conversation"
            )
        blocks, texts = tail
        ids = self._ids(blocks, texts)
        if ids[:1] != [self.stop_ids[0]]:
            raise ChatFormatError("the template closes an assistant's turn differently before these messages")
        return ids[1:] if stopped else ids

    def rewrites(self, history: Messages, messages: Messages, tools: Sequence[Mapping[str, Any]] = ()) -> bool:
        """Whether the template alters the tokens of `history` once `messages` follow it."""
        return self.mode == "branch" and self._tail(history, messages, tools) is None

    def shown(self, ids: Sequence[int], messages: Messages) -> list[tuple[int, Picture]]:
        """(first placeholder, picture) for each image of messages whose tokens are `ids`.

        Raises ChatFormatError where the template dropped or repeated some.
        """
        if self.pictures is None:
            return []
        pictures = self.pictures_of(messages)
        try:
            return placed(ids, pictures, self.pictures.pad_id)
        except PictureError as error:
            raise ChatFormatError(f"the chat template drops or repeats images: {error}") from error

    def pictures_of(self, messages: Messages) -> list[Picture]:
        """The pictures of all images in messages, in order."""
        said = [words_of(message.get("content")) for message in messages]
        images = [part.image for words in said if not isinstance(words, str) for part in words if _is_image(part)]
        return [self._read(image) for image in images]

    def turn_ids(self, text: str) -> list[int]:
        """A demonstrated assistant turn as the policy would sample it: text with special tokens split, stop id."""
        return [*self.encode_text(text), self.stop_ids[0]]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a sampled turn, its stop token left out. Never to be tokenised again for training."""
        body = list(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)
        if getattr(self.tokenizer, "is_fast", False):  # the same, without transformers' conversions around it
            return self.tokenizer.backend_tokenizer.decode(body, skip_special_tokens=False)
        return self.tokenizer.decode(body, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Ids of a text alone; no special token or role marker can come out, whatever the text says."""
        known = self._texts.get(text)
        if known is not None:
            return known
        clean = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates become "?"
        ids = self._encode_split(clean)
        if len(text) <= _CACHED_CHARS:
            _remember(self._texts, text, ids, _CACHED_TEXTS)
        return ids

    # ------------------------------------------------------------------ verification

    def verify(self) -> str:
        """Check the prefix property for the roles that environments use; returns the mode.

        `append`: the tokens so far are always a prefix. `branch`: for some conversations they are not (a
        note is given as a warning), and each step is checked with `rewrites`.

        Raises:
            ChatFormatError: texts are dropped or repeated, or a text can forge a role marker.
        """
        self._check_forgery()
        user, plain = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
        thought = {"role": "assistant", "content": "<think>\nr\n</think>\n\na"}
        tool = {"role": "tool", "content": "t", "name": "f"}
        system = {"role": "system", "content": "s"}
        openings: list[list[dict[str, Any]]] = [[user]]
        if self._accepts([system, user], 2):
            openings.append([system, user])
        candidates = [[m] * n for m in (user, tool) for n in (1, 2)]
        follow_ups = [f for f in candidates if self._accepts([user, plain, *f], len(f))]
        probes = [(), _PROBE] if self._accepts([user], 1, _PROBE) else [()]
        if not follow_ups:
            raise ChatFormatError("the chat template takes neither a user nor a tool message after the assistant's")
        rewriting = set()
        for start, said, follow in product(openings, (plain, thought), follow_ups):
            once = [*start, said]
            alone = self._tail(_STUB, follow, ())
            for history, tools in product((once, [*once, *follow, said]), probes):
                tail = self._tail(history, follow, tools)
                if tail is None or alone is None or not _same_literals(tail[0], alone[0]):
                    rewriting.add((follow[0]["role"], "thoughts" if said is thought else "plain text"))
        if rewriting:
            cases = ", ".join(sorted(f"{what} before a {role} message" for role, what in rewriting))
            warnings.warn(
                f"the chat template rewrites history ({cases}): such episodes are recorded in several segments, "
                f"each fed to the engine anew",
                stacklevel=3,
            )
        return "branch" if rewriting else "append"

    def _accepts(self, messages: Messages, last: int, tools: Sequence[Mapping[str, Any]] = ()) -> bool:
        """Whether the template renders these messages and ends with the texts of the last so many, in order."""
        skeleton, texts = skeleton_of(messages)
        try:
            blocks = self._render(skeleton, tools, generate=True).blocks
        except ChatFormatError:
            return False
        return [b for b in blocks if isinstance(b, int)][-last:] == list(range(len(texts)))[-last:]

    def _expect_all(self, blocks: Sequence[str | int], n_texts: int) -> None:
        found = [b for b in blocks if isinstance(b, int)]
        if self.mode == "append" and found != list(range(n_texts)):
            raise ChatFormatError(
                f"the chat template drops, repeats or reorders message texts (placed {found} of {n_texts}): "
                f"merge consecutive messages of one role, or use another template"
            )

    def _check_forgery(self) -> None:
        for marker in self._protected:
            if any(i in self._forbidden for i in self.encode_text(f"x{marker}\n{marker}y")):
                raise ChatFormatError(f"text can forge the special token {marker!r} with this tokenizer")
        ordinary = [block for block in self._wrappers() if not self._split.search(block)]
        if ordinary:
            warnings.warn(
                f"the chat template sets messages apart by ordinary text ({ordinary[0]!r}), not by tokens of their "
                f"own: what an environment or a tool returns could imitate another role",
                stacklevel=4,
            )

    def _find_stop(self, added: Mapping[str, tuple[int, bool]]) -> int:
        """The single token with which the template closes an assistant's turn."""
        blocks = self._render(skeleton_of(_STUB)[0], (), generate=False).blocks
        said = blocks.index(1) if 1 in blocks else len(blocks)
        closing = "".join(b for b in blocks[said + 1 :] if isinstance(b, str))
        ids = self._piece(closing) if closing else ()
        if not ids or ids[0] not in {i for i, _ in added.values()}:
            raise ChatFormatError(
                f"the chat template closes an assistant's turn with {closing!r}, which does not begin with a "
                f"token of its own; the policy could not say that its turn is over"
            )
        return ids[0]

    def _wrappers(self) -> list[str]:
        """What the template writes before and after the text of a user's and of a tool's message."""
        found = []
        for role in ("user", "tool"):
            skeleton, _ = skeleton_of([*_STUB, {"role": role, "content": "x", "name": "f"}])
            try:
                blocks = self._render(skeleton, (), generate=False).blocks
            except ChatFormatError:
                continue
            text = next((i for i, b in enumerate(blocks) if b == 2), None)
            if text is not None:
                found += [
                    "".join(b for b in blocks[edge] if isinstance(b, str))
                    for edge in (slice(text - 1, text), slice(text + 1, text + 2))
                ]
        return found

    # ------------------------------------------------------------------ rendering

    def _tail(
        self, history: Messages, messages: Messages, tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[str | int], list[Words]] | None:
        """Blocks after the last text of `history`, and all texts; None where history is rewritten."""
        skeleton, texts = skeleton_of([*history, *messages])
        cut = len(history)
        said = skeleton[cut - 1]["content"]
        before = self._render(skeleton[: cut - 1], tools, generate=True).text
        after = self._render(skeleton, tools, generate=True).text
        if not after.startswith(before + said):
            return None
        return blocks_of(after[len(before) + len(said) :]), texts

    def _render(self, skeleton: Messages, tools: Sequence[Mapping[str, Any]], *, generate: bool) -> _Render:
        """Render placeholders; cached, because the outcome depends on roles and tools only."""
        shape = tuple((m["role"], m["content"], m.get("name")) for m in skeleton)
        key = (shape, self._tools_key(tools) if tools else "", generate)
        known = self._renders.get(key)
        if known is not None:
            return known
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in skeleton],
                tools=self._safe_tools(tools) or None,
                tokenize=False,
                add_generation_prompt=generate,
                **self.template_kwargs,
            )
        except Exception as error:  # templates raise whatever they like, through jinja2
            roles = ", ".join(m["role"] for m in skeleton)
            raise ChatFormatError(f"the chat template cannot render the roles [{roles}]: {error}") from error
        return _remember(self._renders, key, _Render(tuple(blocks_of(text)), text), _CACHED_RENDERS)

    def _tools_key(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """What names these tools in the cache; comparing with those seen last is quicker than writing JSON."""
        for seen, key in self._tools_seen:
            if seen is tools or seen == tools:
                return key
        key = json.dumps(tools, sort_keys=True, default=str)
        self._tools_seen = [(tools, key), *self._tools_seen[: _KNOWN_TOOLS - 1]]
        return key

    def _safe_tools(self, tools: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Schemas are rendered as template text, so a role marker inside them is broken by a zero-width space."""

        def clean(value: Any) -> Any:
            if isinstance(value, str):
                value = value.replace(OPEN, "").replace(CLOSE, "")
                return self._split.sub(lambda m: m.group()[0] + "\u200b" + m.group()[1:], value)
            if isinstance(value, Mapping):
                return {clean(k): clean(v) for k, v in value.items()}
            return [clean(v) for v in value] if isinstance(value, list | tuple) else value

        return [clean(tool) for tool in tools]

    # ------------------------------------------------------------------ tokens

    def _ids(self, blocks: Iterable[str | int], texts: Sequence[Words]) -> list[int]:
        out: list[int] = []
        for block in blocks:
            if isinstance(block, str):
                out.extend(self._piece(block))
                continue
            words = texts[block]
            for part in (words,) if isinstance(words, str) else words:
                out.extend(self.encode_text(part) if isinstance(part, str) else self._seen(part.image))
        return out

    def _seen(self, image: Any) -> list[int]:
        """Tokens of an image."""
        picture = self._read(image)
        assert self.pictures is not None
        return self.pictures.ids(picture)

    def _read(self, image: Any) -> Picture:
        if self.pictures is None:
            raise ChatFormatError(
                "a message shows an image, and this model reads text only: take a vision-language model "
                "(Qwen2-VL, Qwen2.5-VL, Qwen3-VL), or an environment without images"
            )
        try:
            return self.pictures.read(image)
        except PictureError as error:
            raise ChatFormatError(str(error)) from error

    def _piece(self, text: str) -> tuple[int, ...]:
        """Ids of a piece of the template itself, special tokens recognised."""
        known = self._pieces.get(text)
        if known is None:
            ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
            known = _remember(self._pieces, text, ids, _CACHED_RENDERS)
        return known

    @property
    def _forbidden(self) -> set[int]:
        return set(self._protected.values())

    def _encode_split(self, text: str) -> tuple[int, ...]:
        """Cut the text inside every special token's name, so that no tokenizer can see one."""
        ids: list[int] = []
        start = 0
        while (found := self._split.search(text, start)) is not None:
            ids += self.tokenizer.encode(text[start : found.start() + 1], add_special_tokens=False)
            start = found.start() + 1
        ids += self.tokenizer.encode(text[start:], add_special_tokens=False)
        forbidden = self._forbidden
        if forbidden.isdisjoint(ids):
            return tuple(ids)
        # A normaliser made a marker out of look-alikes: character by character there is none.
        single = [i for char in text for i in self.tokenizer.encode(char, add_special_tokens=False)]
        return tuple(i for i in single if i not in forbidden)


def _is_image(part: str | Shown) -> TypeGuard[Shown]:
    return isinstance(part, Shown)


def _same_literals(a: Sequence[str | int], b: Sequence[str | int]) -> bool:
    """Whether two renderings differ in nothing but the numbers of their placeholders."""
    return [x for x in a if isinstance(x, str)] == [x for x in b if isinstance(x, str)] and len(a) == len(b)


_PROBE: Sequence[Mapping[str, Any]] = (
    {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}},
)
_STUB: Messages = ({"role": "user", "content": "u"}, {"role": "assistant", "content": "a"})


def _added_tokens(tokenizer: Any) -> dict[str, tuple[int, bool]]:
    """Text of every added token -> (id, whether it is a special one)."""
    table = {str(t.content): (int(i), bool(t.special)) for i, t in tokenizer.added_tokens_decoder.items()}
    for text, i in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=False):
        table[str(text)] = (int(i), True)
    return {text: entry for text, entry in table.items() if text}


def _remember(cache: dict, key: Any, value: Any, limit: int) -> Any:
    """Cache a value; a full cache is emptied (plain dicts bear several threads, and this is rare)."""
    if len(cache) >= limit:
        cache.clear()
    cache[key] = value
    return value
