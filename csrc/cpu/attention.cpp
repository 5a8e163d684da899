// The losses between attention maps from queries and keys: what fusedkd/backends/attention_loop.py does, one head of one
// sequence per thread, where the products are those of product.cpp. A tile of both sides' scores stays in the cache from
// the products that make it, over the rows of kd.cpp or attention_rows.h, to the products that take its gradient to
// queries and keys.
#include <memory>

#include "call.h"
#include "product.h"

#define FUSEDKD_BODY "attention_rows.h"
#include "isa.h"

namespace fusedkd {
namespace {

constexpr int64_t TILE = 1 << 17, FEWEST_ROWS = 64;  // scores of a side, at 4 bytes; rows, however many keys there are
constexpr float INF = std::numeric_limits<float>::infinity();

// Queries or keys [B, heads, L, d], whose last stride is 1.
struct Heads {
  const char* data;
  ScalarType type;
  int64_t width, batch_stride, head_stride, stride;

  explicit Heads(const Tensor& t)
      : data(static_cast<const char*>(t.data_ptr())), type(t.scalar_type()), width(t.size(3)),
        batch_stride(t.stride(0)), head_stride(t.stride(1)), stride(t.stride(2)) {
    STD_TORCH_CHECK(t.is_cpu() && (t.stride(3) == 1 || width <= 1), "fusedkd: the last dimension must be contiguous");
  }
};

// One head of one sequence: L rows of `width` elements.
struct Matrix {
  const char* data;
  ScalarType type;
  int64_t width, stride;

  Matrix(const Heads& of, int64_t b, int64_t h)
      : data(of.data + (b * of.batch_stride + h * of.head_stride) * size_of(of.type)), type(of.type), width(of.width),
        stride(of.stride) {}
  const char* row(int64_t i) const { return data + i * stride * size_of(type); }
  // Its rows as those of the left operand of a product, or as columns of the right one; summed over their elements.
  Operand rows(int64_t first, int64_t count) const { return {row(first), type, count, stride, width, 1}; }
  // As the right operand, summed over rows.
  Operand columns(int64_t first, int64_t count) const { return {row(first), type, width, 1, count, stride}; }
};

// What of a sequence counts: from the first to behind the last, and whether one between does not.
struct Span {
  int64_t first, last;
  bool holes;

  Span(const bool* counted, int64_t length) : first(0), last(length), holes(false) {
    if (!counted) return;
    while (first < last && !counted[first]) first++;
    while (last > first && !counted[last - 1]) last--;
    for (int64_t i = first; i < last; i++) holes |= !counted[i];
  }
};

struct AttentionCall {
  int64_t heads, length;
  Heads q, k, t_q, t_k;
  const bool *rows, *keys;  // [B, L] or null
  Tensor options, normalizers;
  const float* upstream;  // [B, heads, L] or null
  float *losses, *d_q, *d_k;
  KernelId kernel_id;
  bool causal;
};

// The pairs of one thread.
class Pairs {
 public:
  explicit Pairs(const AttentionCall& call)
      : c(call), most_rows(std::clamp(TILE / c.length, std::min(FEWEST_ROWS, c.length), c.length)),
        student(fresh({1, most_rows, c.length}, ScalarType::Float)),
        teacher(fresh({1, most_rows, c.length}, ScalarType::Float)), weights(fresh({most_rows}, ScalarType::Float)),
        kd{{student, teacher, std::nullopt, weights, c.options, c.normalizers, -100, false, false}, c.kernel_id},
        z(static_cast<float*>(student.data_ptr())), t(static_cast<float*>(teacher.data_ptr())),
        w(static_cast<float*>(weights.data_ptr())), row_losses(2 * most_rows), stats(STATS * most_rows) {}

  void pair(int64_t i) {
    const int64_t b = i / c.heads, h = i % c.heads, L = c.length;
    std::fill_n(c.losses + i * L, L, 0.0f);
    for (float* gradient : {c.d_q, c.d_k})
      if (gradient) std::fill_n(gradient + i * L * c.q.width, L * c.q.width, 0.0f);
    const bool *of_rows = c.rows ? c.rows + b * L : nullptr, *of_keys = c.keys ? c.keys + b * L : nullptr;
    const Span rows(of_rows, L), keys(of_keys, L);
    Matrix q(c.q, b, h), k(c.k, b, h);
    const Matrix t_q(c.t_q, b, h), t_k(c.t_k, b, h);
    if (rows.holes) without(q, of_rows, rows, q_copy);
    if (keys.holes) without(k, of_keys, keys, k_copy);
    int64_t size = most_rows;
    if (c.causal) size = std::min(size, std::max(FEWEST_ROWS, (rows.last - rows.first) / 8));  // leaves out more
    for (int64_t start = rows.first; start < rows.last; start += size) {
      const int64_t n = std::min(size, rows.last - start), left = keys.first;
      const int64_t seen = (c.causal ? std::min(keys.last, start + n) : keys.last) - left;
      if (seen <= 0) continue;
      multiply({q.rows(start, n), k.rows(left, seen), nullptr, z, seen, false});
      multiply({t_q.rows(start, n), t_k.rows(left, seen), nullptr, t, seen, false});
      for (int64_t r = 0; r < n; r++) {
        hide(r * seen, seen, keys.holes ? of_keys + left : nullptr, c.causal ? start + r + 1 - left : seen);
        w[r] = of_rows ? of_rows[start + r] : 1;
      }
      const int64_t at = i * L + start;
      if (c.kernel_id == KernelId::LOGIT_MSE) squared_error(n, seen, at);
      else divergence(n, seen, at);
      const char* g = reinterpret_cast<const char*>(z);
      if (c.d_q)
        multiply({{g, ScalarType::Float, n, seen, seen, 1},
                  k.columns(left, seen),
                  nullptr,
                  c.d_q + at * q.width,
                  q.width,
                  true});
      if (c.d_k)
        multiply({{g, ScalarType::Float, seen, 1, n, seen},
                  q.columns(start, n),
                  nullptr,
                  c.d_k + (i * L + left) * k.width,
                  k.width,
                  true});
    }
  }

