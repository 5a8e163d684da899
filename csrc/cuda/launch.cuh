// A kernel launch on the device and the current stream of a tensor.
#ifndef FUSEDKD_LAUNCH
#define FUSEDKD_LAUNCH

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "clusters.cuh"

namespace fusedkd {

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Multiprocessors multiprocessors(const torch::stable::Tensor& where) {
  return multiprocessors(where.get_device_index());
}

template <typename Kernel>
bool cluster_fits(Kernel kernel, int ranks, int threads, int shared, const Multiprocessors& sm,
                  const torch::stable::Tensor& where) {
  const int device = where.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  return cluster_fits(kernel, ranks, threads, shared, sm, device);
}

template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int64_t count, int ranks, int threads, int shared,
                     const Multiprocessors& sm, const torch::stable::Tensor& where, const Arguments&... arguments) {
  const int device = where.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Clusters clusters(kernel, count, ranks, threads, shared, sm);
  clusters.config.stream = current_stream(device);
  check_cuda(cudaLaunchKernelEx(&clusters.config, kernel, arguments...));
}

}  // namespace fusedkd
#endif
