// The CPU operator of a shard of the vocabulary (fusedkd/backends/schema.py): the stages of kd.cpp and topk.cpp, one at
// a time, for the statistics are merged over the shards between them.
#include "call.h"

namespace fusedkd {
namespace {

void kd_shard(Optional upstream, Tensor student, Tensor teacher, Optional ids, Optional labels, Tensor row_weights,
              Tensor options, Tensor normalizers, Tensor stats, Optional gradient, int64_t ignore_index,
              int64_t kernel_id, bool transform, bool ce, bool skip_if_one, int64_t stage, int64_t offset,
              int64_t vocabulary) {
  LogitsCall k(student, teacher, labels, row_weights, options, normalizers, ignore_index, transform, ce);
  const ScalarType type = accumulation_type(k.student.type);
  if (upstream) {
    k.upstream.emplace(*upstream, type, k.student.count);
    if (skip_if_one && k.upstream->scalar && (*k.upstream)[0] == 1) return;
  }
  k.stage = Stage(stage), k.offset = offset, k.vocabulary = vocabulary, k.forward = !k.at(Stage::GRADIENT);
  k.stats = const_cast<char*>(contiguous_data<char>(stats, type, k.stat_columns() * k.student.count, "stats"));
  if (gradient) k.write_gradient(*gradient);
  if (ids) {
    STD_TORCH_CHECK(kernel_id >= 0 && kernel_id < TOPK_KERNELS, "fusedkd: unknown kernel ", kernel_id);
    const int64_t listed = k.student.count * k.teacher.columns;
    run(TopkCall{k, contiguous_data<int64_t>(*ids, ScalarType::Long, listed, "ids"), TopkKernelId(kernel_id)});
  } else {
    STD_TORCH_CHECK(kernel_id >= 0 && kernel_id < KERNELS, "fusedkd: unknown kernel ", kernel_id);
    STD_TORCH_CHECK(k.teacher.columns == k.student.columns, "fusedkd: student and teacher shards do not match");
    run(KdCall{k, KernelId(kernel_id)});
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CPU, m) { m.impl("kd_shard", TORCH_BOX(&kd_shard)); }

}  // namespace fusedkd
