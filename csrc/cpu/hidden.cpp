// The CPU operators of hidden_loss: their arguments become a HiddenCall for each layer, and hidden_rows.h does the rest,
// once per instruction set.
#include <algorithm>
#include <numeric>

#include "call.h"

#define FUSEDKD_BODY "hidden_rows.h"
#include "isa.h"

namespace fusedkd {
namespace {

using Layers = std::vector<Tensor>;

// What all layers share.
struct Shared {
  const float* weights;  // [N] or null: all 1
  double normalizer;
  const double* layer_weights;  // [M]
  int64_t distance, normalize;
};

// M layers of N rows each. Row j·N + i is row i of layer j.
struct Calls {
  std::vector<HiddenCall> layers;
  int64_t rows;
  ScalarType type;  // of the accumulation

  // The pieces of the teacher's layers come in turn: those of a layer have its columns together.
  Calls(const Layers& student, const Layers& pieces, const Shared& s) {
    STD_TORCH_CHECK(s.distance >= 0 && s.distance <= int64_t(HiddenDistance::SMOOTH_L1) && s.normalize >= 0 &&
                        s.normalize <= int64_t(HiddenNormalize::LAYER_NORM),
                    "fusedkd: no such distance or normalisation");
    const Rows first(student[0]);
    rows = first.count, type = accumulation_type(first.type);
    layers.reserve(student.size());
    size_t next = 0;
    for (const Tensor& layer : student) {
      const Rows x(layer);
      std::vector<Rows> teacher;
      int64_t columns = 0;
      for (; columns < x.columns && next < pieces.size(); columns += teacher.back().columns) {
        const Rows& y = teacher.emplace_back(pieces[next++]);
        STD_TORCH_CHECK(x.count == y.count && x.inner == y.inner, "fusedkd: student and teacher rows do not match");
      }
      STD_TORCH_CHECK(columns == x.columns && columns > 0, "fusedkd: student and teacher rows do not match");
      STD_TORCH_CHECK(x.count == rows && x.type == first.type, "fusedkd: the student's layers must be alike");
      layers.push_back({
          .student = x,
          .teacher = std::move(teacher),
          .weights = s.weights,
          .normalizer = s.normalizer,
          .layer_weight = s.layer_weights[layers.size()],
          .distance = HiddenDistance(s.distance),
          .normalize = HiddenNormalize(s.normalize),
      });
    }
    STD_TORCH_CHECK(next == pieces.size(), "fusedkd: student and teacher rows do not match");
  }

  void keep(const Tensor& stats) {
    const int64_t numbers = HIDDEN_STATS * rows;
    char* data = const_cast<char*>(contiguous_data<char>(stats, type, numbers * int64_t(layers.size()), "stats"));
    for (HiddenCall& k : layers) k.stats = data, data += numbers * size_of(type);
  }

  // Of each layer, without elements where none is wanted; or of no layer.
  void write(const Layers& gradient) {
    STD_TORCH_CHECK(gradient.empty() || gradient.size() == layers.size(), "fusedkd: a gradient of each layer, or none");
    for (size_t j = 0; j < gradient.size(); j++) {
      if (gradient[j].numel() == 0) continue;
      layers[j].gradient.emplace(gradient[j]);
      STD_TORCH_CHECK(layers[j].gradient->like(layers[j].student),
                      "fusedkd: the gradient must be like the student's hidden states");
      in_huge_pages(gradient[j]);
    }
  }

  void run() const {
    int64_t columns = 0;
    for (const HiddenCall& k : layers) columns = std::max(columns, k.student.columns);
    over_rows(rows * int64_t(layers.size()), columns, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin / rows; j * rows < end; j++) {
        const int64_t first = std::max(begin - j * rows, int64_t(0)), last = std::min(end - j * rows, rows);
        FUSEDKD_CALL(hidden_rows, layers[j], first, last);
      }
    });
  }

  std::tuple<Tensor, Tensor> forward(const Layers& gradient) {
    const auto M = int64_t(layers.size());
    Tensor row_losses = fresh({M, rows}, type), stats = fresh({M, rows, HIDDEN_STATS}, type);
    char* data = static_cast<char*>(row_losses.data_ptr());
    for (HiddenCall& k : layers) k.forward = true, k.rows = data, data += rows * size_of(type);
    keep(stats), write(gradient), run();
    return {row_losses, stats};
  }
};

