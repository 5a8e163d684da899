"""Several teachers in the trainer: a list with weights, and one for each row, which a column of the data names."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from fusedkd.distilbert.trainer import DistilBertTrainer
from fusedkd.integrations.check import kd_check
from fusedkd.integrations.evaluation import sums
from fusedkd.integrations.routed import TeacherColumnCollator
from fusedkd.integrations.transformers import KDConfig

from .distil_step import LENGTH, ROWS, SIZE, VOCAB, gradient, initialised, llamas, lora, make, rows, trainer
from .test_transformers import Padding, aligned, assert_equal, collated

KD = KDConfig(temperature=3.0, kd_weight=0.7, ce_weight=0.4)
NAMES = ["deep", "wide", None, "wide", "deep", "wide", "wide", None]
"""The teacher of each row: one has more than the others, two rows have none."""


def another(vocab: int = VOCAB):
    """A teacher of another width, and of a padded vocabulary if so asked."""
    return initialised(LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **SIZE | {"num_hidden_layers": 2})), 5)


def teachers(vocab: int = VOCAB):
    return {"wide": llamas()[1], "deep": another(vocab)}


def named(column: str = "teacher", names=NAMES):
    return [row | {column: name} for row, name in zip(rows(), names, strict=True)]


def per_row(student, teacher, kd: KDConfig, causal: bool = True):
    """(KD and cross-entropy of each token ``(B, L)``, the rows of each), by PyTorch's operators."""
    batch = collated(list(rows()))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    selected, labels = aligned(batch, causal, kd.kd_on)
    z = student(**inputs).logits.float()
    with torch.no_grad():
        v = teacher(**inputs).logits.float()[..., : z.shape[-1]]
    q, p = ((x / kd.temperature).log_softmax(-1) for x in (z, v))
    divergence = kd.temperature**2 * F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    return divergence, F.cross_entropy(z.mT, labels, reduction="none"), selected, labels != -100


def truth(student, each, kd: KDConfig, weights=None, names=None, causal: bool = True):
    """(gradient, loss and terms) of several teachers over all rows at once: of a list with weights, or of names."""
    found = {key: per_row(student, teacher, kd, causal) for key, teacher in each.items()}
    _, ce, selected, labelled = next(iter(found.values()))
    if names is None:
        divergence = sum(w * found[key][0] for key, w in zip(each, weights, strict=True))
    else:
        divergence = torch.stack([found[n][0][i] if n in found else ce[i] for i, n in enumerate(names)])
        selected = selected & torch.tensor([n in found for n in names])[:, None]
    terms = {"kd": divergence[selected].mean(), "ce": ce[labelled].mean()}
    loss = kd.kd_weight * terms["kd"] + kd.ce_weight * terms["ce"]
    student.zero_grad()
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return gradients, {"loss": loss.item()} | {name: term.item() for name, term in terms.items()}


def weighted(weights) -> KDConfig:
    return KDConfig(temperature=3.0, kd_weight=0.7, ce_weight=0.4, teacher_weights=weights)


# -------------------------------------------------- a list


@pytest.mark.parametrize(("weights", "vocab"), [(None, VOCAB), ([0.8, 0.5], VOCAB + 3)])
def test_a_list_is_the_weighted_sum(weights, vocab):
    student, each = llamas()[0], teachers(vocab)
    expected = truth(student, each, KD, weights or [0.5, 0.5])
    assert_equal(gradient(student, list(each.values()), weighted(weights), batch=4, accumulation=2), expected)


def test_a_list_of_masked_models():
    student, each = make("bert", 0), {"bert": make("bert", 1), "distilbert": make("distilbert", 2)}
    expected = truth(student, each, KD, [0.3, 0.7], causal=False)
    assert_equal(gradient(student, list(each.values()), weighted([0.3, 0.7])), expected)


def test_a_list_is_evaluated_as_a_whole_and_each_by_itself():
    student, each, weights = llamas()[0], teachers(), [0.8, 0.5]
    _, objective = truth(student, each, KD, weights)
    plain = KDConfig(temperature=1.0)
    alone = [truth(student, {"one": teacher}, plain, [1.0])[1]["kd"] for teacher in each.values()]
    options = {"eval_dataset": list(rows()), "per_device_eval_batch_size": 3}
    metrics = trainer(student, list(each.values()), weighted(weights), **options).evaluate()
    assert metrics["eval_loss"] == pytest.approx(objective["loss"], rel=1e-5)
    assert [metrics["eval_kl_0"], metrics["eval_kl_1"]] == pytest.approx(alone, rel=1e-5)
    assert metrics["eval_kl"] == pytest.approx(sum(w * kl for w, kl in zip(weights, alone, strict=True)), rel=1e-5)
    assert abs(alone[0] - alone[1]) > 0.01
    unused = weighted(weights)
    unused.kd_weight = 0.0
    metrics = trainer(student, list(each.values()), unused, **options).evaluate()
    assert metrics["eval_kl_1"] == pytest.approx(alone[1], rel=1e-5)


