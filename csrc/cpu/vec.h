// Vectors of the accumulation type A (float or double), their exponential and logarithm, and columns of a row in A.
// Compiled once per instruction set (isa.h). GCC's vector extension carries the arithmetic; only what it lacks is
// spelled out. The compiler may reassociate and contract nothing: no -ffast-math, and -ffp-contract=off.
#ifndef FUSEDKD_VEC
#define FUSEDKD_VEC

#ifndef FUSEDKD_VECTOR_BYTES
#error "isa.h includes this"
#endif

#include "tensor.h"

#undef INLINE
#define INLINE inline __attribute__((always_inline))
#undef FLAT
#define FLAT __attribute__((always_inline))  // of a lambda

namespace FUSEDKD_NAMESPACE {

template <class A> struct Types;
template <> struct Types<float> {
  typedef float Vec __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
  using Lane = int32_t;
  static constexpr int mantissa = 23, bias = 127, exp_degree = 6, phi_degree = 6;  // cut off at 2e-9 and 4e-8,
  static constexpr int log_degree = 4;                                             // 2e-9
};
template <> struct Types<double> {
  typedef double Vec __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
  using Lane = int64_t;
  static constexpr int mantissa = 52, bias = 1023, exp_degree = 11, phi_degree = 13;  // cut off at 6e-18, 6e-18
  static constexpr int log_degree = 9;                                                // and 2e-17
};
template <class A> using Vec = typename Types<A>::Vec;
template <class A> using Int = typename Types<A>::Int;
using F = Vec<float>;
using D = Vec<double>;

template <class X> struct Element {
  using Type = X;
};  // what X is a vector of, X itself if it is a scalar
template <> struct Element<F> {
  using Type = float;
};
template <> struct Element<D> {
  using Type = double;
};
template <class X> using Scalar = typename Element<X>::Type;

constexpr double LOG2E = 1.44269504088896340735992;

constexpr int STEP = 16;  // columns per step of a loop, and so partial sums, on every instruction set
template <class A> constexpr int WIDTH = FUSEDKD_VECTOR_BYTES / sizeof(A);
template <class A> constexpr int PER_STEP = STEP / WIDTH<A>;  // vectors per step
template <class A> constexpr A INFINITE = std::numeric_limits<A>::infinity();

template <class A> INLINE Vec<A> splat(A x) { return x - Vec<A>{}; }
INLINE F splat(F x) { return x; }  // of what may be a vector already
INLINE D splat(D x) { return x; }
template <class A> INLINE Vec<A> load(const A* p) {
  Vec<A> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class A> INLINE void store(A* p, Vec<A> x) { std::memcpy(p, &x, sizeof x); }

template <class A> INLINE Vec<A> sign(Vec<A> x) { return (Vec<A>)((Int<A>)x & (Int<A>)splat<A>(-0.0)); }
template <class A> INLINE Vec<A> flip(Vec<A> x, Vec<A> sign) { return (Vec<A>)((Int<A>)x ^ (Int<A>)sign); }
template <class A> INLINE Vec<A> abs(Vec<A> x) { return flip<A>(x, sign<A>(x)); }
INLINE F absolute(F x) { return abs<float>(x); }
INLINE D absolute(D x) { return abs<double>(x); }
INLINE double absolute(double x) { return std::abs(x); }

// max is x > y ? x : y, so y where either is NaN. (GCC 12 warns of an undefined operand inside its own _mm512_max_ps,
// not of the masked form, which it compiles to the same instruction.)
template <class X> INLINE X max(X x, X y) { return x > y ? x : y; }
template <class X> INLINE X min(X x, X y) { return x < y ? x : y; }
#if FUSEDKD_VECTOR_BYTES == 64
INLINE F max(F x, F y) { return (F)_mm512_maskz_max_ps(0xffff, (__m512)x, (__m512)y); }
INLINE F min(F x, F y) { return (F)_mm512_maskz_min_ps(0xffff, (__m512)x, (__m512)y); }
INLINE D max(D x, D y) { return (D)_mm512_maskz_max_pd(0xff, (__m512d)x, (__m512d)y); }
INLINE D min(D x, D y) { return (D)_mm512_maskz_min_pd(0xff, (__m512d)x, (__m512d)y); }
INLINE F fma(F x, F y, F z) { return (F)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z); }
INLINE D fma(D x, D y, D z) { return (D)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)z); }
#elif FUSEDKD_VECTOR_BYTES == 32
INLINE F max(F x, F y) { return (F)_mm256_max_ps((__m256)x, (__m256)y); }
INLINE F min(F x, F y) { return (F)_mm256_min_ps((__m256)x, (__m256)y); }
INLINE D max(D x, D y) { return (D)_mm256_max_pd((__m256d)x, (__m256d)y); }
INLINE D min(D x, D y) { return (D)_mm256_min_pd((__m256d)x, (__m256d)y); }
INLINE F fma(F x, F y, F z) { return (F)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z); }
INLINE D fma(D x, D y, D z) { return (D)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)z); }
#else
template <class V> INLINE V fma(V x, V y, V z) {
#ifdef __FP_FAST_FMAF
  for (unsigned i = 0; i < sizeof(V) / sizeof x[0]; i++) z[i] = std::fma(x[i], y[i], z[i]);
  return z;
#else
  return x * y + z;
#endif
}
#endif
INLINE double fma(double x, double y, double z) { return x * y + z; }

