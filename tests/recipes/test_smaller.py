"""Students that are smaller in another way: a BiLSTM, zeros in the weights, layers left out."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from tiny_run import decoder, tiny_run
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from fusedkd.integrations.command import UsageError
from recipes.glue.compare import write_card
from recipes.glue.method import methods, parse_method
from recipes.glue.run import Run
from recipes.glue.step import Counts, Step
from recipes.glue.trainer import IndexedPadding
from recipes.methods import bilstm, depth_pruning, pruning

DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def trained(run, text: str):
    chosen = parse_method(text)
    chosen.check(run)
    return chosen.method.train(run, **chosen.options)


def first_batch(run, count: int = 8):
    return IndexedPadding(run.tokenizer)([run.train[i] for i in range(count)])


# ---- BiLSTM


def new_bilstm(run, **options):
    return bilstm.new_bilstm(run, **{"embedding": "teacher", "columns": 8, "hidden": 6, "dense": 5, **options})


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_a_bilstm_learns_the_squared_difference_of_logits(tmp_path, tokenizer, monkeypatch, task):
    """Value and gradient in float64; of classes a mean over these too, labels beside it."""
    run = tiny_run(tmp_path, tokenizer, task, labels=12)
    monkeypatch.setattr(Run, "fit", lambda self, model, loss, **_: (model.double(), loss))
    model, loss = bilstm.bilstm(run, alpha=0.3)
    batch = first_batch(run)
    batch["labels"] = batch["labels"].double() if task == "stsb" else batch["labels"]
    step = Step(model, run.teacher.double(), batch, Counts.of(batch), None)
    found = torch.autograd.grad(loss(step), list(model.parameters()), retain_graph=True)
    z, v, labels = step.student.logits, step.teacher.logits, batch["labels"]
    known = ~labels.isnan() if task == "stsb" else labels != -100
    hard = (z - labels)[known].square().mean() if task == "stsb" else F.cross_entropy(z[known], labels[known])
    truth = torch.autograd.grad(0.7 * F.mse_loss(z, v) + 0.3 * hard, list(model.parameters()))
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)  # the labels' loss is of float32


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_a_bilstm_reads_no_padding(tmp_path, tokenizer, task):
    """A text has the logits that it has alone; of two texts both are read to their ends by the same LSTM."""
    run = tiny_run(tmp_path, tokenizer, task)
    model, rows = new_bilstm(run), [run.train[i]["input_ids"] for i in range(3)]
    rows[1] = rows[1][:4] + rows[1][-1:] if task == "sst2" else rows[1]
    width = max(map(len, rows)) + 3
    right = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    left = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    alone = torch.cat([model(torch.tensor([row])).logits for row in rows])
    for ids in (right, left):
        torch.testing.assert_close(model(ids, (ids != 0).long()).logits, alone)
    if task == "stsb":
        row = rows[0]
        cut = row.index(tokenizer.sep_token_id) + 1
        states = []
        for part in (row[:cut], row[cut:]):
            _, (last, _) = model.lstm(model.embeddings(torch.tensor([part])))
            states.append(last.flatten())
        a, b = states
        read = torch.cat([a, b, a * b, (a - b).abs()])
        torch.testing.assert_close(model.classifier(model.dense(read).relu()), alone[0])


def test_a_bilstm_is_saved_and_loaded_as_any_model(tmp_path, tokenizer):
    run = tiny_run(tmp_path, tokenizer, "stsb")
    model = new_bilstm(run)
    assert torch.equal(model.embeddings.weight, run.source.get_input_embeddings().weight)
    assert torch.equal(model.dense.weight, new_bilstm(run).dense.weight)
    assert new_bilstm(run, embedding="random").embeddings.weight.shape == (len(tokenizer), 8)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(run.logits(loaded), run.logits(model))
    assert "sep_token_id" in json.loads((tmp_path / "saved" / "config.json").read_text())
    write_card(parse_method("bilstm"), tmp_path / "saved", model, "of nothing", {"parameters": 5})
    assert (
        "python\nimport recipes.methods.bilstm\nfrom transformers import" in (tmp_path / "saved/README.md").read_text()
    )


def test_a_bilstm_comes_closer_to_its_teacher(tmp_path, tokenizer):
    run = tiny_run(tmp_path, tokenizer, arguments={"max_steps": 30})
    target = run.logits(run.teacher)
    before, after = (F.mse_loss(run.logits(m), target) for m in (new_bilstm(run), trained(run, "bilstm")))
    assert after < 0.3 * before


def test_a_bilstm_needs_a_separator_for_two_texts(tmp_path, tokenizer, gpt2_tokenizer):
    run = tiny_run(tmp_path, tokenizer, "stsb")
    run.tokenizer = gpt2_tokenizer
    with pytest.raises(UsageError, match="reads two texts, as of stsb"):
        new_bilstm(run)


# ---- zeros


def zeros(model) -> dict[str, int]:
    return {name: int((weight == 0).sum()) for name, weight in model.named_parameters()}


@pytest.mark.parametrize("schedule", ["gradual", "one_shot"])
def test_each_matrix_of_the_layers_has_its_share_of_zeros(tmp_path, tokenizer, schedule):
    """Exactly that share, nowhere else, and after saving too."""
    run = tiny_run(tmp_path, tokenizer, arguments={"max_steps": 4})
    model, start = trained(run, f"magnitude_pruning:sparsity=0.6,schedule={schedule}"), zeros(run.student())
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert loaded.state_dict().keys() == run.student().state_dict().keys()
    pruned = {name for name, count in zeros(loaded).items() if count > start[name]}
    assert pruned == {n for n, p in model.named_parameters() if ".layer." in n and p.dim() == 2}
    for name in pruned:
        assert zeros(loaded)[name] == round(0.6 * loaded.get_parameter(name).numel())


def test_one_shot_prunes_the_smallest_pretrained_weights(tmp_path, tokenizer):
    run = tiny_run(tmp_path, tokenizer)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    start = run.student().get_parameter(name).abs()
    found = trained(run, "magnitude_pruning:schedule=one_shot").get_parameter(name) == 0
    assert start[found].max() <= start[~found].min()


def test_pruned_weights_have_no_gradient_and_stay_pruned(tmp_path, tokenizer):
    run = tiny_run(tmp_path, tokenizer)
    model = run.student()
    masks = pruning.Masks(model)
    masks.grow(0.4)
    name, module = next(iter(masks.matrices.items()))
    gone = module.weight_mask == 0
    batch = first_batch(run)
    Step(model, None, batch, Counts.of(batch), None).hard().backward()
    assert module.weight_orig.grad[gone].abs().max() == 0 < module.weight_orig.grad[~gone].abs().min()
    with torch.no_grad():
        module.weight_orig[gone] = 100.0
    masks.grow(0.7)
    assert (module.weight_mask[gone] == 0).all()
    masks.bake(0.7)
    assert (model.get_parameter(f"{name}.weight") == 0).sum() == round(0.7 * gone.numel())
    with pytest.raises(RuntimeError, match="zeros, not"):
        pruning.Masks(model).bake(0.9)


def test_layers_without_a_torch_linear_are_pruned_too():
    size = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 20, "n_positions": 8}
    model = GPT2ForSequenceClassification(GPT2Config(**size))
    masks = pruning.Masks(model)
    masks.grow(0.5)
    masks.bake(0.5)
    assert len(masks.matrices) == 2 * 4
    with pytest.raises(UsageError, match="Linear has no layers whose weights could be pruned"):
        pruning.Masks(torch.nn.Linear(2, 2))


def test_the_share_of_zeros_grows_as_a_cubic():
    found = [pruning.sparsity_at(i / 100, 0.8) for i in range(100)]
    assert found[0] == 0
    assert found == sorted(found)
    assert found[35] == pytest.approx(0.8 * (1 - 0.5**3))
    assert all(share == 0.8 for share in found[70:])


def test_a_ticket_is_found_in_rounds_from_the_pretrained_weights(tmp_path, tokenizer, monkeypatch):
    """Each round begins with these, less what the rounds before have pruned."""
    run, seen = tiny_run(tmp_path, tokenizer), []
    start = run.student().state_dict()
    name = "bert.encoder.layer.1.output.dense"

    def fit(self, model, loss, steps):
        module = model.get_submodule(name)
        for key, value in model.state_dict().items():
            if not key.endswith("_mask"):
                assert torch.equal(value, start[key.removesuffix("_orig")])
        seen.append((module.weight_mask == 0, steps))
        with torch.no_grad():
            module.weight_orig.copy_(torch.randn(module.weight_orig.shape))
        return model

    monkeypatch.setattr(Run, "fit", fit)
    model = trained(run, "lottery_ticket:sparsity=0.5,rounds=2,search=2")
    assert [steps for _, steps in seen] == [6, 6, 3]
    counts = [round(share * seen[0][0].numel()) for share in (0, 1 - 0.5**0.5, 0.5)]
    assert [int(gone.sum()) for gone, _ in seen] == counts
    assert (seen[2][0] | ~seen[1][0]).all()
    assert torch.equal(model.get_parameter(f"{name}.weight") == 0, seen[2][0])


@pytest.mark.parametrize("text", ["magnitude_pruning:sparsity=1", "lottery_ticket:sparsity=-0.1"])
def test_a_share_of_all_weights_is_refused(tmp_path, tokenizer, text):
    with pytest.raises(UsageError, match="sparsity must be a share"):
        trained(tiny_run(tmp_path, tokenizer), text)


# ---- layers left out


def without_function(model, layers) -> None:
    """Layers that hand on what they are given."""
    for layer in (model.bert.encoder.layer[i] for i in layers):
        for dense in (layer.attention.output.dense, layer.output.dense):
            torch.nn.init.zeros_(dense.weight)
            torch.nn.init.zeros_(dense.bias)


@pytest.mark.parametrize("task", ["sst2", "stsb"])
@pytest.mark.parametrize("iterative", [True, False])
def test_layers_without_a_function_are_left_out(tmp_path, tokenizer, monkeypatch, task, iterative):
    """The student begins as the teacher's function, and is compared with the layers that it was."""
    run, given = tiny_run(tmp_path, tokenizer, task, labels=12), {}
    without_function(run.teacher, [0, 2])
    monkeypatch.setattr(Run, "fit", lambda self, model, loss, terms: given.update(terms=terms) or model)
    model = depth_pruning.depth_pruning(run, iterative=iterative)
    assert [list(pair) for pair in given["terms"][0].layers] == [[1, 2], [2, 4]]
    torch.testing.assert_close(run.logits(model), run.logits(run.teacher), rtol=1e-4, atol=1e-5)


