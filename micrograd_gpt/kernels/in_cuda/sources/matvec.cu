// Products of a few rows x (B, K) with a matrix, for decoding. Reading the matrix sets the pace. A
// block takes eight of the rows at most. The blocks that read the same part of the matrix for other
// rows run beside it, and find it in the cache.

#include "common.cuh"
#include "gelu.cuh"

constexpr int MAX_BATCH = 8;

// Which of the `batch` rows this block takes, and which part of the matrix.
struct Share {
    int first, rows, part;
};
__device__ inline Share share_of(int batch) {
    int groups = (batch + MAX_BATCH - 1) / MAX_BATCH;
    int first = blockIdx.x % groups * MAX_BATCH;
    return {first, min(MAX_BATCH, batch - first), int(blockIdx.x) / groups};
}

// Stores element i of the product: in y[i], through gelu if wanted, or added to stream[i] where
// stream is not null. Rounds in between, just as separate kernels would.
__device__ inline void finish(float sum, long long i, Activation* y, float* stream, bool with_gelu) {
    Activation result = rounded<Activation>(sum);
    if (stream) {
        stream[i] += to_float(result);
    } else {
        y[i] = with_gelu ? rounded<Activation>(gelu(to_float(result))) : result;
    }
}

// y (B, M) = x · weightᵀ + bias, where weight is (M, K) and bias may be null: each warp takes one
// row of the weight, with its lanes along the row. This is for linear layers stored by columns, and
// for the head, whose weight is the token table.
extern "C" __global__ void matvec_rows(
    const Activation* x, const Activation* weight, const Activation* bias, Activation* y,
    float* stream, int batch, int inputs, int outputs, int with_gelu
) {
    Share share = share_of(batch);
    int output = (share.part * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (output >= outputs) return;
    x += (long long)share.first * inputs;
    const Activation* row = weight + (long long)output * inputs;
    float sums[MAX_BATCH] = {}, weights[PACK], values[PACK];
    for (int i = lane * PACK; i < inputs; i += WARP * PACK) {
        load_pack(row, i, inputs, weights);
        for (int b = 0; b < MAX_BATCH; b++) {
            if (b >= share.rows) break;
            load_pack(x + (long long)b * inputs, i, inputs, values);
            for (int j = 0; j < PACK; j++) sums[b] += weights[j] * values[j];
        }
    }
    for (int b = 0; b < MAX_BATCH; b++) {
        if (b >= share.rows) break;
        float sum = over_lanes<Sum>(sums[b]) + (bias ? to_float(bias[output]) : 0.0f);
        if (lane == 0) finish(sum, (long long)(share.first + b) * outputs + output, y, stream, with_gelu);
    }
}

// y (B, M) = x · weight + bias, where weight is (K, M) and bias may be null: a block owns 4 * PACK
// columns. Its 256 threads are 64 groups that take turns at the K rows; the four of a group stand
// side by side and read 16 bytes each. Then the 64 sums of each column are joined.
constexpr int SIDE_BY_SIDE = 4, TURNS = 64;

extern "C" __global__ void matvec_columns(
    const Activation* x, const Activation* weight, const Activation* bias, Activation* y,
    float* stream, int batch, int inputs, int outputs, int with_gelu
) {
    __shared__ float of_turn[TURNS][SIDE_BY_SIDE * PACK + 1];
    int side = threadIdx.x % SIDE_BY_SIDE, turn = threadIdx.x / SIDE_BY_SIDE;
    Share share = share_of(batch);
    x += (long long)share.first * inputs;
    int first = share.part * SIDE_BY_SIDE * PACK, column = first + side * PACK;
    float sums[MAX_BATCH][PACK] = {}, weights[PACK];
    for (int i = turn; i < inputs; i += TURNS) {
        load_pack(weight + (long long)i * outputs, column, outputs, weights);
        for (int b = 0; b < MAX_BATCH; b++) {
            if (b >= share.rows) break;
            float value = to_float(x[(long long)b * inputs + i]);
            for (int j = 0; j < PACK; j++) sums[b][j] += value * weights[j];
        }
    }
    for (int b = 0; b < MAX_BATCH; b++) {
        if (b >= share.rows) break;
        for (int j = 0; j < PACK; j++) of_turn[turn][side * PACK + j] = sums[b][j];
        __syncthreads();
        int mine = first + threadIdx.x;
        if (threadIdx.x < SIDE_BY_SIDE * PACK && mine < outputs) {
            float sum = bias ? to_float(bias[mine]) : 0.0f;
            for (int t = 0; t < TURNS; t++) sum += of_turn[t][threadIdx.x];
            finish(sum, (long long)(share.first + b) * outputs + mine, y, stream, with_gelu);
        }
        __syncthreads();
    }
}
