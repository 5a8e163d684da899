// The CPU kernel of kd_loss for a teacher known at K columns: topk_rows.h, compiled once per instruction set.
#include <atomic>

#include "call.h"

#define FUSEDKD_BODY "topk_rows.h"
#include "isa.h"

namespace fusedkd {

void run(const TopkCall& k) {
  over_rows(k.student, [&](int64_t begin, int64_t end) { FUSEDKD_CALL(topk_rows, k, begin, end) });
}

bool legal(const TopkList& list) {
  std::atomic<bool> illegal = false;
  over_rows(list.teacher, [&](int64_t begin, int64_t end) { FUSEDKD_CALL(topk_check, list, begin, end, illegal) });
  return !illegal;
}

}  // namespace fusedkd
