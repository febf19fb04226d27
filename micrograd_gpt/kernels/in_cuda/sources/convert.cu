// Between float32 and the activation type: n numbers, each thread PACK of them at a turn.
// Block: 1-D, of any size.

#include "common.cuh"
#include "tensors.cuh"

template <class From, class To>
__device__ inline void convert(const From* x, To* y, long long n) {
    long long stride = (long long)gridDim.x * blockDim.x * PACK;
    for (long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * PACK; i < n; i += stride) {
        float values[PACK];
        load_pack(x, i, n, values);
        store_pack(y, i, n, values);
    }
}

extern "C" __global__ void narrow(const float* x, Activation* y, long long n) { convert(x, y, n); }

extern "C" __global__ void widen(const Activation* x, float* y, long long n) { convert(x, y, n); }

// The same for many tensors: the first arrays of the table into the second. Grid: (blocks that share
// a tensor, tensors).
extern "C" __global__ void narrow_all(TensorTable tensors) {
    int tensor = blockIdx.y;
    const float* from = reinterpret_cast<const float*>(tensors.arrays[0][tensor]);
    Activation* to = reinterpret_cast<Activation*>(tensors.arrays[1][tensor]);
    convert(from, to, tensors.sizes[tensor]);
}
