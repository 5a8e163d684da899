// The CPU operators of cosine_hidden_loss: their arguments become a CosineCall, and cosine_rows.h does the rest, once
// per instruction set.
#include "tensor.h"

namespace fusedkd {

struct CosineCall {
  Rows student, teacher;           // [B, L, H]
  const float* weights;            // [N] or null: all 1
  double normalizer;
  bool forward = false;                       // rows and stats are results, else stats are given
  void *rows = nullptr, *stats = nullptr;     // [N] and [N, 3] of the accumulation type
  std::optional<Rows> gradient = {};          // [B, L, H] like the student
  std::optional<PerRow> upstream = {};        // 1 if none
};

}  // namespace fusedkd

#define FUSEDKD_BODY "cosine_rows.h"
#include "isa.h"

namespace fusedkd {
namespace {

CosineCall call(const Tensor& student, const Tensor& teacher, const Optional& weights, const Tensor& normalizer) {
  const Rows x(student), y(teacher);
  STD_TORCH_CHECK(x.count == y.count && x.inner == y.inner && x.columns == y.columns,
                  "fusedkd: student and teacher rows do not match");
  return {
      .student = x,
      .teacher = y,
      .weights = weights ? contiguous_data<float>(*weights, ScalarType::Float, x.count, "weights") : nullptr,
      .normalizer = *contiguous_data<double>(normalizer, ScalarType::Double, 1, "normalizer"),
  };
}

void run(const CosineCall& k) {
  over_rows(k.student, [&](int64_t begin, int64_t end) { FUSEDKD_CALL(cosine_rows, k, begin, end) });
}

void run_backward(CosineCall& k, const Tensor& upstream, const Tensor& stats, const Tensor& gradient) {
  const ScalarType type = accumulation_type(k.student.type);
  k.stats = const_cast<char*>(contiguous_data<char>(stats, type, 3 * k.student.count, "stats"));
  k.upstream.emplace(upstream, type, k.student.count);
  k.gradient.emplace(gradient);
  STD_TORCH_CHECK(k.gradient->like(k.student), "fusedkd: the gradient must be like the student's hidden states");
  run(k);
}

std::tuple<Tensor, Tensor, Tensor> cosine_forward(Tensor student, Tensor teacher, Optional weights, Tensor normalizer,
                                                  bool gradient) {
  CosineCall k = call(student, teacher, weights, normalizer);
  const ScalarType type = accumulation_type(k.student.type);
  Tensor rows = torch::stable::new_empty(student, {k.student.count}, type);
  Tensor stats = torch::stable::new_empty(student, {k.student.count, 3}, type);
  Tensor out = gradient ? fresh_like(student) : torch::stable::new_empty(student, {0});
  k.forward = true, k.rows = rows.data_ptr(), k.stats = stats.data_ptr();
  if (gradient) k.gradient.emplace(out);
  run(k);
  return {rows, stats, out};
}

Tensor cosine_backward(Tensor upstream, Tensor student, Tensor teacher, Optional weights, Tensor normalizer,
                       Tensor stats) {
  CosineCall k = call(student, teacher, weights, normalizer);
  Tensor out = fresh_like(student);
  run_backward(k, upstream, stats, out);
  return out;
}

void cosine_rescale_(Tensor gradient, Tensor upstream, Tensor student, Tensor teacher, Optional weights,
                     Tensor normalizer, Tensor stats) {
  if (PerRow(upstream, accumulation_type(student.scalar_type()), 1)[0] == 1) return;
  CosineCall k = call(student, teacher, weights, normalizer);
  run_backward(k, upstream, stats, gradient);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CPU, m) {
  m.impl("cosine_forward", TORCH_BOX(&cosine_forward));
  m.impl("cosine_backward", TORCH_BOX(&cosine_backward));
  m.impl("cosine_rescale_", TORCH_BOX(&cosine_rescale_));
}

}  // namespace fusedkd
