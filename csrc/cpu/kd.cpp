// The CPU kernel of kd_loss for a teacher with logits: kd_rows.h, compiled once per instruction set.
#include "call.h"

#define FUSEDKD_BODY "kd_rows.h"
#include "isa.h"

namespace fusedkd {

void run(const KdCall& k) {
  const bool lanes = k.student.columns <= LANE_COLUMNS && k.kernel_id != KernelId::DKD && !k.stage;
  if (lanes && !k.option_stride) return run_in_lanes(k);
  over_rows(k.student, [&](int64_t begin, int64_t end) { FUSEDKD_CALL(kd_rows, k, begin, end) });
}

void run_both(const KdCall& k, const KdCall& exchanged) {
  if (k.student.columns <= LANE_COLUMNS) return run(k), run(exchanged);
  over_rows(k.student, [&](int64_t begin, int64_t end) { FUSEDKD_CALL(kd_rows_both, k, exchanged, begin, end) });
}

}  // namespace fusedkd

// The instruction set in use, for whoever asks (ctypes).
extern "C" __attribute__((visibility("default"))) const char* fusedkd_isa() {
  return fusedkd::ISA_NAMES[int(fusedkd::isa())];
}
