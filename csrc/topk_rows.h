// The row mathematics of kd_loss on the CPU for a teacher known at K columns, one row at a time, in the accumulation
// type A; what concerns the K columns alone is in float64, for a tail 1 − Σp keeps no other digits.
//
//   z student on V columns, q = exp((z − m)/T)/l; on the list of ids y the teacher's log-probabilities, or its weights ω
//   p = exp(y), or exp(y·T_lp/T) over its sum on the list; δ = log p − log q; q' = q over its sum on the list
//   m_c, l_c: m and l of the columns off the list, where Σq = r_s = l_c·exp((m_c − m)/T)/l
//   r_t the teacher's tail, |1 − Σp| or what rounding leaves open of it; with it p is over Σp + r_t (fusedkd/sparse.py)
//   excess(p, q, δ) = p·δ + q − p >= 0, so that nothing cancels (divergences.h)
//
//                         D                                                    ∂D/∂s on the list         off it, over q
//   RENORMALIZE           Σ excess(p, q, δ) + r_s                              q − p                     1
//   RENORMALIZE_REVERSE   Σ excess(q', p, −δ)                                  q'·(−δ − D)               0
//   BUCKET                Σ excess(p, q, δ) + excess(r_t, r_s, ·)              q − p                     1 − r_t/r_s
//   BUCKET_REVERSE        Σ excess(q, p, −δ) + excess(r_s, r_t, ·)             q·(−δ − D)                log(r_s/r_t) − D
//   IGNORE                Σ p·δ                                                (Σp)·q − p                Σp
//   IGNORE_REVERSE        Σ −q·δ, with W = Σ q·(1 − δ)                         q·(1 − δ − W)             −W
//   SAMPLES               Σ −ω·log q                                           (Σω)·q − ω                Σω
//
// Two sweeps over the student's row. The first takes the maximum and sum of the columns off the list, whose values are
// replaced by −∞ in a copy of the block; the list's own are added after it. The second writes rest·exp((z − m_c)/T),
// rest = (last column)·exp((m_c − m)/T)/l, and the cross-entropy's part (kd_rows.h); the columns of the list, and the
// label's, are then overwritten. RENORMALIZE_REVERSE alone needs neither. Per column 4 bytes read and 4 written in
// float32, 2 + 2 in 16 bits; the teacher is never expanded to V.

#include "logits.h"
#include "cross_entropy.h"
#include "divergences.h"
#include "tails.h"

