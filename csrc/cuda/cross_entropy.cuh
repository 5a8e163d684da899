// The cross-entropy of a row of logits z, with label smoothing ε and a z-loss of weight ζ: its value, and the
// coefficients of its gradient.
//
//   CE = log l + (1 − ε)·(m − z_y) + ε·mean(m − z) + ζ·(m + log l)²       m = max z, l = Σ exp(z − m), y the label
//   ∂CE/∂z = (1 + 2ζ·(m + log l))·q − (1 − ε)·1_y − ε/V,  q = exp(z − m)/l                            on V columns
#ifndef FUSEDKD_CROSS_ENTROPY_CUDA
#define FUSEDKD_CROSS_ENTROPY_CUDA

#include "cluster_softmax.cuh"
#include "scalar.cuh"

namespace fusedkd {

struct CrossEntropy {
  float m, rest, smoothing, z_loss_weight;  // rest: l − 1, which has the digits that l lacks near 1

  INLINE float l() const { return 1 + rest; }
  INLINE float log_l() const { return std::log1p(rest); }
  INLINE float log_sum() const { return m + log_l(); }

  // From m of a logit: 0 in a row whose logits all count as LOWEST.
  INLINE float from_m(float z) const { return Exponent(1, m)(z); }

  // Without the part of the mean, which waits for a sum over all columns: add of_mean() of Σ from_m(z)/V.
  INLINE float value(float z_y) const {
    if (l() == 0) return INFINITE<float>;
    const float hit = smoothing < 1 ? (1 - smoothing) * -from_m(z_y) : 0;
    return log_l() + hit + (z_loss_weight == 0 ? 0 : z_loss_weight * log_sum() * log_sum());
  }
  INLINE float of_mean(float mean) const { return -smoothing * mean; }

  // What the gradient multiplies q by.
  INLINE float q_factor() const { return 1 + growth(); }

  // The gradient at the label, in a row of V columns: of q − 1 a sure label leaves little.
  INLINE float at_label(float z_y, int columns) const {
    const Exp<float> e(from_m(z_y));
    const float of_q = (e.minus_one - rest + growth() * e.value) / l();
    return of_q + smoothing - smoothing / columns;
  }

 private:
  INLINE float growth() const { return z_loss_weight == 0 ? 0 : 2 * z_loss_weight * log_sum(); }
};

}  // namespace fusedkd
#endif
