// What a matrix product is made of on AVX-512: operands packed for it, and a tile of the result that stays in
// registers. product.cpp compiles this once per instruction set, with FUSEDKD_NAMESPACE, and with FUSEDKD_BF16 where
// vdpbf16ps multiplies bfloat16.
//
// A step of a product is what one instruction takes of the summed dimension: a float32, or two bfloat16 side by side,
// whose products it adds to a float32. Either is 32 bits wide, so that both types are packed and multiplied alike.
namespace FUSEDKD_NAMESPACE {

#ifdef FUSEDKD_BF16
constexpr int PER_STEP = 2;
INLINE __m512 multiplied(__m512i a, __m512i b, __m512 sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#else
constexpr int PER_STEP = 1;
INLINE __m512 multiplied(__m512i a, __m512i b, __m512 sum) { return _mm512_fmadd_ps((__m512)a, (__m512)b, sum); }
#endif

INLINE __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

// ------------------------------------------------------------------------------------------------------- packing

#ifdef FUSEDKD_BF16
// Places of x₀, y₀, x₁, y₁, … in x and y of 32 elements each.
alignas(64) constexpr uint16_t PAIRS[64] = {
    0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
    11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
    22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63,
};
#endif

// Steps of the summed dimension at which it is contiguous: elements [0, count) of `from`, 0 from there to 16 steps.
INLINE __m512i steps_of(ScalarType type, const char* from, int64_t count) {
#ifdef FUSEDKD_BF16
  if (type == ScalarType::BFloat16) {
    const __mmask32 mask = count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1;
    return _mm512_maskz_loadu_epi16(mask, from);
  }
  const float* x = (const float*)from;
  const __m512 low = _mm512_maskz_loadu_ps(first(count), x), high = _mm512_maskz_loadu_ps(first(count - 16), x + 16);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
  (void)type;
  return _mm512_maskz_loadu_epi32(first(count), from);
#endif
}

// One step of `width` rows, where those are contiguous: elements [0, count) of `from` and, of the step's second, of
// `next`, 0 from there. Without a `next` that is 0.
INLINE void pack_step(ScalarType type, const char* from, const char* next, int64_t count, int64_t width, uint32_t* to) {
  const int64_t size = size_of(type);
#ifdef FUSEDKD_BF16
  const __m512i lower = _mm512_load_si512(PAIRS), upper = _mm512_load_si512(PAIRS + 32);
  for (int64_t i = 0; i < width; i += 32) {
    const __m512i x = steps_of(type, from + i * size, count - i);
    const __m512i y = next ? steps_of(type, next + i * size, count - i) : __m512i{};
    _mm512_store_si512(to + i, _mm512_permutex2var_epi16(x, lower, y));
    if (i + 16 < width) _mm512_store_si512(to + i + 16, _mm512_permutex2var_epi16(x, upper, y));
  }
#else
  (void)next;
  for (int64_t i = 0; i < width; i += 16) _mm512_store_si512(to + i, steps_of(type, from + i * size, count - i));
#endif
}

// 16×16 elements of 32 bits, transposed: element pairs, pairs of pairs, then quarters of vectors change places.
INLINE void transpose(__m512i (&x)[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_maskz_unpacklo_epi32(0xffff, x[i], x[i + 1]);
    y[i + 1] = _mm512_maskz_unpackhi_epi32(0xffff, x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      x[i + 2 * j] = _mm512_maskz_unpacklo_epi64(0xff, y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_maskz_unpackhi_epi64(0xff, y[i + j], y[i + j + 2]);
    }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 16; j += 8) {
      y[j + i] = _mm512_maskz_shuffle_i32x4(0xffff, x[j + i], x[j + i + 4], 0x88);
      y[j + i + 4] = _mm512_maskz_shuffle_i32x4(0xffff, x[j + i], x[j + i + 4], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    x[i] = _mm512_maskz_shuffle_i32x4(0xffff, y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_maskz_shuffle_i32x4(0xffff, y[i], y[i + 8], 0xdd);
  }
}

// Rows [row, row + rows) of an operand, elements [k, k + depth) of each, into `to`: in blocks of `width` rows, each
// [steps][width], the last of which is filled up with 0. width is a multiple of 16.
inline void pack(const Operand& from, int64_t row, int64_t rows, int64_t k, int64_t depth, int64_t width,
                 uint32_t* to) {
  const int64_t steps = (depth + PER_STEP - 1) / PER_STEP, size = size_of(from.type);
  const char* start = from.data + (row * from.stride + k * from.depth_stride) * size;
  if (from.depth_stride == 1) {
    for (int64_t block = 0; block < rows; block += width, to += width * steps)
      for (int64_t i = 0; i < width; i += 16)
        for (int64_t s = 0; s < steps; s += 16) {
          __m512i x[16];
          for (int64_t r = 0; r < 16; r++) {
            const int64_t at = block + i + r;
            const char* const data = start + (at * from.stride + s * PER_STEP) * size;
            x[r] = at < rows ? steps_of(from.type, data, depth - s * PER_STEP) : __m512i{};
          }
          transpose(x);
          for (int64_t j = 0; j < std::min<int64_t>(16, steps - s); j++)
            _mm512_store_si512(to + (s + j) * width + i, x[j]);
        }
    return;
  }
  constexpr int64_t at_a_time = 4;  // steps: the operand is read almost in its own order, the blocks written in theirs
  for (int64_t begin = 0; begin < steps; begin += at_a_time)
    for (int64_t block = 0; block < rows; block += width)
      for (int64_t s = begin; s < std::min(steps, begin + at_a_time); s++) {
        const char* x = start + (s * PER_STEP * from.depth_stride + block) * size;
        const char* next = s * PER_STEP + 1 == depth ? nullptr : x + from.depth_stride * size;
        pack_step(from.type, x, next, rows - block, width, to + block * steps + s * width);
      }
}

// ----------------------------------------------------------------------------------------------------------- tile

// Of packed operands: TILE_ROWS × TILE_COLUMNS sums in registers, over `steps`. The first rows × columns of them go to
// c, on top of what is there, or of the bias, unless it is null.
inline void multiply(const uint32_t* a, const uint32_t* b, int64_t steps, float* c, int64_t stride, int64_t rows,
                     int64_t columns, bool add, const float* bias) {
  constexpr int vectors = TILE_COLUMNS / 16;
  for (int r = 0; r < std::min<int64_t>(rows, TILE_ROWS); r++)
    for (int v = 0; v < vectors; v++) _mm_prefetch((const char*)(c + r * stride + 16 * v), _MM_HINT_T0);
  __m512 sum[TILE_ROWS][vectors] = {};
  for (int64_t s = 0; s < steps; s++, a += BLOCK_ROWS, b += TILE_COLUMNS) {
    __m512i x[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) x[v] = _mm512_load_si512(b + 16 * v);
#pragma GCC unroll 16
    for (int r = 0; r < TILE_ROWS; r++) {
      const __m512i y = _mm512_set1_epi32(a[r]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; v++) sum[r][v] = multiplied(y, x[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < TILE_ROWS; r++) {
    if (r >= rows) break;
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) {
      const __mmask16 mask = first(columns - 16 * v);
      float* to = c + r * stride + 16 * v;
      __m512 x = sum[r][v];
      if (add) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, to));
      else if (bias) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, bias + 16 * v));
      _mm512_mask_storeu_ps(to, mask, x);
    }
  }
}

constexpr Kernel KERNEL{PER_STEP, pack, multiply};

}  // namespace FUSEDKD_NAMESPACE