Shared shared(const Layers& student, const Optional& weights, const Tensor& normalizer, const Tensor& layer_weights,
              int64_t distance, int64_t normalize) {
  STD_TORCH_CHECK(!student.empty(), "fusedkd: there must be a layer");
  return {
      weights ? contiguous_data<float>(*weights, ScalarType::Float, Rows(student[0]).count, "weights") : nullptr,
      *contiguous_data<double>(normalizer, ScalarType::Double, 1, "normalizer"),
      contiguous_data<double>(layer_weights, ScalarType::Double, student.size(), "layer_weights"),
      distance,
      normalize,
  };
}

std::tuple<Tensor, Tensor> hidden_forward(Layers student, Layers teacher, Optional weights, Tensor normalizer,
                                          Tensor layer_weights, Layers gradient, int64_t distance, int64_t normalize) {
  return Calls(student, teacher, shared(student, weights, normalizer, layer_weights, distance, normalize))
      .forward(gradient);
}

void hidden_backward(Tensor upstream, Layers student, Layers teacher, Optional weights, Tensor normalizer,
                     Tensor layer_weights, Tensor stats, Layers gradient, int64_t distance, int64_t normalize,
                     bool skip_if_one) {
  Calls calls(student, teacher, shared(student, weights, normalizer, layer_weights, distance, normalize));
  const PerRow up(upstream, calls.type, calls.rows);
  if (skip_if_one && up.scalar && up[0] == 1) return;
  for (HiddenCall& k : calls.layers) k.upstream = up;
  calls.keep(stats), calls.write(gradient), calls.run();
}

// Row weights, empty without a mask, and the normalizer: the first that is given, or else their sum or number.
std::tuple<Tensor, Tensor> row_weights(int64_t rows, const Optional& mask, double given) {
  Tensor weights = fresh({mask ? rows : 0}, ScalarType::Float), normalizer = fresh({}, ScalarType::Double);
  double n = given, found = 0;
  if (mask) {
    const ScalarType type = mask->scalar_type();
    const void* data = contiguous_data<char>(*mask, type, rows, "mask");
    float* w = static_cast<float*>(weights.data_ptr());
    for (int64_t i = 0; i < rows; i++) {
      w[i] = float(mask_value(data, type, i));
      found += is_floating(type) ? w[i] : w[i] != 0;
    }
  }
  if (n == COUNTED) n = found;
  *static_cast<double*>(normalizer.data_ptr()) = n <= 0 ? 1 : n;  // a NaN stays one
  return {weights, normalizer};
}

// The sum of row losses [M, N] over the normalizer; or per row, over the layers.
template <class A> Tensor sum(const Tensor& row_losses, double normalizer, bool per_row) {
  const int64_t layers = row_losses.size(0), rows = row_losses.size(1);
  const A* x = static_cast<const A*>(row_losses.data_ptr());
  const ScalarType type = row_losses.scalar_type();
  Tensor loss = per_row ? fresh({rows}, type) : fresh({}, type);
  A* to = static_cast<A*>(loss.data_ptr());
  if (per_row) {
    std::copy(x, x + rows, to);
    for (int64_t j = 1; j < layers; j++)
      for (int64_t i = 0; i < rows; i++) to[i] += x[j * rows + i];
  } else {
    *to = A(std::accumulate(x, x + layers * rows, 0.0) / normalizer);
  }
  return loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hidden_loss(Layers student, Layers teacher, Optional mask,
                                                       Tensor normalizers, Layers gradient, int64_t distance,
                                                       int64_t normalize, bool per_row) {
  STD_TORCH_CHECK(!student.empty(), "fusedkd: there must be a layer");
  const double* given = contiguous_data<double>(normalizers, ScalarType::Double, 1 + student.size(), "normalizers");
  const auto [weights, normalizer] = row_weights(Rows(student[0]).count, mask, given[0]);
  const float* w = mask ? static_cast<const float*>(weights.data_ptr()) : nullptr;
  const double n = *static_cast<const double*>(normalizer.data_ptr());
  const auto [row_losses, stats] = Calls(student, teacher, {w, n, given + 1, distance, normalize}).forward(gradient);
  const bool exact = row_losses.scalar_type() == ScalarType::Double;
  return {exact ? sum<double>(row_losses, n, per_row) : sum<float>(row_losses, n, per_row), weights, normalizer, stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedkd, CPU, m) {
  m.impl("hidden_forward", TORCH_BOX(&hidden_forward));
  m.impl("hidden_backward", TORCH_BOX(&hidden_backward));
  m.impl("hidden_loss", TORCH_BOX(&hidden_loss));
}

}  // namespace fusedkd
