// The CPU operators of kd_loss (fusedkd/backends/schema.py): they check their tensors and call the kernel of kd.cpp or,
// for a teacher known at K columns, of topk.cpp.
#include "call.h"

namespace fusedkd {
namespace {

// Calls use(k) with the call that the arguments describe.
template <class Use>
void with_call(const Tensor& student, const Tensor& teacher, const Optional& ids, const Optional& labels,
               const Tensor& row_weights, const Tensor& options, const Tensor& normalizers, int64_t ignore_index,
               int64_t kernel_id, bool transform, bool ce, const Use& use) {
  const LogitsCall k(student, teacher, labels, row_weights, options, normalizers, ignore_index, transform, ce);
  if (ids) {
    STD_TORCH_CHECK(kernel_id >= 0 && kernel_id < TOPK_KERNELS, "fusedkd: unknown kernel ", kernel_id);
    const int64_t listed = k.student.count * k.teacher.columns;
    use(TopkCall{k, contiguous_data<int64_t>(*ids, ScalarType::Long, listed, "ids"), TopkKernelId(kernel_id)});
  } else {
    STD_TORCH_CHECK(kernel_id >= 0 && kernel_id < KERNELS, "fusedkd: unknown kernel ", kernel_id);
    STD_TORCH_CHECK(k.teacher.columns <= k.student.columns, "fusedkd: student and teacher rows do not match");
    use(KdCall{k, KernelId(kernel_id)});
  }
}

std::tuple<Tensor, Tensor> kd_forward(Tensor student, Tensor teacher, Optional ids, Optional labels, Tensor row_weights,
                                      Tensor options, Tensor normalizers, Optional gradient, int64_t ignore_index,
                                      int64_t kernel_id, bool transform, bool ce) {
  const ScalarType type = accumulation_type(student.scalar_type());
  const int64_t count = student.size(0) * student.size(1);
  Tensor row_losses = fresh({2, count}, type);
  Tensor stats = fresh({count, STATS}, type);
  with_call(student, teacher, ids, labels, row_weights, options, normalizers, ignore_index, kernel_id, transform, ce,
            [&](auto k) {
              k.forward = true, k.rows = row_losses.data_ptr(), k.stats = stats.data_ptr();
              if (gradient) k.write_gradient(*gradient);
              run(k);
            });
  return {row_losses, stats};
}

void kd_backward(Tensor upstream, Tensor student, Tensor teacher, Optional ids, Optional labels, Tensor row_weights,
                 Tensor options, Tensor normalizers, Tensor stats, Tensor gradient, int64_t ignore_index,
                 int64_t kernel_id, bool transform, bool ce, bool skip_if_one) {
  const ScalarType type = accumulation_type(student.scalar_type());
  const PerRow up(upstream, type, student.size(0) * student.size(1));
  if (skip_if_one && up.scalar && up[0] == 1) return;
  with_call(student, teacher, ids, labels, row_weights, options, normalizers, ignore_index, kernel_id, transform, ce,
            [&](auto k) {
              k.stats = const_cast<char*>(contiguous_data<char>(stats, type, STATS * k.student.count, "stats"));
              k.upstream = up;
              k.write_gradient(gradient);
              run(k);
            });
}

// kd_forward, and row by row the same with the sides exchanged: the teacher's gradient and statistics.
std::tuple<Tensor, Tensor, Tensor> kd_both(Tensor student, Tensor teacher, Optional labels, Tensor row_weights,
                                           Tensor options, Tensor normalizers, Tensor exchanged, Optional gradient,
                                           Optional teacher_gradient, int64_t ignore_index, int64_t kernel_id,
                                           int64_t exchanged_kernel_id, bool transform, bool ce) {
  const LogitsCall k(student, teacher, labels, row_weights, options, normalizers, ignore_index, transform, ce);
  const LogitsCall e(teacher, student, std::nullopt, row_weights, exchanged, normalizers, ignore_index, transform,
                     false);
  const ScalarType type = accumulation_type(k.student.type);
  STD_TORCH_CHECK(std::min(kernel_id, exchanged_kernel_id) >= 0 && std::max(kernel_id, exchanged_kernel_id) < KERNELS,
                  "fusedkd: unknown kernel");
  STD_TORCH_CHECK(k.teacher.columns <= k.student.columns && accumulation_type(k.teacher.type) == type,
                  "fusedkd: student and teacher rows do not match");
  STD_TORCH_CHECK(!gradient || gradient->data_ptr() != student.data_ptr(),
                  "fusedkd: the teacher's gradient needs the student's logits, which the student's would overwrite");
  Tensor row_losses = fresh({2, k.student.count}, type);
  Tensor stats = fresh({k.student.count, STATS}, type), others = fresh({k.student.count, STATS}, type);
  KdCall own{k, KernelId(kernel_id), true}, other{e, KernelId(exchanged_kernel_id)};
  other.teacher.columns = other.student.columns;
  own.forward = other.forward = true;
  own.rows = row_losses.data_ptr(), own.stats = stats.data_ptr(), other.stats = others.data_ptr();
  if (gradient) own.write_gradient(*gradient);
  if (teacher_gradient) other.write_gradient(*teacher_gradient);
  run_both(own, other);
  return {row_losses, stats, others};
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
                                          Optional normalizers, Optional given, int64_t ignore_index, bool kd) {
  STD_TORCH_CHECK(!given, "fusedkd: on a CPU, options that are tensors are packed before");
  const Rows v(teacher);
  Tensor weights = fresh({v.count}, ScalarType::Float);
  Tensor counts = fresh({NORMALIZERS}, ScalarType::Double);
  float* w = static_cast<float*>(weights.data_ptr());
  const ScalarType type = kd_mask ? kd_mask->scalar_type() : ScalarType::Bool;
  const void* mask = kd_mask ? contiguous_data<char>(*kd_mask, type, v.count, "kd_mask") : nullptr;
  const int64_t* label = labels ? contiguous_data<int64_t>(*labels, ScalarType::Long, v.count, "labels") : nullptr;
  const int64_t* id = ids ? contiguous_data<int64_t>(*ids, ScalarType::Long, v.count * v.columns, "ids") : nullptr;
  over_rows(v, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      w[i] = !kd ? 0 : mask ? float(mask_value(mask, type, i)) : !label || label[i] != ignore_index;
      if (w[i] != 0 && !known(v, i, id)) w[i] = 0;
    }
  });
  const bool summed = mask && is_floating(type);
  double found[NORMALIZERS] = {};
  for (int64_t i = 0; i < v.count; i++) {
    found[KD_NORMALIZER] += summed ? w[i] : w[i] != 0;
    found[CE_NORMALIZER] += label && label[i] != ignore_index;
  }
  const double* other =
      normalizers ? contiguous_data<double>(*normalizers, ScalarType::Double, NORMALIZERS, "normalizers") : nullptr;
  double* n = static_cast<double*>(counts.data_ptr());
  for (int64_t k = 0; k < NORMALIZERS; k++) {
    n[k] = other && other[k] != COUNTED ? other[k] : found[k];
    if (n[k] <= 0) n[k] = 1;  // a NaN stays one
  }
  return {weights, counts};
}

