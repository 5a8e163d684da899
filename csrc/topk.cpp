// The CPU operators of kd_loss for teachers known at K columns: their arguments become a TopkCall, and topk_rows.h does
// the rest, compiled once per instruction set.
#include <vector>

#include "tensor.h"

namespace fusedkd {

enum class SparseForm {  // fusedkd/sparse.py
  renormalize, renormalize_reverse, bucket, bucket_reverse, ignore, ignore_reverse, samples
};

struct TopkCall {
  Rows student, teacher;  // [B, L, V], [B, L, K]
  const int64_t* ids;     // [N, K]
  const int64_t* labels;  // [N], if ce
  const float* weights;   // [N]
  double temperature, teacher_temperature, kd_scale, kd_weight, ce_weight, smoothing, softcap, scale, a0;
  double n_kd, n_ce;
  int64_t ignore_index;
  SparseForm form;
  bool transform, ce;
  bool forward = false;                    // rows and stats are results, else stats are given
  void *rows = nullptr, *stats = nullptr;  // [2, N] and [N, 8] of the accumulation type
  std::optional<Rows> gradient = {};       // [B, L, V] like the student; may be the student itself
  std::optional<PerRow> upstream = {};     // 1 if none
};

}  // namespace fusedkd

#define FUSEDKD_BODY "topk_rows.h"
#include "isa.h"

namespace fusedkd {
namespace {

TopkCall call(const Tensor& student, const Tensor& teacher, const Tensor& ids, const Optional& labels,
              const Tensor& weights, const Tensor& options, const Tensor& normalizers, int64_t ignore_index,
              int64_t form, bool transform, bool ce) {
  const Rows z(student), v(teacher);
  STD_TORCH_CHECK(z.count == v.count && z.inner == v.inner, "fusedkd: student and teacher rows do not match");
  STD_TORCH_CHECK(form >= 0 && form <= int64_t(SparseForm::samples) && (labels || !ce), "fusedkd: no such form");
  const double* o = contiguous_data<double>(options, ScalarType::Double, 16, "options");
  const double* n = contiguous_data<double>(normalizers, ScalarType::Double, 2, "normalizers");
  return {
      .student = z,
      .teacher = v,
      .ids = contiguous_data<int64_t>(ids, ScalarType::Long, z.count * v.columns, "ids"),
      .labels = labels ? contiguous_data<int64_t>(*labels, ScalarType::Long, z.count, "labels") : nullptr,
      .weights = contiguous_data<float>(weights, ScalarType::Float, z.count, "weights"),
      .temperature = o[0], .teacher_temperature = o[1], .kd_scale = o[2], .kd_weight = o[3], .ce_weight = o[4],
      .smoothing = o[5], .softcap = o[6], .scale = o[7], .a0 = o[10],
      .n_kd = n[0], .n_ce = n[1], .ignore_index = ignore_index, .form = SparseForm(form), .transform = transform,
      .ce = ce,
  };
}

void run(const TopkCall& k) {
  over_rows(k.student, [&](int64_t begin, int64_t end) { FUSEDKD_CALL(topk_rows, k, begin, end) });
}

std::tuple<Tensor, Tensor> run_forward(TopkCall& k, const Tensor& student) {
  const ScalarType type = accumulation_type(k.student.type);
  Tensor rows = torch::stable::new_empty(student, {2, k.student.count}, type);
  Tensor stats = torch::stable::new_empty(student, {k.student.count, 8}, type);
  k.forward = true, k.rows = rows.data_ptr(), k.stats = stats.data_ptr();
  run(k);
  return {rows, stats};
}

void run_backward(TopkCall& k, const Tensor& upstream, const Tensor& stats, const Tensor& gradient) {
  const ScalarType type = accumulation_type(k.student.type);
  k.stats = const_cast<char*>(contiguous_data<char>(stats, type, 8 * k.student.count, "stats"));
  k.upstream.emplace(upstream, type, k.student.count);
  k.gradient.emplace(gradient);
  STD_TORCH_CHECK(k.gradient->like(k.student), "fusedkd: the gradient must be like the student's logits");
  run(k);
}

std::tuple<Tensor, Tensor, Tensor> topk_forward(Tensor student, Tensor teacher, Tensor ids, Optional labels,
                                                Tensor weights, Tensor options, Tensor normalizers,
                                                int64_t ignore_index, int64_t form, bool transform, bool ce,
                                                bool gradient) {
  TopkCall k = call(student, teacher, ids, labels, weights, options, normalizers, ignore_index, form, transform, ce);
  Tensor out = gradient ? fresh_like(student) : torch::stable::new_empty(student, {0});
  if (gradient) k.gradient.emplace(out);
  auto [rows, stats] = run_forward(k, student);
  return {rows, stats, out};
}

std::tuple<Tensor, Tensor> topk_forward_(Tensor student, Tensor teacher, Tensor ids, Optional labels, Tensor weights,
                                         Tensor options, Tensor normalizers, int64_t ignore_index, int64_t form,
                                         bool transform, bool ce) {
  TopkCall k = call(student, teacher, ids, labels, weights, options, normalizers, ignore_index, form, transform, ce);
  k.gradient = k.student;
  return run_forward(k, student);
}

Tensor topk_backward(Tensor upstream, Tensor student, Tensor teacher, Tensor ids, Optional labels, Tensor weights,
                     Tensor options, Tensor normalizers, Tensor stats, int64_t ignore_index, int64_t form,
                     bool transform, bool ce) {
  TopkCall k = call(student, teacher, ids, labels, weights, options, normalizers, ignore_index, form, transform, ce);
  Tensor out = fresh_like(student);
  run_backward(k, upstream, stats, out);
  return out;
}

void topk_rescale_(Tensor gradient, Tensor upstream, Tensor student, Tensor teacher, Tensor ids, Optional labels,
                   Tensor weights, Tensor options, Tensor normalizers, Tensor stats, int64_t ignore_index, int64_t form,
                   bool transform, bool ce) {
  if (PerRow(upstream, accumulation_type(student.scalar_type()), 1)[0] == 1) return;
  TopkCall k = call(student, teacher, ids, labels, weights, options, normalizers, ignore_index, form, transform, ce);
  run_backward(k, upstream, stats, gradient);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CPU, m) {
  m.impl("topk_forward", TORCH_BOX(&topk_forward));
  m.impl("topk_forward_", TORCH_BOX(&topk_forward_));
  m.impl("topk_backward", TORCH_BOX(&topk_backward));
  m.impl("topk_rescale_", TORCH_BOX(&topk_rescale_));
}

}  // namespace fusedkd
