"""A teacher in a GGUF file, for `python -m fusedkd.integrations.cache_teacher`."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("gguf")

import datasets
import gguf
import torch

from .test_cache_teacher import VOCAB, log_softmax, own_caches, run, teacher, tokenized  # noqa: F401  (a fixture)


def test_a_teacher_in_a_gguf_file(tmp_path, capsys):
    """By the file, or by its folder and name: the model that was written into it."""
    model = teacher()
    config, names = model.config, {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    parts |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {
        f"mlp.{x}_proj": f"ffn_{x}" for x in ("up", "down", "gate")
    }
    names |= {f"model.layers.{i}.{a}": f"blk.{i}.{b}" for i in range(2) for a, b in parts.items()}
    (tmp_path / "gguf").mkdir()
    file = gguf.GGUFWriter(tmp_path / "gguf" / "tiny.gguf", "llama")
    file.add_context_length(64)
    file.add_embedding_length(16)
    file.add_block_count(2)
    file.add_feed_forward_length(32)
    file.add_head_count(2)
    file.add_head_count_kv(2)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(10_000.0)
    file.add_vocab_size(len(VOCAB))
    for name, weight in model.state_dict().items():
        name = names[name.removesuffix(".weight")]
        if name.endswith(("attn_q", "attn_k")):  # llama.cpp's order of the halves that rotate
            weight = weight.reshape(2, 2, 4, 16).transpose(1, 2).reshape(16, 16)
        file.add_tensor(f"{name}.weight", weight.contiguous().numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    data, written = tokenized(tmp_path / "data"), str(tmp_path / "gguf")
    assert run(f"{written}/tiny.gguf", data, tmp_path / "out", "--top_k", 5) == 0
    assert run(written, data, tmp_path / "out", "--top_k", 5, "--gguf_file", "tiny.gguf") == 0
    for row in datasets.load_from_disk(tmp_path / "out"):
        expected = log_softmax(model, row, 1.0).topk(5).values[row["attention_mask"] != 0]
        found = torch.from_numpy(row["teacher_logprobs"])[row["attention_mask"] != 0].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    capsys.readouterr()
    assert run(written, data, tmp_path / "other", "--top_k", 5) == 2
    assert "holds GGUF files: give --gguf_file tiny.gguf" in capsys.readouterr().err
