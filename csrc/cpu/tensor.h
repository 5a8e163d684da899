// What the CPU kernels need of torch, through LibTorch's stable ABI: rows with free strides, fresh results, threads
// over rows.
#pragma once
#ifdef FUSEDKD_VECTOR_BYTES
#error "to be included before isa.h, for it is compiled for any processor"
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fusedkd {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline int64_t size_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return 8;
    case ScalarType::Float: return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    default: STD_TORCH_CHECK(false, "fusedkd: expected float16, bfloat16, float32 or float64"); return 0;
  }
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

// The rows of a [B, L, columns] tensor whose last stride is 1. Row b·L + l.
struct Rows {
  char* data;
  ScalarType type;
  int64_t count, columns, inner, outer_bytes, inner_bytes;

  explicit Rows(const Tensor& t) : data(static_cast<char*>(t.data_ptr())), type(t.scalar_type()) {
    STD_TORCH_CHECK(t.dim() == 3 && t.is_cpu(), "fusedkd: expected a [B, L, columns] tensor on the CPU");
    STD_TORCH_CHECK(t.size(2) <= 1 || t.stride(2) == 1, "fusedkd: the last dimension must be contiguous");
    count = t.size(0) * t.size(1), columns = t.size(2), inner = t.size(1);
    outer_bytes = t.stride(0) * size_of(type), inner_bytes = t.stride(1) * size_of(type);
  }
  char* operator[](int64_t i) const {
    const int64_t outer = i < inner ? 0 : i / inner;  // no division in the usual case, B = 1
    return data + outer * outer_bytes + (i - outer * inner) * inner_bytes;
  }
  bool like(const Rows& other) const {
    return type == other.type && count == other.count && inner == other.inner && columns == other.columns;
  }
  int64_t row_bytes() const { return columns * size_of(type); }
};

// Float64 for a float64 student, float32 otherwise: what kernels accumulate in and statistics are kept in.
inline ScalarType accumulation_type(ScalarType student) {
  return student == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
const T* contiguous_data(const Tensor& t, ScalarType type, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == type && t.numel() == count, "fusedkd: ", name,
                  " must be a contiguous CPU tensor of ", count, " elements of ", torch::headeronly::toString(type));
  return static_cast<const T*>(t.data_ptr());
}

// Element i of a tensor of any real type as a weight: a float's value, whether an integer or bool is non-zero.
inline double mask_value(const void* data, ScalarType type, int64_t i) {
  switch (type) {
    case ScalarType::Float: return static_cast<const float*>(data)[i];
    case ScalarType::Double: return static_cast<const double*>(data)[i];
    case ScalarType::Half: return float(static_cast<const Half*>(data)[i]);
    case ScalarType::BFloat16: return float(static_cast<const BFloat16*>(data)[i]);
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char: return static_cast<const int8_t*>(data)[i] != 0;
    case ScalarType::Short: return static_cast<const int16_t*>(data)[i] != 0;
    case ScalarType::Int: return static_cast<const int32_t*>(data)[i] != 0;
    case ScalarType::Long: return static_cast<const int64_t*>(data)[i] != 0;
    default: STD_TORCH_CHECK(false, "fusedkd: a mask must be bool, integer or floating point"); return 0;
  }
}

// A new tensor, contiguous. (torch::stable::new_empty looks up its operator by name, which takes longer than a small
// kernel.)
inline Tensor fresh(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  const auto dimensions = int64_t(sizes.size());
  int64_t strides[4] = {1, 1, 1, 1};
  STD_TORCH_CHECK(dimensions <= 4, "fusedkd: at most four dimensions");
  for (int64_t i = dimensions - 2; i >= 0; i--) strides[i] = strides[i + 1] * std::max<int64_t>(1, sizes[i + 1]);
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dimensions, sizes.data(), strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Asks for huge pages where a large result is going to be written: first touching 62 MB in pages of 4 KB takes longer
// than the kernel that writes it, and a seventh of that with huge pages.
inline void in_huge_pages(const Tensor& result) {
#ifdef __linux__
  constexpr uintptr_t huge = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(result.data_ptr());
  const uintptr_t end = begin + result.numel() * size_of(result.scalar_type());
  const uintptr_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
  if (last > first + 2 * huge) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Calls work(begin, end) over rows on torch's threads. A row belongs to one thread, so that no result depends on their
// number.
template <class Work>
void over_rows(int64_t count, int64_t columns, const Work& work) {
  constexpr int64_t worth_a_thread = 1 << 14;  // elements
  const int64_t grain = worth_a_thread / std::max<int64_t>(1, columns);
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, grain), work);
}
template <class Work>
void over_rows(const Rows& rows, const Work& work) {
  over_rows(rows.count, rows.columns, work);
}

// A scalar ([]) or one value per row ([N]).
struct PerRow {
  const void* data;
  ScalarType type;
  bool scalar;

  PerRow(const Tensor& t, ScalarType type, int64_t rows) : type(type), scalar(t.dim() == 0) {
    data = contiguous_data<char>(t, type, scalar ? 1 : rows, "upstream");
  }
  double operator[](int64_t i) const {
    const int64_t j = scalar ? 0 : i;
    return type == ScalarType::Double ? static_cast<const double*>(data)[j] : static_cast<const float*>(data)[j];
  }
};

}  // namespace fusedkd