// Σ over the partial sums of a loop, in float64 and in a fixed order; of one vector; and the highest of maxima.
template <int n = STEP, class T, class Combine> INLINE T combined(T* x, const Combine& combine) {
  for (int i = 0; i < n / 2; i++) x[i] = combine(x[i], x[i + n / 2]);
  if constexpr (n > 2) return combined<n / 2>(x, combine);
  else return x[0];
}
template <class A> INLINE double total(const Vec<A> (&partial)[PER_STEP<A>]) {
  double sum[STEP];
  for (int i = 0; i < STEP; i++) sum[i] = partial[i / WIDTH<A>][i % WIDTH<A>];
  return combined(sum, [](double x, double y) { return x + y; });
}
INLINE double added(D x) {
  double sum[WIDTH<double>];
  store(sum, x);
  return combined<WIDTH<double>>(sum, [](double x, double y) { return x + y; });
}
template <class A> INLINE A highest(const Vec<A> (&partial)[PER_STEP<A>]) {
  A top[STEP];
  for (int i = 0; i < STEP; i++) top[i] = partial[i / WIDTH<A>][i % WIDTH<A>];
  return combined(top, [](A x, A y) { return x > y ? x : y; });
}

// Of n numbers, filled up to vectors with −∞.
INLINE double highest(const double* x, int64_t n) {
  D most = splat(-INFINITE<double>);
  for (int64_t j = 0; j < n; j += WIDTH<double>) most = max(load(x + j), most);
  double top[WIDTH<double>];
  store(top, most);
  return combined<WIDTH<double>>(top, [](double x, double y) { return max(x, y); });
}

// Σ_k c_k·x^k with c_k = c_(k−1)·ratio/(k + offset), Taylor series of exponentials, as a polynomial for |x| <= reach:
// the highest powers are replaced by the closest polynomials of lower degree (Chebyshev's; Lanczos 1938). Even and odd
// powers are summed apart: half the latency, and a series of −x beside that of x costs nothing.
template <class A, int degree> struct Series {
  A c[degree + 1];
  constexpr Series(double first, double ratio, int offset, double reach) : c() {
    constexpr int terms = degree + 6;
    double taylor[terms + 1] = {};
    for (int k = 0; k <= terms; first *= ratio / (++k + offset)) taylor[k] = first;
    for (int n = terms; n > degree; n--) {
      double t = taylor[n];  // of x^n; below, of x^(n − 2j), such that the sum is a multiple of T_n(x/reach)
      for (int j = 1; 2 * j <= n; j++) {
        t *= -reach * reach * (n - 2 * j + 2) * (n - 2 * j + 1) / (4 * j * (n - j));
        taylor[n - 2 * j] -= t;
      }
    }
    for (int k = 0; k <= degree; k++) c[k] = A(taylor[k]);
  }
  template <class X> INLINE X operator()(X x) const {
    const X square = x * x;
    X last = X{} + c[degree], other = X{} + c[degree - 1];
    for (int k = degree - 2; k >= 0; k--) {
      const X next = fma(last, square, X{} + c[k]);
      last = other, other = next;
    }
    return fma(last, x, other);
  }
};

