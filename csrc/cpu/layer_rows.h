// The row mathematics of the losses over several layers on the CPU: one row of all M + K layers at a time, in the
// accumulation type A. The rows are read from memory once and stay in L1 and L2 for all M·K pairs.
//
// layer_attention, for each student layer s, over the teacher layers t_k of its bucket:
//   d_k = ⟨s, t_k⟩ in float64, for α = softmax(d) has no scale that would make small errors of a large d harmless
//   r = s − Σ α_k t_k,  loss |r|²/H
//   u_k = −2⟨r, t_k⟩/H,  e_k = α_k (u_k − Σ α u)
//   gradient 2r/H + Σ e_k t_k;  of t_k: Σ over the student layers of e_k s − 2 α_k r/H
//
// layer_distances: Σ (s_j − t_k)², in tiles of pairs whose differences are taken in registers; its gradient
// Σ_k F_jk·2(s_j − t_k)/H.
#ifndef FUSEDKD_LAYER_ROWS
#define FUSEDKD_LAYER_ROWS

#include "call.h"
#include "vec.h"

namespace FUSEDKD_NAMESPACE {

// WIDTH<double> columns in float64.
typedef float NarrowVec __attribute__((vector_size(FUSEDKD_VECTOR_BYTES / 2)));
INLINE D load_double(const float* p) {
  NarrowVec x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, D);
}
INLINE D load_double(const double* p) { return load(p); }

// Columns that start at c, a group of V vectors at a time, for use<V>(c): the last groups are of a step.
template <class A, int MANY = std::max(4, PER_STEP<A>), class Use>
INLINE void over_groups(int64_t columns, const Use& use) {
  int64_t c = 0;
  for (; c + MANY * WIDTH<A> <= columns; c += MANY * WIDTH<A>) use.template operator()<MANY>(c);
  for (; c < columns; c += STEP) use.template operator()<PER_STEP<A>>(c);
}

template <class A, class T> void convert_to(const A* from, int64_t n, char* to) { convert(from, n, (T*)to); }
// A row of a gradient, whose type need not go with A: the teacher may have one of its own.
template <class A> void write_row(const Rows& rows, int64_t i, const A* from) {
  const int64_t n = rows.columns;
  switch (rows.type) {
    case ScalarType::Double: return convert_to<A, double>(from, n, rows[i]);
    case ScalarType::Float: return convert_to<A, float>(from, n, rows[i]);
    case ScalarType::BFloat16: return convert_to<A, BFloat16>(from, n, rows[i]);
    default: return convert_to<A, Half>(from, n, rows[i]);
  }
}

// Memory of a thread that starts on 64 bytes.
template <class A> struct Buffer {
  std::vector<A> memory;
  A* data;
  explicit Buffer(int64_t n) : memory(n + 64 / sizeof(A)) { data = (A*)((uintptr_t(memory.data()) + 63) / 64 * 64); }
};

template <class A> struct LayerRows {
  const LayersCall& k;
  const int64_t M = k.student.size(), K = k.teacher.size(), H = k.columns(), W = whole_steps(H);
  Buffer<A> converted{(M + K) * W}, out{std::max(M, K) * W};
  std::vector<const A*> s, t;
  std::vector<A*> to;
  std::vector<const char*> next;  // the row after this one, of all layers
  const int64_t bytes[2] = {size_of(k.student[0].type), size_of(k.teacher[0].type)};
  std::vector<A> factors;  // [M, K], of whatever is summed
  explicit LayerRows(const LayersCall& call) : k(call), s(M), t(K), to(std::max(M, K)), next(M + K), factors(M * K) {}

  // Row i of all layers.
  void read_row(int64_t i) {
    const int64_t following = std::min(i + 1, k.rows() - 1);
    for (int64_t j = 0; j < M; j++) next[j] = k.student[j][following];
    for (int64_t l = 0; l < K; l++) next[M + l] = k.teacher[l][following];
    A* buffer = converted.data;
    for (int64_t j = 0; j < M; j++, buffer += W) s[j] = read<A>(k.student[j].type, k.student[j][i], 0, H, buffer, A(0));
    for (int64_t l = 0; l < K; l++, buffer += W) t[l] = read<A>(k.teacher[l].type, k.teacher[l][i], 0, H, buffer, A(0));
  }

  // V vectors of columns from c on of the next row of all layers: a processor foresees fewer streams than these.
  template <int V> INLINE void fetch(int64_t c) const {
    for (size_t l = 0; l < next.size(); l++)
      for (int64_t at = 0; at < V * WIDTH<A> * bytes[l >= size_t(M)]; at += 64)
        __builtin_prefetch(next[l] + c * bytes[l >= size_t(M)] + at, 0, 2);
  }

  void clear(const std::vector<Rows>& gradient, int64_t i) const {
    for (const Rows& rows : gradient) std::memset(rows[i], 0, rows.row_bytes());
  }

  // Row i of the gradients of a side: work() fills to[j] with that of layer j.
  template <class Work> void write_gradients(const std::vector<Rows>& gradient, int64_t i, const Work& work) {
    const int64_t layers = gradient.size();
    for (int64_t j = 0; j < layers; j++) {
      const bool there = size_of(gradient[j].type) == sizeof(A) && H == W;
      to[j] = there ? (A*)gradient[j][i] : out.data + j * W;
    }
    work();
    for (int64_t j = 0; j < layers; j++)
      if (to[j] == out.data + j * W) write_row(gradient[j], i, to[j]);
  }

  // sum += factor·x[c …].
  template <int V> static INLINE void add(Vec<A> (&sum)[V], A factor, const A* x) {
    const Vec<A> f = splat(factor);
    for (int v = 0; v < V; v++) sum[v] = fma(f, load(x + v * WIDTH<A>), sum[v]);
  }
};

