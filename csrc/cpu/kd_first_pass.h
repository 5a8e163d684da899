// What the rows of kd_rows.h are whatever the divergence: buffers, first pass, the terms of the later ones. Compiled
// once per instruction set (isa.h).
#ifndef FUSEDKD_KD_FIRST_PASS
#define FUSEDKD_KD_FIRST_PASS

#include "call.h"
#include "kd_pass.h"
#include "logits.h"
#include "softmax.h"

namespace FUSEDKD_NAMESPACE {

// One thread's rows. The members after the buffers describe the current one.
template <class A> struct KdRows {
  KdCall k;  // its own, for a row may have temperatures, weights and coefficients of its own
  const int64_t V = k.student.columns, C = k.teacher.columns;
  Logits<A> student{k.student, k.transform, k.softcap, k.scale};
  Logits<A> teacher{k.teacher, k.transform, k.teacher_softcap, k.teacher_scale};
  alignas(64) A g_buffer[BLOCK], w_buffer[BLOCK];
  std::vector<A> e_s, e_t;      // exponentials of the C columns,
  std::vector<A> top_s, top_t;  // and the maximum that each block's are relative to; forward only
  std::vector<A> w;             // of a row whose exponentials are needed again, w has a place of its own
  int64_t label, excluded;      // excluded: the column that the divergence does without, −1 if none
  bool kd, ce, broken;          // the terms that the row has; whether its label is no column
  bool value_known = false;     // D and W are, by the row with the sides exchanged
  A z_y, v_y, *stats;  // logits of the label, 0 where there is none; m and l − 1, which has the digits that l lacks
                       // near 1, of the three softmaxes; W
  int squarings;       // that make e_1 of e_s, −1 if none do
  double value, cross_entropy_value;

  explicit KdRows(const KdCall& call) : k(call) {}
  virtual ~KdRows() = default;
  virtual void start(int64_t i) = 0;               // what is known of the row before it is read
  virtual void first_pass() = 0;                   // statistics
  virtual void finish(int64_t i) = 0;              // value and gradient
  virtual void take_value(const KdRows& own) = 0;  // what D, the same from both sides, says of W

  void row(int64_t i) {
    start(i), first_pass();
    if (!k.at(Stage::STATISTICS)) finish(i);
  }
  // The row whose sides `own` has the other way round: it has done the first pass, and needs its exponentials no more.
  void row_after(KdRows& own, int64_t i) {
    start(i);
    const auto exchange = [&] { e_s.swap(own.e_t), e_t.swap(own.e_s), top_s.swap(own.top_t), top_t.swap(own.top_s); };
    exchange();
    std::fill_n(stats, int64_t(STATS), A(0));
    stats[STUDENT_MAX] = own.stats[OTHER_MAX], stats[STUDENT_SUM] = own.stats[OTHER_SUM];
    stats[OTHER_MAX] = own.stats[STUDENT_MAX], stats[OTHER_SUM] = own.stats[STUDENT_SUM];
    stats[CE_MAX] = -INFINITE<A>, stats[CE_SUM] = -1;  // it has no cross-entropy
    take_value(own);
    finish(i);
    exchange();
  }

  // How many columns the block at j has: blocks end where the common columns do.
  int64_t block_at(int64_t j) const { return std::min(BLOCK, (j < C ? C : V) - j); }

  // First pass: the statistics, of the KD term's softmaxes if `tempered`; returns CE, if the row has it.
  [[gnu::noinline]] double statistics(bool tempered) {
    Softmax<A> s{.c = LOG2E / k.temperature}, t{.c = LOG2E / k.teacher_temperature}, one{.c = LOG2E};
    const bool shared = ce && squarings >= 0;
    s.squarings = shared ? squarings : 0;
    double z_sum = 0;
    for (int64_t j = 0, n; j < (ce ? V : tempered ? C : 0); j += n) {
      n = block_at(j);
      const A* z = student.block(j, n);
      if (ce && !shared) one.add(z, whole_steps(n));
      if (ce && k.smoothing != 0) z_sum += sum_of(z, n);
      if (!tempered || j >= C) continue;
      s.add(student.without(excluded, z, j, n), whole_steps(n), k.stage ? nullptr : &e_s[j]);
      t.add(teacher.without(excluded, teacher.block(j, n), j, n), whole_steps(n), k.stage ? nullptr : &e_t[j]);
      if (!k.stage) top_s[j / BLOCK] = s.m, top_t[j / BLOCK] = t.m;
    }
    s.settle(), t.settle(), one.settle();
    if (shared) one.m = s.m, one.l = squarings ? s.l_1 : s.l;
    std::fill_n(stats, k.stat_columns(), A(0));
    stats[STUDENT_MAX] = s.m, stats[STUDENT_SUM] = A(s.l - 1), stats[OTHER_MAX] = t.m, stats[OTHER_SUM] = A(t.l - 1);
    stats[CE_MAX] = one.m, stats[CE_SUM] = A(one.l - 1);
    if (k.stage) of_shard(LABEL_STUDENT) = z_y, of_shard(LABEL_TEACHER) = v_y, of_shard(COLUMNS) = A(V);
    if (k.stage) return of_shard(GAP) = k.smoothing == 0 ? 0 : A(gap(one.m, z_sum, V)), 0;
    return ce ? CrossEntropy<double>(k, one.m, one.l - 1).value(z_y, one.m - z_sum / double(V)) : 0;
  }

  A& of_shard(ShardStat stat) const { return stats[int64_t(STATS) + stat]; }
  double l_s() const { return 1 + double(stats[STUDENT_SUM]); }
  double l_t() const { return 1 + double(stats[OTHER_SUM]); }
  double l_1() const { return 1 + double(stats[CE_SUM]); }
  CrossEntropy<double> cross_entropy() const { return {k, stats[CE_MAX], stats[CE_SUM]}; }

  // What the later passes need, from the statistics as stored.
  Terms<A> terms(double a, double b) const {
    Terms<A> r{};
    r.template set_softmaxes<double>(k, {double(stats[STUDENT_MAX]), double(stats[STUDENT_SUM])},
                                     {double(stats[OTHER_MAX]), double(stats[OTHER_SUM])});
    r.a = A(a), r.ce.b = A(b), r.ce.squarings = squarings;
    if (ce) {
      const CrossEntropy<double> cross_entropy = this->cross_entropy();
      r.ce.m = stats[CE_MAX], r.ce.inv_l = A(cross_entropy.q_scale()), r.ce.target = A(cross_entropy.target());
    }
    r.z_bytes = size_of(k.student.type), r.v_bytes = size_of(k.teacher.type);
    return r;
  }

  // The gradient of n columns from their w, or of the cross-entropy alone.
  template <bool centred, bool kept>
  [[gnu::noinline]] static void emit(const Terms<A>& r, const A* z, const A* w, int64_t n, A* g, bool kd, E1 e_1) {
    using Given = GivenTerms<centred>;
    n = whole_steps(n);
    if (!kd) pass<NoDivergence, A, false, Out::gradient, E1::own>({}, r, z, nullptr, n, g);
    else if (e_1 == E1::none) pass<Given, A, kept, Out::gradient, E1::none>({}, r, z, w, n, g);
    else if (e_1 == E1::power) pass<Given, A, kept, Out::gradient, E1::power>({}, r, z, w, n, g);
    else pass<Given, A, kept, Out::gradient, E1::own>({}, r, z, w, n, g);
  }
};

}  // namespace FUSEDKD_NAMESPACE
#endif
