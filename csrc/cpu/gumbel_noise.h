// Gumbel noise of seed, row and column, as fusedkd/reference/gumbel.py says, to the last bit: words of Philox 4x32-10,
// and float32 arithmetic that is never fused. Compiled once per instruction set (isa.h).
#ifndef FUSEDKD_GUMBEL_NOISE
#define FUSEDKD_GUMBEL_NOISE

#include "vec.h"

namespace FUSEDKD_NAMESPACE {

// 32-bit numbers in the lower halves of 64-bit lanes, where their products have room. What is in the upper halves is
// nobody's concern.
typedef uint64_t Wide __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));

INLINE Wide multiply(Wide x, Wide y) {
#if FUSEDKD_VECTOR_BYTES == 64
  return (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)x, (__m512i)y);
#elif FUSEDKD_VECTOR_BYTES == 32
  return (Wide)_mm256_mul_epu32((__m256i)x, (__m256i)y);
#else
  constexpr uint64_t low = 0xffffffff;
  return (x & low) * (y & low);
#endif
}

struct Noise {
  static constexpr int ROUNDS = 10;
  static constexpr int64_t GROUP = 32;  // counters side by side: 4·GROUP columns have one word of each after the other
  static_assert(BLOCK % (4 * GROUP) == 0 && GROUP % WIDTH<float> == 0);
  uint64_t key[ROUNDS][2];
  Wide even = {}, odd;  // of WIDTH counters

  explicit Noise(int64_t seed) {
    uint32_t first = uint32_t(seed), second = uint32_t(uint64_t(seed) >> 32);
    for (auto& round : key) {
      round[0] = first, round[1] = second;
      first += 0x9e3779b9, second += 0xbb67ae85;
    }
    for (int u = 0; u < WIDTH<double>; u++) even[u] = 2 * u;
    odd = even + 1;
  }

  // Of a row, columns [j, j + n), both j and BLOCK multiples of 4·GROUP; as many more as fill the last 4·GROUP.
  void fill(int64_t row, int64_t j, int64_t n, float* to) const {
    for (int64_t start = 0; start < n; start += 4 * GROUP)
      for (int64_t c = 0; c < GROUP; c += WIDTH<float>) {
        const uint64_t counter = (j + start) / 4 + c;
        Wide a[4], b[4];
        philox(even + counter, row, a), philox(odd + counter, row, b);
        for (int word = 0; word < 4; word++) {
          constexpr uint64_t low = 0xffffffff;
          store<float>(to + start + word * GROUP + c, gumbel((Words)((a[word] & low) | (b[word] << 32))));
        }
      }
  }

 private:
  INLINE void philox(Wide counter, int64_t row, Wide (&c)[4]) const {
    const Wide zero = {}, first = zero + 0xd2511f53, second = zero + 0xcd9e8d57;
    c[0] = counter, c[1] = zero + uint64_t(row), c[2] = zero, c[3] = zero;
    for (const auto& k : key) {
      const Wide a = multiply(c[0], first), b = multiply(c[2], second);
      c[0] = (b >> 32) ^ c[1] ^ k[0], c[2] = (a >> 32) ^ c[3] ^ k[1];
      c[1] = b, c[3] = a;
    }
  }

  // −log(−log u), u = (k + ½)·2⁻³²; near 1, u lacks the digits that 1 − u has.
  static INLINE F gumbel(Words k) {
    const F e = -log(uniform(k), -uniform(~k));
    return -log(e, e - 1);
  }
  static INLINE F uniform(Words k) { return __builtin_convertvector(k, F) * 0x1p-32f + 0x1p-33f; }

  // log u of a normal u > 0, given u − 1, which is used for √½ <= u < √2: reference/gumbel.py, _log.
  static INLINE F log(F u, F less_one) {
    constexpr float series[] = {-0.49999991059303284f, 0.33333951234817505f,  -0.25001755356788635f,
                                0.19962072372436523f,  -0.16570508480072021f, 0.14917974174022675f,
                                -0.14307522773742676f, 0.08734841644763947f};
    constexpr int32_t root = 0x3f3504f3;
    const Int<float> above = (Int<float>)u - root, exponent = above >> 23;
    const F of_u = (F)((above & 0x7fffff) + root) - 1, f = exponent == 0 ? less_one : of_u;
    const F square = f * f;
    const F low = (series[1] * f + series[0]) + square * (series[3] * f + series[2]);
    const F high = (series[5] * f + series[4]) + square * (series[7] * f + series[6]);
    return __builtin_convertvector(exponent, F) * 0.693147182464599609375f +
           (f + square * (low + square * square * high));
  }
};

}  // namespace FUSEDKD_NAMESPACE
#endif
