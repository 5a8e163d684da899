"""What a distilling trainer refuses, in a sentence that says what to do instead."""

import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers

import fusedkd
from fusedkd.integrations import refusals
from fusedkd.integrations.heads import Head
from fusedkd.integrations.transformers import KDConfig
from fusedkd.nn import CosineHiddenLoss, DistilBertLoss, KDLoss, LinearKDLoss

from .distil_step import BERT, SIZE, VOCAB, gradient, initialised, llamas, rows, trainer
from .test_transformers import Padding, assert_equal, collated, top_k, truth

# -------------------------------------------------- models

T5 = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
MARIAN = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
MARIAN |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0, "forced_eos_token_id": 1}
UNKNOWN = "not known to be a causal or a masked language model, an encoder–decoder, or a classifier"
OTHERS = {
    "T5ForConditionalGeneration": ("T5Config", T5, "an encoder–decoder"),
    "MarianMTModel": ("MarianConfig", MARIAN, "an encoder–decoder"),
    "BertForSequenceClassification": ("BertConfig", BERT, "a sequence classifier"),
    "BertForTokenClassification": ("BertConfig", BERT, "a token classifier"),
    "BertForPreTraining": ("BertConfig", BERT, UNKNOWN),
    "BertForQuestionAnswering": ("BertConfig", BERT, UNKNOWN),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("role", ["student", "teacher", "student without a teacher"])
def test_other_models(name, role):
    config, options, reason = OTHERS[name]
    other = getattr(transformers, name)(getattr(transformers, config)(vocab_size=VOCAB, **options))
    student, teacher = llamas()
    models = {"student": (other, teacher), "teacher": (student, other)}
    if role not in models and reason != UNKNOWN:
        trainer(other, None, KDConfig(kd_weight=0))
        return
    with pytest.raises(ValueError, match=f"{name} is {reason}"):
        trainer(*models.get(role, (other, None, KDConfig(kd_weight=0))))


def test_a_module_that_is_no_model_of_transformers():
    with pytest.raises(ValueError, match="Linear is not known to be a causal or a masked language model"):
        trainer(llamas()[0], torch.nn.Linear(3, 3))


class Quantized(torch.Tensor):
    """Its dtype is that of what it stands for."""


def quantized(model, how: str):
    head = model.lm_head
    if how == "subclass":
        head.weight = torch.nn.Parameter(head.weight.detach().as_subclass(Quantized))
    elif how == "integers":
        head.weight = torch.nn.Parameter(head.weight.detach().to(torch.int8), requires_grad=False)
    elif how == "float8":
        head.weight = torch.nn.Parameter(head.weight.detach().to(torch.float8_e4m3fn))
    elif how == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    else:
        layers = pytest.importorskip("bitsandbytes").nn
        model.lm_head = getattr(layers, how)(SIZE["hidden_size"] * 2, VOCAB, bias=False)
    return model


@pytest.mark.parametrize("how", ["subclass", "integers", "float8", "torchao", "Linear8bitLt", "Linear4bit"])
def test_quantized_heads(how):
    student, teacher = llamas()
    with pytest.raises(ValueError, match=r"the output head of LlamaForCausalLM must be .*keep it unquantized"):
        trainer(student, quantized(teacher, how))


def test_an_offloaded_head():
    student, teacher = llamas()
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(teacher, execution_device="cpu")
    with pytest.raises(ValueError, match="the output head of LlamaForCausalLM is offloaded"):
        Head.of(teacher)
    with pytest.raises(ValueError, match="the output head of LlamaForCausalLM is offloaded"):
        trainer(student, teacher)


VISION = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
QWEN = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
TEXT = {"vocab_size": VOCAB, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, **SIZE}


def vision_language(name: str, seed: int):
    if name == "llava":
        vision = transformers.CLIPVisionConfig(image_size=28, patch_size=14, **VISION)
        text = transformers.LlamaConfig(**TEXT)
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=1)
        return initialised(transformers.LlavaForConditionalGeneration(config), seed)
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
    tokens = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 0}
    config = transformers.Qwen2VLConfig(text_config={"rope_parameters": QWEN, **TEXT}, vision_config=vision, **tokens)
    return initialised(transformers.Qwen2VLForConditionalGeneration(config), seed)


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_vision_language_models_are_distilled_on_text(name):
    student, teacher = vision_language(name, 0), vision_language(name, 1)
    assert_equal(gradient(student, teacher), truth(vision_language(name, 0), teacher, KDConfig()))
    student, teacher = llamas()
    with pytest.raises(ValueError, match="the batch has pixel_values, which LlamaForCausalLM does not take"):
        trainer(student, teacher).compute_loss(
            student, collated(list(rows())) | {"pixel_values": torch.zeros(1, 3, 28, 28)}
        )


# -------------------------------------------------- arguments


def test_other_types():
    student, teacher = llamas()
    for wrong, name in ((3, "int"), ([teacher, 3], "int in a list"), ({"one": None}, "NoneType in a dict")):
        with pytest.raises(TypeError, match=f"teacher must be a model, .*a list or dict of these, or None, not {name}"):
            trainer(student, wrong)
    with pytest.raises(TypeError, match=r"kd must be a KDConfig, not dict: pass KDConfig\(\*\*kd\)"):
        trainer(student, teacher, {"temperature": 2.0})


