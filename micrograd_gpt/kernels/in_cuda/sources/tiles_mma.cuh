// Products of small matrices on tensor cores: mma.sync m16n8k16, two-byte operands, float32 sums.
//
// A block works on ROWS rows (-DROWS), a warp on FRAGMENTS times 16 of them. The PTX ISA says which lane holds what
// ("Matrix Fragments for mma.m16n8k16"): lane = 4 g + t holds
//     of A (16 × 16)  rows g and g + 8, columns 2t, 2t + 1 and the same + 8: words {g, g+8} × {2t, 2t+8}
//     of B (16 × 8)   rows 2t, 2t + 1 and the same + 8, column g
//     of C (16 × 8)   rows g and g + 8, columns 2t, 2t + 1
// with two neighbours in a word, the first in its lower half. So a thread holds two rows of such a
// product, and pairs of columns 8 apart. tiles_fma.cuh offers the same functions without tensor
// cores.

#pragma once

#ifndef FRAGS
#define FRAGS (HEAD_SIZE <= 64 && !BACKWARD ? 2 : 1)
#endif
#ifndef TILE_
#define TILE_ (HEAD_SIZE <= 64 ? 64 : 32)
#endif
#ifndef MINB
#define MINB (HEAD_SIZE > 64 ? 1 : BACKWARD ? 3 : 2)
#endif
constexpr int FRAGMENTS = FRAGS;
#ifndef STRIP_
#define STRIP_ (BACKWARD ? TILE_ / 2 : TILE_)
#endif
constexpr int TILE = TILE_, STRIP = STRIP_;
constexpr int BUFFERS = 2;  // while products are made from one tile, the next is copied
#include "fragments.cuh"

struct Tile {
    alignas(16) Activation at[TILE][HEAD_SIZE + 8];  // 16 bytes more: rows in different banks
};
struct RowsInShared {};  // they are in registers
struct Rows {
    unsigned words[HEAD_SIZE / 16][FRAGMENTS][4];  // A's fragments, 16 channels each
};

