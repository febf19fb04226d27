// Picking rows of a table (V, C), for decoding, and the backward: gradients are added to the rows
// they came from.

#include "common.cuh"

// dweight[id] += the sum of the rows of grad (N, C) that have this id. `order` sorts the ids, so
// that equal ones are neighbours. The block at the first of them adds all of them, in that order,
// without atomics; the blocks at the others return. Block: 32 × 8. Each column of threads owns PACK
// columns, and its eight threads take turns at the rows. Grid: (N, columns / (32 * PACK)).
extern "C" __global__ void embedding_backward(
    const Activation* grad, const long long* ids, const long long* order, float* dweight,
    int rows, int width
) {
    __shared__ float of_thread[8][WARP][PACK];
    int begin = blockIdx.x;
    long long id = ids[order[begin]];
    if (begin > 0 && ids[order[begin - 1]] == id) return;
    int column = (blockIdx.y * WARP + threadIdx.x) * PACK;

    float sum[PACK] = {}, values[PACK];
    for (int i = begin + threadIdx.y; i < rows && ids[order[i]] == id; i += 8) {
        load_pack(grad + order[i] * width, column, width, values);
        for (int j = 0; j < PACK; j++) sum[j] += values[j];
    }
    for (int j = 0; j < PACK; j++) of_thread[threadIdx.y][threadIdx.x][j] = sum[j];
    __syncthreads();
    if (threadIdx.y != 0) return;

    load_pack(dweight + id * width, column, width, sum);
    for (int j = 0; j < PACK; j++) {
        for (int y = 0; y < 8; y++) sum[j] += of_thread[y][threadIdx.x][j];
    }
    store_pack(dweight + id * width, column, width, sum);
}

// stream (B, C) = wte[tokens] + wpe[positions]. Block: one warp, whose threads own PACK columns
// each. Grid: (B, columns / (32 * PACK)).
extern "C" __global__ void embedding_token(
    const long long* tokens, const long long* positions, const Activation* wte,
    const Activation* wpe, float* stream, int width
) {
    int row = blockIdx.x, column = (blockIdx.y * WARP + threadIdx.x) * PACK;
    float sum[PACK], position[PACK];
    load_pack(wte + tokens[row] * width, column, width, sum);
    load_pack(wpe + positions[row] * width, column, width, position);
    for (int j = 0; j < PACK; j++) sum[j] += position[j];
    store_pack(stream + (long long)row * width, column, width, sum);
}
