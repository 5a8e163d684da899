"""What lies between head and logits is found, or the model is refused by name."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers

from fusedkd.integrations.heads import Head

from .distil_step import MODELS, SIZE, VOCAB, llamas, lora, make, trainer

FOUND = {"softcap": (3.0, None), "scale": (None, 0.25), "divided": (None, 0.25), "multiplied": (None, 0.3)}


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_measured(name):
    model = make(name, 0).train()
    head = Head.of(model)
    assert (head.softcap, head.scale) == FOUND.get(name, (None, None))
    assert head.causal == ("bert" not in name)
    assert head.linear is model.get_output_embeddings()
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_adapters_that_are_refused():
    peft = pytest.importorskip("peft")
    for options in ({"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}):
        student, teacher = llamas()
        with pytest.raises(ValueError, match="LlamaForCausalLM has an adapter on its output head"):
            trainer(lora(student, **options), teacher)
    student, teacher = llamas()
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="LlamaForCausalLM has a prompt-learning adapter"):
        trainer(peft.get_peft_model(student, prompt), teacher)


class Rescaled(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.01
        return out


class Capped(transformers.LlamaForCausalLM):
    """Its logits are so small that they look uncapped."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out


class Biased(transformers.LlamaForCausalLM):
    """Its bias is still 0, and so does not show in the logits either."""

    def __init__(self, config):
        super().__init__(config)
        self.extra = torch.nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + self.extra
        return out


class Aside(transformers.LlamaForCausalLM):
    """Does not call its head."""

    def forward(self, input_ids, **kwargs):
        hidden = self.model(input_ids).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.T)


@pytest.mark.parametrize("kind", [Rescaled, Capped, Biased, Aside])
@pytest.mark.parametrize("of_teacher", [False, True])
def test_unknown_models_are_refused_by_name(kind, of_teacher):
    student, teacher = llamas()
    odd = kind(transformers.LlamaConfig(vocab_size=VOCAB, **SIZE))
    with pytest.raises(ValueError, match=f"{kind.__name__} does something to its logits that is not known here"):
        trainer(*((student, odd) if of_teacher else (odd, teacher)))
    assert "forward" not in vars(odd.lm_head)
    assert kind is Biased or odd(input_ids=torch.arange(4)[None]).logits.shape == (1, 4, VOCAB)


def test_other_kinds_of_model_are_refused_by_name():
    student, _ = llamas()
    with pytest.raises(ValueError, match="LlamaForCausalLM is causal and BertForMaskedLM is masked"):
        trainer(student, make("bert", 0))
    speech = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    speech |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": VOCAB, "pad_token_id": 0}
    config = transformers.WhisperConfig(num_mel_bins=8, max_source_positions=8, **speech)
    with pytest.raises(ValueError, match="WhisperForConditionalGeneration cannot be run with input_ids and decoder_"):
        Head.of(transformers.WhisperForConditionalGeneration(config))
