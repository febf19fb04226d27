// AdamW over many tensors in one launch, the squared norm of many gradients, and clipping.
//
// gridDim.y counts the tensors, gridDim.x the blocks that share each of them; a thread takes PACK
// neighbouring elements at each turn.

#include "common.cuh"
#include "tensors.cuh"

enum { PARAMETER, GRADIENT, FIRST_MOMENT, SECOND_MOMENT };

// Algorithm 2 of Loshchilov & Hutter 2019, as PyTorch orders it.
extern "C" __global__ void adamw_update(
    TensorTable tensors, float lr, float beta1, float beta2, float eps, float correction1,
    float correction2
) {
    int tensor = blockIdx.y;
    long long n = tensors.sizes[tensor];
    float* parameter = reinterpret_cast<float*>(tensors.arrays[PARAMETER][tensor]);
    const float* gradient = reinterpret_cast<const float*>(tensors.arrays[GRADIENT][tensor]);
    float* first = reinterpret_cast<float*>(tensors.arrays[FIRST_MOMENT][tensor]);
    float* second = reinterpret_cast<float*>(tensors.arrays[SECOND_MOMENT][tensor]);
    float kept = 1.0f - lr * tensors.decays[tensor];

    long long stride = (long long)gridDim.x * blockDim.x * PACK;
    for (long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * PACK; i < n; i += stride) {
        float p[PACK], g[PACK], m[PACK], v[PACK];
        load_pack(parameter, i, n, p);
        load_pack(gradient, i, n, g);
        load_pack(first, i, n, m);
        load_pack(second, i, n, v);
        for (int j = 0; j < PACK; j++) {
            m[j] = beta1 * m[j] + (1.0f - beta1) * g[j];
            v[j] = beta2 * v[j] + (1.0f - beta2) * g[j] * g[j];
            float step = lr * (m[j] / correction1) / (sqrtf(v[j] / correction2) + eps);
            p[j] = p[j] * kept - step;
        }
        store_pack(parameter, i, n, p);
        store_pack(first, i, n, m);
        store_pack(second, i, n, v);
    }
}

// First stage: partials (tensors, gridDim.x), each block's sum of squares of its part of a tensor, in
// double: squares of floats may leave their range. The tensors are the table's gradients.
extern "C" __global__ void sum_of_squares(TensorTable tensors, double* partials) {
    long long n = tensors.sizes[blockIdx.y];
    const float* gradient = reinterpret_cast<const float*>(tensors.arrays[GRADIENT][blockIdx.y]);
    double mine = 0.0;
    long long stride = (long long)gridDim.x * blockDim.x * PACK;
    for (long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * PACK; i < n; i += stride) {
        float g[PACK];
        load_pack(gradient, i, n, g);
        for (double value : g) mine += value * value;
    }
    mine = over_block<Sum>(mine);
    if (threadIdx.x == 0) partials[blockIdx.y * gridDim.x + blockIdx.x] = mine;
}

// Second stage, by one block: the norm of gradients that were multiplied by loss_scale, and the factor
// that divides that out and brings the norm down to max_norm. Where the norm is not finite, the factor
// is 1.
extern "C" __global__ void clip_scale(
    const double* partials, float* norm, float* scale, long long n, float max_norm,
    float loss_scale
) {
    double squares = 0.0;
    for (long long i = threadIdx.x; i < n; i += blockDim.x) squares += partials[i];
    squares = over_block<Sum>(squares);
    if (threadIdx.x != 0) return;
    float length = sqrt(squares) / loss_scale;
    *norm = length;
    *scale = length < infinity() ? (length > max_norm ? max_norm / length : 1.0f) / loss_scale : 1.0f;
}

// Multiplies the table's gradients by the number that `factor` points to.
extern "C" __global__ void scale(TensorTable tensors, const float* factor) {
    if (*factor == 1.0f) return;  // as it is while no norm is too long
    long long n = tensors.sizes[blockIdx.y];
    float* gradient = reinterpret_cast<float*>(tensors.arrays[GRADIENT][blockIdx.y]);
    long long stride = (long long)gridDim.x * blockDim.x * PACK;
    for (long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * PACK; i < n; i += stride) {
        float g[PACK];
        load_pack(gradient, i, n, g);
        for (float& value : g) value *= *factor;
        store_pack(gradient, i, n, g);
    }
}
