// The row mathematics of cosine_hidden_loss on the CPU, one row at a time, in the accumulation type A.
//
//   a = (Σx² + ε)^−½, b = (Σy² + ε)^−½, ε = 1e−12: the rule of torch.nn.functional.cosine_embedding_loss, cos = x·y·a·b
//   1 − cos = ½·Σ(a·x − b·y)² + ½·ε·(a² + b²), which loses nothing when the two are close
//   gradient = c·((a·x − b·y) − (1 − cos)·a·x),  c = a·w/n times the upstream
//
// A row whose squares overflow is summed once more, scaled down: a·x and b·y are in range whatever x and y are.
//
// A row pair is read from memory once, 4 + 4 bytes per element in float32, and later passes find it in cache; the
// gradient is 4 bytes more. Compiled once per instruction set (isa.h).
#ifndef FUSEDKD_COSINE_ROWS
#define FUSEDKD_COSINE_ROWS

#include "call.h"
#include "vec.h"

namespace FUSEDKD_NAMESPACE {

// The rows of one side in A, a block of columns at a time; the block that was read last is not converted again.
template <class A> struct HiddenSide {
  const Rows& rows;
  alignas(64) A buffer[BLOCK];
  const A* block = nullptr;
  int64_t row = -1, column = -1;
  explicit HiddenSide(const Rows& rows) : rows(rows) {}

  const A* operator()(int64_t i, int64_t j) {
    if (i != row || j != column) block = read<A>(rows.type, rows[row = i], column = j, length(j), buffer, 0);
    return block;
  }
  int64_t length(int64_t j) const { return std::min(BLOCK, rows.columns - j); }
  // Rows are too short for the processor to see that the next one follows: asked for while this one is worked on.
  void fetch_next(int64_t i, int64_t j) const {
    if (i + 1 == rows.count) return;
    const int64_t bytes = size_of(rows.type), n = length(j) * bytes;
    const char* next = rows[i + 1] + j * bytes;
    for (int64_t at = 0; at < n; at += 64) __builtin_prefetch(next + at);
  }
};

template <class A> struct CosineRows {
  static constexpr double EPSILON = 1e-12;
  const CosineCall& k;
  HiddenSide<A> student, teacher;
  alignas(64) A g_buffer[BLOCK];
  explicit CosineRows(const CosineCall& call) : k(call), student(call.student), teacher(call.teacher) {}

  void row(int64_t i) {
    const double weight = k.weights ? k.weights[i] : 1;
    const int64_t H = k.student.columns;
    char* out = k.gradient ? (*k.gradient)[i] : nullptr;
    A* stats = static_cast<A*>(k.stats) + COSINE_STATS * i;
    if (weight == 0) {  // not read
      if (k.forward) {
        static_cast<A*>(k.rows)[i] = 0;
        stats[STUDENT_INVERSE_NORM] = stats[TEACHER_INVERSE_NORM] = stats[DISTANCE] = 0;
      }
      if (out) std::memset(out, 0, k.gradient->row_bytes());
      return;
    }
    if (k.forward) {
      double xx = 0, yy = 0, sum = 0;
      for (int64_t j = 0; j < H; j += BLOCK) squares(student(i, j), teacher(i, j), steps(j), xx, yy);
      const A a = inverse_norm(xx, student, i), b = inverse_norm(yy, teacher, i);
      for (int64_t j = 0; j < H; j += BLOCK) {
        student.fetch_next(i, j), teacher.fetch_next(i, j);
        sum += difference(student(i, j), teacher(i, j), steps(j), a, b);
      }
      const double distance = 0.5 * sum + 0.5 * EPSILON * (double(a) * a + double(b) * b);
      stats[STUDENT_INVERSE_NORM] = a, stats[TEACHER_INVERSE_NORM] = b, stats[DISTANCE] = A(distance);
      static_cast<A*>(k.rows)[i] = A(weight * distance);
    }
    if (!out) return;
    const double upstream = k.upstream ? (*k.upstream)[i] : 1;
    const A a = stats[STUDENT_INVERSE_NORM], b = stats[TEACHER_INVERSE_NORM], distance = stats[DISTANCE];
    const A c = A(a * (weight / k.normalizer * upstream));
    for (int64_t j = 0; j < H; j += BLOCK) {
      const int64_t n = student.length(j);
      A* g = place(k.student.type, out, j, n, g_buffer);
      gradient(student(i, j), teacher(i, j), steps(j), a, b, distance, c, g);
      write(k.student.type, out, j, n, g);
    }
  }

  int64_t steps(int64_t j) const { return whole_steps(student.length(j)); }

  // Of a row with Σx² as given.
  A inverse_norm(double xx, HiddenSide<A>& side, int64_t i) const {
    constexpr double far = std::is_same_v<A, double> ? 0x1p-700 : 0x1p-96;
    if (std::isfinite(xx)) return A(1 / std::sqrt(xx + EPSILON));
    double sum = 0;
    for (int64_t j = 0; j < k.student.columns; j += BLOCK) {
      const A* x = side(i, j);
      for (int64_t c = 0; c < side.length(j); c++) sum += (far * x[c]) * (far * x[c]);
    }
    return A(far / std::sqrt(sum));
  }

  // a·x − b·y without the rounding of the products, which would be all that is left of it near convergence.
  static INLINE Vec<A> apart(Vec<A> x, Vec<A> y, Vec<A> a, Vec<A> b) {
    const Vec<A> by = b * y;
    return fma(a, x, -by) - fma(b, y, -by);
  }

  // The partial sums of a loop: those of GROUP steps at a time, so that no addition waits for the one before it.
  static constexpr int GROUP = 4;
  struct Partial {
    Vec<A> sum[GROUP][PER_STEP<A>] = {};
    INLINE double total() {
      for (int u = 0; u < PER_STEP<A>; u++) sum[0][u] = (sum[0][u] + sum[1][u]) + (sum[2][u] + sum[3][u]);
      return FUSEDKD_NAMESPACE::total<A>(sum[0]);
    }
  };
  // use(column, partial sum) for each vector of n columns.
  template <class Use> static INLINE void over_vectors(int64_t n, const Use& use) {
    int64_t j = 0;
    for (; j + GROUP * STEP <= n; j += GROUP * STEP)
      for (int i = 0; i < GROUP; i++)
        for (int u = 0; u < PER_STEP<A>; u++) use(j + i * STEP + u * WIDTH<A>, i, u);
    for (; j < n; j += STEP)
      for (int u = 0; u < PER_STEP<A>; u++) use(j + u * WIDTH<A>, 0, u);
  }

  static void squares(const A* x, const A* y, int64_t n, double& xx, double& yy) {
    Partial of_x, of_y;
    over_vectors(n, [&](int64_t j, int i, int u) {
      const Vec<A> here = load(x + j), there = load(y + j);
      of_x.sum[i][u] = fma(here, here, of_x.sum[i][u]), of_y.sum[i][u] = fma(there, there, of_y.sum[i][u]);
    });
    xx += of_x.total(), yy += of_y.total();
  }

  static double difference(const A* x, const A* y, int64_t n, A a, A b) {
    Partial sums;
    over_vectors(n, [&](int64_t j, int i, int u) {
      const Vec<A> d = apart(load(x + j), load(y + j), splat(a), splat(b));
      sums.sum[i][u] = fma(d, d, sums.sum[i][u]);
    });
    return sums.total();
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

}  // namespace FUSEDKD_NAMESPACE
#endif
