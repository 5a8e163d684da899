"""What is measured: the shapes, their inputs, the float64 truth, and the fewest bytes a shape can move."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import torch
from torch import Tensor

from fusedkd import TeacherSamples, TeacherTopK
from fusedkd.backends.eager import DEFINITIONS, topk_definition
from fusedkd.backends.layout import TOPK_KERNELS, TopkKernelId
from fusedkd.divergences import FAMILIES, WITH_KERNEL, Divergence
from fusedkd.reference import hidden, softmax
from fusedkd.reference.divergences import Rows
from fusedkd.reference.hidden import DistanceName, NormalizeName

CACHE_BYTES = 64 << 20  # at least the last-level cache of the machines measured (L3 32 MB, L2 of an H200 60 MB)
ROWS_AT_A_TIME = 64  # of the float64 truth: temporaries small enough for malloc to keep

Inputs = tuple[Tensor, Tensor | TeacherTopK | TeacherSamples, Tensor]
"""Student, teacher, labels."""


@dataclass(frozen=True)
class Case:
    """One loss at one shape. ``backward``: loss and gradient; otherwise the loss alone, in ``no_grad``."""

    loss: str  # kd_loss, cosine_hidden_loss or hidden_loss
    rows: int
    columns: int  # V for kd_loss, H for hidden states
    dtype: str = "float32"
    temperature: float = 1.0
    ce: bool = False
    kd: bool = True  # else cross-entropy alone
    backward: bool = True
    divergence: str = "forward_kl"  # with the family's default parameters
    teacher: str = "logits"  # or what is known of it at `listed` columns per row: a tail of TeacherTopK, or samples
    listed: int = 0
    upstream: float = 1.0
    sure: bool = False  # one column of every row is far above the others
    distance: DistanceName = "cosine"  # of hidden states
    normalize: NormalizeName | None = None
    graph: bool = False  # replayed as a CUDA graph: the whole call without its launches

    @property
    def family(self) -> Divergence:
        return FAMILIES[self.divergence]()

    @property
    def ce_weight(self) -> float:
        return 1.0 if not self.kd else 0.5 if self.ce else 0.0

    @property
    def kd_scale(self) -> float:
        """The factor of the divergence: its weight and T^k."""
        return (1 - self.ce_weight) * self.temperature**self.family.temperature_power

    @property
    def gradient_bytes(self) -> int:
        return self.rows * self.columns * getattr(torch, self.dtype).itemsize if self.backward else 0

    @property
    def bytes_moved(self) -> int:
        """Student and teacher read once, the gradient written once: no implementation can move less."""
        side = self.rows * self.columns * getattr(torch, self.dtype).itemsize
        teacher = self.rows * self.listed * (torch.int64.itemsize + torch.float32.itemsize) if self.listed else side
        return side + teacher + self.gradient_bytes

    @property
    def compared(self) -> list[str]:
        """Of hidden_loss."""
        return [self.distance, self.normalize or ""] if self.loss == "hidden_loss" else []

    @property
    def label(self) -> str:
        """The case, as a heading."""
        kd = [
            "" if self.divergence == "forward_kl" else self.divergence,
            f"{'' if self.teacher == 'samples' else 'top '}{self.listed} {self.teacher}" if self.listed else "",
            f"T = {self.temperature:g}" if self.kd else "",
            "CE alone" if not self.kd else "with CE" if self.ce else "",
            "sure rows" if self.sure else "",
        ]
        mode = [
            *self.compared,
            "" if self.backward else "forward only",
            "" if self.upstream == 1 else f"upstream {self.upstream:g}",
            "CUDA graph" if self.graph else "",
        ]
        parts = [f"{self.loss} {self.rows}×{self.columns} {self.dtype}", *(kd if "kd_loss" in self.loss else []), *mode]
        return ", ".join(part for part in parts if part)

    def __str__(self) -> str:
        kd = [
            "" if self.divergence == "forward_kl" else self.divergence,
            f"{self.teacher}{self.listed}" if self.listed else "",
            f"T{self.temperature:g}" if self.kd else "",
            "ce" if self.ce and self.kd else "" if self.kd else "ce-alone",
            "sure" if self.sure else "",
        ]
        mode = [
            *self.compared,
            "fwd+bwd" if self.backward else "fwd",
            "" if self.upstream == 1 else f"upstream{self.upstream:g}",
            "graph" if self.graph else "",
        ]
        parts = [self.loss, f"{self.rows}x{self.columns}", self.dtype, *(kd if "kd_loss" in self.loss else []), *mode]
        return "-".join(part for part in parts if part)

    def inputs(self, device: str) -> list[Inputs]:
        """Sets of (student, teacher, labels), as many as it takes for no round to find its input in the cache.

        The student is the teacher with noise, labels are drawn from the teacher: a distillation under way.
        """
        sets: list[Inputs] = []
        for student, teacher, labels in _logits(self.rows, self.columns, self.dtype, device, self.sure):
            if not self.listed:
                sets.append((student, teacher, labels))
            elif self.teacher == "samples":
                random = torch.Generator(device).manual_seed(1)
                drawn = TeacherSamples.draw(teacher, self.listed, temperature=self.temperature, generator=random)
                sets.append((student, TeacherSamples(drawn.ids, drawn.weights.float()), labels))
            else:
                top = (teacher.float() / self.temperature).log_softmax(-1).topk(self.listed)
                tail: Any = self.teacher
                sets.append((student, TeacherTopK(top.indices, top.values, tail, self.temperature), labels))
        return sets

    def truth(self, student: Tensor, teacher: Any, labels: Tensor) -> tuple[float, Tensor]:
        """Value and gradient of the mean over rows, by the definitions in float64."""
        value, gradient = 0.0, torch.empty(student.shape, dtype=torch.float64, device=student.device)
        for start in range(0, self.rows, ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            x, y = student.detach()[rows].double(), labels[rows]
            if "hidden" in self.loss:
                compared = (x, teacher[rows].double(), self.distance, self.normalize)
                terms = [(1.0, hidden.hidden_distance(*compared))]
                gradient[rows] = hidden.hidden_gradient(*compared)
            else:
                divergence, slope = self._divergence(x, teacher, y, rows)
                terms = [(self.kd_scale, divergence)]
                gradient[rows] = self.kd_scale * slope
            if self.ce:
                terms.append((self.ce_weight, softmax.cross_entropy(x, y)))
                gradient[rows] += self.ce_weight * softmax.cross_entropy_gradient(x, y)
            value += sum(weight * term.sum().item() for weight, term in terms)
        return value / self.rows, gradient.mul_(self.upstream / self.rows)

    def _divergence(self, z: Tensor, teacher: Any, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """D and ∂D/∂z of some rows."""
        log_q = (z / self.temperature).log_softmax(-1)
        if self.listed:
            samples = self.teacher == "samples"
            form = TopkKernelId.SAMPLES if samples else TOPK_KERNELS[self.teacher, False]
            known = (teacher.weights if samples else teacher.logprobs)[rows].double()
            value, gradient = topk_definition(form, teacher.ids[rows], known, log_q, 1.0)
        else:
            v = teacher[rows].double()
            coefficients = z.new_tensor([float(a) for a in self.family.coefficients()])
            seen = Rows((v / self.temperature).log_softmax(-1), log_q, v, z, labels)
            value, gradient = DEFINITIONS[self.family.kernel_id](seen, coefficients)
        return value, gradient / self.temperature


@lru_cache(maxsize=1)  # cases of one shape follow each other
def _logits(rows: int, columns: int, dtype: str, device: str, sure: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    random = torch.Generator(device).manual_seed(0)
    shape, to = (rows, columns), getattr(torch, dtype)
    sets = []
    for _ in range(min(ceil(4 * CACHE_BYTES / (2 * rows * columns * to.itemsize)), 64)):
        teacher = torch.randn(shape, device=device, generator=random) * 3
        if sure:
            teacher.scatter_(1, torch.randint(columns, (rows, 1), device=device, generator=random), 18.0)
        student = teacher + 0.5 * torch.randn(shape, device=device, generator=random)
        labels = torch.empty(shape, device=device).exponential_(generator=random)
        labels = (teacher - labels.log_()).argmax(-1)  # Gumbel: a draw from softmax(teacher)
        sets.append((student.to(to).requires_grad_(), teacher.to(to), labels))
    return sets


def kd(rows: int, columns: int, dtype: str = "float32", temperature: float = 2.0, ce: bool = True, **mode: Any) -> Case:
    return Case("kd_loss", rows, columns, dtype, temperature, ce, **mode)


def family(name: str, rows: int, columns: int, dtype: str = "float32") -> Case:
    """A divergence alone, at T = 2 unless it knows no temperature."""
    temperature = 2.0 if FAMILIES[name].temperature_power else 1.0
    return kd(rows, columns, dtype, temperature, ce=False, divergence=name)


def listed(teacher: str, rows: int, columns: int, dtype: str = "float32", k: int = 64) -> Case:
    return kd(rows, columns, dtype, temperature=1.0, ce=False, teacher=teacher, listed=k)


def cosine(rows: int, columns: int, dtype: str = "float32", **mode: Any) -> Case:
    return Case("cosine_hidden_loss", rows, columns, dtype, **mode)


def states(
    distance: DistanceName,
    normalize: NormalizeName | None,
    rows: int,
    columns: int,
    dtype: str = "float32",
    **mode: Any,
) -> Case:
    return Case("hidden_loss", rows, columns, dtype, distance=distance, normalize=normalize, **mode)


OTHERS = [name for name in WITH_KERNEL if name != "forward_kl"]
HIDDEN: list[tuple[DistanceName, NormalizeName | None]]
HIDDEN = [("mse", None), ("mse", "l2"), ("mse", "layer_norm"), ("smooth_l1", None)]
KNOWN_AT_K = ("renormalize", "bucket", "samples")

CASES = {
    "cpu": [
        kd(512, 30522, temperature=1.0),  # BERT's vocabulary
        kd(512, 30522),
        kd(512, 30522, temperature=4.0),
        kd(512, 30522, backward=False),
        kd(512, 30522, backward=False, sure=True),
        kd(512, 30522, upstream=0.5),
        kd(512, 30522, ce=False),
        *(family(name, 512, 30522) for name in OTHERS),
        *(listed(teacher, 512, 30522) for teacher in KNOWN_AT_K),
        kd(512, 30522, "bfloat16"),
        kd(512, 50257),  # GPT-2's: no row but the first starts on 16 bytes
        cosine(4096, 768),  # DistilBERT: 32 sequences of 128
        cosine(4096, 768, "bfloat16"),
        cosine(8192, 1024),
        cosine(8192, 1024, backward=False),
    ],
    # Classifiers and taggers, whose vocabulary is a few classes; a few hundred columns; hidden states alone.
    "cpu-small": [
        kd(8, 2),
        kd(32, 2),
        kd(512, 2),
        kd(4096, 9),
        kd(16384, 2),
        kd(1_000_000, 2),
        kd(512, 100),
        kd(128, 1000),
        listed("bucket", 4096, 256),
        cosine(4096, 768, "bfloat16", backward=False),
        cosine(4096, 768, backward=False),
        cosine(32, 768, backward=False),
    ],
    "cpu-hidden": [
        states(distance, normalize, 4096, 768, dtype)
        for distance, normalize in HIDDEN
        for dtype in ("float32", "bfloat16")
    ],
    # Six minutes on an H200, of which half is torch.compile. So temperature, cross-entropy, upstream and the other
    # divergences vary at one shape, Llama 3's, in bfloat16; forward alone and float32 are measured at two vocabularies,
    # one below and one above what the L2 cache holds.
    "cuda": [
        kd(8192, 128256, "bfloat16"),  # Llama 3
        kd(8192, 128256, "bfloat16", temperature=1.0),
        kd(8192, 128256, "bfloat16", temperature=4.0),
        kd(8192, 128256, "bfloat16", ce=False),
        kd(8192, 128256, "bfloat16", backward=False),
        kd(8192, 128256, "bfloat16", upstream=0.5),
        family("reverse_kl", 8192, 128256, "bfloat16"),
        family("jsd", 8192, 128256, "bfloat16"),
        listed("renormalize", 8192, 128256, "bfloat16"),
        kd(8192, 128256),
        kd(8192, 32000, "bfloat16"),
        kd(8192, 32000, "bfloat16", backward=False),
        kd(8192, 32000),
        kd(8192, 50257, "bfloat16"),  # rows off 16 bytes
        kd(4096, 151936, "bfloat16"),  # Qwen
        kd(4096, 262144, "bfloat16"),  # Gemma
        kd(512, 128256, "bfloat16"),
        kd(64, 128256, "bfloat16"),  # fewer rows than multiprocessors
        kd(64, 128256, "bfloat16", graph=True),
        cosine(8192, 768, "bfloat16"),
        cosine(8192, 4096, "bfloat16"),
        cosine(16384, 4096, "bfloat16"),
        cosine(32768, 8192, "bfloat16"),
        cosine(16384, 4096),
        *(states(distance, normalize, 16384, 4096, "bfloat16") for distance, normalize in HIDDEN),
    ],
    "smoke": [  # tests the harness, in seconds
        kd(6, 33),
        kd(6, 33, backward=False),
        kd(6, 33, upstream=0.5),
        *(family(name, 6, 33) for name in OTHERS),
        *(listed(teacher, 6, 33, k=5) for teacher in KNOWN_AT_K),
        cosine(6, 20, "bfloat16"),
        *(states(distance, normalize, 6, 20) for distance, normalize in HIDDEN),
    ],
}
