// Products of small matrices on tensor cores: mma.sync m16n8k8, float32 rounded to TF32 (8 bits of
// exponent, 11 of precision), float32 sums. Used only where TF32 is asked for; tiles_fma.cuh does
// not round.
//
// A block works on ROWS rows (-DROWS), a warp on 16 of them. The PTX ISA says which lane holds what
// ("Matrix Fragments for mma.m16n8k8"): lane = 4 g + t holds
//     of A (16 × 8)   (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//     of B (8 × 8)    (t, g), (t + 4, g)
//     of C (16 × 8)   rows g and g + 8, columns 2t, 2t + 1

#pragma once

constexpr int FRAGMENTS = 1, BUFFERS = 1;
constexpr int TILE = 32, STRIP = TILE;  // with more, the backward of 128 channels lacks registers
#include "fragments.cuh"

struct Tile {
    // In TF32. With four words more to a row, both products read 32 different banks at a time
    alignas(16) unsigned at[TILE][HEAD_SIZE + 4];
};
struct RowsInShared {};  // they are in registers
struct Rows {
    unsigned words[HEAD_SIZE / 8][4];  // A's fragments, 8 channels each
};

// These are written in PTX; tests/cuda_on_cpu defines the same for a CPU.
#ifdef CUDA_ON_CPU
unsigned to_tf32(float x);
void mma(float& d0, float& d1, float& d2, float& d3, const unsigned (&a)[4], unsigned b0, unsigned b1);
#else
__device__ inline unsigned to_tf32(float x) {
    unsigned result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
    return result;
}
// D (16 × 8) += A (16 × 8) · B (8 × 8)
__device__ inline void mma(
    float& d0, float& d1, float& d2, float& d3, const unsigned (&a)[4], unsigned b0, unsigned b1
) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

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
        for (unsigned& word : values.words) word = to_tf32(__uint_as_float(word));
        *reinterpret_cast<SixteenBytes*>(&tile.at[row][channel]) = values;
    }
}

__device__ inline Rows load_rows(RowsInShared&, const float* first, long long stride, int count) {
    Rows rows;
    for (int k = 0; k < HEAD_SIZE / 8; k++) {
        for (int i = 0; i < 4; i++) {
            int row = row_of(i % 2), channel = k * 8 + i / 2 * 4 + lane_of() % 4;
            rows.words[k][i] = row < count ? to_tf32(first[row * stride + channel]) : 0;
        }
    }
    return rows;
}

// scores (ROWS, STRIP) = rows · stripᵀ, the strip being the rows of a tile from `part` on
__device__ inline void multiply(const Rows& rows, const Tile& tile, int part, float (&scores)[HELD][COLUMNS]) {
    for (int r = 0; r < HELD; r++) {
        for (float& score : scores[r]) score = 0.0f;
    }
    int row = lane_of() / 4, channel = lane_of() % 4;
    for (int k = 0; k < HEAD_SIZE / 8; k++) {
        for (int n = 0; n < STRIP / 8; n++) {
            float* upper = scores[0] + 2 * n;
            float* lower = scores[1] + 2 * n;
            const unsigned* b = &tile.at[part + n * 8 + row][k * 8 + channel];
            mma(upper[0], upper[1], lower[0], lower[1], rows.words[k], b[0], b[4]);
        }
    }
}

// sums (ROWS, HEAD_SIZE) += weights (ROWS, STRIP) · strip. A sum over eight rows of the tile may go
// in any order. So the weights for rows 2t and 2t + 1, which a lane holds as C, become columns t
// and t + 4 of A, and B's rows are permuted likewise.
__device__ inline void accumulate(
    float (&sums)[HELD][CHANNELS], const float (&weights)[HELD][COLUMNS], const Tile& tile, int part
) {
    int row = lane_of() % 4 * 2, channel = lane_of() / 4;
    for (int k = 0; k < STRIP / 8; k++) {
        const float* upper = weights[0] + 2 * k;
        const float* lower = weights[1] + 2 * k;
        unsigned a[4] = {to_tf32(upper[0]), to_tf32(lower[0]), to_tf32(upper[1]), to_tf32(lower[1])};
        for (int n = 0; n < HEAD_SIZE / 8; n++) {
            float* top = sums[0] + 2 * n;
            float* bottom = sums[1] + 2 * n;
            unsigned b0 = tile.at[part + k * 8 + row][n * 8 + channel];
            unsigned b1 = tile.at[part + k * 8 + row + 1][n * 8 + channel];
            mma(top[0], top[1], bottom[0], bottom[1], a, b0, b1);
        }
    }
}

// row[channel_of(c)] = values[c] * factor
__device__ inline void store_row(float* row, const float (&values)[CHANNELS], float factor) {
    for (int c = 0; c < CHANNELS; c++) row[channel_of(c)] = values[c] * factor;
}
