// The row mathematics of kd_loss on the CPU for a teacher known at K columns, one row at a time, in the accumulation
// type A; what concerns the K columns alone is in float64. The divergences: topk_divergences.h.
//
//   z student on V columns, q = exp((z − m)/T)/l; on the list of ids y the teacher's log-probabilities, or its weights
//   p = exp(y), or exp(y·T_lp/T) over its sum on the list
//   m_c, l_c: m and l of the columns off the list, where Σq = r_s = l_c·exp((m_c − m)/T)/l
//
// Two passes over the student's row. The first, statistics(), takes the maximum and sum of the columns off the list,
// whose values are replaced by −∞ in a copy of the block; the list's own are merged after it. divergence() needs
// nothing but these. The second, gradient(), writes rest·exp((z − m_c)/T) and the cross-entropy's part
// (cross_entropy.h); the columns of the list, and the label's, are then overwritten. RENORMALIZE_REVERSE alone needs
// neither. Per column 4 bytes read and 4 written in float32, 2 + 2 in 16 bits; the teacher is never expanded to V.
// Compiled once per instruction set (isa.h).
#ifndef FUSEDKD_TOPK_ROWS
#define FUSEDKD_TOPK_ROWS

#include "call.h"
#include "cross_entropy.h"
#include "logits.h"
#include "softmax.h"
#include "topk_divergences.h"
#include "topk_list.h"
#include "vec.h"

namespace FUSEDKD_NAMESPACE {

// What the second pass needs to know of a row.
template <class A> struct TopkTerms {
  A m_c, c_s, rest;  // KD: rest·exp2((z − m_c)·c_s)
  CrossEntropyTerms<A> ce;
  const char* next_z;  // the same columns of the next row, fetched while this one is computed
  int64_t z_bytes;
};

template <class A, bool kd, E1 e_1> void topk_pass(TopkTerms<A> r, const A* z, int64_t n, A* g) {
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
  TopkCall k;  // its own, for a row may have temperatures and a weight of its own
  const int64_t V = k.student.columns, K = k.teacher.columns, K_padded = whole_steps(K + 1);
  const bool sampled = with_topk_divergence(k.kernel_id, []<class F>() { return F::sampled; });
  const bool off_list = with_topk_divergence(k.kernel_id, []<class F>() { return F::off_list; });
  const bool reverse = with_topk_divergence(k.kernel_id, []<class F>() { return F::reverse; });
  Logits<A> student{k.student, k.transform, k.softcap, k.scale};
  alignas(64) A g_buffer[BLOCK];
  // The list: n columns, the label's after them; `order` has their positions block by block of the row, and `start`
  // where in it a block's begin, and end. With one block, that is all of them in the order they are in.
  const int64_t blocks = std::max<int64_t>(1, (V + BLOCK - 1) / BLOCK);
  std::vector<int64_t> id = std::vector<int64_t>(K_padded);
  std::vector<int32_t> start = std::vector<int32_t>(blocks + 1), order = std::vector<int32_t>(K_padded);
  std::vector<A> z = std::vector<A>(K_padded), slope = z;
  std::vector<double> x = std::vector<double>(K_padded), y = x, p = x, q = x, g = x;  // z; teacher; the gradient
  // Of a shard: the teacher's values at the ids of other shards.
  std::vector<double> y_away = std::vector<double>(k.stage ? K_padded : 0), p_away = y_away;
  int64_t n = 0, n_away = 0, label = 0;
  bool kd = false, ce = false, label_listed = false;  // the terms that the row has
  double z_y = 0;
  A* stats = nullptr;  // m, l, m_c, l_c, m_1, l_1 − 1 (kd_rows.h), and what A rounds off l and l_c
  int squarings = -1;  // that make exp(z) of exp(z/T), −1 if none do
  double rest = 0;     // ∂D/∂s off the list, over exp((z − m_c)/T)

  explicit TopkRows(const TopkCall& call) : k(call) { std::iota(order.begin(), order.end(), 0); }
  A& of_shard(ShardStat stat) const { return stats[int64_t(STATS) + stat]; }

  void row(int64_t i) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    k.of_row(i), squarings = squarings_at(k.temperature);
    student.row = k.student[i], stats = static_cast<A*>(k.stats) + k.stat_columns() * i;
    const int64_t given_label = k.ce ? k.labels[i] : k.ignore_index;
    const bool labelled = k.ce && given_label != k.ignore_index, legal = !labelled || k.legal(given_label);
    label = k.column(given_label);
    const bool selected = k.weights[i] != 0, listed = list(selected ? i : -1);
    kd = selected && listed, ce = labelled && legal;
    gather();
    if (k.stage && !k.at(Stage::STATISTICS)) z_y = of_shard(LABEL_STUDENT);
    const double cross_entropy = k.forward && !k.at(Stage::VALUES) ? statistics() : 0;
    if (k.at(Stage::STATISTICS)) return;
    const auto its_divergence = [&]<class F>() { return divergence<F>(); };
    const double value = kd ? with_topk_divergence(k.kernel_id, its_divergence) : listed ? 0 : nan;
    if (k.gradient) gradient(i, legal && listed, value == INFINITE<double>);
    if (k.at(Stage::VALUES) && !kd) of_shard(VALUE) = A(value), of_shard(WEIGHT) = 0;
    if (!k.forward || k.stage) return;
    A* rows = static_cast<A*>(k.rows);
    rows[i] = A(selected ? k.scaled(i, value) : 0);
    rows[k.student.count + i] = A(ce ? cross_entropy : legal ? 0 : nan);
  }

