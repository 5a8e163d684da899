"""Minimax-kNN: which texts are near, which of them the student is furthest from the teacher on, and what is learnt."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from one_step import assert_step, one_sgd_step
from tiny_run import tiny_run

from fusedkd.integrations.command import UsageError
from recipes.glue.trainer import IndexedPadding
from recipes.methods import knn


def test_neighbours_are_those_of_the_mean_pooled_states(tmp_path, tokenizer):
    """Whatever the padding of their batch."""
    run = tiny_run(tmp_path, tokenizer, "rte", labels=10)
    rows = run.train.map(
        lambda row: {k: v[: 5 + row["index"] % 9] if isinstance(v, list) else v for k, v in row.items()}
    )
    found = knn.encoded(run, run.teacher, rows)
    for row, each in zip(rows, found, strict=True):
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.no_grad():
            mean = run.teacher.bert(**inputs).last_hidden_state[0].mean(0)
        torch.testing.assert_close(each, mean / mean.norm(), rtol=1e-4, atol=1e-6)
    close = knn.nearest(found[:10], found[10:], 3)
    for one, ids in zip(found[:10], close, strict=True):
        ranked = sorted(range(14), key=lambda i: -float(F.cosine_similarity(one, found[10 + i], dim=0)))
        assert ids.tolist() == ranked[:3]


def test_the_furthest_of_each_text_are_chosen():
    teacher = torch.tensor([[0.0, 3.0], [0.0, 0.0], [3.0, 0.0], [1.0, 0.0], [0.0, 9.0], [0.0, 1.0]])
    student = torch.zeros(6, 2)
    assert knn.furthest(student, teacher, 2, 1, 5.0).tolist() == [0, 4]
    assert sorted(knn.furthest(student, teacher, 2, 2, 5.0).tolist()) == [0, 2, 3, 4]
    scores = torch.tensor([0.0, -5.0, 1.0, 2.0, -1.0, 0.0])
    assert knn.furthest(torch.zeros(6), scores, 2, 1, 5.0).tolist() == [1, 3]


@pytest.mark.parametrize(("task", "cuts", "chosen"), [("sst2", 2, 2), ("sst2", 1, 3), ("stsb", 2, 1)])
def test_the_students_step_is_the_formulas(tmp_path, tokenizer, task, cuts, chosen):
    run = one_sgd_step(tmp_path, tokenizer, task, cuts, labels=8)
    options = {"alpha_true": 0.2, "alpha_kd": 0.3, "alpha_aug": 0.9, "temperature": 3.0}
    model = knn.minimax_knn(run, neighbours=3, chosen=chosen, **options)
    columns = ("input_ids", "attention_mask", "token_type_ids")
    states = knn.encoded(run, run.teacher, run.train)

    def outputs(model, rows):
        batch = IndexedPadding(tokenizer)([run.train[i] for i in rows])
        return model(**{name: batch[name] for name in columns}).logits

    def apart(q, p):
        """Of each row."""
        if task == "stsb":
            return (q - p).square().squeeze(-1)
        return 9 * F.kl_div((q / 3).log_softmax(-1), (p / 3).softmax(-1), reduction="none").sum(-1)

    def loss(student):
        total, others = 0.0, run.unlabelled["index"]
        for row in run.labelled["index"]:
            near = sorted(others, key=lambda i: -float(states[row] @ states[i]))[:3]
            with torch.no_grad():
                teacher = outputs(run.teacher, [row, *near])
                far = apart(outputs(student.eval(), near), teacher[1:]).topk(chosen).indices.tolist()
            q = outputs(student.train(), [row, *(near[i] for i in far)])
            label = torch.tensor(run.train[row]["labels"])
            own = (q[0, 0] - label).square() if task == "stsb" else F.cross_entropy(q[0], label)
            terms = apart(q, teacher[[0, *(1 + i for i in far)]])
            total = total + 0.2 * own + 0.3 * terms[0] + 0.9 * terms[1:].mean()
        return total / 8

    assert_step(run, model, loss)


def test_numbers_of_neighbours_that_cannot_be_are_refused(tmp_path, tokenizer):
    run = tiny_run(tmp_path, tokenizer, labels=20)
    for options in ({"neighbours": 5}, {"neighbours": 2, "chosen": 3}, {"neighbours": 2, "chosen": 0}):
        with pytest.raises(UsageError, match="there must be 0 < chosen <= neighbours <= 4, the texts without a label"):
            knn.minimax_knn(run, **options)
