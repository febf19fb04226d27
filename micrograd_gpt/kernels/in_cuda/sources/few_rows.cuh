// What products of a few rows have in common: how blocks share the rows, and what happens to a
// result before it is stored.

#pragma once

// Which of the `batch` rows this block takes, `most` of them or fewer, and which part of the matrix.
struct Share {
    int first, rows, part;
};
__device__ inline Share share_of(int batch, int most) {
    int groups = (batch + most - 1) / most, first = blockIdx.x % groups * most;
    return {first, min(most, batch - first), int(blockIdx.x) / groups};
}

// Stores element i of the product: in y[i], through gelu if wanted, or where stream is not null in
// stream[i], added to what was there `before`. Rounds in between, just as separate kernels would.
__device__ inline void finish(
    float sum, float before, long long i, Activation* y, float* stream, bool with_gelu
) {
    Activation result = rounded<Activation>(sum);
    if (stream) {
        stream[i] = before + to_float(result);
    } else {
        y[i] = with_gelu ? rounded<Activation>(gelu(to_float(result))) : result;
    }
}
