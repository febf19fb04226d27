// Layer normalisation of the rows of x (N, C), float32, into activations y (N, C), and its
// backward.
//
// One warp takes one row. Its lanes read PACK neighbouring elements each, 32 * PACK in all at a
// time, and find the row in the cache when they read it again. The column sums that the weight and
// bias need go over parts of the rows first; sum_partials in sums.cu joins them in a fixed order,
// without atomics.

#include "common.cuh"

// Block: any number of whole warps. Grid: enough for a warp a row.
extern "C" __global__ void layer_norm_forward(
    const float* x, const float* weight, const float* bias, Activation* y, float* mean,
    float* rstd, int rows, int width, float eps
) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    const float* in = x + (long long)row * width;
    Activation* out = y + (long long)row * width;
    float values[PACK], scale[PACK], shift[PACK];

    float total = 0.0f;
    for (int i = lane * PACK; i < width; i += WARP * PACK) {
        load_pack(in, i, width, values);
        for (float value : values) total += value;
    }
    float centre = over_lanes<Sum>(total) / width;

    // Once more with what the first mean leaves: a row of equal numbers becomes exactly 0.
    total = 0.0f;
    for (int i = lane * PACK; i < width; i += WARP * PACK) {
        load_pack(in, i, width, values, centre);  // elements outside add nothing
        for (float value : values) total += value - centre;
    }
    centre += over_lanes<Sum>(total) / width;

    float squares = 0.0f;
    for (int i = lane * PACK; i < width; i += WARP * PACK) {
        load_pack(in, i, width, values, centre);
        for (float value : values) squares += (value - centre) * (value - centre);
    }
    float scale_of_row = 1.0f / sqrtf(over_lanes<Sum>(squares) / width + eps);

    for (int i = lane * PACK; i < width; i += WARP * PACK) {
        load_pack(in, i, width, values);
        load_pack(weight, i, width, scale);
        load_pack(bias, i, width, shift);
        for (int j = 0; j < PACK; j++) {
            values[j] = (values[j] - centre) * scale_of_row * scale[j] + shift[j];
        }
        store_pack(out, i, width, values);
    }
    if (lane == 0) mean[row] = centre, rstd[row] = scale_of_row;
}

// The same for few rows of up to WIDEST numbers, in decoding: all that a lane needs is asked for
// before the first of it is needed, since loads take much longer than the arithmetic. The results
// are the same, bit for bit; mean and rstd are not kept. Block: a warp. Grid: N.
constexpr int WIDEST = 1792, HELD = WIDEST / WARP / PACK;

__device__ inline void load_held(const float* row, int width, float (&held)[HELD][PACK]) {
#pragma unroll
    for (int a = 0; a < HELD; a++) {
        load_pack(row, (a * WARP + threadIdx.x) * PACK, width, held[a]);
    }
}

// The sum of a lane's numbers less `centre`, or of their squares.
template <bool SQUARED>
__device__ inline float sum_of(const float (&held)[HELD][PACK], int width, float centre) {
    float total = 0.0f;
#pragma unroll
    for (int a = 0; a < HELD; a++) {
#pragma unroll
        for (int j = 0; j < PACK; j++) {
            bool inside = (a * WARP + int(threadIdx.x)) * PACK + j < width;
            float value = inside ? held[a][j] - centre : 0.0f;
            total += SQUARED ? value * value : value;
        }
    }
    return total;
}

extern "C" __global__ void layer_norm_few_rows(
    const float* x, const float* weight, const float* bias, Activation* y, int width, float eps
) {
    float values[HELD][PACK], scale[HELD][PACK], shift[HELD][PACK];
    load_held(x + (long long)blockIdx.x * width, width, values);
    load_held(weight, width, scale);
    load_held(bias, width, shift);
    float centre = over_lanes<Sum>(sum_of<false>(values, width, 0.0f)) / width;
    centre += over_lanes<Sum>(sum_of<false>(values, width, centre)) / width;
    float squares = over_lanes<Sum>(sum_of<true>(values, width, centre));
    float scale_of_row = 1.0f / sqrtf(squares / width + eps);
#pragma unroll
    for (int a = 0; a < HELD; a++) {
        for (int j = 0; j < PACK; j++) {
            values[a][j] = (values[a][j] - centre) * scale_of_row * scale[a][j] + shift[a][j];
        }
        store_pack(y + (long long)blockIdx.x * width, (a * WARP + threadIdx.x) * PACK, width, values[a]);
    }
}

