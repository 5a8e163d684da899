// One pass over a block of columns of a row pair: Σ value, Σ w and the gradient (kd_rows.h says of what). Compiled once
// per instruction set (isa.h).
#ifndef FUSEDKD_KD_PASS
#define FUSEDKD_KD_PASS

#include "../common/divergences.h"
#include "call.h"
#include "cross_entropy.h"
#include "vec.h"

namespace FUSEDKD_NAMESPACE {

// A softmax of a row: the maximum and Σ exp((x − m)/T) − 1.
template <class R> struct MaxAndSum {
  R m, less_one;
};

// What the later passes need to know of a row. P is A, and the lanes of a vector are columns of the row; or P is a
// vector too, and they are rows of one column (kd_lanes.h).
template <class A, class P = A> struct Terms {
  static constexpr bool lanes = !std::is_same_v<P, A>;
  P m_s, inv_l_s, m_t, inv_l_t;  // KD softmaxes
  A c_s, c_t;                    // log2(e)/T
  struct {
    const A *e_s, *e_t;           // exponentials from the first pass
    P inv_l_s, inv_l_t, inv_l_1;  // 1/l to their scale; the last for the power of e_s
  } kept;
  P shift, shift_rest, log_ratio;  // of δ: m_t − m_s in two parts, log l_t/l_s,
  A rate, rate_excess;             // 1/T_s, 1/T_t − 1/T_s
  P a, centre;                     // coefficient of the gradient, W
  CrossEntropyTerms<A, P> ce;
  const char *next_z, *next_v;  // the same columns of the next row, fetched meanwhile
  int64_t z_bytes, v_bytes;

  // R: P, or float64 for it.
  template <class R> void set_softmaxes(const LogitsCall& k, MaxAndSum<R> s, MaxAndSum<R> t) {
    using S = Scalar<R>;
    const double T_s = k.temperature, T_t = k.teacher_temperature;
    const R l_s = s.less_one + S(1), l_t = t.less_one + S(1), zero{};
    const R m_s_ = l_s == S(0) ? zero : s.m, m_t_ = l_t == S(0) ? zero : t.m;
    const R whole = m_t_ - m_s_, b = whole - m_t_, lost = (m_t_ - (whole - b)) - (m_s_ + b);
    const R excess = (t.less_one - s.less_one) / l_s, ratio = l_t / l_s;
    m_s = P(m_s_), inv_l_s = P(l_s == S(0) ? zero : S(1) / l_s), c_s = A(LOG2E / T_s);
    m_t = P(m_t_), inv_l_t = P(l_t == S(0) ? zero : S(1) / l_t), c_t = A(LOG2E / T_t);
    shift = P(whole), shift_rest = P(whole - R(shift) + lost), rate = A(1 / T_s);
    rate_excess = A((1 - T_t / T_s) / LOG2E);
    log_ratio = P(log1p(absolute(excess) < S(0.5) ? excess : ratio - S(1), ratio));
  }
};
enum class Out { none, grad_term, gradient };  // what a pass writes: nothing, w, the gradient

// In place of a divergence: none, for columns without a KD term; its w, which a pass is given instead of v.
struct NoDivergence : Defaults {};
template <bool centred_> struct GivenTerms : Defaults {
  static constexpr bool centred = centred_;
};
template <class Divergence> constexpr bool is_given = false;
template <bool centred> constexpr bool is_given<GivenTerms<centred>> = true;

// Logits may be as low as the type goes, as masks often are: what δ is made of stays finite. A NaN stays one.
template <class A> INLINE Vec<A> bounded(Vec<A> x) {
  constexpr A most = A(1e30);
  return min(splat(most), max(splat(-most), x));
}

// The columns at `at`, of the exponentials that the first pass left if `kept`.
template <bool kept, class A, class P>
INLINE Column<Vec<A>> columns(const Terms<A, P>& r, const A* z, const A* v, int64_t at) {
  const Vec<A> x = load(z + at), y = load(v + at), log2_e_q = (x - r.m_s) * r.c_s, log2_e_p = (y - r.m_t) * r.c_t;
  const Vec<A> e_s = kept ? load(r.kept.e_s + at) : exp2<A>(log2_e_q);
  const Vec<A> e_t = kept ? load(r.kept.e_t + at) : exp2<A>(log2_e_p);
  const P inv_l_s = kept ? r.kept.inv_l_s : r.inv_l_s, inv_l_t = kept ? r.kept.inv_l_t : r.inv_l_t;
  const Vec<A> d = y - x, b = d - y, lost = (y - (d - b)) - (x + b);  // d + lost = y − x exactly (Knuth)
  Vec<A> delta = fma((d - r.shift) + (lost - r.shift_rest), splat(r.rate), splat(-r.log_ratio));
  if (r.rate_excess != 0) delta = fma(max(splat(A(-1e30)), log2_e_p), splat(r.rate_excess), delta);
  return {x,        y,        e_t * inv_l_t,     e_s * inv_l_s,    bounded<A>(delta),
          log2_e_p, log2_e_q, y == -INFINITE<A>, x == -INFINITE<A>};
}

template <class R> struct SumsOf {
  R value{}, weight{};  // Σ value, Σ w
  void operator+=(SumsOf other) { value += other.value, weight += other.weight; }
};
using Sums = SumsOf<double>;

// Σ value and Σ w of n columns, n a multiple of STEP, or of n/WIDTH columns of WIDTH rows; `to` gets what Out says, and may be z. The value is wanted if the
// exponentials are kept. Logarithms are taken in a loop of their own, GROUP columns ahead: with them, the dependent
// operations of one column would be too many for a processor to have several columns under way.
template <class Divergence, class A, bool kept, Out out, E1 e_1 = E1::none, class P = A>
[[gnu::noinline]] auto pass(const Divergence& given_divergence, const Terms<A, P>& given_terms, const A* z, const A* v,
                            int64_t n, A* to) {
  const Divergence divergence = given_divergence;  // copies, which nothing that is written can change
  Terms<A, P> r = given_terms;
  constexpr bool lanes = Terms<A, P>::lanes;
  constexpr int64_t step = lanes ? WIDTH<A> : STEP;
  const P inv_l_s = kept ? r.kept.inv_l_s : r.inv_l_s;
  if (kept && e_1 == E1::power) r.ce.inv_l = r.kept.inv_l_1;
  constexpr bool any = !std::is_same_v<Divergence, NoDivergence>, given = is_given<Divergence>;
  constexpr bool value = kept && any && !given, ahead = Divergence::has_logs;
  constexpr int64_t GROUP = ahead ? 256 : BLOCK;
  typename Divergence::template Logs<Vec<A>> logs[ahead ? GROUP / WIDTH<A> : 1];
  Vec<A> values[PER_STEP<A>] = {}, weights[PER_STEP<A>] = {};
  for (int64_t j = 0; j < n; j += step) {
    if constexpr (any && !given && !lanes) {
      __builtin_prefetch(r.next_z + j * r.z_bytes, 0, 2);
      __builtin_prefetch(r.next_v + j * r.v_bytes, 0, 2);
    }
    if constexpr (ahead)
      if (j % GROUP == 0)
        for (int64_t i = 0; i < std::min(GROUP, n - j); i += WIDTH<A>)
          logs[i / WIDTH<A>] = divergence.logs(columns<kept>(r, z, v, j + i));
    for (int u = 0; u < step / WIDTH<A>; u++) {
      const int64_t at = j + u * WIDTH<A>;
      const Vec<A> x = load(z + at);
      Vec<A> e = kept ? load(r.kept.e_s + at) : exp2<A>((x - r.m_s) * r.c_s), w = {}, slope = {};
      if constexpr (any && !given) {
        const Column<Vec<A>> column = columns<kept>(r, z, v, at);
        if constexpr (ahead) {
          const auto& its = logs[at % GROUP / WIDTH<A>];
          if constexpr (value) values[u] += divergence.value(column, its);
          if constexpr (out != Out::none) w = divergence.grad_term(column, its);
        } else {
          if constexpr (value) values[u] += divergence.value(column);
          if constexpr (out != Out::none) w = divergence.grad_term(column);
        }
        if constexpr (value && out == Out::grad_term) weights[u] += w;
      }
      if constexpr (given) w = load(v + at);
      if constexpr (out == Out::grad_term) store(to + at, w);
      if constexpr (out == Out::gradient) {
        if constexpr (any) {
          if constexpr (Divergence::centred) w -= e * inv_l_s * r.centre;
          slope = w * r.a;
          if constexpr (lanes) slope = r.a == A(0) ? Vec<A>{} : slope;  // rows without a KD term
        }
        store(to + at, r.ce.template add_to<e_1>(slope, x, e));
      }
    }
  }
  if constexpr (lanes) return SumsOf<P>{values[0], weights[0]};
  else return value ? Sums{total<A>(values), out == Out::grad_term ? total<A>(weights) : 0} : Sums{};
}

}  // namespace FUSEDKD_NAMESPACE
#endif
