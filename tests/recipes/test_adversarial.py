"""A student on embeddings shifted against it."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from one_step import assert_step, one_sgd_step

from recipes.glue.trainer import IndexedPadding
from recipes.methods.adversarial import adversarial


def test_the_students_step_is_the_formulas(tmp_path, tokenizer):
    """Example by example; cut into two micro-batches."""
    run = one_sgd_step(tmp_path, tokenizer, "sst2", cuts=2, count=8)
    model = adversarial(run, epsilon=0.7)
    batch = IndexedPadding(tokenizer)([*run.train])

    def loss(student):
        total, table = 0.0, student.get_input_embeddings()
        for i in range(8):
            inputs = {name: batch[name][i : i + 1] for name in ("attention_mask", "token_type_ids")}
            own = table(batch["input_ids"][i : i + 1])
            clean = F.cross_entropy(student(inputs_embeds=own, **inputs).logits, batch["labels"][i : i + 1])
            (g,) = torch.autograd.grad(clean, own, retain_graph=True)
            shifted = student(inputs_embeds=own + 0.7 * g / g.square().sum().sqrt(), **inputs).logits
            hard = F.cross_entropy(shifted, batch["labels"][i : i + 1])
            assert hard > clean
            total = total + clean + hard
        return total / 8

    assert_step(run, model, loss)