// dx = rstd * (dn - mean(dn) - n * mean(dn * n)) with n = (x - mean) * rstd, dn = grad * weight.
// Block and grid as in the forward.
extern "C" __global__ void layer_norm_backward(
    const Activation* grad, const float* x, const float* weight, const float* mean,
    const float* rstd, float* dx, int rows, int width
) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    long long start = (long long)row * width;
    float centre = mean[row], scale_of_row = rstd[row];
    float values[PACK], grads[PACK], scale[PACK];

    float along_one = 0.0f, along_normed = 0.0f;
    for (int i = lane * PACK; i < width; i += WARP * PACK) {
        load_pack(x + start, i, width, values);
        load_pack(grad + start, i, width, grads);
        load_pack(weight, i, width, scale);
        for (int j = 0; j < PACK; j++) {
            float dnormed = grads[j] * scale[j];
            along_one += dnormed;
            along_normed += dnormed * (values[j] - centre) * scale_of_row;
        }
    }
    along_one = over_lanes<Sum>(along_one) / width;
    along_normed = over_lanes<Sum>(along_normed) / width;

    for (int i = lane * PACK; i < width; i += WARP * PACK) {
        load_pack(x + start, i, width, values);
        load_pack(grad + start, i, width, grads);
        load_pack(weight, i, width, scale);
        for (int j = 0; j < PACK; j++) {
            float normed = (values[j] - centre) * scale_of_row;
            values[j] = scale_of_row * (grads[j] * scale[j] - along_one - normed * along_normed);
        }
        store_pack(dx + start, i, width, values);
    }
}

// Sums of grad * n (for the weight) and of grad (for the bias) over a part of the rows: partials
// (gridDim.y, 2, C). Block: 32 × 8. Each column of threads owns PACK columns of the matrix, and its
// eight threads take turns at the rows. Grid: (columns / (32 * PACK), parts).
extern "C" __global__ void layer_norm_backward_weight(
    const Activation* grad, const float* x, const float* mean, const float* rstd,
    float* partials, int rows, int width
) {
    __shared__ float of_thread[8][WARP][2 * PACK];
    int column = (blockIdx.x * WARP + threadIdx.x) * PACK;
    float dweight[PACK] = {}, dbias[PACK] = {}, values[PACK], grads[PACK];
    for (int row = blockIdx.y * 8 + threadIdx.y; row < rows; row += 8 * gridDim.y) {
        long long start = (long long)row * width;
        load_pack(x + start, column, width, values);
        load_pack(grad + start, column, width, grads);
        for (int j = 0; j < PACK; j++) {
            dweight[j] += grads[j] * (values[j] - mean[row]) * rstd[row];
            dbias[j] += grads[j];
        }
    }
    for (int j = 0; j < PACK; j++) {
        of_thread[threadIdx.y][threadIdx.x][j] = dweight[j];
        of_thread[threadIdx.y][threadIdx.x][PACK + j] = dbias[j];
    }
    __syncthreads();
    if (threadIdx.y != 0) return;
    for (int j = 0; j < PACK; j++) {
        dweight[j] = dbias[j] = 0.0f;
        for (int y = 0; y < 8; y++) {
            dweight[j] += of_thread[y][threadIdx.x][j];
            dbias[j] += of_thread[y][threadIdx.x][PACK + j];
        }
    }
    float* out = partials + (long long)blockIdx.y * 2 * width;
    store_pack(out, column, width, dweight);
    store_pack(out + width, column, width, dbias);
}
