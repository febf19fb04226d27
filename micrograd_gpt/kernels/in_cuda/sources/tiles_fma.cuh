// Products of small matrices in shared memory with plain multiply-adds, float32.
//
// A block works on ROWS rows (-DROWS), with 16 threads to a pair of rows. Of their product with a
// tile, a thread holds two rows and every 16th column. tiles_mma.cuh offers the same functions on
// tensor cores.

#pragma once

constexpr int TILE = ROWS, STRIP = TILE, BUFFERS = 1;  // four tiles must fit 48 KB
constexpr int LANES_PER_ROW = 16, THREADS = ROWS / 2 * LANES_PER_ROW;
constexpr int HELD = 2;  // rows of a product in one thread
constexpr int ROWS_PER_WARP = WARP / LANES_PER_ROW * HELD;
constexpr int COLUMNS = STRIP / LANES_PER_ROW;  // of scores (ROWS, STRIP) in one thread, for each row
constexpr int CHANNELS = HEAD_SIZE / LANES_PER_ROW;  // of sums (ROWS, HEAD_SIZE) likewise

__device__ inline int first_row_of_warp() { return threadIdx.x / WARP * ROWS_PER_WARP; }
__device__ inline int row_of(int r) { return threadIdx.x / LANES_PER_ROW * HELD + r; }
__device__ inline int column_of(int c) { return threadIdx.x % LANES_PER_ROW + c * LANES_PER_ROW; }
__device__ inline int channel_of(int c) { return column_of(c); }

// Exponentials are powers of e, exact to the last bits.
constexpr float BASE = 1.0f;
__device__ inline float power(float logarithm) { return expf(logarithm); }

struct Tile {
    float at[TILE][HEAD_SIZE + 1];  // one more, so that a column is spread over banks
};
using RowsInShared = Tile;
using Rows = const Tile*;

__device__ inline void wait_for_copies() {}  // here a copy is made when it is asked for

__device__ inline void copy_numbers(float (&numbers)[TILE], const float* first, int count) {
    for (int i = threadIdx.x; i < TILE; i += THREADS) numbers[i] = i < count ? first[i] : 0.0f;
}

// Loads `count` rows from `first` on, `stride` elements apart, and zeros after them. Every row
// must start at a multiple of 16 bytes.
__device__ inline void load_tile(Tile& tile, const float* first, long long stride, int count) {
    constexpr int PACKS = HEAD_SIZE / PACK;
#pragma unroll
    for (int done = 0; done < TILE * PACKS; done += THREADS) {
        int i = done + threadIdx.x, row = i / PACKS, channel = i % PACKS * PACK;
        if (done + THREADS > TILE * PACKS && i >= TILE * PACKS) break;
        SixteenBytes values = {};
        if (row < count) {
            values = *reinterpret_cast<const SixteenBytes*>(first + row * int(stride) + channel);
        }
        for (int j = 0; j < PACK; j++) {
            tile.at[row][channel + j] = __uint_as_float(values.words[j]);
        }
    }
}

__device__ inline Rows load_rows(
    RowsInShared& shared, const float* first, long long stride, int count
) {
    load_tile(shared, first, stride, count);
    return &shared;  // the caller's next __syncthreads() makes it complete
}

// scores (ROWS, STRIP) = rows · stripᵀ, the strip being the rows of a tile from `part` on
__device__ inline void multiply(Rows rows, const Tile& tile, int part, float (&scores)[HELD][COLUMNS]) {
    for (int r = 0; r < HELD; r++) {
        for (float& score : scores[r]) score = 0.0f;
    }
    for (int channel = 0; channel < HEAD_SIZE; channel++) {
        float a[HELD] = {rows->at[row_of(0)][channel], rows->at[row_of(1)][channel]};
        for (int c = 0; c < COLUMNS; c++) {
            float b = tile.at[part + column_of(c)][channel];
            for (int r = 0; r < HELD; r++) scores[r][c] += a[r] * b;
        }
    }
}

// sums (ROWS, HEAD_SIZE) += weights (ROWS, STRIP) · strip. The threads of a row, which belong to one
// warp, exchange their weights through shared memory.
__device__ inline void accumulate(
    float (&sums)[HELD][CHANNELS], const float (&weights)[HELD][COLUMNS], const Tile& tile, int part
) {
    __shared__ float of_row[ROWS][STRIP];
    for (int r = 0; r < HELD; r++) {
        for (int c = 0; c < COLUMNS; c++) of_row[row_of(r)][column_of(c)] = weights[r][c];
    }
    __syncwarp();
    for (int j = 0; j < STRIP; j++) {
        float a[HELD] = {of_row[row_of(0)][j], of_row[row_of(1)][j]};
        for (int c = 0; c < CHANNELS; c++) {
            float b = tile.at[part + j][channel_of(c)];
            for (int r = 0; r < HELD; r++) sums[r][c] += a[r] * b;
        }
    }
    __syncwarp();  // of_row may be written again
}

// row[channel_of(c)] = values[c] * factor
__device__ inline void store_row(float* row, const float (&values)[CHANNELS], float factor) {
    for (int c = 0; c < CHANNELS; c++) row[channel_of(c)] = values[c] * factor;
}
