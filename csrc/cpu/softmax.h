// The statistics of a row of logits: m, the maximum, and l = Σ exp((x − m)/T), found block by block (Milakov and
// Gimelshein 2018, arXiv:1805.02867). Compiled once per instruction set (isa.h).
#ifndef FUSEDKD_SOFTMAX
#define FUSEDKD_SOFTMAX

#include "vec.h"

namespace FUSEDKD_NAMESPACE {

// Running Σ exp((x − m)/T). The reference m is the maximum of the first columns, and rises where a later one makes out
// much of the sum; such a block is added once more, any other is read once. Where m is a block's maximum, the columns
// that equal it are counted, not summed: the others, all that there is to the entropy of a sure row, would drop out of
// float32 sums that have a 1 in them. settle() makes m the maximum of all.
template <class A> struct Softmax {
  static constexpr double REACH = 4;       // powers of two that an exponential may reach,
  static constexpr double SHARE = 0.5;     // and the part of the sum that one may have
  A m = -INFINITE<A>, top = -INFINITE<A>;  // −∞ also of nothing but −∞; then l is 0
  double l = 0, l_1 = 0;  // l_1: at temperature 1, kept if `squarings` say how its exponential comes from that at T
  double c;               // log2(e)/T
  int squarings = 0;

  // `kept` gets the exponentials, if given.
  void add(const A* x, int64_t n, A* kept = nullptr) {
    switch (squarings) {
      case 0: return add<0>(x, n, kept);
      case 1: return add<1>(x, n, kept);
      default: return add<2>(x, n, kept);
    }
  }
  void settle() { rise(top); }

  // As if the n columns x had been added: few, in float64, filled up with −∞ to whole steps. After settle(). `kept`
  // gets their exponentials.
  void merge(const double* x, int64_t n, double* kept) {
    const A most = n == 0 ? -INFINITE<A> : A(highest(x, n));
    if (most > m) rise(most);
    const double from = m == -INFINITE<A> ? 0 : m;
    D sum = {}, sum_1 = {};
    for (int64_t j = 0; j < n; j += WIDTH<double>) {
      D e = exp2<double>((load(x + j) - from) * c);
      store(kept + j, e);
      sum += e;
      for (int k = 0; k < squarings; k++) e *= e;
      sum_1 += e;
    }
    l += added(sum), l_1 += squarings > 0 ? added(sum_1) : 0;
  }

 private:
  struct Sums {
    double l, l_1;
    A most;  // the maximum of the columns
  };

  template <int squarings_> void add(const A* x, int64_t n, A* kept) {
    Sums of;
    if (m == -INFINITE<A>) {
      m = maximum(x, n);
      of = sums<true, squarings_>(x, n, kept);
    } else {
      of = sums<false, squarings_>(x, n, kept);
      const double above = (double(of.most) - m) * c * (1 << squarings);
      if (above > 0 && (above > REACH || std::exp2(above) > SHARE * (squarings > 0 ? l_1 + of.l_1 : l + of.l))) {
        rise(of.most);
        of = sums<true, squarings_>(x, n, kept);
      }
    }
    l += of.l, l_1 += of.l_1;
    top = std::max(top, of.most);
  }

  void rise(A to) {
    if (to == m) return;
    const double lowered = (double(m) - to) * c;
    l *= std::exp2(lowered), m = to;
    if (squarings > 0) l_1 *= std::exp2(std::ldexp(lowered, squarings));
  }

  // Four steps at a time, so that one maximum need not wait for another; at the end, steps are read again.
  static A maximum(const A* x, int64_t n) {
    Vec<A> highest_of[4][PER_STEP<A>];
    for (auto& step : highest_of)
      for (auto& of : step) of = splat(-INFINITE<A>);
    for (int64_t j = 0; j < n; j += 4 * STEP)
      for (int i = 0; i < 4; i++)
        for (int u = 0; u < PER_STEP<A>; u++)
          highest_of[i][u] = max(load(x + std::min(j + i * STEP, n - STEP) + u * WIDTH<A>), highest_of[i][u]);
    for (int i = 1; i < 4; i++)
      for (int u = 0; u < PER_STEP<A>; u++) highest_of[0][u] = max(highest_of[0][u], highest_of[i][u]);
    return highest<A>(highest_of[0]);
  }

  // `at_top`: m is the columns' maximum. Those that equal it are counted, the others summed.
  template <bool at_top, int squarings_> Sums sums(const A* x, int64_t n, A* kept) const {
    Vec<A> highest_of[PER_STEP<A>], sum[PER_STEP<A>] = {}, sum_1[PER_STEP<A>] = {};
    Int<A> minus_others = {};
    for (auto& of : highest_of) of = splat(at_top ? m : -INFINITE<A>);
    const A from = m == -INFINITE<A> ? 0 : m, scale = A(c);
    for (int64_t j = 0; j < n; j += STEP)
      for (int u = 0; u < PER_STEP<A>; u++) {
        const int64_t at = j + u * WIDTH<A>;
        const Vec<A> column = load(x + at), below = column - from;
        const Int<A> other = below != 0;  // a NaN too
        if (at_top) minus_others = other ? minus_others - 1 : minus_others;
        else highest_of[u] = max(column, highest_of[u]);
        Vec<A> e = exp2<A>(below * scale);
        if (kept) store(kept + at, e);
        sum[u] = at_top ? (other ? sum[u] + e : sum[u]) : sum[u] + e;
        if (squarings_ > 0) {
          for (int k = 0; k < squarings_; k++) e *= e;
          sum_1[u] = at_top ? (other ? sum_1[u] + e : sum_1[u]) : sum_1[u] + e;
        }
      }
    double tops = 0;
    if (at_top) {
      typename Types<A>::Lane others = 0;
      for (int i = 0; i < WIDTH<A>; i++) others -= minus_others[i];
      tops = double(n - others);
    }
    return {tops + total<A>(sum), squarings_ > 0 ? tops + total<A>(sum_1) : 0, highest<A>(highest_of)};
  }
};

}  // namespace FUSEDKD_NAMESPACE
#endif