def test_the_student_with_adapters_off_is_one_of_several():
    pytest.importorskip("peft")
    base, student, other = llamas()[0], lora(llamas()[0], target_modules=["q_proj"]).eval(), llamas()[1]
    expected = truth(student, {"base": base, "other": other}, KD, [0.5, 0.5])
    assert expected[0]
    assert_equal(gradient(student, [student.get_base_model(), other], KD), expected)


def test_teachers_by_their_folders(tmp_path):
    each = teachers()
    for name, teacher in each.items():
        teacher.save_pretrained(tmp_path / name)
    expected = truth(llamas()[0], each, KD, [0.5, 0.5])
    assert_equal(gradient(llamas()[0], [str(tmp_path / "wide"), each["deep"]], KD), expected)
    folders = {"wide": tmp_path / "wide", "deep": tmp_path / "deep"}
    assert_equal(gradient(llamas()[0], folders, KD, data=named()), truth(llamas()[0], each, KD, names=NAMES))


@pytest.mark.parametrize("kind", [list, dict])
def test_the_check_of_a_trainer_with_several_teachers(kind):
    each = teachers()
    data = named() if kind is dict else list(rows())
    report = kd_check(trainer(llamas()[0], each if kind is dict else list(each.values()), data=data))
    assert report.ok, report
    assert report.gradient_power is not None


# -------------------------------------------------- one for each row


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4)])
def test_each_row_has_its_own_teacher(batch, accumulation):
    student, each = llamas()[0], teachers(VOCAB + 3)
    expected = truth(student, each, KD, names=NAMES)
    assert_equal(gradient(student, each, KD, data=named(), batch=batch, accumulation=accumulation), expected)


@pytest.mark.parametrize("name", ["softcap", "bert"])
def test_heads_of_several_kinds(name):
    """Soft-caps and biases of each teacher, and of the student; KD on attended rows."""
    student, each = make(name, 0), {0: make(name, 1), 1: make("distilbert" if name == "bert" else "bias", 2)}
    kd, names = KDConfig(kd_on="attended"), [0, 1, -1, 1, 1, 1, 0, 1]
    expected = truth(student, each, kd, names=names, causal=name != "bert")
    assert_equal(gradient(student, each, kd, data=named(names=names), batch=4, accumulation=2), expected)


def test_a_teacher_runs_on_its_own_rows_alone():
    """And a model of two names once."""
    each, seen = teachers(), []
    for name, teacher in each.items():
        keep = lambda module, args, given, name=name: seen.append((name, given["input_ids"]))  # noqa: E731
        teacher.register_forward_pre_hook(keep, with_kwargs=True)
    names = ["wide", "again", None, "wide", "deep", "again", "wide", "deep"]
    run = trainer(llamas()[0], each | {"again": each["wide"]}, KD, named(names=names))
    seen.clear()
    run.train()
    ids = torch.stack([row["input_ids"] for row in rows()])
    assert [name for name, _ in seen] == ["wide", "deep"]
    for (_, given), own in zip(seen, (("wide", "again"), ("deep",)), strict=True):
        assert sorted(given.tolist()) == sorted(ids[[n in own for n in names]].tolist())


def test_the_divergence_from_each_is_over_its_own_rows():
    student, each = llamas()[0], teachers()
    plain = KDConfig(temperature=1.0)
    expected = {"kl": truth(student, each, plain, names=NAMES)[1]["kd"]}
    for name in each:
        only = [n if n == name else None for n in NAMES]
        expected[f"kl_{name}"] = truth(student, each, plain, names=only)[1]["kd"]
    run = trainer(student, each, KD, named(), eval_dataset=named(), per_device_eval_batch_size=3)
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(truth(student, each, KD, names=NAMES)[1]["loss"], rel=1e-5)
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name
    one = trainer(student, each, KD, named(), eval_dataset=named(names=["wide"] * ROWS)).evaluate()
    assert one["eval_kl"] == one["eval_kl_wide"]
    assert "eval_kl_deep" not in one
    without = trainer(student, each, KD, named(), eval_dataset=list(rows())).evaluate()
    assert without["eval_ce"] == pytest.approx(metrics["eval_ce"], rel=1e-6)
    assert not [name for name in without if "kl" in name]


