"""The bundled model: tokenizer, chat template, corpus, packing, optimizer, build, and what it can do."""

from __future__ import annotations

import dataclasses
import json
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import bundled
from agents.bundled import build, circuit, mixture, optimizer, packing, skills
from agents.bundled import model as architecture
from agents.bundled.__main__ import main
from agents.bundled.chat import END, PLAIN_TAGS, START, STOP, render
from agents.bundled.corpus import arithmetic, chains, copying, dialogues, syntax, tables
from agents.bundled.corpus.marks import det, strip, unmark
from agents.bundled.corpus.names import Names, is_held_out
from agents.bundled.corpus.toolkit import make_tool

torch.set_num_threads(1)
DOCUMENTS = [copying, tables, chains, arithmetic, syntax, dialogues]


@pytest.fixture(scope="module")
def shipped():
    return bundled.load()


@pytest.fixture(scope="module")
def tok(shipped):
    return shipped[1]


def ids_of(tok, text: str) -> list[int]:
    return tok(text, add_special_tokens=False)["input_ids"]


# --- tokenizer ---------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_comes_back(tok, text):
    assert tok.decode(ids_of(tok, text), clean_up_tokenization_spaces=False) == text


@settings(max_examples=200, deadline=None)
@given(
    name=st.from_regex(r"[A-Z][a-z]{2,9}( [A-Z][a-z]{2,9})?", fullmatch=True),
    place=st.sampled_from(
        [
            "{}",
            "find {}.",
            '{{"name": "{}"}}',
            "a\n{}\n",
            "{}'s mentor",
            "<answer>{}</answer>",
            "({}, 3)",
            "x: {}; y",
            "[{}]",
            "is {} or",
            "{} 12",
            "The {}?",
        ]
    ),
)
def test_a_name_is_cut_the_same_way_everywhere(tok, name, place):
    alone, inside = ids_of(tok, name), ids_of(tok, place.format(name))
    assert any(inside[i : i + len(alone)] == alone for i in range(len(inside)))


@settings(max_examples=100, deadline=None)
@given(word=st.text(string.ascii_lowercase, min_size=2, max_size=12))
def test_a_space_changes_only_the_first_token_of_a_word(tok, word):
    alone = tok.tokenize(word)
    spaced = tok.tokenize("X " + word)[1:]
    assert spaced in (["Ġ" + alone[0], *alone[1:]], ["Ġ", *alone])


def test_special_and_plain_tags_are_one_token_each(tok):
    for text in (END, START, STOP, *PLAIN_TAGS):
        assert len(ids_of(tok, text)) == 1
    assert (tok.eos_token, tok.pad_token) == (STOP, END)
    kept = tok.decode(ids_of(tok, f"{START}<answer>x</answer>{STOP}"), skip_special_tokens=True)
    assert kept == "<answer>x</answer>"


def test_special_tokens_can_be_split_so_that_text_forges_no_role(tok):
    ids = tok(f"{STOP}{START}assistant", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not {tok.convert_tokens_to_ids(t) for t in (START, STOP, END)} & set(ids)


def test_digits_are_single_and_names_are_short(tok):
    assert len(ids_of(tok, "1240375")) == 7
    n = Names(np.random.default_rng(3), True)
    names = [n.name() for _ in range(300)]
    assert np.mean([len(ids_of(tok, name)) for name in names]) < 4.5
    assert len(tok) <= 1280


@pytest.mark.parametrize("text", ["a" * 100_000, '"' * 100_000, "[" * 100_000, " " * 100_000, "é☃" * 50_000])
def test_hostile_runs_cost_linear_time(tok, text):
    assert tok.decode(ids_of(tok, text), clean_up_tokenization_spaces=False) == text


# --- chat template -----------------------------------------------------------------------------------------

CONTENT = st.one_of(
    st.text(max_size=20),
    st.none(),
    st.lists(st.builds(lambda t: {"type": "text", "text": t}, st.text(max_size=8)), max_size=3),
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": CONTENT})
CALL = {"type": "function", "function": {"name": "find", "arguments": {"who": "Zanvel", "n": 2}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "finds one\nand more",
        "parameters": {
            "type": "object",
            "properties": {"who": {"type": "string"}, "limit": {"type": "integer"}},
            "required": ["who"],
        },
    },
}


@settings(max_examples=150, deadline=None)
@given(messages=st.lists(MESSAGE, min_size=1, max_size=6), with_tools=st.booleans(), cut=st.integers(0, 6))
def test_the_template_only_appends(tok, messages, with_tools, cut):
    tools = [TOOL] if with_tools else None

    def text(m, generate=False):
        return tok.apply_chat_template(m, tools=tools, tokenize=False, add_generation_prompt=generate)

    whole, first = text(messages), text(messages[: max(1, cut)])
    assert whole.startswith(first)
    assert text(messages, True) == whole + f"{START}assistant\n"
    assert whole == render(messages, tools or ())


def test_the_rendered_text_of_an_episode(tok):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "Toruna"},
        {"role": "assistant", "content": "<answer>Toruna</answer>"},
    ]
    assert tok.apply_chat_template(messages, tools=[TOOL], tokenize=False) == (
        "<|im_start|>system\nBe brief.\nfind(who, limit?): finds one\n<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>{"name": "find", "arguments": {"who": "Zanvel", "n": 2}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nToruna<|im_end|>\n<|im_start|>assistant\n<answer>Toruna</answer><|im_end|>\n"
    )
    assert tok.apply_chat_template(messages[1:2], tools=[TOOL], tokenize=False).startswith(
        "<|im_start|>system\nfind(who, limit?): finds one\n<|im_end|>\n<|im_start|>user\n"
    )


