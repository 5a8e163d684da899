"""A language of 40 tokens in which each tells the probabilities of the next, and what servers would say of a text."""

import base64
import io
import itertools
from types import SimpleNamespace

import numpy as np
import torch

import fusedkd

VOCAB, LENGTH = 40, 48
K = 6

draw = np.random.default_rng(3)
TABLE = torch.log_softmax(torch.from_numpy(draw.normal(0, 3, (VOCAB, VOCAB))).float(), -1)
"""Row t: the distribution after token t."""


def written(length: int = LENGTH, seed: int = 0) -> list[int]:
    """A text of the language."""
    chance = np.random.default_rng(seed)
    found = [1]
    while len(found) < length:
        p = TABLE[found[-1]].exp().double().numpy()
        found.append(int(chance.choice(VOCAB, p=p / p.sum())))
    return found


TOKENS = written()
OFF = [*TOKENS[1:], TOKENS[0]]
"""The text one row off."""


def after(tokens, k=K):
    """Ids and log-probabilities ``(L, k)`` of the best after each token."""
    best = TABLE[torch.as_tensor(tokens)].topk(k, -1)
    return best.indices.numpy(), best.values.numpy()


def of(tokens, k=K):
    """For each token the K best of the distribution it was drawn from, and itself: None, then lists of pairs."""
    ids, logprobs = after(tokens, k)
    found = [None]
    for i, token in enumerate(tokens[1:]):
        row = list(zip(ids[i].tolist(), logprobs[i].tolist(), strict=True))
        if token not in ids[i]:
            row.append((token, TABLE[tokens[i], token].item()))
        found.append(row)
    return found


def own(tokens):
    return [None, *(TABLE[a, b].item() for a, b in itertools.pairwise(tokens))]


def loss(served, tokens=TOKENS, divergence="forward_kl"):
    """Of a student that is the teacher, over the rows that are known."""
    student = TABLE[torch.as_tensor(tokens)].requires_grad_()
    value = fusedkd.kd_loss(student, served.topk(tail="bucket"), divergence=divergence)
    value.backward()
    return value.item(), student.grad.abs().max().item()


def base64_of(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def npy(array, **changes):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array), **changes)
    return base64.b64encode(stream.getvalue()).decode()


def rows_of(tokens, offset):
    """Columns of which row i is the distribution of token i + offset."""
    ids, logprobs = after(tokens)
    if offset == 0:
        ids, logprobs = np.vstack([ids[:1] * 0 - 1, ids[:-1]]), np.vstack([logprobs[:1], logprobs[:-1]])
    return {"teacher_ids": ids, "teacher_logprobs": logprobs}


# ---- answers, each of `tokens`


def vllm(tokens):
    return [None if row is None else {i: SimpleNamespace(logprob=p, rank=1) for i, p in row} for row in of(tokens)]


def vllm_http(tokens):
    rows = [None if row is None else {str(i): {"logprob": p, "rank": 1} for i, p in row} for row in of(tokens)]
    return {"choices": [{"index": 0, "text": "", "prompt_logprobs": rows}]}


def vllm_flat(tokens):
    """The first column of each entry is the prompt's own token, among the best or not."""
    starts, ends, ids, logprobs = [0], [0], [], []
    for i, token in enumerate(tokens[1:]):
        best_ids, best = after(tokens[i : i + 1])
        starts.append(len(ids))
        ids += [token, *best_ids[0].tolist()]
        logprobs += [TABLE[tokens[i], token].item(), *best[0].tolist()]
        ends.append(len(ids))
    return SimpleNamespace(start_indices=starts, end_indices=ends, token_ids=np.array(ids), logprobs=np.array(logprobs))


def sglang(tokens, start=0):
    top = [None if row is None else [(p, i, None) for i, p in row[:K]] for row in of(tokens)][start:]
    mine = [(p, i, None) for p, i in zip(own(tokens), tokens, strict=True)][start:]
    top[0], mine[0] = None, (None, tokens[start], None)
    return {"text": "", "meta_info": {"input_token_logprobs": mine, "input_top_logprobs": top}}


def sglang_flat(tokens, coded=False):
    ids, logprobs = after(tokens[:-1])
    info = {"input_top_logprobs_shape": [len(tokens), K], "input_top_logprobs_null_prefix": 1}
    for name, values in (("idx", ids.astype(np.int32)), ("val", logprobs)):
        if coded:
            info[f"input_top_logprobs_{name}_flat_b64"] = base64_of(values)
            info[f"input_top_logprobs_{name}_flat_b64_dtype"] = str(values.dtype)
        else:
            info[f"input_top_logprobs_{name}_flat"] = values.ravel().tolist()
    return info


def tinker(tokens):
    ids, logprobs = np.zeros((len(tokens), K), np.int32), np.full((len(tokens), K), -99999.0, np.float32)
    ids[1:], logprobs[1:] = after(tokens[:-1])
    return SimpleNamespace(
        topk_prompt_logprobs_np=SimpleNamespace(token_ids=ids, logprobs=logprobs), prompt_logprobs=own(tokens)
    )


