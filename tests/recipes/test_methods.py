"""Every method of `recipes.glue` trains, on every kind of task that it takes, and refuses the others by one line."""

import gc
import weakref

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from tiny_run import tiny_run

from fusedkd.integrations.command import UsageError
from recipes.glue.method import methods, parse_method

TASKS = ("sst2", "stsb")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", methods())
def test_a_method_trains(tmp_path, tokenizer, name, task):
    """From partly labelled data; the teacher and what the student comes from stay as they are."""
    run, chosen = tiny_run(tmp_path, tokenizer, task, labels=12), parse_method(name)
    if task == "stsb" and "classes" in chosen.method.needs:
        with pytest.raises(UsageError, match="needs classes"):
            chosen.check(run)
        return
    chosen.check(run)
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in (run.source, run.teacher)]
    short = {"pretraining": 0} if "pretraining" in chosen.method.options else {}
    model = chosen.method.train(run, **short)
    for kept, weights in zip((run.source, run.teacher), before, strict=True):
        assert all(torch.equal(v, weights[k]) for k, v in kept.state_dict().items())
    start = run.student().state_dict()
    found = model.state_dict()
    assert start.keys() != found.keys() or any(not torch.equal(v, start[k]) for k, v in found.items())
    logits = run.logits(model)
    assert logits.shape == ((8, 2) if task == "sst2" else (8,))
    assert logits.isfinite().all()


def test_names_and_options_are_parsed():
    chosen = parse_method("pkd:variant=last,beta=100")
    assert chosen.options == {"variant": "last", "beta": 100.0}
    assert isinstance(chosen.options["beta"], float)


def test_each_text_has_a_folder_of_its_own():
    """Those of plain names and numbers are spelt as they are written."""
    plain = {"ce": "ce", "pkd:variant=last,beta=1e-2": "pkd-variant=last-beta=1e-2"}
    assert {text: parse_method(text).folder for text in plain} == plain
    texts = ["pkd:beta=1e+2", "pkd:beta=1e-2", "pkd:", "pkd", "pkd:beta=1,", "pkd:beta=1"]
    texts += [f"kd:augment=1,generator={path}" for path in ("a/b", "a-b", "a_b", "a:b", "a%2Fb", "a b")]
    texts += ["kd:augment=1,generator=a,temperature=2", "kd:augment=1,generator=a-temperature=2"]
    names = [parse_method(text).folder for text in texts]
    assert len({*names}) == len(texts)
    assert not any("/" in name for name in names)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nothing", "--method nothing: it must be all, or of "),
        ("pkd:gamma=1", "no option 'gamma=1'; its options are variant=skip"),
        ("pkd:beta=much", "beta must be a number, not 'much'"),
        ("pkd:alpha=2", "alpha must be between 0 and 1, not 2"),
        ("jsd:temperature=0", "temperature must be above 0, not 0"),
        ("mate_kd:pretraining=-1", "pretraining must be 0 or above, not -1"),
        ("mate_kd:share=0", "share must be above 0 and at most 1, not 0"),
        ("alp_kd:lambda_=-1", "lambda_ must be 0 or above, not -1"),
        ("codir:bank=0", "bank must be above 0, not 0"),
        ("kd:augment=2.5", "augment must be a whole number, not '2.5'"),
        ("kd:generator=lm", "a generator is of use to kd only with augment=N"),
    ],
)
def test_other_names_and_options_are_refused(text, sentence):
    with pytest.raises(UsageError, match=sentence):
        parse_method(text)


def test_the_teachers_logits_are_of_the_model_as_it_is(tmp_path, tokenizer):
    """They are kept for the rows of a training, and made anew once the model has changed."""
    run = tiny_run(tmp_path, tokenizer, arguments={"max_steps": 4})
    seen = []

    def loss(step):
        with torch.no_grad():
            run_now = step.run(step.teacher_model)
        seen.append((step.teacher.logits - run_now.logits).abs().max().item())
        return step.soft()

    run.fit(run.student(), loss)
    assert len(run.known_logits) == 1
    run.fit(run.student(), loss)
    assert len(run.known_logits) == 1
    with torch.no_grad():
        run.teacher.classifier.bias += 1
    run.fit(run.student(), loss)
    assert len(run.known_logits) == 2
    assert max(seen) < 1e-5


def test_a_teacher_that_was_trained_on_the_way_is_not_kept(tmp_path, tokenizer):
    run = tiny_run(tmp_path, tokenizer)
    teacher = run.fit(run.source_again(), lambda step: step.hard(), steps=1)
    run.fit(run.student(), lambda step: step.soft(), teacher=teacher)
    assert not run.known_logits
    kept = weakref.ref(teacher)
    del teacher
    gc.collect()
    assert kept() is None