def test_a_last_norm_is_compared_with_a_last_norm(tmp_path, tokenizer, monkeypatch):
    """A model whose first layers are the teacher's is that teacher cut short: nothing differs that is compared."""
    gpt2 = decoder(len(tokenizer))
    run = replace(tiny_run(tmp_path, tokenizer), source=gpt2, teacher=gpt2)
    monkeypatch.setattr(depth_pruning, "important_layers", lambda run, count, **options: [0, 1])
    differences = []

    def fit(self, model, loss, terms):
        bound = self._bound(terms, model.eval(), self.teacher)
        batch = IndexedPadding(self.tokenizer)([self.train[i] for i in range(4)])
        differences.append(float(Step(model, self.teacher, batch, Counts.of(batch), bound).terms().detach()))
        return model

    monkeypatch.setattr(Run, "fit", fit)
    depth_pruning.depth_pruning(run)
    assert differences == [pytest.approx(0, abs=1e-10)]
    assert not depth_pruning.has_last_norm(tiny_run(tmp_path, tokenizer).teacher)


def test_layers_are_ranked_by_the_loss_of_labelled_rows(tmp_path, tokenizer, monkeypatch):
    run, asked = tiny_run(tmp_path, tokenizer, labels=12), []
    monkeypatch.setattr(depth_pruning, "change", lambda *given: asked.append(given) or float(len(asked) % 4))
    assert depth_pruning.important_layers(run, 2, criterion="loss") == [1, 2]  # 1, 2, 3, 0
    assert all(len(labels) == 12 and (labels != -100).all() for _, _, labels, _ in asked)