 private:
  // −∞ on both sides for keys that do not count, and for those from `after` on.
  void hide(int64_t row, int64_t seen, const bool* counted, int64_t after) {
    for (float* x : {z + row, t + row}) {
      if (counted)
        for (int64_t j = 0; j < seen; j++) x[j] = counted[j] ? x[j] : -INF;
      if (after < seen) std::fill(x + std::max<int64_t>(after, 0), x + seen, -INF);
    }
  }

  // The row losses of a tile, whose first query is `at`, and its gradient in the place of the student's scores.
  void divergence(int64_t n, int64_t columns, int64_t at) {
    for (Rows* side : {&kd.student, &kd.teacher}) {
      side->count = side->inner = n, side->columns = columns;
      side->inner_bytes = columns * int64_t(sizeof(float));
    }
    kd.vocabulary = columns, kd.forward = true, kd.rows = row_losses.data(), kd.stats = stats.data();
    if (c.d_q || c.d_k) kd.gradient = kd.student;
    run(kd);
    std::copy_n(row_losses.data(), n, c.losses + at);
    if (c.upstream && kd.gradient)
      for (int64_t r = 0; r < n; r++)
        for (int64_t j = 0; j < columns; j++) z[r * columns + j] *= c.upstream[at + r];
  }
  // The same; the mean is over all keys, whether or not a tile has them.
  void squared_error(int64_t n, int64_t columns, int64_t at) {
    const ScoresCall k{.z = z,
                       .t = t,
                       .weights = w,
                       .upstream = c.upstream ? c.upstream + at : nullptr,
                       .losses = c.losses + at,
                       .columns = columns,
                       .keys = c.length,
                       .coefficients = kd.coefficients,
                       .scale = kd.kd_scale,
                       .normalizer = kd.n_kd / kd.kd_weight,
                       .gradient = c.d_q || c.d_k};
    kd.student.count = n, kd.student.columns = columns;
    over_rows(kd.student, [&](int64_t begin, int64_t end) { FUSEDKD_CALL(score_rows, k, begin, end) });
  }

  // A copy with 0 in the rows that do not count: these may hold NaN, and 0·NaN is not 0.
  void without(Matrix& m, const bool* counted, const Span& span, std::unique_ptr<char[]>& copy) {
    const int64_t bytes = m.width * size_of(m.type);
    if (!copy) copy.reset(new char[c.length * bytes]);
    for (int64_t i = span.first; i < span.last; i++) {
      if (counted[i]) std::memcpy(copy.get() + i * bytes, m.row(i), bytes);
      else std::memset(copy.get() + i * bytes, 0, bytes);
    }
    m.data = copy.get(), m.stride = m.width;
  }

  const AttentionCall& c;
  const int64_t most_rows;
  const Tensor student, teacher, weights;
  KdCall kd;
  float *z, *t, *w;
  std::vector<float> row_losses, stats;
  std::unique_ptr<char[]> q_copy, k_copy;
};

const bool* mask_data(const Optional& mask, int64_t size) {
  return mask ? contiguous_data<bool>(*mask, ScalarType::Bool, size, "mask") : nullptr;
}

// Where a wanted result goes.
float* result(const Optional& to, int64_t size) {
  return to ? const_cast<float*>(contiguous_data<float>(*to, ScalarType::Float, size, "a result")) : nullptr;
}

bool attention_pairs(Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k, Optional rows,
                     Optional keys, Tensor options, Tensor normalizers, Optional upstream, Tensor row_losses,
                     Optional d_q, Optional d_k, int64_t kernel_id, bool causal) {
  const int64_t batch = student_q.size(0), heads = student_q.size(1), length = student_q.size(2);
  for (const Tensor& x : {student_q, student_k, teacher_q, teacher_k}) {
    STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == batch && x.size(1) == heads && x.size(2) == length,
                    "fusedkd: queries and keys do not match");
    if (!has_product(x.scalar_type())) return false;
  }
  if (kernel_id < 0 || kernel_id >= KERNELS) return false;
  const int64_t pairs = batch * heads, count = pairs * length, size = count * student_q.size(3);
  STD_TORCH_CHECK(student_q.size(3) == student_k.size(3) && teacher_q.size(3) == teacher_k.size(3),
                  "fusedkd: queries and keys do not match");
  if (count == 0) return true;
  const AttentionCall call{heads,
                           length,
                           Heads(student_q),
                           Heads(student_k),
                           Heads(teacher_q),
                           Heads(teacher_k),
                           mask_data(rows, batch * length),
                           mask_data(keys, batch * length),
                           options,
                           normalizers,
                           result(upstream, count),
                           result(row_losses, count),
                           result(d_q, size),
                           result(d_k, size),
                           KernelId(kernel_id),
                           causal};
  const auto work = [&](int64_t begin, int64_t end) {
    Pairs mine(call);
    for (int64_t i = begin; i < end; i++) mine.pair(i);
  };
  if (pairs < torch::stable::get_num_threads()) work(0, pairs);  // then threads share the products and rows of each
  else torch::stable::parallel_for(0, pairs, 1, work);
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CPU, m) { m.impl("attention_pairs", TORCH_BOX(&attention_pairs)); }

}  // namespace fusedkd
