// Rows of few columns in lanes: a vector holds one column of WIDTH rows. Compiled once per instruction set (isa.h).
#ifndef FUSEDKD_TRANSPOSE
#define FUSEDKD_TRANSPOSE

#include "vec.h"

namespace FUSEDKD_NAMESPACE {

// Element by element of the halves of x and y, the lower ones or the upper: x0 y0 x1 y1 …
template <class A, bool upper, int... i> INLINE Vec<A> interleaved(Vec<A> x, Vec<A> y,
                                                                   std::integer_sequence<int, i...>) {
#ifdef __clang__
  return __builtin_shufflevector(x, y, (i / 2 + i % 2 * WIDTH<A> + upper * WIDTH<A> / 2)...);
#else
  return __builtin_shuffle(x, y, Int<A>{(i / 2 + i % 2 * WIDTH<A> + upper * WIDTH<A> / 2)...});
#endif
}

// A square of WIDTH rows: each stage moves one bit of an element's position from the lane to the vector.
template <class A, int stage = 1> INLINE void transpose(Vec<A> (&x)[WIDTH<A>]) {
  if constexpr (stage < WIDTH<A>) {
    using Lanes = std::make_integer_sequence<int, WIDTH<A>>;
    Vec<A> y[WIDTH<A>];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH<A> / 2; i++) {
      y[2 * i] = interleaved<A, false>(x[i], x[i + WIDTH<A> / 2], Lanes());
      y[2 * i + 1] = interleaved<A, true>(x[i], x[i + WIDTH<A> / 2], Lanes());
    }
    transpose<A, 2 * stage>(y);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH<A>; i++) x[i] = y[i];
  }
}

// WIDTH rows.
template <class A> using RowsOfLanes = char * [WIDTH<A>];

// Whether the columns that fill no square go through one too: the instruction set has loads and stores of n elements.
template <class A, class S>
constexpr bool masked = std::is_same_v<A, float> && std::is_same_v<S, float> && FUSEDKD_VECTOR_BYTES >= 32;

// The first n columns of a row, n < WIDTH; other lanes are 0 and stay unwritten.
#if FUSEDKD_VECTOR_BYTES == 64
INLINE F load_some(const float* p, int n) { return (F)_mm512_maskz_loadu_ps(__mmask16((1 << n) - 1), p); }
INLINE void store_some(float* p, int n, F x) { _mm512_mask_storeu_ps(p, __mmask16((1 << n) - 1), (__m512)x); }
#elif FUSEDKD_VECTOR_BYTES == 32
INLINE __m256i below(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE F load_some(const float* p, int n) { return (F)_mm256_maskload_ps(p, below(n)); }
INLINE void store_some(float* p, int n, F x) { _mm256_maskstore_ps(p, below(n), (__m256)x); }
#endif

template <class A, class S> [[gnu::noinline]] void to_lanes(const RowsOfLanes<A>& rows, int64_t n, A* to) {
  int64_t j = 0;
  for (; j + WIDTH<A> <= n; j += WIDTH<A>) {
    Vec<A> x[WIDTH<A>];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH<A>; i++) x[i] = load_as<A>((const S*)rows[i] + j);
    transpose<A>(x);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH<A>; i++) store(to + (j + i) * WIDTH<A>, x[i]);
  }
  const int last = int(n - j);
  if constexpr (masked<A, S>) {
    if (last > 2) {
      Vec<A> x[WIDTH<A>];
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH<A>; i++) x[i] = load_some((const A*)rows[i] + j, last);
      transpose<A>(x);
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH<A>; i++)
        if (i < last) store(to + (j + i) * WIDTH<A>, x[i]);
      return;
    }
  }
  for (int c = 0; c < last; c++)
    for (int i = 0; i < WIDTH<A>; i++) convert((const S*)rows[i] + j + c, 1, to + (j + c) * WIDTH<A> + i);
}
template <class A, class S>
[[gnu::noinline]] void from_lanes(const A* from, int64_t n, const RowsOfLanes<A>& rows, int count) {
  int64_t j = 0;
  for (; j + WIDTH<A> <= n; j += WIDTH<A>) {
    Vec<A> x[WIDTH<A>];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH<A>; i++) x[i] = load(from + (j + i) * WIDTH<A>);
    transpose<A>(x);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH<A>; i++)
      if (i < count) store_as<A>((S*)rows[i] + j, x[i]);
  }
  const int last = int(n - j);
  if constexpr (masked<A, S>) {
    if (last > 2) {
      Vec<A> x[WIDTH<A>];
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH<A>; i++) x[i] = i < last ? load(from + (j + i) * WIDTH<A>) : Vec<A>{};
      transpose<A>(x);
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH<A>; i++)
        if (i < count) store_some((A*)rows[i] + j, last, x[i]);
      return;
    }
  }
  for (int c = 0; c < last; c++)
    for (int i = 0; i < count; i++) convert(from + (j + c) * WIDTH<A> + i, 1, (S*)rows[i] + j + c);
}

// n columns of WIDTH rows, to[column·WIDTH + row].
template <class A> void to_lanes(ScalarType type, const RowsOfLanes<A>& rows, int64_t n, A* to) {
  switch (type) {
    case ScalarType::Double: return to_lanes<A, double>(rows, n, to);
    case ScalarType::Float: return to_lanes<A, float>(rows, n, to);
    case ScalarType::BFloat16: return to_lanes<A, BFloat16>(rows, n, to);
    default: return to_lanes<A, Half>(rows, n, to);
  }
}
// And back, `count` of the rows, whose type is that of a student with accumulation type A.
template <class A> void from_lanes(ScalarType type, const A* from, int64_t n, const RowsOfLanes<A>& rows, int count) {
  if constexpr (std::is_same_v<A, double>) return from_lanes<A, double>(from, n, rows, count);
  else if (type == ScalarType::Float) return from_lanes<A, float>(from, n, rows, count);
  else if (type == ScalarType::BFloat16) return from_lanes<A, BFloat16>(from, n, rows, count);
  else return from_lanes<A, Half>(from, n, rows, count);
}

}  // namespace FUSEDKD_NAMESPACE
#endif
