// Where a branch of a block meets the residual stream: the sum, the LayerNorm that reads it next,
// and the backward of both, each in one pass over the rows (N, C).
//
// One warp takes one row. Its lanes hold up to SPAN columns of it in registers, all of which they
// ask for before they need the first; of a wider row they read each part again, from the cache. The
// stream is float32; what goes into a product, and comes out of one, is of the activation type.

#include "common.cuh"

constexpr int HELD = 8, FOUR = 4, SPAN = HELD * WARP * FOUR;  // 1024 columns
constexpr int ROWS = 16;  // that a block of the backward takes

// Four neighbouring elements as they lie in memory, loaded at once.
template <class T> struct alignas(FOUR * sizeof(T)) Four {
    unsigned words[sizeof(T)];
};
__device__ inline float element(const Four<float>& four, int j) {
    return __uint_as_float(four.words[j]);
}
__device__ inline void set(Four<float>& four, int j, float x) {
    four.words[j] = __float_as_uint(x);
}
template <class T> __device__ inline float element(const Four<T>& four, int j) {
    return to_float(T{(unsigned short)(four.words[j / 2] >> (j % 2 * 16))});
}
template <class T> __device__ inline void set(Four<T>& four, int j, float x) {
    unsigned bits = rounded<T>(x).bits, kept = four.words[j / 2] & (j % 2 ? 0xffffu : 0xffff0000u);
    four.words[j / 2] = kept | bits << (j % 2 * 16);
}

// Columns i … i + 3 of a row; those outside of it read as 0. ALIGNED says that every row can be
// loaded and stored four elements at a time, to its end.
template <bool ALIGNED, class T>
__device__ inline Four<T> load_four(const T* row, int i, int width) {
    Four<T> four = {};
    if (ALIGNED) {
        if (i < width) four = *reinterpret_cast<const Four<T>*>(row + i);
    } else {
        for (int j = 0; j < FOUR; j++) {
            if (i + j < width) set(four, j, to_float(row[i + j]));
        }
    }
    return four;
}
template <bool ALIGNED, class T>
__device__ inline void store_four(T* row, int i, int width, const Four<T>& four) {
    if (ALIGNED) {
        if (i < width) *reinterpret_cast<Four<T>*>(row + i) = four;
    } else {
        for (int j = 0; j < FOUR; j++) {
            if (i + j < width) row[i + j] = rounded<T>(element(four, j));
        }
    }
}

// The first of the columns that a lane holds as its four number `a`, of the SPAN from `start` on.
__device__ inline int column_of(int start, int a) {
    return start + (a * WARP + int(threadIdx.x) % WARP) * FOUR;
}

template <class... Pointers> __device__ inline bool are_aligned(int width, Pointers... arrays) {
    return width % FOUR == 0 && (is_aligned(arrays) && ...);
}

// ------------------------------------------------------------------------------------- forward

template <bool ALIGNED> __device__ inline void row_forward(
    const float* x, const Activation* branch, const float* weight, const float* bias, float* sum,
    Activation* y, float& mean, float& rstd, int width, float eps
) {
    bool is_held = width <= SPAN;
    Four<float> values[HELD];
    Four<Activation> added[HELD];

    float total = 0.0f;
    for (int start = 0; start < width; start += SPAN) {
#pragma unroll
        for (int a = 0; a < HELD; a++) {
            values[a] = load_four<ALIGNED>(x, column_of(start, a), width);
            added[a] = load_four<ALIGNED>(branch, column_of(start, a), width);
        }
#pragma unroll
        for (int a = 0; a < HELD; a++) {
            for (int j = 0; j < FOUR; j++) {
                float value = element(values[a], j) + element(added[a], j);
                set(values[a], j, value);
                total += value;
            }
            store_four<ALIGNED>(sum, column_of(start, a), width, values[a]);
        }
    }
    float centre = over_lanes<Sum>(total) / width;

    // Once more with what the first mean leaves: a row of equal numbers becomes exactly 0.
    total = 0.0f;
    for (int start = 0; start < width; start += SPAN) {
#pragma unroll
        for (int a = 0; a < HELD; a++) {
            int i = column_of(start, a);
            if (!is_held) values[a] = load_four<ALIGNED>(sum, i, width);
            for (int j = 0; j < FOUR; j++) {
                total += i + j < width ? element(values[a], j) - centre : 0.0f;
            }
        }
    }
    centre += over_lanes<Sum>(total) / width;

    float squares = 0.0f;
    for (int start = 0; start < width; start += SPAN) {
#pragma unroll
        for (int a = 0; a < HELD; a++) {
            int i = column_of(start, a);
            if (!is_held) values[a] = load_four<ALIGNED>(sum, i, width);
            for (int j = 0; j < FOUR; j++) {
                float value = i + j < width ? element(values[a], j) - centre : 0.0f;
                squares += value * value;
            }
        }
    }
    float scale_of_row = 1.0f / sqrtf(over_lanes<Sum>(squares) / width + eps);

    for (int start = 0; start < width; start += SPAN) {
#pragma unroll
        for (int a = 0; a < HELD; a++) {
            int i = column_of(start, a);
            if (!is_held) values[a] = load_four<ALIGNED>(sum, i, width);
            Four<float> scale = load_four<ALIGNED>(weight, i, width);
            Four<float> shift = load_four<ALIGNED>(bias, i, width);
            Four<Activation> normed = {};
            for (int j = 0; j < FOUR; j++) {
                float value = (element(values[a], j) - centre) * scale_of_row * element(scale, j);
                set(normed, j, value + element(shift, j));
            }
            store_four<ALIGNED>(y, i, width, normed);
        }
    }
    mean = centre, rstd = scale_of_row;
}

