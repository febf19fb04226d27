// Causal attention in memory that grows with T: no T × T matrix is ever stored.
//
// After FlashAttention-2 (Dao 2023, arXiv:2307.08691). A block owns ROWS queries (or keys) of one
// head, and loops over the keys (or queries) in tiles that pass through shared memory. Whenever a
// row's maximum grows, the forward rescales what it has summed so far. The backward computes the
// weights again from log_total, once for the queries' gradients and once for the keys' and values'.
// No block adds to what another one writes, so there are no atomics, and the bits are the same
// every time.
//
// q, k, v are (B, H, T, D) with strides given in elements; a row's D values have no gaps, and each
// row starts at a multiple of 16 bytes. out and grad are (B, T, H, D), and
// log_total and delta are (B, H, T).
// The host chooses ROWS (-DROWS). Block: THREADS. Grid: (rows / ROWS, B * H).

#include "common.cuh"
#include "random.cuh"

constexpr bool DROPS = DROPOUT;  // if false, the kernels are compiled without the code that draws

#ifndef ACTIVATION_IS_FLOAT
#include "tiles_mma.cuh"
#elif defined(TF32)
#include "tiles_tf32.cuh"
#else
#include "tiles_fma.cuh"
#endif

// The dropout factor of the weight with which `query` sees `key`: word key % 4 of counter key / 4.
__device__ inline float weight_dropout(
    int head, int query, int key, unsigned long long seed, float p
) {
    FourNumbers random = philox({unsigned(key / 4), unsigned(query), unsigned(head), 0}, seed);
    unsigned* words = random.words;
    unsigned number = key % 4 < 2 ? (key % 2 ? words[1] : words[0]) : (key % 2 ? words[3] : words[2]);
    return dropout_factor(number, p);
}

// What flows back through dropout: nothing through a dropped weight, even where the gradient is
// infinite.
__device__ inline float dropped_gradient(float gradient, float factor) {
    return factor == 0.0f ? 0.0f : gradient * factor;
}

// The last query stands at the last key. Where there are more keys than queries, the first ones
// come from a KV cache.
extern "C" __global__ void attention_forward(
    const Activation* q, const Activation* k, const Activation* v, Activation* out,
    float* log_total, int heads, int queries, int keys, long long q_batch, long long q_head,
    long long q_row, long long k_batch, long long k_head, long long k_row, float scale,
    unsigned long long seed, float p
) {
    __shared__ Tile k_tile, v_tile;
    __shared__ RowsInShared q_shared;
    int batch = blockIdx.y / heads, head = blockIdx.y % heads, first = blockIdx.x * ROWS;
    int past = keys - queries, end = min(keys, past + first + ROWS);
    k += batch * k_batch + head * k_head;
    v += batch * k_batch + head * k_head;
    Rows q_rows = load_rows(
        q_shared, q + batch * q_batch + head * q_head + first * q_row, q_row, queries - first
    );

    float mixed[2][CHANNELS] = {}, largest[2] = {-infinity(), -infinity()}, total[2] = {};
    for (int start = 0; start < end; start += TILE) {
        __syncthreads();  // all threads are done with the last tiles
        load_tile(k_tile, k + start * k_row, k_row, keys - start);
        load_tile(v_tile, v + start * k_row, k_row, keys - start);
        __syncthreads();
        float weights[2][COLUMNS];
        multiply(q_rows, k_tile, weights);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int query = first + row_of(r);
            float so_far = largest[r];
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                int key = start + column_of(c);
                bool seen = key <= past + query && key < keys;
                weights[r][c] = seen ? weights[r][c] * scale : -infinity();
                largest[r] = fmaxf(largest[r], weights[r][c]);
            }
            largest[r] = over_lanes<Max>(largest[r], LANES_PER_ROW);
            float correction = expf(so_far - largest[r]);
            total[r] *= correction;
            for (float& channel : mixed[r]) channel *= correction;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                weights[r][c] = expf(weights[r][c] - largest[r]);
                total[r] += weights[r][c];
                if (DROPS) {
                    int key = start + column_of(c);
                    weights[r][c] *= weight_dropout(blockIdx.y, query, key, seed, p);
                }
            }
        }
        accumulate(mixed, weights, v_tile);
    }

#pragma unroll
    for (int r = 0; r < 2; r++) {
        int query = first + row_of(r);
        float sum = over_lanes<Sum>(total[r], LANES_PER_ROW);
        if (query >= queries) continue;
        Activation* row = out + (((long long)batch * queries + query) * heads + head) * HEAD_SIZE;
        for (int c = 0; c < CHANNELS; c++) {
            row[channel_of(c)] = rounded<Activation>(mixed[r][c] / sum);
        }
        if (threadIdx.x % LANES_PER_ROW == 0) {
            log_total[(long long)blockIdx.y * queries + query] = largest[r] + logf(sum);
        }
    }
}

// delta = the sum of out * grad over each row, which the softmax's backward subtracts from the
// gradient of every weight. One warp takes one row (b, t, h). Grid: enough for B * T * H warps.
extern "C" __global__ void attention_delta(
    const Activation* out, const Activation* grad, float* delta, int heads, int queries, int rows
) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    float values[PACK], grads[PACK], sum = 0.0f;
    for (int i = lane * PACK; i < HEAD_SIZE; i += WARP * PACK) {
        load_pack(out + (long long)row * HEAD_SIZE, i, HEAD_SIZE, values);
        load_pack(grad + (long long)row * HEAD_SIZE, i, HEAD_SIZE, grads);
        for (int j = 0; j < PACK; j++) sum += values[j] * grads[j];
    }
    sum = over_lanes<Sum>(sum);
    int head = row % heads, query = row / heads % queries, batch = row / heads / queries;
    if (lane == 0) delta[((long long)batch * heads + head) * queries + query] = sum;
}

