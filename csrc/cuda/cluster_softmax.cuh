// Softmax statistics of rows, and sums, over the threads of a cluster.
#ifndef FUSEDKD_CLUSTER_SOFTMAX
#define FUSEDKD_CLUSTER_SOFTMAX

#include "cluster.cuh"
#include "scalar.cuh"

namespace fusedkd {

#ifndef FUSEDKD_CLUSTER_THREADS  // the tests on the CPU take fewer
#define FUSEDKD_CLUSTER_THREADS 192
#endif
constexpr int kThreads = FUSEDKD_CLUSTER_THREADS, kWarps = kThreads / 32;  // of a block
constexpr int kMaxRanks = 16;  // blocks of a cluster; not every GPU has more than 8

// Masks may be as low as float32 goes, which times k or 1/T would be −∞: maxima and δ take what is lower for this.
constexpr float LOWEST = -1e37f;
INLINE float not_too_low(float x) { return x < LOWEST && x != -INFINITE<float> ? LOWEST : x; }

// Sums of exponentials are taken relative to 2^M, M = m·k rounded, k = log2(e)/T: 2^(x·k − M) is one FMA and one
// exponential, and exact where x − m is. In a row whose maximum is LOWEST all columns but −∞
// count as equal: k is next to nothing.
struct Exponent {
  float k, M;

  INLINE Exponent(float k, float m) : k(m == LOWEST ? 1e-44f : k), M(product(finite_or_zero(m), this->k)) {}
  INLINE float operator()(float x) const { return fma(x, k, -M); }
};

// add(i, e^x) for W columns, given e = 2^(x·k) and `power`, which is T where T is 1, 2 or 4. The branches are uniform,
// and each does all that there is to do, lest it be computed and thrown away.
template <int W, typename Add>
INLINE void at_one(const float (&e)[W], const float (&x)[W], Exponent exponent, int power, const Add& add) {
  if (power == 1) {
#pragma unroll
    for (int i = 0; i < W; ++i) add(i, e[i]);
  } else if (power == 2) {
#pragma unroll
    for (int i = 0; i < W; ++i) add(i, e[i] * e[i]);
  } else if (power == 4) {
#pragma unroll
    for (int i = 0; i < W; ++i) add(i, (e[i] * e[i]) * (e[i] * e[i]));
  } else {
#pragma unroll
    for (int i = 0; i < W; ++i) add(i, exp2_of(exponent(x[i])));
  }
}

// The maximum m of the columns seen so far; rest = Σ 2^(x·k − M) over all of them but one at the maximum, and rest_1,
// the same at T = 1, which is not kept at power 1. In a sure row, whose maximum is far above the others, a float32 sum
// would have a 1 and no digits left for the others, which are all its loss.
struct ThreadSoftmax {
  float m = -INFINITE<float>, M = m, rest = 0, rest_1 = 0;

  template <int W>
  INLINE void add(const float (&x)[W], float k, int power, bool with_one) {
    float top = x[0];
#pragma unroll
    for (int i = 1; i < W; ++i) top = max(top, x[i]);
    int at_top = W;
    if (top > m) {
#pragma unroll
      for (int i = W - 1; i >= 0; --i) at_top = x[i] == top ? i : at_top;
      top = max(top, LOWEST);
      const float risen = product(top, k);  // and what was the maximum joins the rest
      rest = fma(rest, exp2_of(M - risen), exp2_of(Exponent(k, top)(m)));
      rest_1 = fma(rest_1, exp2_of(product(m, LOG2E) - product(top, LOG2E)), exp2_of(Exponent(LOG2E, top)(m)));
      m = top, M = risen;
    }
    const Exponent exponent(k, m);
    float e[W];
#pragma unroll
    for (int i = 0; i < W; ++i) e[i] = exp2_of(exponent(x[i])), rest += i == at_top ? 0 : e[i];
    if (with_one && power != 1) {
      at_one(e, x, Exponent(LOG2E, m), power, [&](int i, float one) { rest_1 += i == at_top ? 0 : one; });
    }
  }
};

// 2^(±(m·k − M)): from sums relative to e^(m/T), as they are stored, to sums relative to 2^M, or back.
INLINE float beyond(float m, float k, float sign) {
  const Exponent exponent(k, m);
  return exp2_of(sign * exponent(finite_or_zero(m)));
}

// Over the lanes of a warp, the same bits in all of them.
template <typename Combine>
INLINE float over_lanes(float x, const Combine& combine) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x = combine(x, __shfl_xor_sync(~0u, x, lane));
  return x;
}
INLINE float sum_over_lanes(float x) {
  return over_lanes(x, [](float a, float b) { return a + b; });
}
// The rest of the columns of all lanes, from those of each, relative to maxima of their own; and m becomes the maximum
// of all: its column is left out in one lane, and the maxima of the other lanes join the rest.
INLINE float merge_over_lanes(float& m, float rest, float k) {
  const float own = m;
  m = over_lanes(m, [](float a, float b) { return max(a, b); });
  const bool leaves_out = __ffs(__ballot_sync(~0u, own == m)) - 1 == static_cast<int>(threadIdx.x % 32);
  const float joins = leaves_out ? 0 : exp2_of(Exponent(k, m)(own));
  return sum_over_lanes(fma(rest, exp2_of(product(own, k) - product(finite_or_zero(m), k)), joins));
}
// The rest of two sets of columns, the first of which has the maximum.
INLINE float join(float m, float rest, float m_b, float rest_b, float k) {
  return rest + fma(rest_b, exp2_of(product(m_b, k) - product(finite_or_zero(m), k)), exp2_of(Exponent(k, m)(m_b)));
}

// What a thread knows of all threads of the cluster after merge(), called on each K values by whole warps, first over
// the lanes, then over the warps, then over the blocks. `inbox`: [ranks][K]. Nobody reads what was there before.
template <int K, typename Merge>
INLINE void over_cluster(float (&values)[K], const float (&none)[K], const Merge& merge, float* scratch, float* inbox,
                         bool& met) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = static_cast<int>(cluster_rank()), ranks = static_cast<int>(cluster_size());
  merge(values);
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) scratch[warp * K + k] = values[k];
  }
  if (!met) cluster_wait(), met = true;  // all blocks run, so that their memory can be written to
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] = lane < kWarps ? scratch[lane * K + k] : none[k];
    merge(values);
    if (lane < ranks) {
#pragma unroll
      for (int k = 0; k < K; ++k) send(&inbox[rank * K + k], lane, values[k]);
    }
  }
  cluster_arrive();
  cluster_wait();
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = lane < ranks ? inbox[lane * K + k] : none[k];
  merge(values);
}

}  // namespace fusedkd
#endif
