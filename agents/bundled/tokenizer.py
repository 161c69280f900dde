"""The byte-level BPE tokenizer of the bundled model, built so that copying is plain.

A name is cut the same way wherever it stands: capitalised words and digits never take a leading space along.
Only lower-case words do, as one more merge on top of the word's own tokens: " mentor" is "mentor" with a
space, never another cut.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from agents.bundled.chat import END, PLAIN_TAGS, START, STOP, TEMPLATE

VOCABULARY = 1280
WORD_TOKENS = 1060
MAX_LENGTH = 2048
COMMON = (
    "lookup entity attribute calculator search query expression name arguments result error value "
    "answer question what which who where when how many much more less than older younger larger "
    "smaller higher lower sum total difference between altogether together both and or of the is in at "
    "by to from for live lives born work works "
)
_SPACE = "Ġ"
# Punctuation and spaces run up to the next letter or digit, less a space that a lower-case word takes along;
# lengths are bounded so that hostile text costs linear time.
_REST = r"'s(?![A-Za-z])|[A-Z][a-z]{0,31}|\d|[^A-Za-z\d]{1,16}?(?= [a-z]|[A-Za-z\d])|[^A-Za-z\d]{1,16}"
_FINAL = r" ?[a-z]{1,32}|" + _REST
_TRAINING = r"[a-z]{1,32}|" + _REST


def _pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of `VOCABULARY` entries from sample texts (without special tokens in them)."""
    texts = list(texts)
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = _pre_tokenizer(_TRAINING)
    base.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=WORD_TOKENS,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    state = _state(base)
    merges = [tuple(m) for m in state["merges"]]
    vocabulary = dict(state["vocab"])
    for token in _spaced(base, texts)[: VOCABULARY - WORD_TOKENS - 3 - len(PLAIN_TAGS)]:
        merges.append((_SPACE, token))
        vocabulary[_SPACE + token] = len(vocabulary)
    final = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    final.pre_tokenizer = _pre_tokenizer(_FINAL)
    final.decoder = decoders.ByteLevel()
    final.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (END, START, STOP)])
    final.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN_TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=final,
        eos_token=STOP,
        pad_token=END,
        additional_special_tokens=[START],
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one token of the vocabulary."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def without_tags(text: str) -> str:
    """`text` without special tokens and plain tags, which are never cut and so need no merges."""
    for tag in (END, START, STOP, *PLAIN_TAGS):
        text = text.replace(tag, "")
    return text


def _state(tokenizer: Tokenizer) -> dict:
    return json.loads(tokenizer.to_str())["model"]


def _spaced(base: Tokenizer, texts: list[str]) -> list[str]:
    """First tokens of lower-case words that follow a space, most frequent first."""
    counts: Counter[str] = Counter()
    for encoding in base.encode_batch(texts):
        tokens = encoding.tokens
        for before, token in pairwise(tokens):
            if before == _SPACE and token[0].islower() and token[0].isascii():
                counts[token] += 1
    return [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
