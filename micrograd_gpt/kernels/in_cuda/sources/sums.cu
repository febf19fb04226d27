// Sums in two stages and a fixed order, so that the same input gives the same bits every time.

#include "common.cuh"

// First stage, down the columns of x (N, M): partials (gridDim.y, M). Block: 32 × 8. Each column of
// threads owns PACK columns of x, and its eight threads take turns at the rows.
extern "C" __global__ void column_sums(const Activation* x, float* partials, int rows, int width) {
    __shared__ float of_thread[8][WARP][PACK];
    int column = (blockIdx.x * WARP + threadIdx.x) * PACK;
    float total[PACK] = {}, values[PACK];
    for (int row = blockIdx.y * 8 + threadIdx.y; row < rows; row += 8 * gridDim.y) {
        load_pack(x + (long long)row * width, column, width, values);
        for (int j = 0; j < PACK; j++) total[j] += values[j];
    }
    for (int j = 0; j < PACK; j++) of_thread[threadIdx.y][threadIdx.x][j] = total[j];
    __syncthreads();
    if (threadIdx.y != 0) return;
    for (int j = 0; j < PACK; j++) {
        total[j] = 0.0f;
        for (int y = 0; y < 8; y++) total[j] += of_thread[y][threadIdx.x][j];
    }
    store_pack(partials + (long long)blockIdx.y * width, column, width, total);
}

// Second stage: sums of partials (parts, width), the first `split` columns in `first`, the others in
// `second`. There may be thousands of parts, so they are added in double. Block: 32 × 32; the 32
// threads of a column take turns at the parts. Grid: width / 32.
extern "C" __global__ void sum_partials(
    const float* partials, float* first, float* second, int parts, int width, int split
) {
    __shared__ double of_thread[WARP][WARP];
    int column = blockIdx.x * WARP + threadIdx.x;
    double total = 0.0;
    if (column < width) {
        for (int part = threadIdx.y; part < parts; part += WARP) {
            total += partials[(long long)part * width + column];
        }
    }
    of_thread[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.y != 0 || column >= width) return;
    total = 0.0;
    for (int y = 0; y < WARP; y++) total += of_thread[y][threadIdx.x];
    *(column < split ? first + column : second + column - split) = total;
}

// The sum of n numbers, by one block.
extern "C" __global__ void total(const float* numbers, float* sum, long long n) {
    double mine = 0.0;
    for (long long i = threadIdx.x; i < n; i += blockDim.x) mine += numbers[i];
    mine = over_block<Sum>(mine);
    if (threadIdx.x == 0) *sum = mine;
}

// Adds bias (M) to each row of y (N, M), in place. A thread takes PACK columns. Block: 1-D.
// Grid: (columns / (threads * PACK), any number of blocks, which take turns at the rows).
extern "C" __global__ void add_bias(
    Activation* y, const Activation* bias, int rows, int width
) {
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    if (column >= width) return;
    float values[PACK], shift[PACK];
    load_pack(bias, column, width, shift);
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        Activation* out = y + (long long)row * width;
        load_pack(out, column, width, values);
        for (int j = 0; j < PACK; j++) values[j] += shift[j];
        store_pack(out, column, width, values);
    }
}
