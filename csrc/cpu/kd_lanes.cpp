// The CPU kernel of kd_loss for rows of few columns: kd_lanes.h, compiled once per instruction set.
#include "call.h"

#define FUSEDKD_BODY "kd_lanes.h"
#include "isa.h"

namespace fusedkd {

void run_in_lanes(const KdCall& k) {
  over_rows(k.student, [&](int64_t begin, int64_t end) { FUSEDKD_CALL(kd_lanes, k, begin, end) });
}

}  // namespace fusedkd
