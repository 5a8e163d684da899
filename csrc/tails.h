// The residual classes of a teacher known at n columns, for one instruction set: in float64, for 1 − Σp keeps no other
// digits.

// The distance from 1 to the next number of this type.
inline double epsilon(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return 0x1p-52;
    case ScalarType::Float: return 0x1p-23;
    case ScalarType::BFloat16: return 0x1p-7;
    default: return 0x1p-10;
  }
}

// The teacher's tail before it is divided by the sum: |1 − Σp|, at least what rounding leaves open of it. 0 up to
// MOST_LOST if it is not `possible`, for the student has nothing off the list (fusedkd/sparse.py). `type`: of the
// log-probabilities y; p = exp(y), `mass` its sum.
constexpr double MOST_LOST = 1. / 16;

inline double teachers_tail(ScalarType type, const double* p, const double* y, int64_t n, double mass, bool possible) {
  const double eps = epsilon(type), left = 1 - mass;
  double error = type == ScalarType::Double ? 0x1p-46 : 0x1p-23;
  for (int64_t j = 0; j < n; j++) error += p[j] == 0 ? 0 : eps / 2 * p[j] * std::abs(y[j]);
  return possible ? std::max(std::abs(left), error) : left <= MOST_LOST ? 0 : left;
}

// excess of the residual classes; 0·log 0 = 0.
inline double tail(double p, double m, double delta) {
  if (p == 0 && !(delta > -INFINITE<double>)) return m;
  return delta == INFINITE<double> ? delta : excess(p, m, delta);
}
