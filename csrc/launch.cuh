// A kernel launch on the device and the current stream of a tensor.
#ifndef FUSEDKD_LAUNCH
#define FUSEDKD_LAUNCH

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <mutex>
#include <tuple>

#include "archs.h"

namespace fusedkd {

inline void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error != cudaErrorNoKernelImageForDevice,
                  "fusedkd: this GPU runs none of fusedkd._C_cuda, which is " FUSEDKD_BUILT_FOR
                  ": build it again with the GPU's in FUSEDKD_CUDA_ARCHS, or without it (FUSEDKD_CUDA=0)");
  STD_TORCH_CHECK(error == cudaSuccess, "fusedkd: a CUDA kernel could not start: ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, const torch::stable::Tensor& where,
            const Arguments&... arguments) {
  const int device = where.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  kernel<<<grid, block, 0, current_stream(device)>>>(arguments...);
  check_cuda(cudaGetLastError());
}

// The streaming multiprocessors of a tensor's device: how many, and bytes of shared memory that each has, that one
// block may have, and that each block takes for itself.
struct Multiprocessors {
  int count, shared, shared_per_block, reserved;
};

inline Multiprocessors multiprocessors(const torch::stable::Tensor& where) {
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, where.get_device_index()));
    return value;
  };
  STD_TORCH_CHECK(attribute(cudaDevAttrComputeCapabilityMajor) == 9, "fusedkd: this kernel runs on Hopper GPUs alone");
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), attribute(cudaDevAttrReservedSharedMemoryPerBlock)};
}

// How `ranks` blocks form a cluster, each with `shared` bytes of dynamic shared memory. A kernel's attributes are set to
// the same values at every call: two threads of the host may launch it at once, for rows of different sizes.
struct Clusters {
  cudaLaunchAttribute dimension{};
  cudaLaunchConfig_t config{};

  template <typename Kernel>
  Clusters(Kernel kernel, int64_t clusters, int ranks, int threads, int shared, const Multiprocessors& sm) {
    const auto set = [&](cudaFuncAttribute name, int value) { check_cuda(cudaFuncSetAttribute(kernel, name, value)); };
    set(cudaFuncAttributeMaxDynamicSharedMemorySize, sm.shared_per_block);
    set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);  // more than 8 blocks
    dimension.id = cudaLaunchAttributeClusterDimension;
    dimension.val.clusterDim.x = ranks, dimension.val.clusterDim.y = dimension.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(clusters * ranks)), config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared, config.attrs = &dimension, config.numAttrs = 1;
  }
  Clusters(const Clusters&) = delete;  // config points into it
};

// Whether the device has room for such a cluster: not every one has for 16 blocks, nor a part of one. No also to a
// kernel that is empty on this device, which is how one of 1 thread is compiled.
template <typename... Parameters>
bool cluster_fits(void (*kernel)(Parameters...), int ranks, int threads, int shared, const Multiprocessors& sm,
                  const torch::stable::Tensor& where) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int>, bool> known;
  const int device = where.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, unknown] = known.try_emplace({reinterpret_cast<const void*>(kernel), device, ranks, shared});
  if (unknown) {
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, kernel));
    int active = 0;
    if (attributes.maxThreadsPerBlock >= threads) {
      const Clusters clusters(kernel, 1, ranks, threads, shared, sm);
      if (cudaOccupancyMaxActiveClusters(&active, kernel, &clusters.config) != cudaSuccess) {
        active = 0;
        cudaGetLastError();  // an answer, and no error of a later call
      }
    }
    entry->second = active > 0;
  }
  return entry->second;
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
