// Matrix products with float32 sums and results on processors with AVX-512: of bfloat16 where an instruction multiplies
// it, which PyTorch offers with bfloat16 results alone; of float32 where PyTorch's library runs at half the speed.
//
// A float32 operand beside one of bfloat16 is rounded to it.
//
// c[m, n] = Σ_k a[m, k]·b[k, n] is cut into chunks of all three dimensions. The threads pack the chunk of a and that of
// b, each number once, then share out the tiles of c (the scheme of Goto and van de Geijn 2008, and of BLIS). A tile is
// one thread's, and the chunks have sizes of their own, so that no result depends on the number of threads.
#include "isa.h"
#include "tensor.h"

namespace fusedkd {
namespace {

constexpr int64_t TILE_ROWS = 6, TILE_COLUMNS = 64;                        // 24 registers of 16 sums, 4 of b, 1 of a
constexpr int64_t BLOCK_ROWS = 48;                                         // of a are packed side by side
constexpr int64_t MOST_ROWS = 960, MOST_COLUMNS = 1024, MOST_STEPS = 512;  // of a chunk: 2 MB packed of either side

// One side of a product: rows of a, columns of b, by the dimension that is summed over. One stride is 1.
struct Operand {
  const char* data;
  ScalarType type;
  int64_t count, stride, depth, depth_stride;  // strides in elements

  Operand(const Tensor& t, int summed)
      : data(static_cast<const char*>(t.data_ptr())), type(t.scalar_type()), count(t.size(1 - summed)),
        stride(t.stride(1 - summed)), depth(t.size(summed)), depth_stride(t.stride(summed)) {
    STD_TORCH_CHECK(t.dim() == 2 && t.is_cpu() && (stride == 1 || depth_stride == 1 || t.numel() == 0),
                    "fusedkd: a product needs matrices on the CPU, one of whose strides is 1");
  }
};

// Of one instruction set: product_tile.h.
struct Kernel {
  int64_t per_step;
  void (*pack)(const Operand& from, int64_t row, int64_t rows, int64_t k, int64_t depth, int64_t width, uint32_t* to);
  void (*multiply)(const uint32_t* a, const uint32_t* b, int64_t steps, float* c, int64_t stride, int64_t rows,
                   int64_t columns, bool add, const float* bias);
};

}  // namespace
}  // namespace fusedkd

#ifdef FUSEDKD_X86
#define INLINE inline __attribute__((always_inline))
FUSEDKD_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FUSEDKD_NAMESPACE fusedkd::avx512
#include "product_tile.h"
#undef FUSEDKD_NAMESPACE
FUSEDKD_END_TARGET

FUSEDKD_TARGET("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FUSEDKD_NAMESPACE fusedkd::avx512_bf16
#define FUSEDKD_BF16
#include "product_tile.h"
#undef FUSEDKD_NAMESPACE
FUSEDKD_END_TARGET
#endif

namespace fusedkd {
namespace {

// The one that multiplies b's type on this processor; null where PyTorch does it as well or better: Intel's library has
// float32 at full speed on Intel's processors alone.
const Kernel* kernel_for(ScalarType type) {
#ifdef FUSEDKD_X86
  if (type == ScalarType::BFloat16 && isa() == Isa::avx512_bf16) return &avx512_bf16::KERNEL;
  if (type == ScalarType::Float && isa() >= Isa::avx512 && !__builtin_cpu_is("intel")) return &avx512::KERNEL;
#endif
  (void)type;
  return nullptr;
}

int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Calls work(i) for i in [0, count) on torch's threads, each of which takes `size` multiplications or copies.
template <class Work> void in_parallel(int64_t count, int64_t size, int64_t worth_a_thread, const Work& work) {
  const int64_t grain = ceil_div(worth_a_thread, std::max<int64_t>(1, size));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) work(i);
  });
}

struct Product {
  Operand a, b;
  const float* bias;
  float* c;
  int64_t stride;
  bool add;
};

