// What Hopper offers beyond CUDA C++, each in the one form that kernels here need: a cluster's barrier and shared
// memories, and bulk copies into shared memory that an mbarrier reports. tests/cuda_on_host.h has the same on the CPU.
#ifndef FUSEDKD_CLUSTER
#define FUSEDKD_CLUSTER

#include <cstdint>

namespace fusedkd {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define FUSEDKD_HOPPER  // elsewhere, kernels that use any of this are empty
#endif

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The dynamic shared memory of this block, from a multiple of 128 bytes.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline unsigned cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// The barrier of all threads of a cluster in two halves: what one did before it arrived, all see after they waited.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// clang-format off: it takes the :: of asm for that of C++

// *to = value in the shared memory of another block of the cluster; `to` is where it lies in one's own.
__device__ inline void send(float* to, unsigned rank, float value) {
  asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.f32 [there], %2; }"
               :: "r"(shared_address(to)), "r"(rank), "f"(value) : "memory");
}

// An mbarrier, used once. One thread calls expect(bytes) and then starts copies of as many bytes in all; after a
// __syncthreads() all may wait() for them.
struct Arrival {
  uint64_t state;

  __device__ void expect(uint32_t bytes) {
    const uint32_t at = shared_address(&state);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(at) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // for the copy engine to see it
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(at), "r"(bytes) : "memory");
  }
  // From global to shared memory, both aligned to 16 bytes, `bytes` a multiple of 16: data read once.
  __device__ void copy(void* to, const void* from, uint32_t bytes) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1], %2, [%3], %4;"
                 :: "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes),
                    "r"(shared_address(&state)), "l"(policy) : "memory");
  }
  __device__ void wait() {
    asm volatile("{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;"
                 " @!done bra again; }" :: "r"(shared_address(&state)) : "memory");
  }
};
// clang-format on

__device__ inline float exp2_of(float x) {  // relative error 2⁻²²; below the smallest normal number: 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float log2_of(float x) {  // relative error 2⁻²², absolute between ½ and 2
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float reciprocal_of(float x) {  // within 1 ulp
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x·y, rounded: not to be contracted into what it is used in.
__device__ inline float product(float x, float y) { return __fmul_rn(x, y); }

// 16 aligned bytes, not to be kept in caches.
template <typename P>
__device__ void store_streaming(void* to, const P& pack) {
  static_assert(sizeof(P) == 16);
  __stcs(static_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&pack));
}

}  // namespace fusedkd
#endif
