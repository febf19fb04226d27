// Where a branch of a block meets the residual stream: the sum, the LayerNorm that reads it next,
// and the backward of both, each in one pass over the rows (N, C).
//
// One warp takes one row. Its lanes hold up to SPAN columns of it in registers, all of which they
// ask for before they need the first; of a wider row they read each part again, from the cache. The
// stream is float32; what goes into a product, and comes out of one, is of the activation type.

#include "common.cuh"

constexpr int FOUR = 4, HELD = 8, SPAN = HELD * WARP * FOUR;  // 1024 columns
constexpr int ROWS = 16;  // that a block of the backward takes

// Four neighbouring elements, which are loaded at once.
template <class T> struct alignas(FOUR * sizeof(T)) Four {
    T elements[FOUR];
};

// The first of the four columns that a lane holds as number `a`, of the SPAN columns from `start`.
__device__ inline int column_of(int start, int a) {
    return start + (a * WARP + int(threadIdx.x) % WARP) * FOUR;
}

// What a lane holds of a row; columns outside of it are 0.
template <class T> struct Held {
    Four<T> fours[HELD];

    __device__ static inline bool is_aligned(const T* row, int width) {
        return width % FOUR == 0 && reinterpret_cast<unsigned long long>(row) % sizeof(Four<T>) == 0;
    }

    __device__ inline void load(const T* row, int start, int width) {
        if (is_aligned(row, width)) {
#pragma unroll
            for (int a = 0; a < HELD; a++) {
                int i = column_of(start, a);
                fours[a] = i < width ? *reinterpret_cast<const Four<T>*>(row + i) : Four<T>{};
            }
        } else {
#pragma unroll
            for (int a = 0; a < HELD; a++) {
#pragma unroll
                for (int j = 0; j < FOUR; j++) {
                    int i = column_of(start, a) + j;
                    fours[a].elements[j] = i < width ? row[i] : T{};
                }
            }
        }
    }

    __device__ inline void store(T* row, int start, int width) const {
        if (is_aligned(row, width)) {
#pragma unroll
            for (int a = 0; a < HELD; a++) {
                int i = column_of(start, a);
                if (i < width) *reinterpret_cast<Four<T>*>(row + i) = fours[a];
            }
        } else {
#pragma unroll
            for (int a = 0; a < HELD; a++) {
#pragma unroll
                for (int j = 0; j < FOUR; j++) {
                    int i = column_of(start, a) + j;
                    if (i < width) row[i] = fours[a].elements[j];
                }
            }
        }
    }

    // Calls visit(element, place) for each element; `place` counts them.
    template <class Visit> __device__ inline void each(Visit visit) {
#pragma unroll
        for (int a = 0; a < HELD; a++) {
#pragma unroll
            for (int j = 0; j < FOUR; j++) visit(fours[a].elements[j], a, j);
        }
    }
};

// sum = x + branch, y = LayerNorm(sum). Block: any number of whole warps. Grid: enough for a warp a
// row.
extern "C" __global__ void add_and_normalise(
    const float* x, const Activation* branch, const float* weight, const float* bias, float* sum,
    Activation* y, float* mean, float* rstd, int rows, int width, float eps
) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    long long first = (long long)row * width;
    bool is_held = width <= SPAN;
    Held<float> values;

    float total = 0.0f;
    for (int start = 0; start < width; start += SPAN) {
        Held<Activation> added;
        values.load(x + first, start, width);
        added.load(branch + first, start, width);
        values.each([&](float& value, int a, int j) {
            value += to_float(added.fours[a].elements[j]);
            total += value;
        });
        values.store(sum + first, start, width);
    }
    float centre = over_lanes<Sum>(total) / width;

    // Once more with what the first mean leaves: a row of equal numbers becomes exactly 0.
    total = 0.0f;
    for (int start = 0; start < width; start += SPAN) {
        if (!is_held) values.load(sum + first, start, width);
        values.each([&](float value, int a, int j) {
            if (column_of(start, a) + j < width) total += value - centre;
        });
    }
    centre += over_lanes<Sum>(total) / width;

    float squares = 0.0f;
    for (int start = 0; start < width; start += SPAN) {
        if (!is_held) values.load(sum + first, start, width);
        values.each([&](float value, int a, int j) {
            if (column_of(start, a) + j < width) squares += (value - centre) * (value - centre);
        });
    }
    float scale_of_row = 1.0f / sqrtf(over_lanes<Sum>(squares) / width + eps);

    for (int start = 0; start < width; start += SPAN) {
        Held<float> scale, shift;
        Held<Activation> normed;
        if (!is_held) values.load(sum + first, start, width);
        scale.load(weight, start, width);
        shift.load(bias, start, width);
        values.each([&](float value, int a, int j) {
            value = (value - centre) * scale_of_row * scale.fours[a].elements[j];
            value += shift.fours[a].elements[j];
            normed.fours[a].elements[j] = rounded<Activation>(value);
        });
        normed.store(y + first, start, width);
    }
    if (lane == 0) mean[row] = centre, rstd[row] = scale_of_row;
}

