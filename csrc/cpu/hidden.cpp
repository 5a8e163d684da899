// The CPU operators of hidden_loss: their arguments become a HiddenCall, and hidden_rows.h does the rest, once per
// instruction set.
#include "call.h"

#define FUSEDKD_BODY "hidden_rows.h"
#include "isa.h"

namespace fusedkd {
namespace {

using Pieces = std::vector<Tensor>;

HiddenCall call(const Tensor& student, const Pieces& teacher, const Tensor* weights, const Tensor& normalizer,
                int64_t distance, int64_t normalize) {
  const Rows x(student);
  std::vector<Rows> pieces;
  int64_t columns = 0;
  for (const Tensor& piece : teacher) {
    const Rows& y = pieces.emplace_back(piece);
    columns += y.columns;
    STD_TORCH_CHECK(x.count == y.count && x.inner == y.inner, "fusedkd: student and teacher rows do not match");
  }
  STD_TORCH_CHECK(columns == x.columns && columns > 0, "fusedkd: student and teacher rows do not match");
  STD_TORCH_CHECK(distance >= 0 && distance <= int64_t(HiddenDistance::SMOOTH_L1) && normalize >= 0 &&
                      normalize <= int64_t(HiddenNormalize::LAYER_NORM),
                  "fusedkd: no such distance or normalisation");
  return {
      .student = x,
      .teacher = std::move(pieces),
      .weights = weights ? contiguous_data<float>(*weights, ScalarType::Float, x.count, "weights") : nullptr,
      .normalizer = *contiguous_data<double>(normalizer, ScalarType::Double, 1, "normalizer"),
      .distance = HiddenDistance(distance),
      .normalize = HiddenNormalize(normalize),
  };
}

void run(const HiddenCall& k) {
  over_rows(k.student, [&](int64_t begin, int64_t end) { FUSEDKD_CALL(hidden_rows, k, begin, end) });
}

void write_gradient(HiddenCall& k, const Tensor& gradient) {
  k.gradient.emplace(gradient);
  STD_TORCH_CHECK(k.gradient->like(k.student), "fusedkd: the gradient must be like the student's hidden states");
  in_huge_pages(gradient);
}

std::tuple<Tensor, Tensor> forward(HiddenCall k, const Optional& gradient) {
  const ScalarType type = accumulation_type(k.student.type);
  Tensor row_losses = fresh({k.student.count}, type);
  Tensor stats = fresh({k.student.count, HIDDEN_STATS}, type);
  k.forward = true, k.rows = row_losses.data_ptr(), k.stats = stats.data_ptr();
  if (gradient) write_gradient(k, *gradient);
  run(k);
  return {row_losses, stats};
}

std::tuple<Tensor, Tensor> hidden_forward(Tensor student, Pieces teacher, Optional weights, Tensor normalizer,
                                          Optional gradient, int64_t distance, int64_t normalize) {
  return forward(call(student, teacher, weights ? &*weights : nullptr, normalizer, distance, normalize), gradient);
}

void hidden_backward(Tensor upstream, Tensor student, Pieces teacher, Optional weights, Tensor normalizer, Tensor stats,
                     Tensor gradient, int64_t distance, int64_t normalize, bool skip_if_one) {
  HiddenCall k = call(student, teacher, weights ? &*weights : nullptr, normalizer, distance, normalize);
  const ScalarType type = accumulation_type(k.student.type);
  const PerRow up(upstream, type, k.student.count);
  if (skip_if_one && up.scalar && up[0] == 1) return;
  k.stats = const_cast<char*>(contiguous_data<char>(stats, type, HIDDEN_STATS * k.student.count, "stats"));
  k.upstream = up;
  write_gradient(k, gradient);
  run(k);
}

// Row weights, empty without a mask, and the normalizer: the first that is given, or else their sum or number; over the
// weight of the loss, which is the second.
std::tuple<Tensor, Tensor> row_weights(const Rows& rows, const Optional& mask, const Tensor& normalizers) {
  Tensor weights = fresh({mask ? rows.count : 0}, ScalarType::Float), normalizer = fresh({}, ScalarType::Double);
  const double* given = contiguous_data<double>(normalizers, ScalarType::Double, NORMALIZERS, "normalizers");
  double n = given[0], found = 0;
  if (mask) {
    const ScalarType type = mask->scalar_type();
    const void* data = contiguous_data<char>(*mask, type, rows.count, "mask");
    float* w = static_cast<float*>(weights.data_ptr());
    for (int64_t i = 0; i < rows.count; i++) {
      w[i] = float(mask_value(data, type, i));
      found += is_floating(type) ? w[i] : w[i] != 0;
    }
  }
  if (n == COUNTED) n = found;
  *static_cast<double*>(normalizer.data_ptr()) = (n <= 0 ? 1 : n) / given[1];  // a NaN stays one
  return {weights, normalizer};
}

template <class A>
void sum(const Tensor& row_losses, double normalizer, const Tensor& to) {
  const A* x = static_cast<const A*>(row_losses.data_ptr());
  double total = 0;
  for (int64_t i = 0, n = row_losses.numel(); i < n; i++) total += x[i];
  *static_cast<A*>(to.data_ptr()) = A(total / normalizer);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hidden_loss(Tensor student, Pieces teacher, Optional mask,
                                                       Tensor normalizers, Optional gradient, int64_t distance,
                                                       int64_t normalize, bool per_row) {
  const auto [weights, normalizer] = row_weights(Rows(student), mask, normalizers);
  const HiddenCall k = call(student, teacher, mask ? &weights : nullptr, normalizer, distance, normalize);
  const auto [row_losses, stats] = forward(k, gradient);
  if (per_row) return {row_losses, weights, normalizer, stats};
  const ScalarType type = row_losses.scalar_type();
  const double n = *static_cast<const double*>(normalizer.data_ptr());
  Tensor loss = fresh({}, type);
  type == ScalarType::Double ? sum<double>(row_losses, n, loss) : sum<float>(row_losses, n, loss);
  return {loss, weights, normalizer, stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CPU, m) {
  m.impl("hidden_forward", TORCH_BOX(&hidden_forward));
  m.impl("hidden_backward", TORCH_BOX(&hidden_backward));
  m.impl("hidden_loss", TORCH_BOX(&hidden_loss));
}

}  // namespace fusedkd
