// Enough of CUDA to compile csrc/*.cu with a C++ compiler and run it on CPU tensors: the sources' own indexing, masks
// and reductions, without a GPU. Every CUDA thread of a block is a fiber, run in turn from one barrier or shuffle
// to the next. The operators are registered as `fusedkd_on_host`. Compile with `-include` this header, which stands in
// for csrc/launch.cuh.
#pragma once
#define FUSEDKD_LAUNCH

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#define fusedkd fusedkd_on_host
#define CUDA CPU  // the dispatch key
#define __global__
#define __device__
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(1 << 16);
  dim3 index;
  bool running;
  long step;           // shuffles and barriers passed
  unsigned long value;  // offered to the other lanes
};
inline std::vector<Fiber> fibers(1024);
inline ucontext_t scheduler;
inline Fiber* fiber;
inline std::function<void()> body;

// Lets every other thread of the block reach its next barrier or shuffle.
inline void yield() {
  Fiber* const self = fiber;
  swapcontext(&self->context, &scheduler);
}

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

inline void __syncthreads() {
  Fiber* const self = fiber;
  ++self->step;
  yield();
  for (unsigned i = 0; i < blockDim.x * blockDim.y; ++i) {
    require(fibers[i].running && fibers[i].step >= self->step, "a thread missed a barrier");
  }
  yield();
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane) {
  Fiber* const self = fiber;
  Fiber* const other = &fibers[(self - fibers.data()) ^ lane];
  require(mask == ~0u && lane < 32, "expected a shuffle of the whole warp");
  ++self->step;
  std::memcpy(&self->value, &value, sizeof(T));
  yield();
  require(other->running && other->step == self->step, "a lane missed a shuffle");
  std::memcpy(&value, &other->value, sizeof(T));
  yield();
  return value;
}

inline void run_fiber() {
  body();
  fiber->running = false;
}

inline void run_block() {
  const unsigned threads = blockDim.x * blockDim.y;
  require(threads <= fibers.size() && threads % 32 == 0 && blockDim.z == 1, "unexpected block size");
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.index = {i % blockDim.x, i / blockDim.x, 0}, f.running = true, f.step = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = 1 << 16, f.context.uc_link = &scheduler;
    makecontext(&f.context, run_fiber, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (unsigned i = 0; i < threads; ++i) {
      if (!fibers[i].running) continue;
      running = true, fiber = &fibers[i], threadIdx = fiber->index;
      swapcontext(&scheduler, &fiber->context);
    }
  }
}

namespace fusedkd {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, const torch::stable::Tensor&,
            const Arguments&... arguments) {
  body = [&] { kernel(arguments...); };
  gridDim = grid, blockDim = block;
  for (blockIdx = {0, 0, 0}; blockIdx.x < grid.x; ++blockIdx.x) run_block();
}

}  // namespace fusedkd