@pytest.mark.parametrize("torch_format", [False, True])
def test_names_and_numbers_of_a_data_set_reach_the_trainer(torch_format):
    """Through a collator that knows nothing of the column, which a Trainer leaves out as a rule."""
    datasets = pytest.importorskip("datasets")
    numbers = {0: llamas()[1], 1: another()}
    keys = [None if n is None else int(n == "deep") for n in NAMES] if torch_format else NAMES
    table = [{k: v.tolist() for k, v in row.items()} | {"text": "unused"} for row in rows()]
    table = datasets.Dataset.from_list([row | {"expert": key} for row, key in zip(table, keys, strict=True)])
    kd = KDConfig(temperature=3.0, kd_weight=0.7, ce_weight=0.4, teacher_column="expert")
    each = numbers if torch_format else teachers()
    found = gradient(llamas()[0], each, kd, data=table.with_format("torch") if torch_format else table)
    assert_equal(found, truth(llamas()[0], each, KD, names=keys))
    if not torch_format:
        stream = gradient(llamas()[0], each, kd, data=table.to_iterable_dataset())
        assert_equal(stream, truth(llamas()[0], each, KD, names=keys))


def test_the_column_says_what_is_wrong():
    collator = TeacherColumnCollator(default_data_collator, "teacher", ["wide", "deep"])
    assert collator(named())["teacher"].tolist() == [1, 0, -1, 0, 1, 0, 0, -1]
    with pytest.raises(ValueError, match="column teacher must name one of the teachers 'wide', 'deep', or none, not 3"):
        collator(named(names=[3] * ROWS))
    missing = TeacherColumnCollator(default_data_collator, "teacher", [0, 1])
    numbers = [0, 1.0, -1, None, math.nan, np.int64(1), np.nan, type("NA", (), {"__eq__": lambda a, b: a})()]
    assert missing(named(names=numbers))["teacher"].tolist() == [0, 1, -1, -1, -1, 1, -1, -1]
    flat = TeacherColumnCollator(transformers.DataCollatorWithFlattening(), "teacher", ["wide"])
    examples = [{k: v.tolist() for k, v in row.items()} | {"teacher": "wide"} for row in rows()]
    with pytest.raises(ValueError, match="made 1 rows out of 8 examples, each of which names a teacher"):
        flat(examples)
    short = TeacherColumnCollator(lambda rows: default_data_collator(rows) | {"teacher": ["wide"]}, "teacher", ["wide"])
    with pytest.raises(ValueError, match="made 8 rows, but its column teacher has 1 entries"):
        short(list(rows()))
    student, each = llamas()[0], teachers()
    message = "with a dict of teachers the data set must have the column teacher, but train_dataset has input_ids"
    with pytest.raises(ValueError, match=message):
        trainer(student, each)
    with pytest.raises(ValueError, match="train_dataset has a column teacher, but a list of teachers"):
        trainer(student, list(each.values()), data=named())
    with pytest.warns(UserWarning, match="column teacher, which is not read: teacher is a single model"):
        trainer(student, each["wide"], data=named())
    some = [row if i else {k: v for k, v in row.items() if k != "teacher"} for i, row in enumerate(named())]
    with pytest.raises(ValueError, match="7 of 8 examples have the column teacher: all must have it"):
        collator(some)
    with pytest.raises(ValueError, match="must have input_ids instead of inputs_embeds"):
        trainer(
            student, each, data=named(), collator=lambda rows: {"inputs_embeds": torch.zeros(ROWS, LENGTH, 4)}
        ).train()
    run = trainer(student, each, collator=Padding("right"))  # may make it
    with pytest.raises(ValueError, match="with a dict of teachers the data set must have the column teacher"):
        run.train()


def test_a_batch_without_the_column_reports_the_same_sums():
    """Ranks stack them and gather: one batch of an evaluation may have the column, and another rank's not."""
    run, names = trainer(llamas()[0], teachers(), KD, named()), []
    for data in (named(), list(rows())):
        with torch.no_grad():
            batch = run.data_collator(data)
            found, _ = run._run(run.model, batch, lambda pair: sums(run, pair), False, True)
        names.append(list(found))
        assert found["rows 0"].any() == found["rows of wide"].any() == ("teacher" in batch)
    assert names[0] == names[1]


def test_groups_are_added_up_under_every_reduction():
    """For a Trainer whose loss calls `linear` with less than the trainer's own does."""
    run = trainer(llamas()[0], teachers(), KD, named())
    batch, found = run.data_collator(named()), {}

    def losses(pair):
        for reduction in ("none", "sum", "mean"):
            found[reduction], found[f"{reduction} terms"] = run.linear(pair, reduction=reduction)
        return [mask.sum() for mask in pair.masks]

    with torch.no_grad():
        counts, _ = run._run(run.model, batch, losses, False, True)
    assert found["none"].shape == batch["input_ids"].shape
    assert torch.allclose(found["none"].sum(), found["sum"], rtol=1e-5)
    mean = 0.7 * found["sum terms"].kd / counts[0] + 0.4 * found["sum terms"].ce / counts[1]
    assert torch.allclose(found["mean"], mean, rtol=1e-5)
    _, expected = truth(llamas()[0], teachers(), KD, names=NAMES)
    assert found["mean"].item() == pytest.approx(expected["loss"], rel=1e-5)


