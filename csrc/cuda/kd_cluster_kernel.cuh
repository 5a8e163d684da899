// kd_loss on Hopper: every row pair is read once, into the shared memory of a thread-block cluster, and worked on
// there. The formulas are those of divergences.h; m, l, W of a row as in kd_rows.h.
//
//   copies    a cluster of 1 … 16 blocks shares a row; each gets its columns by bulk copies, in stages
//   sweep 1   m and l = Σ exp((x − m)/T) of both sides, and of the student at T = 1, as the stages arrive; merged over
//             threads, warps and, through distributed shared memory, blocks
//   sweep 2   D and W, where the gradient needs W or needs to know whether D is finite
//   sweep 3   the gradient, and D where there was no sweep 2
//
// Moves 6 bytes per 16-bit logit: z and v in, the gradient out; 4 without a gradient. From given statistics sweep 3
// alone runs, and blocks need not meet. Exponentials per column: two a sweep; at T = 1, 2, 4 that of CE is a power of
// the student's, else a third.
//
// One row per cluster, held on chip between reduction and gradient, is the design of QuACK's cross_entropy; the merge
// of partial softmaxes Milakov and Gimelshein's (2018, arXiv:1805.02867).
// The operator: kd_cluster.cu.
#ifndef FUSEDKD_KD_CLUSTER_KERNEL
#define FUSEDKD_KD_CLUSTER_KERNEL

#include "../common/divergences.h"
#include "../common/layout.h"
#include "cluster.cuh"
#include "cluster_row.cuh"
#include "cluster_softmax.cuh"

