// Attention of one new token over all keys and values so far, each of which is read once: reading
// them sets the pace.
//
// One block takes one head. Eight neighbouring lanes share a key, each reading 16 bytes at a time.
// The block's 16 such groups take turns at the keys, each with a maximum, a sum and mixed values of
// its own, which are joined at the end. Shapes are those of attention.cu, with one query.

#include "common.cuh"

constexpr int LANES = 8, GROUPS = 16;  // 128 threads
constexpr int PACKS = (HEAD_SIZE / PACK + LANES - 1) / LANES;  // of a key, in one lane

// Attention of one query q over `keys` rows of k and v, k_row elements apart, into the D elements
// of out. Where log_total is not null, the log of the softmax's denominator is written there.
__device__ inline void attend(
    const Activation* q, const Activation* k, const Activation* v, Activation* out,
    float* log_total, int keys, long long k_row, float scale
) {
    __shared__ float maxima[GROUPS], totals[GROUPS], mixtures[GROUPS][HEAD_SIZE];
    int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    float query[PACKS][PACK], mixed[PACKS][PACK] = {}, values[PACK];
    for (int i = 0; i < PACKS; i++) load_pack(q, (i * LANES + lane) * PACK, HEAD_SIZE, query[i]);
    float largest = -infinity(), total = 0.0f;
    for (int start = 0; start < keys; start += GROUPS) {
        int key = min(start + group, keys - 1);  // a group without a key must still take part
        float score = 0.0f;
        for (int i = 0; i < PACKS; i++) {
            load_pack(k + key * k_row, (i * LANES + lane) * PACK, HEAD_SIZE, values);
            for (int j = 0; j < PACK; j++) score += query[i][j] * values[j];
        }
        score = over_lanes<Sum>(score, LANES) * scale;
        if (start + group >= keys) continue;
        float so_far = largest;
        largest = fmaxf(largest, score);
        float correction = expf(so_far - largest), weight = expf(score - largest);
        total = total * correction + weight;
        for (int i = 0; i < PACKS; i++) {
            load_pack(v + key * k_row, (i * LANES + lane) * PACK, HEAD_SIZE, values);
            for (int j = 0; j < PACK; j++) mixed[i][j] = mixed[i][j] * correction + weight * values[j];
        }
    }

    if (lane == 0) maxima[group] = largest, totals[group] = total;
    for (int i = 0; i < PACKS; i++) {
        store_pack(mixtures[group], (i * LANES + lane) * PACK, HEAD_SIZE, mixed[i]);
    }
    __syncthreads();
    largest = -infinity();
    total = 0.0f;
    for (int g = 0; g < GROUPS; g++) largest = fmaxf(largest, maxima[g]);
    for (int g = 0; g < GROUPS; g++) total += totals[g] * expf(maxima[g] - largest);
    for (int channel = threadIdx.x; channel < HEAD_SIZE; channel += LANES * GROUPS) {
        float sum = 0.0f;
        for (int g = 0; g < GROUPS; g++) sum += mixtures[g][channel] * expf(maxima[g] - largest);
        out[channel] = rounded<Activation>(sum / total);
    }
    if (log_total && threadIdx.x == 0) *log_total = largest + logf(total);
}

// Block: LANES * GROUPS. Grid: B * H.
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
