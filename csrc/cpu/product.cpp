// Matrix products with float32 sums and results on processors with AVX-512: of bfloat16 where an instruction multiplies
// it, which PyTorch offers with bfloat16 results alone; of float32 where PyTorch's library runs at half the speed.
//
// A float32 operand beside one of bfloat16 is rounded to it.
//
// c[m, n] = Σ_k a[m, k]·b[k, n] is cut into chunks of all three dimensions. A thread packs its chunk of a and of b, then
// goes over the tiles of c (the scheme of Goto and van de Geijn 2008, and of BLIS). All threads start once, and none
// waits for another before the end. Where the order of a sum is cut does not depend on their number, and so no result.
#include <memory>

#include "isa.h"
#include "product.h"

namespace fusedkd {
namespace {

constexpr int64_t TILE_ROWS = 6, TILE_COLUMNS = 64;                         // 24 registers of 16 sums, 4 of b, 1 of a
constexpr int64_t BLOCK_ROWS = 48;                                          // of a are packed side by side
constexpr int64_t MOST_PARTS = 8;                                           // of a long sum
constexpr int64_t MOST_ROWS = 1056, MOST_COLUMNS = 1024, MOST_STEPS = 512;  // of a chunk: 2 MB packed of either side
constexpr int64_t LEAST_WORK = 1 << 21;                                     // multiplications that are worth a chunk
constexpr int64_t PACKING = 32;  // multiplications that packing an element takes as long as

struct alignas(64) Line {
  uint32_t steps[16];
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

// Rows [i, i + rows) × columns [j, j + columns) of the sum over `depth` numbers from k: into c, which begins there.
void run_chunk(const Kernel& kernel, const Product& p, int64_t i, int64_t rows, int64_t j, int64_t columns, int64_t k,
               int64_t depth, float* c, int64_t stride, bool add, uint32_t* scratch) {
  const int64_t steps = ceil_div(depth, kernel.per_step);
  uint32_t *a = scratch, *b = scratch + ceil_div(rows, BLOCK_ROWS) * BLOCK_ROWS * steps;
  kernel.pack(p.a, i, rows, k, depth, BLOCK_ROWS, a);
  kernel.pack(p.b, j, columns, k, depth, TILE_COLUMNS, b);
  for (int64_t block = 0; block < rows; block += BLOCK_ROWS)
    for (int64_t column = 0; column < columns; column += TILE_COLUMNS)
      for (int64_t row = block; row < std::min(block + BLOCK_ROWS, rows); row += TILE_ROWS)
        kernel.multiply(a + block * steps + row - block, b + column * steps, steps, c + row * stride + column, stride,
                        std::min(TILE_ROWS, rows - row), columns - column, add,
                        p.bias && k == 0 ? p.bias + j + column : nullptr);
}

// Rows and columns of a chunk: as many as the caches hold, or fewer where that ends the work of the busiest thread
// earlier, although every chunk packs its operands anew.
struct Chunk {
  int64_t rows, columns;

