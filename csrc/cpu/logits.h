// A row of logits as the loss sees it: in the accumulation type, soft-capped and scaled. Compiled once per instruction
// set (isa.h).
#ifndef FUSEDKD_LOGITS
#define FUSEDKD_LOGITS

#include "vec.h"

namespace FUSEDKD_NAMESPACE {

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

// One side's logits, a block of columns of a row at a time.
template <class A> struct Logits {
  const Rows& rows;
  const bool transform;
  const A cap, scale;
  const char* row = nullptr;
  alignas(64) A buffer[BLOCK], slope[BLOCK];

  Logits(const Rows& rows, bool transform, double cap, double scale)
      : rows(rows), transform(transform), cap(A(cap)), scale(A(scale)) {}

  // Columns [j, j + n), n <= BLOCK, filled up with −∞ to whole steps; in `buffer` if `copy`. `slope` gets the
  // derivative of soft-cap and scale there, if there is any and it is wanted.
  const A* block(int64_t j, int64_t n, bool copy = false, bool with_slope = false) {
    const A* x = read(rows.type, row, j, n, buffer, -INFINITE<A>, copy || transform);
    if (transform) cap_and_scale<A>(buffer, whole_steps(n), cap, scale, with_slope ? slope : nullptr);
    return x;
  }
  // The same without column `left_out`, which is −∞ then; x is what block() returned.
  const A* without(int64_t left_out, const A* x, int64_t j, int64_t n) {
    if (left_out < j || left_out >= j + n) return x;
    if (x != buffer) std::copy_n(x, whole_steps(n), buffer);
    buffer[left_out - j] = -INFINITE<A>;
    return buffer;
  }
  // Times what with_slope left.
  void chain(A* gradient, int64_t n) const {
    if (transform)
      for (int64_t j = 0; j < n; j++) gradient[j] *= slope[j];
  }
};

// Σ x of n columns, by partial sums of the distance to the first, which keeps the digits of logits far from 0.
template <class A> double sum_of(const A* x, int64_t n) {
  const A from = std::isfinite(x[0]) ? x[0] : 0;
  double partial[STEP] = {}, rest = 0;
  int64_t j = 0;
  for (; j + STEP <= n; j += STEP)
    for (int u = 0; u < STEP; u++) partial[u] += x[j + u] - from;
  for (; j < n; j++) rest += x[j] - from;
  for (int u = 0; u < STEP; u++) rest += partial[u];
  return rest + double(n) * from;
}

// What a pass fetches while it works on a row: the same columns of the next.
inline const char* next_row(const Rows& rows, const float* weights, int64_t i) {
  return rows[i + 1 < rows.count && weights[i + 1] != 0 ? i + 1 : i];
}

}  // namespace FUSEDKD_NAMESPACE
#endif
