// The elementwise function between the two matrix products, in fp32.
#pragma once
#include "experts.h"

/// 1 / (1 + e^-x); e^-x may overflow to infinity, which gives 0 as it must.
inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

/// erfc(t) for t >= 0. MSL has no erf. Below 1: 1 - erf, erf(t)/t - 1 as a polynomial in t^2; from there on
/// exp(t * polynomial in t). Both fitted at Chebyshev nodes to the mpmath function, relative error of the result below
/// 8e-6; above t = 6 the value is under 3e-17 and is held.
inline float erfc_positive(float t) {
  const float s = t * t;
  float p = 7.882497108e-05f;
  p = fma(p, s, -8.018854992e-04f);
  p = fma(p, s, 5.189311943e-03f);
  p = fma(p, s, -2.685432880e-02f);
  p = fma(p, s, 1.128359746e-01f);
  p = fma(p, s, -3.761262690e-01f);
  p = fma(p, s, 1.283791659e-01f);
  const float near_zero = 1.0f - fma(p, t, t);

  const float c = min(t, 6.0f);
  float q = -6.646036344e-08f;
  q = fma(q, c, 2.816912925e-06f);
  q = fma(q, c, -5.370409027e-05f);
  q = fma(q, c, 6.125232407e-04f);
  q = fma(q, c, -4.700495948e-03f);
  q = fma(q, c, 2.598105492e-02f);
  q = fma(q, c, -1.089157831e-01f);
  q = fma(q, c, -6.334230278e-01f);
  q = fma(q, c, -1.129109041e+00f);
  const float tail = exp(c * q);
  return t < 1.0f ? near_zero : tail;
}

inline float gelu(float x) {
  const float tail = 0.5f * erfc_positive(fabs(x) * 0.70710678118654752f);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

/// 0.5 x (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
inline float gelu_tanh(float x) { return x * sigmoid(1.5957691216057308f * fma(0.044715f * x * x, x, x)); }

/// act(gate) * up; `up` is not read by ACTIVATION_RELU2, which has no gate: its one input is `gate`.
template <uint KIND>
inline float activate(float gate, float up, float alpha, float limit) {
  if (KIND == ACTIVATION_SILU)
    return gate * sigmoid(gate) * up;
  if (KIND == ACTIVATION_GELU)
    return gelu(gate) * up;
  if (KIND == ACTIVATION_GELU_TANH)
    return gelu_tanh(gate) * up;
  if (KIND == ACTIVATION_RELU2) {
    const float positive = max(gate, 0.0f);
    return positive * positive;
  }
  const float g = min(gate, limit);
  const float u = clamp(up, -limit, limit);
  return g * sigmoid(alpha * g) * (u + 1.0f);
}

inline float activate(uint kind, float gate, float up, float alpha, float limit) {
  switch (kind) {
  case ACTIVATION_SILU:
    return activate<ACTIVATION_SILU>(gate, up, alpha, limit);
  case ACTIVATION_GELU:
    return activate<ACTIVATION_GELU>(gate, up, alpha, limit);
  case ACTIVATION_GELU_TANH:
    return activate<ACTIVATION_GELU_TANH>(gate, up, alpha, limit);
  case ACTIVATION_RELU2:
    return activate<ACTIVATION_RELU2>(gate, up, alpha, limit);
  default:
    return activate<ACTIVATION_SWIGLU_CLAMP>(gate, up, alpha, limit);
  }
}

/// The same of N values; the function is chosen once.
template <uint KIND, uint N>
inline void activate(thread const float (&gate)[N], thread const float (&up)[N], float alpha, float limit,
                     thread float (&value)[N]) {
  UNROLL_SHARE
  for (uint i = 0; i < N; ++i)
    value[i] = activate<KIND>(gate[i], up[i], alpha, limit);
}
template <uint N>
inline void activate(uint kind, thread const float (&gate)[N], thread const float (&up)[N], float alpha, float limit,
                     thread float (&value)[N]) {
  switch (kind) {
  case ACTIVATION_SILU:
    return activate<ACTIVATION_SILU>(gate, up, alpha, limit, value);
  case ACTIVATION_GELU:
    return activate<ACTIVATION_GELU>(gate, up, alpha, limit, value);
  case ACTIVATION_GELU_TANH:
    return activate<ACTIVATION_GELU_TANH>(gate, up, alpha, limit, value);
  case ACTIVATION_RELU2:
    return activate<ACTIVATION_RELU2>(gate, up, alpha, limit, value);
  default:
    return activate<ACTIVATION_SWIGLU_CLAMP>(gate, up, alpha, limit, value);
  }
}