WRONG = [
    ({"temperature": 0.0}, "temperature must be above 0"),
    ({"temperature": "2"}, "temperature must be a number"),
    ({"teacher_temperature": -1.0}, "teacher_temperature must be above 0"),
    ({"kd_weight": -0.5}, "kd_weight must be at least 0"),
    ({"ce_weight": float("nan")}, "ce_weight must be at least 0"),
    ({"divergence": "kl"}, "divergence must be"),
    ({"divergence": "logit_mse", "temperature": 2.0}, "temperature must be 1 for logit_mse"),
    ({"label_smoothing": 2.0}, "label_smoothing must be at least 0 and at most 1"),
    ({"vocab_mismatch": "pad"}, "vocab_mismatch must be"),
]
WRONG_ROWS = [({"max_rows": 0}, "max_rows must be at least 1"), ({"max_tile_bytes": 0.5}, "max_tile_bytes must be an")]
WRONG_TAILS = [({"tail": "none"}, "tail must be one of"), ({"logprobs_temperature": 0}, "logprobs_temperature must be")]


@pytest.mark.parametrize(
    ("options", "message"), [*WRONG, *WRONG_ROWS, *WRONG_TAILS, ({"kd_on": "all"}, "kd_on must be")]
)
def test_wrong_options_of_the_trainer(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        KDConfig(**options)


@pytest.mark.parametrize("loss", [KDLoss, LinearKDLoss])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        *WRONG,
        ({"reduction": "avg"}, "reduction must be"),
        ({"reduction": "sum", "kd_normalizer": 3}, "kd_normalizer replaces"),
        ({"logit_softcap": 0.0}, "logit_softcap must be above 0"),
        ({"teacher_weights": [0.5, -0.5]}, "teacher_weights must be at least 0"),
        ({"teacher_weights": 0.5}, "teacher_weights must be a list"),
    ],
)
def test_wrong_options_of_the_modules(loss, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        loss(**options)


def test_wrong_options_of_the_other_modules():
    with pytest.raises(ValueError, match="reduction must be"):
        CosineHiddenLoss("avg")
    for name in ("temperature", "alpha_distil", "alpha_mlm", "alpha_cos"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            DistilBertLoss(**{name: -1.0})


def test_options_that_are_right():
    with torch.device("meta"):
        KDLoss(divergence=fusedkd.DKD(), temperature=torch.tensor(2.0, device="cpu"), ce_weight=0.5)
    KDLoss(teacher_weights=[0.3, 0.7], reduction="none", kd_mask=torch.ones(3, 4), inplace=True)
    LinearKDLoss(tile_dtype=torch.bfloat16, max_rows=7, ignore_index=0)
    KDConfig(divergence="logit_mse", temperature=1.0, ce_weight=0.0)
    with pytest.raises(TypeError, match="tile_dtype must be"):
        LinearKDLoss(tile_dtype=torch.int32)


# -------------------------------------------------- data


def test_no_teacher_and_no_columns():
    datasets = pytest.importorskip("datasets")
    student, teacher = llamas()
    message = "must have the columns teacher_ids and teacher_logprobs, but train_dataset has input_ids, attention_mask"
    table = datasets.Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows()])
    for data in (list(rows()), table, table.to_iterable_dataset()):
        with pytest.raises(ValueError, match=message):
            trainer(student, None, data=data)
    trainer(student, None, KDConfig(kd_weight=0.0))
    trainer(student, None, data=list(top_k(teacher, rows(), 3)))
    trainer(student, None, collator=Padding("right"))  # may make them
    for options, message in (
        ({"divergence": "adaptive_kl"}, "TeacherTopK cannot serve"),
        ({"tail": "bucket"}, "tail='bucket' needs"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(student, None, KDConfig(**options), data=list(top_k(teacher, rows(), 3)))


def test_batches_that_are_no_text():
    student, teacher = llamas()
    run, batch = trainer(student, teacher), collated(list(rows()))
    embedded = {"inputs_embeds": torch.zeros(8, 10, 32), "labels": batch["labels"]}
    with pytest.raises(ValueError, match="must have input_ids instead of inputs_embeds"):
        run.compute_loss(student, embedded)
    offline = trainer(student, None, collator=Padding("right"))
    with pytest.raises(ValueError, match="both or none of the columns teacher_ids and teacher_logprobs"):
        offline.compute_loss(student, batch | {"teacher_ids": torch.zeros(8, 10, 1, dtype=torch.int32)})


# -------------------------------------------------- processes


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU torchrun needs no use_cpu")
def test_processes_that_do_not_know_of_each_other(monkeypatch):
    """As torchrun starts them, without use_cpu=True."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **options: None)  # accelerate waits for both
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2, but accelerate sees 1: .*use_cpu=True"):
        trainer(*llamas(), use_cpu=False)


def test_one_process_that_should_have_been_two(monkeypatch):
    launch = pytest.importorskip("accelerate.commands.launch")
    environment = pytest.importorskip("accelerate.utils.launch").prepare_simple_launcher_cmd_env
    for count in ("2", "1"):
        command = ["--cpu", "--mixed_precision", "no", "--num_processes", count, "--num_machines", "1"]
        command += ["--dynamo_backend", "no", "train.py"]
        _, left = environment(launch.launch_command_parser().parse_args(command))
        with monkeypatch.context() as patch:
            for name in left.keys() - os.environ.keys():
                patch.setenv(name, left[name])
            if count == "1":
                refusals.processes(1)
                continue
            with pytest.raises(
                ValueError, match=r"accelerate launch --cpu was asked for several.*torchrun.*use_cpu=True"
            ):
                refusals.processes(1)


def test_an_evaluation_of_examples_in_one_row():
    for examples in (1, 2):
        refusals.flattened_evaluation(examples, examples)
    with pytest.raises(ValueError, match="must have a multiple of processes × per_device_eval_batch_size examples"):
        refusals.flattened_evaluation(1, 2)
