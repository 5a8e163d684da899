// The row mathematics of kd_rows.h for rows of few columns: WIDTH rows at a time, one per lane of a vector, so that
// maxima, sums, logarithms and all else that a row has once costs one operation for all of them. The symbols, the
// formulas and the pass over columns are those of kd_rows.h, and so are the rules; what a lane holds never reaches
// another. A row's columns are few enough for all of it to stay in L1: W is always found before the gradient. Compiled
// once per instruction set (isa.h).
#ifndef FUSEDKD_KD_LANES
#define FUSEDKD_KD_LANES

#include "call.h"
#include "kd_pass.h"
#include "logits.h"
#include "transpose.h"

namespace FUSEDKD_NAMESPACE {

// One thread's rows. The members after the buffers describe the current ones.
template <class A> struct KdLanes {
  using X = Vec<A>;
  using Mask = Int<A>;
  static constexpr int W = WIDTH<A>;
  const KdCall& k;
  const int64_t V = k.student.columns, C = k.teacher.columns;
  const bool softmax = with_divergence<A>(k.kernel_id, []<class Divergence>() { return Divergence::softmax; });
  const bool centred = with_divergence<A>(k.kernel_id, []<class Divergence>() { return Divergence::centred; });
  const bool finite_only =  // the gradient is 0 where D = ∞
      with_divergence<A>(k.kernel_id, []<class Divergence>() { return Divergence::needs_weight_sum; });
  const int squarings = C == V && softmax ? squarings_at(k.temperature) : -1;  // that make e_1 of e_s, −1 if none do
  alignas(64) A z[LANE_COLUMNS * W], v[LANE_COLUMNS * W], e_s[LANE_COLUMNS * W], e_t[LANE_COLUMNS * W];
  alignas(64) A slope[LANE_COLUMNS * W];
  X kd_weight, upstream, z_y;  // z_y: the label's logit
  Mask kd, ce, broken;         // the terms that the row has; whether its label is no column
  int64_t label[W];            // −1 without CE
  MaxAndSum<X> s, t, one;      // of z and v at their temperatures, of z at 1
  X weight_sum;

  explicit KdLanes(const KdCall& call) : k(call) {}

  // Rows [i, i + count), count <= W; other lanes repeat the last.
  void rows(int64_t i, int count) {
    read(i, count);
    const bool any_kd = any(kd), tempered = any_kd && softmax;
    if (k.forward) statistics(tempered);
    else recall(i, count);
    const CrossEntropy<X> cross_entropy(k, one.m, one.less_one);
    Terms<A, X> r = terms(cross_entropy);
    if (tempered && !k.forward) exponentials(r);
    const Mask alive = softmax ? kd & (s.less_one != A(-1)) & (t.less_one != A(-1)) : kd;
    SumsOf<X> sums;
    if (any_kd)
      sums = with_divergence<A, X>(k.kernel_id, [&]<class Divergence>() { return divergence<Divergence>(r); });
    if (k.forward) {
      const X w = sums.value - sums.value == A(0) ? (centred ? sums.weight : X{}) : sums.value;
      weight_sum = alive && finite_only ? w : X{};
      const Mask infinite = softmax ? kd & (s.less_one == A(-1)) & (t.less_one != A(-1)) : Mask{};
      const X value = alive ? sums.value : (infinite ? X{} + INFINITE<A> : X{});
      finish(i, count, value, cross_entropy);
    }
    if (k.gradient) gradient(i, count, r, alive, any_kd, cross_entropy);
  }

  static bool any(Mask mask) {
    typename Types<A>::Lane found = 0;
    for (int u = 0; u < W; u++) found |= mask[u];
    return found != 0;
  }

  // What the rows have, and their logits.
  [[gnu::noinline]] void read(int64_t i, int count) {
    RowsOfLanes<A> student, teacher;
    bool any_kd = false;
    for (int u = 0; u < W; u++) {
      const int64_t row = i + std::min(u, count - 1), y = k.labels ? k.labels[row] : k.ignore_index;
      const bool labelled = k.labels && k.ce && y != k.ignore_index, legal = y >= 0 && y < V;
      student[u] = k.student[row], teacher[u] = k.teacher[row];
      kd_weight[u] = k.weights[row], kd[u] = -(k.weights[row] != 0 && C > 0);
      ce[u] = -(labelled && legal), broken[u] = -(labelled && !legal), label[u] = labelled && legal ? y : -1;
      any_kd |= kd[u] != 0;
    }
    to_lanes<A>(k.student.type, student, V, z);
    if (any_kd) to_lanes<A>(k.teacher.type, teacher, C, v);
    if (k.transform) {
      cap_and_scale<A>(z, V * W, A(k.softcap), A(k.scale), slope);
      if (any_kd) cap_and_scale<A>(v, C * W, A(k.teacher_softcap), A(k.teacher_scale), nullptr);
    }
    for (int u = 0; u < W; u++) z_y[u] = label[u] < 0 ? 0 : z[label[u] * W + u];
  }

  // First pass. Columns that equal the maximum are counted, the others summed, as in softmax.h.
  void statistics(bool tempered) {
    const bool shared = tempered && k.ce && squarings >= 0;
    s = t = one = {X{} - INFINITE<A>, X{} - A(1)};
    if (tempered) {
      add_up<0>(v, C, k.teacher_temperature, e_t, t);
      switch (shared ? squarings : 0) {
        case 0: add_up<0>(z, C, k.temperature, e_s, s); break;
        case 1: add_up<1>(z, C, k.temperature, e_s, s); break;
        default: add_up<2>(z, C, k.temperature, e_s, s);
      }
      if (shared && squarings == 0) one = s;
    }
    if (k.ce && !shared) add_up<0>(z, V, 1, nullptr, one);
  }
  static INLINE X sum(const X (&x)[4]) { return (x[0] + x[1]) + (x[2] + x[3]); }
  template <int squarings_> [[gnu::noinline]] void add_up(const A* x, int64_t n, double T, A* kept, MaxAndSum<X>& of) {
    X m = X{} - INFINITE<A>, rest[4] = {}, rest_1[4] = {}, tops[4] = {};
    for (int64_t j = 0; j < n * W; j += W) m = max(load(x + j), m);
    const X from = m == -INFINITE<A> ? X{} : m;
    const A c = A(LOG2E / T);
    const auto add = [&](int64_t j, int u) {
      const X below = load(x + j) - from;
      const Mask other = below != A(0);  // a NaN too
      X e = exp2<A>(below * c);
      if (kept) store(kept + j, e);
      tops[u] += other ? X{} : X{} + A(1), rest[u] += other ? e : X{};
      for (int i = 0; i < squarings_; i++) e *= e;
      if (squarings_ > 0) rest_1[u] += other ? e : X{};
    };
    int64_t j = 0;
    for (; j + 4 <= n; j += 4)
      for (int u = 0; u < 4; u++) add((j + u) * W, u);
    for (; j < n; j++) add(j * W, 0);
    of = {m, sum(tops) - A(1) + sum(rest)};
    if (squarings_ > 0) one = {m, sum(tops) - A(1) + sum(rest_1)};
  }

  // The statistics as stored, for backward, and the exponentials that forward kept.
  void recall(int64_t i, int count) {
    RowsOfLanes<A> from;
    A column[STATS * W];
    for (int u = 0; u < W; u++) from[u] = stats(i + std::min(u, count - 1));
    to_lanes<A, A>(from, STATS, column);
    const auto of = [&](Stat stat) { return load(column + stat * W); };
    s = {of(STUDENT_MAX), of(STUDENT_SUM)}, t = {of(OTHER_MAX), of(OTHER_SUM)}, one = {of(CE_MAX), of(CE_SUM)};
    weight_sum = of(WEIGHT_SUM);
  }
  void exponentials(const Terms<A, X>& r) {
    for (int64_t j = 0; j < C * W; j += W) {
      store(e_s + j, exp2<A>((load(z + j) - r.m_s) * r.c_s));
      store(e_t + j, exp2<A>((load(v + j) - r.m_t) * r.c_t));
    }
  }
  char* stats(int64_t i) const { return reinterpret_cast<char*>(static_cast<A*>(k.stats) + STATS * i); }

  Terms<A, X> terms(const CrossEntropy<X>& cross_entropy) const {
    Terms<A, X> r{};
    r.template set_softmaxes<X>(k, s, t);
    r.ce.m = one.m, r.ce.inv_l = cross_entropy.q_scale(), r.ce.target = cross_entropy.target();
    r.ce.squarings = squarings;
    r.kept = {e_s, e_t, r.inv_l_s, r.inv_l_t, r.ce.inv_l};
    return r;
  }

  // D and W; w takes the place of e_t.
  template <class Divergence> SumsOf<X> divergence(const Terms<A, X>& r) {
    if constexpr (Divergence::excludes_label) return {};  // kd.cpp asks for none
    else {
      const X zero{};
      const Divergence divergence(k.coefficients,
                                  RowSums<X>{s.less_one + A(1), t.less_one + A(1), double(C), zero, zero});
      return pass<Divergence, A, true, Out::grad_term>(divergence, r, z, v, C * W, e_t);
    }
  }

  // The row losses and the statistics.
  [[gnu::noinline]] void finish(int64_t i, int count, X value, const CrossEntropy<X>& cross_entropy) {
    X below{};  // the mean of m − z
    if (k.smoothing != 0) {
      for (int64_t j = 0; j < V * W; j += W) below += one.m - load(z + j);
      below /= A(V);
    }
    const X nan = X{} + std::numeric_limits<A>::quiet_NaN(), nll = cross_entropy.value(z_y, below);
    if (A* losses = static_cast<A*>(k.rows)) {
      put(losses + i, count, kd ? A(k.kd_scale) * kd_weight * value : X{});
      put(losses + k.student.count + i, count, ce ? nll : (broken ? nan : X{}));
    }
    A column[STATS * W] = {};
    const auto of = [&](Stat stat, X x) { store(column + stat * W, x); };
    of(STUDENT_MAX, s.m), of(STUDENT_SUM, s.less_one), of(OTHER_MAX, t.m), of(OTHER_SUM, t.less_one);
    of(CE_MAX, one.m), of(CE_SUM, one.less_one), of(WEIGHT_SUM, weight_sum);
    RowsOfLanes<A> to;
    for (int u = 0; u < count; u++) to[u] = stats(i + u);
    from_lanes<A, A>(column, STATS, to, count);
  }
  static void put(A* to, int count, X x) {
    if (count == W) return store(to, x);
    for (int u = 0; u < count; u++) to[u] = x[u];
  }

  // The last pass. Lanes whose coefficient of a term is 0 do without it, whatever they hold.
  [[gnu::noinline]] void gradient(int64_t i, int count, Terms<A, X>& r, Mask alive, bool any_kd,
                                  const CrossEntropy<X>& cross_entropy) {
    RowsOfLanes<A> to;
    for (int u = 0; u < count; u++) to[u] = (*k.gradient)[i + u];
    const Mask infinite = finite_only ? absolute(weight_sum) == INFINITE<A> : Mask{};
    const bool per_row = k.upstream && !k.upstream->scalar;
    const double all = k.upstream && !per_row ? (*k.upstream)[0] : 1;
    for (int u = 0; u < W; u++) {
      const double upstream = per_row ? (*k.upstream)[i + std::min(u, count - 1)] : all;
      r.a[u] = A(k.kd_weight * k.kd_scale * kd_weight[u] / (k.n_kd * k.temperature) * upstream);
      r.ce.b[u] = A(k.ce_weight / k.n_ce * upstream);
    }
    r.a = alive & ~broken & ~infinite ? r.a : X{}, r.ce.b = ce & (one.less_one != A(-1)) ? r.ce.b : X{};
    r.centre = centred ? weight_sum : X{};
    const E1 e_1 = !k.ce || k.ce_weight == 0 ? E1::none : squarings >= 0 ? E1::power : E1::own;
    A w_y[W], e_y[W];  // of the label's column
    for (int u = 0; u < W; u++) {
      const int64_t at = label[u] * W + u;
      const bool common = any_kd && label[u] >= 0 && label[u] < C;
      w_y[u] = common ? e_t[at] : 0, e_y[u] = common && centred ? e_s[at] : 0;
    }
    if (any_kd) centred ? emit<true>(r, e_1) : emit<false>(r, e_1);
    const int64_t done = any_kd ? C * W : 0;
    pass<NoDivergence, A, false, Out::gradient, E1::own>(NoDivergence(), r, z + done, nullptr, V * W - done, z + done);
    if (e_1 != E1::none) {
      const X kd_part = r.a == A(0) ? X{} : (load(w_y) - load(e_y) * r.inv_l_s * r.centre) * r.a;
      const X g = kd_part + r.ce.b * cross_entropy.gradient(z_y, true);
      for (int u = 0; u < W; u++)
        if (label[u] >= 0 && r.ce.b[u] != 0) z[label[u] * W + u] = g[u];
    }
    if (k.transform) {
      const Mask live = (r.a != A(0)) | (r.ce.b != A(0));
      for (int64_t j = 0; j < V * W; j += W) store(z + j, live ? load(z + j) * load(slope + j) : X{});
    }
    from_lanes<A>(k.student.type, z, V, to, count);
  }
  template <bool centred_> void emit(const Terms<A, X>& r, E1 e_1) {
    using Given = GivenTerms<centred_>;
    if (e_1 == E1::none) pass<Given, A, true, Out::gradient, E1::none>(Given(), r, z, e_t, C * W, z);
    else if (e_1 == E1::power) pass<Given, A, true, Out::gradient, E1::power>(Given(), r, z, e_t, C * W, z);
    else pass<Given, A, true, Out::gradient, E1::own>(Given(), r, z, e_t, C * W, z);
  }
};

template <class A> void kd_lanes_in(const KdCall& k, int64_t begin, int64_t end) {
  KdLanes<A> lanes(k);
  for (int64_t i = begin; i < end; i += WIDTH<A>) lanes.rows(i, int(std::min<int64_t>(WIDTH<A>, end - i)));
}

inline void kd_lanes(const KdCall& k, int64_t begin, int64_t end) {
  if (k.student.type == ScalarType::Double) kd_lanes_in<double>(k, begin, end);
  else kd_lanes_in<float>(k, begin, end);
}

}  // namespace FUSEDKD_NAMESPACE
#endif
