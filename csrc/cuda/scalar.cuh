// The scalar mathematics of CUDA kernels over logits, in float32: the arithmetic of divergences.h, and soft-caps.
#ifndef FUSEDKD_SCALAR
#define FUSEDKD_SCALAR

#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <limits>

#include "cluster.cuh"

#define FUSEDKD_NAMESPACE fusedkd  // of divergences.h

namespace fusedkd {

#define INLINE __device__ __forceinline__

template <class X> using Scalar = X;
template <class A> constexpr A INFINITE = std::numeric_limits<A>::infinity();
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

INLINE float max(float x, float y) { return std::fmax(x, y); }  // the other where one is NaN
INLINE double max(double x, double y) { return std::fmax(x, y); }
INLINE float absolute(float x) { return std::fabs(x); }
INLINE double absolute(double x) { return std::fabs(x); }
INLINE float fma(float x, float y, float z) { return std::fma(x, y, z); }

INLINE float finite_or_zero(float x) { return x == -INFINITE<float> ? 0 : x; }  // −∞ − −∞ would be NaN, −∞ − 0 is right
INLINE float reciprocal_or_zero(float x) { return x == 0 ? 0 : 1 / x; }

// (e^−x − 1 + x)/x² for |x| < 1. float: a minimax polynomial, relative error 1.6e-7; double: Taylor's.
INLINE float phi(float x) {
  float y = fma(2.4960813e-05f, x, -0.00020325484f);
  y = fma(y, x, 0.0013891335f);
  y = fma(y, x, -0.00833093f);
  y = fma(y, x, 0.041666515f);
  y = fma(y, x, -0.16666695f);
  return fma(y, x, 0.5f);
}
INLINE double phi(double x) {
  double y = 1;
#pragma unroll 1
  for (int k = 20; k > 2; --k) y = 1 - y * x / k;
  return y / 2;
}

// p·δ²·phi(δ), or (m − p) + p·δ where δ is not small: that of divergences.h, with both computed. Lanes would part ways.
INLINE float excess(float p, float m, float x) {
  const float near = p * (x * x) * phi(x), far = fma(p, x, m - p);
  return std::fabs(x) < 1 ? near : far;
}

INLINE float exp2_any(float x, bool) { return exp2_of(x); }
INLINE float power(float x, float y) { return std::pow(x, y); }

template <class X> struct Exp;
template <> struct Exp<float> {
  float value, minus_one;
  INLINE explicit Exp(float x) : value(exp2_of(x * LOG2E)) {
    const float near = fma(x * x, phi(-x), x), far = value - 1;
    minus_one = x > -1 ? near : far;
  }
};

// log u, u = 1 + x. Near 1 2·artanh(x/(2 + x)) as a series: the hardware's logarithm is good to 2⁻²² absolute there.
INLINE float log1p(float x, float u) {
  const float r = x * reciprocal_of(2 + x), s = r * r;
  float t = fma(0.13333333f, s, 0.15384615f);
  t = fma(t, s, 0.18181818f);
  t = fma(t, s, 0.22222222f);
  t = fma(t, s, 0.28571429f);
  t = fma(t, s, 0.4f);
  t = fma(t, s, 0.66666667f);
  const float near = fma(r * s, t, 2 * r), far = log2_of(u) * LN2;
  return x > -0.5f && x < 1 ? near : far;
}

// x' = cap·tanh(scale·x/cap), or scale·x where the cap is 0 (none), and dx'/dx; −∞, a masked column, stays −∞. With
// e = exp(−2|u|), |tanh u| = (1 − e)/(1 + e) and the derivative 4e/(1 + e)², which keeps digits where 1 − tanh² is 0.
INLINE void cap_and_scale(float& x, float cap, float scale, float& slope) {
  if (cap == 0) {
    x *= scale, slope = scale;
    return;
  }
  const float u = x * (scale / cap);
  const Exp<float> e(-2 * std::fabs(u));
  const float r = reciprocal_of(1 + e.value), y = std::copysign(e.minus_one * r * cap, u);
  x = x == -INFINITE<float> ? x : y, slope = 4 * scale * e.value * r * r;
}

}  // namespace fusedkd
#endif