// ------------------------------------------------------------------------------------------------- layer_attention
template <class A> struct AttentionRows : LayerRows<A> {
  using Base = LayerRows<A>;
  using Base::k, Base::M, Base::K, Base::H, Base::W, Base::s, Base::t, Base::factors;
  std::vector<std::vector<int64_t>> bucket;  // the teacher layers of each student layer
  std::vector<bool> twins;                   // whether the next student layer has the same ones
  std::vector<double> alpha, e;              // [M, K], 0 outside the buckets
  Buffer<A> residuals{M * W}, squares{M * STEP};
  std::vector<const A*> r;
  explicit AttentionRows(const LayersCall& call) : Base(call), bucket(M), twins(M), alpha(M * K), e(M * K), r(M) {
    for (int64_t j = 0; j < M; j++) {
      r[j] = residuals.data + j * W;
      for (int64_t l = 0; l < K; l++)
        if (k.buckets[j * K + l] != 0) bucket[j].push_back(l);
      if (j > 0) twins[j - 1] = bucket[j - 1] == bucket[j];
    }
  }

  void row(int64_t i) {
    const double w = k.weight(i);
    A& loss = static_cast<A*>(k.losses)[i];
    if (w == 0) {  // not read
      loss = 0, this->clear(k.gradient, i), this->clear(k.teacher_gradient, i);
      return;
    }
    this->read_row(i);
    attend();
    loss = A(w * residual() / double(H));
    if (k.gradient.empty() && k.teacher_gradient.empty()) return;
    slopes();
    const double f = w / k.normalizer * (k.upstream ? (*k.upstream)[i] : 1), of_r = 2 * f / double(H);
    for (int64_t p = 0; p < M * K; p++) factors[p] = A(f * e[p]);
    by_layer(k.gradient, i, [&]<int V>(int64_t j, int64_t c, Vec<A>(&g)[V]) {
      this->add(g, A(of_r), r[j] + c);
      for (const int64_t l : bucket[j]) this->add(g, factors[j * K + l], t[l] + c);
    });
    by_layer(k.teacher_gradient, i, [&]<int V>(int64_t l, int64_t c, Vec<A>(&g)[V]) {
      for (int64_t j = 0; j < M; j++) {
        if (k.buckets[j * K + l] == 0) continue;
        this->add(g, A(-of_r * alpha[j * K + l]), r[j] + c), this->add(g, factors[j * K + l], s[j] + c);
      }
    });
  }

  // Row i of the gradients of a side, of which value<V>(j, c, V vectors) makes columns from c on. All layers take their
  // turn at some columns: what these have in common is then in L1.
  template <class Value> void by_layer(const std::vector<Rows>& gradient, int64_t i, const Value& value) {
    this->write_gradients(gradient, i, [&] {
      over_groups<A>(W, [&]<int V>(int64_t c) {
        for (size_t j = 0; j < gradient.size(); j++) {
          Vec<A> sum[V] = {};
          value.template operator()<V>(j, c, sum);
          for (int v = 0; v < V; v++) store(this->to[j] + c + v * WIDTH<A>, sum[v]);
        }
      });
    });
  }

  // ⟨x_j, t_k⟩ in float64 for the k of each bucket: four of them at a time for all student layers in turn.
  void products(const std::vector<const A*>& x, std::vector<double>& to) const {
    for (size_t b = 0, most = 4; b < most; b += 4)
      for (int64_t j = 0; j < M; j++) {
        most = std::max(most, bucket[j].size());
        if (b >= bucket[j].size()) continue;
        if (twins[j]) tile<2>(x, j, b, to), j++;
        else tile<1>(x, j, b, to);
      }
  }
  template <int J> void tile(const std::vector<const A*>& x, int64_t j, size_t b, std::vector<double>& to) const {
    const std::vector<int64_t>& in = bucket[j];
    const int n = int(std::min<size_t>(4, in.size() - b));
    const A* y[4];
    for (int l = 0; l < 4; l++) y[l] = t[in[b + std::min(l, n - 1)]];
    D sums[J][4] = {};
    for (int64_t c = 0; c < W; c += WIDTH<double>) {
      D there[4];
      for (int l = 0; l < 4; l++) there[l] = load_double(y[l] + c);
      for (int a = 0; a < J; a++) {
        const D here = load_double(x[j + a] + c);
        for (int l = 0; l < 4; l++) sums[a][l] = fma(here, there[l], sums[a][l]);
      }
    }
    for (int a = 0; a < J; a++)
      for (int l = 0; l < n; l++) to[(j + a) * K + in[b + l]] = added(sums[a][l]);
  }

  void attend() {
    products(s, alpha);
    for (int64_t j = 0; j < M; j++) {
      double *a = &alpha[j * K], top = -INFINITE<double>, sum = 0;
      for (const int64_t l : bucket[j]) top = max(a[l], top);
      for (const int64_t l : bucket[j]) sum += a[l] = std::exp(a[l] - top);
      for (const int64_t l : bucket[j]) a[l] /= sum;
    }
  }

  // r = s − Σ α t, and Σ|r|² over the student layers.
  double residual() {
    std::fill(squares.data, squares.data + M * STEP, A(0));
    for (int64_t p = 0; p < M * K; p++) factors[p] = A(-alpha[p]);
    over_groups<A>(W, [&]<int V>(int64_t c) {
      for (int64_t j = 0; j < M; j++) {
        Vec<A> x[V];
        for (int v = 0; v < V; v++) x[v] = load(s[j] + c + v * WIDTH<A>);
        for (const int64_t l : bucket[j]) this->add(x, factors[j * K + l], t[l] + c);
        for (int v = 0; v < V; v++) {
          store(residuals.data + j * W + c + v * WIDTH<A>, x[v]);
          A* square = squares.data + j * STEP + v % PER_STEP<A> * WIDTH<A>;
          store(square, fma(x[v], x[v], load(square)));
        }
      }
    });
    double sum = 0;
    for (int64_t at = 0; at < M * STEP; at++) sum += squares.data[at];
    return sum;
  }

  // ∂loss/∂d.
  void slopes() {
    products(r, e);
    for (int64_t j = 0; j < M; j++) {
      double *u = &e[j * K], *a = &alpha[j * K], mean = 0;
      for (const int64_t l : bucket[j]) mean += a[l] * u[l];
      for (const int64_t l : bucket[j]) u[l] = -2 / double(H) * a[l] * (u[l] - mean);
    }
  }
};

