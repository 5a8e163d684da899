// The CPU operators of gumbel_rows: their arguments become a GumbelCall, and gumbel_rows.h does the rest, once per
// instruction set.
#include "call.h"

#define FUSEDKD_BODY "gumbel_rows.h"
#include "isa.h"

namespace fusedkd {
namespace {

GumbelCall call(const Tensor& logits, const Tensor& seed, const Tensor& temperature, int64_t first_row) {
  const Rows rows(logits);
  STD_TORCH_CHECK(size_of(rows.type) >= 4, "fusedkd: logits must be float32 or float64");
  return {
      .logits = rows,
      .seed = *contiguous_data<int64_t>(seed, ScalarType::Long, 1, "seed"),
      .temperature = *contiguous_data<double>(temperature, ScalarType::Double, 1, "temperature"),
      .first_row = first_row,
  };
}

void run(const GumbelCall& k) {
  over_rows(k.logits, [&](int64_t begin, int64_t end) { FUSEDKD_CALL(gumbel_rows, k, begin, end) });
}

std::tuple<Tensor, Tensor> gumbel_forward(Tensor logits, Tensor seed, Tensor temperature, int64_t first_row) {
  GumbelCall k = call(logits, seed, temperature, first_row);
  Tensor ids = fresh({k.logits.count}, ScalarType::Long), stats = fresh({k.logits.count, GUMBEL_STATS}, k.logits.type);
  k.ids = static_cast<int64_t*>(ids.data_ptr()), k.stats = stats.data_ptr();
  run(k);
  return {ids, stats};
}

void gumbel_backward(Tensor logits, Tensor slopes, Tensor ids, Tensor stats, Tensor seed, Tensor temperature,
                     Tensor scale, int64_t first_row) {
  GumbelCall k = call(logits, seed, temperature, first_row);
  const int64_t n = k.logits.count;
  k.slopes.emplace(slopes);
  STD_TORCH_CHECK(k.slopes->like(k.logits), "fusedkd: slopes must be like the logits");
  k.ids = const_cast<int64_t*>(contiguous_data<int64_t>(ids, ScalarType::Long, n, "ids"));
  k.stats = const_cast<char*>(contiguous_data<char>(stats, k.logits.type, GUMBEL_STATS * n, "stats"));
  k.scale = *contiguous_data<double>(scale, ScalarType::Double, 1, "scale");
  run(k);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CPU, m) {
  m.impl("gumbel_forward", TORCH_BOX(&gumbel_forward));
  m.impl("gumbel_backward", TORCH_BOX(&gumbel_backward));
}

}  // namespace fusedkd