namespace fusedkd {

constexpr int kResident = 3;  // blocks of an SM, if their columns fit: one's copies hide behind the others' work
constexpr int kState = 7, kSums = 3;  // floats that blocks tell each other: softmax statistics; D, W, Σ (z − m)

template <typename S>
struct KdArguments {
  const S* student;                                         // [B, L, V]: row i is (i / L, i % L)
  const S* teacher;                                         // [B, L, C], C <= V
  S* gradient;                                              // [B, L, V] or null; may be the student
  int64_t z_strides[2], v_strides[2], gradient_strides[2];  // of B and L
  const int64_t* labels;                                    // [N] or null
  const float* weights;                                     // [N]
  const double* options;                                    // [OPTIONS]
  const double* normalizers;                                // [NORMALIZERS]
  const float* upstream;                                    // [] or [N]; null in the forward call
  int64_t upstream_stride;                                  // 0 or 1
  float* rows;                                              // [2, N], written in the forward call
  float* stats;                         // [N, 8]: m_s, l_s, m_t, l_t, m_1, l_1, W; written forward, read afterwards
  int64_t ignore_index, count, length;  // N, L
  int columns, common;                  // V, C
  bool ce, skip_if_one;                 // the gradient is already right for an upstream of 1
};

// The start of a block's shared memory; its columns of the student and of the teacher follow.
struct Shared {
  Arrival arrivals[kStages];
  float scratch[kWarps * kState];
  // Then, per rank: kState + kSums floats, which the blocks of the cluster send each other.
};
__host__ __device__ constexpr int columns_at(int ranks) {
  return (static_cast<int>(sizeof(Shared)) + 4 * (kState + kSums) * ranks + 15) / 16 * 16;
}

// Kernels that would spill in the registers that are left to three blocks.
template <typename F, bool kTransform>
constexpr bool kCrowded = kTransform || std::is_same_v<F, AlphaBeta<float>> || std::is_same_v<F, DKD<float>>;

#ifdef FUSEDKD_HOPPER
constexpr int kCompiledThreads = kThreads;
#else
constexpr int kCompiledThreads = 1;  // what the host can ask of a loaded kernel: cluster_fits()
#endif

template <typename F, typename S, bool kTransform>
__global__ void __launch_bounds__(kCompiledThreads, kCrowded<F, kTransform> ? 2 : kResident)
    kd_cluster_kernel(const KdArguments<S> p) {
#ifdef FUSEDKD_HOPPER
  const int rank = static_cast<int>(cluster_rank()), ranks = static_cast<int>(cluster_size());
  const int64_t i = blockIdx.x / ranks;
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  float* const states = reinterpret_cast<float*>(&shared + 1);
  float* const totals = states + kState * ranks;

  // Every exit below is taken by all threads of the cluster.
  const bool forward = p.upstream == nullptr, first = rank == 0 && threadIdx.x == 0;
  const float upstream = forward ? 1.0f : p.upstream[i * p.upstream_stride];
  if (p.skip_if_one && upstream == 1) return;
  const float weight = p.weights[i];
  const int64_t label = p.labels ? p.labels[i] : p.ignore_index;
  const bool counted = p.ce && p.labels && label != p.ignore_index, legal = label >= 0 && label < p.columns;
  const bool has_kd = weight != 0 && p.common > 0, has_ce = counted && legal;
  const bool has_target = p.labels && label >= 0 && label < p.common;  // for forms that hide it
  float* const stats = p.stats + STATS * i;
  S* gradient = nullptr;
  const int64_t b = i / p.length, l = i % p.length;
  const auto row_at = [&](const int64_t (&strides)[2]) { return b * strides[0] + l * strides[1]; };
  if (p.gradient) gradient = p.gradient + row_at(p.gradient_strides);

  RowPair<S, kTransform> row;
  row.thread = threadIdx.x, row.threads = kThreads;
  row.place = rank * kThreads + threadIdx.x, row.places = ranks * kThreads;
  row.z.row = p.student + row_at(p.z_strides), row.v.row = p.teacher + row_at(p.v_strides);
  row.z.columns = has_ce ? p.columns : has_kd ? p.common : 0, row.v.columns = has_kd ? p.common : 0;
  row.arrivals = shared.arrivals;
  if (gradient) clear(gradient, row.z.columns, p.columns, row.place, row.places);
  if (forward && first) p.rows[i] = 0, p.rows[p.count + i] = counted && !legal ? NAN : 0;
  if (row.z.columns == 0) {  // nothing is read
    if (forward && first) {
      for (int k = 0; k < STATS; ++k) stats[k] = 0;
    }
    return;
  }
  const int common = has_kd ? p.common : p.columns;  // a row without KD has no columns but common ones
  row.start(gradient ? gradient : row.z.row, common, shared_memory() + columns_at(ranks), rank, ranks);
  __syncthreads();
  if (forward) cluster_arrive();
  bool met = false;

  // Options. k turns a difference of logits into an exponent of 2.
  const auto option = [&](Option k) { return static_cast<float>(p.options[k]); };
  const float c_s = has_kd ? 1 / option(TEMPERATURE) : 1, c_t = 1 / option(TEACHER_TEMPERATURE), k_s = c_s * LOG2E,
              k_t = c_t * LOG2E;
  const int power = c_s == 1 ? 1 : c_s == 0.5f ? 2 : c_s == 0.25f ? 4 : 0;
  const float smoothing = option(LABEL_SMOOTHING);
  row.cap_z = option(SOFTCAP), row.scale_z = option(SCALE), row.cap_v = option(TEACHER_SOFTCAP),
  row.scale_v = option(TEACHER_SCALE);
  const int target = has_ce || (F::excludes_label && has_kd && has_target) ? static_cast<int>(label) : -1;
  const bool hides = F::excludes_label && has_kd && has_target;

  LogitPack<1> at_label{{-INFINITE<float>}, {-INFINITE<float>}, {1}};
  if (target >= 0) {
    at_label.z[0] = static_cast<float>(row.z.row[target]);
    if (target < row.v.columns) at_label.v[0] = static_cast<float>(row.v.row[target]);
    row.transform(at_label);
  }

  // Sweep 1
  float m_s, l_s, m_t, l_t, m_1, l_1;
  if (forward) {
    ThreadSoftmax s, t, x;  // of the common columns, and of the student's others for CE
    row.each([&](int c, auto& at) {
      constexpr int W = sizeof(at.z) / sizeof(float);
      if (W == 1 && c >= common) return x.add(at.z, LOG2E, 1, false);
      if (F::excludes_label && hides && static_cast<unsigned>(target - c) < W) {
#pragma unroll
        for (int e = 0; e < W; ++e) {
          if (c + e == target) at.z[e] = at.v[e] = -INFINITE<float>;
        }
        x.add(at_label.z, LOG2E, 1, false);
      }
      s.add(at.z, k_s, power, has_ce);
      if (has_kd) t.add(at.v, k_t, 1, false);
    });
    constexpr float kNone = -INFINITE<float>;
    float state[kState] = {s.m, s.l, power == 1 ? s.l : s.l_1, t.m, t.l, x.m, x.l};
    const auto merge = [&](float (&of)[kState]) {
      float m = of[0];
      of[1] = merge_over_lanes(m, of[1], k_s);
      of[2] = merge_over_lanes(of[0], of[2], LOG2E);
      of[4] = merge_over_lanes(of[3], of[4], k_t);
      of[6] = merge_over_lanes(of[5], of[6], LOG2E);
    };
    over_cluster(state, {kNone, 0, 0, kNone, 0, kNone, 0}, merge, shared.scratch, states, met);
    m_s = state[0], m_t = state[3], m_1 = max(m_s, state[5]);
    l_s = state[1] * beyond(m_s, k_s, -1), l_t = state[4] * beyond(m_t, k_t, -1);
    const float M_1 = product(finite_or_zero(m_1), LOG2E);
    l_1 = state[2] * exp2_of(product(m_s, LOG2E) - M_1) + state[6] * exp2_of(product(state[5], LOG2E) - M_1);
    l_1 *= beyond(m_1, LOG2E, -1);
    if (first) {
      stats[STUDENT_MAX] = m_s, stats[STUDENT_SUM] = l_s, stats[OTHER_MAX] = m_t, stats[OTHER_SUM] = l_t;
      stats[CE_MAX] = m_1, stats[CE_SUM] = l_1;
    }
  } else {
    m_s = stats[STUDENT_MAX], l_s = stats[STUDENT_SUM], m_t = stats[OTHER_MAX], l_t = stats[OTHER_SUM];
    m_1 = stats[CE_MAX], l_1 = stats[CE_SUM];
  }

  // The row's constants
  const Exponent of_s(k_s, m_s), of_t(k_t, m_t), of_1(LOG2E, m_1), of_s_at_1(LOG2E, m_s), from_1(1, m_1);
  const float sum_s = l_s * beyond(m_s, k_s, 1), sum_t = l_t * beyond(m_t, k_t, 1);
  const float r_s = reciprocal_or_zero(sum_s), r_t = reciprocal_or_zero(sum_t);
  const float r_1 = reciprocal_or_zero(l_1 * beyond(m_1, LOG2E, 1));
  const float s_to_1 = r_1 * exp2_of(product(m_s, LOG2E) - product(finite_or_zero(m_1), LOG2E));  // e to q_1

  // δ = c_s·((v − z) − gap) + (c_t − c_s)·(v − m_t) − log(l_t/l_s), gap = m_t − m_s. What is the same for all columns
  // moves D in second order only. Sides that are far apart are first reduced by their maxima; differences of 16-bit
  // logits are exact as they are. A side whose columns all count as LOWEST is one of zeros.
  constexpr bool kExact = sizeof(S) == 2 && !kTransform;
  const float low_s = m_s == LOWEST ? 0 : LOWEST, low_t = m_t == LOWEST ? 0 : LOWEST;
  const float base_s = m_s == LOWEST ? 0 : finite_or_zero(m_s), base_t = m_t == LOWEST ? 0 : finite_or_zero(m_t);
  const bool far = std::fabs(base_t - base_s) > 16;
  const float near_s = far ? base_s : 0, near_t = far ? base_t : 0, gap = far ? 0 : base_t - base_s;
  const float c_rest = c_t - c_s, log_ratio = l_s == 0 || l_t == 0 ? 0 : std::log(l_t / l_s);
  const float offset = -fma(c_s, base_t - base_s, fma(c_rest, base_t, log_ratio));
  using R = std::conditional_t<F::excludes_label, double, float>;
  const auto sum_of = [](float l) { return R(!F::excludes_label && l == 0 ? 1 : l); };  // no 1/0 in rows without a term
  RowSums<R> sums{sum_of(sum_s), sum_of(sum_t), R(p.common), 0, 0};
  if constexpr (F::excludes_label) {
    sums.odds_s = log_odds<R>(not_too_low(at_label.z[0]), finite_or_zero(m_s), c_s, l_s);
    sums.odds_t = log_odds<R>(not_too_low(at_label.v[0]), finite_or_zero(m_t), c_t, l_t);
  }
  const F form(p.options + COEFFICIENTS, sums);
  const bool dead = F::softmax && l_s == 0 && !(hides && at_label.z[0] != -INFINITE<float>);

  // Coefficients of the gradient: 0 for a term that the row does not have
  const bool broken = counted && !legal;
  const float a_kd = !has_kd || broken || dead || (F::excludes_label && !hides)
                         ? 0.0f
                         : upstream * option(KD_WEIGHT) * option(KD_SCALE) * weight * c_s /
                               static_cast<float>(p.normalizers[KD_NORMALIZER]);
  const float a_ce =
      has_ce && l_1 != 0 ? upstream * option(CE_WEIGHT) / static_cast<float>(p.normalizers[CE_NORMALIZER]) : 0.0f;
  const float a_other = a_ce * smoothing / p.columns, a_label = a_ce * (1 - smoothing);
  const bool with_ce = a_ce != 0;  // else 0, whatever the columns hold
  const float z_loss = option(Z_LOSS_WEIGHT), log_sum = m_1 + std::log(l_1),
              log_growth = z_loss == 0 ? 0 : 2 * z_loss * log_sum;
  const float a_q = with_ce ? a_ce * (1 + log_growth) : 0, a_common = with_ce ? a_q * s_to_1 : 0,
              a_surplus = with_ce ? a_q * r_1 : 0;  // times e
  float W = 0, hidden = 0;                          // the gradient of a hidden target
  if constexpr (F::excludes_label) {
    W = a_kd == 0 ? 0 : form.centre;
    hidden = a_kd * W - a_other + (with_ce ? a_surplus * exp2_of(of_1(at_label.z[0])) : 0);
  }
  if (forward && first && has_ce) {
    const float hit = smoothing < 1 ? (1 - smoothing) * -from_1(at_label.z[0]) : 0;
    p.rows[p.count + i] =
        l_1 == 0 ? INFINITE<float> : std::log(l_1) + hit + (z_loss == 0 ? 0 : z_loss * log_sum * log_sum);
  }

  // Sweeps 2 and 3 over the columns, in one or apart.
  float divergence = 0, pull = 0, shifted = 0;
  const auto sweep = [&](auto measures, auto pulls, float kd, float center) {
    constexpr bool kMeasures = decltype(measures)::value, kPulls = decltype(pulls)::value;
    row.each([&](int c, auto& at) {
      constexpr int N = sizeof(at.z) / sizeof(float);
      float out[N], e_s[N];
      if (kMeasures && has_ce && smoothing != 0) {
#pragma unroll
        for (int e = 0; e < N; ++e) shifted += from_1(at.z[e]);
      }
      const bool is_common = N > 1 || c < common, here = static_cast<unsigned>(target - c) < N;
      if (F::excludes_label && hides && here) {
#pragma unroll
        for (int e = 0; e < N; ++e) {
          if (c + e == target) at.z[e] = at.v[e] = -INFINITE<float>;
        }
      }
#pragma unroll
      for (int e = 0; e < N; ++e) {
        out[e] = -a_other;
        if (!is_common) continue;
        const float z = at.z[e], v = at.v[e];
        Column<float> column;
        column.z = z, column.v = v, column.no_p = v == -INFINITE<float>, column.no_q = z == -INFINITE<float>;
        column.log2_e_q = of_s(z), column.log2_e_p = of_t(v);
        e_s[e] = exp2_of(column.log2_e_q);
        column.q = product(e_s[e], r_s), column.p = product(exp2_of(column.log2_e_p), r_t);
        const float low_v = max(v, low_t), low_z = max(z, low_s);
        column.delta =
            kExact ? fma(c_s, low_v - low_z, fma(c_rest, low_v, offset))
                   : c_s * ((low_v - near_t) - (low_z - near_s) - gap) + (c_rest * (low_v - base_t) - log_ratio);
        const float w = form.grad_term(column);
        if constexpr (kMeasures) divergence += form.value(column);
        if constexpr (kMeasures && F::needs_weight_sum && F::centred) pull += w;
        if constexpr (kPulls) out[e] += kd == 0 ? 0 : kd * (F::centred ? w - column.q * center : w);
      }
      if constexpr (!kPulls) return;
      if (with_ce) {
        if (is_common) {
          at_one(e_s, at.z, of_s_at_1, power, [&](int e, float one) { out[e] += a_common * one; });
        } else {
          out[0] += a_surplus * exp2_of(of_1(at.z[0]));
        }
      }
      if (here) {
#pragma unroll
        for (int e = 0; e < N; ++e) {
          if (c + e == target) out[e] = (hides ? hidden : out[e]) - a_label;
        }
      }
      if constexpr (kTransform) {
#pragma unroll
        for (int e = 0; e < N; ++e) out[e] *= at.slope[e];
      }
      if (gradient) write(gradient + c, out);
    });
  };
  const auto total = [&] {
    float values[kSums] = {divergence, pull, shifted};
    const auto merge = [](float (&of)[kSums]) {
#pragma unroll
      for (int k = 0; k < kSums; ++k) of[k] = sum_over_lanes(of[k]);
    };
    over_cluster(values, {0, 0, 0}, merge, shared.scratch, totals, met);
    divergence = values[0], pull = values[1], shifted = values[2];
    if constexpr (F::excludes_label) divergence = hides ? divergence + form.label_value : NAN;
    if (dead) divergence = INFINITE<float>;
  };

  using Yes = std::true_type;
  using No = std::false_type;
  if (forward && F::needs_weight_sum) {
    sweep(Yes{}, No{}, 0, 0);
    total();
    W = std::isfinite(divergence) ? pull : divergence;  // NaN too: the gradient shows what the value does
  } else if (F::needs_weight_sum) {
    W = stats[WEIGHT_SUM];
  }
  if (!forward || F::needs_weight_sum) {
    const bool infinite = W == INFINITE<float>;
    if (gradient) sweep(No{}, Yes{}, infinite ? 0 : a_kd, infinite ? 0 : W);
  } else {
    sweep(Yes{}, Yes{}, a_kd, W);
    total();
  }
  if (!forward || !first) return;
  stats[WEIGHT_SUM] = W, stats[OWN] = 0;
  if (has_kd) p.rows[i] = option(KD_SCALE) * p.weights[i] * (divergence < 0 ? 0 : divergence);
  if (has_ce && smoothing != 0) p.rows[p.count + i] -= smoothing * (shifted / p.columns);
#else
  __trap();  // a build without sm_90a: nobody may take what was not computed for a gradient
#endif
}

}  // namespace fusedkd
#endif