// Of the chunk of a from row i, of b from column j, and of both from k.
void run_chunk(const Kernel& kernel, const Product& p, int64_t i, int64_t j, int64_t k, int64_t depth,
               uint32_t* packed_a, uint32_t* packed_b) {
  const int64_t rows = std::min(MOST_ROWS, p.a.count - i), columns = std::min(MOST_COLUMNS, p.b.count - j);
  const int64_t blocks = ceil_div(rows, BLOCK_ROWS), panels = ceil_div(columns, TILE_COLUMNS);
  const int64_t steps = ceil_div(depth, kernel.per_step);
  in_parallel(blocks + panels, steps * BLOCK_ROWS, 1 << 14, [&](int64_t u) {
    const int64_t row = u * BLOCK_ROWS, column = (u - blocks) * TILE_COLUMNS;
    if (u < blocks) kernel.pack(p.a, i + row, rows - row, k, depth, BLOCK_ROWS, packed_a + row * steps);
    else kernel.pack(p.b, j + column, columns - column, k, depth, TILE_COLUMNS, packed_b + column * steps);
  });
  in_parallel(blocks * panels, steps * BLOCK_ROWS * TILE_COLUMNS, 1 << 19, [&](int64_t u) {
    const int64_t block = u / panels * BLOCK_ROWS, column = u % panels * TILE_COLUMNS;
    const int64_t end = std::min(block + BLOCK_ROWS, rows);
    const float* bias = p.bias && k == 0 ? p.bias + j + column : nullptr;
    for (int64_t row = block; row < end; row += TILE_ROWS) {
      float* to = p.c + (i + row) * p.stride + j + column;
      kernel.multiply(packed_a + block * steps + row - block, packed_b + column * steps, steps, to, p.stride,
                      std::min(TILE_ROWS, rows - row), columns - column, p.add || k > 0, bias);
    }
  });
}

bool product(Tensor a, Tensor b, Optional bias, Tensor out, bool add) {
  const Kernel* kernel = kernel_for(b.scalar_type());
  if (!kernel) return false;
  const bool of_type = a.scalar_type() == b.scalar_type() || a.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(of_type && out.scalar_type() == ScalarType::Float && out.dim() == 2 && out.is_cpu() &&
                      (out.size(1) <= 1 || out.stride(1) == 1),
                  "fusedkd: a product has a float32 result, whose rows are contiguous");
  const Product p{Operand(a, 1),
                  Operand(b, 0),
                  bias ? contiguous_data<float>(*bias, ScalarType::Float, b.size(1), "bias") : nullptr,
                  static_cast<float*>(out.data_ptr()),
                  out.stride(0),
                  add};
  STD_TORCH_CHECK(p.a.depth == p.b.depth && out.size(0) == p.a.count && out.size(1) == p.b.count,
                  "fusedkd: the matrices of a product do not match");
  const int64_t rows = std::min(MOST_ROWS, ceil_div(p.a.count, BLOCK_ROWS) * BLOCK_ROWS);
  const int64_t columns = std::min(MOST_COLUMNS, ceil_div(p.b.count, TILE_COLUMNS) * TILE_COLUMNS);
  const int64_t most = MOST_STEPS * kernel->per_step, steps = ceil_div(std::min(most, p.a.depth), kernel->per_step);
  const Tensor packed = torch::stable::new_empty(out, {(rows + columns) * steps});
  uint32_t *packed_a = static_cast<uint32_t*>(packed.data_ptr()), *packed_b = packed_a + rows * steps;
  for (int64_t j = 0; j < p.b.count; j += MOST_COLUMNS)
    for (int64_t i = 0; i < p.a.count; i += MOST_ROWS)
      for (int64_t k = 0; k == 0 || k < p.a.depth; k += most)
        run_chunk(*kernel, p, i, j, k, std::min(most, p.a.depth - k), packed_a, packed_b);
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CPU, m) { m.impl("product", TORCH_BOX(&product)); }

}  // namespace fusedkd
