// The cross-entropy of a row of logits z, with label smoothing ε and a z-loss of weight ζ: its value, and its gradient
// at vectors of columns and at single ones. R, P: a row's numbers, or vectors of one lane per row. Compiled once per instruction set (isa.h).
//
//   CE = log l + (1 − ε)·(m − z_y) + ε·mean(m − z) + ζ·(m + log l)²       m = max z, l = Σ exp(z − m), y the label
//   ∂CE/∂z = (1 + 2ζ·(m + log l))·q − (1 − ε)·1_y − ε/V,  q = exp(z − m)/l                            on V columns
#ifndef FUSEDKD_CROSS_ENTROPY
#define FUSEDKD_CROSS_ENTROPY

#include "call.h"
#include "vec.h"

namespace FUSEDKD_NAMESPACE {

// What is the same for all columns of a row.
template <class R> struct CrossEntropy {
  using S = Scalar<R>;
  R m, less_one, l;  // less_one: l − 1, which has the digits that l lacks near 1
  S smoothing, columns, z_loss_weight;
  R growth{};  // 2ζ·(m + log l)

  CrossEntropy(const LogitsCall& k, R m, R less_one)
      : m(m), less_one(less_one), l(less_one + S(1)), smoothing(k.smoothing), columns(k.vocabulary),
        z_loss_weight(k.z_loss_weight) {
    if (z_loss_weight != 0) growth = l == S(0) ? R{} : 2 * z_loss_weight * (m + log_sum(less_one, l));
  }

  // `below`: the mean of m − z over all columns, used if there is smoothing.
  R value(R z_y, R below) const {
    const R log_l = log_sum(less_one, l);
    R nll = log_l;
    if (smoothing < 1) nll += (1 - smoothing) * (m - z_y);
    if (smoothing != 0) nll += smoothing * below;
    if (z_loss_weight != 0) nll += z_loss_weight * (m + log_l) * (m + log_l);
    return l == S(0) ? R{} + INFINITE<S> : nll;
  }
  // What q's exponential is multiplied by, `scale` being that of the exponential.
  R q_scale(S scale = 1) const { return scale * (1 + growth) / l; }
  S target() const { return smoothing / columns; }

  // ∂CE/∂z at one column. Of q − 1 little is left where the label is sure, so that it is not taken as a difference.
  R gradient(R z, bool is_label) const {
    const R q = (z == m ? R{} + S(1) : exp_of(z - m)) / l, grown = z_loss_weight == 0 ? R{} : growth * q;
    if (!is_label) return q + grown - target();
    return (z == m ? -less_one / l : q - S(1)) + smoothing + grown - target();
  }
};

// Σ(m − z) of n columns, from their sum.
inline double gap(double m, double sum, int64_t n) {
  return sum == -INFINITE<double> ? INFINITE<double> : double(n) * m - sum;
}

// How a pass over columns finds exp(z − m): not at all, as a power of the exponential at the KD term's temperature, or
// by an exponential of its own.
enum class E1 { none, power, own };

// How often exp(x/T) is to be squared to make exp(x): −1 if it cannot be made so.
inline int squarings_at(double T) { return T == 1 ? 0 : T == 2 ? 1 : T == 4 ? 2 : -1; }

// The same for the vectors of a pass: what it adds is b·(e·inv_l − target).
template <class A, class P = A> struct CrossEntropyTerms {
  P m, inv_l;
  A target;
  P b;
  int squarings;  // that make e of the KD term's exponential, at most 2

  // z: logits; e: the KD term's exponential, if e_1 is a power of it; slope: the gradient of the KD term.
  template <E1 e_1> INLINE Vec<A> add_to(Vec<A> slope, Vec<A> z, Vec<A> e) const {
    if constexpr (e_1 == E1::own) e = exp2<A>((z - m) * A(LOG2E));
    if constexpr (e_1 == E1::power) {
      if (squarings > 0) e *= e;
      if (squarings > 1) e *= e;
    }
    if constexpr (e_1 == E1::none) return slope;
    const Vec<A> sum = fma(e * inv_l - target, splat(b), slope);
    if constexpr (std::is_same_v<P, A>) return sum;
    else return b == A(0) ? slope : sum;  // rows without it
  }
};

}  // namespace FUSEDKD_NAMESPACE
#endif