def tensorrt(tokens):
    """The last entry is of what would be generated."""
    rows = [*of(tokens)[1:], list(zip(*(x[0].tolist() for x in after(tokens[-1:])), strict=True))]
    return [{i: SimpleNamespace(logprob=p) for i, p in row} for row in rows]


def trl(tokens, prompt):
    rows, mine = of(tokens)[prompt:], own(tokens)[prompt:]
    best = [sorted(row, key=lambda column: -column[1])[:K] for row in rows]
    listed = [{i for i, _ in row} for row in best]
    here = [[p if t in s else -np.inf] for p, t, s in zip(mine, tokens[prompt:], listed, strict=True)]
    return {
        "logprobs": [[[p for _, p in row] for row in best]],
        "logprob_token_ids": [[[i for i, _ in row] for row in best]],
        "actual_logprobs": [here],
        "actual_token_ids": [[[t] for t in tokens[prompt:]]],
    }


# ---- texts

TEXTS = ["<s>", *(f" w{i}" for i in range(1, VOCAB))]
for part in [t for t in dict.fromkeys(TOKENS) if t > 1][3:6]:  # of a character: no text of their own
    TEXTS[part] = ""


class Tokenizer:
    """As of transformers, with BOS 0."""

    bos_token_id = 0
    all_special_ids = (0,)

    def __len__(self):
        return VOCAB

    def decode(self, ids, **options):
        return "".join(TEXTS[i] for i in ids)


def completion(tokens, bos=True, ids=False):
    """Of an OpenAI-style server: `bos`: entry i is of token i; else, as llama-cpp-python does, of token i + 1, under
    the name of token i.
    """
    name = (lambda i: f"token_id:{i}") if ids else TEXTS.__getitem__
    found = {"tokens": [name(t) for t in tokens], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for i, token in enumerate(tokens):
        row = TABLE[tokens[i - 1] if bos else token]
        best = row.topk(K)
        top = {}
        for column, p in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            top[name(column)] = p  # one text overwrites another
        top[name(token)] = row[token].item()
        found["top_logprobs"].append(top)
        found["token_logprobs"].append(row[token].item())
    found["top_logprobs"][0] = found["token_logprobs"][0] = None
    return found


def chat(tokens, prompt, **more):
    """``content`` of the tokens after the prompt."""
    rows, mine = of(tokens)[prompt:], own(tokens)[prompt:]
    entries = [
        {
            "token": TEXTS[token],
            "logprob": p,
            "bytes": None,
            "top_logprobs": [{"token": TEXTS[i], "logprob": q, **({"id": i} if more else {})} for i, q in row[:K]],
            **({"id": token} if more else {}),
        }
        for token, p, row in zip(tokens[prompt:], mine, rows, strict=True)
    ]
    return {"content": entries}


# ---- DistillKit


def packed(values, width):
    """Whole numbers as bits, the most significant first."""
    stream = "".join(f"{v:0{width}b}" for v in values)
    stream += "0" * (-len(stream) % 8)
    return [int(stream[i : i + 8], 2) for i in range(0, len(stream), 8)]


def raw(values, dtype):
    if dtype == "bfloat16":
        return list(torch.tensor(values, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes())
    return list(np.array(values, np.dtype(dtype)).tobytes())


def distilled(config, k=K):
    """Rows compressed by hand: exact values, a fit of the others, what it misses in bins; 6 bits an id."""
    ids, logprobs = after(TOKENS[:-1], k)
    exact, rest = config["exact_k"], k - config["exact_k"]
    rows = []
    for row in logprobs.astype(np.float64):
        if config["delta_encoding"]:
            row = np.diff(row, prepend=0.0)
        out = raw(row[:exact], config["exact_dtype"])
        t = np.linspace(0, 1, rest) if config["normalize_t"] else np.arange(rest)
        missed = row[exact:]
        if terms := config["polynomial_terms"]:
            functions = np.stack([np.sqrt(t) if n == "sqrt" else np.exp(t) if n == "exp" else t**n for n in terms], 1)
            coefficients = np.linalg.lstsq(functions, missed, rcond=None)[0]
            out += raw(coefficients, config["term_dtype"])
            missed = missed - functions @ coefficients
        at = 0
        for b in config["residual_bins"]:
            n, width = b["num_elements"], b["element_bits"]
            half = 2 ** (width - 1)
            scale = float(np.dtype(b["scale_dtype"]).type(np.abs(missed[at : at + n]).max() / half)) or 1.0
            codes = np.clip(np.rint(missed[at : at + n] / scale), -half, half - 1).astype(int) + half
            out += raw([scale], b["scale_dtype"]) + packed(codes, width)
            at += n
        rows.append(out)
    return {
        "input_ids": TOKENS,
        "compressed_logprobs": rows,
        "bytepacked_indices": [packed(row, 6) for row in ids.tolist()],
    }


SETTING = {
    "d": VOCAB,
    "k": K,
    "exact_k": 2,
    "exact_dtype": "float32",
    "polynomial_terms": [0, 1, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "normalize_t": True,
}
BINS = [
    {"scale_dtype": "float32", "element_bits": 12, "num_elements": 1},
    {"scale_dtype": "float16", "element_bits": 9, "num_elements": 3},
]
