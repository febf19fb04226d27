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

// Second stage: sums (width) of partials (parts, width). One thread a column. There may be thousands
// of parts, so they are added in double.
extern "C" __global__ void sum_partials(
    const float* partials, float* sums, int parts, long long width
) {
    long long column = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= width) return;
    double total = 0.0;
    for (int part = 0; part < parts; part++) total += partials[part * width + column];
    sums[column] = total;
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
