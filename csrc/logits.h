// What the kernels of logits share, for one instruction set: the running softmax, soft-cap and scale.

#include "vec.h"

// max and Σ exp((x − max)/T) of the columns seen so far; −∞ and 0 of none, and of nothing but −∞.
template <class A> struct Softmax {
  A m = -INFINITE<A>;
  double l = 0, l_1 = 0;  // l_1: at temperature 1, kept if `squarings` say how its exponential comes from that at T
  double c;               // log2(e)/T
  int squarings = 0;

  void add(const A* x, int64_t n) {
    Vec<A> top[PER_STEP<A>], sum[PER_STEP<A>] = {}, sum_1[PER_STEP<A>] = {};
    for (auto& t : top) t = splat(-INFINITE<A>);
    for (int64_t j = 0; j < n; j += STEP)
      for (int u = 0; u < PER_STEP<A>; u++) top[u] = max(load(x + j + u * WIDTH<A>), top[u]);
    const A most = highest<A>(top);
    if (most > m) {
      const double rise = (double(m) - most) * c;
      l *= std::exp2(rise), l_1 *= std::exp2(std::ldexp(rise, squarings));
      m = most;
    }
    const A from = m == -INFINITE<A> ? 0 : m, scale = A(c);
    for (int64_t j = 0; j < n; j += STEP)
      for (int u = 0; u < PER_STEP<A>; u++) {
        Vec<A> e = exp2<A>((load(x + j + u * WIDTH<A>) - from) * scale);
        sum[u] += e;
        if (squarings > 0) {
          for (int k = 0; k < squarings; k++) e *= e;
          sum_1[u] += e;
        }
      }
    l += total<A>(sum), l_1 += total<A>(sum_1);
  }
};

// Soft-cap and scale in place: x' = cap·tanh(scale·x/cap), or scale·x without a cap; −∞ stays −∞. `slope` gets dx'/dx
// if given.
template <class A> void cap_and_scale(A* x, int64_t n, A cap, A scale, A* slope) {
  const A inside = cap == 0 ? 0 : scale / cap;
  for (int64_t j = 0; j < n; j += WIDTH<A>) {
    const Vec<A> raw = load(x + j), u = raw * inside;
    Vec<A> capped = raw * scale, derivative = splat(scale);
    if (cap != 0) {
      const Power<A> power(abs<A>(u) * A(-2 * LOG2E));
      const Vec<A> e = power.value(), e_minus_one = power.minus_one();
      capped = flip<A>(e_minus_one / (e_minus_one + 2) * -cap, sign<A>(u));
      derivative = e / ((e + 1) * (e + 1)) * (4 * scale);
    }
    store(x + j, raw == -INFINITE<A> ? raw : capped);
    if (slope) store(slope + j, derivative);
  }
}
