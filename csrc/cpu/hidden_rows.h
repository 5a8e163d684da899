// The row mathematics of hidden_loss on the CPU, one row at a time, in the accumulation type A.
//
//   x̂ = a·(x − μ), ŷ = b·(y − ν)   a = b = 1, μ = ν = 0 unless rows are normalised; the cosine normalises them itself
//     L2          a = (Σx² + ε)^−½, ε = 1e−12: the rule of torch.nn.functional.cosine_embedding_loss
//     layer norm  μ the mean, a = (Σ(x − μ)²/H + 1e−5)^−½; for its cosine, a = (Σ(x − μ)² + ε·(Σ(x − μ)²/H + 1e−5))^−½
//   d = x̂ − ŷ by FMA, which loses nothing when the two are close
//   MSE         Σd²/H,       g = d,         gradient 2/H·a·(g − pull·x̂),           pull = x̂·d or its mean
//   smooth L1   Σhuber(d)/H, g = d in ±1,   gradient 1/H·a·(g − mean g − pull·x̂),  pull = x̂·g or its mean
//   cosine      ½Σd² + ½ε(a² + b²), g = d,  gradient a·(g − pull·x̂),               pull = 1 − cos
//
// One pass takes the sums of squares and of products, from which Σd² follows where it is no small difference of them;
// else a second pass over the row takes it. A row whose sums overflow is summed again in float64, scaled down.
//
// A row pair is read from memory once, 4 + 4 bytes per element in float32, and later passes find it in cache; the
// gradient is 4 bytes more. Compiled once per instruction set (isa.h).
#ifndef FUSEDKD_HIDDEN_ROWS
#define FUSEDKD_HIDDEN_ROWS

#include "hidden_columns.h"

