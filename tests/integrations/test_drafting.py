"""Draft heads against plain PyTorch in float64: shifts, the draft's vocabulary, labels outside of it, weights, one
product with the target's head for all of them, acceptance; gradients; what is refused.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fusedkd import JSD, TeacherHead, TeacherLogits, TeacherTopK
from fusedkd.integrations import drafting
from fusedkd.integrations.drafting import draft_acceptance, draft_columns, draft_loss

B, L, V, DRAFT, H, M = 2, 9, 40, 24, 8, 3
IDS = torch.randperm(V, generator=torch.Generator().manual_seed(5))[:DRAFT].sort().values


def drawn(dtype: torch.dtype = torch.float64, columns: int = DRAFT) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    labels = torch.randint(V, (B, L), generator=draw)
    labels[0, :2] = labels[1, 7:] = -100
    found = {"hidden": [normal(B, L, H) for _ in range(M)], "weights": [normal(columns, H) * 0.7 for _ in range(M)]}
    found |= {"biases": [normal(columns), None, normal(columns)], "labels": labels}
    found |= {"teacher": TeacherHead(normal(B, L, 12), normal(V, 12) * 0.5, normal(V), softcap=6.0, scale=0.9)}
    leaves(found)
    return found


def logits_of(teacher: TeacherHead) -> Tensor:
    v = teacher.hidden.double() @ teacher.weight.double().T + teacher.bias.double()
    return teacher.softcap * torch.tanh(teacher.scale * v / teacher.softcap)


def truth(
    batch: dict[str, Any],
    ids: Tensor | None,
    distance: list[float],
    shifts: list[int],
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    kept: bool = False,
    documents: Tensor | None = None,
    counts: list[int] | None = None,
) -> Tensor:
    """Row by row: T²·KL and cross-entropy of each head, means over its rows."""
    v, total = logits_of(batch["teacher"]), torch.zeros((), dtype=torch.float64)
    ids = torch.arange(V) if ids is None else ids
    p = (v[..., ids] / temperature).log_softmax(-1)
    for i, (states, weight, bias) in enumerate(zip(batch["hidden"], batch["weights"], batch["biases"], strict=True)):
        z = states.double() @ weight.double().T + (0 if bias is None else bias.double())
        q, kls, ces = (z / temperature).log_softmax(-1), [], []
        for b in range(B):
            for t in range(L - shifts[i]):
                ahead = t + shifts[i]
                label = batch["labels"][b, ahead].item()
                if label == -100 or (documents is not None and documents[b, t] != documents[b, ahead]):
                    continue
                if kept or label in ids:
                    kls.append((p[b, ahead].exp() * (p[b, ahead] - q[b, t])).sum() * temperature**2)
                if label in ids:
                    ces.append(-z[b, t].log_softmax(-1)[ids.tolist().index(label)])
        count = len(kls) if counts is None else counts[i]
        total = total + distance[i] * (
            sum(kls) / count + ce_weight * sum(ces) / (len(ces) if counts is None else count)
        )
    return total


def leaves(batch: dict[str, Any]) -> list[Tensor]:
    found = [x for x in (*batch["hidden"], *batch["weights"], *batch["biases"]) if x is not None]
    return [x.requires_grad_() for x in found]


def same(batch: dict[str, Any], wanted: Tensor, loss: Tensor, tolerance: float = 1e-9) -> None:
    inputs = [x for x in leaves(batch) if x.requires_grad]
    found = [torch.autograd.grad(x, inputs, retain_graph=True) for x in (wanted, loss)]
    assert loss.item() == pytest.approx(wanted.item(), rel=tolerance)
    for a, b in zip(*found, strict=True):
        assert (a - b).double().norm() <= tolerance * a.double().norm()
        assert a.norm() > 1e-4


def ours(batch: dict[str, Any], **options: Any) -> Any:
    return draft_loss(
        batch["hidden"], batch["weights"], batch["teacher"], batch["labels"], head_biases=batch["biases"], **options
    )


CASES = [
    ({}, {"distance": [1, 0.8, 0.64], "shifts": [1, 2, 3]}),
    (
        {"distance_weights": [1.0, 2.0, 0.5], "shifts": [0, 2, 4]},
        {"distance": [1, 2, 0.5], "shifts": [0, 2, 4]},
    ),
    (
        {"temperature": 2.0, "ce_weight": 0.3, "outside": "keep", "distance_weights": 0.5},
        {"temperature": 2.0, "ce_weight": 0.3, "kept": True, "distance": [1, 0.5, 0.25], "shifts": [1, 2, 3]},
    ),
    (
        {"ce_weight": 1.0, "kd_normalizer": [5, 6, 7], "ce_normalizer": [5, 6, 7]},
        {"ce_weight": 1.0, "counts": [5, 6, 7], "distance": [1, 0.8, 0.64], "shifts": [1, 2, 3]},
    ),
]


@pytest.mark.parametrize(("given", "means"), CASES)
@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "draft"])
def test_value_and_gradient(given: dict[str, Any], means: dict[str, Any], once: bool, ids: Tensor | None) -> None:
    batch = drawn(columns=V if ids is None else DRAFT)
    loss = ours(batch, draft_ids=ids, max_teacher_bytes=(1 << 30) * once, **given)
    same(batch, truth(batch, ids, **means), loss)


def test_documents_are_kept_apart() -> None:
    batch, documents = drawn(), torch.tensor([[0] * 4 + [1] * 5, [2] * 7 + [3] * 2])
    loss = ours(batch, draft_ids=IDS, documents=documents)
    same(batch, truth(batch, IDS, [1, 0.8, 0.64], [1, 2, 3], documents=documents), loss)


def test_one_product_with_the_targets_head_for_all_heads() -> None:
    batch = drawn(torch.float32)
    with mock.patch.object(drafting, "product", wraps=drafting.product) as made:
        ours(batch, draft_ids=IDS)
        assert made.call_count == 1
        ours(batch, draft_ids=IDS, max_teacher_bytes=B * L * DRAFT * 4 - 1)
        assert made.call_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types(dtype: torch.dtype) -> None:
    batch = drawn(dtype)
    same(
        batch,
        truth(batch, IDS, [1, 0.8, 0.64], [1, 2, 3]),
        ours(batch, draft_ids=IDS),
        1e-5 if dtype == torch.float32 else 0.02,
    )


def test_autocast_casts_the_targets_head_as_well() -> None:
    batch = drawn(torch.float32)
    whole = ours(batch, draft_ids=IDS)
    with torch.autocast("cpu", torch.bfloat16):
        once, anew = (ours(batch, draft_ids=IDS, max_teacher_bytes=b) for b in (1 << 30, 0))
    assert once.item() == pytest.approx(anew.item(), rel=1e-5)
    assert 0 < abs(once - whole) < 0.02 * whole


def test_given_logits_one_weight_for_all_and_masks_of_each_kind() -> None:
    batch = drawn()
    inside = torch.isin(batch["labels"], IDS)
    batch |= {"weights": batch["weights"][:1] * M, "biases": [None] * M}
    wanted = truth(batch, IDS, [1, 0.8, 0.64], [1, 2, 3])
    logits = TeacherLogits(logits_of(batch["teacher"]))
    for mask in (inside, inside.int(), inside.double()):
        loss = draft_loss(batch["hidden"], batch["weights"][0], logits, kd_mask=mask, draft_ids=IDS)
        same(batch, wanted, loss)


def test_terms_are_of_each_head() -> None:
    batch = drawn()
    loss, terms = ours(batch, draft_ids=IDS, ce_weight=0.3, return_terms=True, distance_weights=[3.0, 2.0, 1.0])
    assert loss.item() == pytest.approx(
        sum(w * (t.kd + 0.3 * t.ce).item() for w, t in zip((3, 2, 1), terms, strict=True))
    )
    shorter = ours(batch, draft_ids=IDS, shifts=[1, 2, L + 1], return_terms=True)[1]
    assert shorter[2].kd == 0
    assert shorter[0].kd == terms[0].kd


def test_other_divergences() -> None:
    batch = drawn()
    jsd, tv = (ours(batch, draft_ids=IDS, divergence=d) for d in (JSD(0.3), "total_variation"))
    assert 0 < jsd < ours(batch, draft_ids=IDS)
    assert 0 < tv < 1 + 0.8 + 0.64


# -------------------------------------------------- acceptance


def accepted(batch: dict[str, Any], ids: Tensor, mask: Tensor, temperature: float) -> list[float]:
    p, found = (logits_of(batch["teacher"]) / temperature).softmax(-1), []
    for i, (states, weight, bias) in enumerate(zip(batch["hidden"], batch["weights"], batch["biases"], strict=True)):
        z = 5.0 * torch.tanh((states @ weight.T + (0 if bias is None else bias)) / 5.0)
        q = torch.zeros(B, L, V, dtype=torch.float64).index_copy(-1, ids, (z / temperature).softmax(-1))
        least = torch.minimum(p[:, i + 1 :], q[:, : L - i - 1]).sum(-1)
        found.append(least[mask[:, i + 1 :]].mean().item())
    return found


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "draft"])
@pytest.mark.parametrize("rows", [4, 1024])
def test_acceptance_counts_the_targets_whole_vocabulary(ids: Tensor | None, rows: int, monkeypatch) -> None:
    monkeypatch.setattr(drafting, "ROWS", rows)
    batch = drawn(columns=V if ids is None else DRAFT)
    mask = batch["labels"] != -100
    given = {"draft_ids": ids, "head_biases": batch["biases"], "temperature": 0.8, "logit_softcap": 5.0}
    found = draft_acceptance(batch["hidden"], batch["weights"], batch["teacher"], mask, **given)
    wanted = accepted(batch, torch.arange(V) if ids is None else ids, mask, 0.8)
    assert found.rates.tolist() == pytest.approx(wanted, rel=1e-5)
    assert found.rows.tolist() == [mask[:, i + 1 :].sum() for i in range(M)]
    assert all(0.01 < rate < 0.99 for rate in wanted)


def test_training_on_the_draft_raises_acceptance() -> None:
    batch = drawn(torch.float32)
    inputs, rates = leaves(batch), []
    optimizer = torch.optim.Adam(inputs, lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        ours(batch, draft_ids=IDS, outside="keep").backward()
        optimizer.step()
        given = {"draft_ids": IDS, "head_biases": batch["biases"]}
        rates.append(
            draft_acceptance(
                batch["hidden"], batch["weights"], batch["teacher"], batch["labels"] != -100, **given
            ).rates
        )
    held = logits_of(batch["teacher"]).softmax(-1)[..., IDS].sum(-1)[batch["labels"] != -100].mean()
    assert (rates[-1] > rates[0] + 0.1).all()
    assert (rates[-1] < held + 0.1).all()  # what the target has outside of the draft's vocabulary is never accepted


# -------------------------------------------------- columns, mistakes


def test_columns_of_a_checkpoint() -> None:
    t2d = torch.zeros(V, dtype=torch.bool).index_fill(0, IDS, True)
    d2t = IDS - torch.arange(DRAFT)
    for given in ({"d2t": d2t}, {"t2d": t2d}, {"d2t": d2t, "t2d": t2d}):
        assert torch.equal(draft_columns(**given), IDS)
    with pytest.raises(ValueError, match="d2t and t2d name different columns"):
        draft_columns(d2t=d2t + 1, t2d=t2d)
    with pytest.raises(ValueError, match="draft_columns needs d2t or t2d"):
        draft_columns()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reduction": "none"}, 'reduction must be "mean" or "sum"'),
        ({"outside": "ignore"}, "outside must be"),
        ({"distance_weights": [1.0]}, "distance_weights must be a number, or one for each of the 3 heads, not 1"),
        ({"shifts": [1, 2]}, "shifts must be one for each of the 3 heads, not 2"),
        ({"shifts": [1, 2, -1]}, r"shifts\[2\] must be at least 0, not -1"),
        ({"kd_normalizer": [1, 2]}, "kd_normalizer must be a number, or one for each of the 3 heads"),
        ({"kd_mask": torch.ones(B, L + 1)}, r"kd_mask must have the teacher's rows \(2, 9\), not \(2, 10\)"),
        ({"documents": torch.ones(B, 1)}, "documents must have the teacher's rows"),
        (
            {"draft_ids": IDS - torch.arange(DRAFT)},
            "draft_ids must be different columns of the target, 0 to 39; are they offsets",
        ),
        ({"draft_ids": IDS[1:]}, r"head_weights\[0\] must have a row for each of 23 draft_ids, not 24"),
        ({"draft_ids": IDS.int()}, "draft_ids must be int64"),
        ({"labels": torch.full((B, L), V)}, "labels must be -100 or columns of the target, 0 to 39"),
        ({"labels": torch.ones(B, L + 1, dtype=torch.int64)}, "labels must have the teacher's rows"),
        ({"hidden": torch.ones(B, L, H)}, "heads_hidden must be a list"),
        ({"hidden": [torch.ones(B, 3, H)] * M}, r"heads_hidden\[0\] must have the teacher's rows"),
        ({"teacher": TeacherTopK(IDS, IDS)}, "teacher must be a TeacherHead or TeacherLogits, not TeacherTopK"),
        ({"tau": 2.0}, "has no option tau"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], says: str) -> None:
    batch = drawn()
    batch |= {name: change.pop(name) for name in list(change) if name in batch}
    arguments = {"draft_ids": IDS} | change
    with pytest.raises((ValueError, TypeError), match=says):
        draft_loss(batch["hidden"], batch["weights"], batch["teacher"], batch["labels"], **arguments)
