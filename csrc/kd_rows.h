// The row mathematics of kd_loss on the CPU: value and gradient of a divergence and of the cross-entropy, one row at a
// time, in the accumulation type A. The divergences themselves are in divergences.h.
//
//   z student, v teacher, C common columns, V >= C columns of the student; T_s, T_t temperatures
//   m the maximum, l = Σ exp((x − m)/T): of z, v on the C columns (m_s, l_s, m_t, l_t), of z on V at T = 1 (m_1, l_1)
//   q = exp((z − m_s)/T_s)/l_s, p = exp((v − m_t)/T_t)/l_t, q_1 = exp(z − m_1)/l_1
//   δ = log p − log q = ((v − z) − (m_t − m_s))/T_s + (v − m_t)·(1/T_t − 1/T_s) − log(l_t/l_s)
//   D = Σ value, W = Σ w, both functions of a column's p, q and δ
//   gradient = a·(w − q·W) + b·∂CE/∂z (cross_entropy.h), times the upstream,
//              a = kd_weight·kd_scale·weight/(n_kd·T_s), b = ce_weight/n_ce
//
// Two sweeps over a row pair where W is known beforehand, as for forward KL. The first reads it from memory, finds m and
// l block by block (Milakov and Gimelshein 2018, arXiv:1805.02867) and keeps the exponentials; the second finds all of
// it in L2 and computes value and gradient. Where W has to be measured, the second leaves w in the place of the
// teacher's exponentials, and a third computes the gradient of it. Per column 4 + 4 bytes read and 4 written in float32,
// 2 + 2 + 2 in 16 bits. Exponentials: the first sweep's two; e_1 = exp(z − m_1) is a power of e_s = exp((z − m_s)/T_s)
// at T_s = 1, 2, 4 where C = V, one more otherwise. Backward, which starts from the statistics and W, is one sweep for
// every divergence, and computes the exponentials anew.

#include "logits.h"
#include "cross_entropy.h"
#include "divergences.h"

// What the later sweeps need to know of a row.
template <class A> struct Terms {
  A m_s, inv_l_s, c_s, m_t, inv_l_t, c_t;             // KD softmaxes, c = log2(e)/T
  A shift, shift_rest, rate, rate_excess, log_ratio;  // of δ: m_t − m_s in two parts, 1/T_s, 1/T_t − 1/T_s, log l_t/l_s
  A a, centre;                                        // coefficient of the gradient, W
  CrossEntropyTerms<A> ce;
  const A *e_s, *e_t;                                 // exponentials kept from the first sweep, 1/l to their scale
  const char *next_z, *next_v;                        // the same columns of the next row, fetched meanwhile
  int64_t z_bytes, v_bytes;
};
enum class Out { none, pull, gradient };  // what a sweep writes: nothing, w, the gradient

// In place of a divergence: none, for columns without a KD term; its w, which a sweep is given instead of v.
struct NoDivergence : Defaults {};
template <bool centred_> struct Pull : Defaults { static constexpr bool centred = centred_; };
template <class Divergence> constexpr bool is_given = false;
template <bool centred> constexpr bool is_given<Pull<centred>> = true;

// Logits may be as low as the type goes, as masks often are: what δ is made of stays finite. A NaN stays one.
template <class A> INLINE Vec<A> bounded(Vec<A> x) {
  constexpr A most = A(1e30);
  return min(splat(most), max(splat(-most), x));
}

// The columns at `at`; `kept`: e_s and e_t are those of the first sweep.
template <bool kept, class A> INLINE Column<Vec<A>> columns(const Terms<A>& r, const A* z, const A* v, int64_t at) {
  const Vec<A> x = load(z + at), y = load(v + at), log2_e_q = (x - r.m_s) * r.c_s, log2_e_p = (y - r.m_t) * r.c_t;
  const Vec<A> e_s = kept ? load(r.e_s + at) : exp2<A>(log2_e_q), e_t = kept ? load(r.e_t + at) : exp2<A>(log2_e_p);
  const Vec<A> d = y - x, b = d - y, lost = (y - (d - b)) - (x + b);  // d + lost = y − x exactly (Knuth)
  Vec<A> delta = fma((d - r.shift) + (lost - r.shift_rest), splat(r.rate), splat(-r.log_ratio));
  if (r.rate_excess != 0) delta = fma(max(splat(A(-1e30)), log2_e_p), splat(r.rate_excess), delta);
  return {x, y, e_t * r.inv_l_t, e_s * r.inv_l_s, bounded<A>(delta), log2_e_p, log2_e_q,
          y == -INFINITE<A>, x == -INFINITE<A>};
}

