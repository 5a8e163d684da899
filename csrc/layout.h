// The table of fusedkd/backends/layout.py: what Python, C++ and CUDA tell each other by number. tests/test_layout.py
// compares the two.
#pragma once

#include <cstdint>

namespace fusedkd {

// Positions in the options tensor, float64 [OPTIONS].
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
constexpr int64_t OPTIONS = 16;

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

// kernel_id of the operators without ids, and with.
enum class KernelId : int64_t { FORWARD_KL, JEFFREYS, MIXTURE, ALPHA_BETA, TOTAL_VARIATION, LOGIT_MSE, DKD };
enum class TopkKernelId : int64_t {
  RENORMALIZE,
  RENORMALIZE_REVERSE,
  BUCKET,
  BUCKET_REVERSE,
  IGNORE,
  IGNORE_REVERSE,
  SAMPLES,
};

}  // namespace fusedkd
