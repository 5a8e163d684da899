// The CPU operators of kd_loss: their arguments become a KdCall, and kd_rows.h does the rest, compiled once per
// instruction set.
#include "call.h"

namespace fusedkd {

struct KdCall : LogitsCall {
  int64_t form;
};

}  // namespace fusedkd

#define FUSEDKD_BODY "kd_rows.h"
#include "isa.h"

namespace fusedkd {
namespace {

KdCall call(const Tensor& student, const Tensor& teacher, const Optional& labels, const Tensor& weights,
            const Tensor& options, const Tensor& normalizers, int64_t ignore_index, int64_t form, bool transform,
            bool ce) {
  const LogitsCall k(student, teacher, labels, weights, options, normalizers, ignore_index, transform, ce);
  STD_TORCH_CHECK(k.teacher.columns <= k.student.columns, "fusedkd: student and teacher rows do not match");
  STD_TORCH_CHECK(form >= 0 && form <= int64_t(plain::Form::dkd), "fusedkd: there is no form ", form);
  return {k, form};
}

void run(const KdCall& k) {
  over_rows(k.student, [&](int64_t begin, int64_t end) { FUSEDKD_CALL(kd_rows, k, begin, end) });
}

std::tuple<Tensor, Tensor, Tensor> kd_forward(Tensor student, Tensor teacher, Optional labels, Tensor weights,
                                              Tensor options, Tensor normalizers, int64_t ignore_index, int64_t form,
                                              bool transform, bool ce, bool gradient) {
  KdCall k = call(student, teacher, labels, weights, options, normalizers, ignore_index, form, transform, ce);
  return run_forward(k, student, gradient, run);
}

std::tuple<Tensor, Tensor> kd_forward_(Tensor student, Tensor teacher, Optional labels, Tensor weights, Tensor options,
                                       Tensor normalizers, int64_t ignore_index, int64_t form, bool transform,
                                       bool ce) {
  KdCall k = call(student, teacher, labels, weights, options, normalizers, ignore_index, form, transform, ce);
  k.gradient = k.student;
  return run_forward(k, student, run);
}

Tensor kd_backward(Tensor upstream, Tensor student, Tensor teacher, Optional labels, Tensor weights, Tensor options,
                   Tensor normalizers, Tensor stats, int64_t ignore_index, int64_t form, bool transform, bool ce) {
  KdCall k = call(student, teacher, labels, weights, options, normalizers, ignore_index, form, transform, ce);
  Tensor out = fresh_like(student);
  run_backward(k, upstream, stats, out, run);
  return out;
}

void kd_rescale_(Tensor gradient, Tensor upstream, Tensor student, Tensor teacher, Optional labels, Tensor weights,
                 Tensor options, Tensor normalizers, Tensor stats, int64_t ignore_index, int64_t form, bool transform,
                 bool ce) {
  if (PerRow(upstream, accumulation_type(student.scalar_type()), 1)[0] == 1) return;
  KdCall k = call(student, teacher, labels, weights, options, normalizers, ignore_index, form, transform, ce);
  run_backward(k, upstream, stats, gradient, run);
}

// Element i of a tensor of any real type as a weight: a float's value, whether an integer or bool is non-zero.
double mask_value(const void* data, ScalarType type, int64_t i) {
  switch (type) {
    case ScalarType::Float: return static_cast<const float*>(data)[i];
    case ScalarType::Double: return static_cast<const double*>(data)[i];
    case ScalarType::Half: return float(static_cast<const Half*>(data)[i]);
    case ScalarType::BFloat16: return float(static_cast<const BFloat16*>(data)[i]);
    case ScalarType::Bool: case ScalarType::Byte:
    case ScalarType::Char: return static_cast<const int8_t*>(data)[i] != 0;
    case ScalarType::Short: return static_cast<const int16_t*>(data)[i] != 0;
    case ScalarType::Int: return static_cast<const int32_t*>(data)[i] != 0;
    case ScalarType::Long: return static_cast<const int64_t*>(data)[i] != 0;
    default: STD_TORCH_CHECK(false, "fusedkd: kd_mask must be bool, integer or floating point"); return 0;
  }
}

// Whether a row has a column, of the list where there are ids, that is not −∞.
bool known(const Rows& rows, int64_t i, const int64_t* ids) {
  for (int64_t j = 0; j < rows.columns; j++) {
    if (ids && ids[i * rows.columns + j] < 0) continue;
    const char* at = rows[i] + j * size_of(rows.type);
    if (mask_value(at, rows.type, 0) != -std::numeric_limits<double>::infinity()) return true;
  }
  return false;
}

std::tuple<Tensor, Tensor> kd_row_weights(Tensor teacher, Optional ids, Optional labels, Optional kd_mask,
                                          int64_t ignore_index, bool kd) {
  const Rows v(teacher);
  Tensor weights = torch::stable::new_empty(teacher, {v.count}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(teacher, {2}, ScalarType::Double);
  float* w = static_cast<float*>(weights.data_ptr());
  const ScalarType type = kd_mask ? kd_mask->scalar_type() : ScalarType::Bool;
  const void* mask = kd_mask ? contiguous_data<char>(*kd_mask, type, v.count, "kd_mask") : nullptr;
  const int64_t* label = labels ? contiguous_data<int64_t>(*labels, ScalarType::Long, v.count, "labels") : nullptr;
  const int64_t* id = ids ? contiguous_data<int64_t>(*ids, ScalarType::Long, v.count * v.columns, "ids") : nullptr;
  const bool summed = mask && is_floating(type);
  double selected = 0, labelled = 0;
  for (int64_t i = 0; i < v.count; i++) {
    const bool has_label = label && label[i] != ignore_index;
    w[i] = !kd ? 0 : mask ? float(mask_value(mask, type, i)) : !label || has_label;
    if (w[i] != 0 && !known(v, i, id)) w[i] = 0;
    selected += summed ? w[i] : w[i] != 0, labelled += has_label;
  }
  double* n = static_cast<double*>(counts.data_ptr());
  n[0] = selected <= 0 ? 1 : selected, n[1] = labelled <= 0 ? 1 : labelled;
  return {weights, counts};
}

// (loss, kd, ce): per row, or sums over rows and normalisers, in a fixed order. A term whose weight is 0 adds 0.
template <class A>
void terms(const Tensor& rows, const double* options, const double* normalizers, bool per_row, Tensor (&out)[3]) {
  const int64_t n = rows.size(1);
  const A* x = static_cast<const A*>(rows.data_ptr());
  A* to[3];
  for (int k = 0; k < 3; k++) to[k] = static_cast<A*>(out[k].data_ptr());
  const auto put = [&](int64_t i, double kd, double ce) {
    const double kd_weight = options[3], ce_weight = options[4];
    to[0][i] = A((kd_weight == 0 ? 0 : kd_weight * kd) + (ce_weight == 0 ? 0 : ce_weight * ce));
    to[1][i] = A(kd), to[2][i] = A(ce);
  };
  double kd = 0, ce = 0;
  for (int64_t i = 0; i < n; i++) {
    if (per_row) put(i, x[i], x[n + i]);
    kd += x[i], ce += x[n + i];
  }
  if (!per_row) put(0, kd / normalizers[0], ce / normalizers[1]);
}

std::tuple<Tensor, Tensor, Tensor> kd_terms(Tensor rows, Tensor options, Tensor normalizers, bool per_row) {
  const ScalarType type = accumulation_type(rows.scalar_type());
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) == 2, "fusedkd: rows must be [2, N]");
  contiguous_data<char>(rows, type, rows.numel(), "rows");
  const double* o = contiguous_data<double>(options, ScalarType::Double, OPTIONS, "options");
  const double* n = contiguous_data<double>(normalizers, ScalarType::Double, 2, "normalizers");
  const int64_t size = rows.size(1);
  const auto fresh = [&] { return torch::stable::new_empty(rows, {&size, size_t(per_row)}); };
  Tensor out[3] = {fresh(), fresh(), fresh()};
  type == ScalarType::Double ? terms<double>(rows, o, n, per_row, out) : terms<float>(rows, o, n, per_row, out);
  return {out[0], out[1], out[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CPU, m) {
  m.impl("kd_row_weights", TORCH_BOX(&kd_row_weights));
  m.impl("kd_forward", TORCH_BOX(&kd_forward));
  m.impl("kd_forward_", TORCH_BOX(&kd_forward_));
  m.impl("kd_backward", TORCH_BOX(&kd_backward));
  m.impl("kd_rescale_", TORCH_BOX(&kd_rescale_));
  m.impl("kd_terms", TORCH_BOX(&kd_terms));
}

}  // namespace fusedkd

// The instruction set in use, for whoever asks (ctypes).
extern "C" __attribute__((visibility("default"))) const char* fusedkd_isa() {
  return fusedkd::ISA_NAMES[int(fusedkd::isa())];
}
