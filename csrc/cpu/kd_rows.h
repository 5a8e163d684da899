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
// Two passes over a row pair where W is known beforehand, as for forward KL. The first, statistics(), reads it from
// memory, finds m and l block by block (softmax.h) and keeps the exponentials; the second, gradient(), finds all of it
// in L2 and computes value and gradient. Where W is needed first, weight_sum() between them leaves w in the place of
// the teacher's exponentials, and the last pass computes the gradient of it. Per column 4 + 4 bytes read and 4 written
// in float32, 2 + 2 + 2 in 16 bits. Exponentials: the first pass's two; e_1 = exp(z − m_1) is a power of
// e_s = exp((z − m_s)/T_s) at T_s = 1, 2, 4 where C = V, one more otherwise. Backward, which starts from the statistics
// and W, is one pass for every divergence, and computes the exponentials anew. The gradients of both sides, by
// kd_rows_both, are that of D and that of D with the sides exchanged, whose first pass is D's seen from the other side,
// and which has one pass more, with the exponentials kept, where D or its statistics tell W; two where not.
// Compiled once per instruction set (isa.h).
#ifndef FUSEDKD_KD_ROWS
#define FUSEDKD_KD_ROWS

#include "kd_first_pass.h"

namespace FUSEDKD_NAMESPACE {

// Those of one divergence. `needs_weight_sum`: D and W take a pass of their own before the gradient. A form that needs
// D alone, for the gradient to be 0 where it is infinite, can do without: such a row is then written twice.
template <class A, class Divergence, bool needs_weight_sum = Divergence::needs_weight_sum>
struct DivergenceRows : KdRows<A> {
  using Base = KdRows<A>;
  using Base::k, Base::V, Base::C, Base::kd, Base::ce, Base::label, Base::excluded, Base::stats, Base::z_y, Base::v_y;
  using Base::student, Base::teacher, Base::of_shard;
  static constexpr bool softmax = Divergence::softmax, twice = Divergence::needs_weight_sum && !needs_weight_sum;
  static constexpr bool excludes_label = Divergence::excludes_label;

  // What the last pass does: D, and the gradients of either term.
  struct Wanted {
    bool value, of_kd, of_ce;
  };

  explicit DivergenceRows(const KdCall& call) : Base(call) {
    if (!k.forward || (!softmax && !needs_weight_sum)) return;
    const int64_t kept = whole_steps(k.stage ? std::min(BLOCK, C) : C);
    this->e_s.resize(kept), this->e_t.resize(kept);
    this->top_s.resize(C / BLOCK + 1), this->top_t.resize(C / BLOCK + 1);
    if (needs_weight_sum && k.both) this->w.resize(kept);
  }

  void start(int64_t i) override {
    k.of_row(i);
    student.row = k.student[i], teacher.row = k.teacher[i], stats = static_cast<A*>(k.stats) + k.stat_columns() * i,
    excluded = -1;
    const int64_t given_label = k.labels ? k.labels[i] : k.ignore_index;
    const bool labelled = k.labels && k.ce && given_label != k.ignore_index, legal = k.legal(given_label);
    const bool common = k.labels && legal && (k.stage || given_label < C);  // the label's column is
    label = k.column(given_label);
    kd = k.weights[i] != 0 && C > 0 && (!excludes_label || common), ce = labelled && legal;
    this->broken = labelled && !legal;
    this->squarings = kd && C == V && softmax && !excludes_label ? squarings_at(k.temperature) : -1;
    if (k.stage && !k.at(Stage::STATISTICS)) {
      z_y = of_shard(LABEL_STUDENT), v_y = of_shard(LABEL_TEACHER);
    } else {
      z_y = label >= 0 && (ce || (excludes_label && kd)) ? *student.block(label, 1) : 0;
      v_y = label >= 0 && kd && common ? *teacher.block(label, 1) : 0;
    }
    if (excludes_label && kd) excluded = label;
  }

  void first_pass() override {
    this->cross_entropy_value = k.forward && !k.at(Stage::VALUES) ? this->statistics(kd && softmax) : 0;
  }

