// The row mathematics of kd_loss on the CPU: value and gradient of forward KL and cross-entropy, one row at a time, in
// the accumulation type A.
//
//   z student, v teacher, C common columns, V >= C columns of the student; T_s, T_t temperatures
//   m the maximum, l = Σ exp((x − m)/T): of z, v on the C columns (m_s, l_s, m_t, l_t), of z on V at T = 1 (m_1, l_1)
//   q = exp((z − m_s)/T_s)/l_s, p = exp((v − m_t)/T_t)/l_t, q_1 = exp(z − m_1)/l_1
//   δ = log p − log q = ((v − z) − (m_t − m_s))/T_s + (v − m_t)·(1/T_t − 1/T_s) − log(l_t/l_s)
//   KL = Σ p·φ(δ), φ(δ) = exp(−δ) − 1 + δ >= 0, so that nothing cancels; p·φ(δ) = (q − p) + p·δ where |δ| >= 1
//   CE = log l_1 + (1 − ε)·(m_1 − z_y) + ε·mean(m_1 − z)
//   gradient = a·(q − p) + b·(q_1 − (1 − ε)·1_y − ε/V), times the upstream,
//              a = kd_weight·kd_scale·w/(n_kd·T_s), b = ce_weight/n_ce
//
// Two sweeps over a row pair. The first reads it from memory and finds m and l block by block, rescaling l where the
// maximum rises (Milakov and Gimelshein 2018, arXiv:1805.02867); the second finds it in L2 and computes value and
// gradient. Per column 4 + 4 bytes read and 4 written in float32, 2 + 2 + 2 in 16 bits. Exponentials: two in each
// sweep; e_1 = exp(z − m_1) is a power of e_s = exp((z − m_s)/T_s) at T_s = 1, 2, 4 where C = V, one more otherwise. KL
// as a sum of non-negative p·φ(δ): Schulman 2020, "Approximating KL divergence" (the estimator k3).

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

// What the second sweep needs to know of a row.
template <class A> struct Terms {
  A m_s, inv_l_s, c_s, m_t, inv_l_t, c_t;             // KD softmaxes, c = log2(e)/T
  A shift, shift_rest, rate, rate_excess, log_ratio;  // of δ: m_t − m_s in two parts, 1/T_s, 1/T_t − 1/T_s, log l_t/l_s
  A m_1, inv_l_1, target;                             // CE softmax, and what is subtracted from q_1
  A a, b;                                             // coefficients of the gradient
  int squarings;                                      // that make e_1 of e_s
  const char *next_z, *next_v;                        // the same columns of the next row, fetched while this one is computed
  int64_t z_bytes, v_bytes;
};
enum class E1 { none, power, own };  // e_1 is not needed, a power of e_s, an exponential of its own

// Value (returned) and gradient of n columns, n a multiple of STEP.
template <class Divergence, class A, bool value, bool gradient, bool kd, E1 e_1>
double block(Terms<A> r, const A* z, const A* v, int64_t n, A* g) {
  Vec<A> sum[PER_STEP<A>] = {};
  for (int64_t j = 0; j < n; j += STEP) {
    __builtin_prefetch(r.next_z + j * r.z_bytes, 0, 2);
    __builtin_prefetch(r.next_v + j * r.v_bytes, 0, 2);
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
      if constexpr (e_1 == E1::own) e = exp2<A>((x - r.m_1) * A(LOG2E));
      if constexpr (e_1 == E1::power)
        for (int k = 0; k < r.squarings; k++) e *= e;
      if constexpr (e_1 != E1::none) slope = fma(e * r.inv_l_1 - r.target, splat(r.b), slope);
      if constexpr (gradient) store(g + at, slope);
    }
  }
  return value ? total<A>(sum) : 0;
}

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

