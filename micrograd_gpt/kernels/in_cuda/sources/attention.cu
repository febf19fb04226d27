// Causal attention in memory that grows with T: no T × T matrix is ever stored.
//
// After FlashAttention-2 (Dao 2023, arXiv:2307.08691). A block owns ROWS queries (or keys) of one
// head, and loops over the keys (or queries) in tiles that pass through shared memory. Whenever a
// row's maximum grows, the forward rescales what it has summed so far. The backward computes the
// weights again from log_total, once for the queries' gradients and once for the keys' and values'.
// No block adds to what another one writes, so there are no atomics, and the bits are the same
// every time.
//
// Exponentials are computed by power(), to the base that suits the type of numbers; log_total is
// a natural logarithm.
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

#ifndef MINB
#define MINB 1
#endif

#ifndef UNR
#define UNR (TILE / STRIP)
#endif
// Goes through the tiles between `start` and `end`, the first of which is in buffers[0] or on its
// way there: load(buffer, start) loads one. Of each tile, use(buffer, part, start) is given STRIP
// rows at a time: those from `part` on, which stand at `start` of the whole. Where there are two
// buffers, a tile is copied while the one before it is in use.
template <class Tiles, class Load, class Use>
__device__ inline void for_each_strip(
    Tiles (&buffers)[BUFFERS], int start, int end, Load load, Use use
) {
    for (int turn = 0; start < end; start += TILE, turn ^= 1) {
        wait_for_copies();
        __syncthreads();  // this tile is there, and no thread still needs the one before
        bool more = start + TILE < end;
        if (BUFFERS == 2 && more) load(buffers[turn ^ 1], start + TILE);
#pragma unroll UNR
        for (int part = 0; part < TILE; part += STRIP) {
            use(buffers[turn % BUFFERS], part, start + part);
        }
        if (BUFFERS == 1) __syncthreads();
        if (BUFFERS == 1 && more) load(buffers[0], start + TILE);
    }
}

// The dropout factor of the weight with which query first_query + row sees key first_key + column,
// where the first ones are multiples of 16. Four weights, of two queries 8 apart and two keys 8
// apart, share a counter: on tensor cores one thread holds all four, and draws once.
__device__ inline float weight_dropout(
    int head, int first_query, int row, int first_key, int column, unsigned long long seed, float p
) {
    unsigned query = first_query + (row & ~8), key = first_key + (column & ~8);
    FourNumbers random = philox({key, query, unsigned(head), 0}, seed);
    unsigned upper = column & 8 ? random.words[1] : random.words[0];
    unsigned lower = column & 8 ? random.words[3] : random.words[2];
    return dropout_factor(row & 8 ? lower : upper, p);
}

// What flows back through dropout: nothing through a dropped weight, even where the gradient is
// infinite.
__device__ inline float dropped_gradient(float gradient, float factor) {
    return factor == 0.0f ? 0.0f : gradient * factor;
}

// Scores (queries, keys) of keys after the query become -infinity: row 0 sees keys 0 … `last`.
__device__ inline void hide_later(float (&scores)[HELD][COLUMNS], int last) {
#pragma unroll
    for (int r = 0; r < HELD; r++) {
        for (int c = 0; c < COLUMNS; c++) {
            if (column_of(c) > last + row_of(r)) scores[r][c] = -infinity();
        }
    }
}

// The same of scores (keys, queries): query `first` is the first that sees key 0.
__device__ inline void hide_earlier(float (&scores)[HELD][COLUMNS], int first) {
#pragma unroll
    for (int r = 0; r < HELD; r++) {
        for (int c = 0; c < COLUMNS; c++) {
            if (column_of(c) < first + row_of(r)) scores[r][c] = -infinity();
        }
    }
}

struct KeysAndValues {
    Tile keys, values;
};

