// Matrix products with float32 results, for whoever has the memory: see product.cpp.
#pragma once

#include "tensor.h"

namespace fusedkd {

// One side of a product: rows of a, columns of b, by the dimension that is summed over. One stride is 1.
struct Operand {
  const char* data;
  ScalarType type;
  int64_t count, stride, depth, depth_stride;  // strides in elements

  Operand(const char* data, ScalarType type, int64_t count, int64_t stride, int64_t depth, int64_t depth_stride)
      : data(data), type(type), count(count), stride(stride), depth(depth), depth_stride(depth_stride) {}
  // Of matrix i, if there are several. `summed`: 0 rows, 1 columns of it.
  Operand(const Tensor& t, int summed, int64_t i)
      : data(static_cast<const char*>(t.data_ptr())), type(t.scalar_type()), count(t.size(t.dim() - 1 - summed)),
        stride(t.stride(t.dim() - 1 - summed)), depth(t.size(t.dim() - 2 + summed)),
        depth_stride(t.stride(t.dim() - 2 + summed)) {
    STD_TORCH_CHECK(t.is_cpu() && (stride == 1 || depth_stride == 1 || t.numel() == 0),
                    "fusedkd: a product needs matrices on the CPU, one of whose strides is 1");
    if (t.dim() == 3) data += i * t.stride(0) * size_of(type);
  }
};

// c = a·b + bias, or c += a·b.
struct Product {
  Operand a, b;
  const float* bias;
  float* c;
  int64_t stride;
  bool add;
};

// Whether this processor multiplies that type, of b, here rather than in PyTorch.
bool has_product(ScalarType type);
// On all threads, or on one if it is one of several. Only where there is one.
void multiply(const Product& p);

}  // namespace fusedkd
