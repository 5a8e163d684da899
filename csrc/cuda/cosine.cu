// The cosine loss of hidden states on NVIDIA GPUs: value and gradient in one launch, every row read once.
//
//   a = (Σ x² + ε)^-½,  b = (Σ y² + ε)^-½,  ε = 1e-12        x student row, y teacher row
//   v = a x − b y                                             by FMA: close rows lose nothing
//   D = 1 − cos = ½ Σ v² + ½ ε (a² + b²)                      an error of a or b enters in second order
//   ∂D/∂x = a (v − D a x)
//
// A row whose squares overflow is summed once more, scaled down: a x and b y are in range whatever x and y are.
//
// Moves 6 bytes per element of 16-bit input: x and y in, the gradient out. Up to 16384 elements, the row pair waits in
// registers, in its own precision, through two reductions (norms, then v) until the gradient is written: one warp per
// row to H = 1024, then one block of ⌈H / 1024⌉ warps. Longer rows, rows that 16-byte loads cannot serve and float64
// are read again for each pass, from L1 or L2. Keeping the row in registers is what fast layer-norm kernels do (Apex,
// QuACK).
// The operators and their arguments: fusedkd/backends/schema.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "../common/layout.h"
#include "launch.cuh"
#include "tensor.cuh"

namespace fusedkd {

constexpr double kEpsilon = 1e-12;
template <typename A>
constexpr A kFar = std::is_same_v<A, double> ? 0x1p-700 : 0x1p-96;  // times a row, whose squares then are in range
constexpr int kWarp = 32;
constexpr int kMaxWarps = 16;     // of a row
constexpr int kHeld = 32;         // elements of either side that a thread keeps in registers
constexpr int kRowsPerBlock = 4;  // while a row is one warp

template <typename S>
using Accumulator = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Elements that one thread loads together: 16 bytes of the narrower side; float64 takes them one by one.
template <typename S, typename T>
constexpr int kWidth = std::max(sizeof(S), sizeof(T)) > 4 ? 1 : 16 / std::min(sizeof(S), sizeof(T));

template <typename S, typename T>
struct CosineArguments {
  using A = Accumulator<S>;
  const S* student;  // [B, L, H], as the teacher: row i is (i / L, i % L)
  const T* teacher;
  int64_t student_strides[2], teacher_strides[2];  // of B and L
  const float* weights;                            // [N] or null: all 1
  const double* normalizer;                        // []
  const A* upstream;                               // [] or [N]; null in the forward call
  int64_t upstream_stride;                         // 0 or 1
  A* rows;                                         // [N], written in the forward call
  A* stats;                                        // [N, COSINE_STATS]; written in the forward call, read afterwards
  S* gradient;                                     // [N, H] or null
  bool skip_if_one;                                // the gradient is already right for an upstream of 1
  int64_t count, length, hidden;                   // N, L, H
};

template <int W, typename T>
__device__ Pack<T, W> load(const T* from) {
  return *reinterpret_cast<const Pack<T, W>*>(from);
}

template <typename T, int W>
__device__ void store(T* to, const Pack<T, W>& pack) {
  *reinterpret_cast<Pack<T, W>*>(to) = pack;
}

// Hides from the compiler that 16-bit elements are those of the pass before. It would keep their conversions to float
// otherwise, in twice the registers, and halve the warps that an SM has in flight.
template <typename T, int W>
__device__ void forget(Pack<T, W>& pack) {
  if constexpr (sizeof(T) == 2) {
    auto* words = reinterpret_cast<uint32_t*>(pack.value);
#pragma unroll
    for (int i = 0; i < W / 2; ++i) asm volatile("" : "+r"(words[i]));
  }
}

// This thread's share of a row pair, in registers. each(visit) calls visit(offset, x, y) for its packs.
template <typename S, typename T, int W>
struct Held {
  static constexpr int kPacks = kHeld / W;
  Pack<S, W> x[kPacks];
  Pack<T, W> y[kPacks];
  int hidden;

  static __device__ int offset(int pack) { return (pack * blockDim.x + threadIdx.x) * W; }

  __device__ Held(const S* student, const T* teacher, int64_t hidden) : hidden(static_cast<int>(hidden)) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (offset(i) < hidden) {
        x[i] = load<W>(student + offset(i));
        y[i] = load<W>(teacher + offset(i));
      }
    }
  }

  template <typename Visit>
  __device__ void each(const Visit& visit) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      forget(x[i]);
      forget(y[i]);
      if (offset(i) < hidden) visit(offset(i), x[i], y[i]);
    }
  }
};

// The same, read again at every pass, element by element.
template <typename S, typename T>
struct Reread {
  const S* student;
  const T* teacher;
  int64_t hidden;

  template <typename Visit>
  __device__ void each(const Visit& visit) const {
    for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) visit(i, load<1>(student + i), load<1>(teacher + i));
  }
};

