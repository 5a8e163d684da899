// The first pass of kd_cluster_kernel: the softmax statistics of a row, over the threads of its cluster; and what they
// make of single columns.
#ifndef FUSEDKD_CLUSTER_STATISTICS
#define FUSEDKD_CLUSTER_STATISTICS

#include "../common/divergences.h"
#include "../common/layout.h"
#include "cluster_row.cuh"
#include "cluster_softmax.cuh"

namespace fusedkd {

constexpr int kState = 7;  // floats of statistics that blocks tell each other

// The label's column, −1 if the row needs none; whether the divergence does without it; and what is there.
struct Label {
  int column;
  bool excluded;
  LogitPack<1> at;

  template <int W>
  INLINE bool within(int c) const {
    return static_cast<unsigned>(column - c) < W;
  }
  // Makes the column at c a masked one, for a divergence that does without it.
  template <int W>
  INLINE void hide(int c, LogitPack<W>& x) const {
#pragma unroll
    for (int e = 0; e < W; ++e) {
      if (c + e == column) x.z[e] = x.v[e] = -INFINITE<float>;
    }
  }
};

// log2(e)/T of both sides; power: T of the student if that is 1, 2 or 4, else 0.
struct Temperatures {
  float c_s, c_t, k_s, k_t;
  int power;

  INLINE Temperatures(float c_s, float c_t) : c_s(c_s), c_t(c_t), k_s(c_s * LOG2E), k_t(c_t * LOG2E) {
    power = c_s == 1 ? 1 : c_s == 0.5f ? 2 : c_s == 0.25f ? 4 : 0;
  }
};

// m and l − 1 of student and teacher in the KD term, and of the student at T = 1 over all of its columns. l is 0 where
// all columns are −∞.
struct Statistics {
  float m_s, rest_s, m_t, rest_t, m_1, rest_1;

  INLINE void load(const float* stats) {
    m_s = stats[STUDENT_MAX], rest_s = stats[STUDENT_SUM], m_t = stats[OTHER_MAX], rest_t = stats[OTHER_SUM];
    m_1 = stats[CE_MAX], rest_1 = stats[CE_SUM];
  }
  INLINE void store(float* stats) const {
    stats[STUDENT_MAX] = m_s, stats[STUDENT_SUM] = rest_s, stats[OTHER_MAX] = m_t, stats[OTHER_SUM] = rest_t;
    stats[CE_MAX] = m_1, stats[CE_SUM] = rest_1;
  }
  INLINE float l_s() const { return 1 + rest_s; }
  INLINE float l_t() const { return 1 + rest_t; }
  INLINE float l_1() const { return 1 + rest_1; }
};

// Those of the thread's columns: of the first `common` both sides', of the others the student's at T = 1.
template <bool kExcludes, typename Row>
INLINE void statistics_of_thread(const Row& row, const Temperatures& t, const Label& label, int common, bool has_kd,
                                 bool has_ce, float (&state)[kState]) {
  ThreadSoftmax student, teacher, others;
  row.each([&](int c, auto& x) {
    constexpr int W = sizeof(x.z) / sizeof(float);
    if (W == 1 && c >= common) return others.add(x.z, LOG2E, 1, false);
    if (kExcludes && label.excluded && label.within<W>(c)) {
      label.hide(c, x);
      others.add(label.at.z, LOG2E, 1, false);
    }
    student.add(x.z, t.k_s, t.power, has_ce);
    if (has_kd) teacher.add(x.v, t.k_t, 1, false);
  });
  state[0] = student.m, state[1] = student.rest, state[2] = t.power == 1 ? student.rest : student.rest_1;
  state[3] = teacher.m, state[4] = teacher.rest, state[5] = others.m, state[6] = others.rest;
}

// Those of the row, of what its threads have.
INLINE Statistics merged(float (&state)[kState], const Temperatures& t, float* scratch, float* inbox, bool& met) {
  constexpr float kNone = -INFINITE<float>;
  const auto merge = [&](float (&of)[kState]) {
    float m = of[0];
    of[1] = merge_over_lanes(m, of[1], t.k_s);
    of[2] = merge_over_lanes(of[0], of[2], LOG2E);
    of[4] = merge_over_lanes(of[3], of[4], t.k_t);
    of[6] = merge_over_lanes(of[5], of[6], LOG2E);
  };
  over_cluster(state, {kNone, 0, 0, kNone, 0, kNone, 0}, merge, scratch, inbox, met);
  Statistics s;
  // A row of nothing but −∞ has no maximum to leave out; one of NaN stays NaN.
  const auto less_one = [](float m, float rest, float k) { return rest * beyond(m, k, -1) - (m == kNone ? 1 : 0); };
  s.m_s = state[0], s.m_t = state[3], s.m_1 = max(s.m_s, state[5]);
  s.rest_s = less_one(s.m_s, state[1], t.k_s), s.rest_t = less_one(s.m_t, state[4], t.k_t);
  s.rest_1 =
      s.m_s == s.m_1 ? join(s.m_1, state[2], state[5], state[6], LOG2E) : join(s.m_1, state[6], s.m_s, state[2], LOG2E);
  s.rest_1 = less_one(s.m_1, s.rest_1, LOG2E);
  return s;
}

// What the statistics make of logits: p, q and δ of a column.
//
// δ = c_s·((v − z) − gap) + (c_t − c_s)·(v − m_t) − log(l_t/l_s), gap = m_t − m_s. What is the same for all columns
// moves D in second order only. Sides that are far apart are first reduced by their maxima; differences of 16-bit
// logits, for which kExact is, are exact as they are. A side whose columns all count as LOWEST is one of zeros.
template <bool kExact>
struct Columns {
  Exponent of_s, of_t;
  float sum_s, sum_t, r_s, r_t;  // Σ 2^(x·k − M) and its inverse
  float c_s, c_rest, low_s, low_t, base_t, near_s, near_t, gap, log_ratio, offset;

