// The table of fusedkd/backends/layout.py: what Python, C++ and CUDA tell each other by number. tests/test_layout.py
// compares the two.
#pragma once

#include <cstdint>

namespace fusedkd {

// Positions in the options tensor, float64 [OPTIONS], or [N, OPTIONS] where rows have temperatures, KD weights and
// coefficients of their own.
enum Option : int64_t {
  TEMPERATURE,
  TEACHER_TEMPERATURE,
  KD_SCALE,
  KD_WEIGHT,
  CE_WEIGHT,
  LABEL_SMOOTHING,
  SOFTCAP,
  SCALE,
  TEACHER_SOFTCAP,
  TEACHER_SCALE,
  Z_LOSS_WEIGHT,
  COEFFICIENTS,  // a0, a1, … from here on
};
constexpr int64_t OPTIONS = 18;

// Columns of the statistics [N, STATS].
enum Stat : int64_t {
  STUDENT_MAX,
  STUDENT_SUM,
  OTHER_MAX,
  OTHER_SUM,
  CE_MAX,
  CE_SUM,
  WEIGHT_SUM,
  OWN,
  STATS,
};

// How the operators of hidden states compare two rows, what they do to both first, and the columns of their statistics
// [N, HIDDEN_STATS].
enum class HiddenDistance : int64_t { MSE, COSINE, SMOOTH_L1 };
enum class HiddenNormalize : int64_t { NONE, L2, LAYER_NORM };
enum HiddenStat : int64_t {
  STUDENT_FACTOR,
  STUDENT_MEAN,
  STUDENT_REST,
  TEACHER_FACTOR,
  TEACHER_MEAN,
  TEACHER_REST,
  SHIFT,
  PULL,
  HIDDEN_STATS,
};

// Columns of the statistics [N, GUMBEL_STATS] of the Gumbel operators.
enum GumbelStat : int64_t {
  NOISY_MAX,
  NOISY_SUM,
  GUMBEL_STATS,
};

// Of a shard of the vocabulary there are more, [N, STATS + SHARD_STATS]: these come after the others.
enum ShardStat : int64_t {
  LABEL_STUDENT,
  LABEL_TEACHER,
  GAP,
  COLUMNS,
  VALUE,
  WEIGHT,
  SHARD_STATS,
};
// What is asked for of a shard.
enum class Stage : int64_t { STATISTICS, VALUES, GRADIENT };

// Positions in the normalizers tensor, float64 [NORMALIZERS].
constexpr int64_t KD_NORMALIZER = 0, CE_NORMALIZER = 1, NORMALIZERS = 2;
constexpr double COUNTED = -__builtin_huge_val();  // a normalizer that is not given, but counted

// The kernels: each has a kernel_id, and a class with its formulas. The enums, the switches over them and what counts
// as a kernel_id are made of these lists, which call X(id, class) in the order of the numbers.

// Of the operators without ids; classes: divergences.h.
#define FUSEDKD_KERNELS(X)             \
  X(FORWARD_KL, ForwardKL)             \
  X(JEFFREYS, Jeffreys)                \
  X(MIXTURE, Mixture)                  \
  X(ALPHA_BETA, AlphaBeta)             \
  X(TOTAL_VARIATION, TotalVariation)   \
  X(LOGIT_MSE, LogitMSE)               \
  X(DKD, DKD)                          \
  X(SUM, Sum)                          \
  X(MIXED_SUM, MixedSum)

// Of the operators with ids; classes: cpu/topk_divergences.h.
#define FUSEDKD_TOPK_KERNELS(X)                \
  X(RENORMALIZE, Renormalize)                  \
  X(RENORMALIZE_REVERSE, RenormalizeReverse)   \
  X(BUCKET, Bucket)                            \
  X(BUCKET_REVERSE, BucketReverse)             \
  X(IGNORE, Ignore)                            \
  X(IGNORE_REVERSE, IgnoreReverse)             \
  X(SAMPLES, Samples)

#define FUSEDKD_ID(id, Class) id,
#define FUSEDKD_ONE_MORE(id, Class) +1
enum class KernelId : int64_t { FUSEDKD_KERNELS(FUSEDKD_ID) };
enum class TopkKernelId : int64_t { FUSEDKD_TOPK_KERNELS(FUSEDKD_ID) };
constexpr int64_t KERNELS = FUSEDKD_KERNELS(FUSEDKD_ONE_MORE), TOPK_KERNELS = FUSEDKD_TOPK_KERNELS(FUSEDKD_ONE_MORE);
#undef FUSEDKD_ID
#undef FUSEDKD_ONE_MORE

}  // namespace fusedkd