// Whether every label is ignore_index or one of the classes.
bool legal_labels(const Tensor& labels, int64_t count, int64_t classes, int64_t ignore_index) {
  const int64_t* y = contiguous_data<int64_t>(labels, ScalarType::Long, count, "labels");
  bool illegal = false;
  for (int64_t i = 0; i < count; i++) illegal |= y[i] != ignore_index && uint64_t(y[i]) >= uint64_t(classes);
  return !illegal;
}

// (loss, kd, ce): per row, or sums over rows and normalisers, in a fixed order. A term whose weight is 0 adds 0.
template <class A>
void terms(const Tensor& rows, const double* options, int64_t option_stride, const double* normalizers, bool per_row,
           A* loss, A* more) {
  const int64_t n = rows.size(1), size = per_row ? n : 1;
  const A* x = static_cast<const A*>(rows.data_ptr());
  const auto weighted = [](double weight, double term) { return weight == 0 ? 0 : weight * term; };
  const auto of_row = [&](int64_t i) { return weighted(options[i * option_stride + KD_WEIGHT], x[i]); };
  const auto put = [&](int64_t i, double kd, double weighted_kd, double ce) {
    loss[i] = A(weighted_kd + weighted(options[CE_WEIGHT], ce));
    if (more) more[i] = A(kd), more[size + i] = A(ce);
  };
  double kd = 0, ce = 0, of_rows = 0;  // of_rows: where each has a weight of its own
  for (int64_t i = 0; i < n; i++) {
    if (per_row) put(i, x[i], of_row(i), x[n + i]);
    kd += x[i], ce += x[n + i];
    if (option_stride) of_rows += of_row(i);
  }
  if (per_row) return;
  const double n_kd = normalizers[KD_NORMALIZER];
  put(0, kd / n_kd, option_stride ? of_rows / n_kd : weighted(options[KD_WEIGHT], kd / n_kd),
      ce / normalizers[CE_NORMALIZER]);
}

