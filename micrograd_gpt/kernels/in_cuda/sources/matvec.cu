// Products of a few rows x (B, K) with a matrix, for decoding. Reading the matrix sets the pace. A
// block takes eight of the rows at most. The blocks that read the same part of the matrix for other
// rows run beside it, and find it in the cache.

#include "common.cuh"
#include "gelu.cuh"
#include "finish.cuh"
#include "packs.cuh"

constexpr int MAX_BATCH = 8;

// Which of the `batch` rows this block takes, `most` of them or fewer, and which part of the matrix.
struct Share {
    int first, rows, part;
};
__device__ inline Share share_of(int batch, int most) {
    int groups = (batch + most - 1) / most, first = blockIdx.x % groups * most;
    return {first, min(most, batch - first), int(blockIdx.x) / groups};
}

// The next packs of a row for one lane, in which the lanes of a warp stand side by side.
template <int AHEAD>
__device__ inline void load_ahead(
    Pack (&packs)[AHEAD], const Activation* row, int first, int width, bool aligned
) {
#pragma unroll
    for (int a = 0; a < AHEAD; a++) packs[a].load(row, first + a * WARP * PACK, width, aligned);
}

// y (B, M) = x · weightᵀ + bias, where weight is (M, K) and bias may be null: each warp takes one
// row of the weight, with its lanes along the row. A lane asks for AHEAD packs of it at a time. A
// block takes up to ROWS of the B rows.
template <int ROWS, int AHEAD>
__device__ inline void multiply_rows(
    const Activation* x, const Activation* weight, const Activation* bias, Activation* y,
    float* stream, int batch, int inputs, int outputs, int with_gelu
) {
    Share share = share_of(batch, ROWS);
    int output = (share.part * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (output >= outputs) return;
    x += (long long)share.first * inputs;
    const Activation* row = weight + (long long)output * inputs;
    bool aligned = inputs % PACK == 0 && is_aligned(weight) && is_aligned(x);
    long long place = (long long)(share.first + lane) * outputs + output;  // where a lane stores
    float offset = bias ? to_float(bias[output]) : 0.0f;
    float before = stream && lane < share.rows ? stream[place] : 0.0f;

    float sums[ROWS] = {};
    for (int start = lane * PACK; start < inputs; start += AHEAD * WARP * PACK) {
        Pack weights[AHEAD], values[AHEAD];
        load_ahead(weights, row, start, inputs, aligned);
#pragma unroll
        for (int b = 0; b < ROWS; b++) {
            if (b >= share.rows) break;
            load_ahead(values, x + (long long)b * inputs, start, inputs, aligned);
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
#pragma unroll
                for (int j = 0; j < PACK; j++) sums[b] += weights[a][j] * values[a][j];
            }
        }
    }
    float mine = 0.0f;  // lane b stores the result of row b
#pragma unroll
    for (int b = 0; b < ROWS; b++) {
        if (b >= share.rows) break;
        float sum = over_lanes<Sum>(sums[b]);
        if (lane == b) mine = sum;
    }
    if (lane < share.rows) finish(mine + offset, before, place, y, stream, with_gelu);
}

// These are for linear layers stored by columns, and for the head, whose weight is the token table.
extern "C" __global__ void matvec_row(
    const Activation* x, const Activation* weight, const Activation* bias, Activation* y,
    float* stream, int batch, int inputs, int outputs, int with_gelu
) {
    multiply_rows<1, 6>(x, weight, bias, y, stream, batch, inputs, outputs, with_gelu);
}

extern "C" __global__ void matvec_rows(
    const Activation* x, const Activation* weight, const Activation* bias, Activation* y,
    float* stream, int batch, int inputs, int outputs, int with_gelu
) {
    multiply_rows<MAX_BATCH, 3>(x, weight, bias, y, stream, batch, inputs, outputs, with_gelu);
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
    Share share = share_of(batch, MAX_BATCH);
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
            long long place = (long long)(share.first + b) * outputs + mine;
            finish(sum, stream ? stream[place] : 0.0f, place, y, stream, with_gelu);
        }
        __syncthreads();
    }
}