  // The list of row i, y with it, or an empty one; false, and an empty one, if an id is no column.
  bool list(int64_t i) {
    n = i < 0 ? 0 : K, n_away = 0, label_listed = false;
    Lanes outside = {}, leaving = {}, hits = {};  // leaving: padding, and the columns of other shards
    const int64_t* const from = k.ids + std::max<int64_t>(i, 0) * K;
    if (n > 0) elements(k.teacher.type, k.teacher[i], n, y.data()), copy_padded(from, n, id.data());
    for (int64_t j = 0; j < n; j += WIDTH<double>) {
      const Lanes given = lanes(&id[j]), column = given - k.offset;
      outside |= (given < -1) | (given >= k.vocabulary), hits |= column == label;
      leaving |= (given == -1) | (column < 0) | (column >= V);
      std::memcpy(&id[j], &column, sizeof column);
    }
    label_listed = label >= 0 && any(hits);
    if (any(outside)) return list(-1), false;
    if (any(leaving)) {
      int64_t kept = 0;
      for (int64_t j = 0; j < n; j++)
        if (from[j] != -1 && id[j] >= 0 && id[j] < V) id[kept] = id[j], y[kept++] = y[j];
        else if (from[j] != -1) y_away[n_away++] = y[j];
      n = kept;
    }
    if (blocks == 1) start[1] = int32_t(n);
    else sort();
    if (sampled) add_up();
    std::fill(y.begin() + n, y.end(), nothing());
    std::fill(y_away.begin() + (k.stage ? n_away : 0), y_away.end(), nothing());
    return true;
  }
  // By blocks: counts, which become the ends, and then, from the last position down, the beginnings.
  void sort() {
    std::fill(start.begin(), start.end(), 0);
    for (int64_t j = 0; j < n; j++) start[id[j] / BLOCK]++;
    for (int64_t b = 1; b <= blocks; b++) start[b] += start[b - 1];
    for (int64_t j = n - 1; j >= 0; j--) order[--start[id[j] / BLOCK]] = int32_t(j);
  }
  // use(j) for the positions whose columns are in the block at this column.
  template <class Use> void in_block(int64_t column, const Use& use) {
    const int64_t b = column / BLOCK;
    for (int32_t at = start[b]; at < start[b + 1]; at++) {
      const int32_t j = blocks == 1 ? at : order[at];
      if (id[j] >= 0) use(j);
      asm volatile("");  // else compilers make a loop of scatter instructions of it, which is slower
    }
  }
  double nothing() const { return sampled ? 0 : -INFINITE<double>; }  // y where the teacher has none

