// The CPU operators of kd_loss for teachers known at K columns: their arguments become a TopkCall, and topk_rows.h does
// the rest, compiled once per instruction set.
#include "call.h"

namespace fusedkd {

enum class SparseForm {  // fusedkd/sparse.py
  renormalize, renormalize_reverse, bucket, bucket_reverse, ignore, ignore_reverse, samples
};

struct TopkCall : LogitsCall {
  const int64_t* ids;  // [N, K]
  SparseForm form;
};

}  // namespace fusedkd

#define FUSEDKD_BODY "topk_rows.h"
#include "isa.h"

namespace fusedkd {
namespace {

TopkCall call(const Tensor& student, const Tensor& teacher, const Tensor& ids, const Optional& labels,
              const Tensor& weights, const Tensor& options, const Tensor& normalizers, int64_t ignore_index,
              int64_t form, bool transform, bool ce) {
  const LogitsCall k(student, teacher, labels, weights, options, normalizers, ignore_index, transform, ce);
  STD_TORCH_CHECK(form >= 0 && form <= int64_t(SparseForm::samples), "fusedkd: there is no form ", form);
  const int64_t listed = k.student.count * k.teacher.columns;
  return {k, contiguous_data<int64_t>(ids, ScalarType::Long, listed, "ids"), SparseForm(form)};
}

void run(const TopkCall& k) {
  over_rows(k.student, [&](int64_t begin, int64_t end) { FUSEDKD_CALL(topk_rows, k, begin, end) });
}

std::tuple<Tensor, Tensor, Tensor> topk_forward(Tensor student, Tensor teacher, Tensor ids, Optional labels,
                                                Tensor weights, Tensor options, Tensor normalizers,
                                                int64_t ignore_index, int64_t form, bool transform, bool ce,
                                                bool gradient) {
  TopkCall k = call(student, teacher, ids, labels, weights, options, normalizers, ignore_index, form, transform, ce);
  return run_forward(k, student, gradient, run);
}

std::tuple<Tensor, Tensor> topk_forward_(Tensor student, Tensor teacher, Tensor ids, Optional labels, Tensor weights,
                                         Tensor options, Tensor normalizers, int64_t ignore_index, int64_t form,
                                         bool transform, bool ce) {
  TopkCall k = call(student, teacher, ids, labels, weights, options, normalizers, ignore_index, form, transform, ce);
  k.gradient = k.student;
  return run_forward(k, student, run);
}

Tensor topk_backward(Tensor upstream, Tensor student, Tensor teacher, Tensor ids, Optional labels, Tensor weights,
                     Tensor options, Tensor normalizers, Tensor stats, int64_t ignore_index, int64_t form,
                     bool transform, bool ce) {
  TopkCall k = call(student, teacher, ids, labels, weights, options, normalizers, ignore_index, form, transform, ce);
  Tensor out = fresh_like(student);
  run_backward(k, upstream, stats, out, run);
  return out;
}

void topk_rescale_(Tensor gradient, Tensor upstream, Tensor student, Tensor teacher, Tensor ids, Optional labels,
                   Tensor weights, Tensor options, Tensor normalizers, Tensor stats, int64_t ignore_index, int64_t form,
                   bool transform, bool ce) {
  if (PerRow(upstream, accumulation_type(student.scalar_type()), 1)[0] == 1) return;
  TopkCall k = call(student, teacher, ids, labels, weights, options, normalizers, ignore_index, form, transform, ce);
  run_backward(k, upstream, stats, gradient, run);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CPU, m) {
  m.impl("topk_forward", TORCH_BOX(&topk_forward));
  m.impl("topk_forward_", TORCH_BOX(&topk_forward_));
  m.impl("topk_backward", TORCH_BOX(&topk_backward));
  m.impl("topk_rescale_", TORCH_BOX(&topk_rescale_));
}

}  // namespace fusedkd