// These are written in PTX; tests/cuda_on_cpu defines the same for a CPU.
#ifdef CUDA_ON_CPU
void mma(float& d0, float& d1, float& d2, float& d3, const unsigned (&a)[4], unsigned b0, unsigned b1);
void load_matrices(unsigned (&words)[4], const Activation* row);
void load_matrices_transposed(unsigned (&words)[4], const Activation* row);
unsigned pair(float first, float second);
template <int BYTES> void copy(void* to, const void* from, bool wanted);
void wait_for_copies();
#else
#ifdef ACTIVATION_IS_HALF
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#define PAIR "cvt.rn.f16x2.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#define PAIR "cvt.rn.bf16x2.f32"
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
// Two neighbours in a word, the first in the lower half.
__device__ inline unsigned pair(float first, float second) {
    unsigned result;
    asm(PAIR " %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}

// Starts to copy 4 or 16 bytes into shared memory, zeros where they are not wanted. What a thread
// has started is there once it has waited, and for the other threads after the next barrier.
template <int BYTES> __device__ inline void copy(void* to, const void* from, bool wanted) {
    unsigned address = unsigned(__cvta_generic_to_shared(to));
    int bytes = wanted ? BYTES : 0;
    if (BYTES == 16) {  // straight from the second-level cache
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :
                     : "r"(address), "l"(from), "r"(bytes)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                     :
                     : "r"(address), "l"(from), "r"(bytes)
                     : "memory");
    }
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif

__device__ inline void copy_numbers(float (&numbers)[TILE], const float* first, int count) {
    int i = threadIdx.x;
    if (i < TILE) copy<4>(&numbers[i], first + i, i < count);
}

// Starts to copy `count` rows from `first` on, `stride` elements apart, and zeros after them. Every
// row must start at a multiple of 16 bytes.
__device__ inline void load_tile(Tile& tile, const Activation* first, long long stride, int count) {
    constexpr int PACKS = HEAD_SIZE / PACK;
#pragma unroll
    for (int done = 0; done < TILE * PACKS; done += THREADS) {
        int i = done + threadIdx.x, row = i / PACKS, channel = i % PACKS * PACK;
        if (done + THREADS > TILE * PACKS && i >= TILE * PACKS) break;
        copy<16>(&tile.at[row][channel], first + row * int(stride) + channel, row < count);
    }
}

__device__ inline Rows load_rows(
    RowsInShared&, const Activation* first, long long stride, int count
) {
    Rows rows;
    for (int r = 0; r < HELD; r++) {
        const Activation* row = first + row_of(r) * stride;
        for (int k = 0; k < HEAD_SIZE / 16; k++) {
            for (int half = 0; half < 2; half++) {
                const Activation* from = row + k * 16 + half * 8 + lane_of() % 4 * 2;
                rows.words[k][r / 2][r % 2 + 2 * half] =
                    row_of(r) < count ? *reinterpret_cast<const unsigned*>(from) : 0;
            }
        }
    }
    return rows;
}

// scores (ROWS, STRIP) = rows · stripᵀ, the strip being the rows of a tile from `part` on
__device__ inline void multiply(
    const Rows& rows, const Tile& tile, int part, float (&scores)[HELD][COLUMNS]
) {
    for (int r = 0; r < HELD; r++) {
        for (float& score : scores[r]) score = 0.0f;
    }
    int row = lane_of() / 16 * 8 + lane_of() % 8, channel = lane_of() / 8 % 2 * 8;
    for (int k = 0; k < HEAD_SIZE / 16; k++) {
        for (int n = 0; n < STRIP / 16; n++) {
            unsigned b[4];
            load_matrices(b, &tile.at[part + n * 16 + row][k * 16 + channel]);
            for (int f = 0; f < FRAGMENTS; f++) {
                float* upper = scores[2 * f] + 4 * n;
                float* lower = scores[2 * f + 1] + 4 * n;
                mma(upper[0], upper[1], lower[0], lower[1], rows.words[k][f], b[0], b[1]);
                mma(upper[2], upper[3], lower[2], lower[3], rows.words[k][f], b[2], b[3]);
            }
        }
    }
}

// sums (ROWS, HEAD_SIZE) += weights (ROWS, STRIP) · strip. The weights that a lane holds as C are,
// once rounded, exactly those it must hold as A.
__device__ inline void accumulate(
    float (&sums)[HELD][CHANNELS], const float (&weights)[HELD][COLUMNS], const Tile& tile, int part
) {
    int row = lane_of() / 8 % 2 * 8 + lane_of() % 8, channel = lane_of() / 16 * 8;
    for (int k = 0; k < STRIP / 16; k++) {
        unsigned a[FRAGMENTS][4];
        for (int f = 0; f < FRAGMENTS; f++) {
            for (int half = 0; half < 2; half++) {
                const float* upper = weights[2 * f] + 4 * k + 2 * half;
                const float* lower = weights[2 * f + 1] + 4 * k + 2 * half;
                a[f][2 * half] = pair(upper[0], upper[1]);
                a[f][2 * half + 1] = pair(lower[0], lower[1]);
            }
        }
        for (int n = 0; n < HEAD_SIZE / 16; n++) {
            unsigned b[4];
            load_matrices_transposed(b, &tile.at[part + k * 16 + row][n * 16 + channel]);
            for (int f = 0; f < FRAGMENTS; f++) {
                float* top = sums[2 * f] + 4 * n;
                float* bottom = sums[2 * f + 1] + 4 * n;
                mma(top[0], top[1], bottom[0], bottom[1], a[f], b[0], b[1]);
                mma(top[2], top[3], bottom[2], bottom[3], a[f], b[2], b[3]);
            }
        }
    }
}

// row[channel_of(c)] = values[c] * factor
__device__ inline void store_row(Activation* row, const float (&values)[CHANNELS], float factor) {
    for (int c = 0; c < CHANNELS; c += 2) {
        unsigned two = pair(values[c] * factor, values[c + 1] * factor);
        *reinterpret_cast<unsigned*>(row + channel_of(c)) = two;
    }
}
