// The transforms of Winograd's F(m×m, 3×3) along one axis, on numbers or vectors of them.
//
//   m = 2:     1  0 -1  0          1   0   0
//         Bᵀ = 0  1  1  0     G = 1/2 1/2 1/2     Aᵀ = 1  1  1  0
//              0 -1  1  0         1/2 -1/2 1/2         0  1 -1 -1
//              0  1  0 -1          0   0   1
//
//   m = 4, with the points 0, ±a, ±b and ∞:
//
//         a²b²   0   -a²-b²   0     1  0          1/a²b²    0    0
//          0   -ab²   -b²     a     1  0            p      pa   pa²          1  1  1  1  1  0
//    Bᵀ =  0    ab²   -b²    -a     1  0      G =   p     -pa   pa²     Aᵀ = 0  a -a  b -b  0
//          0   -a²b   -a²     b     1  0            q      qb   qb²          0 a² a² b² b²  0
//          0    a²b   -a²    -b     1  0            q     -qb   qb²          0 a³ -a³ b³ -b³ 1
//          0    a²b²   0   -a²-b²   0  1            0       0    1
//
//   with p = 1 / 2a²(a² - b²) and q = 1 / 2b²(b² - a²).
#pragma once

namespace {

template <int S, typename T>
struct Winograd;

template <typename T>
struct Winograd<2, T> {
  template <typename V>
  static void of_input(const V* d, V* to) {
    to[0] = d[0] - d[2], to[1] = d[1] + d[2], to[2] = d[2] - d[1], to[3] = d[1] - d[3];
  }
  template <typename V>
  static void of_weight(const V* g, V* to) {
    const V ends = T(0.5) * (g[0] + g[2]), middle = T(0.5) * g[1];
    to[0] = g[0], to[1] = ends + middle, to[2] = ends - middle, to[3] = g[2];
  }
  template <typename V>
  static void of_weight_gradient(const V* m, V* to) {
    to[0] = m[0] + T(0.5) * (m[1] + m[2]), to[1] = T(0.5) * (m[1] - m[2]), to[2] = m[3] + T(0.5) * (m[1] + m[2]);
  }
  template <typename V>
  static void of_product(const V* m, V* to) {
    to[0] = m[0] + m[1] + m[2], to[1] = m[1] - m[2] - m[3];
  }
  template <typename V>
  static void of_gradient(const V* y, V* to) {
    to[0] = y[0], to[1] = y[0] + y[1], to[2] = y[0] - y[1], to[3] = -y[1];
  }
};

template <typename T>
struct Winograd<4, T> {
  static constexpr T A = T(0.75), B = T(1.5), A2 = A * A, B2 = B * B;
  template <typename V>
  static void of_input(const V* d, V* to) {
    const V even_a = d[4] - B2 * d[2], odd_a = A * (d[3] - B2 * d[1]);
    const V even_b = d[4] - A2 * d[2], odd_b = B * (d[3] - A2 * d[1]);
    to[0] = A2 * B2 * d[0] - (A2 + B2) * d[2] + d[4];
    to[1] = even_a + odd_a, to[2] = even_a - odd_a, to[3] = even_b + odd_b, to[4] = even_b - odd_b;
    to[5] = A2 * B2 * d[1] - (A2 + B2) * d[3] + d[5];
  }
  template <typename V>
  static void of_weight(const V* g, V* to) {
    constexpr T P = 1 / (2 * A2 * (A2 - B2)), Q = 1 / (2 * B2 * (B2 - A2)), R = 1 / (A2 * B2);
    const V even_a = P * (g[0] + A2 * g[2]), odd_a = P * A * g[1], even_b = Q * (g[0] + B2 * g[2]),
            odd_b = Q * B * g[1];
    to[0] = R * g[0], to[1] = even_a + odd_a, to[2] = even_a - odd_a;
    to[3] = even_b + odd_b, to[4] = even_b - odd_b, to[5] = g[2];
  }
  template <typename V>
  static void of_product(const V* m, V* to) {
    const V sum_a = m[1] + m[2], less_a = m[1] - m[2], sum_b = m[3] + m[4], less_b = m[3] - m[4];
    to[0] = m[0] + sum_a + sum_b, to[1] = A * less_a + B * less_b;
    to[2] = A2 * sum_a + B2 * sum_b, to[3] = A2 * A * less_a + B2 * B * less_b + m[5];
  }
  template <typename V>
  static void of_gradient(const V* y, V* to) {
    const V even_a = y[0] + A2 * y[2], odd_a = A * (y[1] + A2 * y[3]);
    const V even_b = y[0] + B2 * y[2], odd_b = B * (y[1] + B2 * y[3]);
    to[0] = y[0], to[1] = even_a + odd_a, to[2] = even_a - odd_a;
    to[3] = even_b + odd_b, to[4] = even_b - odd_b, to[5] = y[3];
  }
};

}  // namespace
