// kd_loss on Hopper: every row pair is read once, into the shared memory of a thread-block cluster, and worked on
// there. The formulas are those of divergences.h; m, l, W of a row as in kd_rows.h.
//
//   copies    a cluster of 1 … 16 blocks shares a row; each gets its columns by bulk copies, in stages
//   pass 1    m and l − 1, l = Σ exp((x − m)/T), of both sides, and of the student at T = 1, as the stages arrive;
//             merged over threads, warps and, through distributed shared memory, blocks (cluster_statistics.cuh)
//   pass 2    D and W, where the gradient needs W or needs to know whether D is finite
//   pass 3    the gradient, and D where there was no pass 2
//
// Moves 6 bytes per 16-bit logit: z and v in, the gradient out; 4 without a gradient. From given statistics pass 3
// alone runs, and blocks need not meet. Exponentials per column: two a pass; at T = 1, 2, 4 that of CE is a power of
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
#include "cluster_statistics.cuh"
#include "cross_entropy.cuh"

namespace fusedkd {

constexpr int kResident = 3;  // blocks of an SM, if their columns fit: one's copies hide behind the others' work
constexpr int kSums = 3;      // floats that blocks tell each other: D, W, Σ (z − m)

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
  float* stats;                         // [N, STATS], the sums less 1; written forward, read afterwards
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
  const bool has_target = p.labels && label >= 0 && label < p.common;  // for forms that exclude it
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

  const auto option = [&](Option k) { return static_cast<float>(p.options[k]); };
  const Temperatures t(has_kd ? 1 / option(TEMPERATURE) : 1, 1 / option(TEACHER_TEMPERATURE));
  row.cap_z = option(SOFTCAP), row.scale_z = option(SCALE);
  row.cap_v = option(TEACHER_SOFTCAP), row.scale_v = option(TEACHER_SCALE);
  constexpr bool kExcludes = F::excludes_label;
  Label target{-1, kExcludes && has_kd && has_target, {{-INFINITE<float>}, {-INFINITE<float>}, {1}}};
  if (has_ce || target.excluded) {
    target.column = static_cast<int>(label);
    target.at.z[0] = static_cast<float>(row.z.row[label]);
    if (label < row.v.columns) target.at.v[0] = static_cast<float>(row.v.row[label]);
    row.transform(target.at);
  }
  const float z_y = target.at.z[0], v_y = target.at.v[0];

  // Pass 1: the statistics
  Statistics of_row;
  if (forward) {
    float state[kState];
    statistics_of_thread<kExcludes>(row, t, target, common, has_kd, has_ce, state);
    of_row = merged(state, t, shared.scratch, states, met);
    if (first) of_row.store(stats);
  } else {
    of_row.load(stats);
  }
  const float m_s = of_row.m_s, l_s = of_row.l_s(), m_t = of_row.m_t, l_t = of_row.l_t();
  const float m_1 = of_row.m_1, l_1 = of_row.l_1();
  const Columns<sizeof(S) == 2 && !kTransform> columns(of_row, t);
  const Exponent of_1(LOG2E, m_1), of_s_at_1(LOG2E, m_s);
  const float r_1 = reciprocal_or_zero(l_1 * beyond(m_1, LOG2E, 1));
  const float s_to_1 = r_1 * exp2_of(product(m_s, LOG2E) - product(finite_or_zero(m_1), LOG2E));  // e to q_1

  using R = std::conditional_t<kExcludes, double, float>;
  const auto sum_of = [](float l) { return R(!kExcludes && l == 0 ? 1 : l); };  // no 1/0 in rows without a term
  RowSums<R> sums{sum_of(columns.sum_s), sum_of(columns.sum_t), R(p.common), 0, 0};
  if constexpr (kExcludes) {
    sums.odds_s = log_odds<R>(not_too_low(z_y), finite_or_zero(m_s), t.c_s, l_s);
    sums.odds_t = log_odds<R>(not_too_low(v_y), finite_or_zero(m_t), t.c_t, l_t);
  }
  const F form(p.options + COEFFICIENTS, sums);
  const bool dead = F::softmax && l_s == 0 && !(target.excluded && z_y != -INFINITE<float>);
  const CrossEntropy cross_entropy{m_1, of_row.rest_1, option(LABEL_SMOOTHING), option(Z_LOSS_WEIGHT)};

