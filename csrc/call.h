// What the operators of kd_loss are called with and what they return, however the teacher is known: kd.cpp, topk.cpp.
#pragma once

#include "tensor.h"

namespace fusedkd {

constexpr int64_t OPTIONS = 16, STATS = 8;

struct LogitsCall {
  Rows student, teacher;  // [B, L, V], [B, L, C]
  const int64_t* labels;  // [N] or null
  const float* weights;   // [N]
  double temperature, teacher_temperature, kd_scale, kd_weight, ce_weight, smoothing;
  double softcap, scale, teacher_softcap, teacher_scale;
  const double* coefficients;  // a0 … a5 of the form
  double n_kd, n_ce;
  int64_t ignore_index;
  bool transform, ce;
  bool forward = false;                    // rows and stats are results, else stats are given
  void *rows = nullptr, *stats = nullptr;  // [2, N] and [N, STATS] of the accumulation type
  std::optional<Rows> gradient = {};       // [B, L, V] like the student; may be the student itself
  std::optional<PerRow> upstream = {};     // 1 if none

  LogitsCall(const Tensor& z, const Tensor& v, const Optional& y, const Tensor& w, const Tensor& options,
             const Tensor& normalizers, int64_t ignore_index, bool transform, bool ce)
      : student(z), teacher(v), ignore_index(ignore_index), transform(transform), ce(ce) {
    STD_TORCH_CHECK(student.count == teacher.count && student.inner == teacher.inner && (y || !ce),
                    "fusedkd: student and teacher rows do not match, or labels are missing");
    const double* o = contiguous_data<double>(options, ScalarType::Double, OPTIONS, "options");
    const double* n = contiguous_data<double>(normalizers, ScalarType::Double, 2, "normalizers");
    labels = y ? contiguous_data<int64_t>(*y, ScalarType::Long, student.count, "labels") : nullptr;
    weights = contiguous_data<float>(w, ScalarType::Float, student.count, "weights");
    temperature = o[0], teacher_temperature = o[1], kd_scale = o[2], kd_weight = o[3], ce_weight = o[4];
    smoothing = o[5], softcap = o[6], scale = o[7], teacher_softcap = o[8], teacher_scale = o[9], coefficients = o + 10;
    n_kd = n[0], n_ce = n[1];
  }
};

// run(k) fills what k names; its kind of call tells which.
template <class Call> std::tuple<Tensor, Tensor> run_forward(Call& k, const Tensor& student, void (*run)(const Call&)) {
  const ScalarType type = accumulation_type(k.student.type);
  Tensor rows = torch::stable::new_empty(student, {2, k.student.count}, type);
  Tensor stats = torch::stable::new_empty(student, {k.student.count, STATS}, type);
  k.forward = true, k.rows = rows.data_ptr(), k.stats = stats.data_ptr();
  run(k);
  return {rows, stats};
}

template <class Call>
std::tuple<Tensor, Tensor, Tensor> run_forward(Call& k, const Tensor& student, bool gradient,
                                               void (*run)(const Call&)) {
  Tensor out = gradient ? fresh_like(student) : torch::stable::new_empty(student, {0});
  if (gradient) k.gradient.emplace(out);
  auto [rows, stats] = run_forward(k, student, run);
  return {rows, stats, out};
}

template <class Call>
void run_backward(Call& k, const Tensor& upstream, const Tensor& stats, const Tensor& gradient,
                  void (*run)(const Call&)) {
  const ScalarType type = accumulation_type(k.student.type);
  k.stats = const_cast<char*>(contiguous_data<char>(stats, type, STATS * k.student.count, "stats"));
  k.upstream.emplace(upstream, type, k.student.count);
  k.gradient.emplace(gradient);
  STD_TORCH_CHECK(k.gradient->like(k.student), "fusedkd: the gradient must be like the student's logits");
  run(k);
}

}  // namespace fusedkd
