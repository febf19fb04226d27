// Attention of one new token over all keys and values so far, each of which is read once: reading
// them sets the pace.
//
// One block takes one head. Eight neighbouring lanes share a key, each reading 16 bytes at a time.
// The block's 64 such groups take turns at the keys, each with a maximum, a sum and mixed values of
// its own, which are joined at the end, first within each warp. Shapes are those of attention.cu,
// with one query.

#include "common.cuh"
#include "packs.cuh"

constexpr int LANES = 8, WARPS = 16;  // 512 threads
constexpr int GROUPS = WARPS * WARP / LANES;
constexpr int PACKS = (HEAD_SIZE / PACK + LANES - 1) / LANES;  // of a key, in one lane

// Joins a value of each group of a warp; all of them get the result.
template <class How> __device__ inline float over_groups(float value) {
    for (int distance = LANES; distance < WARP; distance *= 2) {
        value = How::join(value, __shfl_xor_sync(ALL_LANES, value, distance));
    }
    return value;
}

// What sums with one maximum are multiplied by when the maximum is `largest`; 0 without any keys.
__device__ inline float correction(float maximum, float largest) {
    return maximum == -infinity() ? 0.0f : expf(maximum - largest);
}

// Attention of one query q over `keys` rows of k and v, k_row elements apart, into the D elements
// of out. Where log_total is not null, the log of the softmax's denominator is written there.
__device__ inline void attend(
    const Activation* q, const Activation* k, const Activation* v, Activation* out,
    float* log_total, int keys, long long k_row, float scale
) {
    __shared__ float maxima[WARPS], totals[WARPS], mixtures[WARPS][HEAD_SIZE];
    int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, warp = threadIdx.x / WARP;
    bool aligned = k_row % PACK == 0 && is_aligned(k) && is_aligned(v);
    float query[PACKS][PACK], mixed[PACKS][PACK] = {};
    for (int i = 0; i < PACKS; i++) load_pack(q, (i * LANES + lane) * PACK, HEAD_SIZE, query[i]);
    float largest = -infinity(), total = 0.0f;
    for (int start = 0; start < keys; start += GROUPS) {
        long long row = min(start + group, keys - 1) * k_row;  // without a key one must take part
        Pack key[PACKS], value[PACKS];
        for (int i = 0; i < PACKS; i++) {
            key[i].load(k + row, (i * LANES + lane) * PACK, HEAD_SIZE, aligned);
            value[i].load(v + row, (i * LANES + lane) * PACK, HEAD_SIZE, aligned);
        }
        float score = 0.0f;
        for (int i = 0; i < PACKS; i++) {
            for (int j = 0; j < PACK; j++) score += query[i][j] * key[i][j];
        }
        score = over_lanes<Sum>(score, LANES) * scale;
        if (start + group >= keys) continue;
        float so_far = largest;
        largest = fmaxf(largest, score);
        float factor = expf(so_far - largest), weight = expf(score - largest);
        total = total * factor + weight;
        for (int i = 0; i < PACKS; i++) {
            for (int j = 0; j < PACK; j++) {
                mixed[i][j] = mixed[i][j] * factor + weight * value[i][j];
            }
        }
    }

    float of_warp = over_groups<Max>(largest), factor = correction(largest, of_warp);
    total = over_groups<Sum>(total * factor);
    for (int i = 0; i < PACKS; i++) {
        for (float& value : mixed[i]) value = over_groups<Sum>(value * factor);
        if (threadIdx.x % WARP < LANES) {
            store_pack(mixtures[warp], (i * LANES + lane) * PACK, HEAD_SIZE, mixed[i]);
        }
    }
    if (threadIdx.x % WARP == 0) maxima[warp] = of_warp, totals[warp] = total;
    __syncthreads();
    largest = -infinity();
    total = 0.0f;
    for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, maxima[w]);
    for (int w = 0; w < WARPS; w++) total += totals[w] * correction(maxima[w], largest);
    for (int channel = threadIdx.x; channel < HEAD_SIZE; channel += LANES * GROUPS) {
        float sum = 0.0f;
        for (int w = 0; w < WARPS; w++) {
            sum += mixtures[w][channel] * correction(maxima[w], largest);
        }
        out[channel] = rounded<Activation>(sum / total);
    }
    if (log_total && threadIdx.x == 0) *log_total = largest + logf(total);
}

// Block: WARPS * WARP. Grid: B * H.
extern "C" __global__ void attention_decode(
    const Activation* q, const Activation* k, const Activation* v, Activation* out,
    float* log_total, int heads, int keys, long long q_batch, long long q_head, long long k_batch,
    long long k_head, long long k_row, float scale
) {
    int batch = blockIdx.x / heads, head = blockIdx.x % heads;
    long long here = batch * k_batch + head * k_head;
    q += batch * q_batch + head * q_head;
    out += (long long)blockIdx.x * HEAD_SIZE;
    attend(q, k + here, v + here, out, log_total + blockIdx.x, keys, k_row, scale);
}

// The same for new tokens' queries, keys and values (B, 3, H, D), over a cache that holds
// lengths[b] tokens in row b. First the new keys and values are written after those.
extern "C" __global__ void attention_token(
    const Activation* qkv, Activation* k, Activation* v, const long long* lengths, Activation* out,
    int heads, long long k_batch, long long k_head, long long k_row, float scale
) {
    int batch = blockIdx.x / heads, head = blockIdx.x % heads, width = heads * HEAD_SIZE;
    int length = int(lengths[batch]);
    const Activation* q = qkv + (long long)batch * 3 * width + head * HEAD_SIZE;
    k += batch * k_batch + head * k_head;
    v += batch * k_batch + head * k_head;
    for (int channel = threadIdx.x; channel < HEAD_SIZE; channel += LANES * GROUPS) {
        k[length * k_row + channel] = q[width + channel];
        v[length * k_row + channel] = q[2 * width + channel];
    }
    __syncthreads();
    out += (long long)blockIdx.x * HEAD_SIZE;
    attend(q, k, v, out, nullptr, length + 1, k_row, scale);
}
