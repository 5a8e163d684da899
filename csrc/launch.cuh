// A kernel launch on the device and the current stream of a tensor.
#ifndef FUSEDKD_LAUNCH
#define FUSEDKD_LAUNCH

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

namespace fusedkd {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, const torch::stable::Tensor& where,
            const Arguments&... arguments) {
  const int device = where.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "fusedkd: a CUDA kernel could not start: ", cudaGetErrorString(error));
}

}  // namespace fusedkd
#endif