  Chunk(const Product& p, int64_t parts) {
    const auto cut = [](int64_t n, int64_t by, int64_t unit) { return ceil_div(ceil_div(n, by), unit) * unit; };
    const int64_t m = p.a.count, n = p.b.count, threads = torch::stable::get_num_threads();
    const int64_t first_down = ceil_div(m, MOST_ROWS), first_across = ceil_div(n, MOST_COLUMNS);
    const int64_t most = parts * first_down * first_across + 2 * threads;
    int64_t least = INT64_MAX;
    for (int64_t down = first_down; parts * down * first_across <= most; down++)
      for (int64_t across = first_across; parts * down * across <= most; across++) {
        const int64_t r = cut(m, down, TILE_ROWS), c = cut(n, across, TILE_COLUMNS);
        if (least < INT64_MAX && r * c * p.a.depth / parts < LEAST_WORK) break;
        const int64_t per_thread = ceil_div(parts * ceil_div(m, r) * ceil_div(n, c), threads);
        const int64_t work = per_thread * (r * c + PACKING * (r + c));
        if (work < least) least = work, rows = r, columns = c;
      }
  }
};

// c, or with more than one part of the summed dimension: part 0 of c, the others of `rest`.
void run(const Kernel& kernel, const Product& p, int64_t part_depth, int64_t parts, float* rest) {
  const int64_t most = MOST_STEPS * kernel.per_step, m = p.a.count, n = p.b.count, depth = p.a.depth;
  const Chunk chunk(p, parts);
  const int64_t across = ceil_div(n, chunk.columns), per_part = ceil_div(m, chunk.rows) * across;
  torch::stable::parallel_for(0, parts * per_part, 1, [&](int64_t begin, int64_t end) {
    const int64_t packed = ceil_div(chunk.rows, BLOCK_ROWS) * BLOCK_ROWS + chunk.columns;
    const size_t size = packed * ceil_div(std::min(most, depth), kernel.per_step);
    const std::unique_ptr<Line[]> scratch(new Line[size / 16 + 1]);
    for (int64_t u = begin; u < end; u++) {
      const int64_t part = u / per_part, i = u % per_part / across * chunk.rows, j = u % across * chunk.columns;
      const int64_t rows = std::min(chunk.rows, m - i), columns = std::min(chunk.columns, n - j);
      const int64_t stride = part ? n : p.stride, from = part * part_depth, to = std::min(depth, from + part_depth);
      float* c = (part ? rest + (part - 1) * m * n : p.c) + i * stride + j;
      for (int64_t k = from; k == from || k < to; k += most)
        run_chunk(kernel, p, i, rows, j, columns, k, std::min(most, to - k), c, stride, k > from || (!part && p.add),
                  scratch[0].steps);
    }
  });
  if (parts > 1)
    torch::stable::parallel_for(0, m, 1 + (1 << 14) / (parts * n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        for (int64_t part = 0; part + 1 < parts; part++)
          for (int64_t j = 0; j < n; j++) p.c[i * p.stride + j] += rest[(part * m + i) * n + j];
    });
}

}  // namespace

bool has_product(ScalarType type) { return kernel_for(type) != nullptr; }

void multiply(const Product& p) {
  const Kernel& kernel = *kernel_for(p.b.type);
  // A long sum into a small result, as that of ∂z and the head, is cut in parts that threads can take.
  const int64_t most = MOST_STEPS * kernel.per_step, m = p.a.count, n = p.b.count, depth = p.a.depth;
  const int64_t part_depth = depth > std::max(m, n) ? ceil_div(ceil_div(depth, MOST_PARTS), most) * most : depth;
  const int64_t parts = depth > part_depth ? ceil_div(depth, part_depth) : 1;
  if (parts == 1) return run(kernel, p, part_depth, parts, nullptr);
  const Tensor rest = fresh({(parts - 1) * m * n}, ScalarType::Float);
  run(kernel, p, part_depth, parts, static_cast<float*>(rest.data_ptr()));
}

namespace {

bool product(Tensor a, Tensor b, Optional bias, Tensor out, bool add) {
  if (!has_product(b.scalar_type())) return false;
  const bool of_type = a.scalar_type() == b.scalar_type() || a.scalar_type() == ScalarType::Float;
  const int64_t dim = out.dim(), pairs = dim == 3 ? out.size(0) : 1;
  STD_TORCH_CHECK(of_type && out.scalar_type() == ScalarType::Float && out.is_cpu() && (dim == 2 || dim == 3) &&
                      (out.size(dim - 1) <= 1 || out.stride(dim - 1) == 1),
                  "fusedkd: a product has a float32 result, whose rows are contiguous");
  STD_TORCH_CHECK(a.dim() == dim && b.dim() == dim && (dim == 2 || (a.size(0) == pairs && b.size(0) == pairs)),
                  "fusedkd: the matrices of a product do not match");
  if (out.numel() == 0) return true;
  const auto pair = [&](int64_t i) {
    float* c = static_cast<float*>(out.data_ptr()) + (dim == 3 ? i * out.stride(0) : 0);
    const float* from = bias ? contiguous_data<float>(*bias, ScalarType::Float, b.size(dim - 1), "bias") : nullptr;
    const Product p{Operand(a, 1, i), Operand(b, 0, i), from, c, out.stride(dim - 2), add};
    STD_TORCH_CHECK(p.a.depth == p.b.depth && out.size(dim - 2) == p.a.count && out.size(dim - 1) == p.b.count,
                    "fusedkd: the matrices of a product do not match");
    return p;
  };
  if (pairs < torch::stable::get_num_threads()) {
    for (int64_t i = 0; i < pairs; i++) multiply(pair(i));
    return true;
  }
  torch::stable::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) multiply(pair(i));
  });
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CPU, m) { m.impl("product", TORCH_BOX(&product)); }

}  // namespace fusedkd