  void finish(int64_t i) override {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const double value = this->value = value_and_gradient(i);
    if (twice && std::isinf(A(value))) stats[WEIGHT_SUM] = A(value), value_and_gradient(i);
    if (k.at(Stage::VALUES)) {
      of_shard(VALUE) = A(kd ? value : excludes_label && k.weights[i] != 0 ? nan : 0);
      of_shard(WEIGHT) = kd ? stats[WEIGHT_SUM] : A(0);
    }
    A* rows = static_cast<A*>(k.rows);
    if (!k.forward || k.stage || !rows) return;
    rows[i] = A(kd ? k.scaled(i, value) : excludes_label && k.weights[i] != 0 ? nan : 0);
    rows[k.student.count + i] = A(ce ? this->cross_entropy_value : this->broken ? nan : 0);
  }

  // W of reverse KL is D of forward KL; of forms that need no more, W says whether D is infinite.
  void take_value(const KdRows<A>& own) override {
    const bool reverse = k.kernel_id == KernelId::JEFFREYS && own.k.kernel_id == KernelId::FORWARD_KL;
    this->value_known = reverse || !Divergence::needs_weight_sum || !Divergence::centred;
    const bool dead = softmax && (this->l_s() == 0 || this->l_t() == 0);
    if (!this->value_known || !Divergence::needs_weight_sum || dead) return;
    const A D = A(reverse ? k.coefficients[1] * own.value : own.value);
    stats[WEIGHT_SUM] = reverse || !std::isfinite(D) ? D : A(0);
  }

  // The later passes; returns D. All but the kept exponentials follows from the statistics as stored.
  double value_and_gradient(int64_t i) {
    const double upstream = k.upstream ? (*k.upstream)[i] : 1, b = k.ce_weight / k.n_ce * upstream;
    const double a = k.kd_weight * k.kd_scale * k.weights[i] / (k.n_kd * k.temperature) * upstream;
    Terms<A> row = this->terms(a, b);
    const double l_s = this->l_s(), l_t = this->l_t();
    const Divergence divergence(k.coefficients, RowSums<double>{l_s, l_t, double(k.stage ? k.vocabulary : C),
                                                                odds_of_student(), odds_of_teacher()});
    const bool no_student = softmax && l_s == 0 && (!excludes_label || z_y == -INFINITE<A>);
    const bool no_teacher = softmax && l_t == 0, has_teacher = excludes_label || !no_teacher;
    const bool alive = kd && !no_student && has_teacher;
    double value = kd && no_student && has_teacher ? INFINITE<double> : 0;
    Wanted wanted{k.forward && alive && !this->value_known, k.gradient && alive && !this->broken && a != 0,
                  k.gradient && ce && this->l_1() != 0 && b != 0};
    if (twice) wanted.of_kd = wanted.of_kd && !std::isinf(stats[WEIGHT_SUM]);
    if constexpr (excludes_label) {
      if (alive && (label >= 0 || !k.stage)) value = divergence.label_value;
      if (alive) row.centre = divergence.centre;
    }
    bool given = false;  // w
    if constexpr (needs_weight_sum) {
      if (wanted.value) {
        const Sums sums = weight_sum(i, row, divergence, wanted.of_kd);
        value = sums.value, wanted.value = false, given = !k.stage;
        stats[WEIGHT_SUM] = !std::isfinite(A(value)) ? A(value) : Divergence::centred ? A(sums.weight) : 0;
      }
      row.centre = stats[WEIGHT_SUM];
      wanted.of_kd = wanted.of_kd && !std::isinf(stats[WEIGHT_SUM]);
    }
    return gradient(i, row, divergence, wanted, given, value);
  }

  // The pass before the gradient: D, W, and w, which usually takes the place of e_t where it is going to be needed.
  Sums weight_sum(int64_t i, Terms<A>& r, const Divergence& divergence, bool keep) {
    Sums sums;
    for (int64_t j = 0, n; j < C; j += n) {
      n = this->block_at(j);
      A* w = keep ? kept_w(j) : this->w_buffer;
      move_to(j, i, r);
      const A *z = student.block(j, n), *v = teacher.block(j, n);
      if (k.stage) keep_again(r, z, v, n);
      sums += pass<Divergence, A, true, Out::grad_term>(divergence, r, z, v, whole_steps(n), w);
    }
    return sums;
  }

  A* kept_w(int64_t j) { return this->w.empty() ? &this->e_t[j] : &this->w[j]; }