// sum = x + branch, y = LayerNorm(sum). Block: 256. Grid: enough for a warp a row.
extern "C" __global__ void __launch_bounds__(256, 2) add_and_normalise(
    const float* x, const Activation* branch, const float* weight, const float* bias, float* sum,
    Activation* y, float* mean, float* rstd, int rows, int width, float eps
) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    bool aligned = are_aligned(width, x, branch, weight, bias, sum, y);
    long long first = (long long)row * width;
    x += first, branch += first, sum += first, y += first;
    float centre, scale_of_row;
    if (aligned) {
        row_forward<true>(x, branch, weight, bias, sum, y, centre, scale_of_row, width, eps);
    } else {
        row_forward<false>(x, branch, weight, bias, sum, y, centre, scale_of_row, width, eps);
    }
    if (lane == 0) mean[row] = centre, rstd[row] = scale_of_row;
}

// ------------------------------------------------------------------------------------ backward

// The gradient of the sum: `grad` (of y) through the LayerNorm, and `along` (of the sum itself).
//     dx = along + rstd * (dn - mean(dn) - n * mean(dn * n)), n = (x - mean) * rstd, dn = grad * weight
// A copy in the activation type goes to rounded_dx.
template <bool ALIGNED> __device__ inline void row_backward(
    const Activation* grad, const float* x, const float* weight, const float* mean,
    const float* rstd, const float* along, float* dx, Activation* rounded_dx, int row, int width
) {
    long long first = (long long)row * width;
    grad += first, x += first, along += first, dx += first, rounded_dx += first;
    float centre = mean[row], scale_of_row = rstd[row];
    bool is_held = width <= SPAN;
    Four<float> values[HELD], arriving[HELD];
    Four<Activation> grads[HELD];

    float along_one = 0.0f, along_normed = 0.0f;
    for (int start = 0; start < width; start += SPAN) {
#pragma unroll
        for (int a = 0; a < HELD; a++) {
            int i = column_of(start, a);
            values[a] = load_four<ALIGNED>(x, i, width);
            grads[a] = load_four<ALIGNED>(grad, i, width);
            arriving[a] = load_four<ALIGNED>(along, i, width);
        }
#pragma unroll
        for (int a = 0; a < HELD; a++) {
            Four<float> scale = load_four<ALIGNED>(weight, column_of(start, a), width);
            for (int j = 0; j < FOUR; j++) {
                float dnormed = element(grads[a], j) * element(scale, j);
                along_one += dnormed;
                along_normed += dnormed * (element(values[a], j) - centre) * scale_of_row;
            }
        }
    }
    along_one = over_lanes<Sum>(along_one) / width;
    along_normed = over_lanes<Sum>(along_normed) / width;

    for (int start = 0; start < width; start += SPAN) {
#pragma unroll
        for (int a = 0; a < HELD; a++) {
            int i = column_of(start, a);
            if (!is_held) {
                values[a] = load_four<ALIGNED>(x, i, width);
                grads[a] = load_four<ALIGNED>(grad, i, width);
                arriving[a] = load_four<ALIGNED>(along, i, width);
            }
            Four<float> scale = load_four<ALIGNED>(weight, i, width);
            for (int j = 0; j < FOUR; j++) {
                float dnormed = element(grads[a], j) * element(scale, j);
                float normed = (element(values[a], j) - centre) * scale_of_row;
                float value = scale_of_row * (dnormed - along_one - normed * along_normed);
                value += element(arriving[a], j);
                set(values[a], j, value);
                set(grads[a], j, value);
            }
            store_four<ALIGNED>(dx, i, width, values[a]);
            store_four<ALIGNED>(rounded_dx, i, width, grads[a]);
        }
    }
}

// The backward of the rows, as above, and of the weight and bias: each block adds up its ROWS rows,
// which it then finds in the cache, into its part of partials (gridDim.x, 2, C): grad * n, and grad.
// Block: 256. Grid: N / ROWS.
extern "C" __global__ void __launch_bounds__(256, 2) add_and_normalise_backward(
    const Activation* grad, const float* x, const float* weight, const float* mean,
    const float* rstd, const float* along, float* dx, Activation* rounded_dx, float* partials,
    int rows, int width
) {
    int first = blockIdx.x * ROWS, end = min(first + ROWS, rows);
    bool aligned = are_aligned(width, grad, x, weight, along, dx, rounded_dx);
    for (int row = first + int(threadIdx.x) / WARP; row < end; row += int(blockDim.x) / WARP) {
        if (aligned) {
            row_backward<true>(grad, x, weight, mean, rstd, along, dx, rounded_dx, row, width);
        } else {
            row_backward<false>(grad, x, weight, mean, rstd, along, dx, rounded_dx, row, width);
        }
    }
    float* out = partials + (long long)blockIdx.x * 2 * width;
    for (int column = threadIdx.x; column < width; column += blockDim.x) {
        float dweight = 0.0f, dbias = 0.0f;
#pragma unroll 8
        for (int row = first; row < end; row++) {
            long long i = (long long)row * width + column;
            float value = to_float(grad[i]);
            dweight += value * (x[i] - mean[row]) * rstd[row];
            dbias += value;
        }
        out[column] = dweight;
        out[width + column] = dbias;
    }
}
