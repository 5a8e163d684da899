// The lists of a teacher known at K columns: ids, and what it gives for them. Compiled once per instruction set (isa.h).
#ifndef FUSEDKD_TOPK_LIST
#define FUSEDKD_TOPK_LIST

#include "call.h"
#include "vec.h"

namespace FUSEDKD_NAMESPACE {

using Lanes = Int<double>;  // ids

INLINE Lanes lanes(const int64_t* from) {
  Lanes x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
INLINE bool any(Lanes mask) {
  int64_t found = 0;
  for (int u = 0; u < WIDTH<double>; u++) found |= mask[u];
  return found != 0;
}
// n >= 1 of them, filled up to whole steps with the first.
template <class T> INLINE void copy_padded(const T* from, int64_t n, T* to) {
  std::copy_n(from, n, to);
  std::fill(to + n, to + whole_steps(n), from[0]);
}

INLINE void elements(ScalarType type, const char* row, int64_t n, double* to) {
  switch (type) {
    case ScalarType::Double: return convert((const double*)row, n, to);
    case ScalarType::Float: return convert((const float*)row, n, to);
    case ScalarType::BFloat16: return convert((const BFloat16*)row, n, to);
    default: return convert((const Half*)row, n, to);
  }
}

// What fusedkd/checks.py says of a list, yes or no, of rows [begin, end): ids are −1 or columns of the student, weights
// at least 0, and ids of log-probabilities differ within a row, of which none is above 0 by more than rounding.
inline void topk_check(const TopkList& list, int64_t begin, int64_t end, std::atomic<bool>& illegal) {
  const int64_t K = list.teacher.columns, V = list.columns;
  if (K == 0) return;
  const ScalarType type = list.teacher.type;
  const double eps = type == ScalarType::BFloat16 ? 0x1p-7 : type == ScalarType::Half ? 0x1p-10 : 0;
  const double most = std::max(1e-3, 16 * eps);
  std::vector<int64_t> id(whole_steps(K));
  std::vector<double> value(whole_steps(K));
  std::vector<int32_t> seen(V + 1, -1);  // by column + 1: the last row, from `begin`, that lists it
  for (int64_t i = begin; i < end; i++) {
    const int64_t* from = list.ids + i * K;
    copy_padded(from, K, id.data());
    elements(type, list.teacher[i], K, value.data());
    std::fill(value.begin() + K, value.end(), value[0]);
    Lanes wrong = {};
    for (int64_t j = 0; j < K; j += WIDTH<double>) {
      const Lanes column = lanes(&id[j]);
      const D x = load(&value[j]);
      wrong |= (column < -1) | (column >= V) | (list.sampled ? x < 0 : (column >= 0) & (x > most));
    }
    bool twice = false;
    if (!any(wrong) && !list.sampled)
      for (int64_t j = 0; j < K; j++) {
        int32_t& last = seen[from[j] + 1];
        twice |= (from[j] >= 0) & (last == int32_t(i - begin));
        last = int32_t(i - begin);
      }
    if (any(wrong) || twice) illegal = true;
  }
}

}  // namespace FUSEDKD_NAMESPACE
#endif