  // The last pass: the gradient; returns D, `value` and what the columns add to it.
  double gradient(int64_t i, Terms<A>& r, const Divergence& divergence, Wanted wanted, bool given, double value) {
    char* out = k.gradient ? (*k.gradient)[i] : nullptr;
    const E1 e_1 = !wanted.of_ce ? E1::none : this->squarings >= 0 && wanted.of_kd ? E1::power : E1::own;
    for (int64_t j = 0, n; j < (wanted.of_ce ? V : wanted.of_kd || wanted.value ? C : 0); j += n) {
      n = this->block_at(j);
      const bool common = j < C;
      const Wanted wanted_here{wanted.value && common, wanted.of_kd && common, wanted.of_ce};
      const A* z = student.block(j, n, false, true);
      A* g = out ? place(k.student.type, out, j, n, this->g_buffer) : nullptr;
      const E1 from = common ? e_1 : E1::own;
      if (common) move_to(j, i, r);
      if (given) {
        this->template emit<Divergence::centred, true>(r, z, kept_w(j), n, g, wanted_here.of_kd, from);
      } else {
        const A* v = nullptr;
        if (wanted_here.of_kd || wanted_here.value) {
          v = teacher.without(excluded, teacher.block(j, n), j, n), z = student.without(excluded, z, j, n);
          if (wanted_here.value && k.stage) keep_again(r, z, v, n);
        }
        value += in_one_pass(r, divergence, z, v, n, g, wanted_here, from);
        if (!wanted_here.of_kd && !wanted_here.of_ce) continue;
      }
      if (label >= j && label < j + n && (wanted.of_ce || (excludes_label && wanted.of_kd)))
        g[label - j] = at_label(r, divergence, wanted_here.of_kd, from);
      student.chain(g, n);
      write(k.student.type, out, j, n, g);
    }
    const int64_t bytes = size_of(k.student.type), written = wanted.of_ce ? V : wanted.of_kd ? C : 0;
    if (out && written < V) std::memset(out + written * bytes, 0, (V - written) * bytes);
    return value;
  }

  // Value (returned) and gradient of a block.
  static double in_one_pass(const Terms<A>& r, const Divergence& divergence, const A* z, const A* v, int64_t n, A* g,
                            Wanted wanted, E1 e_1) {
    n = whole_steps(n);
    double sum = 0;
    if constexpr (!needs_weight_sum) {
      if (wanted.value && !wanted.of_kd)
        sum = pass<Divergence, A, true, Out::none>(divergence, r, z, v, n, nullptr).value;
      if (wanted.value && wanted.of_kd) sum = fused<true>(r, divergence, z, v, n, g, e_1);
    }
    if (!wanted.of_kd && wanted.of_ce) Base::template emit<false, false>(r, z, nullptr, n, g, false, e_1);
    if (wanted.of_kd && !wanted.value) fused<false>(r, divergence, z, v, n, g, e_1);
    return sum;
  }
  template <bool value>
  static double fused(const Terms<A>& r, const Divergence& divergence, const A* z, const A* v, int64_t n, A* g,
                      E1 e_1) {
    constexpr Out out = Out::gradient;
    constexpr E1 power = excludes_label ? E1::own : E1::power;  // no exponential of the label's column is kept
    if (e_1 == E1::none) return pass<Divergence, A, value, out, E1::none>(divergence, r, z, v, n, g).value;
    if (e_1 == E1::own) return pass<Divergence, A, value, out, E1::own>(divergence, r, z, v, n, g).value;
    return pass<Divergence, A, value, out, power>(divergence, r, z, v, n, g).value;
  }

  // The label's column once more, with its own target, in float64.
  [[gnu::noinline]] A at_label(Terms<A>& r, const Divergence& divergence, bool of_kd, E1 e_1) {
    A z[STEP], v[STEP], w[STEP], g[STEP];
    std::fill_n(z, STEP, z_y), std::fill_n(v, STEP, v_y);
    r.next_z = student.row, r.next_v = teacher.row, g[0] = 0;
    if (of_kd) {
      pass<Divergence, A, false, Out::grad_term>(divergence, r, z, v, STEP, w);
      if constexpr (excludes_label) std::fill_n(w, STEP, A(divergence.centre));
      this->template emit<needs_weight_sum && Divergence::centred, false>(r, z, w, STEP, g, true, E1::none);
    }
    if (e_1 == E1::none) return g[0];
    return A(g[0] + r.ce.b * this->cross_entropy().gradient(z_y, true));
  }

