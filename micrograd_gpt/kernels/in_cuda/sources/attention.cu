// The forward of causal attention. attention.cuh describes the arrays and the method.

constexpr bool BACKWARD = false;

#include "attention.cuh"

// A row's weights are computed relative to one of its scores, at first the largest, and then until
// a score is so much larger that its weight would exceed power(SLACK). Then the row is rescaled.
constexpr float SLACK = 8.0f;

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

    float mixed[HELD][CHANNELS] = {}, total[HELD] = {}, reference[HELD], unit = scale * BASE;
    for (float& score : reference) score = -infinity();
    for_each_strip(buffers, 0, end, load, [&](const KeysAndValues& tiles, int part, int start) {
        int sees = past + first + first_row_of_warp() - start;  // the last key the first row sees
        if (sees + ROWS_PER_WARP <= 0) return;
        float weights[HELD][COLUMNS], largest[HELD];
        multiply(q_rows, tiles.keys, part, weights);
        if (sees < STRIP - 1) hide_later(weights, past + first - start);
        bool grows = false;
#pragma unroll
        for (int r = 0; r < HELD; r++) {
            largest[r] = reference[r];
            for (float score : weights[r]) largest[r] = fmaxf(largest[r], score);
            largest[r] = over_lanes<Max>(largest[r], LANES_PER_ROW);
            grows |= (largest[r] - reference[r]) * unit > SLACK;
        }
        if (__any_sync(ALL_LANES, grows)) {
#pragma unroll
            for (int r = 0; r < HELD; r++) {
                float correction = power((reference[r] - largest[r]) * unit);
                reference[r] = largest[r];
                total[r] *= correction;
                for (float& channel : mixed[r]) channel *= correction;
            }
        }
#pragma unroll
        for (int r = 0; r < HELD; r++) {
            float taken_off = reference[r] * unit;
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
            log_total[(long long)blockIdx.y * queries + query] = reference[r] * scale + logf(sum);
        }
    }
}
