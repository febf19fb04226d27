// Products of up to 64 rows x (B, K) with a matrix, for decoding a batch, on tensor cores. The matrix
// is read once for all of them, and reading it sets the pace.

#include "common.cuh"
#include "gelu.cuh"
#include "finish.cuh"
#include "packs.cuh"
#include "mma.cuh"

constexpr int WARPS = 8, OUTPUTS = 16, MOST_ROWS = 64, TILES = MOST_ROWS / 8;
constexpr int STEP = 4 * PACK;  // of K, in which each of the four lanes on a row has a pack
constexpr int AHEAD = 2;        // steps whose weights are asked for before the first is needed

// Adds weights (16, STEP) · xᵀ (STEP, 8) to sums. Each lane brings packs of rows g and g + 8 of the
// weights, and of row g of x. Which four of its eight numbers meet in which mma does not matter, as
// long as they are the same of all three.
__device__ inline void add_product(
    float (&sums)[4], const Pack& upper, const Pack& lower, const Pack& x
) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const unsigned a[4] = {upper.word(2 * half), lower.word(2 * half),
                               upper.word(2 * half + 1), lower.word(2 * half + 1)};
        mma(sums[0], sums[1], sums[2], sums[3], a, x.word(2 * half), x.word(2 * half + 1));
    }
}

// y (B, M) = x · weightᵀ + bias, where weight is (M, K) and bias may be null. A block takes OUTPUTS
// rows of the weight. Its warps take turns at the steps of K, and their sums are joined at the end.
// Block: WARPS * WARP. Grid: M / OUTPUTS.
extern "C" __global__ void __launch_bounds__(256, 2) multiply_batch(
    const Activation* x, const Activation* weight, const Activation* bias, Activation* y,
    float* stream, int batch, int inputs, int outputs, int with_gelu
) {
    __shared__ float of_warp[WARPS][MOST_ROWS][OUTPUTS + 1];
    int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    int first = blockIdx.x * OUTPUTS;
    bool aligned = inputs % PACK == 0 && is_aligned(weight) && is_aligned(x);
    const Activation* rows[2];  // outside of the matrix any will do
    for (int i = 0; i < 2; i++) {
        rows[i] = weight + (long long)min(first + g + 8 * i, outputs - 1) * inputs;
    }

    float sums[TILES][4] = {};
    for (int start = warp * STEP; start < inputs; start += AHEAD * WARPS * STEP) {
        Pack weights[AHEAD][2];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            int column = start + a * WARPS * STEP + t * PACK;
            for (int i = 0; i < 2; i++) weights[a][i].load(rows[i], column, inputs, aligned);
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            if (8 * tile >= batch) break;
            const Activation* row = x + (long long)min(8 * tile + g, batch - 1) * inputs;
            Pack values[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                values[a].load(row, start + a * WARPS * STEP + t * PACK, inputs, aligned);
            }
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                add_product(sums[tile], weights[a][0], weights[a][1], values[a]);
            }
        }
    }

    for (int tile = 0; tile < TILES; tile++) {
        for (int i = 0; i < 4; i++) {
            of_warp[warp][8 * tile + 2 * t + i % 2][g + i / 2 * 8] = sums[tile][i];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < batch * OUTPUTS; i += blockDim.x) {
        int row = i / OUTPUTS, output = first + i % OUTPUTS;
        if (output >= outputs) continue;
        long long place = (long long)row * outputs + output;
        float sum = bias ? to_float(bias[output]) : 0.0f;
        for (int w = 0; w < WARPS; w++) sum += of_warp[w][row][i % OUTPUTS];
        finish(sum, stream ? stream[place] : 0.0f, place, y, stream, with_gelu);
    }
}
