// Enough of CUDA to compile csrc/cuda/*.cu with a C++ compiler and run it on CPU tensors: the sources' own indexing, masks
// and reductions, without a GPU. Every CUDA thread of a cluster of blocks is a fiber, run in turn from one barrier or
// shuffle to the next. The operators are registered as `fusedkd_on_host`. Compile with `-include` this header, which
// stands in for csrc/cuda/launch.cuh and csrc/cuda/cluster.cuh.
#pragma once
#define FUSEDKD_LAUNCH
#define FUSEDKD_CLUSTER
#define FUSEDKD_HOPPER

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#define fusedkd fusedkd_on_host
#define CUDA CPU  // the dispatch key
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
inline int min(int x, int y) { return std::min(x, y); }
inline int max(int x, int y) { return std::max(x, y); }

struct Fiber {
  ucontext_t context;  // where it starts
  jmp_buf state;       // where it goes on: swapcontext would ask the system for its signal mask at each turn
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(1 << 16);
  dim3 index;
  unsigned rank;  // of its block in the cluster
  bool started, running;
  long barriers, shuffles;  // passed
  long arrived, waited;     // at barriers of the cluster
  unsigned long value;      // offered to the other lanes
};
inline std::vector<Fiber> fibers(2048);  // block by block
inline jmp_buf scheduler;
inline Fiber* fiber;
inline std::function<void()> body;
inline unsigned ranks = 1;                          // blocks of a cluster
inline std::vector<std::vector<char>> memories{1};  // their dynamic shared memory

// Lets every other thread of the cluster reach its next barrier or shuffle.
inline void yield() {
  if (_setjmp(fiber->state) == 0) _longjmp(scheduler, 1);
}