struct Sums {
  double value = 0, pull = 0;
  void operator+=(Sums other) { value += other.value, pull += other.pull; }
};

// Σ value and Σ w of n columns, n a multiple of STEP; `to` gets what Out says, and may be z. The value is wanted if the
// exponentials are kept. Logarithms are taken in a loop of their own, GROUP columns ahead: with them, the dependent
// operations of one column would be too many for a processor to have several columns under way.
template <class Divergence, class A, bool kept, Out out, E1 e_1 = E1::none>
[[gnu::noinline]] Sums sweep(Divergence divergence, Terms<A> r, const A* z, const A* v, int64_t n, A* to) {
  constexpr bool any = !std::is_same_v<Divergence, NoDivergence>, given = is_given<Divergence>;
  constexpr bool value = kept && any && !given, ahead = Divergence::has_logs;
  constexpr int64_t GROUP = ahead ? 256 : BLOCK;
  typename Divergence::template Logs<Vec<A>> logs[ahead ? GROUP / WIDTH<A> : 1];
  Vec<A> values[PER_STEP<A>] = {}, pulls[PER_STEP<A>] = {};
  for (int64_t j = 0; j < n; j += STEP) {
    if constexpr (any && !given) {
      __builtin_prefetch(r.next_z + j * r.z_bytes, 0, 2);
      __builtin_prefetch(r.next_v + j * r.v_bytes, 0, 2);
    }
    if constexpr (ahead)
      if (j % GROUP == 0)
        for (int64_t i = 0; i < std::min(GROUP, n - j); i += WIDTH<A>)
          logs[i / WIDTH<A>] = divergence.logs(columns<kept>(r, z, v, j + i));
    for (int u = 0; u < PER_STEP<A>; u++) {
      const int64_t at = j + u * WIDTH<A>;
      const Vec<A> x = load(z + at);
      Vec<A> e = kept ? load(r.e_s + at) : exp2<A>((x - r.m_s) * r.c_s), w = {}, slope = {};
      if constexpr (any && !given) {
        const Column<Vec<A>> column = columns<kept>(r, z, v, at);
        if constexpr (ahead) {
          const auto& its = logs[at % GROUP / WIDTH<A>];
          if constexpr (value) values[u] += divergence.value(column, its);
          if constexpr (out != Out::none) w = divergence.pull(column, its);
        } else {
          if constexpr (value) values[u] += divergence.value(column);
          if constexpr (out != Out::none) w = divergence.pull(column);
        }
        if constexpr (value && out == Out::pull) pulls[u] += w;
      }
      if constexpr (given) w = load(v + at);
      if constexpr (out == Out::pull) store(to + at, w);
      if constexpr (out == Out::gradient) {
        if constexpr (any) {
          if constexpr (Divergence::centred) w -= e * r.inv_l_s * r.centre;
          slope = w * r.a;
        }
        store(to + at, r.ce.template add_to<e_1>(slope, x, e));
      }
    }
  }
  return value ? Sums{total<A>(values), out == Out::pull ? total<A>(pulls) : 0} : Sums{};
}

