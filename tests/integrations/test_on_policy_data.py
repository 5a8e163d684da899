"""What OnPolicyTrainer is given: prompts in every form, and mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import GenerationConfig, default_data_collator

from fusedkd.integrations import rollouts
from fusedkd.integrations.prompts import PromptCollator
from fusedkd.integrations.transformers import KDConfig

from .made_tokenizers import metaspace
from .on_policy_step import END, greedy, llama, rows, scores, trainer

PICTURE = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "pixel_values": [[0.5]]}


def sampled(**more: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=True, top_k=0, max_new_tokens=4, **more)


def dropping() -> Any:
    student = llama(0)
    student.config.attention_dropout = 0.1
    return student


def test_what_changes_a_distribution_is_not_plain() -> None:
    assert rollouts.is_plain(rollouts.plain(5, 1.0))
    assert rollouts.is_plain(sampled(num_beams=1, repetition_penalty=1.0, eos_token_id=3, guidance_scale=1))
    for more in (
        {"top_h": 0.4},
        {"exponential_decay_length_penalty": (2, 1.5)},
        {"dola_layers": "high"},
        {"min_p": 0.1},
    ):
        assert not rollouts.is_plain(sampled(**more)), more


def first_step(found: Any) -> Any:
    """What is written and scored for it."""
    batch = found.data_collator(found.train_dataset[:4])
    return found.get_batch_samples(iter([batch]), 1, torch.device("cpu"))


class Tokenizer:
    pad_token_id, eos_token_id = 0, END

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        ids = [3 + ord(c) % 20 for c in text]
        return {"input_ids": [1, *ids, END] if add_special_tokens else ids}

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool, **_: Any) -> list[int]:
        turns = [[4 if m["role"] == "user" else 5, *self(m["content"], False)["input_ids"], END] for m in messages]
        return [i for turn in turns for i in turn] + [5] * add_generation_prompt


@pytest.mark.parametrize("prompt", ["the number is 4", "the answer is ", [5, 6]])
def test_text_goes_on_where_the_prompt_ends(prompt: Any) -> None:
    """With a tokenizer that puts a space before a text of its own."""
    tokenizer = metaspace(300)
    (row,) = PromptCollator(tokenizer)([{"prompt": prompt, "completion": "2"}])["labels"]
    assert tokenizer.convert_ids_to_tokens(row[row >= 0].tolist()) == ["2", "</s>"]


def test_columns_of_a_data_set_of_torch() -> None:
    class Rows(torch.utils.data.Dataset):
        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"prompt": [3, 4, 5], "completion": [6] * (i + 1)}

        def __len__(self) -> int:
            return 4

    assert isinstance(trainer(llama(0), llama(1), Rows()).data_collator, PromptCollator)


def test_prompts_are_text_ids_or_messages() -> None:
    user, answer = [{"role": "user", "content": "ab"}], [{"role": "assistant", "content": "c"}]
    ids = {c: 3 + ord(c) % 20 for c in "abc"}
    examples = [
        {"prompt": "ab", "completion": "c"},
        {"prompt": [7, 8, 9], "completion": torch.tensor([6])},
        {"prompt": user, "completion": answer},
        {"prompt": user},
    ]
    batch = PromptCollator(Tokenizer())(examples)
    chat = [4, ids["a"], ids["b"], END, 5]
    expected = [
        ([1, ids["a"], ids["b"]], [ids["c"], END]), ([7, 8, 9], [6]), (chat, [ids["c"], END]), (chat, []),
    ]  # fmt: skip
    for i, (prompt, completion) in enumerate(expected):
        width = len(prompt) + len(completion)
        assert batch["input_ids"][i, :width].tolist() == prompt + completion
        assert batch["attention_mask"][i].sum() == width
        assert batch["labels"][i, : len(prompt)].eq(-100).all()
        assert batch["labels"][i, len(prompt) : width].tolist() == completion
        assert batch["labels"][i, width:].eq(-100).all()


def test_any_collator_whose_labels_begin_after_the_prompt_will_do() -> None:
    data = [{"input_ids": [0, 0, 5, 6, 7, 8], "attention_mask": [0, 0, 1, 1, 1, 1], "labels": [-100] * 4 + [7, 8]}] * 4
    student = llama(0)
    found = trainer(student, llama(1), data)
    assert found.data_collator is not None
    batch = default_data_collator(data)
    ids, mask = rollouts.prompts(batch, batch["attention_mask"] != 0)
    assert ids.tolist() == [[5, 6]] * 4
    assert mask.all()
    ((made,), counts) = first_step(found)
    assert counts[0] == (made["labels"] != -100).sum()


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"teacher": None}, ValueError, "teacher must be able to score"),
        ({"lmbda": 1.5}, ValueError, "lmbda must be at least 0 and at most 1, not 1.5"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"sampling_temperature": 0.0}, ValueError, "sampling_temperature must be above 0"),
        ({"generation": {"top_k": 3}}, TypeError, "generation must be a GenerationConfig, not dict"),
        ({"generation": GenerationConfig(do_sample=False)}, ValueError, "generation must have max_new_tokens"),
        ({"generation": greedy(num_beams=2, num_return_sequences=2)}, ValueError, "one completion to a prompt"),
        ({"kd": KDConfig()}, ValueError, "ce_weight must be 0 with lmbda=1"),
        ({"kd": KDConfig(ce_weight=0.0, kd_on="attended")}, ValueError, "kd_on must be 'labels'"),
        ({"estimator": "k1"}, ValueError, "are for a teacher that is a function"),
        ({"student_top_k": 0}, ValueError, "student_top_k must be in"),
        ({"teacher": "token", "estimator": "k5"}, ValueError, "estimator must be one of policy"),
        ({"teacher": "token", "estimator": "k1", "lmbda": 0.5}, ValueError, "lmbda must be 1 with estimator="),
        ({"teacher": "token", "estimator": "k1", "sampling_temperature": 0.7}, ValueError, "whole distribution alone"),
        (
            {"teacher": "token", "estimator": "k1", "generation": GenerationConfig(do_sample=True, max_new_tokens=4)},
            ValueError,
            "whole distribution alone",
        ),
        (
            {"teacher": "token", "estimator": "k1", "generation": sampled(top_h=0.4)},
            ValueError,
            "whole distribution alone",
        ),
        ({"teacher": "token", "estimator": "k1", "student": dropping()}, ValueError, "needs a student without dropout"),
        ({"teacher": "token"}, TypeError, "teacher must return a TeacherTopK or a dict .* not Tensor"),
        ({"teacher": "topk", "estimator": "k2"}, TypeError, "what teacher returned must be a tensor"),
        ({"teacher": "topk", "kd": KDConfig(temperature=1.0, ce_weight=0.0)}, ValueError, "tail='bucket', but kd has"),
        (
            {"teacher": lambda ids, mask: ids[:, 1:], "estimator": "k2"},
            ValueError,
            r"shape \(4, .*, a row for",
        ),
        ({"data": rows(completions=False), "lmbda": 0.0}, ValueError, "the data has no completions, but lmbda=0.0"),
        ({"data": [{"input_ids": [3, 4], "labels": [3, 4]}] * 4}, ValueError, "row 0 of the batch has no prompt"),
        ({"data": [{"prompt": "ab"}] * 4}, ValueError, "example 0 is text, for which a tokenizer is needed"),
        ({"data": [{"prompt": []}] * 4}, ValueError, "the prompt of example 0 is empty"),
        ({"data": [PICTURE] * 4}, ValueError, "prompts of text alone, but the batch has pixel_values: pass lmbda=0"),
        ({"max_new_tokens": 64}, ValueError, "more than the 64 positions of LlamaForCausalLM"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], error: type[Exception], sentence: str) -> None:
    given = {"student": llama(0), "teacher": llama(1), **change}
    if isinstance(given["teacher"], str):
        given["teacher"] = scores(llama(1), given["teacher"])
    with pytest.raises(error, match=sentence):
        first_step(trainer(**given))