// Runs a thread to where it lets the others run.
inline void resume() {
  if (_setjmp(scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->state, 1);
  fiber->started = true;
  setcontext(&fiber->context);
}

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

inline void __syncthreads() {
  Fiber* const self = fiber;
  ++self->barriers;
  yield();
  const unsigned threads = blockDim.x * blockDim.y;
  for (unsigned i = self->rank * threads; i < (self->rank + 1) * threads; ++i) {
    require(fibers[i].running && fibers[i].barriers >= self->barriers, "a thread missed a barrier");
  }
  yield();
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane) {
  Fiber* const self = fiber;
  Fiber* const other = &fibers[(self - fibers.data()) ^ lane];
  require(mask == ~0u && lane < 32, "expected a shuffle of the whole warp");
  ++self->shuffles;
  std::memcpy(&self->value, &value, sizeof(T));
  yield();
  require(other->running && other->shuffles == self->shuffles, "a lane missed a shuffle");
  std::memcpy(&value, &other->value, sizeof(T));
  yield();
  return value;
}

inline unsigned __ballot_sync(unsigned mask, bool yes) {
  unsigned found = unsigned(yes) << (fiber - fibers.data()) % 32;
  for (int lane = 16; lane > 0; lane /= 2) found |= __shfl_xor_sync(mask, found, lane);
  return found;
}

inline int __ffs(unsigned x) { return x == 0 ? 0 : std::countr_zero(x) + 1; }

inline void run_fiber() {
  body();
  fiber->running = false;
  _longjmp(scheduler, 1);
}

// Every other cluster runs its threads backwards: what depends on their order, for want of a barrier, shows.
inline void run_cluster(unsigned cluster) {
  const unsigned threads = blockDim.x * blockDim.y, all = ranks * threads;
  require(all <= fibers.size() && threads % 32 == 0 && blockDim.z == 1, "unexpected block size");
  for (unsigned i = 0; i < all; ++i) {
    Fiber& f = fibers[i];
    const unsigned thread = i % threads;
    f.index = {thread % blockDim.x, thread / blockDim.x, 0}, f.rank = i / threads, f.running = true;
    f.started = false;
    f.barriers = f.shuffles = f.arrived = f.waited = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = 1 << 16;
    makecontext(&f.context, run_fiber, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (unsigned i = 0; i < all; ++i) {
      Fiber& f = fibers[cluster % 2 ? all - 1 - i : i];
      if (!f.running) continue;
      running = true, fiber = &f, threadIdx = f.index;
      blockIdx.x = cluster * ranks + fiber->rank;
      resume();
    }
  }
}

namespace fusedkd {

// ------------------------------------------------------------------------------------------- csrc/cuda/cluster.cuh

struct Multiprocessors {
  int count, shared, shared_per_block, reserved;
};
inline Multiprocessors multiprocessors(const torch::stable::Tensor&) {
  const char* few = std::getenv("FUSEDKD_ON_HOST_SHARED");  // an SM with less, so that short rows need many blocks
  const int shared = few ? std::atoi(few) : 233472;
  return {0, shared, shared, 1024};
}

template <typename... Parameters>
bool cluster_fits(void (*)(Parameters...), int blocks, int, int, const Multiprocessors&, const torch::stable::Tensor&) {
  const char* most = std::getenv("FUSEDKD_ON_HOST_CLUSTER");  // blocks that the device has room for
  return blocks <= (most ? std::atoi(most) : 16);
}

template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int64_t clusters, int blocks, int threads, int shared,
                     const Multiprocessors& sm, const torch::stable::Tensor& where, const Arguments&... arguments) {
  require(shared <= sm.shared_per_block && cluster_fits(kernel, blocks, threads, shared, sm, where), "does not fit");
  body = [&] { kernel(arguments...); };
  gridDim = dim3(clusters * blocks), blockDim = dim3(threads), ranks = blocks;
  for (unsigned i = 0; i < clusters; ++i) {
    memories.assign(blocks, std::vector<char>(shared + 16, '\xff'));  // NaN of any type
    run_cluster(i);
  }
}

inline char* shared_memory_of(unsigned rank) {
  char* memory = memories[rank].data();
  return memory + (16 - reinterpret_cast<uintptr_t>(memory) % 16) % 16;
}
inline char* shared_memory() { return shared_memory_of(fiber->rank); }
inline unsigned cluster_rank() { return fiber->rank; }
inline unsigned cluster_size() { return ranks; }

inline void cluster_arrive() { ++fiber->arrived; }
inline void cluster_wait() {
  Fiber* const self = fiber;
  require(++self->waited == self->arrived, "a thread waits at a cluster's barrier where it did not arrive");
  const auto missing = [&](const Fiber& f) { return f.running && f.arrived < self->waited; };
  for (int turns = 0; std::any_of(fibers.begin(), fibers.begin() + ranks * blockDim.x, missing); ++turns) {
    require(turns < 10000, "a thread does not arrive at a cluster's barrier");
    yield();
  }
}

inline void send(float* to, unsigned rank, float value) {
  const Fiber* const there = &fibers[rank * blockDim.x];
  require(rank < ranks && there->running && there->arrived > 0, "a block's memory is written before or after its life");
  const auto offset = reinterpret_cast<char*>(to) - shared_memory();
  require(offset >= 0 && offset + sizeof(float) <= memories[rank].size() - 16, "not in shared memory");
  *reinterpret_cast<float*>(shared_memory_of(rank) + offset) = value;
}

// Copies happen when they are first waited for: what is read before is NaN.
struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
};
struct Arrival {
  uint64_t state;
  inline static std::map<Arrival*, std::vector<Copy>> copies;

  void expect(uint32_t bytes) { state = bytes, copies[this].clear(); }
  void copy(void* to, const void* from, uint32_t bytes) {
    const auto offset = static_cast<char*>(to) - shared_memory();
    require(reinterpret_cast<uintptr_t>(to) % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0, "not aligned");
    require(bytes > 0 && bytes % 16 == 0, "a bulk copy is of whole 16 bytes");
    require(offset >= 0 && offset + bytes <= memories[fiber->rank].size() - 16, "not in shared memory");
    copies[this].push_back({to, from, bytes});
  }
  void wait() {
    for (const Copy& copy : copies[this]) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      state -= copy.bytes;
    }
    copies[this].clear();
    require(state == 0, "copies are not of the expected bytes");
  }
};

inline float exp2_of(float x) { return std::exp2(x); }
inline float log2_of(float x) { return std::log2(x); }
inline float reciprocal_of(float x) { return 1 / x; }
inline float product(float x, float y) { return x * y; }
template <typename P>
void store_streaming(void* to, const P& pack) {
  require(sizeof(P) == 16 && reinterpret_cast<uintptr_t>(to) % 16 == 0, "not aligned");
  std::memcpy(to, &pack, 16);
}

}  // namespace fusedkd