// The gradient of the sum: `grad` (of y) through the LayerNorm, and `along` (of the sum itself).
//     dx = along + rstd * (dn - mean(dn) - n * mean(dn * n)), n = (x - mean) * rstd, dn = grad * weight
// A copy in the activation type goes to rounded_dx, unless that is null.
__device__ inline void row_backward(
    const Activation* grad, const float* x, const float* weight, float centre, float scale_of_row,
    const float* along, float* dx, Activation* rounded_dx, int width
) {
    bool is_held = width <= SPAN;
    Held<float> values, arriving;
    Held<Activation> grads;

    float along_one = 0.0f, along_normed = 0.0f;
    for (int start = 0; start < width; start += SPAN) {
        Held<float> scale;
        values.load(x, start, width);
        grads.load(grad, start, width);
        arriving.load(along, start, width);
        scale.load(weight, start, width);
        values.each([&](float value, int a, int j) {
            float dnormed = to_float(grads.fours[a].elements[j]) * scale.fours[a].elements[j];
            along_one += dnormed;
            along_normed += dnormed * (value - centre) * scale_of_row;
        });
    }
    along_one = over_lanes<Sum>(along_one) / width;
    along_normed = over_lanes<Sum>(along_normed) / width;

    for (int start = 0; start < width; start += SPAN) {
        Held<float> scale;
        if (!is_held) {
            values.load(x, start, width);
            grads.load(grad, start, width);
            arriving.load(along, start, width);
        }
        scale.load(weight, start, width);
        values.each([&](float& value, int a, int j) {
            float dnormed = to_float(grads.fours[a].elements[j]) * scale.fours[a].elements[j];
            float normed = (value - centre) * scale_of_row;
            value = scale_of_row * (dnormed - along_one - normed * along_normed);
            value += arriving.fours[a].elements[j];
            grads.fours[a].elements[j] = rounded<Activation>(value);
        });
        values.store(dx, start, width);
        if (rounded_dx) grads.store(rounded_dx, start, width);
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
    for (int row = first + int(threadIdx.x) / WARP; row < end; row += int(blockDim.x) / WARP) {
        long long start = (long long)row * width;
        row_backward(
            grad + start, x + start, weight, mean[row], rstd[row], along + start, dx + start,
            rounded_dx ? rounded_dx + start : nullptr, width
        );
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

// The sums of partials (parts, 2, C), in a fixed order: dweight (C) and dbias (C). There may be
// thousands of parts, so they are added in double. Block: 32 × 32; the 32 threads of a column take
// turns at the parts. Grid: 2C / 32.
extern "C" __global__ void sums_of_weight_and_bias(
    const float* partials, float* dweight, float* dbias, int parts, int width
) {
    __shared__ double of_thread[WARP][WARP];
    int column = blockIdx.x * WARP + threadIdx.x;
    double total = 0.0;
    if (column < 2 * width) {
        for (int part = threadIdx.y; part < parts; part += WARP) {
            total += partials[(long long)part * 2 * width + column];
        }
    }
    of_thread[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.y != 0 || column >= 2 * width) return;
    total = 0.0;
    for (int y = 0; y < WARP; y++) total += of_thread[y][threadIdx.x];
    (column < width ? dweight[column] : dbias[column - width]) = total;
}