// dq = dscores · k; each block has ROWS queries. q, k, v share their strides, and dq, dk, dv
// theirs.
extern "C" __global__ void attention_backward_queries(
    const Activation* grad, const Activation* q, const Activation* k, const Activation* v,
    const float* log_total, const float* delta, Activation* dq, int heads, int length,
    long long batch_stride, long long head_stride, long long row_stride, long long d_batch,
    long long d_head, long long d_row, float scale, unsigned long long seed, float p
) {
    __shared__ Tile k_tile, v_tile;
    __shared__ RowsInShared q_shared, grad_shared;
    int batch = blockIdx.y / heads, head = blockIdx.y % heads, first = blockIdx.x * ROWS;
    long long here = batch * batch_stride + head * head_stride;
    long long grad_row = (long long)heads * HEAD_SIZE;
    grad += (long long)batch * length * grad_row + head * HEAD_SIZE;
    Rows q_rows = load_rows(q_shared, q + here + first * row_stride, row_stride, length - first);
    Rows grad_rows = load_rows(grad_shared, grad + first * grad_row, grad_row, length - first);

    float sums[2][CHANNELS] = {};
    int end = min(length, first + ROWS);
    for (int start = 0; start < end; start += TILE) {
        __syncthreads();
        load_tile(k_tile, k + here + start * row_stride, row_stride, length - start);
        load_tile(v_tile, v + here + start * row_stride, row_stride, length - start);
        __syncthreads();
        float scores[2][COLUMNS], dweights[2][COLUMNS];
        multiply(q_rows, k_tile, scores);
        multiply(grad_rows, v_tile, dweights);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int query = first + row_of(r);
            long long row = (long long)blockIdx.y * length + query;
            float log_sum = query < length ? log_total[row] : 0.0f;
            float taken_off = query < length ? delta[row] : 0.0f;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                int key = start + column_of(c);
                bool seen = key <= query && query < length;
                float weight = seen ? expf(scores[r][c] * scale - log_sum) : 0.0f;
                float factor = DROPS ? weight_dropout(blockIdx.y, query, key, seed, p) : 1.0f;
                float dweight = dropped_gradient(dweights[r][c], factor);
                scores[r][c] = weight * (dweight - taken_off) * scale;
            }
        }
        accumulate(sums, scores, k_tile);
    }

    dq += batch * d_batch + head * d_head;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int query = first + row_of(r);
        if (query >= length) continue;
        for (int c = 0; c < CHANNELS; c++) {
            dq[query * d_row + channel_of(c)] = rounded<Activation>(sums[r][c]);
        }
    }
}

// dk = dscoresᵀ · q and dv = weightsᵀ · grad; each block has ROWS keys and all queries that see
// them.
extern "C" __global__ void attention_backward_keys(
    const Activation* grad, const Activation* q, const Activation* k, const Activation* v,
    const float* log_total, const float* delta, Activation* dk, Activation* dv, int heads,
    int length, long long batch_stride, long long head_stride, long long row_stride,
    long long d_batch, long long d_head, long long d_row, float scale, unsigned long long seed,
    float p
) {
    __shared__ Tile q_tile, grad_tile;
    __shared__ RowsInShared k_shared, v_shared;
    int batch = blockIdx.y / heads, head = blockIdx.y % heads, first = blockIdx.x * ROWS;
    long long here = batch * batch_stride + head * head_stride;
    long long grad_row = (long long)heads * HEAD_SIZE;
    grad += (long long)batch * length * grad_row + head * HEAD_SIZE;
    Rows k_rows = load_rows(k_shared, k + here + first * row_stride, row_stride, length - first);
    Rows v_rows = load_rows(v_shared, v + here + first * row_stride, row_stride, length - first);

    float dk_sums[2][CHANNELS] = {}, dv_sums[2][CHANNELS] = {};
    for (int start = first / TILE * TILE; start < length; start += TILE) {
        __syncthreads();
        load_tile(q_tile, q + here + start * row_stride, row_stride, length - start);
        load_tile(grad_tile, grad + start * grad_row, grad_row, length - start);
        __syncthreads();
        float scores[2][COLUMNS], weights[2][COLUMNS];  // (keys, queries)
        multiply(k_rows, q_tile, scores);
        multiply(v_rows, grad_tile, weights);  // these are the weights' gradients at first
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            int query = start + column_of(c);
            long long row = (long long)blockIdx.y * length + query;
            float log_sum = query < length ? log_total[row] : 0.0f;
            float taken_off = query < length ? delta[row] : 0.0f;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int key = first + row_of(r);
                bool seen = key <= query && query < length;
                float weight = seen ? expf(scores[r][c] * scale - log_sum) : 0.0f;
                float factor = DROPS ? weight_dropout(blockIdx.y, query, key, seed, p) : 1.0f;
                float dweight = dropped_gradient(weights[r][c], factor);
                scores[r][c] = weight * (dweight - taken_off) * scale;
                weights[r][c] = weight * factor;
            }
        }
        accumulate(dv_sums, weights, grad_tile);
        accumulate(dk_sums, scores, q_tile);
    }

    dk += batch * d_batch + head * d_head;
    dv += batch * d_batch + head * d_head;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int key = first + row_of(r);
        if (key >= length) continue;
        for (int c = 0; c < CHANNELS; c++) {
            dk[key * d_row + channel_of(c)] = rounded<Activation>(dk_sums[r][c]);
            dv[key * d_row + channel_of(c)] = rounded<Activation>(dv_sums[r][c]);
        }
    }
}
