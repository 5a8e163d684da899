// What the kernels of logits share, for one instruction set: the running softmax, soft-cap and scale.

#include "vec.h"

// Running Σ exp((x − m)/T). The reference m is the maximum of the first columns, and rises only where a later one is so
// far above it that exponentials could overflow: a block is read once. settle() makes m the maximum of all.
template <class A> struct Softmax {
  static constexpr double REACH = 64;  // powers of two that an exponential may reach
  A m = -INFINITE<A>, top = -INFINITE<A>;  // −∞ also of nothing but −∞; then l is 0
  double l = 0, l_1 = 0;  // l_1: at temperature 1, kept if `squarings` say how its exponential comes from that at T
  double c;               // log2(e)/T
  int squarings = 0;

  // `kept` gets the exponentials, if given.
  void add(const A* x, int64_t n, A* kept = nullptr) {
    if (m == -INFINITE<A>) m = maximum(x, n);
    A most;
    while (!reaches(x, n, kept, most)) rise(most);
    top = std::max(top, most);
  }
  void settle() { rise(top); }

 private:
  void rise(A to) {
    if (to == m) return;
    const double lowered = (double(m) - to) * c;
    l *= std::exp2(lowered), l_1 *= std::exp2(std::ldexp(lowered, squarings)), m = to;
  }

  static A maximum(const A* x, int64_t n) {
    Vec<A> highest_of[PER_STEP<A>];
    for (auto& of : highest_of) of = splat(-INFINITE<A>);
    for (int64_t j = 0; j < n; j += STEP)
      for (int u = 0; u < PER_STEP<A>; u++) highest_of[u] = max(load(x + j + u * WIDTH<A>), highest_of[u]);
    return highest<A>(highest_of);
  }

  // Adds the columns, unless their maximum `most` is out of reach.
  bool reaches(const A* x, int64_t n, A* kept, A& most) {
    Vec<A> highest_of[PER_STEP<A>], sum[PER_STEP<A>] = {}, sum_1[PER_STEP<A>] = {};
    for (auto& of : highest_of) of = splat(-INFINITE<A>);
    const A from = m == -INFINITE<A> ? 0 : m, scale = A(c);
    for (int64_t j = 0; j < n; j += STEP)
      for (int u = 0; u < PER_STEP<A>; u++) {
        const int64_t at = j + u * WIDTH<A>;
        const Vec<A> column = load(x + at);
        highest_of[u] = max(column, highest_of[u]);
        Vec<A> e = exp2<A>((column - from) * scale);
        if (kept) store(kept + at, e);
        sum[u] += e;
        if (squarings > 0) {
          for (int k = 0; k < squarings; k++) e *= e;
          sum_1[u] += e;
        }
      }
    most = highest<A>(highest_of);
    if (std::ldexp((double(most) - m) * c, squarings) > REACH) return false;
    l += total<A>(sum);
    if (squarings > 0) l_1 += total<A>(sum_1);
    return true;
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
