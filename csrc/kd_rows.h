// The row mathematics of kd_loss on the CPU: value and gradient of forward KL and cross-entropy, one row at a time, in the accumulation type A.
//
//   z student, v teacher, C common columns, V >= C student columns; T_s, T_t temperatures; m maximum, l = Σ exp((x − m)/T) of a softmax
//   q = exp((z − m_s)/T_s)/l_s, p = exp((v − m_t)/T_t)/l_t on the C columns; q_1 = exp(z − m_1)/l_1 on all V
//   δ = log p − log q = (1/T_s)·((v − z) − (m_t − m_s)) + (1/T_t − 1/T_s)·(v − m_t) − log(l_t/l_s)
//   KL = Σ p·φ(δ), φ(δ) = exp(−δ) − 1 + δ: every term is >= 0 and nothing cancels;  p·φ = (q − p) + p·δ where |δ| is large
//   CE = log l_1 + (1 − ε)·(m_1 − z_y) + ε·mean(m_1 − z)
//   gradient = a·(q − p) + b·(q_1 − (1 − ε)·1_y − ε/V),  a = kd_weight·kd_scale·w/(n_kd·T_s),  b = ce_weight/n_ce, both times the upstream
//
// A row pair is read from memory once, in a first sweep that finds m and l block by block (rescaling l where the maximum rises), and from
// L2 in a second one for value and gradient: 4 + 4 bytes read and 4 written per column in float32, 2 + 2 + 2 in 16 bits.
// e_1 = exp(z − m_1) is a power of e_s = exp((z − m_s)/T_s) at T_s = 1, 2, 4 if V = C. KL by φ: Pinsker-style rewriting of
// Hinton et al. 2015 (arXiv:1503.02531); exponentials from the maximum: Milakov and Gimelshein 2018 (arXiv:1805.02867).

#include "vec.h"

constexpr double LOG2E = 1.44269504088896340735992;

// A divergence is these two functions of a column's p, q and δ.
struct ForwardKL {
  template <class A> static INLINE Vec<A> value(Vec<A> p, Vec<A> q, Vec<A> delta) {
    constexpr Series<A, Types<A>::phi_degree> phi_over_square(0.5, -1, 2);
    return abs<A>(delta) < A(1) ? p * (delta * delta) * phi_over_square(delta) : (q - p) + p * delta;
  }
  template <class A> static INLINE Vec<A> gradient(Vec<A> p, Vec<A> q) { return q - p; }
};

