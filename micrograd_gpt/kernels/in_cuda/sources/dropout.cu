// Dropout.
//
// Element i draws number i of the key, so that the backward makes the same mask again: it is
// `dropout` of the gradient with the same key. A thread takes PACK neighbours, then those a whole
// grid further on. Block: 1-D, of any size.

#include "common.cuh"
#include "random.cuh"

__device__ inline void drop(float (&values)[PACK], long long first, unsigned long long key, float p) {
    for (int start = 0; start < PACK; start += 4) {
        unsigned long long counter = (unsigned long long)(first + start) / 4;
        FourNumbers random = philox({unsigned(counter), unsigned(counter >> 32), 0, 0}, key);
        for (int j = 0; j < 4; j++) values[start + j] *= dropout_factor(random.words[j], p);
    }
}

extern "C" __global__ void dropout(
    const Activation* x, Activation* y, long long n, unsigned long long key, float p
) {
    long long stride = (long long)gridDim.x * blockDim.x * PACK;
    for (long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * PACK; i < n; i += stride) {
        float values[PACK];
        load_pack(x, i, n, values);
        drop(values, i, key, p);
        store_pack(y, i, n, values);
    }
}
