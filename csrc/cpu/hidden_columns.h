// The columns of a pair of hidden states, student and teacher, for hidden_rows.h: where they are read, and sums over them.
// Compiled once per instruction set (isa.h).
#ifndef FUSEDKD_HIDDEN_COLUMNS
#define FUSEDKD_HIDDEN_COLUMNS

#include "call.h"
#include "vec.h"

namespace FUSEDKD_NAMESPACE {

// Rows of S in memory, which is the type of both sides, or A, into which rows are converted: a teacher in pieces, types
// that differ, float16.
template <class A, class S> struct HiddenColumns {
  static constexpr int SLOTS = 4, UNIT = 2 * WIDTH<A>;  // vectors of partial sums; columns that are read at a time

  const HiddenCall& k;
  const int64_t H, whole;
  std::vector<A> x_buffer, y_buffer, g_buffer;
  S x_tail[UNIT] = {}, y_tail[UNIT] = {}, g_tail[UNIT] = {};
  const S *x = nullptr, *y = nullptr;

  explicit HiddenColumns(const HiddenCall& call) : k(call), H(call.student.columns), whole(H / UNIT * UNIT) {}

  // Makes x and y the rows, and the tails what is left of them beyond whole units, filled up with 0.
  void find(int64_t i) {
    if constexpr (std::is_same_v<A, S>) {
      x = converted({&k.student, 1}, i, x_buffer), y = converted({k.teacher.data(), k.teacher.size()}, i, y_buffer);
    } else {
      x = (const S*)k.student[i], y = (const S*)k.teacher[0][i];
    }
    if (whole < H) std::copy(x + whole, x + H, x_tail), std::copy(y + whole, y + H, y_tail);
  }

  struct Pieces {
    const Rows* first;
    size_t count;
  };
  const A* converted(Pieces pieces, int64_t i, std::vector<A>& buffer) const {
    const ScalarType own = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    if (pieces.count == 1 && pieces.first->type == own) return (const A*)(*pieces.first)[i];
    buffer.resize(H);
    A* to = buffer.data();
    for (size_t p = 0; p < pieces.count; p++) {
      const Rows& rows = pieces.first[p];
      const char* from = rows[i];
      switch (rows.type) {
        case ScalarType::Double: convert((const double*)from, rows.columns, to); break;
        case ScalarType::Float: convert((const float*)from, rows.columns, to); break;
        case ScalarType::BFloat16: convert((const BFloat16*)from, rows.columns, to); break;
        default: convert((const Half*)from, rows.columns, to);
      }
      to += rows.columns;
    }
    return buffer.data();
  }

  S* place_of_gradient(char* out) {
    if (!std::is_same_v<A, S> || size_of(k.student.type) == sizeof(A)) return (S*)out;
    g_buffer.resize(H);
    return (S*)g_buffer.data();
  }

  // Lanes of the last unit that are columns: for the others, 0. All of another one are.
  struct All {
    INLINE Vec<A> operator()(Vec<A> v) const { return v; }
  };
  struct Some {
    Int<A> lanes;
    INLINE Vec<A> operator()(Vec<A> v) const { return (Vec<A>)((Int<A>)v & lanes); }
  };
  // The columns that load_pair() puts into a vector: of the first or the second.
  static INLINE Some some(int64_t n, bool second) {
    constexpr bool by_turns = std::is_same_v<S, BFloat16>;
    Some found;
    for (int u = 0; u < WIDTH<A>; u++)
      found.lanes[u] = (by_turns ? 2 * u + second : u + second * WIDTH<A>) < n ? -1 : 0;
    return found;
  }

  // The sums over all columns of what use(x, y, keep, sum) adds to the partial sums sum(k), those of SLOTS vectors at a
  // time, so that no addition waits for the one before it. Where WRITES, what it returns goes to g.
  template <int K, bool WRITES = false, class Use>
  INLINE void over_columns(double (&total)[K], const Use& use, S* g = nullptr) {
    for (double& t : total) t = 0;
    for (int64_t j = 0; j < H;) {
      Vec<A> partial[K][SLOTS] = {};
      const int64_t end = std::min(whole, j + 32 * SLOTS * WIDTH<A>);  // 32 numbers to a sum
      const auto unit = [&](const S* from, const S* other, S* out, int slot, const auto& keep, const auto& more) FLAT {
        Vec<A> x0, x1, y0, y1;
        load_pair<A>(from, x0, x1), load_pair<A>(other, y0, y1);
        const auto first = [&](int k) FLAT -> Vec<A>& { return partial[k][slot]; };
        const auto second = [&](int k) FLAT -> Vec<A>& { return partial[k][slot + 1]; };
        if constexpr (WRITES) {
          const Vec<A> low = use(x0, y0, keep, first), high = use(x1, y1, more, second);
          store_pair<A>(out, low, high);
        } else {
          use(x0, y0, keep, first), use(x1, y1, more, second);
        }
      };
      for (; j + SLOTS * WIDTH<A> <= end; j += SLOTS * WIDTH<A>) {
        const int64_t half = j + UNIT;
        unit(x + j, y + j, g + j, 0, All{}, All{});
        unit(x + half, y + half, g + half, 2, All{}, All{});
      }
      for (; j < end; j += UNIT) unit(x + j, y + j, g + j, 0, All{}, All{});
      if (j == whole && whole < H) {
        unit(x_tail, y_tail, g_tail, 0, some(H - whole, false), some(H - whole, true));
        if (WRITES) std::copy(g_tail, g_tail + (H - whole), g + whole);
        j = H;
      }
      [&]<size_t... k>(std::index_sequence<k...>) FLAT {  // no loop, for which the sums would leave the registers
        ((total[k] += sum_of(partial[k])), ...);
      }(std::make_index_sequence<K>{});
    }
  }
  static INLINE double sum_of(const Vec<A> (&partial)[SLOTS]) {
    typedef A Few __attribute__((vector_size(FUSEDKD_VECTOR_BYTES / sizeof(double) * sizeof(A))));
    constexpr int parts = sizeof(double) / sizeof(A);  // as many vectors of doubles has a vector
    const Vec<A> all = (partial[0] + partial[1]) + (partial[2] + partial[3]);
    Few few[parts];
    std::memcpy(few, &all, sizeof all);
    Vec<double> sum = __builtin_convertvector(few[0], Vec<double>);
    for (int i = 1; i < parts; i++) sum += __builtin_convertvector(few[i], Vec<double>);
    double lanes[WIDTH<double>];
    std::memcpy(lanes, &sum, sizeof sum);
    for (int n = WIDTH<double> / 2; n > 0; n /= 2)
      for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
    return lanes[0];
  }
};

}  // namespace FUSEDKD_NAMESPACE
#endif
