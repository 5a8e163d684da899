// The cross-entropy of a row of logits z, with label smoothing ε and a z-loss of weight ζ: its value, and its gradient
// at vectors of columns and at single ones. Compiled once per instruction set (isa.h).
//
//   CE = log l + (1 − ε)·(m − z_y) + ε·mean(m − z) + ζ·(m + log l)²       m = max z, l = Σ exp(z − m), y the label
//   ∂CE/∂z = (1 + 2ζ·(m + log l))·q − (1 − ε)·1_y − ε/V,  q = exp(z − m)/l                            on V columns
#ifndef FUSEDKD_CROSS_ENTROPY
#define FUSEDKD_CROSS_ENTROPY

#include "call.h"
#include "vec.h"

namespace FUSEDKD_NAMESPACE {

// What is the same for all columns of a row.
struct CrossEntropy {
  double m, l, less_one;  // less_one: l − 1, which has the digits that l lacks near 1
  double smoothing, columns, z_loss_weight;
  double growth;  // 2ζ·(m + log l)

  CrossEntropy(const LogitsCall& k, double m, double l, double less_one)
      : m(m), l(l), less_one(less_one), smoothing(k.smoothing), columns(double(k.vocabulary)),
        z_loss_weight(k.z_loss_weight),
        growth(z_loss_weight == 0 || l == 0 ? 0 : 2 * z_loss_weight * (m + std::log(l))) {}

  // `sum`: of all logits, used if there is smoothing.
  double value(double z_y, double sum) const {
    if (l == 0) return INFINITE<double>;
    const double hit = smoothing < 1 ? (1 - smoothing) * (m - z_y) : 0, log_l = std::log(l), log_sum = m + log_l;
    const double nll = log_l + hit + (smoothing != 0 ? smoothing * (m - sum / columns) : 0);
    return z_loss_weight == 0 ? nll : nll + z_loss_weight * log_sum * log_sum;
  }
  // What q's exponential is multiplied by, `scale` being that of the exponential.
  double q_scale(double scale = 1) const { return scale * (1 + growth) / l; }
  double target() const { return smoothing / columns; }

  // ∂CE/∂z at one column. Of q − 1 little is left where the label is sure, so that it is not taken as a difference.
  double gradient(double z, bool is_label) const {
    const double q = (z == m ? 1 : std::exp(z - m)) / l, grown = growth == 0 ? 0 : growth * q;
    if (!is_label) return q + grown - target();
    return (z == m ? -less_one / l : q - 1) + smoothing + grown - target();
  }
};

// Σ(m − z) of n columns, from their sum.
inline double gap(double m, double sum, int64_t n) {
  return sum == -INFINITE<double> ? INFINITE<double> : double(n) * m - sum;
}

// How a pass over columns finds exp(z − m): not at all, as a power of the exponential at the KD term's temperature, or
// by an exponential of its own.
enum class E1 { none, power, own };

// The same for the vectors of a pass: what it adds is b·(e·inv_l − target).
template <class A> struct CrossEntropyTerms {
  A m, inv_l, target, b;
  int squarings;  // that make e of the KD term's exponential, at most 2

  // z: logits; e: the KD term's exponential, if e_1 is a power of it; slope: the gradient of the KD term.
  template <E1 e_1> INLINE Vec<A> add_to(Vec<A> slope, Vec<A> z, Vec<A> e) const {
    if constexpr (e_1 == E1::own) e = exp2<A>((z - m) * A(LOG2E));
    if constexpr (e_1 == E1::power) {
      if (squarings > 0) e *= e;
      if (squarings > 1) e *= e;
    }
    if constexpr (e_1 != E1::none) slope = fma(e * inv_l - target, splat(b), slope);
    return slope;
  }
};

}  // namespace FUSEDKD_NAMESPACE
#endif