// The last query stands at the last key. Where there are more keys than queries, the first ones
// come from a KV cache.
extern "C" __global__ void __launch_bounds__(THREADS, MINB) attention_forward(
    const Activation* q, const Activation* k, const Activation* v, Activation* out,
    float* log_total, int heads, int queries, int keys, long long q_batch, long long q_head,
    long long q_row, long long k_batch, long long k_head, long long k_row, float scale,
    unsigned long long seed, float p
) {
    __shared__ KeysAndValues buffers[BUFFERS];
    __shared__ RowsInShared q_shared;
    int batch = blockIdx.y / heads, head = blockIdx.y % heads;
    int first = (gridDim.x - 1 - blockIdx.x) * ROWS;  // the blocks with most to do start first
    int past = keys - queries, end = min(keys, past + first + ROWS);
    k += batch * k_batch + head * k_head;
    v += batch * k_batch + head * k_head;
    auto load = [&](KeysAndValues& tiles, int start) {
        load_tile(tiles.keys, k + start * k_row, k_row, keys - start);
        load_tile(tiles.values, v + start * k_row, k_row, keys - start);
    };
    load(buffers[0], 0);
    Rows q_rows = load_rows(
        q_shared, q + batch * q_batch + head * q_head + first * q_row, q_row, queries - first
    );

    float mixed[HELD][CHANNELS] = {}, largest[HELD], total[HELD] = {}, unit = scale * BASE;
    for (float& score : largest) score = -infinity();
    for_each_strip(buffers, 0, end, load, [&](const KeysAndValues& tiles, int part, int start) {
        int sees = past + first + first_row_of_warp() - start;  // the last key the first row sees
        if (sees + ROWS_PER_WARP <= 0) return;
        float weights[HELD][COLUMNS];
        multiply(q_rows, tiles.keys, part, weights);
        if (sees < STRIP - 1) hide_later(weights, past + first - start);
#pragma unroll
        for (int r = 0; r < HELD; r++) {
            float so_far = largest[r];
            for (float score : weights[r]) largest[r] = fmaxf(largest[r], score);
            largest[r] = over_lanes<Max>(largest[r], LANES_PER_ROW);
            float correction = power((so_far - largest[r]) * unit), taken_off = largest[r] * unit;
            total[r] *= correction;
            for (float& channel : mixed[r]) channel *= correction;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                weights[r][c] = power(weights[r][c] * unit - taken_off);
                total[r] += weights[r][c];
                if (DROPS) {
                    weights[r][c] *= weight_dropout(
                        blockIdx.y, first, row_of(r), start, column_of(c), seed, p
                    );
                }
            }
        }
        accumulate(mixed, weights, tiles.values, part);
    });

#pragma unroll
    for (int r = 0; r < HELD; r++) {
        int query = first + row_of(r);
        float sum = over_lanes<Sum>(total[r], LANES_PER_ROW);
        if (query >= queries) continue;
        Activation* row = out + (((long long)batch * queries + query) * heads + head) * HEAD_SIZE;
        store_row(row, mixed[r], 1.0f / sum);
        if (threadIdx.x % LANES_PER_ROW == 0) {
            log_total[(long long)blockIdx.y * queries + query] = largest[r] * scale + logf(sum);
        }
    }
}

// The sum of a · b over a row of each, HEAD_SIZE numbers, in all lanes that share the row.
__device__ inline float row_product(const Activation* a, const Activation* b) {
    float sum = 0.0f, of_a[PACK], of_b[PACK];
    int lane = threadIdx.x % LANES_PER_ROW;
#pragma unroll
    for (int i = lane * PACK; i < HEAD_SIZE; i += LANES_PER_ROW * PACK) {
        load_pack(a, i, HEAD_SIZE, of_a);
        load_pack(b, i, HEAD_SIZE, of_b);
        for (int j = 0; j < PACK; j++) sum += of_a[j] * of_b[j];
    }
    return over_lanes<Sum>(sum, LANES_PER_ROW);
}

// dq = dscores · k; each block has ROWS queries. Also writes delta, the sum of out * grad over each
// row, which the softmax's backward subtracts from the gradient of every weight. q, k, v share
// their strides, and dq, dk, dv theirs.
extern "C" __global__ void __launch_bounds__(THREADS, MINB) attention_backward_queries(
    const Activation* grad, const Activation* q, const Activation* k, const Activation* v,
    const Activation* out, const float* log_total, float* delta, Activation* dq, int heads,
    int length, long long batch_stride, long long head_stride, long long row_stride,
    long long d_batch, long long d_head, long long d_row, float scale, unsigned long long seed,
    float p
) {
    __shared__ KeysAndValues buffers[BUFFERS];
    __shared__ RowsInShared q_shared, grad_shared;
    int batch = blockIdx.y / heads, head = blockIdx.y % heads;
    int first = (gridDim.x - 1 - blockIdx.x) * ROWS;  // the blocks with most to do start first
    int end = min(length, first + ROWS);
    long long here = batch * batch_stride + head * head_stride;
    long long grad_row = (long long)heads * HEAD_SIZE, row_of_batch = (long long)batch * length;
    grad += row_of_batch * grad_row + head * HEAD_SIZE;
    out += row_of_batch * grad_row + head * HEAD_SIZE;
    auto load = [&](KeysAndValues& tiles, int start) {
        load_tile(tiles.keys, k + here + start * row_stride, row_stride, length - start);
        load_tile(tiles.values, v + here + start * row_stride, row_stride, length - start);
    };
    load(buffers[0], 0);
    Rows q_rows = load_rows(q_shared, q + here + first * row_stride, row_stride, length - first);
    Rows grad_rows = load_rows(grad_shared, grad + first * grad_row, grad_row, length - first);

    float sums[HELD][CHANNELS] = {}, log_sum[HELD], taken_off[HELD], unit = scale * BASE;
#pragma unroll
    for (int r = 0; r < HELD; r++) {
        int query = min(first + row_of(r), length - 1);  // what rows after the last get is not used
        long long row = (long long)blockIdx.y * length + query;
        log_sum[r] = log_total[row] * BASE;
        taken_off[r] = row_product(out + query * grad_row, grad + query * grad_row);
        if (threadIdx.x % LANES_PER_ROW == 0) delta[row] = taken_off[r];
    }
    for_each_strip(buffers, 0, end, load, [&](const KeysAndValues& tiles, int part, int start) {
        int sees = first + first_row_of_warp() - start;  // the last key the first row sees
        if (sees + ROWS_PER_WARP <= 0) return;
        float scores[HELD][COLUMNS], dweights[HELD][COLUMNS];
        multiply(q_rows, tiles.keys, part, scores);
        multiply(grad_rows, tiles.values, part, dweights);
        if (sees < STRIP - 1) hide_later(scores, first - start);
#pragma unroll
        for (int r = 0; r < HELD; r++) {
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                float weight = power(scores[r][c] * unit - log_sum[r]), dweight = dweights[r][c];
                if (DROPS) {
                    float factor = weight_dropout(
                        blockIdx.y, first, row_of(r), start, column_of(c), seed, p
                    );
                    dweight = dropped_gradient(dweight, factor);
                }
                scores[r][c] = weight * (dweight - taken_off[r]);
            }
        }
        accumulate(sums, scores, tiles.keys, part);
    });

    dq += batch * d_batch + head * d_head;
