"""The compact form of an offline teacher: ids and the mass off the list exactly, log-probabilities as stated."""

import struct

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import datasets
from transformers import BertTokenizer, DataCollatorForTokenClassification, TrainingArguments

from fusedkd import TeacherTopK, kd_loss
from fusedkd.integrations.cache_store import BITS, HEADER, PACKED, decode, encode
from fusedkd.integrations.offline import OfflineTeacherCollator
from fusedkd.integrations.transformers import DistillationTrainer, KDConfig

from .test_cache_teacher import VOCAB, own_caches, run, saved, teacher, tokenized  # noqa: F401  (a fixture)


def top(vocabulary: int, k: int, rows: int = 6, spread: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Of random logits, float64; the last row is sure: its best token has all but e⁻³⁰."""
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)).double() * spread
    logits[-1, 5] = logits[-1].max() + 30 + np.log(vocabulary)
    best = logits.log_softmax(-1).topk(k)
    return best.indices.numpy(), best.values.numpy()


def by_id(ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(ids, 1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1).astype(np.float64)


@pytest.mark.parametrize(("vocabulary", "k"), [(24, 24), (24, 5), (50257, 64), (151936, 64), (3000, 1024), (100, 1)])
def test_what_is_read_is_what_was_written(vocabulary, k):
    """Ids and masses exactly, log-probabilities within the stated error."""
    ids, logprobs = top(vocabulary, k)
    for bits in BITS.values():
        found = decode(encode(ids, logprobs, bits))
        assert (found["teacher_ids"].dtype, found["teacher_logprobs"].dtype) == (np.int32, np.float32)
        assert (np.diff(found["teacher_logprobs"]) <= 0).all()
        (a, truth), (b, stored) = by_id(ids, logprobs), by_id(**_names(found))
        assert (a == b).all()
        below = truth.max(1, keepdims=True) - truth
        span, steps = below.max(1, keepdims=True), 2**bits - 1
        own = np.sqrt(below * span) / steps + span / (4 * steps**2)
        assert (np.abs(stored - truth) <= (own + own.max(1, keepdims=True)) * 1.001 + 1e-6).all()
        rounding = 2.0**-24 * (np.exp(truth) * -truth).sum(1) + 1e-7  # what float32 log-probabilities leave open
        assert (np.abs(np.exp(stored).sum(1) - np.exp(truth).sum(1)) <= rounding).all()


def _names(found):
    return {"ids": found["teacher_ids"], "logprobs": found["teacher_logprobs"]}


def test_a_small_mass_on_the_list_is_exact_too():
    """The smaller of both masses is what is stored."""
    for mass in (1e-9, 1e-4, 0.5, 1 - 1e-6):
        logprobs = np.log(np.array([[0.75, 0.25]]) * mass)
        found = decode(encode(np.array([[7, 3]]), logprobs))
        np.testing.assert_allclose(found["teacher_logprobs"], logprobs, rtol=1e-6)


@pytest.mark.parametrize("vocabulary", [49152, 151936, 262144])
def test_at_most_200_bytes_per_token(vocabulary):
    """Of 64 columns, with 9 bytes of the token's own: its id, label and attention mask."""
    draw = np.random.default_rng(0)
    ids = np.stack([draw.choice(vocabulary - 1, 64, replace=False) for _ in range(128)])
    ids[0, 0] = vocabulary - 1
    size = len(encode(ids, np.log(draw.dirichlet(np.full(65, 0.3), 128)[:, :64]))) / 128
    assert size <= {49152: 165, 151936: 179, 262144: 185}[vocabulary]
    assert size + 9 <= 200


def test_the_divergence_from_the_teacher():
    """KL(true ‖ stored) with the rest as one class: some 1e-5 at 8 bits, and 16 times less for two bits more."""
    ids, logprobs = top(32000, 64, rows=64)
    truth = by_id(ids[:-1], logprobs[:-1])[1]
    tail = 1 - np.exp(truth).sum(1)
    found = {}
    for bits in (8, 10, 12):
        stored = by_id(**_names(decode(encode(ids[:-1], logprobs[:-1], bits))))[1]
        kl = (np.exp(truth) * (truth - stored)).sum(1) + tail * np.log(tail / (1 - np.exp(stored).sum(1)))
        found[bits] = kl.mean()
        assert (np.abs(stored - truth).max(1) <= 1.1 * np.ptp(truth, 1) / (2**bits - 1)).all()
    assert 1e-7 < found[8] < 2e-5
    assert found[8] / found[10] == pytest.approx(16, rel=0.3)
    assert found[10] / found[12] == pytest.approx(16, rel=0.3)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_the_loss_is_the_plain_forms(tail):
    """And its gradient, of a student that is near the teacher."""
    student = torch.randn(6, 500, generator=torch.Generator().manual_seed(0)) * 3
    student += 0.3 * torch.randn(6, 500, generator=torch.Generator().manual_seed(1))
    ids, logprobs = top(500, 64)
    packed = decode(encode(ids, logprobs, 16))
    found = []
    for columns in ((ids, logprobs), (packed["teacher_ids"], packed["teacher_logprobs"])):
        z = student.clone().requires_grad_()
        loss = kd_loss(z, TeacherTopK(*map(torch.from_numpy, columns), tail=tail))
        loss.backward()
        found.append((loss.item(), z.grad))
    assert found[0][0] > 0.01
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    assert (found[1][1] - found[0][1]).norm() < 1e-3 * found[0][1].norm()


def test_rows_that_are_shorter_or_empty():
    """−1 and −inf are padding, at any place; a row without a column takes a bit."""
    ids = np.array([[4, -1, 9], [-1, -1, -1], [2, 0, 1], [3, 8, 5], [-1, -1, -1]])
    logprobs = np.log(np.array([[0.1, 1.0, 0.7], [1, 1, 1], [0.2, 0.2, 0.2], [0.5, 0.0, 0.4], [1, 1, 1]]) + 1e-300)
    logprobs[3, 1] = -np.inf
    found = decode(encode(ids, logprobs, 16))
    assert found["teacher_ids"].tolist() == [[9, 4, -1], [-1, -1, -1], [0, 1, 2], [3, 5, -1], [-1, -1, -1]]
    stored = np.exp(found["teacher_logprobs"])
    np.testing.assert_allclose(stored, [[0.7, 0.1, 0], [0, 0, 0], [0.2, 0.2, 0.2], [0.5, 0.4, 0], [0, 0, 0]], rtol=1e-3)
    assert len(encode(np.full((800, 3), -1), np.zeros((800, 3)))) == HEADER.size + 100 + 1


BAD = {
    "ids must be unique per row, but row 1 has 3 twice": ([[0, 1], [3, 3]], [[-1.0, -2.0], [-1.0, -2.0]]),
    "those of row 0 to 1.5": ([[0, 1]], [[0.0, np.log(0.5)]]),
    "those of row 0 to nan": ([[0, 1]], [[-1.0, np.nan]]),
    "must sum to at least 1e-38, but those of row 0 to 2e-48": ([[0, 1]], [[-110.0, -112.0]]),
    "must be \\(L, K\\) both": ([[0, 1]], [[-1.0]]),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_right_is_not_written(message):
    with pytest.raises(ValueError, match=message):
        encode(*map(np.array, BAD[message]))


def test_bytes_that_end_with_zeros_are_kept():
    """As a column in NumPy's format."""
    packed = encode(np.array([[0, 1]] * 2), np.log(np.full((2, 2), 0.5)))
    assert packed[-2] == 0
    rows = datasets.Dataset.from_dict({PACKED: [packed] * 2}).with_format("numpy")
    for row in (rows[0], *rows, {PACKED: rows[:2][PACKED][1]}, {PACKED: np.array([packed])[0]}):
        assert decode(row[PACKED])["teacher_ids"].tolist() == [[0, 1], [0, 1]]


def test_damage_is_named():
    packed = encode(*top(100, 4))
    huge = packed[:12] + struct.pack("<I", 2**32 - 1) + packed[16:]
    for wrong in (b"", b"PK\x03\x04" * 9, packed[:-1], packed + b"\0", packed[:4] + b"\x63" + packed[5:], huge):
        with pytest.raises(ValueError, match=PACKED):
            decode(wrong)
    marks = bytearray(packed)
    marks[HEADER.size + 1 + 8 : -1] = b"\xff" * (len(marks) - HEADER.size - 10)
    with pytest.raises(ValueError, match="damaged: a row has"):
        decode(bytes(marks))


# -------------------------------------------------- the command and the trainer


@pytest.mark.parametrize("masked", [False, True])
def test_training_with_the_compact_form_is_training_with_the_plain_one(masked, tmp_path):
    """By the Trainer, whose data may have been mapped, filtered and left without a format on the way."""
    name = saved(teacher(masked=masked), tmp_path / "teacher")
    labels = [[i % 5 + 5] * (4 + 3 * (i % 4)) for i in range(7)]
    data = tokenized(tmp_path / "data", labels=labels)
    collator = DataCollatorForTokenClassification(BertTokenizer.from_pretrained(name))
    found = {}
    for dtype in ("float32", "uint16", "uint8"):
        more = ("--top_k", 9, "--temperature", 2, "--logprobs_dtype", dtype, "--shard_rows", 3)
        assert run(name, data, tmp_path / dtype, *more) == 0
        cached = datasets.load_from_disk(tmp_path / dtype).filter(lambda row: len(row["input_ids"]) > 4)
        assert (PACKED in cached.column_names) == (dtype != "float32")
        cached = cached.with_format(None).map(lambda row: {"labels": row["input_ids"]})
        args = TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True, disable_tqdm=True)
        kd = KDConfig(temperature=2.0, logprobs_temperature=2.0, tail="bucket")
        student = teacher(seed=3, masked=masked)
        trainer = DistillationTrainer(
            student, None, args, collator, kd=kd, train_dataset=cached.with_format("torch"), eval_dataset=cached
        )
        found[dtype] = trainer.evaluate()["eval_loss"]
    assert found["float32"] > 1
    assert found["uint16"] == pytest.approx(found["float32"], rel=1e-4)
    assert found["uint8"] == pytest.approx(found["float32"], rel=0.02)
    trainer.kd.logprobs_temperature = 1.0
    trainer = DistillationTrainer(student, None, args, collator, kd=KDConfig(temperature=2.0), eval_dataset=cached)
    with pytest.raises(ValueError, match="logprobs_temperature must be 2, at which teacher_packed was taken, not 1"):
        trainer.evaluate()


@pytest.mark.parametrize("masked", [False, True])
def test_labelled_rows_alone(masked, tmp_path, capsys):
    """Of a causal model those before a labelled token."""
    name = saved(teacher(masked=masked), tmp_path / "teacher")
    labels = [[9 if (i + j) % 3 == 0 else -100 for j in range(4 + 3 * (i % 4))] for i in range(7)]
    data = tokenized(tmp_path / "data", labels=labels)
    for rows in ("all", "labelled"):
        assert run(name, data, tmp_path / rows, "--top_k", 4, "--logprobs_dtype", "uint16", "--rows", rows) == 0
    for every, some in zip(*(datasets.load_from_disk(tmp_path / rows) for rows in ("all", "labelled")), strict=True):
        every, some, label = decode(every[PACKED]), decode(some[PACKED]), some["labels"]
        kept = label != -100 if masked else np.append(label[1:] != -100, False)
        kept &= every["teacher_ids"][:, 0] >= 0  # attended
        assert kept.any()
        assert (some["teacher_ids"][~kept] == -1).all()
        for column in every:
            assert (some[column][kept] == every[column][kept]).all()
    sizes = [sum(f.stat().st_size for f in (tmp_path / rows).glob("*.arrow")) for rows in ("labelled", "all")]
    assert sizes[0] < sizes[1]
    bare = tokenized(tmp_path / "bare")
    assert run(name, bare, tmp_path / "other", "--top_k", 4, "--rows", "labelled") == 2
    assert "--rows labelled needs a column labels" in capsys.readouterr().err


def test_a_loop_of_ones_own_reads_the_compact_form(tmp_path):
    name = saved(teacher(), tmp_path / "teacher")
    assert run(name, tokenized(tmp_path / "data"), tmp_path / "out", "--top_k", 4, "--logprobs_dtype", "uint8") == 0
    cached = datasets.load_from_disk(tmp_path / "out")

    def collate(rows):
        assert all(PACKED not in row for row in rows)
        return {"input_ids": torch.nn.utils.rnn.pad_sequence([torch.as_tensor(r["input_ids"]) for r in rows], True)}

    batch = OfflineTeacherCollator(collate)([cached[i] for i in range(7)])
    assert batch["teacher_ids"].shape == batch["teacher_logprobs"].shape == (*batch["input_ids"].shape, 4)
    assert batch["teacher_ids"][1, :7].tolist() == decode(cached[1][PACKED])["teacher_ids"].tolist()
    plain = cached.map(lambda row: decode(row[PACKED]), remove_columns=PACKED)  # for who wants columns
    assert plain[1]["teacher_ids"].tolist() == batch["teacher_ids"][1, :7].tolist()
    assert len(VOCAB) == 24