// max and Σ exp((x − max)/T) of the columns seen so far; −∞ and 0 of none, and of nothing but −∞.
template <class A> struct Softmax {
  A m = -INFINITE<A>;
  double l = 0, l_1 = 0;  // l_1: the same at temperature 1, kept if `squarings` say how to get it from the same exponential
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

// What the second sweep needs to know of a row.
template <class A> struct Terms {
  A m_s, inv_l_s, c_s, m_t, inv_l_t, c_t;               // KD softmaxes, c = log2(e)/T
  A shift, shift_rest, rate, rate_excess, log_ratio;    // of δ: m_t − m_s in two parts, 1/T_s, 1/T_t − 1/T_s, log(l_t/l_s)
  A m_1, inv_l_1, target;                               // CE softmax, and what is subtracted from q_1
  A a, b;                                               // coefficients of the gradient
  int squarings;
};
enum class CE { none, power, own };  // whence e_1 comes: not needed, a power of e_s, an exponential of its own

// Value (returned) and gradient of n columns, n a multiple of STEP.
template <class Divergence, class A, bool value, bool gradient, bool kd, CE ce>
double block(Terms<A> r, const A* z, const A* v, int64_t n, A* g) {
  Vec<A> sum[PER_STEP<A>] = {};
  for (int64_t j = 0; j < n; j += STEP)
    for (int u = 0; u < PER_STEP<A>; u++) {
      const int64_t at = j + u * WIDTH<A>;
      const Vec<A> x = load(z + at);
      Vec<A> e = {}, slope = {};
      if constexpr (kd) {
        const Vec<A> y = load(v + at);
        e = exp2<A>((x - r.m_s) * r.c_s);
        const Vec<A> q = e * r.inv_l_s, p = exp2<A>((y - r.m_t) * r.c_t) * r.inv_l_t;
        if constexpr (value) {
          const Vec<A> d = y - x, b = d - y, lost = (y - (d - b)) - (x + b);  // d + lost = y − x exactly (Knuth)
          const Vec<A> near = (d - r.shift) + (lost - r.shift_rest);
          const Vec<A> delta = near * r.rate + ((y - r.m_t) * r.rate_excess - r.log_ratio);
          const Vec<A> term = Divergence::template value<A>(p, q, delta);
          sum[u] += y == -INFINITE<A> ? q : (x == -INFINITE<A> ? splat(INFINITE<A>) : term);
        }
        if constexpr (gradient) slope = Divergence::template gradient<A>(p, q) * r.a;
      }
      if constexpr (ce == CE::own) e = exp2<A>((x - r.m_1) * A(LOG2E));
      if constexpr (ce == CE::power) for (int k = 0; k < r.squarings; k++) e *= e;
      if constexpr (ce != CE::none) slope = fma(e * r.inv_l_1 - r.target, splat(r.b), slope);
      if constexpr (gradient) store(g + at, slope);
    }
  return value ? total<A>(sum) : 0;
}

// Soft-cap and scale in place: x' = cap·tanh(scale·x/cap), or scale·x without a cap; −∞ stays −∞. `slope` gets dx'/dx if given.
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

// One thread's rows.
template <class A> struct KdRows {
  const KdCall& k;
  explicit KdRows(const KdCall& call) : k(call) {}
  alignas(64) A z_buffer[BLOCK], v_buffer[BLOCK], g_buffer[BLOCK], slope[BLOCK];

  const A* student(const char* row, int64_t j, int64_t n, bool with_slope = false) {
    const A* z = read(k.student.type, row, j, n, z_buffer, -INFINITE<A>, k.transform);
    if (k.transform) cap_and_scale<A>(z_buffer, whole_steps(n), k.softcap, k.scale, with_slope ? slope : nullptr);
    return z;
  }
  const A* teacher(const char* row, int64_t j, int64_t n) {
    const A* v = read(k.teacher.type, row, j, n, v_buffer, -INFINITE<A>, k.transform);
    if (k.transform) cap_and_scale<A>(v_buffer, whole_steps(n), k.teacher_softcap, k.teacher_scale, nullptr);
    return v;
  }

  void row(int64_t i) {
    const int64_t V = k.student.columns, C = k.teacher.columns, N = k.student.count;
    const char *z_row = k.student[i], *v_row = k.teacher[i];
    A* rows = static_cast<A*>(k.rows);
    A* stats = static_cast<A*>(k.stats) + 6 * i;
    const int64_t label = k.labels ? k.labels[i] : k.ignore_index;
    const bool labelled = k.labels && label != k.ignore_index, legal = !labelled || (label >= 0 && label < V);
    bool kd = k.weights[i] != 0 && C > 0, ce = labelled && legal;
    const bool shared = kd && C == V && (k.temperature == 1 || k.temperature == 2 || k.temperature == 4);

    // First sweep: the softmaxes.
    A z_y = 0;
    if (ce) z_y = *student(z_row, label, 1);
    double z_sum = 0;
    if (k.forward) {
      Softmax<A> s{.c = LOG2E / k.temperature}, t{.c = LOG2E / k.teacher_temperature}, one{.c = LOG2E};
      s.squarings = ce && shared ? int(k.temperature) / 2 : 0;
      for (int64_t j = 0, n; j < (ce ? V : kd ? C : 0); j += n) {
        n = std::min(BLOCK, (j < C ? C : V) - j);
        const A* z = student(z_row, j, n);
        if (kd && j < C) s.add(z, whole_steps(n)), t.add(teacher(v_row, j, n), whole_steps(n));
        if (ce && !shared) one.add(z, whole_steps(n));
        if (ce && k.smoothing != 0) z_sum += sum(z, n);
      }
      if (ce && shared) one.m = s.m, one.l = s.squarings ? s.l_1 : s.l;
      const A found[6] = {s.m, A(s.l), t.m, A(t.l), one.m, A(one.l)};
      std::copy_n(found, 6, stats);
      rows[i] = 0;
      rows[N + i] = legal ? 0 : std::numeric_limits<A>::quiet_NaN();
      if (ce) {
        const double smoothing = k.smoothing, hit = smoothing < 1 ? (1 - smoothing) * (double(one.m) - z_y) : 0;
        const double spread = smoothing != 0 ? smoothing * (one.m - z_sum / V) : 0;
        rows[N + i] = A(stats[5] == 0 ? INFINITE<double> : std::log(one.l) + hit + spread);
      }
      if (kd && stats[1] == 0) rows[i] = A(k.kd_scale * k.weights[i]) * INFINITE<A>;
    }

    // Second sweep: value and gradient. What follows reads the statistics as they were stored, so that forward and backward agree.
    const bool measure = k.forward && kd && stats[1] != 0 && stats[3] != 0;
    const double upstream = k.gradient ? k.upstream ? (*k.upstream)[i] : 1 : 0;
    const double a = k.kd_weight * k.kd_scale * k.weights[i] / (k.n_kd * k.temperature) * upstream, b = k.ce_weight / k.n_ce * upstream;
    ce = ce && stats[5] != 0 && k.gradient && b != 0;
    char* out = k.gradient ? (*k.gradient)[i] : nullptr;
    const bool pull = k.gradient && kd && legal && stats[1] != 0 && stats[3] != 0 && a != 0;  // a term of weight 0 keeps its NaN to itself
    const Terms<A> r = terms(stats, a, b);
    const CE from = !ce ? CE::none : shared && pull ? CE::power : CE::own;
    double value = 0;
    A v_y = -INFINITE<A>;
    if (ce && pull && label < C) v_y = *teacher(v_row, label, 1);
    for (int64_t j = 0, n; j < (ce ? V : pull || measure ? C : 0); j += n) {
      n = std::min(BLOCK, (j < C ? C : V) - j);
      const int64_t padded = whole_steps(n);
      const bool common = j < C, kd_here = pull && common;
      const A* z = student(z_row, j, n, true);
      const A* v = common && (pull || measure) ? teacher(v_row, j, n) : nullptr;
      if (measure && common && !pull) value += sweep(r, z, v, padded, nullptr, true, true, CE::none);
      if (!out || !(kd_here || ce)) continue;
      A* g = place(k.student.type, out, j, n, g_buffer);
      const CE e_1 = kd_here || !ce ? from : CE::own;
      value += sweep(r, z, v, padded, g, measure && kd_here, kd_here, e_1);
      if (ce && label >= j && label < j + n) {  // the label's column once more, with its own target
        A z_label[STEP], v_label[STEP], g_label[STEP];
        std::fill_n(z_label, STEP, z_y), std::fill_n(v_label, STEP, v_y);
        Terms<A> at_label = r;
        at_label.target += A(1 - k.smoothing);
        sweep(at_label, z_label, v_label, STEP, g_label, false, kd_here, e_1);
        g[label - j] = g_label[0];
      }
      if (k.transform) for (int64_t c = 0; c < n; c++) g[c] *= slope[c];
      write(k.student.type, out, j, n, g);
    }
    const int64_t written = ce ? V : pull ? C : 0;
    if (out && written < V) std::memset(out + written * size_of(k.student.type), 0, (V - written) * size_of(k.student.type));
    if (measure) rows[i] = A(k.kd_scale * k.weights[i] * value);
  }

  // Σ z of n columns, by partial sums from the first column's value, which keeps the digits of logits far from 0.
  static double sum(const A* z, int64_t n) {
    const A from = std::isfinite(z[0]) ? z[0] : 0;
    double partial[STEP] = {}, rest = 0;
    int64_t j = 0;
    for (; j + STEP <= n; j += STEP)
      for (int u = 0; u < STEP; u++) partial[u] += z[j + u] - from;
    for (; j < n; j++) rest += z[j] - from;
    for (int u = 0; u < STEP; u++) rest += partial[u];
    return rest + double(n) * from;
  }

  Terms<A> terms(const A* stats, double a, double b) const {
    const double shift = double(stats[2]) - stats[0], l_s = stats[1], l_t = stats[3], excess = (l_t - l_s) / l_s;
    Terms<A> r;
    r.m_s = stats[0], r.inv_l_s = A(1 / l_s), r.c_s = A(LOG2E / k.temperature);
    r.m_t = stats[2], r.inv_l_t = A(1 / l_t), r.c_t = A(LOG2E / k.teacher_temperature);
    r.shift = A(shift), r.shift_rest = A(shift - r.shift), r.rate = A(1 / k.temperature);
    r.rate_excess = A(1 / k.teacher_temperature - 1 / k.temperature);
    r.log_ratio = A(std::abs(excess) < 0.5 ? std::log1p(excess) : std::log(l_t / l_s));
    r.m_1 = stats[4], r.inv_l_1 = A(1 / double(stats[5])), r.target = A(k.smoothing / k.student.columns);
    r.a = A(a), r.b = A(b), r.squarings = int(k.temperature) / 2;
    return r;
  }

  static double sweep(const Terms<A>& r, const A* z, const A* v, int64_t n, A* g, bool value, bool kd, CE ce) {
    using D = ForwardKL;
    if (!g) return block<D, A, true, false, true, CE::none>(r, z, v, n, g);
    if (!kd) return block<D, A, false, true, false, CE::own>(r, z, v, n, g);
    switch (ce) {
      case CE::none: return value ? block<D, A, true, true, true, CE::none>(r, z, v, n, g) : block<D, A, false, true, true, CE::none>(r, z, v, n, g);
      case CE::power: return value ? block<D, A, true, true, true, CE::power>(r, z, v, n, g) : block<D, A, false, true, true, CE::power>(r, z, v, n, g);
      default: return value ? block<D, A, true, true, true, CE::own>(r, z, v, n, g) : block<D, A, false, true, true, CE::own>(r, z, v, n, g);
    }
  }
};

inline void kd_rows(const KdCall& k, int64_t begin, int64_t end) {
  if (k.student.type == ScalarType::Double) {
    KdRows<double> rows(k);
    for (int64_t i = begin; i < end; i++) rows.row(i);
  } else {
    KdRows<float> rows(k);
    for (int64_t i = begin; i < end; i++) rows.row(i);
  }
}