  // One of equal ids keeps the sum of their weights; the others leave the list, −1.
  void add_up() {
    int32_t kept[BLOCK];
    for (int64_t block = 0; block < V; block += BLOCK) {
      in_block(block, [&](int32_t j) { kept[id[j] - block] = -1; });
      in_block(block, [&](int32_t j) {
        int32_t& keeper = kept[id[j] - block];
        if (keeper < 0) keeper = j;
        else y[keeper] += y[j], y[j] = 0, id[j] = -1;
      });
    }
  }

  // The student's values at the ids and at the label, before anything is written.
  void gather() {
    id[n] = ce ? label : -1;  // −1 too where it is in another shard
    switch (k.student.type) {
      case ScalarType::Double: gather<double>(); break;
      case ScalarType::Float: gather<float>(); break;
      case ScalarType::BFloat16: gather<BFloat16>(); break;
      default: gather<Half>();
    }
    std::fill(z.begin() + n + 1, z.end(), -INFINITE<A>);
    if (k.transform) cap_and_scale<A>(z.data(), K_padded, student.cap, student.scale, slope.data());
    std::copy(z.begin(), z.end(), x.begin());
    z_y = id[n] < 0 ? 0 : x[n], x[n] = -INFINITE<double>;
  }
  template <class S> void gather() {
    const S* row = (const S*)student.row;
    for (int64_t j = 0; j <= n; j++) {
      if (id[j] >= 0) convert(row + id[j], 1, &z[j]);
      else z[j] = -INFINITE<A>;
    }
  }

  // First pass: the statistics; returns CE, if the row has it.
  double statistics() {
    Softmax<A> s{.c = LOG2E / k.temperature}, one{.c = LOG2E};
    const bool tempered = kd && off_list, shared = ce && tempered && squarings >= 0;
    s.squarings = shared ? squarings : 0;
    double z_sum = 0;
    for (int64_t j = 0, size; j < (ce || tempered ? V : 0); j += size) {
      size = std::min(BLOCK, V - j);
      const A* block = student.block(j, size, start[j / BLOCK] < start[j / BLOCK + 1]);
      if (ce && k.smoothing != 0) z_sum += sum_of(block, size);
      in_block(j, [&](int32_t c) { student.buffer[id[c] - j] = -INFINITE<A>; });
      if (tempered) s.add(block, whole_steps(size));
      if (ce && !shared) one.add(block, whole_steps(size));
    }
    s.settle(), one.settle();
    const A m_c = s.m, l_c = A(s.l);
    const double off = s.l;
    s.merge(x.data(), n, q.data());
    if (shared) one.m = s.m, one.l = squarings ? s.l_1 : s.l;
    else if (ce) one.merge(x.data(), n, g.data());
    stats[STUDENT_MAX] = s.m, stats[STUDENT_SUM] = A(s.l), stats[OTHER_MAX] = m_c, stats[OTHER_SUM] = l_c;
    stats[CE_MAX] = one.m, stats[CE_SUM] = A(one.l - 1);
    stats[WEIGHT_SUM] = A(s.l - stats[STUDENT_SUM]), stats[OWN] = A(off - l_c);
    if (k.stage) {
      of_shard(LABEL_STUDENT) = A(z_y), of_shard(LABEL_TEACHER) = 0, of_shard(COLUMNS) = A(V),
      of_shard(VALUE) = of_shard(WEIGHT) = 0;
      return of_shard(GAP) = k.smoothing == 0 ? 0 : A(gap(one.m, z_sum, V)), 0;
    }
    return ce ? CrossEntropy<double>(k, one.m, one.l - 1).value(z_y, one.m - z_sum / double(V)) : 0;
  }

  // Of numbers >= 0, at once.
  static void logarithms(double (&x)[4]) {
    for (int j = 0; j < 4; j += WIDTH<double>) {
      double of[WIDTH<double>];
      for (int u = 0; u < WIDTH<double>; u++) of[u] = x[std::min(j + u, 3)];
      const D u = load(of), log = log_sum(u - 1, u);
      store(of, u == 0 ? splat(-INFINITE<double>) : log);
      for (int u = 0; u < WIDTH<double> && j + u < 4; u++) x[j + u] = of[u];
    }
  }

