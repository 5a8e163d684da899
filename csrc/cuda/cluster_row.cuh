// A pair of rows of logits, student and teacher, spread over the shared memories of a cluster.
//
// A row starts where it likes. Packs of 16 bytes are counted from where the gradient's addresses are multiples of 16,
// so that stores are always wide; a side out of phase with it is read element by element, from shared memory. Bulk
// copies take whole 16 bytes of a row and nothing beyond it: the few columns at its ends that no copy or no whole pack
// reaches, and the student's columns without a teacher, are read from global memory at each pass.
#ifndef FUSEDKD_CLUSTER_ROW
#define FUSEDKD_CLUSTER_ROW

#include <cstring>
#include <type_traits>

#include "cluster.cuh"
#include "scalar.cuh"
#include "tensor.cuh"

namespace fusedkd {

constexpr int kStages = 4;  // of a block's copies

// Logits of W columns; the slope is that of the student's soft-cap and scale.
template <int W>
struct LogitPack {
  float z[W], v[W], slope[W];
};

template <int W, typename T>
INLINE void read(const T* from, bool wide, float (&to)[W]) {
  if (!wide) {
#pragma unroll
    for (int e = 0; e < W; ++e) to[e] = static_cast<float>(from[e]);
  } else if constexpr (std::is_same_v<T, BFloat16>) {  // the upper half of a float: one instruction each
    const Pack<uint32_t, W / 2> words = *reinterpret_cast<const Pack<uint32_t, W / 2>*>(from);
#pragma unroll
    for (int e = 0; e < W; ++e) {
      const uint32_t bits = e % 2 ? words.value[e / 2] & 0xffff0000u : words.value[e / 2] << 16;
      memcpy(&to[e], &bits, sizeof(float));
    }
  } else {
    const Pack<T, W> pack = *reinterpret_cast<const Pack<T, W>*>(from);
#pragma unroll
    for (int e = 0; e < W; ++e) to[e] = static_cast<float>(pack.value[e]);
  }
}

template <int W, typename S>
INLINE void write(S* to, const float (&from)[W]) {
  if constexpr (W == 1) {
    *to = static_cast<S>(from[0]);
  } else {
    Pack<S, W> pack;
#pragma unroll
    for (int e = 0; e < W; ++e) pack.value[e] = static_cast<S>(from[e]);
    store_streaming(to, pack);
  }
}

template <typename T>
INLINE int past_16(const T* at) {  // elements past the 16-byte boundary at or below
  return static_cast<int>(reinterpret_cast<uintptr_t>(at) % 16 / sizeof(T));
}
template <typename T>
INLINE int short_of_16(const T* at) {  // elements to the boundary at or above
  return (16 / static_cast<int>(sizeof(T)) - past_16(at)) % (16 / static_cast<int>(sizeof(T)));
}

// Zeros in columns [begin, end) of a row, by all threads of the cluster.
template <typename S>
INLINE void clear(S* row, int begin, int end, int place, int places) {
  constexpr int W = 16 / sizeof(S);
  const int first = ::min(end, begin + short_of_16(row + begin)), last = first + (end - first) / W * W;
  for (int c = first + place * W; c < last; c += places * W) write<W>(row + c, {});
  for (int c = begin + place; c < end; c += places) {
    if (c < first || c >= last) row[c] = static_cast<S>(0);
  }
}

// Packs of a block if a cluster of `ranks` has so many; and the bytes of one side's part with what its copies round up.
__host__ __device__ constexpr int per_block(int packs, int ranks) { return (packs + ranks - 1) / ranks; }
__host__ __device__ constexpr int held_bytes(int bytes) { return bytes + 16; }

// One side of the row: where it is in global memory, and where `held[c]` is column c in the block's shared memory.
template <typename T>
struct HeldRow {
  const T *row, *held;
  int columns;  // 0: not to be read
  bool wide;    // packs are aligned in shared memory

  // Whether copies can reach packs that begin, or end, at column c.
  INLINE bool from(int c) const { return columns == 0 || past_16(row + c) <= c; }
  INLINE bool to(int c) const { return columns == 0 || c + short_of_16(row + c) <= columns; }

