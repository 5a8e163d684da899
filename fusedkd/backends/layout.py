"""The one table of what Python, C++, Triton and CUDA tell each other by number: the options of a call, the statistics
of a row, and the kernels that compute a divergence. ``csrc/common/layout.h`` repeats it, and a test compares the two.
"""

from __future__ import annotations

from enum import IntEnum

OPTIONS = 18
"""Elements of the ``options`` tensor, float64: ``(OPTIONS,)``; or ``(N, OPTIONS)`` where a row has temperatures,
KD_SCALE, KD_WEIGHT or coefficients of its own. The others are then the same in all rows.
"""


class Option(IntEnum):
    """Positions in the ``options`` tensor of the KD operators: real numbers that compile nothing when they change."""

    TEMPERATURE = 0
    """T_s > 0 of the student's softmax in the KD term."""
    TEACHER_TEMPERATURE = 1
    """T_t > 0 of the teacher's."""
    KD_SCALE = 2
    """T^k, or 1; of a row that has one, times its weight among several teachers or divergences, 0 for no share."""
    KD_WEIGHT = 3
    """Of the KD term in the loss, ≥ 0."""
    CE_WEIGHT = 4
    """Of the cross-entropy in the loss, ≥ 0."""
    LABEL_SMOOTHING = 5
    """ε in [0, 1]."""
    SOFTCAP = 6
    """c of the student's logits c·tanh(scale·z/c); 0 for none."""
    SCALE = 7
    """Of the student's logits."""
    TEACHER_SOFTCAP = 8
    """As SOFTCAP, of the teacher's logits."""
    TEACHER_SCALE = 9
    """Of the teacher's logits."""
    Z_LOSS_WEIGHT = 10
    """Of (log Σe^z)² in the cross-entropy, ≥ 0."""
    COEFFICIENTS = 11
    """a₀, a₁, … of the divergence from here on, then zeros."""


class Stat(IntEnum):
    """Columns of the statistics ``(N, len(Stat))`` that the forward operator leaves for the backward one.

    A sum is Σ exp((x − max)/T) over the columns of its maximum, kept less 1: near 1 it has no digits left for what is
    beside the maximum. (C++ keeps those of listed teachers whole, and what rounding took in OWN and WEIGHT_SUM.)
    """

    STUDENT_MAX = 0
    """Of the student's logits over the columns of the KD term, all of them where the teacher is known at few."""
    STUDENT_SUM = 1
    """Of the student at T_s."""
    OTHER_MAX = 2
    """Of the teacher's logits; where the teacher is known at few columns: of the student's over the columns that are
    not listed."""
    OTHER_SUM = 3
    """At T_t, or of the columns that are not listed at T_s."""
    CE_MAX = 4
    """Of the student's logits over all columns."""
    CE_SUM = 5
    """Of the student over all columns at T = 1."""
    WEIGHT_SUM = 6
    """Σw of the gradient w − q·Σw; +inf where the divergence is infinite."""
    OWN = 7
    """The backend's own use."""


STATS = len(Stat)


NORMALIZERS = 2
"""Of the KD term and of the cross-entropy, float64: what their sums over rows are divided by."""
COUNTED = float("-inf")
"""In place of a normaliser that is not given: the number of rows is counted."""


class HiddenDistance(IntEnum):
    """How the operators of hidden states compare two rows: their ``distance``."""

    MSE = 0
    COSINE = 1
    SMOOTH_L1 = 2


class HiddenNormalize(IntEnum):
    """What they do to both rows first: their ``normalize``."""

    NONE = 0
    L2 = 1
    LAYER_NORM = 2


class HiddenStat(IntEnum):
    """Columns of the statistics ``(N, HIDDEN_STATS)`` of the operators of hidden states: a row is normalised to
    x̂ = factor·(x − mean − rest), and ∂D/∂x is a multiple of g − shift − pull·x̂, g the derivative by x̂.
    """

    STUDENT_FACTOR = 0
    """1/√(Σx² + ε) or 1/√(variance + ε); of the cosine of rows that layer norm normalises, both in one."""
    STUDENT_MEAN = 1
    STUDENT_REST = 2
    """What the rounding of the mean took from it."""
    TEACHER_FACTOR = 3
    TEACHER_MEAN = 4
    TEACHER_REST = 5
    SHIFT = 6
    PULL = 7