namespace FUSEDKD_NAMESPACE {

template <class A, class S, HiddenDistance D, HiddenNormalize N> struct HiddenRows : HiddenColumns<A, S> {
  static constexpr bool mse = D == HiddenDistance::MSE, cosine = D == HiddenDistance::COSINE;
  static constexpr bool centred = N == HiddenNormalize::LAYER_NORM, scaled = cosine || N != HiddenNormalize::NONE;
  static constexpr double NORM_EPSILON = 1e-12, VARIANCE_EPSILON = 1e-5;
  static constexpr double FAR = std::is_same_v<A, double> ? 0x1p-700 : 1;  // float64 has the squares of any float

  // Of one side: what its rows are normalised by.
  struct Scale {
    A scale = 1, mean = 0, rest = 0;  // rest: what rounding took from the mean
    INLINE Vec<A> of(Vec<A> x) const { return centred ? (x - splat(mean)) - splat(rest) : x; }
    INLINE Vec<A> lost(Vec<A> x) const {  // to rounding, by x − mean (Knuth's two-sum), and the rest
      const Vec<A> m = splat(mean), found = x - m, back = found - x;
      return ((x - (found - back)) - (m + back)) - splat(rest);
    }
  };

  using Columns = HiddenColumns<A, S>;
  using Columns::find, Columns::H, Columns::k, Columns::place_of_gradient, Columns::x, Columns::y;
  const double share;  // 1/H where means are over columns
  Scale a, b;
  A shift = 0, pull = 0;

  explicit HiddenRows(const HiddenCall& call) : Columns(call), share(1.0 / double(H)) {}

  void row(int64_t i) {
    const double weight = k.weights ? k.weights[i] : 1, share_of_loss = weight * k.layer_weight;
    char* out = k.gradient ? (*k.gradient)[i] : nullptr;
    A* stats = static_cast<A*>(k.stats) + HIDDEN_STATS * i;
    if (weight == 0) {  // not read
      if (k.forward) static_cast<A*>(k.rows)[i] = 0, std::fill(stats, stats + HIDDEN_STATS, A(0));
      if (out) std::memset(out, 0, k.gradient->row_bytes());
      return;
    }
    find(i);
    const double factor = share_of_loss / k.normalizer * (k.upstream ? (*k.upstream)[i] : 1);
    S* g = out ? place_of_gradient(out) : nullptr;
    const bool over_row = g == x;  // written once the value is known: far_value() reads the row again
    if (k.forward) {
      a = b = Scale{}, shift = pull = 0;
      const double distance = scaled ? normalised() : g && !over_row ? plain<true>(g, factor) : plain<false>(g, factor);
      static_cast<A*>(k.rows)[i] = A(share_of_loss * distance);
      const A found[] = {a.scale, a.mean, a.rest, b.scale, b.mean, b.rest, shift, pull};
      std::copy(found, found + HIDDEN_STATS, stats);
    } else {
      a = {stats[STUDENT_FACTOR], stats[STUDENT_MEAN], stats[STUDENT_REST]};
      b = {stats[TEACHER_FACTOR], stats[TEACHER_MEAN], stats[TEACHER_REST]};
      shift = stats[SHIFT], pull = stats[PULL];
    }
    if (!g) return;
    if (scaled || !k.forward || over_row) gradient(g, factor);
    if ((void*)g != (void*)out) write(k.student.type, out, 0, H, (const A*)g);
  }

  // a·x − b·y without the rounding of the products, which would be all that is left of it near convergence.
  INLINE Vec<A> apart(Vec<A> from, Vec<A> to) const {
    if constexpr (!scaled) return from - to;
    const Vec<A> by = splat(b.scale) * to;
    return fma(splat(a.scale), from, -by) - fma(splat(b.scale), to, -by);
  }
  // x̂ − ŷ likewise, without the rounding of x − μ: for the value. (The gradient is allowed that.)
  INLINE Vec<A> difference(Vec<A> x, Vec<A> y) const {
    if constexpr (!centred) return apart(x, y);
    const Vec<A> lost = fma(splat(a.scale), a.lost(x), -(splat(b.scale) * b.lost(y)));
    return apart(x - splat(a.mean), y - splat(b.mean)) + lost;
  }
  // g of d, and what the distance adds up, but for a factor of 1/H or ½.
  static INLINE Vec<A> slope(Vec<A> d) {
    if constexpr (D != HiddenDistance::SMOOTH_L1) return d;
    return max(splat(A(-1)), min(splat(A(1)), d));
  }
  static INLINE Vec<A> value(Vec<A> d, Vec<A> g, Vec<A> sum) {
    if constexpr (D != HiddenDistance::SMOOTH_L1) return fma(d, d, sum);
    return fma(g, d - A(0.5) * g, sum);  // d²/2, or |d| − ½
  }

  // ----------------------------------------------------------------------------------------------------- distances

  // Of rows as they are: value and gradient in one pass.
  template <bool WRITES> double plain(S* g, double factor) {
    double sum[1];
    const Vec<A> c = splat(A(factor * share * (mse ? 2 : 1)));
    this->template over_columns<1, WRITES>(
        sum,
        [&](Vec<A> x, Vec<A> y, const auto&, const auto& sum) FLAT {
          const Vec<A> d = x - y, s = slope(d);
          sum(0) = value(d, s, sum(0));
          return s * c;
        },
        g);
    return (std::isfinite(sum[0]) ? sum[0] : far_value()) * share;
  }

  // The sum of a row in which it overflows, or that is not finite.
  double far_value() const {
    double sum = 0;
    for (int64_t j = 0; j < H; j++) {
      const double d = std::abs(double(A(x[j])) - double(A(y[j])));
      sum += mse ? (FAR * d) * (FAR * d) : d < 1 ? 0.5 * d * d : d - 0.5;
    }
    return mse ? sum / FAR / FAR : sum;
  }

  double normalised() {
    double squares = scales();  // Σd², or NaN
    if (!mse && !cosine) return smooth_l1();
    if (!(squares > 0)) {
      double sum[1];
      this->over_columns(sum, [&](Vec<A> x, Vec<A> y, const auto& keep, const auto& sum) FLAT {
        const Vec<A> d = keep(difference(x, y));
        sum(0) = fma(d, d, sum(0));
      });
      squares = sum[0];
    }
    const double aa = double(a.scale) * a.scale, bb = double(b.scale) * b.scale;
    if (cosine) {
      const double distance = 0.5 * squares + 0.5 * (added_x * aa + added_y * bb);
      pull = A(centred ? distance + NORM_EPSILON * share * (distance - 1) : distance);
      return distance;
    }
    const double epsilon = centred ? VARIANCE_EPSILON : NORM_EPSILON, mean = squares * share;
    pull = A(0.5 * (centred ? mean : squares) + 0.5 * epsilon * (bb - aa));
    return mean;
  }

  double smooth_l1() {
    double sum[3];
    this->over_columns(sum, [&](Vec<A> x, Vec<A> y, const auto& keep, const auto& sum) FLAT {
      const Vec<A> d = keep(difference(x, y)), g = slope(d);
      sum(0) = value(d, g, sum(0));
      sum(1) = fma(g, splat(a.scale) * a.of(x), sum(1));
      if (centred) sum(2) += g;
    });
    pull = A(centred ? sum[1] * share : sum[1]), shift = A(sum[2] * share);
    return sum[0] * share;
  }

  void gradient(S* g, double factor) {
    double none[1];
    const double times = cosine ? 1 : share * (mse ? 2 : 1);
    const Vec<A> c = splat(A(a.scale * (factor * times))), down = splat(pull), mean = splat(shift);
    this->template over_columns<1, true>(
        none,
        [&](Vec<A> x, Vec<A> y, const auto&, const auto&) FLAT -> Vec<A> {
          const Vec<A> from = a.of(x), s = slope(apart(from, b.of(y)));
          if constexpr (!scaled) return s * c;
          return ((D == HiddenDistance::SMOOTH_L1 && centred ? s - mean : s) - from * splat(a.scale) * down) * c;
        },
        g);
  }

  // -------------------------------------------------------------------------------------------------------- scales

  double added_x = 0, added_y = 0;  // to the squares that the cosine divides by

  // Sums over the columns of x − p and y − q: their squares, their products and, for means, themselves.
  struct Sums {
    double xx, yy, xy, x, y;
  };
  Sums sums(A p, A q) {
    double s[centred ? 5 : 3];
    this->over_columns(s, [&](Vec<A> x, Vec<A> y, const auto& keep, const auto& sum) FLAT {
      if constexpr (centred) x = keep(x - splat(p)), y = keep(y - splat(q));
      sum(0) = fma(x, x, sum(0)), sum(1) = fma(y, y, sum(1)), sum(2) = fma(x, y, sum(2));
      if constexpr (centred) sum(3) += x, sum(4) += y;
    });
    if constexpr (centred) return {s[0], s[1], s[2], s[3], s[4]};
    else return {s[0], s[1], s[2], 0, 0};
  }

  // Finds both scales. Σd², if it follows from the sums with enough digits, else NaN.
  double scales() {
    // Squares of the distance to the first column; where that is far from the mean, or digits are needed, to the mean.
    A p = centred ? A(x[0]) : 0, q = centred ? A(y[0]) : 0;
    for (bool again = !centred;; again = true) {
      Sums s = sums(p, q);
      const double off_x = s.x * share, off_y = s.y * share;
      double lost = 0;
      if (centred) {
        lost = std::max(s.x * off_x / s.xx, s.y * off_y / s.yy);
        mean_is(a, p, off_x), mean_is(b, q, off_y);
        s.xx -= s.x * off_x, s.yy -= s.y * off_y, s.xy -= s.x * off_y;
      }
      const bool far_x = !std::isfinite(s.xx), far_y = !std::isfinite(s.yy);
      if (far_x) s.xx = far_squares(x, a);
      if (far_y) s.yy = far_squares(y, b);
      a.scale = scale_of(s.xx, far_x ? FAR : 1, added_x), b.scale = scale_of(s.yy, far_y ? FAR : 1, added_y);
      if (far_x || far_y) return NAN;
      const double aa = double(a.scale) * a.scale * s.xx, bb = double(b.scale) * b.scale * s.yy;
      const double squares = aa + bb - 2 * (double(a.scale) * b.scale * s.xy);
      const bool enough = squares > 0.1 * (aa + bb);
      if (again || !(lost > (enough ? 0.9 : 1e-3))) return enough ? squares : NAN;
      p = a.mean, q = b.mean;
    }
  }

  static void mean_is(Scale& side, A near, double off) {
    const double mean = double(near) + off;
    side.mean = A(mean), side.rest = A(double(near) - side.mean + off);
  }

  // From the sum of squares of the row times `unit`; and what of the squares of the row is `added` to them.
  A scale_of(double squares, double unit, double& added) const {
    const double variance = squares * share + VARIANCE_EPSILON * unit * unit;
    if (centred && !cosine) return A(unit / std::sqrt(variance));
    added = NORM_EPSILON * (centred ? variance : unit * unit);
    const double scale = unit / std::sqrt(squares + added);
    if (unit != 1) added = 0;  // beside such squares
    return A(scale);
  }

  // The sum of squares of a row times FAR, about its mean, which it finds, where rows are centred.
  double far_squares(const S* row, Scale& side) const {
    double mean = 0, sum = 0;
    if (centred) {
      for (int64_t j = 0; j < H; j++) mean += FAR * double(A(row[j])) * share;
      mean_is(side, A(mean / FAR), 0), side.rest = A(mean / FAR - side.mean);
    }
    for (int64_t j = 0; j < H; j++) {
      const double off = FAR * double(A(row[j])) - mean;
      sum += off * off;
    }
    return sum;
  }
};

template <class A, class S, HiddenDistance D, HiddenNormalize N>
void hidden_rows(const HiddenCall& k, int64_t begin, int64_t end) {
  HiddenRows<A, S, D, N> rows(k);
  for (int64_t i = begin; i < end; i++) rows.row(i);
}

template <HiddenDistance D, HiddenNormalize N> void hidden_rows(const HiddenCall& k, int64_t begin, int64_t end) {
  const ScalarType type = k.student.type;
  const bool alike = k.teacher.size() == 1 && k.teacher[0].type == type;
  if (type == ScalarType::Double) hidden_rows<double, double, D, N>(k, begin, end);
  else if (type == ScalarType::BFloat16 && alike) hidden_rows<float, BFloat16, D, N>(k, begin, end);
  else hidden_rows<float, float, D, N>(k, begin, end);
}

template <HiddenDistance D> void hidden_rows(const HiddenCall& k, int64_t begin, int64_t end) {
  constexpr auto NONE = HiddenNormalize::NONE, L2 = HiddenNormalize::L2, LAYER_NORM = HiddenNormalize::LAYER_NORM;
  if (k.normalize == LAYER_NORM) hidden_rows<D, LAYER_NORM>(k, begin, end);
  else if (D == HiddenDistance::COSINE || k.normalize == L2) hidden_rows<D, L2>(k, begin, end);
  else if constexpr (D != HiddenDistance::COSINE) hidden_rows<D, NONE>(k, begin, end);
}

inline void hidden_rows(const HiddenCall& k, int64_t begin, int64_t end) {
  switch (k.distance) {
    case HiddenDistance::MSE: return hidden_rows<HiddenDistance::MSE>(k, begin, end);
    case HiddenDistance::COSINE: return hidden_rows<HiddenDistance::COSINE>(k, begin, end);
    case HiddenDistance::SMOOTH_L1: return hidden_rows<HiddenDistance::SMOOTH_L1>(k, begin, end);
  }
}

}  // namespace FUSEDKD_NAMESPACE
#endif