def test_the_change_is_a_divergence_or_a_loss():
    draw = torch.Generator().manual_seed(0)
    z, v = (torch.randn(6, 3, generator=draw) for _ in range(2))
    labels = torch.tensor([0, 2, -100, 1, 1, -100])
    kl = (v.softmax(-1) * (v.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean()
    assert depth_pruning.change(z, v, labels, "output") == pytest.approx(float(kl), rel=1e-5)
    ce = -z.log_softmax(-1)[[0, 1, 3, 4], [0, 2, 1, 1]].mean()
    assert depth_pruning.change(z, v, labels, "loss") == pytest.approx(float(ce), rel=1e-5)


# ---- all of them


@pytest.mark.parametrize("name", ["bilstm", "magnitude_pruning", "depth_pruning:ce_weight=0.5"])
def test_micro_batches_change_nothing(tmp_path, tokenizer, name):
    models = []
    for size in (8, 4):
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "optim": "sgd"}
        arguments |= {"max_steps": 2, "learning_rate": 0.1, "warmup_steps": 0, "max_grad_norm": 0.0}
        run = tiny_run(tmp_path, tokenizer, labels=12, arguments=arguments)
        for model in (run.source, run.teacher):
            model.config.update(DROPOUT)
        models.append(trained(run, name).state_dict())
    for key, value in models[0].items():
        torch.testing.assert_close(models[1][key], value, rtol=1e-4, atol=1e-6)


def test_every_method_says_what_its_source_found():
    for name in ("bilstm", "magnitude_pruning", "lottery_ticket", "depth_pruning"):
        assert methods()[name].published
