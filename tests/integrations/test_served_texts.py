"""OpenAI-style answers, which name tokens by text: what llama-cpp-python makes of BOS, and texts of several tokens."""

from types import SimpleNamespace

import numpy as np
import pytest

from fusedkd.integrations.served import from_openai

from . import served_cases as case
from .served_cases import LENGTH, OFF, TEXTS, TOKENS, K, Tokenizer, chat, completion, loss

tokenizer = Tokenizer()
ROWS = LENGTH - 1


def known(served):
    return np.flatnonzero((served["teacher_ids"] >= 0).any(1)).tolist()


def test_texts_become_ids_where_they_are_one_tokens():
    assert "" in (TEXTS[t] for t in TOKENS[1:])
    served = from_openai(completion(TOKENS), TOKENS, tokenizer=tokenizer)
    assert known(served) == list(range(ROWS))
    assert abs(loss(served)[0]) < 1e-6
    ambiguous = {i for i, text in enumerate(TEXTS) if text == ""}
    for i, row in enumerate(served["teacher_ids"][:-1]):
        listed = set(row[row >= 0].tolist())
        assert TOKENS[i + 1] in listed
        assert not (listed - {TOKENS[i + 1]}) & ambiguous
        assert listed | ambiguous >= set(case.after(TOKENS[i : i + 1])[0][0].tolist())
    listed = from_openai(completion(TOKENS, ids=True), TOKENS)
    assert served.mass.mean() < listed.mass.mean()
    assert "47 rows" not in served.report.partition(";")[2][:20]


def test_parts_of_characters_are_no_texts():
    """A part decodes to nothing, or to a mark: what is left of " �" is the text of another token."""
    texts = ["a", " ", " \ufffd", "\ufffd", "b"]
    answer = {
        "tokens": ["a", " ", "a", "\ufffd"],
        "token_logprobs": [None, -1.0, -1.0, -1.5],
        "top_logprobs": [None, {" ": -1.0, "b": -2.0}, {"a": -1.0, " ": -2.0}, {"": -1.2, "\ufffd": -1.5, "b": -3.0}],
    }
    served = from_openai(answer, [0, 2, 0, 3], tokenizer=texts, offset=0)
    assert served["teacher_ids"].tolist() == [[2, 4], [0, -1], [3, 4], [-1, -1]]


def test_an_answer_with_bos_has_entry_i_of_token_i():
    """BOS itself has no entry; the first, which is None, is that of the token after it."""
    tokens = [0, *TOKENS]
    answer = completion(tokens)
    answer = {name: values[1:] for name, values in answer.items()}
    answer["top_logprobs"][0] = answer["token_logprobs"][0] = None
    served = from_openai({"choices": [{"logprobs": answer}]}, tokens, tokenizer=tokenizer)
    assert known(served) == list(range(1, ROWS + 1))
    assert abs(loss(served, tokens)[0]) < 1e-6
    few = {name: values[:4] for name, values in answer.items()}
    assert known(from_openai(few, tokens[:5], tokenizer=tokenizer)) == [1, 2, 3]


def test_an_answer_without_bos_has_entry_i_of_what_follows():
    """Of E1's form: by OpenAI's rule it costs nats, in silence."""
    served = from_openai(completion(TOKENS, bos=False), TOKENS, tokenizer=tokenizer)
    assert known(served) == list(range(1, LENGTH))
    assert abs(loss(served)[0]) < 1e-6
    with pytest.raises(ValueError, match=r"if it is about token i \+ 1, over 4\d rows"):
        from_openai(completion(TOKENS, bos=False), TOKENS, tokenizer=tokenizer, offset=0)


def test_bos_within_a_chat_is_skipped():
    """Index is not position from the second turn on."""
    tokens = [0, *TOKENS[:20], 0, *TOKENS[20:]]
    answer = completion(tokens)
    keep = [i for i, token in enumerate(tokens) if token != 0]
    answer = {name: [values[i] for i in keep] for name, values in answer.items() if values}
    answer["top_logprobs"][0] = answer["token_logprobs"][0] = None
    served = from_openai(answer, tokens, tokenizer=tokenizer)
    assert known(served) == [i - 1 for i in keep[1:]]
    assert abs(loss(served, tokens)[0]) < 1e-6


