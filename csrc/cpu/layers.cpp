// The CPU operators over several layers: their arguments become a LayersCall, and layer_rows.h does the rest, once per
// instruction set.
#include "call.h"

#define FUSEDKD_BODY "layer_rows.h"
#include "isa.h"

namespace fusedkd {
namespace {

using Layers = std::vector<Tensor>;

std::vector<Rows> rows_of(const Layers& layers, const Rows& like) {
  std::vector<Rows> rows;
  for (const Tensor& layer : layers) {
    rows.emplace_back(layer);
    STD_TORCH_CHECK(rows.back().count == like.count && rows.back().inner == like.inner &&
                        rows.back().columns == like.columns && rows.back().type == rows[0].type,
                    "fusedkd: the layers of a side must be alike, and the rows of both sides match");
  }
  return rows;
}

LayersCall call(const Layers& student, const Layers& teacher, const Optional& weights, const Tensor& normalizer) {
  STD_TORCH_CHECK(!student.empty() && !teacher.empty(), "fusedkd: there must be layers on both sides");
  const Rows first(student[0]);
  return {
      .student = rows_of(student, first),
      .teacher = rows_of(teacher, first),
      .weights = weights ? contiguous_data<float>(*weights, ScalarType::Float, first.count, "weights") : nullptr,
      .normalizer = *contiguous_data<double>(normalizer, ScalarType::Double, 1, "normalizer"),
      .type = accumulation_type(first.type),
  };
}

// A contiguous [layers, B, L, H] as the rows of each layer, in the grid of `side`.
std::vector<Rows> layers_of(const Tensor& t, const std::vector<Rows>& side) {
  Rows one = side[0];
  const int64_t bytes = one.count * one.row_bytes();
  one.data = const_cast<char*>(contiguous_data<char>(t, one.type, side.size() * one.count * one.columns, "gradient"));
  one.inner_bytes = one.row_bytes(), one.outer_bytes = one.inner * one.inner_bytes;
  in_huge_pages(t);
  std::vector<Rows> rows;
  for (size_t i = 0; i < side.size(); i++, one.data += bytes) rows.push_back(one);
  return rows;
}

Tensor layer_attention(Optional upstream, Layers student, Layers teacher, Optional weights, Tensor normalizer,
                       Tensor buckets, Optional gradient, Optional teacher_gradient, bool skip_if_one) {
  LayersCall k = call(student, teacher, weights, normalizer);
  Tensor losses = fresh({k.rows()}, k.type);
  if (upstream) k.upstream.emplace(*upstream, k.type, k.rows());
  if (skip_if_one && k.upstream && k.upstream->scalar && (*k.upstream)[0] == 1) return losses;
  k.losses = losses.data_ptr();
  k.buckets = contiguous_data<double>(buckets, ScalarType::Double, student.size() * teacher.size(), "buckets");
  if (gradient) k.gradient = layers_of(*gradient, k.student);
  if (teacher_gradient) k.teacher_gradient = layers_of(*teacher_gradient, k.teacher);
  over_rows(k.student[0], [&](int64_t begin, int64_t end) { FUSEDKD_CALL(layer_attention_rows, k, begin, end) });
  return losses;
}

// Rows are summed in chunks, whose sums are added up in turn: the same bits for any number of threads.
Tensor layer_distances(Layers student, Layers teacher, Optional weights, Tensor normalizer) {
  LayersCall k = call(student, teacher, weights, normalizer);
  k.chunk = 64;
  const int64_t pairs = student.size() * teacher.size(), chunks = (k.rows() + k.chunk - 1) / k.chunk;
  std::vector<double> sums(chunks * pairs), total(pairs);
  k.sums = sums.data();
  torch::stable::parallel_for(0, chunks, 1,
                              [&](int64_t begin, int64_t end) { FUSEDKD_CALL(layer_distance_chunks, k, begin, end) });
  for (int64_t c = 0; c < chunks; c++)
    for (int64_t p = 0; p < pairs; p++) total[p] += sums[c * pairs + p];
  Tensor result = fresh({int64_t(student.size()), int64_t(teacher.size())}, k.type);
  for (int64_t p = 0; p < pairs; p++) {
    const double mean = total[p] / k.normalizer / double(k.columns());
    if (k.type == ScalarType::Double) static_cast<double*>(result.data_ptr())[p] = mean;
    else static_cast<float*>(result.data_ptr())[p] = float(mean);
  }
  return result;
}

Tensor layer_distances_backward(Tensor upstream, Layers student, Layers teacher, Optional weights, Tensor normalizer) {
  LayersCall k = call(student, teacher, weights, normalizer);
  const Rows& first = k.student[0];
  const int64_t M = student.size();
  Tensor gradient = fresh({M, first.count / std::max<int64_t>(1, first.inner), first.inner, first.columns}, first.type);
  k.gradient = layers_of(gradient, k.student);
  k.factors = contiguous_data<double>(upstream, ScalarType::Double, M * teacher.size(), "upstream");
  over_rows(first, [&](int64_t begin, int64_t end) { FUSEDKD_CALL(layer_distance_gradients, k, begin, end) });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CPU, m) {
  m.impl("layer_attention", TORCH_BOX(&layer_attention));
  m.impl("layer_distances", TORCH_BOX(&layer_distances));
  m.impl("layer_distances_backward", TORCH_BOX(&layer_distances_backward));
}

}  // namespace fusedkd
