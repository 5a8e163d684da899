// What the CUDA runtime is told and asked of thread-block clusters. tests/clusters_on_host.cpp runs it without a GPU.
#ifndef FUSEDKD_CLUSTERS
#define FUSEDKD_CLUSTERS

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
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

// The streaming multiprocessors of a device: how many, and bytes of shared memory that each has, that one block may
// have, and that each block takes for itself.
struct Multiprocessors {
  int count, shared, shared_per_block, reserved;
};

inline Multiprocessors multiprocessors(int device) {
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, device));
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

// Whether the device, which is the current one, has room for such a cluster: not every GPU has for 16 blocks, nor a part
// of one. No also for a kernel that is empty on this device, which is how one of 1 thread is compiled.
template <typename... Parameters>
bool cluster_fits(void (*kernel)(Parameters...), int ranks, int threads, int shared, const Multiprocessors& sm,
                  int device) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int>, bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::tuple shape{reinterpret_cast<const void*>(kernel), device, ranks, shared};
  if (const auto found = known.find(shape); found != known.end()) return found->second;
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
  return known[shape] = active > 0;
}

}  // namespace fusedkd
#endif
