// GELU in the tanh approximation: 0.5 x (1 + tanh(scale (x + cubic x³))).

#pragma once

constexpr float SCALE = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float CUBIC = 0.044715f;
constexpr float IS_STRAIGHT = 20.0f;  // from this |x| on its slope is 1 or 0; x * x could overflow

__device__ inline float gelu_tanh(float x) { return tanhf(SCALE * (x + CUBIC * x * x * x)); }
__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + gelu_tanh(x)); }
