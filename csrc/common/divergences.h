// The divergences between a teacher's and a student's row: the one place of csrc/ that knows their formulas, shared by
// the CPU kernels (vectors of columns) and the CUDA kernels (one column at a time).
//
//   s = z/T_s, t = v/T_t, q = softmax(s) student, p = softmax(t) teacher, δ = log p − log q          C common columns
//   D = Σ value,  ∂D/∂s = w − q·W,  w = grad_term, W = Σ w            value and w are functions of one column
//
//   excess(p, m, x), x = log(p/m):  p·φ(x), φ(x) = e^−x − 1 + x >= 0, so that nothing cancels near convergence;
//   Σ excess = KL(p‖m), since p and m both sum to 1; a column with p = 0 gives m
//
//   form             value                                               w
//   FORWARD_KL       excess(p, q, δ)                                     q − p, W = 0
//   JEFFREYS         a0·excess(p, q, δ) + a1·excess(q, p, −δ)            a0·(q − p) − a1·q·δ
//   MIXTURE          a0·excess(p, m, log p/m) + a1·excess(q, m, log q/m) a1·q·log(q/m) − a3·(q/m)·(p − q)
//                    m = a2·p + (1 − a2)·q; a3 = a0(1 − a2)² − a1·a2(1 − a2), or without its second part (m detached)
//   ALPHA_BETA       −(p^α q^β − (α/s)p^s − (β/s)q^s)/(αβ), s = α + β    (q^s − p^α q^β)/α           a0 = α, a1 = β
//   TOTAL_VARIATION  ½|p − q|                                            ½·q·sign(−δ)
//   LOGIT_MSE        (z − a0·v)²/C                                       2(z − a0·v)/C, which is ∂D/∂z itself
//   DKD              a0·KL(b_T‖b_S) + a1·KL(p̂‖q̂), a hat: without column y and renormalised; b = (p_y, 1 − p_y)
//   SUM              JEFFREYS of a0, a1 + a6·TOTAL_VARIATION
//   MIXED_SUM        the same + MIXTURE of a2 … a5
//
// A column that both sides mask with −∞ contributes 0. Where D is infinite, W is too, and the gradient of the row is 0,
// but for FORWARD_KL and DKD, whose gradient stays finite and right.
//
// Sources: Hinton et al. 2015 (arXiv:1503.02531); JSD: GKD (2306.13649); skew KL, MIXTURE with one coefficient 0:
// DistiLLM (2402.03898) and, detached, DistiLLM-2 (2503.07067); αβ: ABKD (2505.04560); TV: Wen et al. (2307.15190);
// DKD: 2203.08679; excess: Schulman 2020, "Approximating KL divergence" (the estimator k3).
//
// The arithmetic is that of cpu/vec.h or cuda/scalar.cuh. Both have, for X a vector of columns or a scalar:
//   INLINE              what makes a function inline (and __device__)
//   Scalar<X>           the type of its elements;  INFINITE<Scalar<X>>
//   max(x, y), absolute(x), phi(x) = φ(x)/x² for |x| < 1: also of the scalars R that describe rows;  fma(x, y, z)
//   Exp<X>(x)           for x <= 0: .value = e^x, .minus_one = e^x − 1 without cancellation
//   exp2_any(x, grows)  2^x for any x: 0 below the range, +∞ above it; `grows` if x may be above 0
//   log1p(x, u)         log u of u = 1 + x, normal and positive; x has the digits that u lacks near 1
//   power(x, y)         x^y for x >= 1, of the R that describe rows
// Conditions are X < X, for vectors a mask: write `c ? a : b`, which computes both sides.
#ifndef FUSEDKD_DIVERGENCES
#define FUSEDKD_DIVERGENCES

#include "layout.h"
#ifdef FUSEDKD_VECTOR_BYTES  // once per instruction set of a CPU: cpu/isa.h
#include "../cpu/vec.h"
#else
#include "../cuda/scalar.cuh"
#endif

