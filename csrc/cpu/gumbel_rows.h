// Straight-through Gumbel-softmax of rows of logits, in the accumulation type A: x = z + noise,
//
//   choice    the column of the highest x; statistics m = max x and l = Σ exp((x − m)/T)
//   gradient  scale·y·((r − r_c) − Σ y·(r − r_c)) over the logits, y = exp((x − m)/T)/l, c the choice: of a sure row,
//             where Σ y·r is nearly r_c, nothing is lost that way
//
// Gradient: pass 1 leaves y where the logits were, and pass 2 finds it in the cache. Compiled once per instruction set
// (isa.h).
#ifndef FUSEDKD_GUMBEL_ROWS
#define FUSEDKD_GUMBEL_ROWS

#include "call.h"
#include "gumbel_noise.h"
#include "softmax.h"

namespace FUSEDKD_NAMESPACE {

template <class A> struct GumbelRows {
  const GumbelCall& k;
  const Noise noise;
  const int64_t V;
  alignas(64) A z_buffer[BLOCK], r_buffer[BLOCK];
  alignas(64) float drawn[BLOCK];
  explicit GumbelRows(const GumbelCall& call) : k(call), noise(call.seed), V(call.logits.columns) {}

  int64_t length(int64_t j) const { return std::min(BLOCK, V - j); }

  // Columns from j on with their noise, filled up with −∞ to whole steps; use(at, vector, u) gets each vector, and
  // returns what is to lie there.
  template <class Use> INLINE void noisy(int64_t i, int64_t j, const Use& use) {
    const int64_t n = length(j);
    noise.fill(k.first_row + i, j, n, drawn);
    const A* z = read(k.logits.type, k.logits[i], j, n, z_buffer, -INFINITE<A>);
    alignas(64) A more[STEP];
    for (int64_t at = 0; at < n; at += STEP) {
      convert_noise(drawn + at, more);
      for (int u = 0; u < PER_STEP<A>; u++) {
        const int64_t to = at + u * WIDTH<A>;
        store<A>(z_buffer + to, use(j + to, load(z + to) + load(more + u * WIDTH<A>), u));
      }
    }
  }
  static INLINE void convert_noise(const float* from, A* to) {
    for (int u = 0; u < STEP; u++) to[u] = from[u];
  }

  void choose(int64_t i) {
    Softmax<A> softmax;
    softmax.c = LOG2E / k.temperature;
    Vec<A> best[PER_STEP<A>];
    Int<A> place[PER_STEP<A>] = {}, lane = {};
    for (int u = 0; u < WIDTH<A>; u++) lane[u] = u;
    for (auto& of : best) of = splat(-INFINITE<A>);
    for (int64_t j = 0; j < V; j += BLOCK) {
      noisy(i, j, [&](int64_t at, Vec<A> x, int u) {
        const Int<A> here = lane + typename Types<A>::Lane(at), higher = x > best[u];
        best[u] = higher ? x : best[u], place[u] = higher ? here : place[u];
        return x;
      });
      softmax.add(z_buffer, whole_steps(length(j)));
    }
    softmax.settle();
    A* stats = static_cast<A*>(k.stats) + GUMBEL_STATS * i;
    stats[NOISY_MAX] = softmax.m, stats[NOISY_SUM] = A(softmax.l);
    const A* z = reinterpret_cast<const A*>(k.logits[i]);
    const A* nan = std::isnan(softmax.l) ? std::find_if(z, z + V, [](A x) { return std::isnan(x); }) : z + V;
    k.ids[i] = nan < z + V ? nan - z : first_of(best, place);
  }

  // The column of the highest, of several the first.
  static int64_t first_of(const Vec<A> (&best)[PER_STEP<A>], const Int<A> (&place)[PER_STEP<A>]) {
    A top = best[0][0];
    int64_t at = place[0][0];
    for (int u = 0; u < STEP; u++) {
      const A x = best[u / WIDTH<A>][u % WIDTH<A>];
      const int64_t here = place[u / WIDTH<A>][u % WIDTH<A>];
      if (x > top || (x == top && here < at)) top = x, at = here;
    }
    return at;
  }

  void gradient(int64_t i) {
    const A* stats = static_cast<const A*>(k.stats) + GUMBEL_STATS * i;
    const A m = stats[NOISY_MAX], share = 1 / stats[NOISY_SUM], c = A(LOG2E / k.temperature);
    char *out = k.logits[i], *slopes = (*k.slopes)[i];
    STD_TORCH_CHECK(k.ids[i] >= 0 && k.ids[i] < V, "fusedkd: an id is out of range");
    const A chosen = reinterpret_cast<const A*>(slopes)[k.ids[i]];
    double mean = 0;
    for (int64_t j = 0; j < V; j += BLOCK) {
      const A* r = read(k.logits.type, slopes, j, length(j), r_buffer, chosen);
      Vec<A> sum[PER_STEP<A>] = {};
      noisy(i, j, [&](int64_t at, Vec<A> x, int u) {
        const Vec<A> y = exp2<A>((x - m) * c) * share;
        sum[u] = fma(y, load(r + at - j) - chosen, sum[u]);
        return y;
      });
      mean += total<A>(sum);
      write(k.logits.type, out, j, length(j), z_buffer);
    }
    const A less = A(mean), scale = A(k.scale);
    for (int64_t j = 0; j < V; j += BLOCK) {
      const int64_t n = length(j);
      const A* r = read(k.logits.type, slopes, j, n, r_buffer, chosen);
      const A* y = read(k.logits.type, out, j, n, z_buffer, A(0));
      A* to = place(k.logits.type, out, j, n, z_buffer);
      for (int64_t at = 0; at < n; at += WIDTH<A>)
        store<A>(to + at, load(y + at) * ((load(r + at) - chosen) - less) * scale);
      write(k.logits.type, out, j, n, to);
    }
  }
};

template <class A> void gumbel_rows_in(const GumbelCall& k, int64_t begin, int64_t end) {
  GumbelRows<A> rows(k);
  for (int64_t i = begin; i < end; i++) k.slopes ? rows.gradient(i) : rows.choose(i);
}

inline void gumbel_rows(const GumbelCall& k, int64_t begin, int64_t end) {
  k.logits.type == ScalarType::Double ? gumbel_rows_in<double>(k, begin, end) : gumbel_rows_in<float>(k, begin, end);
}

}  // namespace FUSEDKD_NAMESPACE
#endif
