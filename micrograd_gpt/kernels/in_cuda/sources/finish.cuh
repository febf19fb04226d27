// The end of a product in decoding: what follows it there happens before it is stored.

#pragma once

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