Tensor kd_terms(Tensor row_losses, Tensor options, Tensor normalizers, Optional given, bool per_row) {
  const ScalarType type = accumulation_type(row_losses.scalar_type());
  STD_TORCH_CHECK(row_losses.dim() == 2 && row_losses.size(0) == 2, "fusedkd: row_losses must be [2, N]");
  contiguous_data<char>(row_losses, type, row_losses.numel(), "row_losses");
  const int64_t size = row_losses.size(1), stride = options.dim() == 2 ? OPTIONS : 0;
  const double* o = options_data(options, size);
  const double* n = contiguous_data<double>(normalizers, ScalarType::Double, NORMALIZERS, "normalizers");
  Tensor loss = fresh({&size, size_t(per_row)}, type);
  const auto fill = [&]<class A>(A* to) {
    const A* more = given ? contiguous_data<A>(*given, type, 2 * loss.numel(), "terms") : nullptr;
    terms<A>(row_losses, o, stride, n, per_row, to, const_cast<A*>(more));
  };
  if (type == ScalarType::Double) fill(static_cast<double*>(loss.data_ptr()));
  else fill(static_cast<float*>(loss.data_ptr()));
  return loss;
}

// The three above in one call.
std::tuple<Tensor, Tensor, Tensor, Tensor> kd_loss(Tensor student, Tensor teacher, Optional ids, Optional labels,
                                                   Optional kd_mask, Tensor options, Optional normalizers,
                                                   Optional given, Optional gradient, Optional to, int64_t ignore_index,
                                                   int64_t kernel_id, bool transform, bool kd, bool ce,
                                                   bool needs_labels, bool per_row, bool checked) {
  const bool labels_read = ce || needs_labels;
  if (checked) {
    constexpr int64_t any = int64_t(1) << 62;
    const int64_t columns = student.size(2);
    bool legal = !labels || legal_labels(*labels, labels->numel(), labels_read ? columns : any, ignore_index);
    if (legal && ids) {
      const Rows known(teacher);
      const int64_t* id = contiguous_data<int64_t>(*ids, ScalarType::Long, known.count * known.columns, "ids");
      legal = fusedkd::legal({known, id, columns, TopkKernelId(kernel_id) == TopkKernelId::SAMPLES});
    }
    STD_TORCH_CHECK(legal, "fusedkd: a label or a listed column is not as it must be");
  }
  const auto [weights, counts] = kd_row_weights(teacher, ids, labels, kd_mask, normalizers, given, ignore_index, kd);
  const auto [row_losses, stats] = kd_forward(student, teacher, ids, labels_read ? labels : std::nullopt, weights,
                                              options, counts, gradient, ignore_index, kernel_id, transform, ce);
  return {kd_terms(row_losses, options, counts, to, per_row), weights, counts, stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CPU, m) {
  m.impl("kd_row_weights", TORCH_BOX(&kd_row_weights));
  m.impl("kd_forward", TORCH_BOX(&kd_forward));
  m.impl("kd_backward", TORCH_BOX(&kd_backward));
  m.impl("kd_terms", TORCH_BOX(&kd_terms));
  m.impl("kd_loss", TORCH_BOX(&kd_loss));
  m.impl("kd_both", TORCH_BOX(&kd_both));
}

}  // namespace fusedkd
