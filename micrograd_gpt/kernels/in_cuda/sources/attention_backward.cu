// The backward of causal attention. attention.cuh describes the arrays and the method.

constexpr bool BACKWARD = true;

#include "attention.cuh"

// What flows back through dropout: nothing through a dropped weight, even where the gradient is
// infinite.
__device__ inline float dropped_gradient(float gradient, float factor) {
    return factor == 0.0f ? 0.0f : gradient * factor;
}

// Scores (keys, queries) of queries before the key become -infinity: query `first` is the first that sees key 0.
__device__ inline void hide_earlier(float (&scores)[HELD][COLUMNS], int first) {
#pragma unroll
    for (int r = 0; r < HELD; r++) {
        for (int c = 0; c < COLUMNS; c++) {
            if (column_of(c) < first + row_of(r)) scores[r][c] = -infinity();
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
