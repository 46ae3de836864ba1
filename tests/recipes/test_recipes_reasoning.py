"""Recipes of reasoning: final answers, rationales, multi-task weights, SCOTT's decoding, Socratic steps, DISCO's counterfactuals."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import Killed, Scripted, last
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from kdkernels.recipes import answers, disco, scott, socratic
from kdkernels.recipes import chain_of_thought as cot
from kdkernels.recipes.rows import Item, RecipeError, Sampling
from kdkernels.teachers.text import Reply, Request


def item(n: int, answer: str, prompt: str | None = None, **fields: Any) -> Item:
    return Item(f"k{n}", ({"role": "user", "content": prompt or f"question {n}"},), answer, fields, f"line {n}")


# Answers


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [
        ("3 + 4 = 7\nAnswer: 7", "number", "7"),
        ("Add them. The answer is 1,250.", "number", "1250"),
        ("So the final answer to this question is $12.50.", "number", "25/2"),
        ("**Answer:** 12", "number", "12"),
        ("answer = -3", "number", "-3"),
        ("Answer: 3 + 4 = 7", "number", "7"),
        ("Answer: 7 because 3 and 4 are 7 and not 8", "number", "7"),
        ("Answer: 1\nNo. Answer: 2", "number", "2"),
        ("I answer this by adding 3 and 4, which is 7", "number", "7"),
        ("first 10-5, which is 5", "number", "5"),
        ("1/4 of it", "number", "1/4"),
        ("about 50%", "number", "50"),
        (r"Answer: \boxed{12}", "number", "12"),
        ("a1b2c3", "number", None),
        ("1/0", "number", None),
        ("nothing here", "number", None),
        ("", "number", None),
        ("Answer:", "number", None),
        ("It must be (b). Answer: (b)", "choice", "B"),
        ("The answer is B because A is wrong", "choice", "B"),
        ("answer: c", "choice", "C"),
        ("b) Paris", "choice", "B"),
        ("Between A and D, it is D.", "choice", "D"),
        ("I think so", "choice", None),
        ("don't know", "choice", None),
        ("He went there. Answer: The Eiffel Tower.", "text", "eiffel tower"),
        ("No marker at all", "text", None),
        ("Answer: .", "text", None),
        ("**Answer**: 4", "number", "4"),
        ("**Answer:** Paris", "text", "paris"),
        ("He went there.\n**Answer:**\n\nThe Eiffel Tower.\n", "text", "eiffel tower"),
        ("The question has no answer:", "text", None),
        ("Answer: \u22123", "number", "-3"),
        ("Answer: .5", "number", "1/2"),
    ],
)
def test_final_answer_is_extracted(text: str, kind: answers.Kind, answer: str | None) -> None:
    assert answers.extract(text, kind) == answer


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "{}.", "{}.0", "${}", "{} apples", "**{}**", "{}\nmore 99"]))
def test_numbers_are_extracted_from_every_style(number: int, form: str) -> None:
    if form == "${}":
        number = abs(number)
    for lead in ("Answer: ", "the answer is ", "We get 1 + 2 = 3.\nSo the final answer is: "):
        assert answers.extract(lead + form.format(number), "number") == str(number)
        assert answers.same(lead + form.format(number), str(number), "number")
        assert not answers.same(lead + form.format(number), str(number + 1), "number")


@given(st.fractions(max_denominator=1000))
def test_fractions_have_one_spelling(value: Fraction) -> None:
    assert answers.normalise(str(value), "number") == str(value)
    assert answers.normalise(f"{value.numerator * 3}/{value.denominator * 3}", "number") == str(value)


@given(st.text(max_size=60), st.sampled_from(["number", "choice", "text"]))
def test_any_text_gives_an_answer_or_none(text: str, kind: answers.Kind) -> None:
    extracted = answers.extract(text, kind)
    assert extracted is None or answers.normalise(extracted, kind) == extracted or kind == "text"
    rationale, answer = answers.split(text)
    assert rationale in text
    assert answer in text


@given(st.text(st.characters(exclude_characters="\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), max_size=40))
def test_rationale_and_answer_survive_a_round_trip(rationale: str) -> None:
    text, answer = answers.split(cot.worked(rationale.strip(), "42"))
    assert answer == "42"
    assert text == rationale.strip()


# Rationales


def by_sample(texts: dict[str, list[str | tuple[str, str]]]) -> Scripted:
    """Return a model that answers from a table: question number, then sample. A pair is a text and its finish reason."""

    def answer(request: Request) -> Reply:
        row = last(request).split("\n")[0].split()[1]
        reply = texts[row][int(request.key.split("/")[1])]
        return Reply(request.key, *((reply,) if isinstance(reply, str) else reply))

    return Scripted(answer)


def test_rationales_are_kept_if_their_answer_is_right(tmp_path: Path) -> None:
    model = by_sample(
        {
            "0": ["2 and 2 make 4.\nAnswer: 4", "2 and  2 make 4.\nAnswer: 4.0", "Twice 2.\nAnswer: 4", "2 and 2 is 5.\nAnswer: 5"],
            "1": ["no idea", "Answer: 9", ("long\nAnswer: 9", "length"), "Count.\nthe answer is 9."],
        }
    )
    rationales, tally = cot.rationales(
        [item(0, "4"), item(1, "nine: 9")], model, tmp_path / "log", Sampling(temperature=0.7, samples=4), kind="number"
    )
    assert [(r.item.key, r.text) for r in rationales] == [("k0", "2 and 2 make 4."), ("k0", "Twice 2."), ("k1", "Count.")]
    assert tally.dropped == {
        "the same rationale again": 1, "wrong final answer": 1, "no final answer": 1, "no rationale before the answer": 1,
        "cut off at max_tokens": 1,
    }  # fmt: skip
    assert tally.candidates == tally.kept + sum(tally.dropped.values()) == 8
    rows = cot.fine_tune_cot(rationales)
    assert [row["key"] for row in rows] == ["k0/0", "k0/1", "k1/0"]
    assert rows[1]["response"] == "Twice 2.\nAnswer: 4"
    assert rows[1]["messages"] == [{"role": "user", "content": "question 0"}]
    one, tally = cot.rationales([item(0, "4")], model, tmp_path / "log", Sampling(temperature=0.7, samples=4), kind="number", most=1)
    assert [r.text for r in one] == ["2 and 2 make 4."]
    assert tally.dropped["more than 1 rationales"] == 1


def test_worked_examples_come_before_the_question(tmp_path: Path) -> None:
    model = Scripted(lambda _: "r\nAnswer: 1")
    system = Item("s", ({"role": "system", "content": "be kind"}, {"role": "user", "content": "q"}), "1")
    cot.rationales(
        [system], model, tmp_path / "log", Sampling(), kind="number", instruction="Think!", examples=[item(7, "5", rationale="2 and 3")]
    )
    assert [m["content"] for m in model.requests[0].messages] == ["be kind", "question 7\nThink!", "2 and 3\nAnswer: 5", "q\nThink!"]
    with pytest.raises(RecipeError, match="line 7, field 'rationale': text is needed"):
        cot.rationales([system], model, tmp_path / "log", Sampling(), kind="number", examples=[item(7, "5")])
    with pytest.raises(RecipeError, match="line 3: the answer 'none' holds no number"):
        cot.rationales([item(3, "none")], model, tmp_path / "log", Sampling(), kind="number")


ANSWERED = [item(0, "4"), item(1, "9"), item(2, "7")]


def three_rationales() -> list[cot.Rationale]:
    zero, one, _ = ANSWERED
    return [cot.Rationale(zero, "first"), cot.Rationale(zero, "second, longer"), cot.Rationale(one, "third")]


def test_multi_task_rows_hold_labels_and_rationales() -> None:
    rows = cot.multi_task(ANSWERED, three_rationales(), style="step-by-step")
    assert [(r["key"], r["task"], r["response"]) for r in rows] == [
        ("k0/label", "label", "4"), ("k1/label", "label", "9"), ("k2/label", "label", "7"),  # k2 has a label and no rationale
        ("k0/rationale/0", "rationale", "first"), ("k0/rationale/1", "rationale", "second, longer"),
        ("k1/rationale/0", "rationale", "third"),
    ]  # fmt: skip
    assert rows[0]["messages"] == [{"role": "user", "content": "[label] question 0"}]
    assert rows[3]["messages"] == [{"role": "user", "content": "[rationale] question 0"}]
    mt = cot.multi_task(ANSWERED, three_rationales(), style="mt-cot", prefixes={"label": "A ", "rationale": "B "}, chat=False)
    assert mt[3]["response"] == "first\nAnswer: 4"
    assert mt[3]["prompt"] == "B question 0"


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 30)), min_size=2, max_size=20), st.floats(0.01, 10), st.floats(0.01, 10))
def test_balanced_weights_give_a_weighted_sum_of_task_means(lengths: list[tuple[str, int]], weight_a: float, weight_b: float) -> None:
    lengths = [*lengths, ("a", 3), ("b", 5)]
    rows = [{"task": task, "response": "x" * n} for task, n in lengths]
    weights = {"a": weight_a, "b": weight_b}
    generator = torch.Generator().manual_seed(0)
    losses = [torch.rand(n, generator=generator, dtype=torch.float64) for _, n in lengths]
    balanced = cot.balance(rows, weights, [n for _, n in lengths])
    total = sum(row["weight"] * loss.sum() for row, loss in zip(balanced, losses, strict=True)) / sum(map(len, losses))
    expected = sum(
        w * torch.cat([loss for (t, _), loss in zip(lengths, losses, strict=True) if t == task]).mean() for task, w in weights.items()
    )
    assert float(total) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"label": 1.0}, "the rows have the tasks"),
        ({"label": 1.0, "rationale": 1.0, "other": 1.0}, "other"),
        ({"label": 1.0, "rationale": -1.0}, ">= 0"),
        ({"label": 0.0, "rationale": 0.0}, "one above 0"),
        ({"label": 1.0, "rationale": float("nan")}, "finite"),
    ],
)
def test_invalid_task_weights_raise(weights: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        cot.balance(cot.multi_task(ANSWERED, three_rationales(), style="mt-cot"), weights, [1] * 6)


# SCOTT


@pytest.fixture(scope="module", params=[LlamaForCausalLM, GPT2LMHeadModel], ids=["relative", "absolute positions"])
def teacher(request: pytest.FixtureRequest) -> tuple[Any, PreTrainedTokenizerFast]:
    """A model with random weights and a tokenizer of characters."""
    letters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocabulary = {token: n for n, token in enumerate(["<pad>", "<eos>", "<unk>", *letters])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    config = request.param.config_class(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = request.param(config).double().eval()
    with torch.no_grad():  # sharper distributions, so that the two prompts disagree
        model.lm_head.weight.mul_(30)
        if isinstance(model, GPT2LMHeadModel):
            model.transformer.wpe.weight.mul_(30)
        model.lm_head.weight[1].mul_(2)  # a larger end token, so that texts end after some tokens
    return model, tokenizer


def by_definition(model: Any, tokenizer: Any, prompt: str, against: str, strength: float, count: int) -> list[int]:
    """Return the ids of contrastive greedy decoding, without caches, padding or batches, up to the end-of-text id 1."""
    a, b = (tokenizer(text + "\n", return_tensors="pt").input_ids for text in (prompt, against))
    new: list[int] = []
    while len(new) < count and 1 not in new:
        tail = torch.tensor([new], dtype=torch.long)
        with torch.no_grad():
            p = model(torch.cat([a, tail], -1)).logits[0, -1].float().log_softmax(-1)
            q = model(torch.cat([b, tail], -1)).logits[0, -1].float().log_softmax(-1)
        new.append(1 if int(p.argmax()) == 1 else int((p - strength * q).argmax()))
    return new


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_contrastive_decoding_equals_the_formula(teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strength: float) -> None:
    model, tokenizer = teacher
    items = [item(n, str(n), "What is the square of this, please?"[: 5 * n + 3]) for n in range(7)]
    answers, wrong_answers = [f"answer {n}" for n in range(7)], ["", "a wrong and longer answer", "no", *[""] * 4]
    generate, decoded = model.generate, []

    def recorded(**kwargs: Any) -> Any:
        ids = generate(**kwargs)
        decoded.extend(ids[:, kwargs["input_ids"].shape[1] :].tolist())
        return ids

    monkeypatch.setattr(model, "generate", recorded)
    progress: list[int] = []
    explainer = scott.Explainer(model, tokenizer, strength=strength, max_tokens=15, batch=4)
    rationales = explainer(items, answers, wrong_answers, tmp_path / "log", progress.append)
    assert progress == [0, 4, 3]
    for i, a, b, ids, text in zip(items, answers, wrong_answers, decoded, rationales, strict=True):
        expected = by_definition(model, tokenizer, scott.explain_prompt(i.prompt, a), scott.explain_prompt(i.prompt, b), strength, 15)
        assert ids[: len(expected)] == expected
        assert text == (tokenizer.decode(expected[:-1]).strip() if expected[-1] == 1 else "")
    assert sum(len(ids) > 3 for ids in decoded) >= 3, "too short to compare"


def test_contrastive_scores_equal_the_formula(teacher: Any) -> None:
    model, tokenizer = teacher
    prompt, other_prompt = (tokenizer(text, return_tensors="pt").input_ids for text in ("2+2?4", "2+2?"))
    contrast = scott.Contrast(model, other_prompt, torch.ones_like(other_prompt), prompt.shape[1], 0.5, [1])
    ids = prompt
    for step in range(6):
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
            other_logits = model(torch.cat([other_prompt, ids[:, prompt.shape[1] :]], -1)).logits[:, -1]
        scores = contrast(ids, logits)
        if int(logits.argmax()) != 1:
            expected = logits.log_softmax(-1) - 0.5 * other_logits.log_softmax(-1)
            torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
        ids = torch.cat([ids, torch.tensor([[5 + step]])], -1)
    with pytest.raises(ValueError, match="2 sequences for 1 other prompts"):
        contrast(ids.expand(2, -1), logits.expand(2, -1))


def test_contrast_keeps_the_teachers_end_and_impossible_tokens(teacher: Any) -> None:
    model, tokenizer = teacher
    other_prompt = tokenizer("x", return_tensors="pt").input_ids
    logits = torch.zeros(1, model.config.vocab_size)
    logits[0, 7] = -torch.inf

    class ImpossibleToken(torch.nn.Module):  # -inf for the same token under the other prompt
        def forward(self, **_: Any) -> Any:
            return SimpleNamespace(logits=logits[None], past_key_values=None)

    contrast = scott.Contrast(ImpossibleToken(), other_prompt, torch.ones_like(other_prompt), 3, 0.5, [1])
    assert contrast(torch.ones(1, 3, dtype=torch.long), logits)[0, 7] == -torch.inf
    contrast = scott.Contrast(model, other_prompt, torch.ones_like(other_prompt), 3, 50.0, [1])
    assert contrast(torch.ones(1, 3, dtype=torch.long), logits)[0, 7] == -torch.inf
    logits[0, 1] = 1.0
    contrast = scott.Contrast(model, other_prompt, torch.ones_like(other_prompt), 3, 50.0, [1])
    scores = contrast(torch.ones(1, 3, dtype=torch.long), logits)
    assert scores.isfinite().nonzero().tolist() == [[0, 1]]


def test_killed_run_does_not_repeat_rationales(teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = teacher
    items = [item(n, str(n), f"{n}?") for n in range(4)]
    arguments = (items, ["1"] * 4, [""] * 4)
    explainer = scott.Explainer(model, tokenizer, max_tokens=4, batch=2, name="one")
    expected = explainer(*arguments, tmp_path / "whole")
    generate, calls = model.generate, []

    def dying(**kwargs: Any) -> Any:
        calls.append(len(kwargs["input_ids"]))
        if len(calls) == 2:
            raise Killed
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", dying)
    with pytest.raises(Killed):
        explainer(*arguments, tmp_path / "log")
    assert explainer(*arguments, tmp_path / "log") == expected
    assert calls == [2, 2, 2]
    assert (tmp_path / "log").read_bytes() == (tmp_path / "whole").read_bytes()
    scott.Explainer(model, tokenizer, max_tokens=4, batch=4, name="another")(*arguments, tmp_path / "log")
    assert calls == [2, 2, 2, 4], "another teacher's rationales are not used"
    with pytest.raises(RecipeError, match="strength -1"):
        scott.Explainer(model, tokenizer, strength=-1)


def test_factual_and_counterfactual_rows() -> None:
    items = [item(0, "4", "2+2?"), item(1, "9", "3*3?")]
    assert scott.factual_rows(items, ["two twos", ""]) == [
        {
            "key": "k0/factual",
            "messages": [{"role": "user", "content": "[factual] 2+2?"}],
            "response": "two twos\nAnswer: 4",
            "task": "factual",
        }
    ]
    rows = scott.counterfactual_rows(items, ["5", "8"], ["one more", "one less"], chat=False)
    assert rows[0] == {
        "key": "k0/counterfactual", "prompt": "[counterfactual] 2+2?\none more\nAnswer:", "response": "5", "task": "counterfactual"
    }  # fmt: skip
    assert rows[1]["response"] == "8"


def test_wrong_answers_differ_from_the_right_one() -> None:
    items = [item(0, "4", choices=["4", "4.0", "5"]), item(1, "9"), item(2, "4")]
    for seed in range(10):
        first, second, third = scott.wrong_answers(items, "number", seed)
        assert (first, second, third) == ("5", "4", "9")
    assert len({scott.wrong_answers([item(0, "1", choices=list("1234"))], "number", s)[0] for s in range(20)}) == 3
    with pytest.raises(RecipeError, match="line 0: no wrong answer"):
        scott.wrong_answers([item(0, "4"), item(1, "4.0")], "number", 0)
    with pytest.raises(RecipeError, match="line 0: the answer 'four' holds no number"):
        scott.wrong_answers([item(0, "four"), item(1, "4")], "number", 0)
    with pytest.raises(RecipeError, match="line 0, field 'choices'"):
        scott.wrong_answers([item(0, "4", choices="45")], "number", 0)


# Socratic


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("Q: how many?\nA: 4", (("how many?", "4"),)),
        ("Sure.\nQ1: a?\nA1: 1\n\n2. Q: b?\nA. 2\nDone", (("a?", "1"), ("b?", "2"))),
        ("Q: a?\nQ: b?\nA: 2", None),
        ("A: 1\nQ: a?", None),
        ("Q: a?", None),
        ("Q: a?\nA:   ", None),
        ("", None),
    ],
)
def test_sub_questions_are_parsed(text: str, steps: Any) -> None:
    assert socratic.parse(text) == steps


def test_decompositions_must_end_in_the_right_answer(tmp_path: Path) -> None:
    right = "Q: pens?\nA: 2 pens\nQ: and more?\nA: it is 4"
    model = by_sample({"0": ["Q: x?\nA: 5", right, "Q: y?\nA: 4"], "1": ["nothing", (right, "length"), "Q: z?\nA: none"], "2": [right] * 3})
    items = [item(0, "4"), item(1, "4"), item(2, "7")]
    decompositions, tally = socratic.decompose(items, model, tmp_path / "log", Sampling(temperature=1.0, samples=3), kind="number")
    assert [d.steps for d in decompositions] == [(("pens?", "2 pens"), ("and more?", "it is 4"))]
    assert tally.dropped == {
        "wrong final answer": 5, "not the first right one": 1, "no alternating questions and answers": 1, "cut off at max_tokens": 1
    }  # fmt: skip
    assert tally.candidates == tally.kept + sum(tally.dropped.values())
    (question,) = socratic.questioner_rows(decompositions, chat=False)
    assert question["response"] == "pens?\nand more?"
    first, second = socratic.solver_rows(decompositions, chat=False)
    assert (first["prompt"], first["response"]) == ("question 0\nQ: pens?\nA:", "2 pens")
    assert (second["prompt"], second["response"]) == ("question 0\nQ: pens?\nA: 2 pens\nQ: and more?\nA:", "it is 4")
    assert len({row["key"] for row in (first, second)}) == 2


def test_row_without_a_usable_answer_raises_before_any_request(tmp_path: Path) -> None:
    model = Scripted(lambda _: "Q: x?\nA: 1")
    with pytest.raises(RecipeError, match="line 1: the answer 'none' holds no number"):
        socratic.decompose([item(0, "4"), item(1, "none")], model, tmp_path / "log", Sampling(), kind="number")
    assert not model.requests


def test_questioner_and_solver_answer_in_turn(tmp_path: Path) -> None:
    questioner = Scripted(lambda r: "one?\n\ntwo?" if "question 0" in last(r) else "only?")
    solver = Scripted(lambda r: f"{last(r).count('Q:')} asked")
    steps = socratic.solve([item(0, ""), item(1, "")], questioner, solver, tmp_path, Sampling())
    assert steps == [(("one?", "1 asked"), ("two?", "2 asked")), (("only?", "1 asked"),)]


# DISCO


def test_one_span_of_a_text_is_blanked() -> None:
    text = "the quick brown fox jumps over the lazy dog"
    for seed in map(str, range(50)):
        masked, span = disco.blanked(text, seed)
        assert masked.count(disco.BLANK) == 1
        assert masked.replace(disco.BLANK, span) == text
        assert 2 <= len(span.split()) <= 4
    assert len({disco.blanked(text, str(s)) for s in range(50)}) > 10
    with pytest.raises(RecipeError, match="no span"):
        disco.blanked("word", "0")
    with pytest.raises(RecipeError, match="holds a blank"):
        disco.blanked(f"the {disco.BLANK} was good", "0")


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("bad", "bad"),
        ("It is Good.", "good"),
        ("not good", "not good"),
        ("good, not bad", "good"),
        ("ugly", None),
        ("badly put, but good", "good"),
        ("goodness", None),
    ],
)
def test_votes_name_a_label(reply: str, label: str | None) -> None:
    assert disco.vote(reply, ["good", "bad", "not good"]) == label


def test_counterfactuals_must_change_the_label(tmp_path: Path) -> None:
    row = {"text": "film was good", "label": "good"}
    items = [
        Item("k0", ({"role": "user", "content": ""},), None, row, "line 0"),
        Item("k1", ({"role": "user", "content": ""},), None, row, "line 1"),
    ]
    fillings = ["bad", "really bad", "bad", "", disco.BLANK, "fine"]

    def fill(request: Request) -> str:
        return fillings[int(request.key.split("/")[-2])]

    def judge(request: Request) -> str:
        text = last(request).split("\n")[0]
        if "really bad" in text:  # 1 vote of 2, which is not a majority
            return "bad" if request.key.split("/")[-2] == "0" else "good"
        return "bad" if "bad" in text else "good"

    labels, judging = ["good", "bad"], Sampling(temperature=1.0, samples=2)
    counterfactuals, tally = disco.counterfactuals(
        items, labels, Scripted(fill), Scripted(judge), tmp_path, filling=Sampling(temperature=1.0, samples=6), judging=judging
    )
    assert {c.shift for c in counterfactuals} == {1.0}
    assert {c.label for c in counterfactuals} == {"bad"}
    assert len(counterfactuals) == 2
    assert tally.dropped == {"the same text again": 2, "blank left empty": 4, "label moved by 0.5 or less": 4}
    assert tally.candidates == tally.kept + sum(tally.dropped.values()) == 12
    rows = disco.rows(items, counterfactuals, labels)
    assert [row["response"] for row in rows] == ["good", "good", "bad", "bad"]
    assert len({row["key"] for row in rows}) == 4
    repeated, _ = disco.counterfactuals(
        items, labels, Scripted(fill, 0), Scripted(judge, 0), tmp_path, filling=Sampling(temperature=1.0, samples=6), judging=judging
    )
    assert repeated == counterfactuals


def test_rows_with_similar_keys_are_judged_separately(tmp_path: Path) -> None:
    """The two rows have equal concatenations of key and text."""
    rows = {"a": "b/x y z", "a/b": "x y z"}
    items = [Item(key, ({"role": "user", "content": ""},), None, {"text": t, "label": "good", "context": key}) for key, t in rows.items()]
    judge = Scripted(lambda request: "bad" if "About: a/b" in last(request) else "good")
    disco.counterfactuals(
        items, ["good", "bad"], Scripted(lambda _: "so"), judge, tmp_path, filling=Sampling(), judging=Sampling()
    )  # fmt: skip
    originals = [last(request) for request in judge.requests if any(f"Text: {text}\n" in last(request) for text in rows.values())]
    assert len(originals) == 2


def test_texts_keep_their_keys_at_other_positions(tmp_path: Path) -> None:
    rows = [{"text": "a b", "label": "x"}, {"text": "c d", "label": "x"}, {"text": "a b", "label": "x"}]

    def keys(rows: Any) -> list[str]:
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [i.key for i in disco.read_texts(tmp_path / "d.jsonl")]

    first, second, third = keys(rows)
    assert keys(rows[1::-1]) == [second, first]
    assert third == f"{first}#2"
    with pytest.raises(RecipeError, match="row 2: key '1' is that of "):
        keys([{**rows[0], "key": 1}, {**rows[1], "key": "1"}])


def test_blank_filled_with_the_same_words_is_dropped(tmp_path: Path) -> None:
    row = {"text": "a b", "label": "x", "context": "c"}
    items = [Item("k", ({"role": "user", "content": ""},), None, row, "line 0")]
    _, span = disco.blanked("a b", "0/k/y")
    judge = Scripted(lambda _: "y")
    counterfactuals, tally = disco.counterfactuals(
        items, ["x", "y"], Scripted(lambda _: span.upper()), judge, tmp_path, filling=Sampling(), judging=Sampling()
    )  # fmt: skip
    assert (counterfactuals, tally.dropped, judge.requests) == ([], {"nothing changed": 1}, [])
    with pytest.raises(RecipeError, match="line 0, field 'label': 'x' is none of y, z"):
        disco.counterfactuals(items, ["y", "z"], judge, judge, tmp_path, filling=Sampling(), judging=Sampling())