  INLINE Columns(const Statistics& s, const Temperatures& t)
      : of_s(t.k_s, s.m_s), of_t(t.k_t, s.m_t), sum_s(s.l_s() * beyond(s.m_s, t.k_s, 1)),
        sum_t(s.l_t() * beyond(s.m_t, t.k_t, 1)), r_s(reciprocal_or_zero(sum_s)), r_t(reciprocal_or_zero(sum_t)),
        c_s(t.c_s), c_rest(t.c_t - t.c_s), low_s(s.m_s == LOWEST ? 0 : LOWEST), low_t(s.m_t == LOWEST ? 0 : LOWEST) {
    const float base_s = s.m_s == LOWEST ? 0 : finite_or_zero(s.m_s);
    base_t = s.m_t == LOWEST ? 0 : finite_or_zero(s.m_t);
    const bool far = std::fabs(base_t - base_s) > 16;
    near_s = far ? base_s : 0, near_t = far ? base_t : 0, gap = far ? 0 : base_t - base_s;
    const float l_s = s.l_s(), l_t = s.l_t();
    const float ratio = l_t / l_s, beside_1 = (s.rest_t - s.rest_s) / l_s;  // ratio − 1, with all its digits near 0
    log_ratio = l_s == 0 || l_t == 0 ? 0 : std::fabs(beside_1) < 0.5f ? std::log1p(beside_1) : std::log(ratio);
    offset = -fma(c_s, base_t - base_s, fma(c_rest, base_t, log_ratio));
  }
  // e_s: 2^(z·k_s − M_s).
  INLINE Column<float> operator()(float z, float v, float& e_s) const {
    Column<float> column;
    column.z = z, column.v = v, column.no_p = v == -INFINITE<float>, column.no_q = z == -INFINITE<float>;
    column.log2_e_q = of_s(z), column.log2_e_p = of_t(v);
    e_s = exp2_of(column.log2_e_q);
    column.q = product(e_s, r_s), column.p = product(exp2_of(column.log2_e_p), r_t);
    const float low_v = max(v, low_t), low_z = max(z, low_s);
    column.delta = kExact ? fma(c_s, low_v - low_z, fma(c_rest, low_v, offset))
                          : c_s * ((low_v - near_t) - (low_z - near_s) - gap) + (c_rest * (low_v - base_t) - log_ratio);
    return column;
  }
};

}  // namespace fusedkd
#endif