# -------------------------------------------------- resumed


@pytest.mark.parametrize("kind", [list, dict])
def test_a_resumed_run_is_the_same_run(tmp_path, kind):
    each = teachers()
    options = {"data": named() if kind is dict else list(rows()), "batch": 2, "accumulation": 2, "learning_rate": 1e-2}
    options |= {"save_strategy": "steps", "save_steps": 2, "seed": 3}
    each = each if kind is dict else list(each.values())
    whole = trainer(llamas()[0], each, KD, folder=str(tmp_path / "whole"), max_steps=4, **options)
    whole.train()
    resumed = trainer(llamas()[0], each, KD, folder=str(tmp_path / "resumed"), max_steps=4, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    start = dict(llamas()[0].named_parameters())
    for name, p in whole.model.named_parameters():
        assert torch.equal(p, dict(resumed.model.named_parameters())[name]), name
    assert any(not torch.equal(p, start[name]) for name, p in whole.model.named_parameters())
    logged = [[h["kd"] for h in run.state.log_history if "kd" in h] for run in (whole, resumed)]
    assert logged[0] == logged[1]


# -------------------------------------------------- refused


@pytest.mark.parametrize(
    ("make_teacher", "weights", "error", "message"),
    [
        (lambda a, b: [a, b], [0.5], ValueError, "teacher_weights must hold one weight per teacher: 2, not 1"),
        (
            lambda a, b: {"a": a, "b": b},
            [0.5, 0.5],
            ValueError,
            "teacher_weights is for a list .* not for a dict",
        ),
        (lambda a, b: a, [1.0], ValueError, "teacher_weights is for a list of teachers.* not for a single model"),
        (lambda a, b: None, [1.0], ValueError, "teacher_weights is for a list of teachers.* not for None"),
        (lambda a, b: {"a": a, None: b}, None, ValueError, "a key of the dict teacher is None, which in the column"),
        (lambda a, b: {-1: a}, None, ValueError, "a key of the dict teacher is -1, which in the column means"),
        (lambda a, b: {0: a, "0": b}, None, ValueError, "keys 0 and '0' .* one name in the metrics, kl_0"),
        (lambda a, b: [], None, ValueError, "teacher is an empty list"),
        (lambda a, b: {}, None, ValueError, "teacher is an empty dict"),
        (lambda a, b: [a, None], None, TypeError, "teacher must be a model.* or None, not NoneType in a list"),
        (lambda a, b: [a, [b]], None, TypeError, "teacher must be a model.* or None, not list in a list"),
        (lambda a, b: [a, make("bert", 0)], None, ValueError, "LlamaForCausalLM is causal and BertForMaskedLM is mask"),
        (lambda a, b: [a, another(VOCAB + 300)], None, ValueError, "vocab"),
    ],
)
def test_what_is_no_list_or_dict_of_teachers(make_teacher, weights, error, message):
    student, teacher = llamas()
    with pytest.raises(error, match=message):
        trainer(student, make_teacher(teacher, another()), weighted(weights)).train()


def test_options_of_several_teachers():
    with pytest.raises(ValueError, match="teacher_weights must be at least 0"):
        KDConfig(teacher_weights=[0.5, -0.5])
    for weights, message in (([0, 0.0], r"must not all be 0, but is \[0, 0.0\]"), ([], "is empty: it must hold one")):
        with pytest.raises(ValueError, match=f"teacher_weights {message}"):
            KDConfig(teacher_weights=weights)
    with pytest.raises(TypeError, match="teacher_column must be the name of a column, not int"):
        KDConfig(teacher_column=3)
    with pytest.raises(ValueError, match="teacher_column must be a column of its own, not 'labels'"):
        KDConfig(teacher_column="labels")
    for teacher, what in ((llamas()[1], "a single model"), ([llamas()[1]], "a list"), (None, "None")):
        with pytest.raises(ValueError, match=f"teacher_column is for a dict of teachers.* not for {what}"):
            trainer(llamas()[0], teacher, KDConfig(teacher_column="expert"))
    with pytest.raises(TypeError, match="move_teacher must be True or False, not 'cuda:1'"):
        trainer(*llamas(), move_teacher="cuda:1")
    kd = KDConfig(kd_weight=0.0, teacher_weights=[0.5, 0.5])
    trainer(llamas()[0], None, kd)  # the ablation of the same configuration


def test_the_triple_loss_has_one_teacher():
    student = make("distilbert", 0)
    with pytest.raises(ValueError, match="teacher must be one model for the triple loss, not a list"):
        DistilBertTrainer(student, [make("bert", 1)], trainer(student, make("bert", 1)).args, default_data_collator)
