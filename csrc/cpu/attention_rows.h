// The squared error between the scores of attention maps, LogitMSE of divergences.h: value and gradient in one pass
// over a tile that products have just made. (kd_rows.h, whose rows are of any type and may have other terms, takes
// several.) Compiled once per instruction set (isa.h).
#ifndef FUSEDKD_ATTENTION_ROWS
#define FUSEDKD_ATTENTION_ROWS

#include "../common/divergences.h"
#include "call.h"
#include "vec.h"

namespace FUSEDKD_NAMESPACE {

class ScoreRows {
 public:
  explicit ScoreRows(const ScoresCall& call)
      : k(call), form(call.coefficients, RowSums<double>{1, 1, double(call.keys), 0, 0}) {}

  void row(int64_t i) const {
    float* z = k.z + i * k.columns;
    const double weight = k.weights[i] * k.scale;
    if (weight == 0) {  // not read
      k.losses[i] = 0;
      if (k.gradient) std::fill(z, z + k.columns, 0.0f);
      return;
    }
    const float slope = float(weight / k.normalizer * (k.upstream ? k.upstream[i] : 1));
    const double loss = k.gradient ? pass<true>(z, k.t + i * k.columns, slope) : pass<false>(z, k.t + i * k.columns, 0);
    k.losses[i] = float(weight * loss);
    if (k.gradient && std::isinf(loss)) std::fill(z, z + k.columns, 0.0f);
  }

 private:
  static constexpr int GROUP = 4;  // vectors, each with a sum of its own

  // D of a row; where WRITES, its gradient goes to the place of z.
  template <bool WRITES> double pass(float* z, const float* t, float slope) const {
    F sums[GROUP] = {};
    const F by = splat(slope);
    const auto vector = [&](const float* from, const float* other, float* to, F& sum) FLAT {
      const F x = load(from), y = load(other);
      const Column<F> column{x, y, {}, {}, {}, {}, {}, y == -INFINITE<float>, x == -INFINITE<float>};
      sum += form.value(column);
      if constexpr (WRITES) store(to, form.grad_term(column) * by);
    };
    constexpr int64_t width = WIDTH<float>;
    int64_t j = 0;
    for (; j + GROUP * width <= k.columns; j += GROUP * width)
      for (int v = 0; v < GROUP; v++) vector(z + j + v * width, t + j + v * width, z + j + v * width, sums[v]);
    for (; j + width <= k.columns; j += width) vector(z + j, t + j, z + j, sums[0]);
    if (j < k.columns) {
      float x[width] = {}, y[width] = {};
      std::copy(z + j, z + k.columns, x), std::copy(t + j, t + k.columns, y);
      vector(x, y, x, sums[0]);
      if (WRITES) std::copy(x, x + (k.columns - j), z + j);
    }
    double total = 0;
    for (const F& sum : sums)
      for (int lane = 0; lane < width; lane++) total += double(sum[lane]);
    return total;
  }

  const ScoresCall& k;
  const LogitMSE<float> form;
};

inline void score_rows(const ScoresCall& k, int64_t begin, int64_t end) {
  const ScoreRows rows(k);
  for (int64_t i = begin; i < end; i++) rows.row(i);
}

}  // namespace FUSEDKD_NAMESPACE
#endif
