// What the kernels are called with.
#pragma once
#ifdef FUSEDKD_VECTOR_BYTES
#error "to be included before isa.h, for it is compiled for any processor"
#endif

#include "../common/layout.h"
#include "tensor.h"

namespace fusedkd {

// Up to so many columns, rows lie in the lanes of vectors (kd_lanes.h).
constexpr int64_t LANE_COLUMNS = 256;

// The options [OPTIONS], or those of each row [N, OPTIONS].
inline const double* options_data(const Tensor& options, int64_t rows) {
  static constexpr double of_no_row[OPTIONS] = {};
  const int64_t count = options.dim() == 2 ? rows * OPTIONS : OPTIONS;
  const double* found = contiguous_data<double>(options, ScalarType::Double, count, "options");
  return count == 0 ? of_no_row : found;
}

// Of kd_loss, however the teacher is known.
struct LogitsCall {
  Rows student, teacher;  // [B, L, V], [B, L, C]
  const int64_t* labels;  // [N] or null
  const float* weights;   // [N]
  double temperature, teacher_temperature, kd_scale, kd_weight, ce_weight, smoothing, z_loss_weight;
  double softcap, scale, teacher_softcap, teacher_scale;
  const double* coefficients;  // a0, a1, … of the form
  double n_kd, n_ce;
  const double* options;      // [OPTIONS], or of each row [N, OPTIONS]: then those of `of_row` are that row's
  int64_t option_stride = 0;  // from row to row
  int64_t ignore_index;
  bool transform, ce;
  bool forward = false;                    // rows and stats are results, else stats are given
  void *rows = nullptr, *stats = nullptr;  // [2, N], if they are wanted, and [N, STATS] of the accumulation type
  int64_t vocabulary, offset = 0;          // columns of the student; of a shard: of all shards, and before this one
  std::optional<Stage> stage = {};         // of a shard; then there are no row losses, and stats have more columns
  std::optional<Rows> gradient = {};       // [B, L, V] like the student; may be the student itself
  std::optional<PerRow> upstream = {};     // 1 if none