  INLINE void hold(char* buffer, int begin) {
    held = reinterpret_cast<const T*>(buffer) - (begin - past_16(row + begin));
    wide = past_16(held + begin) == 0;
  }
  // What the copy of columns [a, b) takes: from the boundary below where it is the first, else after the one before.
  INLINE int copy_begin(int a, bool first) const { return first ? a - past_16(row + a) : a + short_of_16(row + a); }
  INLINE uint32_t copy_bytes(int a, int b, bool first) const {
    if (a >= b || columns == 0) return 0;
    return static_cast<uint32_t>(b + short_of_16(row + b) - copy_begin(a, first)) * sizeof(T);
  }
  INLINE void copy(Arrival& arrival, int a, int b, bool first) const {
    const int c = copy_begin(a, first);
    if (const uint32_t bytes = copy_bytes(a, b, first)) arrival.copy(const_cast<T*>(held + c), row + c, bytes);
  }
  template <int W>
  INLINE void get(int c, float (&to)[W]) const {
    if (columns != 0) return read(held + c, wide, to);
#pragma unroll
    for (int e = 0; e < W; ++e) to[e] = -INFINITE<float>;
  }
};

template <typename S, bool kTransform>
struct RowPair {
  static constexpr int W = 16 / sizeof(S);
  HeldRow<S> z, v;
  int first, last;        // columns [first, last) are packs
  int begin, end, stage;  // those of this block; a stage's columns
  int ends;               // columns outside [first, last)
  int thread, threads;    // of the block
  int place, places;      // of the cluster
  Arrival* arrivals;
  float cap_z, scale_z, cap_v, scale_v;

  // Starts the copies. Packs are columns below `common`, aligned as `anchor`'s addresses.
  INLINE void start(const S* anchor, int common, char* buffer, int rank, int ranks) {
    first = short_of_16(anchor), last = first + ::max(0, common - first) / W * W;
    while (first < last && !(z.from(first) && v.from(first))) first += W;
    while (first < last && !(z.to(last) && v.to(last))) last -= W;
    if (first >= last) first = last = 0;
    ends = z.columns - (last - first);
    const int share = per_block((last - first) / W, ranks) * W, round = threads * W;
    begin = ::min(last, first + rank * share), end = ::min(last, begin + share);
    stage = (end - begin + kStages * round - 1) / (kStages * round) * round;
    z.hold(buffer, begin), v.hold(buffer + held_bytes(share * sizeof(S)), begin);
    if (thread != 0) return;
    for (int k = 0; k < kStages; ++k) {
      const int a = ::min(end, begin + k * stage), b = ::min(end, a + stage);
      arrivals[k].expect(z.copy_bytes(a, b, k == 0) + v.copy_bytes(a, b, k == 0));
      z.copy(arrivals[k], a, b, k == 0), v.copy(arrivals[k], a, b, k == 0);
    }
  }

  // Calls visit(column, logits) for the packs of the thread and for its columns among the ends. The teacher is −∞ where
  // it has no column.
  template <typename Visit>
  INLINE void each(const Visit& visit) const {
#pragma unroll 1
    for (int i = place; i < ends; i += places) {
      const int c = i < first ? i : i - first + last;
      LogitPack<1> x{{static_cast<float>(z.row[c])}, {-INFINITE<float>}, {1}};
      if (c < v.columns) x.v[0] = static_cast<float>(v.row[c]);
      transform(x);
      visit(c, x);
    }
#pragma unroll 1
    for (int k = 0; k < kStages; ++k) {
      arrivals[k].wait();
      const int stop = ::min(end, begin + (k + 1) * stage);
#pragma unroll 1
      for (int c = begin + k * stage + thread * W; c < stop; c += threads * W) {
        LogitPack<W> x;
        z.get(c, x.z), v.get(c, x.v);
        transform(x);
        visit(c, x);
      }
    }
  }

  template <int N>
  INLINE void transform(LogitPack<N>& x) const {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      x.slope[e] = 1;
      if constexpr (kTransform) {
        float unused;
        cap_and_scale(x.z[e], cap_z, scale_z, x.slope[e]), cap_and_scale(x.v[e], cap_v, scale_v, unused);
      }
    }
  }
};

}  // namespace fusedkd
#endif
