// What the CUDA operators need of torch, through LibTorch's stable ABI: tensors' memory, their element types, 16 bytes
// of their elements.
#ifndef FUSEDKD_TENSOR
#define FUSEDKD_TENSOR

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>

namespace fusedkd {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <typename T>
T* data_of(const Tensor& tensor, const Tensor& student, int64_t count, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == count && tensor.device() == student.device(),
                  "fusedkd: ", name, " must be contiguous, of ", count, " elements, on the student's device");
  return tensor.mutable_data_ptr<T>();
}

// The upstream gradient, a scalar ([]) or one value per row ([N]); the stride is 0 or 1.
template <typename A>
const A* upstream_of(const Tensor& upstream, const Tensor& student, int64_t count, int64_t& stride) {
  stride = upstream.dim() == 0 ? 0 : 1;
  return data_of<A>(upstream, student, stride ? count : 1, "upstream");
}

// use(T{}) for the one of Types that is `type`.
template <typename T, typename... Types, typename Use>
auto with_type(ScalarType type, const Use& use) {
  if (type == torch::headeronly::CppTypeToScalarType<T>::value) return use(T{});
  if constexpr (sizeof...(Types) > 0) {
    return with_type<Types...>(type, use);
  } else {
    STD_TORCH_CHECK(false, "fusedkd: no kernel takes ", torch::headeronly::toString(type));
    return use(T{});
  }
}

// W neighbours in memory, moved together if that is no more than 16 bytes.
template <typename T, int W>
struct alignas(std::min<size_t>(16, W * sizeof(T))) Pack {
  T value[W];
};

}  // namespace fusedkd
#endif
