// GELU and its backward.
//
// Element-wise over n activations: a thread takes PACK neighbours, then those a whole grid further
// on. Block: 1-D, of any size.

#include "common.cuh"
#include "gelu.cuh"

extern "C" __global__ void gelu_forward(const Activation* x, Activation* y, long long n) {
    long long stride = (long long)gridDim.x * blockDim.x * PACK;
    for (long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * PACK; i < n; i += stride) {
        float values[PACK];
        load_pack(x, i, n, values);
        for (float& value : values) value = gelu(value);
        store_pack(y, i, n, values);
    }
}

// Saved: x; the tanh is computed again.
extern "C" __global__ void gelu_backward(
    const Activation* grad, const Activation* x, Activation* dx, long long n
) {
    long long stride = (long long)gridDim.x * blockDim.x * PACK;
    for (long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * PACK; i < n; i += stride) {
        float values[PACK], grads[PACK];
        load_pack(x, i, n, values);
        load_pack(grad, i, n, grads);
        for (int j = 0; j < PACK; j++) {
            float value = values[j];
            value = value > IS_STRAIGHT ? IS_STRAIGHT : value < -IS_STRAIGHT ? -IS_STRAIGHT : value;
            float t = gelu_tanh(value);
            float dt = (1.0f - t * t) * SCALE * (1.0f + 3.0f * CUBIC * value * value);
            grads[j] *= 0.5f * (1.0f + t) + 0.5f * value * dt;
        }
        store_pack(dx, i, n, grads);
    }
}