#pragma unroll
    for (int r = 0; r < HELD; r++) {
        int query = first + row_of(r);
        if (query < length) store_row(dq + query * d_row, sums[r], scale);
    }
}

struct QueriesAndGradients {
    Tile queries, grads;
    float log_totals[TILE], deltas[TILE];
};

// dk = dscoresᵀ · q and dv = weightsᵀ · grad; each block has ROWS keys and all queries that see
// them. Rows of queries after the last are zeros, and so is all that they add.
extern "C" __global__ void __launch_bounds__(THREADS, MINB) attention_backward_keys(
    const Activation* grad, const Activation* q, const Activation* k, const Activation* v,
    const float* log_total, const float* delta, Activation* dk, Activation* dv, int heads,
    int length, long long batch_stride, long long head_stride, long long row_stride,
    long long d_batch, long long d_head, long long d_row, float scale, unsigned long long seed,
    float p
) {
    __shared__ QueriesAndGradients buffers[BUFFERS];
    __shared__ RowsInShared k_shared, v_shared;
    int batch = blockIdx.y / heads, head = blockIdx.y % heads, first = blockIdx.x * ROWS;
    long long here = batch * batch_stride + head * head_stride;
    long long grad_row = (long long)heads * HEAD_SIZE;
    grad += (long long)batch * length * grad_row + head * HEAD_SIZE;
    log_total += (long long)blockIdx.y * length;
    delta += (long long)blockIdx.y * length;
    auto load = [&](QueriesAndGradients& tiles, int start) {
        load_tile(tiles.queries, q + here + start * row_stride, row_stride, length - start);
        load_tile(tiles.grads, grad + start * grad_row, grad_row, length - start);
        copy_numbers(tiles.log_totals, log_total + start, length - start);
        copy_numbers(tiles.deltas, delta + start, length - start);
    };
    int begin = first / TILE * TILE;
    load(buffers[0], begin);
    Rows k_rows = load_rows(k_shared, k + here + first * row_stride, row_stride, length - first);
    Rows v_rows = load_rows(v_shared, v + here + first * row_stride, row_stride, length - first);

    float dk_sums[HELD][CHANNELS] = {}, dv_sums[HELD][CHANNELS] = {}, unit = scale * BASE;
    for_each_strip(buffers, begin, length, load, [&](const QueriesAndGradients& tiles, int part, int start) {
        int seen_by = first + first_row_of_warp() - start;  // the first query that sees a key
        if (seen_by >= STRIP) return;
        float scores[HELD][COLUMNS], weights[HELD][COLUMNS];  // (keys, queries)
        multiply(k_rows, tiles.queries, part, scores);
        multiply(v_rows, tiles.grads, part, weights);  // these are the weights' gradients at first
        if (seen_by + ROWS_PER_WARP > 1) hide_earlier(scores, first - start);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            float log_sum = tiles.log_totals[part + column_of(c)] * BASE;
            float taken_off = tiles.deltas[part + column_of(c)];
#pragma unroll
            for (int r = 0; r < HELD; r++) {
                float weight = power(scores[r][c] * unit - log_sum), dweight = weights[r][c];
                weights[r][c] = weight;
                if (DROPS) {
                    float factor = weight_dropout(
                        blockIdx.y, start, column_of(c), first, row_of(r), seed, p
                    );
                    dweight = dropped_gradient(dweight, factor);
                    weights[r][c] *= factor;
                }
                scores[r][c] = weight * (dweight - taken_off);
            }
        }
        accumulate(dv_sums, weights, tiles.grads, part);
        accumulate(dk_sums, scores, tiles.queries, part);
    });

    dk += batch * d_batch + head * d_head;
    dv += batch * d_batch + head * d_head;
#pragma unroll
    for (int r = 0; r < HELD; r++) {
        int key = first + row_of(r);
        if (key >= length) continue;
        store_row(dk + key * d_row, dk_sums[r], scale);
        store_row(dv + key * d_row, dv_sums[r], 1.0f);
    }
}
