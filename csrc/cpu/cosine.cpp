// The CPU operators of cosine_hidden_loss: their arguments become a CosineCall, and cosine_rows.h does the rest, once
// per instruction set.
#include "call.h"

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

void write_gradient(CosineCall& k, const Tensor& gradient) {
  k.gradient.emplace(gradient);
  STD_TORCH_CHECK(k.gradient->like(k.student), "fusedkd: the gradient must be like the student's hidden states");
  in_huge_pages(gradient);
}

std::tuple<Tensor, Tensor> cosine_forward(Tensor student, Tensor teacher, Optional weights, Tensor normalizer,
                                          Optional gradient) {
  CosineCall k = call(student, teacher, weights, normalizer);
  const ScalarType type = accumulation_type(k.student.type);
  Tensor row_losses = fresh({k.student.count}, type);
  Tensor stats = fresh({k.student.count, 3}, type);
  k.forward = true, k.rows = row_losses.data_ptr(), k.stats = stats.data_ptr();
  if (gradient) write_gradient(k, *gradient);
  run(k);
  return {row_losses, stats};
}

void cosine_backward(Tensor upstream, Tensor student, Tensor teacher, Optional weights, Tensor normalizer, Tensor stats,
                     Tensor gradient, bool skip_if_one) {
  CosineCall k = call(student, teacher, weights, normalizer);
  const ScalarType type = accumulation_type(k.student.type);
  const PerRow up(upstream, type, k.student.count);
  if (skip_if_one && up.scalar && up[0] == 1) return;
  k.stats = const_cast<char*>(contiguous_data<char>(stats, type, 3 * k.student.count, "stats"));
  k.upstream = up;
  write_gradient(k, gradient);
  run(k);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CPU, m) {
  m.impl("cosine_forward", TORCH_BOX(&cosine_forward));
  m.impl("cosine_backward", TORCH_BOX(&cosine_backward));
}

}  // namespace fusedkd