// a x − b y without the rounding of the products, which would be all that is left of it near convergence.
template <typename A>
__device__ A apart(A x, A y, A a, A b) {
  const A by = b * y;
  return std::fma(a, x, -by) - std::fma(b, y, -by);
}

// The sum over the threads of a row, the same bits in all of them. A row is one warp, or the whole block, which shares
// `scratch`; nothing guards its reuse, so each sum of a kernel has its own.
template <typename A>
__device__ A sum_over_row(A value, A* scratch) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(~0u, value, lane);
  if (blockDim.x == kWarp) return value;
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) value += scratch[warp];
  return value;
}

// Block (threads of a row, rows). W = 1 rereads, wider packs are held.
template <typename S, typename T, int W>
__global__ void __launch_bounds__(kMaxWarps* kWarp) cosine_kernel(const CosineArguments<S, T> p) {
  using A = Accumulator<S>;
  using Row = std::conditional_t<W == 1, Reread<S, T>, Held<S, T, W>>;
  __shared__ A scratch[5][kMaxWarps];

  // Every exit below is taken by all threads of a row together, as the shuffles and barriers need.
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (i >= p.count || (p.skip_if_one && *p.upstream == A(1))) return;
  const bool forward = p.upstream == nullptr, first = threadIdx.x == 0;
  const A weight = p.weights ? p.weights[i] : A(1), upstream = forward ? A(1) : p.upstream[i * p.upstream_stride];
  const A factor = upstream * weight / static_cast<A>(*p.normalizer);  // read now, not between the row and its write
  S* const gradient = p.gradient ? p.gradient + i * p.hidden : nullptr;
  A* const stats = p.stats + COSINE_STATS * i;

  if (weight == 0) {  // not selected: the row is not read
    if (forward && first) p.rows[i] = stats[STUDENT_INVERSE_NORM] = stats[TEACHER_INVERSE_NORM] = stats[DISTANCE] = 0;
    if (gradient) {
      for (int64_t j = threadIdx.x * W; j < p.hidden; j += blockDim.x * W) store(gradient + j, Pack<S, W>{});
    }
    return;
  }

  const int64_t outer = i / p.length, inner = i % p.length;
  Row row{p.student + outer * p.student_strides[0] + inner * p.student_strides[1],
          p.teacher + outer * p.teacher_strides[0] + inner * p.teacher_strides[1], p.hidden};
  A a, b, distance;
  if (forward) {
    A xx, yy, vv = 0, far_x = 1, far_y = 1;
#pragma unroll 1
    for (int k = 0; k < 2; ++k) {
      xx = yy = 0;
      row.each([&](int64_t, const Pack<S, W>& x, const Pack<T, W>& y) {
#pragma unroll
        for (int e = 0; e < W; ++e) {
          const A xe = far_x * static_cast<A>(x.value[e]), ye = far_y * static_cast<A>(y.value[e]);
          xx += xe * xe;
          yy += ye * ye;
        }
      });
      xx = sum_over_row(xx, scratch[2 * k]), yy = sum_over_row(yy, scratch[2 * k + 1]);
      if (std::isfinite(xx) && std::isfinite(yy)) break;
      if (!std::isfinite(xx)) far_x = kFar<A>;
      if (!std::isfinite(yy)) far_y = kFar<A>;
    }
    a = 1 / std::sqrt(xx + A(kEpsilon) * far_x * far_x) * far_x;
    b = 1 / std::sqrt(yy + A(kEpsilon) * far_y * far_y) * far_y;
    row.each([&](int64_t, const Pack<S, W>& x, const Pack<T, W>& y) {
#pragma unroll
      for (int e = 0; e < W; ++e) {
        const A v = apart(static_cast<A>(x.value[e]), static_cast<A>(y.value[e]), a, b);
        vv += v * v;
      }
    });
    distance = (sum_over_row(vv, scratch[4]) + A(kEpsilon) * (a * a + b * b)) / 2;
    if (first) {
      p.rows[i] = weight * distance;
      stats[STUDENT_INVERSE_NORM] = a, stats[TEACHER_INVERSE_NORM] = b, stats[DISTANCE] = distance;
    }
  } else {
    a = stats[STUDENT_INVERSE_NORM], b = stats[TEACHER_INVERSE_NORM], distance = stats[DISTANCE];
  }
  if (!gradient) return;

  const A scale = factor * a;
  row.each([&](int64_t j, const Pack<S, W>& x, const Pack<T, W>& y) {
    Pack<S, W> out;
#pragma unroll
    for (int e = 0; e < W; ++e) {
      const A xe = static_cast<A>(x.value[e]), v = apart(xe, static_cast<A>(y.value[e]), a, b);
      out.value[e] = static_cast<S>(scale * std::fma(-distance, a * xe, v));
    }
    store(gradient + j, out);
  });
}

// -------------------------------------------------- host