// 2^x for x <= 0 as scale·(1 + tail): scale = 2^n with n = round(x), tail = 2^(x − n) − 1, so that 2^x − 1 is had
// without cancellation too. 2^−∞ = 0, NaN stays NaN. What would be below the smallest normal number is 0.
template <class A> struct Power {
  Vec<A> scale, tail;
  INLINE explicit Power(Vec<A> x) {
    using T = Types<A>;
    constexpr A round = A((int64_t(3) << (T::mantissa - 1)) + T::bias);  // adding it rounds x, n + bias in the low bits
    constexpr double ln2 = 0.693147180559945309417232;
    constexpr Series<A, T::exp_degree - 1> series(ln2, ln2, 1, 0.5);  // (2^f − 1)/f
    x = max(splat(A(-T::bias)), x);
    const Vec<A> rounded = x + round, f = x - (rounded - round);
    scale = (Vec<A>)((Int<A>)rounded << T::mantissa);
    tail = f * series(f);
  }
  INLINE Vec<A> value() const { return fma(scale, tail, scale); }
  INLINE Vec<A> minus_one() const { return fma(scale, tail, scale - A(1)); }
};
template <class A> INLINE Vec<A> exp2(Vec<A> x) { return Power<A>(x).value(); }
// For any x: 0 below the range, +∞ above it.
template <class X> INLINE X exp2_any(X x, bool grows) {
  using A = Scalar<X>;
  if (!grows) return exp2<A>(x);
  const auto beyond = x > A(Types<A>::bias);
  return beyond ? X{} + INFINITE<A> : exp2<A>(beyond ? X{} : x);
}

// e^x and e^x − 1 for x <= 0.
template <class X> struct Exp {
  X value, minus_one;
  INLINE explicit Exp(X x) {
    const Power<Scalar<X>> power(x * Scalar<X>(LOG2E));
    value = power.value(), minus_one = power.minus_one();
  }
};

// (e^−x − 1 + x)/x² for |x| < 1.
template <class X> INLINE X phi(X x) {
  constexpr Series<Scalar<X>, Types<Scalar<X>>::phi_degree> series(0.5, -1, 2, 1);
  return series(x);
}

// log u of a normal u > 0 that is 1 + x, where x has the digits that u lacks near 1: with u = 2^k·(1 + f),
// √½ <= 1 + f < √2 and so f = x if k = 0, it is k·log 2 + 2·artanh(f/(2 + f)). +∞ and NaN are not provided for.
template <class X> INLINE X log1p(X x, X u) {
  using A = Scalar<X>;
  using T = Types<A>;
  using Lane = typename T::Lane;
  constexpr A round = A(int64_t(3) << (T::mantissa - 1));
  const Int<A> root = (Int<A>)splat(A(0.707106781186547524401)), above = (Int<A>)u - root, k = above >> T::mantissa;
  const X of_u = (X)((above & ((Lane(1) << T::mantissa) - 1)) + root) - A(1), f = k == 0 ? x : of_u;
  const X t = f / (f + A(2)), square = t * t;
  X sum = splat(A(1) / (2 * T::log_degree + 1));
  for (int i = T::log_degree - 1; i >= 0; i--) sum = fma(sum, square, splat(A(1) / (2 * i + 1)));
  const X exponent = (X)(k + (Int<A>)splat(round)) - round;
  return fma(exponent, splat(A(0.693147180559945309417232)), (t + t) * sum);
}

INLINE double log1p(double x, double u) { return std::abs(x) < 0.5 ? std::log1p(x) : std::log(u); }

// log l of l = 1 + less_one >= 1, of what describes rows; a NaN stays one. And e^x for x <= 0, x^y for x >= 1.
template <class R> INLINE R log_sum(R less_one, R l) { return l < INFINITE<Scalar<R>> ? log1p(less_one, l) : l; }
INLINE double exp_of(double x) { return std::exp(x); }
INLINE F exp_of(F x) { return exp2<float>(x * float(LOG2E)); }
INLINE D exp_of(D x) { return exp2<double>(x * LOG2E); }
INLINE double power(double x, double y) { return std::pow(x, y); }
INLINE F power(F x, F y) { return exp2_any(y * log1p(x - 1, x) * float(LOG2E), true); }
INLINE D power(D x, D y) { return exp2_any(y * log1p(x - 1, x) * LOG2E, true); }

// ------------------------------------------------------------------------------------------- columns of a row in A
constexpr int64_t BLOCK = 2048;  // columns that are converted and worked on at a time: they stay in L1

template <class A, class S> INLINE void convert(const S* from, int64_t n, A* to) {
  for (int64_t i = 0; i < n; i++) to[i] = A(from[i]);
}
template <class S> INLINE void convert(const S* from, int64_t n, double* to) {
  for (int64_t i = 0; i < n; i++) to[i] = double(float(from[i]));
}
INLINE void convert(const double* from, int64_t n, double* to) { std::memcpy(to, from, n * sizeof(double)); }
// bfloat16 by its bits, which compilers vectorise; to nearest even, and a NaN stays one.
INLINE void convert(const BFloat16* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = uint32_t(from[i].x) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}
INLINE void convert(const float* from, int64_t n, BFloat16* to) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to[i].x = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}
#if FUSEDKD_VECTOR_BYTES >= 32
INLINE void convert(const Half* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  for (; i < n; i++) to[i] = _cvtsh_ss(from[i].x);
}
INLINE void convert(const float* from, int64_t n, Half* to) {
  int64_t i = 0;
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT;
  for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), nearest));
  for (; i < n; i++) to[i].x = _cvtss_sh(from[i], nearest);
}
#endif