HIDDEN_STATS = len(HiddenStat)


class GumbelStat(IntEnum):
    """Columns of the statistics ``(N, len(GumbelStat))`` of the Gumbel operators."""

    NOISY_MAX = 0
    """Of the logits with their noise."""
    NOISY_SUM = 1
    """Σ exp((x − max)/T)."""


class ShardStat(IntEnum):
    """Of a shard of the vocabulary there are more, ``(N, STATS + SHARD_STATS)``: these come after those of `Stat`. All
    but the last two are what a rank tells the others.
    """

    LABEL_STUDENT = 0
    """The student's logit of the label; 0 where another shard has it."""
    LABEL_TEACHER = 1
    """The teacher's."""
    GAP = 2
    """Σ (CE_MAX − z) over the columns, if labels are smoothed."""
    COLUMNS = 3
    """Of the shard."""
    VALUE = 4
    """D; before the shards are added up, the part of it that this one's columns have."""
    WEIGHT = 5
    """Σw, likewise."""


SHARD_STATS = len(ShardStat)
TOLD = STATS + ShardStat.VALUE
"""Statistics that a rank tells the others: the first so many, 48 bytes a row."""


class Stage(IntEnum):
    """What the operator of a shard is asked for: with a collective after the first and after the second."""

    STATISTICS = 0
    VALUES = 1
    """VALUE and WEIGHT from the statistics of the whole row; and the gradient, if it is asked for, which no form of
    `NEEDS_WEIGHT_SUM` or `REVERSE` may."""
    GRADIENT = 2


class KernelId(IntEnum):
    """How kernels compute a divergence of a teacher with logits: the ``kernel_id`` of the KD operators without ids.
    Several divergences of :mod:`fusedkd.divergences` may share one, with other coefficients.
    """

    FORWARD_KL = 0
    JEFFREYS = 1
    MIXTURE = 2
    ALPHA_BETA = 3
    TOTAL_VARIATION = 4
    LOGIT_MSE = 5
    DKD = 6
    SUM = 7
    """Of JEFFREYS and TOTAL_VARIATION, with weights."""
    MIXED_SUM = 8
    """Of these and MIXTURE."""


FIRST_DEFINED = 1 << 16
"""From here on: divergences that have no kernel, numbered as they come (:mod:`fusedkd.backends.defined`)."""


class TopkKernelId(IntEnum):
    """The ``kernel_id`` of the KD operators with ids. a₀ of the first six is the log-probabilities' temperature."""

    RENORMALIZE = 0
    RENORMALIZE_REVERSE = 1
    BUCKET = 2
    BUCKET_REVERSE = 3
    IGNORE = 4
    IGNORE_REVERSE = 5
    SAMPLES = 6


FINITE_GRADIENT = (KernelId.FORWARD_KL, KernelId.DKD)
"""The kernels whose gradient is finite, and right, where the divergence is infinite. Any other's is 0 there."""

NEEDS_WEIGHT_SUM = tuple(kernel for kernel in KernelId if kernel not in FINITE_GRADIENT)
"""The kernels whose gradient waits for Σw, or for D because it is 0 where that is infinite: one more pass."""

TOPK_KERNELS = {
    ("renormalize", False): TopkKernelId.RENORMALIZE,
    ("renormalize", True): TopkKernelId.RENORMALIZE_REVERSE,
    ("bucket", False): TopkKernelId.BUCKET,
    ("bucket", True): TopkKernelId.BUCKET_REVERSE,
    ("ignore", False): TopkKernelId.IGNORE,
    ("ignore", True): TopkKernelId.IGNORE_REVERSE,
}
"""By the teacher's tail, and whether KL(q‖p) is meant."""

REVERSE = tuple(kernel for (_, reverse), kernel in TOPK_KERNELS.items() if reverse)
"""Their gradient is 0 where the divergence is infinite; the others' is finite, and right."""