  // D, from the statistics as stored; leaves ∂D/∂s on the list in g, and `rest`.
  template <class F> double divergence() {
    const double m = stats[STUDENT_MAX], l = double(stats[STUDENT_SUM]) + stats[WEIGHT_SUM], rate = 1 / k.temperature;
    const double m_c = stats[OTHER_MAX], l_c = double(stats[OTHER_SUM]) + stats[OWN];
    if (l == 0) {
      if (k.at(Stage::VALUES)) of_shard(VALUE) = INFINITE<A>, of_shard(WEIGHT) = 0;
      return INFINITE<double>;
    }
    const double inv_l = 1 / l, q_c = l_c == 0 ? 0 : std::exp((m_c - m) * rate) * inv_l;  // q = exp((z − m_c)/T)·q_c

    // On the list q and p, its sum, and log p = (y − top)·tau − log_total
    const double away = k.stage ? highest(y_away.data(), n_away) : -INFINITE<double>;
    const double top = F::renormalized ? std::max(highest(y.data(), n), away) : 0;
    const double tau = F::renormalized ? k.coefficients[0] / k.teacher_temperature : 1;
    const bool kept = k.forward && !k.stage;  // statistics() has left the student's exponentials in q
    D p_sum = {};
    for (int64_t j = 0; j < n; j += WIDTH<double>) {
      const D t = load(&y[j]), p_j = F::sampled ? t : exp2<double>((t - top) * (tau * LOG2E));
      const D e = kept ? load(&q[j]) : exp2<double>((load(&x[j]) - m) * (rate * LOG2E));
      store(&p[j], p_j), store(&q[j], e * inv_l);
      p_sum += p_j;
    }
    for (int64_t j = 0; j < n_away; j += WIDTH<double>) {
      const D t = load(&y_away[j]), p_j = F::sampled ? t : exp2<double>((t - top) * (tau * LOG2E));
      store(&p_away[j], p_j);
      p_sum += p_j;
    }
    const double mass = added(p_sum);
    const double spread_of_p =
        F::bucket ? spread(p.data(), y.data(), n) + spread(p_away.data(), y_away.data(), n_away) : 0;
    const double left = F::bucket ? teachers_tail(k.teacher.type, spread_of_p, mass, l_c != 0) : 0;
    const double total = F::renormalized || F::bucket ? mass + left : 1, inv_total = 1 / total;
    const double r_s = l_c * q_c, r_t = left * inv_total;
    double logs[] = {l, total, l_c, left};
    logarithms(logs);
    const double log_l = logs[0], log_total = logs[1], log_r_t = logs[3] - log_total;
    const double log_r_s = (m_c - m) * rate + logs[2] - log_l;

    D value_sum = {}, w_sum = {};
    for (int64_t j = 0; j < n; j += WIDTH<double>) {
      const D t = load(&y[j]), s = load(&x[j]), log_q = (s - m) * rate - log_l;
      const D delta = F::sampled ? -log_q : (t - top) * tau - log_total - log_q;
      const TopkColumns c{load(&p[j]) * inv_total, load(&q[j]), delta, t == nothing(), s == -INFINITE<double>};
      const D value = F::value(c), w = F::grad_term(c, value, mass);
      store(&g[j], w);
      value_sum += value, w_sum += w;
    }
    const TopkTails tails{mass, r_s, r_t, log_r_s, log_r_t, q_c, l_c};
    TopkSums columns{added(value_sum), added(w_sum)};
    if (k.offset == 0) columns.value += F::beside(tails);  // once for all shards
    if (k.at(Stage::VALUES)) of_shard(VALUE) = A(columns.value), of_shard(WEIGHT) = A(columns.W);
    if (k.at(Stage::GRADIENT)) columns.value = of_shard(VALUE), columns.W = of_shard(WEIGHT);
    const TopkSums sums = F::complete(columns, tails);
    for (int64_t j = 0; j < n; j++) g[j] -= q[j] * sums.W;
    rest = sums.rest;
    return sums.value;
  }

