// Softmax cross-entropy of logits (N, V), and its gradient in the same launch.
//
// One block takes one row and reads it twice. First it finds the maximum and the sum of
// exponentials: each thread keeps its own, and rescales its sum when its maximum grows. Then it
// writes the gradient, softmax minus 1 at the target, possibly over the logits. With an odd V a row
// may begin at an unaligned address, so packs are counted from the last aligned address at or
// before it. The loss of a target that is not in the vocabulary is NaN.
//
// Rows are row_size long, of which only the first vocab_size elements are logits; the others get the
// gradient 0.

#include "common.cuh"

// A target to ignore.
constexpr long long IGNORE = -100;

// Block: any number of whole warps, grid: N. dlogits may be logits.
extern "C" __global__ void cross_entropy_forward(
    const Activation* logits, const long long* targets, Activation* dlogits, float* losses,
    int vocab_size, int row_size
) {
    long long start = (long long)blockIdx.x * row_size, target = targets[blockIdx.x];
    const Activation* row = logits + start;
    Activation* out = dlogits + start;
    int first = -int(reinterpret_cast<unsigned long long>(row) % 16 / sizeof(Activation));
    first += threadIdx.x * PACK;
    int stride = blockDim.x * PACK;
    float values[PACK];

    if (target == IGNORE) {
        for (float& value : values) value = 0.0f;
        for (int i = first; i < row_size; i += stride) store_pack(out, i, row_size, values);
        if (threadIdx.x == 0) losses[blockIdx.x] = 0.0f;
        return;
    }

    if (target < 0) target += vocab_size;  // -1 is the last, as everywhere in Python
    bool is_a_token = target >= 0 && target < vocab_size;

    float largest = -infinity(), total = 0.0f;
    for (int i = first; i < vocab_size; i += stride) {
        load_pack(row, i, vocab_size, values, -infinity());
        float before = largest;
        for (float value : values) largest = fmaxf(largest, value);
        if (largest == -infinity()) continue;
        total *= expf(before - largest);
        for (float value : values) total += expf(value - largest);
    }
    float of_row = over_block<Max>(largest);
    total = over_block<Sum>(largest == -infinity() ? 0.0f : total * expf(largest - of_row));

    // No thread has overwritten the target's logit yet: over_block above holds all of them
    // together.
    if (threadIdx.x == 0) {
        float at_target = is_a_token ? to_float(row[target]) : nan();
        losses[blockIdx.x] = logf(total) - (at_target - of_row);
    }
    __syncthreads();

    float factor = 1.0f / total;
    for (int i = first; i < row_size; i += stride) {
        load_pack(row, i, vocab_size, values, -infinity());
        for (int j = 0; j < PACK; j++) {
            values[j] = expf(values[j] - of_row) * factor - (i + j == target ? 1.0f : 0.0f);
        }
        store_pack(out, i, row_size, values);
    }
}

// ------------------------------------------------------------------------- the likeliest tokens

struct Lowest {
    __device__ static int identity() { return 0x7fffffff; }
    __device__ static int join(int a, int b) { return min(a, b); }
};

// The choice of greedy decoding, for each row of scores (N, V): the likeliest of the first `allowed`
// ids, the lowest where several are equally likely; the logarithm of its probability among all V;
// and whether all V scores are finite. They go to found (3, N). Block and grid as above.
extern "C" __global__ void likeliest(
    const float* scores, double* found, int rows, int vocab_size, int allowed
) {
    const float* row = scores + (long long)blockIdx.x * vocab_size;
    int first = -int(reinterpret_cast<unsigned long long>(row) % 16 / sizeof(float));
    float best = -infinity(), largest = -infinity(), total = 0.0f, values[PACK];
    int id = 0, unusable = 0;
    for (int i = first + threadIdx.x * PACK; i < vocab_size; i += blockDim.x * PACK) {
        load_pack(row, i, vocab_size, values, -infinity());
        float before = largest;
        for (int j = 0; j < PACK; j++) {
            bool inside = i + j >= 0 && i + j < vocab_size;
            unusable |= inside && !(fabsf(values[j]) < infinity());
            if (i + j < allowed && values[j] > best) best = values[j], id = i + j;
            largest = fmaxf(largest, values[j]);
        }
        if (largest == -infinity()) continue;
        total *= expf(before - largest);
        for (float value : values) total += expf(value - largest);
    }
    float of_row = over_block<Max>(largest), likeliest = over_block<Max>(best);
    total = over_block<Sum>(largest == -infinity() ? 0.0f : total * expf(largest - of_row));
    id = over_block<Lowest>(best == likeliest ? id : Lowest::identity());
    unusable = over_block<Sum>(unusable);
    if (threadIdx.x != 0) return;
    found[blockIdx.x] = id;
    found[rows + blockIdx.x] = likeliest - of_row - logf(total);
    found[2 * rows + blockIdx.x] = unusable == 0;
}