  // The log odds of the label against all other columns.
  double odds_of_student() const { return log_odds<double>(z_y, stats[STUDENT_MAX], 1 / k.temperature, this->l_s()); }
  double odds_of_teacher() const {
    return log_odds<double>(v_y, stats[OTHER_MAX], 1 / k.teacher_temperature, this->l_t());
  }

  // The exponentials of a shard's block, which no first pass has kept: relative to the maxima over all shards.
  void keep_again(Terms<A>& r, const A* z, const A* v, int64_t n) {
    if (!softmax) return;
    for (int64_t j = 0; j < whole_steps(n); j += WIDTH<A>) {
      store(&this->e_s[j], exp2<A>((load(z + j) - r.m_s) * r.c_s));
      store(&this->e_t[j], exp2<A>((load(v + j) - r.m_t) * r.c_t));
    }
    r.kept = {this->e_s.data(), this->e_t.data(), r.inv_l_s, r.inv_l_t, r.ce.inv_l};
  }

  // Makes the row's terms those of the block at j, for a pass that goes from block to block: with its kept
  // exponentials, which were relative to another maximum.
  void move_to(int64_t j, int64_t i, Terms<A>& r) const {
    r.next_z = next_row(k.student, k.weights, i) + j * r.z_bytes;
    r.next_v = next_row(k.teacher, k.weights, i) + j * r.v_bytes;
    if (!kd || !softmax || !k.forward || k.stage) return;
    const int64_t block = j / BLOCK;
    r.kept.e_s = &this->e_s[j], r.kept.e_t = &this->e_t[j];
    if (j > 0 && this->top_s[block] == this->top_s[block - 1] && this->top_t[block] == this->top_t[block - 1]) return;
    const double l_s = this->l_s(), l_t = this->l_t();
    const double rise_s = (double(this->top_s[block]) - r.m_s) * LOG2E / k.temperature;
    const double rise_t = (double(this->top_t[block]) - r.m_t) * LOG2E / k.teacher_temperature;
    r.kept.inv_l_s = l_s == 0 ? 0 : A(std::exp2(rise_s) / l_s);
    r.kept.inv_l_t = l_t == 0 ? 0 : A(std::exp2(rise_t) / l_t);
    if (ce && this->squarings >= 0)
      r.kept.inv_l_1 = A(this->cross_entropy().q_scale(std::exp2(std::ldexp(rise_s, r.ce.squarings))));
  }
};

// Calls use(rows) with the KdRows of a call.
template <class A, class Use> void with_rows(const KdCall& k, const Use& use) {
  const bool in_place = k.gradient && k.gradient->data == k.student.data;  // no row can be written twice
  with_divergence<A>(k.kernel_id, [&]<class Divergence>() {
    if constexpr (Divergence::needs_weight_sum && !Divergence::centred) {
      if (!in_place) {
        DivergenceRows<A, Divergence, false> rows(k);
        return use(rows);
      }
    }
    DivergenceRows<A, Divergence> rows(k);
    use(rows);
  });
}

template <class A> void kd_rows_in(const KdCall& k, int64_t begin, int64_t end) {
  with_rows<A>(k, [&](KdRows<A>& rows) {
    for (int64_t i = begin; i < end; i++) rows.row(i);
  });
}

inline void kd_rows(const KdCall& k, int64_t begin, int64_t end) {
  if (k.student.type == ScalarType::Double) kd_rows_in<double>(k, begin, end);
  else kd_rows_in<float>(k, begin, end);
}

template <class A> void kd_rows_both_in(const KdCall& k, const KdCall& exchanged, int64_t begin, int64_t end) {
  with_rows<A>(k, [&](KdRows<A>& own) {
    with_rows<A>(exchanged, [&](KdRows<A>& other) {
      for (int64_t i = begin; i < end; i++) own.row(i), other.row_after(own, i);
    });
  });
}

inline void kd_rows_both(const KdCall& k, const KdCall& exchanged, int64_t begin, int64_t end) {
  if (k.student.type == ScalarType::Double) kd_rows_both_in<double>(k, exchanged, begin, end);
  else kd_rows_both_in<float>(k, exchanged, begin, end);
}

}  // namespace FUSEDKD_NAMESPACE
#endif
