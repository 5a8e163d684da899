// The operator of kd_loss on Hopper GPUs: how many blocks share a row, and which kernel of kd_cluster_kernel.cuh runs.
// Its arguments: fusedkd/backends/schema.py.

#include <algorithm>
#include <cstdint>

#include "archs.h"
#include "kd_cluster_kernel.cuh"
#include "launch.cuh"
#include "tensor.cuh"

namespace fusedkd {

// Bytes that one block of `ranks` needs for rows of `columns`.
template <typename S>
int shared_bytes(int columns, int ranks) {
  constexpr int W = 16 / sizeof(S);
  const int share = per_block(columns / W, ranks) * W;
  return columns_at(ranks) + 2 * held_bytes(share * sizeof(S));
}

// Blocks per row: three of them fit into an SM (two or one only if that takes more than 16), and few rows spread over
// all SMs.
template <typename S>
int choose_ranks(int columns, int64_t count, const Multiprocessors& sm) {
  int ranks = 1;
  while (ranks < kMaxRanks && kResident * (shared_bytes<S>(columns, ranks) + sm.reserved) > sm.shared) ranks *= 2;
  while (ranks < 8 && count * ranks < 2 * sm.count && columns > 2048 * ranks) ranks *= 2;
  return ranks;
}

// Fewer blocks where a device has no room for so many, as long as each can hold its share. False: nothing was launched.
template <typename F, bool kTransform, typename S>
bool run(const KdArguments<S>& p, const Tensor& where) {
  const Multiprocessors sm = multiprocessors(where);
  const auto kernel = kd_cluster_kernel<F, S, kTransform>;
  for (int ranks = choose_ranks<S>(p.columns, p.count, sm); ranks >= 1; ranks /= 2) {
    const int bytes = shared_bytes<S>(p.columns, ranks);
    if (bytes > sm.shared_per_block) return false;
    if (!cluster_fits(kernel, ranks, kThreads, bytes, sm, where)) continue;
    STD_TORCH_CHECK(p.count <= 0x7fffffff / ranks, "fusedkd: too many rows: ", p.count);
    launch_clusters(kernel, p.count, ranks, kThreads, bytes, sm, where, p);
    return true;
  }
  return false;
}

// Soft-caps come with forward KL alone: twice as many kernels would compile for twice as long.
template <typename S>
bool run(KernelId kernel_id, bool transform, const KdArguments<S>& p, const Tensor& where) {
  STD_TORCH_CHECK(!transform || kernel_id == KernelId::FORWARD_KL,
                  "fusedkd: kd_cluster soft-caps for forward KL alone");
  if (transform) return run<ForwardKL<float>, true>(p, where);
  return with_divergence<float>(kernel_id, [&]<typename F>() { return run<F, false>(p, where); });
}

// False where the device has no room for a cluster that holds a row, and nothing was written.
bool kd_cluster(const Tensor& student, const Tensor& teacher, const Optional& labels, const Tensor& row_weights,
                const Tensor& options, const Tensor& normalizers, const Optional& upstream, const Optional& rows,
                const Tensor& stats, const Optional& gradient, int64_t ignore_index, int64_t kernel_id, bool transform,
                bool ce, bool skip_if_one) {
  for (const Tensor* logits : {&student, &teacher, gradient ? &*gradient : &student}) {
    STD_TORCH_CHECK(logits->dim() == 3 && (logits->size(2) <= 1 || logits->stride(2) == 1) &&
                        logits->size(0) == student.size(0) && logits->size(1) == student.size(1) &&
                        logits->scalar_type() == student.scalar_type() && logits->device() == student.device(),
                    "fusedkd: logits must be [B, L, columns] of one type, with a contiguous last dimension");
  }
  const int64_t length = student.size(1), count = student.size(0) * length;
  STD_TORCH_CHECK(teacher.size(2) <= student.size(2) && (!gradient || gradient->size(2) == student.size(2)),
                  "fusedkd: the teacher has more columns than the student, or the gradient others");
  STD_TORCH_CHECK(student.size(2) < (1 << 24), "fusedkd: too many columns");
  STD_TORCH_CHECK(upstream.has_value() != rows.has_value(), "fusedkd: expected an upstream gradient, or rows to write");
  if (count == 0) return true;
  return with_type<BFloat16, Half, float>(student.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    KdArguments<S> p{};
    p.student = student.const_data_ptr<S>(), p.teacher = teacher.const_data_ptr<S>();
    p.gradient = gradient ? gradient->mutable_data_ptr<S>() : nullptr;
    for (int d = 0; d < 2; ++d) {
      p.z_strides[d] = student.stride(d), p.v_strides[d] = teacher.stride(d);
      p.gradient_strides[d] = gradient ? gradient->stride(d) : 0;
    }
    p.labels = labels ? data_of<int64_t>(*labels, student, count, "labels") : nullptr;
    p.weights = data_of<float>(row_weights, student, count, "row_weights");
    p.options = data_of<double>(options, student, OPTIONS, "options");
    p.normalizers = data_of<double>(normalizers, student, NORMALIZERS, "normalizers");
    if (upstream) {
      p.upstream = upstream_of<float>(*upstream, student, count, p.upstream_stride);
    }
    p.rows = rows ? data_of<float>(*rows, student, 2 * count, "rows") : nullptr;
    p.stats = data_of<float>(stats, student, STATS * count, "stats");
    p.ignore_index = ignore_index, p.count = count, p.length = length;
    p.columns = static_cast<int>(student.size(2)), p.common = static_cast<int>(teacher.size(2));
    p.ce = ce, p.skip_if_one = skip_if_one;
    return run(static_cast<KernelId>(kernel_id), transform, p, student);
  });
}

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CUDA, m) {
  if (has_hopper(FUSEDKD_CUDA_ARCHS)) m.impl("kd_cluster", TORCH_BOX(&kd_cluster));  // otherwise Triton answers
}

}  // namespace fusedkd