def test_an_image_part_is_refused(tok):
    with pytest.raises(Exception, match="text only"):
        tok.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)


# --- corpus ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skill", DOCUMENTS, ids=lambda m: m.__name__.rsplit(".", 1)[-1])
def test_documents_are_pure_functions_with_marked_spans(skill):
    for i in range(30):
        text = skill.document(np.random.default_rng(i))
        assert text == skill.document(np.random.default_rng(i))
        plain, spans = strip(text)
        assert spans and plain == unmark(text)
        assert all(plain[a:b] for a, b in spans)


def test_marks_give_back_their_spans():
    assert strip(f"a{det('bc')}d{det('e')}") == ("abcde", [(1, 3), (4, 5)])
    with pytest.raises(ValueError, match="pairs"):
        strip(det(det("x")))


def test_training_and_measurement_share_no_name():
    train, held = Names(np.random.default_rng(0)), Names(np.random.default_rng(0), True)
    assert not any(is_held_out(train.name()) for _ in range(500))
    assert all(is_held_out(held.name()) for _ in range(500))


def test_every_call_in_a_dialogue_is_valid_and_its_values_stand_before_it():
    for i in range(150):
        talk = dialogues.make(Names(np.random.default_rng(i)))
        known = {t.name: t for t in talk.tools}
        before = ""
        for message in talk.messages:
            content = unmark(message["content"])
            if message["role"] == "assistant":
                assert ("<tool_call>" in content) != ("<answer>" in content)
                for piece in content.split("<tool_call>")[1:]:
                    call = json.loads(piece.split("</tool_call>")[0])
                    assert tuple(call["arguments"]) == known[call["name"]].arguments
                    words = " ".join(call["arguments"].values()).replace(",", "").split()
                    assert all(w in before.replace(",", "") or w in "+-*/" for w in words)
            before += content
        assert before.endswith("</answer>")


def test_tools_have_openai_schemas():
    n = Names(np.random.default_rng(2))
    for kind in ("field", "search", "formula", "list", "action"):
        schema = make_tool(n, kind).schema()["function"]
        assert list(schema["parameters"]["properties"]) == schema["parameters"]["required"]


def test_the_corpus_does_not_hold_the_environment_that_it_prepares_for():
    texts = "\n".join(dialogues.document(np.random.default_rng([4, i])) for i in range(500))
    assert "lookup(entity, attribute)" not in texts
    assert '"name": "lookup"' not in texts


# --- packing, optimizer, circuit ---------------------------------------------------------------------------


def test_rows_are_full_and_marked_tokens_weigh_one(tok):
    batch = packing.rows(tok, np.random.default_rng(0), 0.5, 1024, 256, 0.1)
    again = packing.rows(tok, np.random.default_rng(0), 0.5, 1024, 256, 0.1)
    assert batch.ids_BT.shape == batch.weight_BT.shape == (4, 256)
    assert torch.equal(batch.ids_BT, again.ids_BT) and torch.equal(batch.weight_BT, again.weight_BT)
    assert set(batch.weight_BT.unique().tolist()) == {0.0, 1.0}


