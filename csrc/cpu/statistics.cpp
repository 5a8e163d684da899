// The CPU operator of the statistics of rows (fusedkd/backends/schema.py): statistics_rows.h, compiled once per
// instruction set.
#include "call.h"

#define FUSEDKD_BODY "statistics_rows.h"
#include "isa.h"

namespace fusedkd {
namespace {

Tensor kd_statistics(Tensor student, Tensor teacher, Optional labels, Tensor row_weights, Tensor options,
                     bool transform, bool of_teacher, int64_t columns, int64_t ignore_index) {
  const Tensor& other = of_teacher ? teacher : student;
  Tensor normalizers = fresh({NORMALIZERS}, ScalarType::Double);
  std::fill_n(static_cast<double*>(normalizers.data_ptr()), NORMALIZERS, 1.0);  // of no use here
  StatisticsCall k{{student, other, labels, row_weights, options, normalizers, ignore_index, transform, false}};
  STD_TORCH_CHECK(columns >= 1 && columns <= k.student.columns && columns <= k.teacher.columns,
                  "fusedkd: student and teacher have fewer columns than that");
  Tensor found = fresh({5, k.student.count}, accumulation_type(k.student.type));
  k.columns = columns, k.of_teacher = of_teacher, k.stats = found.data_ptr();
  over_rows(k.student, [&](int64_t begin, int64_t end) { FUSEDKD_CALL(statistics_rows, k, begin, end) });
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CPU, m) { m.impl("kd_statistics", TORCH_BOX(&kd_statistics)); }

}  // namespace fusedkd
