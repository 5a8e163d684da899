// The row mathematics of cosine_hidden_loss on the CPU, one row at a time, in the accumulation type A.
//
//   a = (Σx² + ε)^−½, b = (Σy² + ε)^−½, ε = 1e−12: the rule of torch.nn.functional.cosine_embedding_loss, cos = x·y·a·b
//   1 − cos = ½·Σ(a·x − b·y)² + ½·ε·(a² + b²), which loses nothing when the two are close
//   gradient = c·((a·x − b·y) − (1 − cos)·a·x),  c = a·w/n times the upstream
//
// A row pair is read from memory once, 4 + 4 bytes per element in float32, and later sweeps find it in cache; the
// gradient is 4 bytes more.

#include "vec.h"

template <class A> struct CosineRows {
  static constexpr double EPSILON = 1e-12;
  const CosineCall& k;
  explicit CosineRows(const CosineCall& call) : k(call) {}
  alignas(64) A x_buffer[BLOCK], y_buffer[BLOCK], g_buffer[BLOCK];

  void row(int64_t i) {
    const double weight = k.weights ? k.weights[i] : 1;
    const int64_t H = k.student.columns;
    char* out = k.gradient ? (*k.gradient)[i] : nullptr;
    A* stats = static_cast<A*>(k.stats) + 3 * i;
    if (weight == 0) {  // not read
      if (k.forward) static_cast<A*>(k.rows)[i] = stats[0] = stats[1] = stats[2] = 0;
      if (out) std::memset(out, 0, k.gradient->row_bytes());
      return;
    }
    if (k.forward) {
      double xx = 0, yy = 0, sum = 0;
      for (int64_t j = 0; j < H; j += BLOCK) {
        xx += squares(student(i, j), steps(j));
        yy += squares(teacher(i, j), steps(j));
      }
      const A a = A(1 / std::sqrt(xx + EPSILON)), b = A(1 / std::sqrt(yy + EPSILON));
      for (int64_t j = 0; j < H; j += BLOCK) sum += difference(student(i, j), teacher(i, j), steps(j), a, b);
      const double distance = 0.5 * sum + 0.5 * EPSILON * (double(a) * a + double(b) * b);
      stats[0] = a, stats[1] = b, stats[2] = A(distance);
      static_cast<A*>(k.rows)[i] = A(weight * distance);
    }
    if (!out) return;
    const double upstream = k.upstream ? (*k.upstream)[i] : 1;
    const A a = stats[0], b = stats[1], distance = stats[2], c = A(a * (weight / k.normalizer * upstream));
    for (int64_t j = 0; j < H; j += BLOCK) {
      const int64_t n = std::min(BLOCK, H - j);
      A* g = place(k.student.type, out, j, n, g_buffer);
      gradient(student(i, j), teacher(i, j), steps(j), a, b, distance, c, g);
      write(k.student.type, out, j, n, g);
    }
  }

  // The block of columns that starts at j, and its length in whole steps (filled up with 0).
  const A* student(int64_t i, int64_t j) {
    return read<A>(k.student.type, k.student[i], j, std::min(BLOCK, k.student.columns - j), x_buffer, 0);
  }
  const A* teacher(int64_t i, int64_t j) {
    return read<A>(k.teacher.type, k.teacher[i], j, std::min(BLOCK, k.student.columns - j), y_buffer, 0);
  }
  int64_t steps(int64_t j) const { return whole_steps(std::min(BLOCK, k.student.columns - j)); }

  // a·x − b·y without the rounding of the products, which would be all that is left of it near convergence.
  static INLINE Vec<A> apart(Vec<A> x, Vec<A> y, Vec<A> a, Vec<A> b) {
    const Vec<A> by = b * y;
    return fma(a, x, -by) - fma(b, y, -by);
  }

  static double squares(const A* x, int64_t n) {
    Vec<A> sum[PER_STEP<A>] = {};
    for (int64_t j = 0; j < n; j += STEP)
      for (int u = 0; u < PER_STEP<A>; u++) {
        const Vec<A> value = load(x + j + u * WIDTH<A>);
        sum[u] = fma(value, value, sum[u]);
      }
    return total<A>(sum);
  }

  static double difference(const A* x, const A* y, int64_t n, A a, A b) {
    Vec<A> sum[PER_STEP<A>] = {};
    for (int64_t j = 0; j < n; j += STEP)
      for (int u = 0; u < PER_STEP<A>; u++) {
        const Vec<A> d = apart(load(x + j + u * WIDTH<A>), load(y + j + u * WIDTH<A>), splat(a), splat(b));
        sum[u] = fma(d, d, sum[u]);
      }
    return total<A>(sum);
  }

  static void gradient(const A* x, const A* y, int64_t n, A a, A b, A distance, A c, A* g) {
    for (int64_t j = 0; j < n; j += WIDTH<A>) {
      const Vec<A> here = load(x + j), there = load(y + j);
      store(g + j, (apart(here, there, splat(a), splat(b)) - here * a * distance) * c);
    }
  }
};

inline void cosine_rows(const CosineCall& k, int64_t begin, int64_t end) {
  if (k.student.type == ScalarType::Double) {
    CosineRows<double> rows(k);
    for (int64_t i = begin; i < end; i++) rows.row(i);
  } else {
    CosineRows<float> rows(k);
    for (int64_t i = begin; i < end; i++) rows.row(i);
  }
}