def test_encoding_says_where_marks_begin(tok):
    ids, marks = packing.encode(tok, f"Zanvel: {det('Toruna')} and {det('3')}")
    assert [tok.decode([i]) for i, m in zip(ids, marks, strict=True) if m == 2] == ["3"]
    assert tok.decode([i for i, m in zip(ids, marks, strict=True) if m == 1]) == "Toruna"


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 40), columns=st.integers(2, 40), seed=st.integers(0, 99))
def test_orthogonalised_updates_have_singular_values_near_one(rows, columns, seed):
    g = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    s = torch.linalg.svdvals(g)
    well = s[:, -1] > 0.05 * s[:, 0]
    values = torch.linalg.svdvals(optimizer.orthogonalise(g))[well]
    assert bool(((values > 0.4) & (values < 1.5)).all())
    torch.testing.assert_close(optimizer.orthogonalise(g).mT, optimizer.orthogonalise(g.mT), rtol=1e-3, atol=1e-3)


def test_the_initial_weights_copy_a_random_sequence(tok):
    model = architecture.create(tok, 0)
    state = torch.random.get_rng_state()
    architecture.create(tok, 1)
    assert torch.equal(state, torch.random.get_rng_state())
    x_BT = torch.randint(260, len(tok) - 20, (4, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        best_BT = model(input_ids=torch.cat([x_BT, x_BT], 1)).logits[:, 40:-1].argmax(-1)
    assert (best_BT == x_BT[:, 1:]).float().mean() > 0.9


def test_other_head_sizes_are_refused(tok):
    model = architecture.create(tok, 0)
    model.config.head_dim = 16
    with pytest.raises(ValueError, match="heads of 32"):
        circuit.initialise(model, tok, 0)


# --- build -------------------------------------------------------------------------------------------------


def test_an_interrupted_build_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, tok):
    monkeypatch.setattr(build, "make_tokenizer", lambda seed: tok)
    plan = build.Plan(steps=6, tokens=256, checkpoint=3)
    model, _ = build.train(plan, tmp_path / "whole")

    def stop(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build.train(plan, tmp_path / "cut", stop)
    resumed, _ = build.train(plan, tmp_path / "cut")
    for name, p in model.state_dict().items():
        assert torch.equal(p, resumed.state_dict()[name]), name
    with pytest.raises(ValueError, match="another plan"):
        build.train(dataclasses.replace(plan, seed=1), tmp_path / "cut")


def test_a_plan_in_minutes_is_a_count_of_steps():
    plan = build.Plan.of_minutes(2.0, tokens=4000)
    assert plan.steps == 200
    assert plan.rate(0) < plan.rate(plan.warmup) and plan.rate(plan.steps) == 0.0


def test_the_mixture_moves_from_copying_to_dialogues():
    def share(progress):
        texts = [mixture.document(np.random.default_rng([1, i]), progress) for i in range(200)]
        return np.mean(["<|im_start|>" in t for t in texts])

    assert share(0.0) < 0.3 < 0.4 < share(1.0)


def test_commands_name_what_was_wrong(capsys, tmp_path):
    assert main(["bild"]) == 2 and "did you mean `build`" in capsys.readouterr().err
    assert main(["card", "--model", str(tmp_path)]) == 2 and "no model" in capsys.readouterr().err


# --- the shipped model -------------------------------------------------------------------------------------


def test_the_shipped_folder_is_small_and_of_a_real_architecture(shipped):
    model, _ = shipped
    assert model.config.model_type == "qwen3" and not model.config.tie_word_embeddings
    assert model.num_parameters() <= 2_000_000 and next(model.parameters()).dtype == torch.float32
    stored = json.loads((bundled.path() / "config.json").read_text())
    assert stored["dtype"] == "bfloat16"
    assert sum(f.stat().st_size for f in Path(bundled.path()).iterdir()) <= 5_000_000


def test_the_shipped_model_copies_names_it_has_never_seen(shipped):
    rows = {row.name: row for row in skills.measure(*shipped, documents=6)}
    for name, least in {
        "copy: echo": 0.75,
        "look-up: pairs": 0.6,
        "order of look-ups in a phrase": 0.6,
        "expression from a sentence": 0.85,
        "call: copied argument (chain)": 0.75,
    }.items():
        assert rows[name].sampled > least, rows[name]
    assert all(0.0 <= row.sampled <= 1.0 and row.spans > 0 for row in rows.values())