// One thread's rows. The members after the buffers describe the current one.
template <class A> struct KdRows {
  const KdCall& k;
  const int64_t V = k.student.columns, C = k.teacher.columns;
  alignas(64) A z_buffer[BLOCK], v_buffer[BLOCK], g_buffer[BLOCK], slope[BLOCK];
  const char *z_row, *v_row;
  int64_t label;
  bool kd, ce;    // the terms that the row has
  A z_y, *stats;  // m_s, l_s, m_t, l_t, m_1, l_1
  int squarings;  // that make e_1 of e_s, −1 if none do

  explicit KdRows(const KdCall& call) : k(call) {}

  void row(int64_t i) {
    const double T = k.temperature;
    z_row = k.student[i], v_row = k.teacher[i], stats = static_cast<A*>(k.stats) + 6 * i;
    label = k.labels ? k.labels[i] : k.ignore_index;
    const bool labelled = k.labels && label != k.ignore_index, legal = !labelled || (label >= 0 && label < V);
    kd = k.weights[i] != 0 && C > 0, ce = labelled && legal;
    squarings = !kd || C != V ? -1 : T == 1 ? 0 : T == 2 ? 1 : T == 4 ? 2 : -1;
    z_y = ce ? *student(label, 1) : 0;
    const double cross_entropy = k.forward ? softmaxes() : 0, divergence = value_and_gradient(i, legal);
    if (!k.forward) return;
    A* rows = static_cast<A*>(k.rows);
    rows[i] = A(kd ? k.kd_scale * k.weights[i] * divergence : 0);
    rows[k.student.count + i] = A(ce ? cross_entropy : legal ? 0 : std::numeric_limits<double>::quiet_NaN());
  }

  // Columns [j, j + n) as the loss sees them, n <= BLOCK, filled up with −∞ to whole steps.
  const A* student(int64_t j, int64_t n, bool with_slope = false) {
    const A* z = read(k.student.type, z_row, j, n, z_buffer, -INFINITE<A>, k.transform);
    if (k.transform) cap_and_scale<A>(z_buffer, whole_steps(n), k.softcap, k.scale, with_slope ? slope : nullptr);
    return z;
  }
  const A* teacher(int64_t j, int64_t n) {
    const A* v = read(k.teacher.type, v_row, j, n, v_buffer, -INFINITE<A>, k.transform);
    if (k.transform) cap_and_scale<A>(v_buffer, whole_steps(n), k.teacher_softcap, k.teacher_scale, nullptr);
    return v;
  }
  // How many columns the block at j has: blocks end where the common columns do.
  int64_t block_at(int64_t j) const { return std::min(BLOCK, (j < C ? C : V) - j); }

  // First sweep: the statistics; returns CE, if the row has it.
  double softmaxes() {
    Softmax<A> s{.c = LOG2E / k.temperature}, t{.c = LOG2E / k.teacher_temperature}, one{.c = LOG2E};
    const bool shared = ce && squarings >= 0;
    s.squarings = shared ? squarings : 0;
    double z_sum = 0;
    for (int64_t j = 0, n; j < (ce ? V : kd ? C : 0); j += n) {
      n = block_at(j);
      const A* z = student(j, n);
      if (kd && j < C) s.add(z, whole_steps(n)), t.add(teacher(j, n), whole_steps(n));
      if (ce && !shared) one.add(z, whole_steps(n));
      if (ce && k.smoothing != 0) z_sum += sum(z, n);
    }
    if (shared) one.m = s.m, one.l = squarings ? s.l_1 : s.l;
    const A found[6] = {s.m, A(s.l), t.m, A(t.l), one.m, A(one.l)};
    std::copy_n(found, 6, stats);
    if (one.l == 0) return INFINITE<double>;
    const double hit = k.smoothing < 1 ? (1 - k.smoothing) * (double(one.m) - z_y) : 0;
    return std::log(one.l) + hit + (k.smoothing != 0 ? k.smoothing * (one.m - z_sum / V) : 0);
  }

  // Second sweep: the gradient; returns D. Both follow from the statistics as stored: forward and backward agree to the
  // bit.
  double value_and_gradient(int64_t i, bool legal) {
    char* out = k.gradient ? (*k.gradient)[i] : nullptr;
    const double upstream = k.upstream ? (*k.upstream)[i] : 1, b = k.ce_weight / k.n_ce * upstream;
    const double a = k.kd_weight * k.kd_scale * k.weights[i] / (k.n_kd * k.temperature) * upstream;
    const bool alive = kd && stats[1] != 0 && stats[3] != 0;
    const bool measure = k.forward && alive;
    const bool pull = out && alive && legal && a != 0, push = out && ce && stats[5] != 0 && b != 0;  // of KD and CE
    const E1 e_1 = !push ? E1::none : squarings >= 0 && pull ? E1::power : E1::own;
    const A v_y = pull && push && label < C ? *teacher(label, 1) : 0;
    Terms<A> r = terms(a, b);
    const int64_t next = i + 1 < k.student.count && k.weights[i + 1] != 0 ? i + 1 : i;
    double divergence = kd && stats[1] == 0 && stats[3] != 0 ? INFINITE<double> : 0;
    for (int64_t j = 0, n; j < (push ? V : pull || measure ? C : 0); j += n) {
      n = block_at(j);
      r.next_z = k.student[next] + j * r.z_bytes, r.next_v = k.teacher[next] + j * r.v_bytes;
      const bool common = j < C, pull_here = pull && common, measure_here = measure && common;
      const A* z = student(j, n, true);
      const A* v = pull_here || measure_here ? teacher(j, n) : nullptr;
      if (measure_here && !pull) divergence += sweep(r, z, v, n, nullptr, true, true, E1::none);
      if (!pull_here && !push) continue;
      A* g = place(k.student.type, out, j, n, g_buffer);
      const E1 from = common ? e_1 : E1::own;
      divergence += sweep(r, z, v, n, g, measure_here && pull, pull_here, from);
      if (push && label >= j && label < j + n) {  // the label's column once more, with its own target
        A z_label[STEP], v_label[STEP], g_label[STEP];
        std::fill_n(z_label, STEP, z_y), std::fill_n(v_label, STEP, v_y);
        Terms<A> at_label = r;
        at_label.target += A(1 - k.smoothing);
        sweep(at_label, z_label, v_label, STEP, g_label, false, pull_here, from);
        g[label - j] = g_label[0];
      }
      if (k.transform)
        for (int64_t column = 0; column < n; column++) g[column] *= slope[column];
      write(k.student.type, out, j, n, g);
    }
    const int64_t bytes = size_of(k.student.type), written = push ? V : pull ? C : 0;
    if (out && written < V) std::memset(out + written * bytes, 0, (V - written) * bytes);
    return divergence;
  }

  Terms<A> terms(double a, double b) const {
    const double T_s = k.temperature, T_t = k.teacher_temperature, l_s = stats[1], l_t = stats[3];
    const double shift = double(stats[2]) - stats[0], excess = (l_t - l_s) / l_s;
    Terms<A> r;
    r.m_s = stats[0], r.inv_l_s = A(1 / l_s), r.c_s = A(LOG2E / T_s);
    r.m_t = stats[2], r.inv_l_t = A(1 / l_t), r.c_t = A(LOG2E / T_t);
    r.shift = A(shift), r.shift_rest = A(shift - r.shift), r.rate = A(1 / T_s), r.rate_excess = A(1 / T_t - 1 / T_s);
    r.log_ratio = A(std::abs(excess) < 0.5 ? std::log1p(excess) : std::log(l_t / l_s));
    r.m_1 = stats[4], r.inv_l_1 = A(1 / double(stats[5])), r.target = A(k.smoothing / V);
    r.a = A(a), r.b = A(b), r.squarings = squarings;
    r.z_bytes = size_of(k.student.type), r.v_bytes = size_of(k.teacher.type);
    return r;
  }

  static double sweep(const Terms<A>& r, const A* z, const A* v, int64_t n, A* g, bool value, bool kd, E1 e_1) {
    using Family = ForwardKL;
    n = whole_steps(n);
    if (!g) return block<Family, A, true, false, true, E1::none>(r, z, v, n, g);
    if (!kd) return block<Family, A, false, true, false, E1::own>(r, z, v, n, g);
    return value ? pulled<Family, true>(r, z, v, n, g, e_1) : pulled<Family, false>(r, z, v, n, g, e_1);
  }
  template <class Family, bool value>
  static double pulled(const Terms<A>& r, const A* z, const A* v, int64_t n, A* g, E1 e_1) {
    switch (e_1) {
      case E1::none: return block<Family, A, value, true, true, E1::none>(r, z, v, n, g);
      case E1::power: return block<Family, A, value, true, true, E1::power>(r, z, v, n, g);
      default: return block<Family, A, value, true, true, E1::own>(r, z, v, n, g);
    }
  }

  // Σ z of n columns, by partial sums of the distance to the first, which keeps the digits of logits far from 0.
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
