"""Students cut from models whose layers differ: each kept layer is the layer that it was."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fusedkd.integrations.command import UsageError
from fusedkd.integrations.students import keep_layers, student_of

SIZE = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2}
SIZE |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2, "initializer_range": 0.2}
KINDS = ["sliding_attention", "full_attention"]
EXPERTS = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}

MODELS = {
    "no_rope_layers": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SIZE, no_rope_layer_interval=3)),
    "layer_types": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=3, layer_types=KINDS * 3)
    ),
    "first_k_dense_replace": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(**SIZE, **EXPERTS, **LATENT, **GROUPS, first_k_dense_replace=3)
    ),
    "mlp_only_layers": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZE, **EXPERTS, head_dim=8, num_experts=4, mlp_only_layers=[1, 3])
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_kept_layer_is_the_layer_that_it_was(name):
    torch.manual_seed(0)
    source, kept = MODELS[name]().eval(), [0, 2, 3, 5]
    student = student_of(source, kept).eval()
    cut = copy.deepcopy(source)
    cut.model.layers = nn.ModuleList(cut.model.layers[i] for i in kept)
    cut.config.num_hidden_layers = len(kept)
    if kinds := getattr(cut.config, "layer_types", None):
        cut.config.layer_types = [kinds[i] for i in kept]
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        found, true = (model(ids, use_cache=False).logits for model in (student, cut))
    torch.testing.assert_close(found, true, rtol=0, atol=1e-6)


def test_what_a_configuration_says_of_layers():
    config = SimpleNamespace(
        num_hidden_layers=4,
        indexer_types=["a", "b", "c", "d"],
        moe_layers=[0, 1, 2, 3],  # numbers of layers
        full_attn_idxs=[2],
        num_dense_layers=2,
        num_kv_shared_layers=1,
        first_k_dense_replace=0,
        eos_token_id=[5, 6, 7, 8],
        suppress_token_ids=(1, 2, 3, 4),
        short=["x"],
    )
    keep_layers(config, [0, 2, 3])
    assert vars(config) == {
        "num_hidden_layers": 3,
        "indexer_types": ["a", "c", "d"],
        "moe_layers": [0, 1, 2],
        "full_attn_idxs": [1],
        "num_dense_layers": 1,
        "num_kv_shared_layers": 1,
        "first_k_dense_replace": 0,
        "eos_token_id": [5, 6, 7, 8],
        "suppress_token_ids": (1, 2, 3, 4),
        "short": ["x"],
    }


def test_models_of_several_stacks_are_refused():
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=2, vocab_size=30)
    with pytest.raises(UsageError, match="T5ForConditionalGeneration has more than one stack of layers"):
        student_of(T5ForConditionalGeneration(config))


def test_several_ends_of_sequences_are_no_layers():
    source = LlamaForCausalLM(LlamaConfig(**SIZE | {"num_hidden_layers": 2, "eos_token_id": [2, 3]}))
    assert student_of(source, [0]).config.eos_token_id == [2, 3]


def test_layers_that_are_counted_by_their_places_are_refused():
    """Jamba's attention is every third layer of whatever there is."""
    config = JambaConfig(**SIZE, attn_layer_period=3, attn_layer_offset=1, num_experts=2, num_experts_per_tok=1)
    with pytest.raises(UsageError, match=r"layers 0, 2, 3 of JambaForCausalLM no student.*layers\.1\.\S+ has another"):
        student_of(JambaForCausalLM(config), [0, 2, 3])


SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
NARROW = {
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(**SMALL, hidden_dim=64)),
    "gpt2": lambda: GPT2ForSequenceClassification(GPT2Config(**SMALL, n_inner=64)),
    "gpt2 without n_inner": lambda: GPT2ForSequenceClassification(GPT2Config(**SMALL)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=4)),
    "grouped llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2)),
    "deberta": lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**SMALL, intermediate_size=64)),
}


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("width", [8, 24])
def test_a_narrow_student_runs(name, width):
    """Whatever its class calls its sizes: they keep their proportions, and so does what grows with a layer's width."""
    source = NARROW[name]()
    student = student_of(source, width=width, init="random")
    assert student.training
    assert student.config.hidden_size == width
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (student, source)]
    ends = ("lin1.weight", "c_fc.weight", "up_proj.weight", "intermediate.dense.weight", "pooler.dense.weight")
    inner = [key for key in shapes[0] if key.endswith(ends)]
    assert inner
    for key in inner:
        assert [n * 32 // width for n in shapes[0][key]] == [*shapes[1][key]]
    assert student.eval()(input_ids=torch.arange(5)[None]).logits.isfinite().all()


def test_sizes_that_do_not_go_together_are_one_sentence():
    class Odd(LlamaForCausalLM):
        def forward(self, input_ids):
            raise RuntimeError("mat1 and mat2\nshapes")

    odd = Odd(LlamaConfig(**SMALL, intermediate_size=64))
    sentence = "^--layers 0 and --width 8 make no Odd: mat1 and mat2 shapes; give a student, or other sizes$"
    with pytest.raises(UsageError, match=sentence):
        student_of(odd, width=8, init="random")
