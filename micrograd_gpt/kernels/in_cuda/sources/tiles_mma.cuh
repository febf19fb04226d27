// Products of small matrices on tensor cores, two-byte operands, float32 sums; mma.cuh says which
// lane holds what. A block works on ROWS rows (-DROWS), a warp on FRAGMENTS times 16 of them: of
// each 16, a thread holds two rows of a product, and pairs of columns 8 apart. tiles_fma.cuh offers
// the same functions without tensor cores.

#pragma once

// How much a warp and a multiprocessor take on: as much as registers hold. These shapes are the
// fastest of those tried on an H200 with 64 channels.
constexpr bool NARROW = HEAD_SIZE <= 64;
constexpr int FRAGMENTS = NARROW && !BACKWARD ? 2 : 1;
constexpr int TILE = (NARROW ? 64 : 32) / (BACKWARD ? 2 : 1);
constexpr int BLOCKS_AT_ONCE = NARROW ? (BACKWARD ? 3 : 2) : 1;
constexpr int BUFFERS = 2;  // a tile is copied while products are made from the one before
#include "fragments.cuh"
#include "mma.cuh"

struct Tile {
    alignas(16) Activation at[TILE][HEAD_SIZE + 8];  // 16 bytes more: rows in different banks
};
struct RowsInShared {};  // they are in registers
struct Rows {
    unsigned words[HEAD_SIZE / 16][FRAGMENTS][4];  // A's fragments, 16 channels each
};

// These are written in PTX; tests/cuda_on_cpu defines the same for a CPU.
#ifdef CUDA_ON_CPU
void load_matrices(unsigned (&words)[4], const Activation* row);
void load_matrices_transposed(unsigned (&words)[4], const Activation* row);
unsigned pair(float first, float second);
template <int BYTES> void copy(void* to, const void* from, bool wanted);
void wait_for_copies();
#else
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
#ifdef ACTIVATION_IS_HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
#endif
    return result;
}

// Starts to copy 8 or 16 bytes into shared memory, zeros where they are not wanted. They are there
// for this thread once it has waited, and for the others after the next barrier.
template <int BYTES> __device__ inline void copy(void* to, const void* from, bool wanted) {
    unsigned address = unsigned(__cvta_generic_to_shared(to));
    int bytes = wanted ? BYTES : 0;
    if (BYTES == 16) {  // straight from the second-level cache
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :
                     : "r"(address), "l"(from), "r"(bytes)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :
                     : "r"(address), "l"(from), "n"(BYTES), "r"(bytes)
                     : "memory");
    }
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif

template <class T>
__device__ inline void copy_numbers(T (&numbers)[TILE], const T* first, int count) {
    static_assert(TILE <= THREADS);
    int i = threadIdx.x;
    if (i < TILE) copy<sizeof(T)>(&numbers[i], first + i, i < count);
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

// scores (ROWS, TILE) = rows · tileᵀ
__device__ inline void multiply(
    const Rows& rows, const Tile& tile, float (&scores)[HELD][COLUMNS]
) {
    for (int r = 0; r < HELD; r++) {
        for (float& score : scores[r]) score = 0.0f;
    }
    int row = lane_of() / 16 * 8 + lane_of() % 8, channel = lane_of() / 8 % 2 * 8;
    for (int k = 0; k < HEAD_SIZE / 16; k++) {
        for (int n = 0; n < TILE / 16; n++) {
            unsigned b[4];
            load_matrices(b, &tile.at[n * 16 + row][k * 16 + channel]);
            for (int f = 0; f < FRAGMENTS; f++) {
                float* upper = scores[2 * f] + 4 * n;
                float* lower = scores[2 * f + 1] + 4 * n;
                mma(upper[0], upper[1], lower[0], lower[1], rows.words[k][f], b[0], b[1]);
                mma(upper[2], upper[3], lower[2], lower[3], rows.words[k][f], b[2], b[3]);
            }
        }
    }
}

// sums (ROWS, HEAD_SIZE) += weights (ROWS, TILE) · tile. The weights that a lane holds as C are,
// once rounded, exactly those it must hold as A.
__device__ inline void accumulate(
    float (&sums)[HELD][CHANNELS], const float (&weights)[HELD][COLUMNS], const Tile& tile
) {
    int row = lane_of() / 8 % 2 * 8 + lane_of() % 8, channel = lane_of() / 16 * 8;
    for (int k = 0; k < TILE / 16; k++) {
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
            load_matrices_transposed(b, &tile.at[k * 16 + row][n * 16 + channel]);
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