// One thread's rows. The members after the buffers describe the current one.
template <class A> struct KdRows {
  const KdCall& k;
  const int64_t V = k.student.columns, C = k.teacher.columns;
  alignas(64) A z_buffer[BLOCK], v_buffer[BLOCK], g_buffer[BLOCK], w_buffer[BLOCK], slope[BLOCK];
  std::vector<A> e_s, e_t;      // exponentials of the C columns,
  std::vector<A> top_s, top_t;  // and the maximum that each block's are relative to; forward only
  const char *z_row, *v_row;
  int64_t label, hidden;  // hidden: the column that the divergence does without, −1 if none
  bool kd, ce;            // the terms that the row has
  A z_y, v_y, *stats;     // logits of the label, 0 where there is none; m and l − 1, which has the digits that l lacks
                          // near 1: m_s, l_s, m_t, l_t, m_1, l_1; W
  int squarings;          // that make e_1 of e_s, −1 if none do

  explicit KdRows(const KdCall& call) : k(call) {}

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
  // The same as the divergence sees them.
  const A* hide(const A* x, int64_t j, int64_t n, A* buffer) const {
    if (hidden < j || hidden >= j + n) return x;
    if (x != buffer) std::copy_n(x, whole_steps(n), buffer);
    buffer[hidden - j] = -INFINITE<A>;
    return buffer;
  }
  // How many columns the block at j has: blocks end where the common columns do.
  int64_t block_at(int64_t j) const { return std::min(BLOCK, (j < C ? C : V) - j); }

  // First sweep: the statistics; returns CE, if the row has it.
  [[gnu::noinline]] double softmaxes(bool kd) {
    Softmax<A> s{.c = LOG2E / k.temperature}, t{.c = LOG2E / k.teacher_temperature}, one{.c = LOG2E};
    const bool shared = ce && squarings >= 0;
    s.squarings = shared ? squarings : 0;
    double z_sum = 0;
    for (int64_t j = 0, n; j < (ce ? V : kd ? C : 0); j += n) {
      n = block_at(j);
      const A* z = student(j, n);
      if (ce && !shared) one.add(z, whole_steps(n));
      if (ce && k.smoothing != 0) z_sum += sum(z, n);
      if (!kd || j >= C) continue;
      s.add(hide(z, j, n, z_buffer), whole_steps(n), &e_s[j]);
      t.add(hide(teacher(j, n), j, n, v_buffer), whole_steps(n), &e_t[j]);
      top_s[j / BLOCK] = s.m, top_t[j / BLOCK] = t.m;
    }
    s.settle(), t.settle(), one.settle();
    if (shared) one.m = s.m, one.l = squarings ? s.l_1 : s.l;
    const A found[8] = {s.m, A(s.l - 1), t.m, A(t.l - 1), one.m, A(one.l - 1)};
    std::copy_n(found, 8, stats);
    return ce ? CrossEntropy(k, one.m, one.l, one.l - 1).value(z_y, z_sum) : 0;
  }

  double l_s() const { return 1 + double(stats[STUDENT_SUM]); }
  double l_t() const { return 1 + double(stats[OTHER_SUM]); }
  double l_1() const { return 1 + double(stats[CE_SUM]); }
  CrossEntropy cross_entropy() const { return {k, stats[CE_MAX], l_1(), stats[CE_SUM]}; }

  Terms<A> terms(double a, double b) const {
    const double T_s = k.temperature, T_t = k.teacher_temperature, l_s = this->l_s(), l_t = this->l_t();
    const double m_s = l_s == 0 ? A(0) : stats[STUDENT_MAX], m_t = l_t == 0 ? A(0) : stats[OTHER_MAX];
    const double shift = m_t - m_s, b_shift = shift - m_t, lost = (m_t - (shift - b_shift)) - (m_s + b_shift);
    const double excess = (double(stats[OTHER_SUM]) - stats[STUDENT_SUM]) / l_s;
    Terms<A> r;
    r.m_s = m_s, r.inv_l_s = l_s == 0 ? 0 : A(1 / l_s), r.c_s = A(LOG2E / T_s);
    r.m_t = m_t, r.inv_l_t = l_t == 0 ? 0 : A(1 / l_t), r.c_t = A(LOG2E / T_t);
    r.shift = A(shift), r.shift_rest = A(shift - r.shift + lost), r.rate = A(1 / T_s);
    r.rate_excess = A((1 - T_t / T_s) / LOG2E);
    r.log_ratio = A(std::abs(excess) < 0.5 ? std::log1p(excess) : std::log(l_t / l_s));
    r.a = A(a), r.ce.b = A(b), r.ce.squarings = squarings;
    if (ce) r.ce.m = stats[CE_MAX], r.ce.inv_l = A(cross_entropy().q_scale()), r.ce.target = A(cross_entropy().target());
    r.z_bytes = size_of(k.student.type), r.v_bytes = size_of(k.teacher.type);
    return r;
  }

  // The gradient of n columns from their w, or of the cross-entropy alone.
  template <bool centred, bool kept>
  [[gnu::noinline]] static void emit(const Terms<A>& r, const A* z, const A* w, int64_t n, A* g, bool kd, E1 e_1) {
    n = whole_steps(n);
    if (!kd) sweep<NoDivergence, A, false, Out::gradient, E1::own>({}, r, z, nullptr, n, g);
    else if (e_1 == E1::none) sweep<Pull<centred>, A, kept, Out::gradient, E1::none>({}, r, z, w, n, g);
    else if (e_1 == E1::power) sweep<Pull<centred>, A, kept, Out::gradient, E1::power>({}, r, z, w, n, g);
    else sweep<Pull<centred>, A, kept, Out::gradient, E1::own>({}, r, z, w, n, g);
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

// Those of one divergence.
// `measured`: D and W take a sweep of their own before the gradient. A form that needs D alone, for the gradient to be 0
// where it is infinite, can do without: such a row is then written twice.
template <class A, class Divergence, bool measured = Divergence::measured> struct DivergenceRows : KdRows<A> {
  using Base = KdRows<A>;
  using Base::k, Base::V, Base::C, Base::kd, Base::ce, Base::label, Base::hidden, Base::stats, Base::z_y, Base::v_y;
  static constexpr bool softmax = Divergence::softmax, twice = Divergence::measured && !measured;
  static constexpr bool hides = Divergence::hides_target;

  explicit DivergenceRows(const KdCall& call) : Base(call) {
    if (!k.forward || (!softmax && !measured)) return;
    this->e_s.resize(whole_steps(C)), this->e_t.resize(whole_steps(C));
    this->top_s.resize(C / BLOCK + 1), this->top_t.resize(C / BLOCK + 1);
  }

  void row(int64_t i) {
    const double T = k.temperature, nan = std::numeric_limits<double>::quiet_NaN();
    this->z_row = k.student[i], this->v_row = k.teacher[i], stats = static_cast<A*>(k.stats) + STATS * i, hidden = -1;
    label = k.labels ? k.labels[i] : k.ignore_index;
    const bool labelled = k.labels && k.ce && label != k.ignore_index, legal = label >= 0 && label < V;
    const bool target = k.labels && label >= 0 && label < C;
    kd = k.weights[i] != 0 && C > 0 && (!hides || target), ce = labelled && legal;
    this->squarings = !kd || C != V || !softmax || hides ? -1 : T == 1 ? 0 : T == 2 ? 1 : T == 4 ? 2 : -1;
    z_y = ce || (hides && kd) ? *this->student(label, 1) : 0;
    v_y = kd && target ? *this->teacher(label, 1) : 0;
    if (hides && kd) hidden = label;
    const double cross_entropy = k.forward ? this->softmaxes(kd && softmax) : 0;
    const double value = value_and_gradient(i, !labelled || legal);
    if (twice && std::isinf(A(value))) stats[WEIGHT_SUM] = A(value), value_and_gradient(i, !labelled || legal);
    if (!k.forward) return;
    A* rows = static_cast<A*>(k.rows);
    rows[i] = A(kd ? k.kd_scale * k.weights[i] * value : hides && k.weights[i] != 0 ? nan : 0);
    rows[k.student.count + i] = A(ce ? cross_entropy : labelled ? nan : 0);
  }

  // The later sweeps: the gradient; returns D. All but the kept exponentials follows from the statistics as stored.
  double value_and_gradient(int64_t i, bool legal) {
    char* out = k.gradient ? (*k.gradient)[i] : nullptr;
    const double upstream = k.upstream ? (*k.upstream)[i] : 1, b = k.ce_weight / k.n_ce * upstream;
    const double a = k.kd_weight * k.kd_scale * k.weights[i] / (k.n_kd * k.temperature) * upstream;
    Terms<A> row = this->terms(a, b);
    const double l_s = this->l_s(), l_t = this->l_t();
    const Divergence divergence(k.coefficients, RowSums<double>{l_s, l_t, double(C), odds(z_y, 0), odds(v_y, 2)});
    const bool no_student = softmax && l_s == 0 && (!hides || z_y == -INFINITE<A>), no_teacher = softmax && l_t == 0;
    const bool alive = kd && !no_student && (hides || !no_teacher), measure = k.forward && alive;
    const bool ahead = measured && measure;                  // D and W before the gradient
    bool pull = out && alive && legal && a != 0;             // there is a gradient of the divergence,
    const bool push = out && ce && this->l_1() != 0 && b != 0;  // of the cross-entropy
    double value = kd && no_student && (hides || !no_teacher) ? INFINITE<double> : 0;
    if (twice) pull = pull && !std::isinf(stats[WEIGHT_SUM]);
    if constexpr (hides) {
      if (alive) value = divergence.target_value, row.centre = divergence.centre;
    }
    if constexpr (measured) {
      if (ahead) {
        const Sums sums = values_and_pulls(i, row, divergence, pull);
        value = sums.value;
        stats[WEIGHT_SUM] = !std::isfinite(A(value)) ? A(value) : Divergence::centred ? A(sums.pull) : 0;
      }
      row.centre = stats[WEIGHT_SUM];
      pull = pull && !std::isinf(stats[WEIGHT_SUM]);
    }
    const E1 e_1 = !push ? E1::none : this->squarings >= 0 && pull ? E1::power : E1::own;
    for (int64_t j = 0, n; j < (push ? V : pull || (measure && !ahead) ? C : 0); j += n) {
      n = this->block_at(j);
      const bool common = j < C, pull_here = pull && common;
      const A* z = this->student(j, n, true);
      A* g = out ? place(k.student.type, out, j, n, this->g_buffer) : nullptr;
      const E1 from = common ? e_1 : E1::own;
      const Terms<A> r = here(row, i, j, from);
      if (ahead) {
        this->template emit<Divergence::centred, true>(r, z, &this->e_t[j], n, g, pull_here, from);
      } else {
        const A* v = common && (pull || measure) ? this->hide(this->teacher(j, n), j, n, this->v_buffer) : nullptr;
        value += both(r, divergence, v ? this->hide(z, j, n, this->z_buffer) : z, v, n, g, measure && common,
                      pull_here, push, from);
        if (!pull_here && !push) continue;
      }
      if (label >= j && label < j + n && (push || (hides && pull)))
        g[label - j] = at_label(row, divergence, pull_here, from);
      if (k.transform)
        for (int64_t column = 0; column < n; column++) g[column] *= this->slope[column];
      write(k.student.type, out, j, n, g);
    }
    const int64_t bytes = size_of(k.student.type), written = push ? V : pull ? C : 0;
    if (out && written < V) std::memset(out + written * bytes, 0, (V - written) * bytes);
    return value;
  }

  // The sweep that measures: D, W, and w, which takes the place of e_t where it is going to be needed.
  Sums values_and_pulls(int64_t i, const Terms<A>& row, const Divergence& divergence, bool keep) {
    Sums sums;
    for (int64_t j = 0, n; j < C; j += n) {
      n = this->block_at(j);
      A* w = keep ? &this->e_t[j] : this->w_buffer;
      sums += sweep<Divergence, A, true, Out::pull>(divergence, here(row, i, j), this->student(j, n),
                                                    this->teacher(j, n), whole_steps(n), w);
    }
    return sums;
  }

  // Value (returned, unless measured) and gradient in one sweep.
  static double both(const Terms<A>& r, const Divergence& divergence, const A* z, const A* v, int64_t n, A* g,
                     bool value, bool pull, bool push, E1 e_1) {
    n = whole_steps(n);
    double sum = 0;
    if constexpr (!measured) {
      if (value && !pull) sum = sweep<Divergence, A, true, Out::none>(divergence, r, z, v, n, nullptr).value;
      if (value && pull) sum = fused<true>(r, divergence, z, v, n, g, e_1);
    }
    if (!pull && push) Base::template emit<false, false>(r, z, nullptr, n, g, false, e_1);
    if (pull && !value) fused<false>(r, divergence, z, v, n, g, e_1);
    return sum;
  }
  template <bool value>
  static double fused(const Terms<A>& r, const Divergence& divergence, const A* z, const A* v, int64_t n, A* g,
                      E1 e_1) {
    constexpr Out out = Out::gradient;
    if (e_1 == E1::none) return sweep<Divergence, A, value, out, E1::none>(divergence, r, z, v, n, g).value;
    if (hides || e_1 == E1::own) return sweep<Divergence, A, value, out, E1::own>(divergence, r, z, v, n, g).value;
    return sweep<Divergence, A, value, out, hides ? E1::own : E1::power>(divergence, r, z, v, n, g).value;
  }

  // The label's column once more, with its own target, in float64.
  [[gnu::noinline]] A at_label(Terms<A> r, const Divergence& divergence, bool pull, E1 e_1) {
    A z[STEP], v[STEP], w[STEP], g[STEP];
    std::fill_n(z, STEP, z_y), std::fill_n(v, STEP, v_y);
    r.next_z = this->z_row, r.next_v = this->v_row, g[0] = 0;
    if (pull) {
      sweep<Divergence, A, false, Out::pull>(divergence, r, z, v, STEP, w);
      if constexpr (hides) std::fill_n(w, STEP, A(divergence.centre));
      this->template emit<measured && Divergence::centred, false>(r, z, w, STEP, g, true, E1::none);
    }
    if (e_1 == E1::none) return g[0];
    return A(g[0] + r.ce.b * this->cross_entropy().gradient(z_y, true));
  }

  // The log odds of the label against the columns of m and l at stats[at].
  double odds(A logit, int at) const {
    const double T = at == 0 ? k.temperature : k.teacher_temperature, l = at == 0 ? this->l_s() : this->l_t();
    return log_odds<double>(logit, stats[at], 1 / T, l);
  }
  // The row's terms at the block at j: with its kept exponentials, which were relative to another maximum.
  Terms<A> here(Terms<A> r, int64_t i, int64_t j, E1 e_1 = E1::none) const {
    const int64_t next = i + 1 < k.student.count && k.weights[i + 1] != 0 ? i + 1 : i;
    if (j >= C) return r;
    r.next_z = k.student[next] + j * r.z_bytes, r.next_v = k.teacher[next] + j * r.v_bytes;
    if (!kd || !softmax || !k.forward) return r;
    const double l_s = this->l_s(), l_t = this->l_t();
    const double rise_s = (double(this->top_s[j / BLOCK]) - r.m_s) * LOG2E / k.temperature;
    const double rise_t = (double(this->top_t[j / BLOCK]) - r.m_t) * LOG2E / k.teacher_temperature;
    r.e_s = &this->e_s[j], r.inv_l_s = l_s == 0 ? 0 : A(std::exp2(rise_s) / l_s);
    r.e_t = &this->e_t[j], r.inv_l_t = l_t == 0 ? 0 : A(std::exp2(rise_t) / l_t);
    if (e_1 == E1::power)
      r.ce.inv_l = A(this->cross_entropy().q_scale(std::exp2(std::ldexp(rise_s, r.ce.squarings))));
    return r;
  }
};

template <class A> void kd_rows_in(const KdCall& k, int64_t begin, int64_t end) {
  const auto walk = [&](auto rows) {
    for (int64_t i = begin; i < end; i++) rows.row(i);
  };
  const auto run = [&]<class Divergence>(Divergence*) { walk(DivergenceRows<A, Divergence>(k)); };
  const bool in_place = k.gradient && k.gradient->data == k.student.data;  // no row can be written twice
  switch (k.kernel_id) {
    case KernelId::FORWARD_KL: return run((ForwardKL<A>*)nullptr);
    case KernelId::JEFFREYS: return run((Jeffreys<A>*)nullptr);
    case KernelId::MIXTURE: return run((Mixture<A>*)nullptr);
    case KernelId::ALPHA_BETA: return run((AlphaBeta<A>*)nullptr);
    case KernelId::TOTAL_VARIATION: return run((TotalVariation<A>*)nullptr);
    case KernelId::LOGIT_MSE:
      return in_place ? run((LogitMSE<A>*)nullptr) : walk(DivergenceRows<A, LogitMSE<A>, false>(k));
    case KernelId::DKD: return run((DKD<A>*)nullptr);
  }
}

inline void kd_rows(const KdCall& k, int64_t begin, int64_t end) {
  if (k.student.type == ScalarType::Double) kd_rows_in<double>(k, begin, end);
  else kd_rows_in<float>(k, begin, end);
}