  // Second pass.
  void gradient(int64_t i, bool legal, bool infinite) {
    char* out = (*k.gradient)[i];
    const double upstream = k.upstream ? (*k.upstream)[i] : 1, b = k.ce_weight / k.n_ce * upstream;
    const double a = k.kd_weight * k.kd_scale * k.weights[i] / (k.n_kd * k.temperature) * upstream;
    const bool of_kd = kd && legal && stats[STUDENT_SUM] != 0 && a != 0 && !(infinite && reverse);
    const bool of_ce = ce && legal && stats[CE_SUM] != -1 && b != 0, dense = of_kd && rest != 0;
    const E1 e_1 = !of_ce ? E1::none : dense && squarings >= 0 ? E1::power : E1::own;
    const double m_c = stats[OTHER_MAX] == -INFINITE<A> ? 0 : stats[OTHER_MAX];
    const CrossEntropy<double> cross_entropy(k, stats[CE_MAX], stats[CE_SUM]);
    TopkTerms<A> r{};
    r.m_c = A(m_c), r.c_s = A(LOG2E / k.temperature), r.rest = dense ? A(a * rest) : 0;
    r.ce.m = A(cross_entropy.m), r.ce.target = A(cross_entropy.target()), r.ce.b = A(b), r.ce.squarings = squarings;
    r.ce.inv_l = A(cross_entropy.q_scale(e_1 == E1::power ? std::exp(m_c - cross_entropy.m) : 1));
    r.z_bytes = size_of(k.student.type);
    const int64_t listed = label_listed ? std::find(id.begin(), id.begin() + n, label) - id.begin() : n;
    double of_label = label_listed && of_kd ? g[listed] : 0;
    if (!label_listed && dense && of_ce) of_label = rest * std::exp((z_y - m_c) / k.temperature);
    if (of_ce) of_label = (a * of_label + b * cross_entropy.gradient(z_y, true)) * (k.transform ? slope[n] : 1);
    if (of_kd || of_ce) on_list(of_kd, a, of_ce ? b : 0, cross_entropy);
    for (int64_t j = 0, size; j < V; j += size) {
      size = std::min(BLOCK, V - j), r.next_z = next_row(k.student, k.weights, i) + j * r.z_bytes;
      A* to = place(k.student.type, out, j, size, g_buffer);
      if (dense || of_ce) {
        emit(r, student.block(j, size, false, true), whole_steps(size), to, dense, e_1);
        student.chain(to, size);
      } else {
        std::fill_n(to, size, A(0));
      }
      if (of_kd || of_ce) in_block(j, [&](int32_t c) { to[id[c] - j] = A(g[c]); });
      if (of_ce && label >= j && label < j + size) to[label - j] = A(of_label);
      write(k.student.type, out, j, size, to);
    }
  }
  // Makes of ∂D/∂s in g the gradient, as of columns that are not the label's.
  void on_list(bool of_kd, double a, double b, const CrossEntropy<double>& cross_entropy) {
    const double scale = cross_entropy.q_scale(), target = cross_entropy.target();
    for (int64_t j = 0; j < n; j += WIDTH<double>) {
      D sum = of_kd ? load(&g[j]) * a : D{};
      if (b != 0) sum += (exp_of(load(&x[j]) - cross_entropy.m) * scale - target) * b;
      if (k.transform)
        for (int u = 0; u < WIDTH<double>; u++) sum[u] *= slope[j + u];
      store(&g[j], sum);
    }
  }
  static void emit(const TopkTerms<A>& r, const A* block, int64_t size, A* to, bool dense, E1 e_1) {
    if (!dense) topk_pass<A, false, E1::own>(r, block, size, to);
    else if (e_1 == E1::none) topk_pass<A, true, E1::none>(r, block, size, to);
    else if (e_1 == E1::power) topk_pass<A, true, E1::power>(r, block, size, to);
    else topk_pass<A, true, E1::own>(r, block, size, to);
  }
};

template <class A> void topk_rows_in(const TopkCall& k, int64_t begin, int64_t end) {
  TopkRows<A> rows(k);
  for (int64_t i = begin; i < end; i++) rows.row(i);
}

inline void topk_rows(const TopkCall& k, int64_t begin, int64_t end) {
  if (k.student.type == ScalarType::Double) topk_rows_in<double>(k, begin, end);
  else topk_rows_in<float>(k, begin, end);
}

}  // namespace FUSEDKD_NAMESPACE
#endif
