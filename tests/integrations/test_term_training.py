"""Training with terms: one gradient however a step is cut, projections and their checkpoints, other students."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fusedkd.integrations import presets
from fusedkd.integrations.check import kd_check
from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.terms import AttentionTerm, HiddenTerm

from .distil_step import lora, rows, trainer
from .term_step import EVERYTHING, NONE, models, step
from .term_truth import assert_same
from .test_transformers import truth as truth_of_logits

CUTS = [(4, 2), (2, 4), (1, 8)]


# ---- one gradient


@pytest.fixture(scope="module")
def whole():
    """All rows at once."""
    return step(*models(), EVERYTHING, KDConfig())


@pytest.mark.parametrize(("batch", "accumulation"), CUTS)
def test_one_gradient_however_a_step_is_cut(whole, batch, accumulation):
    gradient, logs, _ = step(*models(), EVERYTHING, KDConfig(), batch=batch, accumulation=accumulation)
    assert_same(gradient, whole[0])
    for name in ("loss", "kd", "ce", *(term.name for term in EVERYTHING)):
        assert logs[name] == pytest.approx(whole[1][name], rel=1e-5), name
        assert logs[name] > 1e-3


def test_the_whole_is_the_sum_of_its_parts(whole):
    (student, teacher), silent = models(), KDConfig(kd_weight=0.0, ce_weight=0.0)
    (gradient, logs), alone = (
        truth_of_logits(student, teacher, KDConfig(), causal=False),
        step(*models(), EVERYTHING, silent),
    )
    both = {name: g + gradient.get(name, 0) for name, g in alone[0].items()}
    both |= {name: g for name, g in gradient.items() if name not in alone[0]}
    assert_same(whole[0], both)
    assert whole[1]["loss"] == pytest.approx(logs["loss"] + alone[1]["loss"], rel=1e-5)


def test_the_check_of_any_trainer_finds_no_fault():
    """As it does not for what depends on padding, the scores."""
    terms = [term for term in EVERYTHING if term.name != "scores"]
    report = kd_check(trainer(*models(), KDConfig(), terms=terms))
    assert report.ok, report


def test_an_evaluation_is_a_mean_over_rows(whole):
    options = {"eval_dataset": list(rows()), "per_device_eval_batch_size": 3}
    found = trainer(*models(), KDConfig(), terms=EVERYTHING, **options).evaluate()
    for name in ("loss", *(term.name for term in EVERYTHING)):
        assert found[f"eval_{name}"] == pytest.approx(whole[1][name], rel=1e-5), name


def test_an_evaluation_of_relations_with_grouped_values():
    """Queries have more heads than values: the mean over heads is each relation's own."""
    _, logs, _ = step(*models("llama"), presets.minilm()["terms"])
    options = {"eval_dataset": list(rows()), "per_device_eval_batch_size": 3}
    found = trainer(*models("llama"), NONE, terms=presets.minilm()["terms"], **options).evaluate()
    assert found["eval_relations"] == pytest.approx(logs["relations"], rel=1e-5)


def test_autocast_behind_rotary_embeddings():
    """Queries are of 32 bits there, the attention that the term is told apart from another by of 16."""
    found = []
    for bf16 in (False, True):
        run = trainer(*models("llama"), NONE, terms=presets.minilm()["terms"], bf16=bf16)
        run.train()
        found.append(run.state.log_history[0]["relations"])
    assert found[1] == pytest.approx(found[0], rel=0.05)
    assert found[0] > 0


# ---- projections


def weights_of(found) -> dict[str, torch.Tensor]:
    return {**found.model.state_dict(), **{f"projections.{k}": v for k, v in found.projections.state_dict().items()}}


def test_projections_are_trained_saved_and_left_out_of_the_student(tmp_path):
    from safetensors.torch import load_file

    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "batch": 4}
    run, again = (trainer(*models(), KDConfig(), terms=EVERYTHING, folder=str(tmp_path / n), **options) for n in "ab")
    start = {k: v.clone() for k, v in weights_of(again).items()}
    own = [k for k in start if k.startswith("projections")]
    assert len(own) == 8
    run.train()
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    for name, value in weights_of(run).items():
        assert torch.equal(value, weights_of(again)[name]), name
    assert not any(torch.equal(weights_of(run)[name], start[name]) for name in own)
    names = models()[0].state_dict().keys()
    assert run.model.state_dict().keys() == names
    run.save_model(str(tmp_path / "model"))
    for saved in ("model", "a/checkpoint-1"):
        assert load_file(tmp_path / saved / "model.safetensors").keys() <= names
    (tmp_path / "a" / "checkpoint-1" / "distillation_terms.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-1 has no distillation_terms.safetensors"):
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))


def test_a_projection_draws_nothing_from_the_generator_of_everything_else():
    torch.manual_seed(0)
    first = trainer(*models(), terms=EVERYTHING)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    second = trainer(*models())
    assert torch.equal(after, torch.get_rng_state())
    assert not second.projections
    other = trainer(*models(), terms=EVERYTHING, seed=1)
    one, two = first.projections["hidden"][0].weight, other.projections["hidden"][0].weight
    assert not torch.equal(one, two)
    assert one.std().item() == pytest.approx(torch.nn.Linear(32, 48).weight.std().item(), rel=0.1)


def test_an_optimizer_without_the_projections_is_refused():
    student, teacher = models()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    found = trainer(student, teacher, terms=EVERYTHING, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="optimizers holds an optimizer without the projections"):
        found.train()
    optimizer.add_param_group({"params": list(found.projections.parameters())})
    found.train()


# ---- other students


def test_adapters_and_checkpointed_layers(whole):
    gradient, logs, _ = step(*models(), EVERYTHING, KDConfig(), gradient_checkpointing=True)
    assert_same(gradient, whole[0])
    pytest.importorskip("peft")
    student = lora(models()[0], target_modules=["query"]).eval()
    gradient, logs, _ = step(student, models()[1], EVERYTHING, KDConfig())
    assert any("lora" in name for name in gradient)
    assert any("hidden.0.weight" in name for name in gradient)
    assert logs["hidden"] > 0
    base = models("bert")[0]
    student = lora(base, target_modules=["query"]).eval()
    _, logs, _ = step(student, base, [HiddenTerm(), AttentionTerm()], KDConfig())
    assert logs["hidden"] > 0


def test_layers_are_drawn_for_each_epoch(tmp_path):
    """The same after a resumption."""
    term = HiddenTerm("random_sorted", name="drawn")
    options = {"batch": 4, "max_steps": -1, "num_train_epochs": 4, "save_strategy": "steps", "save_steps": 3}

    def run(folder: str, **more):
        drawn = []
        found = trainer(*models(width=32), NONE, terms=[term], folder=str(tmp_path / folder), **options)
        compute = found.compute_loss
        found.compute_loss = lambda *a, **o: (compute(*a, **o), drawn.append(found.bound.pairs["drawn"]))[0]
        found.train(**more)
        return drawn

    drawn = run("a")
    assert len(drawn) == 8
    assert all(drawn[i] == drawn[i + 1] for i in range(0, 8, 2))
    assert len(set(drawn)) > 1
    assert all([i for i, _ in pairs] == [1, 2] for pairs in drawn)
    assert run("b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3")) == drawn[3:]