// 16-byte loads reach every row: the address of each is a multiple of 16.
template <typename T>
bool aligned(const T* data, const Tensor& tensor) {
  uint64_t offsets = reinterpret_cast<uint64_t>(data);
  for (int d = 0; d < 2; ++d) offsets |= tensor.size(d) > 1 ? tensor.stride(d) * sizeof(T) : 0;
  return offsets % 16 == 0;
}

struct Task {
  const Tensor& student;
  const Tensor& teacher;
  const Optional& weights;
  const Tensor& normalizer;
  const Tensor& stats;
  const Tensor* rows = nullptr;
  const Tensor* upstream = nullptr;
  const Tensor* gradient = nullptr;
  bool skip_if_one = false;
};

template <typename S, typename T>
void run(const Task& task) {
  using A = Accumulator<S>;
  const Tensor &x = task.student, &y = task.teacher;
  const int64_t length = x.size(1), hidden = x.size(2), count = x.size(0) * length;
  if (count == 0) return;
  CosineArguments<S, T> p{};
  p.student = x.const_data_ptr<S>();
  p.teacher = y.const_data_ptr<T>();
  for (int d = 0; d < 2; ++d) p.student_strides[d] = x.stride(d), p.teacher_strides[d] = y.stride(d);
  p.weights = task.weights ? data_of<float>(*task.weights, x, count, "weights") : nullptr;
  p.normalizer = data_of<double>(task.normalizer, x, 1, "normalizer");
  if (task.upstream) {
    p.upstream = upstream_of<A>(*task.upstream, x, count, p.upstream_stride);
  }
  p.rows = task.rows ? data_of<A>(*task.rows, x, count, "rows") : nullptr;
  p.stats = data_of<A>(task.stats, x, COSINE_STATS * count, "stats");
  p.gradient = task.gradient ? data_of<S>(*task.gradient, x, count * hidden, "gradient") : nullptr;
  p.skip_if_one = task.skip_if_one;
  p.count = count, p.length = length, p.hidden = hidden;

  const int64_t warps = std::clamp<int64_t>((hidden + kWarp * kHeld - 1) / (kWarp * kHeld), 1, kMaxWarps);
  const int64_t rows = warps == 1 ? kRowsPerBlock : 1, blocks = (count + rows - 1) / rows;
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "fusedkd: too many rows: ", count);
  const dim3 grid(static_cast<unsigned>(blocks));
  const dim3 block(static_cast<unsigned>(warps * kWarp), static_cast<unsigned>(rows));
  if constexpr (constexpr int W = kWidth<S, T>; W > 1) {
    const bool fits = hidden % W == 0 && hidden <= kMaxWarps * kWarp * kHeld;
    const bool gradient_aligned = reinterpret_cast<uint64_t>(p.gradient) % 16 == 0;  // its rows are H apart
    if (fits && aligned(p.student, x) && aligned(p.teacher, y) && gradient_aligned) {
      return launch(cosine_kernel<S, T, W>, grid, block, x, p);
    }
  }
  launch(cosine_kernel<S, T, 1>, grid, block, x, p);
}

void run(const Task& task) {
  for (const Tensor* hidden : {&task.student, &task.teacher}) {
    STD_TORCH_CHECK(hidden->dim() == 3 && (hidden->size(2) <= 1 || hidden->stride(2) == 1),
                    "fusedkd: hidden states must be [B, L, H] with a contiguous last dimension");
    for (int d = 0; d < 3; ++d) STD_TORCH_CHECK(hidden->size(d) == task.student.size(d), "fusedkd: the sizes differ");
  }
  STD_TORCH_CHECK(task.teacher.device() == task.student.device(), "fusedkd: the devices differ");
  with_type<float, BFloat16, Half, double>(task.student.scalar_type(), [&](auto s) {
    with_type<float, BFloat16, Half, double>(task.teacher.scalar_type(),
                                             [&](auto t) { run<decltype(s), decltype(t)>(task); });
  });
}

std::tuple<Tensor, Tensor> cosine_forward(const Tensor& student, const Tensor& teacher, const Optional& weights,
                                          const Tensor& normalizer, const Optional& gradient) {
  using torch::stable::new_empty;
  const int64_t count = student.size(0) * student.size(1), stats_size[] = {count, COSINE_STATS};
  const ScalarType type = student.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor rows = new_empty(student, {&count, 1}, type), stats = new_empty(student, {stats_size, 2}, type);
  run({student, teacher, weights, normalizer, stats, &rows, nullptr, gradient ? &*gradient : nullptr});
  return {rows, stats};
}

void cosine_backward(const Tensor& upstream, const Tensor& student, const Tensor& teacher, const Optional& weights,
                     const Tensor& normalizer, const Tensor& stats, const Tensor& gradient, bool skip_if_one) {
  run({student, teacher, weights, normalizer, stats, nullptr, &upstream, &gradient, skip_if_one});
}

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CUDA, m) {
  m.impl("cosine_forward", TORCH_BOX(&cosine_forward));
  m.impl("cosine_backward", TORCH_BOX(&cosine_backward));
}

}  // namespace fusedkd
