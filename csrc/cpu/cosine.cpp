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
  Tensor stats = fresh({k.student.count, COSINE_STATS}, type);
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
  k.stats = const_cast<char*>(contiguous_data<char>(stats, type, COSINE_STATS * k.student.count, "stats"));
  k.upstream = up;
  write_gradient(k, gradient);
  run(k);
}

// Row weights, empty without a mask, and the normalizer: the first that is given, or else their sum or number.
std::tuple<Tensor, Tensor> row_weights(const Rows& rows, const Optional& mask, const Tensor& normalizers) {
  Tensor weights = fresh({mask ? rows.count : 0}, ScalarType::Float), normalizer = fresh({}, ScalarType::Double);
  double n = *contiguous_data<double>(normalizers, ScalarType::Double, NORMALIZERS, "normalizers"), found = 0;
  if (mask) {
    const ScalarType type = mask->scalar_type();
    const void* given = contiguous_data<char>(*mask, type, rows.count, "mask");
    float* w = static_cast<float*>(weights.data_ptr());
    for (int64_t i = 0; i < rows.count; i++) {
      w[i] = float(mask_value(given, type, i));
      found += is_floating(type) ? w[i] : w[i] != 0;
    }
  }
  if (n == COUNTED) n = found;
  *static_cast<double*>(normalizer.data_ptr()) = n <= 0 ? 1 : n;  // a NaN stays one
  return {weights, normalizer};
}

template <class A>
void sum(const Tensor& row_losses, double normalizer, const Tensor& to) {
  const A* x = static_cast<const A*>(row_losses.data_ptr());
  double total = 0;
  for (int64_t i = 0, n = row_losses.numel(); i < n; i++) total += x[i];
  *static_cast<A*>(to.data_ptr()) = A(total / normalizer);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cosine_loss(Tensor student, Tensor teacher, Optional mask,
                                                       Tensor normalizers, Optional gradient, bool per_row) {
  const auto [weights, normalizer] = row_weights(Rows(student), mask, normalizers);
  const Optional given = mask ? Optional(weights) : std::nullopt;
  const auto [row_losses, stats] = cosine_forward(student, teacher, given, normalizer, gradient);
  if (per_row) return {row_losses, weights, normalizer, stats};
  const ScalarType type = row_losses.scalar_type();
  const double n = *static_cast<const double*>(normalizer.data_ptr());
  Tensor loss = fresh({}, type);
  type == ScalarType::Double ? sum<double>(row_losses, n, loss) : sum<float>(row_losses, n, loss);
  return {loss, weights, normalizer, stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CPU, m) {
  m.impl("cosine_forward", TORCH_BOX(&cosine_forward));
  m.impl("cosine_backward", TORCH_BOX(&cosine_backward));
  m.impl("cosine_loss", TORCH_BOX(&cosine_loss));
}

}  // namespace fusedkd
