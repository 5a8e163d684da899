"""The table of :mod:`fusedkd.backends.layout` as Triton wants it: kernels see no globals but constexprs."""

import triton.language as tl

from fusedkd.backends import layout
from fusedkd.backends.layout import (
    GumbelStat,
    HiddenDistance,
    HiddenNormalize,
    HiddenStat,
    KernelId,
    Option,
    ShardStat,
    Stage,
    Stat,
    TopkKernelId,
)

TEMPERATURE = tl.constexpr(int(Option.TEMPERATURE))
TEACHER_TEMPERATURE = tl.constexpr(int(Option.TEACHER_TEMPERATURE))
KD_SCALE = tl.constexpr(int(Option.KD_SCALE))
KD_WEIGHT = tl.constexpr(int(Option.KD_WEIGHT))
CE_WEIGHT = tl.constexpr(int(Option.CE_WEIGHT))
LABEL_SMOOTHING = tl.constexpr(int(Option.LABEL_SMOOTHING))
SOFTCAP = tl.constexpr(int(Option.SOFTCAP))
SCALE = tl.constexpr(int(Option.SCALE))
TEACHER_SOFTCAP = tl.constexpr(int(Option.TEACHER_SOFTCAP))
TEACHER_SCALE = tl.constexpr(int(Option.TEACHER_SCALE))
Z_LOSS_WEIGHT = tl.constexpr(int(Option.Z_LOSS_WEIGHT))
OPTIONS = tl.constexpr(layout.OPTIONS)
NORMALIZERS = tl.constexpr(layout.NORMALIZERS)
COEFFICIENTS = tl.constexpr(int(Option.COEFFICIENTS))

STUDENT_MAX = tl.constexpr(int(Stat.STUDENT_MAX))
STUDENT_SUM = tl.constexpr(int(Stat.STUDENT_SUM))
OTHER_MAX = tl.constexpr(int(Stat.OTHER_MAX))
OTHER_SUM = tl.constexpr(int(Stat.OTHER_SUM))
CE_MAX = tl.constexpr(int(Stat.CE_MAX))
CE_SUM = tl.constexpr(int(Stat.CE_SUM))
WEIGHT_SUM = tl.constexpr(int(Stat.WEIGHT_SUM))
OWN = tl.constexpr(int(Stat.OWN))
STATS = tl.constexpr(layout.STATS)

LABEL_STUDENT = tl.constexpr(int(ShardStat.LABEL_STUDENT))
LABEL_TEACHER = tl.constexpr(int(ShardStat.LABEL_TEACHER))
GAP = tl.constexpr(int(ShardStat.GAP))
COLUMNS = tl.constexpr(int(ShardStat.COLUMNS))
VALUE = tl.constexpr(int(ShardStat.VALUE))
WEIGHT = tl.constexpr(int(ShardStat.WEIGHT))
SHARD_STATS = tl.constexpr(layout.SHARD_STATS)

NOISY_MAX = tl.constexpr(int(GumbelStat.NOISY_MAX))
NOISY_SUM = tl.constexpr(int(GumbelStat.NOISY_SUM))
GUMBEL_STATS = tl.constexpr(len(GumbelStat))

STATISTICS = tl.constexpr(int(Stage.STATISTICS))
VALUES = tl.constexpr(int(Stage.VALUES))
GRADIENT = tl.constexpr(int(Stage.GRADIENT))

FORWARD_KL = tl.constexpr(int(KernelId.FORWARD_KL))
JEFFREYS = tl.constexpr(int(KernelId.JEFFREYS))
MIXTURE = tl.constexpr(int(KernelId.MIXTURE))
ALPHA_BETA = tl.constexpr(int(KernelId.ALPHA_BETA))
TOTAL_VARIATION = tl.constexpr(int(KernelId.TOTAL_VARIATION))
LOGIT_MSE = tl.constexpr(int(KernelId.LOGIT_MSE))
DKD = tl.constexpr(int(KernelId.DKD))
SUM = tl.constexpr(int(KernelId.SUM))
MIXED_SUM = tl.constexpr(int(KernelId.MIXED_SUM))

RENORMALIZE = tl.constexpr(int(TopkKernelId.RENORMALIZE))
RENORMALIZE_REVERSE = tl.constexpr(int(TopkKernelId.RENORMALIZE_REVERSE))
BUCKET = tl.constexpr(int(TopkKernelId.BUCKET))
BUCKET_REVERSE = tl.constexpr(int(TopkKernelId.BUCKET_REVERSE))
IGNORE = tl.constexpr(int(TopkKernelId.IGNORE))
IGNORE_REVERSE = tl.constexpr(int(TopkKernelId.IGNORE_REVERSE))
SAMPLES = tl.constexpr(int(TopkKernelId.SAMPLES))

MSE = tl.constexpr(int(HiddenDistance.MSE))
COSINE = tl.constexpr(int(HiddenDistance.COSINE))
SMOOTH_L1 = tl.constexpr(int(HiddenDistance.SMOOTH_L1))
NONE = tl.constexpr(int(HiddenNormalize.NONE))
L2 = tl.constexpr(int(HiddenNormalize.L2))
LAYER_NORM = tl.constexpr(int(HiddenNormalize.LAYER_NORM))
STUDENT_FACTOR = tl.constexpr(int(HiddenStat.STUDENT_FACTOR))
STUDENT_MEAN = tl.constexpr(int(HiddenStat.STUDENT_MEAN))
STUDENT_REST = tl.constexpr(int(HiddenStat.STUDENT_REST))
TEACHER_FACTOR = tl.constexpr(int(HiddenStat.TEACHER_FACTOR))
TEACHER_MEAN = tl.constexpr(int(HiddenStat.TEACHER_MEAN))
TEACHER_REST = tl.constexpr(int(HiddenStat.TEACHER_REST))
SHIFT = tl.constexpr(int(HiddenStat.SHIFT))
PULL = tl.constexpr(int(HiddenStat.PULL))
HIDDEN_STATS = tl.constexpr(layout.HIDDEN_STATS)