namespace FUSEDKD_NAMESPACE {

// What a form can use of one column. δ is NaN or infinite where a logit is −∞.
template <class X> struct Column {
  X z, v;  // logits
  X p, q, delta;
  X log2_e_p, log2_e_q;            // log2 of p·l_t and of q·l_s, both <= 0
  decltype(X{} < X{}) no_p, no_q;  // v = −∞, z = −∞
};

// And of its row. R: double or float, or a vector of one element per row. The log odds are those of the label y against all other columns, for forms that
// exclude the label's column; l then is without it.
template <class R> struct RowSums {
  R l_s, l_t;        // Σ exp(s − max), Σ exp(t − max)
  double columns;    // C
  R odds_s, odds_t;  // log q_y/(1 − q_y), log p_y/(1 − p_y)
};

// A form is constructed once per row from a0, a1, … and the row's sums; or once per vector of rows, each of which has
// one lane of the X: what depends on the row is a P, A itself or such a vector. The flags and what they default to:
struct Defaults {
  static constexpr bool softmax = true;           // has p and q; without them, w is the gradient with respect to z
  static constexpr bool needs_weight_sum = true;  // W takes a pass of its own, and the gradient is 0 where D = ∞
  static constexpr bool centred = true;           // w − q·W, else w
  static constexpr bool has_logs = false;         // value and grad_term may be given `logs` of the column
  template <class X> struct Logs {};
  static constexpr bool excludes_label = false;  // p and q are without the label's column, which `label_value` and
                                                 // `centre` (both W and the grad_term of that column) account for
};

template <class A> INLINE A infinite_if(bool condition) { return condition ? INFINITE<A> : A(0); }

template <class X> INLINE X excess(X p, X m, X x) {
  return absolute(x) < Scalar<X>(1) ? p * (x * x) * phi(x) : (m - p) + p * x;
}

template <class A, class P = A> struct ForwardKL : Defaults {
  static constexpr bool needs_weight_sum = false, centred = false;
  template <class R> INLINE ForwardKL(const double*, const RowSums<R>&) {}
  template <class X> INLINE X value(const Column<X>& c) const {
    const X term = excess(c.p, c.q, c.delta);
    return c.no_p ? c.q : (c.no_q ? X{} + INFINITE<A> : term);
  }
  template <class X> INLINE X grad_term(const Column<X>& c) const { return c.q - c.p; }
};

template <class A, class P = A> struct Jeffreys : Defaults {
  A a0, a1, alone_p, alone_q;  // alone_q: what a column adds that only the student has
  template <class R> INLINE Jeffreys(const double* a, const RowSums<R>&)
      : a0(a[0]), a1(a[1]), alone_p(infinite_if<A>(a[0] != 0)), alone_q(infinite_if<A>(a[1] != 0)) {}
  template <class X> INLINE X value(const Column<X>& c) const {
    const X term = a0 * excess(c.p, c.q, c.delta) + a1 * excess(c.q, c.p, -c.delta);
    return c.no_p ? (c.no_q ? X{} : a0 * c.q + alone_q) : (c.no_q ? a1 * c.p + alone_p : term);
  }
  template <class X> INLINE X grad_term(const Column<X>& c) const {
    const X log_part = c.no_p ? X{} : (c.no_q ? X{} : a1 * c.q * c.delta);
    return a0 * (c.q - c.p) - log_part;
  }
};

// With d = |δ|, μ = a2, γ the share in m of the smaller of p and q, and r = (1 − γ) + γ·e^−d: u = log r is log m over
// the larger of them, and w = log r/e^−d is log m over the smaller, w − u = d. The nearer to 0 of the two is taken as a
// log1p, the other follows. And (1 − μ)·q <= m, so that (1 − μ)·q/m is safe where q/m is not.
template <class A, class P = A> struct Mixture : Defaults {
  static constexpr bool has_logs = true;
  A a0, a1, mu, nu, slope, alone_p, alone_q;  // ν = 1 − μ, slope = a3/ν
  template <class R> INLINE Mixture(const double* a, const RowSums<R>&)
      : a0(a[0]), a1(a[1]), mu(a[2]), nu(1 - a[2]), slope(a[2] == 1 ? 0 : a[3] / (1 - a[2])),
        alone_p(infinite_if<A>(a[0] != 0 && a[2] == 0)), alone_q(infinite_if<A>(a[1] != 0 && a[2] == 1)) {}

  template <class X> struct Logs {
    X p_over_m, q_over_m, share;  // log p/m, log q/m, ν·q/m
  };
  template <class X> INLINE Logs<X> logs(const Column<X>& c) const {
    constexpr A far = A(1e30), least = A(1e-37);  // e/e = 1 if γ = 1
    const X delta = c.no_p ? X{} - far : (c.no_q ? X{} + far : c.delta), d = absolute(delta);
    const auto student_larger = delta <= A(0);
    const X gamma = student_larger ? X{} + mu : X{} + nu, rest = student_larger ? X{} + nu : X{} + mu;
    const Exp<X> power(-d);
    const X e = max(power.value, X{} + least), inv_e = A(1) / e, r = fma(gamma, e, rest);
    const auto u_nearer = r * r >= e;
    const X less_one = power.minus_one * (u_nearer ? gamma : -rest * inv_e);
    const X log = log1p(less_one, u_nearer ? r : r * inv_e);
    const X u = u_nearer ? log : log - d, w = u_nearer ? log + d : log;
    return {student_larger ? -w : -u, student_larger ? -u : -w, (student_larger ? rest : gamma * e) / r};
  }
  template <class X> INLINE X value(const Column<X>& c, const Logs<X>& k) const {
    const X m = mu * c.p + nu * c.q;
    const X alone = c.no_p ? (c.no_q ? X{} : X{} + alone_q) : (c.no_q ? X{} + alone_p : X{});
    return a0 * excess(c.p, m, k.p_over_m) + a1 * excess(c.q, m, k.q_over_m) + alone;
  }
  template <class X> INLINE X grad_term(const Column<X>& c, const Logs<X>& k) const {
    return a1 * c.q * k.q_over_m - slope * k.share * (c.p - c.q);
  }
  template <class X> INLINE X value(const Column<X>& c) const { return value(c, logs(c)); }
  template <class X> INLINE X grad_term(const Column<X>& c) const { return grad_term(c, logs(c)); }
};

// With X = p^s, Y = q^s, Δ = s·δ, ρ = β/s, or the same with p and q exchanged, α for β and −δ, whichever makes ρ <= ½:
// G = p^α q^β = X·e^−ρΔ, E = (X − G)/ρ, value = (Y − X + E)/((1 − ρ)s²), w = (q^s − G)/α. With φ(x) = x²·P(x):
// E = XΔ(1 − ρΔ·P(ρΔ)), and Y − X + E = XΔ²(P(Δ) − ρ·P(ρΔ)), both by series where nothing else has digits enough.
template <class A, class P = A> struct AlphaBeta : Defaults {
  bool exchanged, grows;  // X = q^s; an exponent is negative, so that a power may exceed 1
  A alpha, beta, s, rho, inv_rho, value_scale, grad_scale, inv_rest, reach;
  P scale_p, scale_q, scale_g;  // l_t^−s, l_s^−s, l_t^−α·l_s^−β
  A value_p, value_q, grad_q, alone_p, alone_q;
  template <class R> INLINE AlphaBeta(const double* a, const RowSums<R>& row)
      : exchanged(a[0] < a[1]), grows(a[0] < 0 || a[1] < 0), alpha(a[0]), beta(a[1]), s(a[0] + a[1]),
        rho((exchanged ? a[0] : a[1]) / (a[0] + a[1])), inv_rho(rho == 0 ? A(0) : 1 / rho),
        value_scale(1 / ((1 - rho) * s * s)), grad_scale(1 / s), inv_rest(1 / (1 - rho)),
        reach(max(A(1), max(rho, -rho))), scale_p(power(row.l_t, R{} - s)), scale_q(power(row.l_s, R{} - s)),
        scale_g(power(row.l_t, R{} - alpha) * power(row.l_s, R{} - beta)), value_p(beta > 0 ? 1 / (beta * s) : A(0)),
        value_q(alpha > 0 ? 1 / (alpha * s) : A(0)), grad_q(alpha > 0 ? 1 / alpha : A(0)),
        alone_p(infinite_if<A>(beta <= 0)), alone_q(infinite_if<A>(alpha <= 0)) {}

  template <class X> struct Parts {
    X p, q, x, delta, e, difference, p_delta, p_rho_delta;  // p^s, q^s, X, Δ, E, Y − X, P(Δ), P(ρΔ)
  };
  template <class X> INLINE Parts<X> parts(const Column<X>& c) const {
    Parts<X> k;
    k.p = exp2_any(c.log2_e_p * s, grows) * scale_p, k.q = exp2_any(c.log2_e_q * s, grows) * scale_q;
    const X g = exp2_any(fma(X{} + alpha, c.log2_e_p, beta * c.log2_e_q), grows) * scale_g;
    k.x = exchanged ? k.q : k.p, k.difference = exchanged ? k.p - k.q : k.q - k.p;
    k.delta = c.delta * (exchanged ? -s : s);
    const X rho_delta = rho * k.delta;
    k.p_delta = phi(k.delta), k.p_rho_delta = phi(rho_delta);
    const X near = k.x * k.delta * (A(1) - rho_delta * k.p_rho_delta);
    k.e = absolute(rho_delta) < A(1) ? near : (k.x - g) * inv_rho;
    return k;
  }
  template <class X> INLINE X value(const Column<X>& c) const {
    const Parts<X> k = parts(c);
    const X near = k.x * (k.delta * k.delta) * (k.p_delta - rho * k.p_rho_delta);
    const X term = (absolute(k.delta) * reach < A(1) ? near : k.difference + k.e) * value_scale;
    return c.no_p ? (c.no_q ? X{} : k.q * value_q + alone_q) : (c.no_q ? k.p * value_p + alone_p : term);
  }
  template <class X> INLINE X grad_term(const Column<X>& c) const {
    const Parts<X> k = parts(c);
    const X near = -k.x * k.delta * (A(1) - k.delta * (k.p_delta - rho * rho * k.p_rho_delta) * inv_rest);
    const X plain = absolute(k.delta) * reach < A(1) ? near : (k.difference + rho * k.e) * inv_rest;
    const X term = (exchanged ? k.e : plain) * grad_scale;
    return c.no_p ? k.q * grad_q : (c.no_q ? X{} : term);
  }
};

template <class A, class P = A> struct TotalVariation : Defaults {
  template <class R> INLINE TotalVariation(const double*, const RowSums<R>&) {}
  template <class X> INLINE X value(const Column<X>& c) const { return A(0.5) * absolute(c.p - c.q); }
  template <class X> INLINE X grad_term(const Column<X>& c) const {
    const X half = A(0.5) * c.q, known = c.delta < A(0) ? half : (c.delta > A(0) ? -half : X{});
    return c.no_p ? half : known;
  }
};

template <class A, class P = A> struct LogitMSE : Defaults {
  static constexpr bool softmax = false, centred = false;
  A a0, scale;
  template <class R> INLINE LogitMSE(const double* a, const RowSums<R>& row) : a0(a[0]), scale(A(1) / A(row.columns)) {}
  template <class X> INLINE X value(const Column<X>& c) const {
    const X difference = fma(X{} - a0, c.v, c.z), term = difference * difference * scale;
    return c.no_p ? (c.no_q ? X{} : X{} + INFINITE<A>) : term;  // of a student's −∞, it is +∞
  }
  template <class X> INLINE X grad_term(const Column<X>& c) const {
    const X term = fma(X{} - a0, c.v, c.z) * (2 * scale);
    return c.no_p ? X{} : (c.no_q ? X{} : term);
  }
};

template <class R> INLINE R sigmoid(R x) { return 1 / (1 + std::exp(-x)); }
template <class R> INLINE R softplus(R x) { return max(x, R(0)) + std::log1p(std::exp(-absolute(x))); }

// log q_y/(1 − q_y) of the label's logit y against columns with maximum `top` and l = Σ exp((x − top)·c): +∞ where
// there is no other column. A logit of +∞, which makes no distribution, is a NaN, lest it look like a sure label.
template <class R> INLINE R log_odds(R logit, R top, R c, R l) {
  if (!(logit < INFINITE<R>)) return logit - logit;
  return l == 0 ? INFINITE<R> : (logit - top) * c - std::log(l);
}

// KL((σ(t), σ(−t))‖(σ(s), σ(−s))) of the log odds t and s.
template <class R> INLINE R binary_kl(R t, R s) {
  if (t != t || s != s) return t + s;
  if (t == s) return 0;
  if (t > s) t = -t, s = -s;  // the other of the two outcomes
  if (s == INFINITE<R>) return s;
  if (t == -INFINITE<R>) return softplus(s);
  const R p = sigmoid(t), rest = sigmoid(-t), d = s - t;
  if (d >= 1) return p * (softplus(-s) - softplus(-t)) + rest * (softplus(s) - softplus(t));
  const R x = std::log1p(rest * std::expm1(-d)), y = std::log1p(p * std::expm1(d));
  return p * x * x * phi(x) + rest * y * y * phi(y);
}

// a·x, and 0 where a is, even if x is infinite; a NaN stays one.
template <class R> INLINE R weighted(R a, R x) { return a == 0 && x == INFINITE<R> ? R(0) : a * x; }

template <class A, class P = A> struct DKD : Defaults {
  static constexpr bool needs_weight_sum = false, excludes_label = true;
  A a1, alone_p;
  A label_value, centre;  // a0·KL(b_T‖b_S), a0·(q_y − p_y)
  template <class R> INLINE DKD(const double* a, const RowSums<R>& row)
      : a1(row.l_s == 0 || row.l_t == 0 ? 0 : a[1]), alone_p(infinite_if<A>(a1 != 0)),
        label_value(weighted(R(a[0]), binary_kl(row.odds_t, row.odds_s))),
        centre(R(a[0]) * (sigmoid(row.odds_s) - sigmoid(row.odds_t))) {}
  template <class X> INLINE X value(const Column<X>& c) const {
    const X term = a1 * excess(c.p, c.q, c.delta);
    return c.no_p ? a1 * c.q : (c.no_q ? X{} + alone_p : term);
  }
  template <class X> INLINE X grad_term(const Column<X>& c) const { return a1 * (c.q - c.p); }
};

// Several at once, in the same pass; a mixture among them if `mixed`.
template <class A, class P, bool mixed> struct SumOf : Defaults {
  static constexpr bool has_logs = mixed;
  const Jeffreys<A, P> kl;
  const Mixture<A, P> mixture;
  const TotalVariation<A, P> total_variation;
  const A a6;
  template <class R> INLINE SumOf(const double* a, const RowSums<R>& row)
      : kl(a, row), mixture(a + 2, row), total_variation(a, row), a6(a[6]) {}

  template <class X> using Logs = typename Mixture<A, P>::template Logs<X>;
  template <class X> INLINE Logs<X> logs(const Column<X>& c) const { return mixture.logs(c); }
  template <class X> INLINE X value(const Column<X>& c, const Logs<X>& k) const {
    return value_of_two(c) + mixture.value(c, k);
  }
  template <class X> INLINE X grad_term(const Column<X>& c, const Logs<X>& k) const {
    return grad_term_of_two(c) + mixture.grad_term(c, k);
  }
  template <class X> INLINE X value(const Column<X>& c) const {
    if constexpr (mixed) return value(c, logs(c));
    else return value_of_two(c);
  }
  template <class X> INLINE X grad_term(const Column<X>& c) const {
    if constexpr (mixed) return grad_term(c, logs(c));
    else return grad_term_of_two(c);
  }

 private:
  template <class X> INLINE X value_of_two(const Column<X>& c) const {
    return kl.value(c) + a6 * total_variation.value(c);
  }
  template <class X> INLINE X grad_term_of_two(const Column<X>& c) const {
    return kl.grad_term(c) + a6 * total_variation.grad_term(c);
  }
};
template <class A, class P = A> using Sum = SumOf<A, P, false>;
template <class A, class P = A> using MixedSum = SumOf<A, P, true>;

// use.operator()<F>() for the form F of a kernel.
template <class A, class P = A, class Use> auto with_divergence(KernelId kernel_id, const Use& use) {
#define FUSEDKD_CASE(id, Class) \
  case KernelId::id: return use.template operator()<Class<A, P>>();
  switch (kernel_id) { FUSEDKD_KERNELS(FUSEDKD_CASE) }
#undef FUSEDKD_CASE
  STD_TORCH_CHECK(false, "fusedkd: unknown kernel ", int64_t(kernel_id));
  return use.template operator()<ForwardKL<A, P>>();
}

}  // namespace FUSEDKD_NAMESPACE
#endif
