// A kernel launch on the device and the current stream of a tensor.
#ifndef FUSEDKD_LAUNCH
#define FUSEDKD_LAUNCH

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

namespace fusedkd {

inline void check_cuda(cudaError_t error) {
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

// `clusters` times `ranks` blocks, each with `shared` bytes of dynamic shared memory.
template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int64_t clusters, int ranks, int threads, int shared,
                     const torch::stable::Tensor& where, const Arguments&... arguments) {
  const int device = where.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared));
  if (ranks > 8) check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = ranks, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * ranks)), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared, config.stream = current_stream(device);
  config.attrs = &cluster, config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace fusedkd
#endif
