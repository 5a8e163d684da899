// The divergences between a student's row and a teacher known at n of its columns, the list: value and gradient, in
// float64, for a tail 1 − Σp keeps no other digits. Compiled once per instruction set (isa.h).
//
//   q = exp((z − m)/T)/l student, on the list p teacher, or its weights ω;  δ = log p − log q;  q' = q over its sum
//   there; r_s the student's tail: Σq off the list; r_t the teacher's, |1 − Σp| or what rounding leaves open of it;
//   with it p is over Σp + r_t (fusedkd/reference/sparse.py)
//   excess(p, q, δ) = p·δ + q − p >= 0, so that nothing cancels (common/divergences.h)
//
//                        D                                                ∂D/∂s on the list         off it, over q
//   Renormalize          Σ excess(p, q, δ) + r_s                          q − p                     1
//   RenormalizeReverse   Σ excess(q', p, −δ)                              q'·(−δ − D)               0
//   Bucket               Σ excess(p, q, δ) + excess(r_t, r_s, ·)          q − p                     1 − r_t/r_s
//   BucketReverse        Σ excess(q, p, −δ) + excess(r_s, r_t, ·)         q·(−δ − D)                log(r_s/r_t) − D
//   Ignore               Σ p·δ                                            (Σp)·q − p                Σp
//   IgnoreReverse        Σ −q·δ, with W = Σ q·(1 − δ)                     q·(1 − δ − W)             −W
//   Samples              Σ −ω·log q                                       (Σω)·q − ω                Σω
#ifndef FUSEDKD_TOPK_DIVERGENCES
#define FUSEDKD_TOPK_DIVERGENCES

#include "../common/divergences.h"
#include "../common/layout.h"
#include "vec.h"

namespace FUSEDKD_NAMESPACE {

// The distance from 1 to the next number of this type.
inline double epsilon(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return 0x1p-52;
    case ScalarType::Float: return 0x1p-23;
    case ScalarType::BFloat16: return 0x1p-7;
    default: return 0x1p-10;
  }
}

// The teacher's tail before it is divided by the sum: |1 − Σp|, at least what rounding leaves open of it. 0 up to
// MOST_LOST if it is not `possible`, for the student has nothing off the list (fusedkd/reference/sparse.py). `type`: of the
// log-probabilities y; p = exp(y), `mass` its sum, `spread` that of p·|y|, of both filled up to vectors with p = 0.
constexpr double MOST_LOST = 1. / 16;

inline double spread(const double* p, const double* y, int64_t n) {
  D sum = {};
  for (int64_t j = 0; j < n; j += WIDTH<double>) {
    const D p_j = load(p + j), of = p_j * absolute(load(y + j));
    sum += p_j == 0 ? D{} : of;
  }
  return added(sum);
}
inline double teachers_tail(ScalarType type, double spread, double mass, bool possible) {
  const double left = 1 - mass;
  const double error = (type == ScalarType::Double ? 0x1p-46 : 0x1p-23) + epsilon(type) / 2 * spread;
  return possible ? std::max(std::abs(left), error) : left <= MOST_LOST ? 0 : left;
}

// excess of the residual classes; 0·log 0 = 0.
inline double tail(double p, double m, double delta) {
  if (p == 0 && !(delta > -INFINITE<double>)) return m;
  return delta == INFINITE<double> ? delta : excess(p, m, delta);
}

// A vector of columns of the list.
struct TopkColumns {
  D p, q, delta;
  decltype(D{} < D{}) no_p, no_q;  // the teacher has none there; z = −∞
};

// What there is beside the list. q_c = q/exp((z − m_c)/T), l_c = Σ exp((z − m_c)/T) off the list.
struct TopkTails {
  double mass;  // Σp on the list
  double r_s, r_t, log_r_s, log_r_t, q_c, l_c;
};

// D; W, so that the gradient on the list is w − q·W; and the gradient off it, over exp((z − m_c)/T).
struct TopkSums {
  double value, W, rest = 0;
};