namespace topk {

INLINE double added(D x) {
  double sum = 0;
  for (int u = 0; u < WIDTH<double>; u++) sum += x[u];
  return sum;
}

// As if the n columns x had been added to s: few, in float64, filled up with −∞ to whole steps.
template <class A> void merge(Softmax<A>& s, const double* x, int64_t n) {
  const A top = n == 0 ? -INFINITE<A> : A(*std::max_element(x, x + n));
  if (top > s.m) {
    const double rise = (double(s.m) - top) * s.c;
    s.l *= std::exp2(rise), s.l_1 *= std::exp2(std::ldexp(rise, s.squarings)), s.m = top;
  }
  const double from = s.m == -INFINITE<A> ? 0 : s.m;
  D sum = {}, sum_1 = {};
  for (int64_t k = 0; k < n; k += WIDTH<double>) {
    D e = exp2<double>((load(x + k) - from) * s.c);
    sum += e;
    for (int i = 0; i < s.squarings; i++) e *= e;
    sum_1 += e;
  }
  s.l += added(sum), s.l_1 += s.squarings > 0 ? added(sum_1) : 0;
}

// What the second sweep needs to know of a row.
template <class A> struct Terms {
  A m_c, c_s, rest;              // KD: rest·exp2((z − m_c)·c_s)
  CrossEntropyTerms<A> ce;
  const char* next_z;            // the same columns of the next row, fetched while this one is computed
  int64_t z_bytes;
};

template <class A, bool kd, E1 e_1> void emit(Terms<A> r, const A* z, int64_t n, A* g) {
  for (int64_t j = 0; j < n; j += STEP) {
    __builtin_prefetch(r.next_z + j * r.z_bytes, 0, 2);
    for (int u = 0; u < PER_STEP<A>; u++) {
      const int64_t at = j + u * WIDTH<A>;
      const Vec<A> x = load(z + at);
      Vec<A> e = {}, slope = {};
      if constexpr (kd) {
        e = exp2<A>((x - r.m_c) * r.c_s);
        slope = e * r.rest;
      }
      store(g + at, r.ce.template add_to<e_1>(slope, x, e));
    }
  }
}

// One thread's rows. The members after the buffers describe the current one.
template <class A> struct TopkRows {
  const TopkCall& k;
  const int64_t V = k.student.columns, K = k.teacher.columns, K_padded = whole_steps(K + 1);
  const bool sampled = k.kernel_id == TopkKernelId::SAMPLES;
  alignas(64) A z_buffer[BLOCK], g_buffer[BLOCK], slope_buffer[BLOCK];
  // The list: n columns, the label's after them; of each block of the row the first of its columns, then the next, −1.
  std::vector<int64_t> id = std::vector<int64_t>(K_padded);
  std::vector<int32_t> first = std::vector<int32_t>(V / BLOCK + 1), next = std::vector<int32_t>(K_padded);
  std::vector<A> z = std::vector<A>(K_padded), slope = z;
  std::vector<double> x = std::vector<double>(K_padded), y = x, p = x, q = x, g = x;  // z; teacher; ∂D/∂s
  int64_t n;
  const char* z_row;
  int64_t label;
  bool kd, ce, label_listed;  // the terms that the row has
  double z_y;
  A* stats;              // m, l, m_c, l_c, m_1, l_1 − 1 (kd_rows.h), and what A rounds off l and l_c
  int squarings;         // that make exp(z) of exp(z/T), −1 if none do
  double rest;           // ∂D/∂s off the list, over exp((z − m_c)/T)

  explicit TopkRows(const TopkCall& call) : k(call) {}

  void row(int64_t i) {
    const double T = k.temperature, nan = std::numeric_limits<double>::quiet_NaN();
    z_row = k.student[i], stats = static_cast<A*>(k.stats) + STATS * i;
    label = k.ce ? k.labels[i] : k.ignore_index;
    const bool labelled = k.ce && label != k.ignore_index, legal = !labelled || (label >= 0 && label < V);
    const bool selected = k.weights[i] != 0, listed = list(selected ? i : -1);
    kd = selected && listed, ce = labelled && legal;
    squarings = T == 1 ? 0 : T == 2 ? 1 : T == 4 ? 2 : -1;
    gather();
    const double cross_entropy = k.forward ? softmaxes() : 0;
    const double value = kd ? divergence() : listed ? 0 : nan;
    if (k.gradient) gradient(i, legal && listed, value == INFINITE<double>);
    if (!k.forward) return;
    A* rows = static_cast<A*>(k.rows);
    rows[i] = A(selected ? k.kd_scale * k.weights[i] * value : 0);
    rows[k.student.count + i] = A(ce ? cross_entropy : legal ? 0 : nan);
  }

  // The list of row i, y with it, or an empty one; false, and an empty one, if an id is no column.
  bool list(int64_t i) {
    std::fill(first.begin(), first.end(), -1);
    label_listed = false, n = 0;
    for (int64_t j = 0; j < (i < 0 ? 0 : K); j++) {
      const int64_t column = k.ids[i * K + j];
      if (column == -1) continue;
      if (column < 0 || column >= V) return list(-1), false;
      id[n] = column, y[n] = element(k.teacher.type, k.teacher[i], j), label_listed |= column == label;
      next[n] = first[column / BLOCK], first[column / BLOCK] = int32_t(n++);
    }
    if (sampled) add_up();
    std::fill(y.begin() + n, y.end(), nothing());
    return true;
  }
  double nothing() const { return sampled ? 0 : -INFINITE<double>; }  // y where the teacher has none

  // One of equal ids keeps the sum of their weights; the others leave the list, −1.
  void add_up() {
    int32_t kept[BLOCK];
    for (int32_t& head : first) {
      for (int32_t j = head; j >= 0; j = next[j]) kept[id[j] % BLOCK] = -1;
      for (int32_t* at = &head; *at >= 0;) {
        const int32_t j = *at;
        int32_t& keeper = kept[id[j] % BLOCK];
        if (keeper < 0) keeper = j, at = &next[j];
        else y[keeper] += y[j], y[j] = 0, id[j] = -1, *at = next[j];
      }
    }
  }

  // The student's values at the ids and at the label, before anything is written.
  void gather() {
    id[n] = ce ? label : -1;
    for (int64_t j = 0; j < K_padded; j++)
      z[j] = j <= n && id[j] >= 0 ? A(element(k.student.type, z_row, id[j])) : -INFINITE<A>;
    std::fill(slope.begin(), slope.end(), A(1));
    if (k.transform) cap_and_scale<A>(z.data(), K_padded, k.softcap, k.scale, slope.data());
    std::copy(z.begin(), z.end(), x.begin());
    z_y = x[n], x[n] = -INFINITE<double>;
  }
  static double element(ScalarType type, const char* row, int64_t j) {
    switch (type) {
      case ScalarType::Double: return ((const double*)row)[j];
      case ScalarType::Float: return ((const float*)row)[j];
      case ScalarType::BFloat16: return float(((const BFloat16*)row)[j]);
      default: return float(((const Half*)row)[j]);
    }
  }

  // Columns [j, j + size) as the loss sees them, size <= BLOCK, filled up with −∞ to whole steps.
  const A* student(int64_t j, int64_t size, bool copy, bool with_slope = false) {
    const A* block = read(k.student.type, z_row, j, size, z_buffer, -INFINITE<A>, copy || k.transform);
    if (k.transform)
      cap_and_scale<A>(z_buffer, whole_steps(size), k.softcap, k.scale, with_slope ? slope_buffer : nullptr);
    return block;
  }

  // First sweep: the statistics; returns CE, if the row has it.
  double softmaxes() {
    Softmax<A> s{.c = LOG2E / k.temperature}, one{.c = LOG2E};
    const bool tempered = kd && k.kernel_id != TopkKernelId::RENORMALIZE_REVERSE, shared = ce && tempered && squarings >= 0;
    s.squarings = shared ? squarings : 0;
    double z_sum = 0;
    for (int64_t j = 0, size; j < (ce || tempered ? V : 0); j += size) {
      size = std::min(BLOCK, V - j);
      const int32_t head = first[j / BLOCK];
      const A* block = student(j, size, head >= 0);
      if (ce && k.smoothing != 0) z_sum += sum(block, size);
      for (int32_t c = head; c >= 0; c = next[c]) z_buffer[id[c] - j] = -INFINITE<A>;
      if (tempered) s.add(block, whole_steps(size));
      if (ce && !shared) one.add(block, whole_steps(size));
    }
    s.settle(), one.settle();
    const A m_c = s.m, l_c = A(s.l);
    const double off = s.l;
    merge(s, x.data(), n);
    if (shared) one.m = s.m, one.l = squarings ? s.l_1 : s.l;
    else if (ce) merge(one, x.data(), n);
    const A found[8] = {s.m, A(s.l), m_c, l_c, one.m, A(one.l - 1), A(s.l - A(s.l)), A(off - l_c)};
    std::copy_n(found, 8, stats);
    return ce ? CrossEntropy(k, one.m, one.l, one.l - 1).value(z_y, z_sum) : 0;
  }

  // D, from the statistics as stored; leaves ∂D/∂s on the list in g, and `rest`.
  double divergence() {
    const double m = stats[STUDENT_MAX], l = double(stats[STUDENT_SUM]) + stats[WEIGHT_SUM], m_c = stats[OTHER_MAX], l_c = double(stats[OTHER_SUM]) + stats[OWN];
    const double rate = 1 / k.temperature;
    if (l == 0) return INFINITE<double>;
    const double log_l = std::log(l), q_c = l_c == 0 ? 0 : std::exp((m_c - m) * rate) / l;  // q = exp((z − m_c)/T)·q_c
    const double r_s = l_c * q_c, log_r_s = (m_c - m) * rate + std::log(l_c) - log_l;

    // On the list q and p, its sum, and log p = (y − top)·tau − log_total
    const bool renormalized = k.kernel_id <= TopkKernelId::RENORMALIZE_REVERSE;
    const double top = renormalized ? *std::max_element(y.begin(), y.begin() + n) : 0;
    const double tau = renormalized ? k.coefficients[0] / k.teacher_temperature : 1;
    D p_sum = {};
    for (int64_t j = 0; j < n; j += WIDTH<double>) {
      const D t = load(&y[j]), p_j = sampled ? t : exp2<double>((t - top) * (tau * LOG2E));
      store(&p[j], p_j), store(&q[j], exp2<double>((load(&x[j]) - m) * (rate * LOG2E)) / l);
      p_sum += p_j;
    }
    const bool bucket = k.kernel_id == TopkKernelId::BUCKET || k.kernel_id == TopkKernelId::BUCKET_REVERSE;
    const double mass = added(p_sum);
    const double left = bucket ? teachers_tail(k.teacher.type, p.data(), y.data(), n, mass, l_c != 0) : 0;
    const double total = renormalized || bucket ? mass + left : 1, log_total = std::log(total);
    const double r_t = left / total, log_r_t = std::log(r_t);

    const D zero = {}, infinite = splat(INFINITE<double>);
    D sum = {}, w_sum = {};
    for (int64_t j = 0; j < n; j += WIDTH<double>) {
      const D t = load(&y[j]), s = load(&x[j]), p_j = load(&p[j]) / total, q_j = load(&q[j]);
      const D log_q = (s - m) * rate - log_l, delta = sampled ? -log_q : (t - top) * tau - log_total - log_q;
      const auto t_masked = t == nothing(), s_masked = s == -INFINITE<double>;
      D term, w;
      switch (k.kernel_id) {
        case TopkKernelId::RENORMALIZE:
        case TopkKernelId::BUCKET:
          term = t_masked ? q_j : (s_masked ? infinite : excess(p_j, q_j, delta));
          w = q_j - p_j;
          break;
        case TopkKernelId::RENORMALIZE_REVERSE:
        case TopkKernelId::BUCKET_REVERSE:
          term = s_masked ? p_j : (t_masked ? infinite : excess(q_j, p_j, -delta));
          w = s_masked ? zero : -(q_j * delta);
          break;
        case TopkKernelId::IGNORE_REVERSE:
          term = s_masked ? zero : (t_masked ? infinite : -(q_j * delta));
          w = q_j + term;
          break;
        default:  // ignore, samples
          term = t_masked ? zero : (s_masked ? infinite : p_j * delta);
          w = mass * q_j - p_j;
      }
      store(&g[j], w);
      sum += term, w_sum += w;
    }
    double value = added(sum), W = added(w_sum);

    switch (k.kernel_id) {
      case TopkKernelId::RENORMALIZE: value += r_s, W = 0, rest = q_c; break;
      case TopkKernelId::RENORMALIZE_REVERSE: W = value, rest = 0; break;
      case TopkKernelId::BUCKET:
        value += tail(r_t, r_s, log_r_t - log_r_s), W = 0;
        rest = q_c - (l_c == 0 ? 0 : r_t / l_c);
        break;
      case TopkKernelId::BUCKET_REVERSE:
        value += tail(r_s, r_t, log_r_s - log_r_t), W = value;
        rest = l_c == 0 ? 0 : ((log_r_s - log_r_t) - value) * q_c;
        break;
      case TopkKernelId::IGNORE_REVERSE: rest = -W * q_c; break;
      default: W = 0, rest = mass * q_c;
    }
    for (int64_t j = 0; j < n; j++) g[j] -= q[j] * W;
    return value;
  }

  // Second sweep.
  void gradient(int64_t i, bool legal, bool infinite) {
    char* out = (*k.gradient)[i];
    const double upstream = k.upstream ? (*k.upstream)[i] : 1, b = k.ce_weight / k.n_ce * upstream;
    const double a = k.kd_weight * k.kd_scale * k.weights[i] / (k.n_kd * k.temperature) * upstream;
    const bool pull = kd && legal && stats[STUDENT_SUM] != 0 && a != 0 && !(infinite && reverse());  // of KD and CE
    const bool push = ce && legal && stats[CE_SUM] != -1 && b != 0, dense = pull && rest != 0;
    const E1 e_1 = !push ? E1::none : dense && squarings >= 0 ? E1::power : E1::own;
    const double m_c = stats[OTHER_MAX] == -INFINITE<A> ? 0 : stats[OTHER_MAX];
    const CrossEntropy cross_entropy(k, stats[CE_MAX], 1 + double(stats[CE_SUM]), stats[CE_SUM]);
    Terms<A> r{.m_c = A(m_c), .c_s = A(LOG2E / k.temperature), .rest = dense ? A(a * rest) : 0};
    r.ce.m = A(cross_entropy.m), r.ce.target = A(cross_entropy.target()), r.ce.b = A(b), r.ce.squarings = squarings;
    r.ce.inv_l = A(cross_entropy.q_scale(e_1 == E1::power ? std::exp(m_c - cross_entropy.m) : 1));
    r.z_bytes = size_of(k.student.type);
    const int64_t next_row = i + 1 < k.student.count && k.weights[i + 1] != 0 ? i + 1 : i;
    const auto at = [&](int64_t j, double slope_of_d) {
      const bool is_label = id[j] == label;
      const double of_ce = push ? b * cross_entropy.gradient(is_label ? z_y : x[j], is_label) : 0;
      return A((a * slope_of_d + of_ce) * slope[j]);
    };
    for (int64_t j = 0, size; j < V; j += size) {
      size = std::min(BLOCK, V - j), r.next_z = k.student[next_row] + j * r.z_bytes;
      A* to = place(k.student.type, out, j, size, g_buffer);
      if (dense || push) {
        emit(r, student(j, size, false, true), whole_steps(size), to, dense, e_1);
        if (k.transform)
          for (int64_t column = 0; column < size; column++) to[column] *= slope_buffer[column];
      } else {
        std::fill_n(to, size, A(0));
      }
      if (pull || push)
        for (int32_t c = first[j / BLOCK]; c >= 0; c = next[c]) to[id[c] - j] = at(c, pull ? g[c] : 0);
      if (push && !label_listed && label >= j && label < j + size)
        to[label - j] = at(n, dense ? rest * std::exp((z_y - m_c) / k.temperature) : 0);
      write(k.student.type, out, j, size, to);
    }
  }
  bool reverse() const {
    return k.kernel_id == TopkKernelId::RENORMALIZE_REVERSE || k.kernel_id == TopkKernelId::BUCKET_REVERSE || k.kernel_id == TopkKernelId::IGNORE_REVERSE;
  }
  static void emit(const Terms<A>& r, const A* block, int64_t size, A* to, bool dense, E1 e_1) {
    if (!dense) topk::emit<A, false, E1::own>(r, block, size, to);
    else if (e_1 == E1::none) topk::emit<A, true, E1::none>(r, block, size, to);
    else if (e_1 == E1::power) topk::emit<A, true, E1::power>(r, block, size, to);
    else topk::emit<A, true, E1::own>(r, block, size, to);
  }

  // Σ of a block by partial sums of the distance to its first column, which keeps the digits of logits far from 0.
  static double sum(const A* block, int64_t size) {
    const A from = std::isfinite(block[0]) ? block[0] : 0;
    double partial[STEP] = {};
    for (int64_t j = 0; j < size; j++) partial[j % STEP] += block[j] - from;
    double total = double(size) * from;
    for (const double part : partial) total += part;
    return total;
  }
};

}  // namespace topk

inline void topk_rows(const TopkCall& k, int64_t begin, int64_t end) {
  if (k.student.type == ScalarType::Double) {
    topk::TopkRows<double> rows(k);
    for (int64_t i = begin; i < end; i++) rows.row(i);
  } else {
    topk::TopkRows<float> rows(k);
    for (int64_t i = begin; i < end; i++) rows.row(i);
  }
}