// A vector of columns, from memory of type S and to it.
typedef uint16_t Halves __attribute__((vector_size(FUSEDKD_VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
template <class A, class S> INLINE Vec<A> load_as(const S* p) {
  if constexpr (std::is_same_v<A, S>) {
    return load(p);
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<S, BFloat16>) {
    Halves x;
    std::memcpy(&x, (const void*)p, sizeof x);
    return (F)(__builtin_convertvector(x, Words) << 16);
  } else {
    A x[WIDTH<A>];
    convert(p, WIDTH<A>, x);
    return load(x);
  }
}
// In the upper half of each word; a NaN stays one.
INLINE Words rounded_to_bfloat16(F x) {
  const Words bits = (Words)x;
  return (bits & 0x7fffffff) > 0x7f800000 ? Words{} + 0x7fc00000 : bits + 0x7fff + (bits >> 16 & 1);
}
template <class A, class S> INLINE void store_as(S* p, Vec<A> x) {
  if constexpr (std::is_same_v<A, S>) {
    store(p, x);
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<S, BFloat16>) {
    const Halves y = __builtin_convertvector(rounded_to_bfloat16(x) >> 16, Halves);
    std::memcpy((void*)p, &y, sizeof y);
  } else {
    A y[WIDTH<A>];
    store(y, x);
    convert(y, WIDTH<A>, p);
  }
}

// Two vectors of columns likewise, where the order of columns does not matter: of bfloat16, those with even and with odd
// numbers, which takes half the instructions.
template <class A, class S> INLINE void load_pair(const S* p, Vec<A>& x, Vec<A>& y) {
  if constexpr (std::is_same_v<A, float> && std::is_same_v<S, BFloat16>) {
    Words both;
    std::memcpy(&both, (const void*)p, sizeof both);
    x = (F)(both << 16), y = (F)(both & 0xffff0000);
  } else {
    x = load_as<A>(p), y = load_as<A>(p + WIDTH<A>);
  }
}
template <class A, class S> INLINE void store_pair(S* p, Vec<A> x, Vec<A> y) {
  if constexpr (std::is_same_v<A, float> && std::is_same_v<S, BFloat16>) {
    const Words both = rounded_to_bfloat16(x) >> 16 | (rounded_to_bfloat16(y) & 0xffff0000);
    std::memcpy((void*)p, &both, sizeof both);
  } else {
    store_as<A>(p, x), store_as<A>(p + WIDTH<A>, y);
  }
}

constexpr int64_t whole_steps(int64_t n) { return (n + STEP - 1) / STEP * STEP; }

// Columns [j, j + n) of a row, n <= BLOCK: where they lie if loops can read them there, else in `buffer`, filled up
// with `rest` to whole steps.
template <class A>
INLINE const A* read(ScalarType type, const char* row, int64_t j, int64_t n, A* buffer, A rest, bool copy = false) {
  switch (type) {
    case ScalarType::Double:
      if (std::is_same_v<A, double> && !copy && n % STEP == 0) return (const A*)row + j;
      convert((const double*)row + j, n, buffer);
      break;
    case ScalarType::Float:
      if (std::is_same_v<A, float> && !copy && n % STEP == 0) return (const A*)row + j;
      convert((const float*)row + j, n, buffer);
      break;
    case ScalarType::BFloat16: convert((const BFloat16*)row + j, n, buffer); break;
    default: convert((const Half*)row + j, n, buffer);
  }
  std::fill(buffer + n, buffer + whole_steps(n), rest);
  return buffer;
}

// Where a loop puts columns [j, j + n) of a result of the accumulation type's student: in place, or into `buffer` for
// write() to take.
template <class A> INLINE A* place(ScalarType type, char* row, int64_t j, int64_t n, A* buffer) {
  return size_of(type) == sizeof(A) && n % STEP == 0 ? (A*)row + j : buffer;
}
template <class A> INLINE void write(ScalarType type, char* row, int64_t j, int64_t n, const A* from) {
  if (size_of(type) == sizeof(A)) {
    if (from != (A*)row + j) std::memcpy((A*)row + j, from, n * sizeof(A));
  } else if (type == ScalarType::BFloat16) convert(from, n, (BFloat16*)row + j);
  else convert(from, n, (Half*)row + j);
}

}  // namespace FUSEDKD_NAMESPACE
#endif
