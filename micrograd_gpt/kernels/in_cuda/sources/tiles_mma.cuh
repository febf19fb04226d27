// Products of small matrices on tensor cores: mma.sync m16n8k16, two-byte operands, float32 sums.
//
// A block works on ROWS rows (-DROWS), a warp on 16 of them. The PTX ISA says which lane holds what
// ("Matrix Fragments for mma.m16n8k16"): lane = 4 g + t holds
//     of A (16 × 16)  rows g and g + 8, columns 2t, 2t + 1 and the same + 8: words {g, g+8} × {2t, 2t+8}
//     of B (16 × 8)   rows 2t, 2t + 1 and the same + 8, column g
//     of C (16 × 8)   rows g and g + 8, columns 2t, 2t + 1
// with two neighbours in a word, the first in its lower half. So a thread holds two rows of a
// product, and pairs of columns 8 apart. tiles_fma.cuh offers the same functions without tensor
// cores.

#pragma once

constexpr int TILE = HEAD_SIZE <= 64 ? 64 : 32;  // rows of a tile; registers must hold its scores
#include "fragments.cuh"

struct Tile {
    alignas(16) Activation at[TILE][HEAD_SIZE + 8];  // 16 bytes more: rows in different banks
};
struct RowsInShared {};  // they are in registers
struct Rows {
    unsigned words[HEAD_SIZE / 16][4];  // A's fragments, 16 channels each
};

// These are written in PTX; tests/cuda_on_cpu defines the same for a CPU.
#ifdef CUDA_ON_CPU
void mma(float& d0, float& d1, float& d2, float& d3, const unsigned (&a)[4], unsigned b0, unsigned b1);
void load_matrices(unsigned (&words)[4], const Activation* row);
void load_matrices_transposed(unsigned (&words)[4], const Activation* row);
#else
#ifdef ACTIVATION_IS_HALF
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif
// D (16 × 8) += A (16 × 16) · B (16 × 8)
__device__ inline void mma(
    float& d0, float& d1, float& d2, float& d3, const unsigned (&a)[4], unsigned b0, unsigned b1
) {
    asm(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Loads four 8 × 8 matrices from shared memory; lane 8 i + j says where row j of matrix i begins. A
// lane gets a word of each matrix: elements (g, 2t) and (g, 2t + 1) or, transposed, (2t, g) and
// (2t + 1, g).
__device__ inline void load_matrices(unsigned (&words)[4], const Activation* row) {
    unsigned address = unsigned(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}
__device__ inline void load_matrices_transposed(unsigned (&words)[4], const Activation* row) {
    unsigned address = unsigned(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}
#endif

// Two neighbours in a word, the first in the lower half.
__device__ inline unsigned pair(float first, float second) {
    return rounded<Activation>(first).bits | unsigned(rounded<Activation>(second).bits) << 16;
}

// Loads `count` rows from `first` on, `stride` elements apart, and zeros after them. Every row must
// start at a multiple of 16 bytes.
__device__ inline void load_tile(Tile& tile, const Activation* first, long long stride, int count) {
    constexpr int PACKS = HEAD_SIZE / PACK;
    for (int i = threadIdx.x; i < TILE * PACKS; i += THREADS) {
        int row = i / PACKS, channel = i % PACKS * PACK;
        SixteenBytes values = {};
        if (row < count) {
            values = *reinterpret_cast<const SixteenBytes*>(first + row * stride + channel);
        }
        *reinterpret_cast<SixteenBytes*>(&tile.at[row][channel]) = values;
    }
}

__device__ inline Rows load_rows(
    RowsInShared&, const Activation* first, long long stride, int count
) {
    Rows rows;
    for (int k = 0; k < HEAD_SIZE / 16; k++) {
        for (int i = 0; i < 4; i++) {
            int row = row_of(i % 2), channel = k * 16 + i / 2 * 8 + lane_of() % 4 * 2;
            const Activation* from = first + row * stride + channel;
            rows.words[k][i] = row < count ? *reinterpret_cast<const unsigned*>(from) : 0;
        }
    }
    return rows;
}

// scores (ROWS, TILE) = rows · tileᵀ
__device__ inline void multiply(const Rows& rows, const Tile& tile, float (&scores)[2][COLUMNS]) {
    for (int r = 0; r < 2; r++) {
        for (float& score : scores[r]) score = 0.0f;
    }
    int row = lane_of() / 16 * 8 + lane_of() % 8, channel = lane_of() / 8 % 2 * 8;
    for (int n = 0; n < TILE / 16; n++) {
        float* upper = scores[0] + 4 * n;
        float* lower = scores[1] + 4 * n;
        for (int k = 0; k < HEAD_SIZE / 16; k++) {
            unsigned b[4];
            load_matrices(b, &tile.at[n * 16 + row][k * 16 + channel]);
            mma(upper[0], upper[1], lower[0], lower[1], rows.words[k], b[0], b[1]);
            mma(upper[2], upper[3], lower[2], lower[3], rows.words[k], b[2], b[3]);
        }
    }
}

// sums (ROWS, HEAD_SIZE) += weights (ROWS, TILE) · tile. The weights that a lane holds as C are,
// once rounded, exactly those it must hold as A.
__device__ inline void accumulate(
    float (&sums)[2][CHANNELS], const float (&weights)[2][COLUMNS], const Tile& tile
) {
    int row = lane_of() / 8 % 2 * 8 + lane_of() % 8, channel = lane_of() / 16 * 8;
    for (int k = 0; k < TILE / 16; k++) {
        const float* upper = weights[0] + 4 * k;
        const float* lower = weights[1] + 4 * k;
        unsigned a[4] = {pair(upper[0], upper[1]), pair(lower[0], lower[1]),
                         pair(upper[2], upper[3]), pair(lower[2], lower[3])};
        for (int n = 0; n < HEAD_SIZE / 16; n++) {
            unsigned b[4];
            load_matrices_transposed(b, &tile.at[k * 16 + row][n * 16 + channel]);
            float* top = sums[0] + 4 * n;
            float* bottom = sums[1] + 4 * n;
            mma(top[0], top[1], bottom[0], bottom[1], a, b[0], b[1]);
            mma(top[2], top[3], bottom[2], bottom[3], a, b[2], b[3]);
        }
    }
}
