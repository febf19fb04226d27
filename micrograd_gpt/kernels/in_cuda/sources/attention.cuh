// Causal attention in memory that grows with T: no T × T matrix is ever stored.
//
// After FlashAttention-2 (Dao 2023, arXiv:2307.08691). A block owns ROWS queries (or keys) of one
// head, and loops over the keys (or queries) in tiles that pass through shared memory. Whenever a
// row's maximum has grown much, the forward rescales what it has summed so far. The backward
// computes the weights again from log_total, once for the queries' gradients and once for the keys'
// and values'.
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

#pragma once

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

// Scores (queries, keys) of keys after the query become -infinity: row 0 sees keys 0 … `last`.
__device__ inline void hide_later(float (&scores)[HELD][COLUMNS], int last) {
#pragma unroll
    for (int r = 0; r < HELD; r++) {
        for (int c = 0; c < COLUMNS; c++) {
            if (column_of(c) > last + row_of(r)) scores[r][c] = -infinity();
        }
    }
}

struct KeysAndValues {
    Tile keys, values;
};