// ------------------------------------------------------------------------------------------------- layer_distances
template <class A> struct DistanceRows : LayerRows<A> {
  using Base = LayerRows<A>;
  using Base::k, Base::M, Base::K, Base::H, Base::W, Base::s, Base::t, Base::factors;
  static constexpr int TILE = FUSEDKD_VECTOR_BYTES == 64 ? 4 : 2;  // student layers: as many sums as registers hold
  Buffer<double> sums{M * K * STEP};  // partial sums of each pair, over the rows of a chunk
  explicit DistanceRows(const LayersCall& call) : Base(call) {}

  void chunk(int64_t c) {
    std::fill(sums.data, sums.data + M * K * STEP, 0);
    for (int64_t i = c * k.chunk; i < std::min(k.rows(), (c + 1) * k.chunk); i++) {
      const double w = k.weight(i);
      if (w == 0) continue;  // not read
      this->read_row(i);
      for (int64_t j = 0; j < M;)
        j += M - j >= TILE ? students<TILE>(j, w) : M - j >= 2 ? students<2>(j, w) : students<1>(j, w);
    }
    for (int64_t p = 0; p < M * K; p++)
      k.sums[c * M * K + p] = combined(sums.data + p * STEP, [](double x, double y) { return x + y; });
  }

  template <int J> int64_t students(int64_t j, double w) {
    int64_t l = 0;
    for (; l + 4 <= K; l += 4) tile<J, 4>(j, l, w);
    for (; l < K; l++) tile<J, 1>(j, l, w);
    return J;
  }

  template <int J, int L> void tile(int64_t j, int64_t l, double w) {
    for (int u = 0; u < PER_STEP<A>; u++) {
      Vec<A> sum[J][L] = {};
      for (int64_t c = u * WIDTH<A>; c < W; c += STEP) {
        Vec<A> y[L];
        for (int b = 0; b < L; b++) y[b] = load(t[l + b] + c);
        for (int a = 0; a < J; a++) {
          const Vec<A> x = load(s[j + a] + c);
          for (int b = 0; b < L; b++) sum[a][b] = fma(x - y[b], x - y[b], sum[a][b]);
        }
      }
      for (int a = 0; a < J; a++)
        for (int b = 0; b < L; b++) {
          double* to = sums.data + ((j + a) * K + l + b) * STEP + u * WIDTH<A>;
          for (int lane = 0; lane < WIDTH<A>; lane++) to[lane] += w * double(sum[a][b][lane]);
        }
    }
  }

  void gradient(int64_t i) {
    const double scale = k.weight(i) / k.normalizer * 2 / double(H);
    if (k.weight(i) == 0) return this->clear(k.gradient, i);
    this->read_row(i);
    for (int64_t p = 0; p < M * K; p++) factors[p] = A(scale * k.factors[p]);
    this->write_gradients(k.gradient, i, [&] {
      over_groups<A, std::max(2, PER_STEP<A>)>(W, [&]<int V>(int64_t c) FLAT {
        constexpr int J = V > 2 ? 1 : TILE;
        int64_t j = 0;
        for (; j + J <= M; j += J) gradient_tile<J, V>(j, c);
        for (; j < M; j++) gradient_tile<1, V>(j, c);
        this->template fetch<V>(c);
      });
    });
  }

  // Of J student layers, V vectors from column c on: a teacher's are read once for all of them.
  template <int J, int V> INLINE void gradient_tile(int64_t j, int64_t c) {
    const A* f = &factors[j * K];
    Vec<A> x[J][V], g[J][V] = {};
    for (int a = 0; a < J; a++)
      for (int v = 0; v < V; v++) x[a][v] = load(s[j + a] + c + v * WIDTH<A>);
    for (int64_t l = 0; l < K; l++)
      for (int v = 0; v < V; v++) {
        const Vec<A> y = load(t[l] + c + v * WIDTH<A>);
        for (int a = 0; a < J; a++) g[a][v] = fma(splat(f[a * K + l]), x[a][v] - y, g[a][v]);
      }
    for (int a = 0; a < J; a++)
      for (int v = 0; v < V; v++) store(this->to[j + a] + c + v * WIDTH<A>, g[a][v]);
  }
};

// --------------------------------------------------------------------------------------------------- what is called
inline void layer_attention_rows(const LayersCall& k, int64_t begin, int64_t end) {
  const auto rows = [&](auto kernel) {
    for (int64_t i = begin; i < end; i++) kernel.row(i);
  };
  k.type == ScalarType::Double ? rows(AttentionRows<double>(k)) : rows(AttentionRows<float>(k));
}

inline void layer_distance_chunks(const LayersCall& k, int64_t begin, int64_t end) {
  const auto chunks = [&](auto kernel) {
    for (int64_t c = begin; c < end; c++) kernel.chunk(c);
  };
  k.type == ScalarType::Double ? chunks(DistanceRows<double>(k)) : chunks(DistanceRows<float>(k));
}

inline void layer_distance_gradients(const LayersCall& k, int64_t begin, int64_t end) {
  const auto rows = [&](auto kernel) {
    for (int64_t i = begin; i < end; i++) kernel.gradient(i);
  };
  k.type == ScalarType::Double ? rows(DistanceRows<double>(k)) : rows(DistanceRows<float>(k));
}

}  // namespace FUSEDKD_NAMESPACE
#endif