  LogitsCall(const Tensor& z, const Tensor& v, const Optional& y, const Tensor& w, const Tensor& options,
             const Tensor& normalizers, int64_t ignore_index, bool transform, bool ce)
      : student(z), teacher(v), ignore_index(ignore_index), transform(transform), ce(ce), vocabulary(student.columns) {
    STD_TORCH_CHECK(student.count == teacher.count && student.inner == teacher.inner && (y || !ce),
                    "fusedkd: student and teacher rows do not match, or labels are missing");
    const double* o = this->options = options_data(options, student.count);
    const double* n = contiguous_data<double>(normalizers, ScalarType::Double, NORMALIZERS, "normalizers");
    option_stride = options.dim() == 2 ? OPTIONS : 0;
    labels = y ? contiguous_data<int64_t>(*y, ScalarType::Long, student.count, "labels") : nullptr;
    weights = contiguous_data<float>(w, ScalarType::Float, student.count, "weights");
    ce_weight = o[CE_WEIGHT], smoothing = o[LABEL_SMOOTHING], z_loss_weight = o[Z_LOSS_WEIGHT];
    softcap = o[SOFTCAP], scale = o[SCALE], teacher_softcap = o[TEACHER_SOFTCAP], teacher_scale = o[TEACHER_SCALE];
    set(o);
    n_kd = n[KD_NORMALIZER], n_ce = n[CE_NORMALIZER];
  }
  // Takes what a row may have of its own from the options of row i.
  void of_row(int64_t i) {
    if (option_stride) set(options + i * option_stride);
  }
  void set(const double* o) {
    temperature = o[TEMPERATURE], teacher_temperature = o[TEACHER_TEMPERATURE], kd_scale = o[KD_SCALE];
    kd_weight = o[KD_WEIGHT], coefficients = o + COEFFICIENTS;
  }
  // What row i adds to the KD term; nothing where it has no share in it, even if D is infinite.
  double scaled(int64_t i, double D) const { return kd_scale == 0 ? 0 : kd_scale * weights[i] * D; }
  void write_gradient(const Tensor& to) {
    gradient.emplace(to);
    STD_TORCH_CHECK(gradient->like(student), "fusedkd: the gradient must be like the student's logits");
    if (gradient->data != student.data) in_huge_pages(to);
  }
  bool at(Stage s) const { return stage == s; }
  int64_t stat_columns() const { return stage ? int64_t(STATS) + SHARD_STATS : STATS; }
  // Of a label, which counts over all shards: whether it is one, and its column, −1 if that is in another shard.
  bool legal(int64_t label) const { return label >= 0 && label < vocabulary; }
  int64_t column(int64_t label) const {
    return label < offset || label >= offset + student.columns ? -1 : label - offset;
  }
};

struct KdCall : LogitsCall {
  KernelId kernel_id;
  bool both = false;  // another follows it row by row, with the sides exchanged
};

// Of the statistics of rows; `stats` gets them, [5, N].
struct StatisticsCall : LogitsCall {
  int64_t columns = 0;  // that both sides have
  bool of_teacher = false;
};

struct TopkCall : LogitsCall {
  const int64_t* ids;  // [N, K], -1 for padding
  TopkKernelId kernel_id;
};

// What the caller has given of a TopkCall.
struct TopkList {
  Rows teacher;
  const int64_t* ids;
  int64_t columns;  // of the student
  bool sampled;     // weights, not log-probabilities
};
bool legal(const TopkList& list);  // whether it is as fusedkd/checks.py says

// Fills the row losses and statistics that k names, or reads the statistics, and writes the gradient if k has one.
void run(const KdCall& k);
void run_both(const KdCall& k, const KdCall& exchanged);  // of one accumulation type
void run_in_lanes(const KdCall& k);                       // of at most LANE_COLUMNS columns, not DKD, no shard, and
                                                          // options that all rows share
void run(const TopkCall& k);

// Of hidden_loss: a layer.
struct HiddenCall {
  Rows student;               // [B, L, H]
  std::vector<Rows> teacher;  // pieces [B, L, H_k], which count as their concatenation
  const float* weights;       // [N] or null: all 1
  double normalizer, layer_weight;
  HiddenDistance distance;
  HiddenNormalize normalize;
  bool forward = false;                    // rows and stats are results, else stats are given
  void *rows = nullptr, *stats = nullptr;  // [N] and [N, HIDDEN_STATS] of the accumulation type
  std::optional<Rows> gradient = {};       // [B, L, H] like the student
  std::optional<PerRow> upstream = {};     // 1 if none
};

// Of the losses over several layers.
struct LayersCall {
  std::vector<Rows> student, teacher;  // M and K layers [B, L, H]
  const float* weights;                // [N] or null: all 1
  double normalizer;
  ScalarType type;                                         // of the accumulation
  const double* buckets = nullptr;                         // [M, K], of layer_attention
  void* losses = nullptr;                                  // [N], of layer_attention
  std::vector<Rows> gradient = {}, teacher_gradient = {};  // of the layers of a side, or none
  std::optional<PerRow> upstream = {};                     // 1 if none
  const double* factors = nullptr;                         // [M, K]: the upstream of layer_distances
  double* sums = nullptr;                                  // [chunks, M, K]: of layer_distances, of so many rows each
  int64_t chunk = 0;

  int64_t rows() const { return student[0].count; }
  int64_t columns() const { return student[0].columns; }
  double weight(int64_t i) const { return weights ? weights[i] : 1; }
};

// Of attention_mse_loss: a tile of scores.
struct ScoresCall {
  float* z;               // [rows, columns] of the student; where wanted, the gradient goes over them
  const float* t;         // of the teacher
  const float* weights;   // [rows]
  const float* upstream;  // [rows] or null: all 1
  float* losses;          // [rows]
  int64_t columns, keys;  // keys: what the mean is over
  const double* coefficients;
  double scale, normalizer;
  bool gradient;
};

// Of gumbel_rows.
struct GumbelCall {
  Rows logits;  // [1, N, V], float32 or float64; where there are slopes, the gradient goes over them
  int64_t seed;
  double temperature;
  int64_t first_row;                // of these rows, which the noise is counted by
  int64_t* ids = nullptr;           // [N]
  void* stats = nullptr;            // [N, GUMBEL_STATS] of the logits' type
  std::optional<Rows> slopes = {};  // like the logits: of the loss in the relaxed rows; then ids and stats are given
  double scale = 1;                 // of the gradient
};

}  // namespace fusedkd
