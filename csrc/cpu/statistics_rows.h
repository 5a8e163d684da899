// The statistics of a row of logits beside its loss (fusedkd/backends/statistics.py), of student and teacher over the C
// columns that they share. Compiled once per instruction set (isa.h).
//
//   q = exp((z − m)/T)/l, m the maximum, l = Σ exp((z − m)/T); p likewise of v
//   entropy = log l − Σ q·(z − m)/T,  log q_y = (z_y − m)/T − log l,  total variation = ½·Σ|p − q|
//
// Two passes over the row pair, of which the second finds it in the cache.
#ifndef FUSEDKD_STATISTICS_ROWS
#define FUSEDKD_STATISTICS_ROWS

#include "call.h"
#include "logits.h"
#include "softmax.h"
#include "vec.h"

namespace FUSEDKD_NAMESPACE {

template <class A> struct StatisticsSide {
  Logits<A> logits;
  double temperature = 1;
  A m = 0, c = 0, inv_l = 0;
  double log_l = 0;

  void first_pass(int64_t columns) {
    Softmax<A> s{.c = LOG2E / temperature};
    for (int64_t j = 0; j < columns; j += BLOCK) {
      const int64_t n = std::min(BLOCK, columns - j);
      s.add(logits.block(j, n), whole_steps(n));
    }
    s.settle();
    m = s.m == -INFINITE<A> ? 0 : s.m, c = A(LOG2E / temperature), inv_l = A(1 / s.l), log_l = std::log(s.l);
  }
  // q of a vector of columns; `sum` gets Σ q·(z − m).
  INLINE Vec<A> probabilities(Vec<A> x, Vec<A>& sum) const {
    constexpr A most = A(1e30);  // of −∞ times 0; a NaN stays one
    const Vec<A> below = x - m, q = exp2<A>(below * c) * inv_l;
    sum = fma(q, max(splat(-most), below), sum);
    return q;
  }
  double entropy(const Vec<A> (&sum)[PER_STEP<A>]) const { return log_l - total<A>(sum) / temperature; }
  double logprob(int64_t column) { return (double(*logits.block(column, 1)) - m) / temperature - log_l; }
};

template <class A> void statistics_rows_in(const StatisticsCall& call, int64_t begin, int64_t end) {
  LogitsCall k = call;
  StatisticsSide<A> student{{k.student, k.transform, k.softcap, k.scale}};
  StatisticsSide<A> teacher{{k.teacher, k.transform, k.teacher_softcap, k.teacher_scale}};
  A* const found = static_cast<A*>(k.stats);
  for (int64_t i = begin; i < end; i++) {
    const auto put = [&](int64_t which, double value) { found[which * k.student.count + i] = A(value); };
    const int64_t y = k.labels ? k.labels[i] : -1;
    const bool selected = k.weights[i] != 0;
    const bool labelled = selected && k.labels && y != k.ignore_index && y >= 0 && y < call.columns;
    for (int64_t which = 0; which < 5; which++) put(which, 0);
    if (!selected) continue;
    k.of_row(i);
    student.logits.row = k.student[i], student.temperature = k.temperature, student.first_pass(call.columns);
    if (call.of_teacher)
      teacher.logits.row = k.teacher[i], teacher.temperature = k.teacher_temperature, teacher.first_pass(call.columns);
    Vec<A> of_student[PER_STEP<A>] = {}, of_teacher[PER_STEP<A>] = {}, apart[PER_STEP<A>] = {};
    for (int64_t j = 0; j < call.columns; j += BLOCK) {
      const int64_t n = whole_steps(std::min(BLOCK, call.columns - j));
      const A* z = student.logits.block(j, std::min(BLOCK, call.columns - j));
      const A* v = call.of_teacher ? teacher.logits.block(j, std::min(BLOCK, call.columns - j)) : nullptr;
      for (int64_t at = 0; at < n; at += STEP)
        for (int u = 0; u < PER_STEP<A>; u++) {
          const Vec<A> q = student.probabilities(load(z + at + u * WIDTH<A>), of_student[u]);
          if (!v) continue;
          apart[u] += absolute(teacher.probabilities(load(v + at + u * WIDTH<A>), of_teacher[u]) - q);
        }
    }
    put(0, student.entropy(of_student));
    if (labelled) put(2, student.logprob(y));
    if (!call.of_teacher) continue;
    put(1, teacher.entropy(of_teacher)), put(4, total<A>(apart) / 2);
    if (labelled) put(3, teacher.logprob(y));
  }
}

inline void statistics_rows(const StatisticsCall& call, int64_t begin, int64_t end) {
  if (call.student.type == ScalarType::Double) statistics_rows_in<double>(call, begin, end);
  else statistics_rows_in<float>(call, begin, end);
}

}  // namespace FUSEDKD_NAMESPACE
#endif
