// Compiles FUSEDKD_BODY, a header, once per instruction set. Each time FUSEDKD_NAMESPACE is the namespace that it
// defines its functions in, and FUSEDKD_VECTOR_BYTES the size of a vector; what the body includes is compiled with it.
//
// FUSEDKD_CALL(f, …) then calls the best f that this processor runs, or the one that the environment variable
// FUSEDKD_ISA = avx512_bf16 | avx512 | avx2 | plain asks for, if that is not beyond it.
// avx512_bf16 has one function of its own, in product.cpp, which includes this for the choice alone, without a body.
//
// The headers that are compiled so, vec.h and all that include it, have guards as others do. each_isa.h undefines them
// for the next instruction set; headers with #pragma once are compiled once, for any processor.
#pragma once

// What bodies include beside each other: here, it is not compiled for an instruction set.
#include "tensor.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FUSEDKD_X86
#include <immintrin.h>
#endif

#define FUSEDKD_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define FUSEDKD_TARGET(features) \
  FUSEDKD_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FUSEDKD_END_TARGET _Pragma("clang attribute pop")
#else
#define FUSEDKD_TARGET(features) _Pragma("GCC push_options") FUSEDKD_PRAGMA(GCC target(features))
#define FUSEDKD_END_TARGET _Pragma("GCC pop_options")
#endif

namespace fusedkd {

enum class Isa { plain, avx2, avx512, avx512_bf16 };
constexpr const char* ISA_NAMES[] = {"plain", "avx2", "avx512", "avx512_bf16"};

inline Isa isa() {
  static const Isa chosen = [] {
    Isa best = Isa::plain;
#ifdef FUSEDKD_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;  // all of them have F16C
    if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      best = __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
#endif
    const char* variable = std::getenv("FUSEDKD_ISA");
    for (const Isa wish : {Isa::plain, Isa::avx2, Isa::avx512})
      if (variable && std::string_view(variable) == ISA_NAMES[int(wish)]) return std::min(best, wish);
    return best;
  }();
  return chosen;
}

}  // namespace fusedkd

#ifdef FUSEDKD_BODY
#ifdef FUSEDKD_X86
#define FUSEDKD_CALL(function, ...)                                                   \
  switch (isa()) {                                                                    \
    case Isa::avx512_bf16:                                                              \
    case Isa::avx512: avx512::function(__VA_ARGS__); break;                           \
    case Isa::avx2: avx2::function(__VA_ARGS__); break;                               \
    case Isa::plain: plain::function(__VA_ARGS__); break;                             \
  }

FUSEDKD_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FUSEDKD_NAMESPACE fusedkd::avx512
#define FUSEDKD_VECTOR_BYTES 64
#include "each_isa.h"
FUSEDKD_END_TARGET

FUSEDKD_TARGET("avx2,fma,f16c")
#define FUSEDKD_NAMESPACE fusedkd::avx2
#define FUSEDKD_VECTOR_BYTES 32
#include "each_isa.h"
FUSEDKD_END_TARGET
#else
#define FUSEDKD_CALL(function, ...) plain::function(__VA_ARGS__);
#endif

#define FUSEDKD_NAMESPACE fusedkd::plain
#define FUSEDKD_VECTOR_BYTES 16
#include "each_isa.h"
#endif
