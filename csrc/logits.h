// What the kernels of logits share, for one instruction set: the running softmax, soft-cap and scale.

#include "vec.h"

// The partial sums of a loop over vectors of A, in that type, or in float64.
template <class A, class R> struct Partial {
  Vec<A> sum[PER_STEP<A>] = {};
  INLINE void add(int u, Vec<A> x) { sum[u] += x; }
  double all() const { return total<A>(sum); }
};
template <> struct Partial<float, double> {
  double sum[STEP] = {};
  INLINE void add(int u, F x) {
    for (int i = 0; i < WIDTH<float>; i++) sum[u * WIDTH<float> + i] += double(x[i]);
  }
  double all() const {
    D of[PER_STEP<double>];
    std::memcpy(of, sum, sizeof of);
    return total<double>(of);
  }
};

// Running Σ exp((x − m)/T). The reference m is the maximum of the first columns, and rises where a later one makes out
// much of the sum: its exponential then is exactly 1. Such a block is added once more, in float64: the other columns, all
// that there is to the entropy of a sure row, would drop out of float32 sums that have a 1 in them. Elsewhere a block is
// read once. settle() makes m the maximum of all.
template <class A> struct Softmax {
  static constexpr double REACH = 4;    // powers of two that an exponential may reach,
  static constexpr double SHARE = 0.5;  // and the part of the sum that one may have
  A m = -INFINITE<A>, top = -INFINITE<A>;  // −∞ also of nothing but −∞; then l is 0
  double l = 0, l_1 = 0;  // l_1: at temperature 1, kept if `squarings` say how its exponential comes from that at T
  double c;               // log2(e)/T
  int squarings = 0;

  // `kept` gets the exponentials, if given.
  void add(const A* x, int64_t n, A* kept = nullptr) {
    if (m == -INFINITE<A>) m = maximum(x, n);
    Sums of = sums<A>(x, n, kept);
    const double above = std::ldexp((double(of.most) - m) * c, squarings);
    if (above > REACH || std::exp2(above) > SHARE * (squarings > 0 ? l_1 + of.l_1 : l + of.l)) {
      rise(std::max(m, of.most));
      of = sums<double>(x, n, kept);
    }
    l += of.l, l_1 += of.l_1;
    top = std::max(top, of.most);
  }
  void settle() { rise(top); }

 private:
  struct Sums {
    double l, l_1;
    A most;  // the maximum of the columns
  };

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

  // The columns' sums, added in the type R.
  template <class R> Sums sums(const A* x, int64_t n, A* kept) const {
    Vec<A> highest_of[PER_STEP<A>];
    Partial<A, R> sum, sum_1;
    for (auto& of : highest_of) of = splat(-INFINITE<A>);
    const A from = m == -INFINITE<A> ? 0 : m, scale = A(c);
    for (int64_t j = 0; j < n; j += STEP)
      for (int u = 0; u < PER_STEP<A>; u++) {
        const int64_t at = j + u * WIDTH<A>;
        const Vec<A> column = load(x + at);
        highest_of[u] = max(column, highest_of[u]);
        Vec<A> e = exp2<A>((column - from) * scale);
        if (kept) store(kept + at, e);
        sum.add(u, e);
        if (squarings > 0) {
          for (int k = 0; k < squarings; k++) e *= e;
          sum_1.add(u, e);
        }
      }
    return {sum.all(), sum_1.all(), highest<A>(highest_of)};
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