// What the classes have; each has value and w of columns too, and complete(), which makes all of the row of their sums,
// to whose value beside() has been added.
struct TopkDefaults {
  static constexpr bool renormalized = false;           // p is over its sum, at any temperature
  static constexpr bool bucket = false;                 // there is one more class, the tails
  static constexpr bool sampled = false;                // p are weights, of which equal ids add up
  static constexpr bool off_list = true;                // there is a gradient off the list
  static constexpr bool reverse = false;                // the gradient is 0 where D = ∞
  static double beside(const TopkTails&) { return 0; }  // what the columns off the list add to D
};

struct ForwardOnList : TopkDefaults {
  static INLINE D value(const TopkColumns& c) {
    return c.no_p ? c.q : (c.no_q ? splat(INFINITE<double>) : excess(c.p, c.q, c.delta));
  }
  static INLINE D grad_term(const TopkColumns& c, D, double) { return c.q - c.p; }
};
struct ReverseOnList : TopkDefaults {
  static constexpr bool reverse = true;
  static INLINE D value(const TopkColumns& c) {
    return c.no_q ? c.p : (c.no_p ? splat(INFINITE<double>) : excess(c.q, c.p, -c.delta));
  }
  static INLINE D grad_term(const TopkColumns& c, D, double) { return c.no_q ? D{} : -(c.q * c.delta); }
};

struct Renormalize : ForwardOnList {
  static constexpr bool renormalized = true;
  static double beside(const TopkTails& t) { return t.r_s; }
  static TopkSums complete(TopkSums s, const TopkTails& t) { return {s.value, 0, t.q_c}; }
};
struct RenormalizeReverse : ReverseOnList {
  static constexpr bool renormalized = true, off_list = false;
  static TopkSums complete(TopkSums s, const TopkTails&) { return {s.value, s.value, 0}; }
};
struct Bucket : ForwardOnList {
  static constexpr bool bucket = true;
  static double beside(const TopkTails& t) { return tail(t.r_t, t.r_s, t.log_r_t - t.log_r_s); }
  static TopkSums complete(TopkSums s, const TopkTails& t) {
    return {s.value, 0, t.q_c - (t.l_c == 0 ? 0 : t.r_t / t.l_c)};
  }
};
struct BucketReverse : ReverseOnList {
  static constexpr bool bucket = true;
  static double beside(const TopkTails& t) { return tail(t.r_s, t.r_t, t.log_r_s - t.log_r_t); }
  static TopkSums complete(TopkSums s, const TopkTails& t) {
    return {s.value, s.value, t.l_c == 0 ? 0 : (t.log_r_s - t.log_r_t - s.value) * t.q_c};
  }
};
struct Ignore : TopkDefaults {
  static INLINE D value(const TopkColumns& c) {
    return c.no_p ? D{} : (c.no_q ? splat(INFINITE<double>) : c.p * c.delta);
  }
  static INLINE D grad_term(const TopkColumns& c, D, double mass) { return mass * c.q - c.p; }
  static TopkSums complete(TopkSums s, const TopkTails& t) { return {s.value, 0, t.mass * t.q_c}; }
};
struct IgnoreReverse : TopkDefaults {
  static constexpr bool reverse = true;
  static INLINE D value(const TopkColumns& c) {
    return c.no_q ? D{} : (c.no_p ? splat(INFINITE<double>) : -(c.q * c.delta));
  }
  static INLINE D grad_term(const TopkColumns& c, D value, double) { return c.q + value; }
  static TopkSums complete(TopkSums s, const TopkTails& t) { return {s.value, s.W, -s.W * t.q_c}; }
};
struct Samples : Ignore {
  static constexpr bool sampled = true;
};

// use.operator()<F>() for the class F of a kernel.
template <class Use> auto with_topk_divergence(TopkKernelId kernel_id, const Use& use) {
#define FUSEDKD_CASE(id, Class) \
  case TopkKernelId::id: return use.template operator()<Class>();
  switch (kernel_id) { FUSEDKD_TOPK_KERNELS(FUSEDKD_CASE) }
#undef FUSEDKD_CASE
  STD_TORCH_CHECK(false, "fusedkd: unknown kernel ", int64_t(kernel_id));
  return use.template operator()<Renormalize>();
}

}  // namespace FUSEDKD_NAMESPACE
#endif