def test_a_server_that_keeps_bos():
    tokens = [0, *TOKENS]
    for text in ("<s>", ""):
        answer = completion(tokens)
        answer["tokens"][0] = text
        assert abs(loss(from_openai(answer, tokens, tokenizer=tokenizer), tokens)[0]) < 1e-6


def test_generated_tokens_after_an_echo_are_left_out():
    longer = case.written(LENGTH + 5)
    assert longer[:LENGTH] == TOKENS
    served = from_openai(completion(longer), TOKENS, tokenizer=tokenizer)
    assert len(served["teacher_ids"]) == LENGTH
    assert abs(loss(served)[0]) < 1e-6


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("prompt", [3, LENGTH - 4])
def test_a_chat_answers_for_its_own_tokens(prompt, ids):
    """However few they are."""
    served = from_openai(
        chat(TOKENS, prompt, **({"ids": True} if ids else {})), TOKENS, tokenizer=None if ids else tokenizer
    )
    assert known(served) == list(range(prompt - 1, ROWS))
    assert abs(loss(served)[0]) < 1e-6


def test_answers_of_a_client_are_objects():
    def objects(value):
        if isinstance(value, dict):
            return SimpleNamespace(**{name: objects(part) for name, part in value.items()})
        return [objects(part) for part in value] if isinstance(value, list) else value

    answer = objects({"choices": [{"message": {}, "logprobs": chat(TOKENS, 9)}]})
    assert abs(loss(from_openai(answer, TOKENS, tokenizer=tokenizer))[0]) < 1e-6
    answer = SimpleNamespace(logprobs=SimpleNamespace(**completion(TOKENS), content=None))
    assert abs(loss(from_openai(answer, TOKENS, tokenizer=tokenizer))[0]) < 1e-6


def test_pieces_keep_the_space_that_decoding_loses():
    """Of SentencePiece: a server that names tokens by their pieces, and one that names them by their decoded text."""

    class Pieces(Tokenizer):
        def decode(self, ids, **options):
            return super().decode(ids).strip()

        def convert_ids_to_tokens(self, ids):
            return [TEXTS[i].replace(" ", "▁") for i in ids]

    assert abs(loss(from_openai(completion(TOKENS), TOKENS, tokenizer=Pieces()))[0]) < 1e-6
    answer = completion(TOKENS)
    answer["tokens"] = [text.strip() for text in answer["tokens"]]
    answer["top_logprobs"] = [row and {text.strip(): p for text, p in row.items()} for row in answer["top_logprobs"]]
    assert abs(loss(from_openai(answer, TOKENS, tokenizer=Pieces()))[0]) < 1e-6


def test_a_list_of_texts_is_a_tokenizer():
    assert abs(loss(from_openai(completion(TOKENS), TOKENS, tokenizer=TEXTS))[0]) < 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_openai(completion(TOKENS), OFF, tokenizer=tokenizer), r"stands for ' w\d+', but token \d+ of 48"),
        (lambda: from_openai(completion(TOKENS, ids=True), OFF), r"stands for \d+, but token"),
        (lambda: from_openai(completion(TOKENS), TOKENS), "tokenizer is needed"),
        (lambda: from_openai({"logprobs": None}, TOKENS), "logprobs is None"),
        (lambda: from_openai({"tokens": ["a"]}, TOKENS), "must have tokens, token_logprobs and top_logprobs"),
        (lambda: from_openai({"content": []}, TOKENS), "no entries"),
        (lambda: from_openai(completion(TOKENS), [*TOKENS[:-1], 99], tokenizer=tokenizer), "id 99, but tokenizer 40"),
        (lambda: from_openai(completion(TOKENS[:6]), TOKENS[:6], tokenizer=tokenizer), "give offset=0 or offset=1"),
    ],
)
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_columns_are_k_and_the_own_token():
    assert from_openai(completion(TOKENS, ids=True), TOKENS)["teacher_ids"].shape == (LENGTH, K + 1)