  // Coefficients of the gradient: 0 for a term that the row does not have
  const bool broken = counted && !legal;
  const float n_kd = static_cast<float>(p.normalizers[KD_NORMALIZER]);
  const float n_ce = static_cast<float>(p.normalizers[CE_NORMALIZER]);
  const float a_kd = !has_kd || broken || dead || (kExcludes && !target.excluded)
                         ? 0.0f
                         : upstream * option(KD_WEIGHT) * option(KD_SCALE) * weight * t.c_s / n_kd;
  const float a_ce = has_ce && l_1 != 0 ? upstream * option(CE_WEIGHT) / n_ce : 0.0f;
  const bool with_ce = a_ce != 0;  // else 0, whatever the columns hold
  const float a_other = a_ce * cross_entropy.smoothing / p.columns;
  const float ce_at_label = with_ce ? a_ce * cross_entropy.at_label(z_y, p.columns) : 0;
  const float a_q = with_ce ? a_ce * cross_entropy.q_factor() : 0;
  const float a_common = with_ce ? a_q * s_to_1 : 0, a_surplus = with_ce ? a_q * r_1 : 0;  // times e
  float W = 0;
  if constexpr (kExcludes) W = a_kd == 0 ? 0 : form.centre;
  if (forward && first && has_ce) p.rows[p.count + i] = cross_entropy.value(z_y);

  // Passes 2 and 3 over the columns, in one or apart.
  const bool smooth = has_ce && cross_entropy.smoothing != 0;
  float divergence = 0, weights = 0, shifted = 0;
  const auto pass = [&](auto with_value, auto with_gradient, float kd, float center) {
    constexpr bool kValue = decltype(with_value)::value, kGradient = decltype(with_gradient)::value;
    row.each([&](int c, auto& at) {
      constexpr int N = sizeof(at.z) / sizeof(float);
      float out[N], e_s[N];
      if (kValue && smooth) {
#pragma unroll
        for (int e = 0; e < N; ++e) shifted += cross_entropy.from_m(at.z[e]);
      }
      const bool is_common = N > 1 || c < common, here = target.within<N>(c);
      if (kExcludes && target.excluded && here) target.hide(c, at);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        out[e] = 0;
        if (!is_common) continue;
        const Column<float> column = columns(at.z[e], at.v[e], e_s[e]);
        const float w = form.grad_term(column);
        if constexpr (kValue) divergence += form.value(column);
        if constexpr (kValue && F::needs_weight_sum && F::centred) weights += w;
        if constexpr (kGradient) out[e] += kd == 0 ? 0 : kd * (F::centred ? w - column.q * center : w);
      }
      if constexpr (!kGradient) return;
      float at_label = ce_at_label + (target.excluded ? a_kd * W : 0);
      if (here && !target.excluded) {
#pragma unroll
        for (int e = 0; e < N; ++e) at_label += c + e == target.column ? out[e] : 0;
      }
      if (with_ce) {
        if (is_common) {
          at_one(e_s, at.z, of_s_at_1, t.power, [&](int e, float one) { out[e] += a_common * one - a_other; });
        } else {
          out[0] += a_surplus * exp2_of(of_1(at.z[0])) - a_other;
        }
      }
      if (here) {
#pragma unroll
        for (int e = 0; e < N; ++e) out[e] = c + e == target.column ? at_label : out[e];
      }
      if constexpr (kTransform) {
#pragma unroll
        for (int e = 0; e < N; ++e) out[e] *= at.slope[e];
      }
      if (gradient) write(gradient + c, out);
    });
  };
  const auto total = [&] {
    float values[kSums] = {divergence, weights, shifted};
    const auto merge = [](float (&of)[kSums]) {
#pragma unroll
      for (int k = 0; k < kSums; ++k) of[k] = sum_over_lanes(of[k]);
    };
    over_cluster(values, {0, 0, 0}, merge, shared.scratch, totals, met);
    divergence = values[0], weights = values[1], shifted = values[2];
    if constexpr (kExcludes) divergence = target.excluded ? divergence + form.label_value : NAN;
    if (dead) divergence = INFINITE<float>;
  };

  using Yes = std::true_type;
  using No = std::false_type;
  if (forward && F::needs_weight_sum) {
    pass(Yes{}, No{}, 0, 0);
    total();
    W = std::isfinite(divergence) ? weights : divergence;  // NaN too: the gradient shows what the value does
  } else if (F::needs_weight_sum) {
    W = stats[WEIGHT_SUM];
  }
  if (!forward || F::needs_weight_sum) {
    const bool infinite = W == INFINITE<float>;
    if (gradient) pass(No{}, Yes{}, infinite ? 0 : a_kd, infinite ? 0 : W);
  } else {
    pass(Yes{}, Yes{}, a_kd, W);
    total();
  }
  if (!forward || !first) return;
  stats[WEIGHT_SUM] = W, stats[OWN] = 0;
  if (has_kd) p.rows[i] = option(KD_SCALE) * p.weights[i] * (divergence < 0 ? 0 : divergence);
  if (smooth) p.rows[p.count + i] += cross_entropy.of_mean(shifted / p.columns);
#else
  __trap();  // a build without sm_90a: nobody may take what was not computed for a gradient
#endif
}

}  // namespace fusedkd
#endif
