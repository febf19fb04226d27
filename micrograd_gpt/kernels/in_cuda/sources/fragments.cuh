// Which numbers of a product on tensor cores a thread holds. With every type of operands, a warp's
// sums (16 × 8) are laid out alike: lane 4g + t holds rows g and g + 8, columns 2t, 2t + 1. A warp
// works on FRAGMENTS times 16 rows, so that what it reads of a tile serves that many products.

#pragma once

constexpr int LANES_PER_ROW = 4, ROWS_PER_WARP = 16 * FRAGMENTS;
constexpr int THREADS = ROWS / ROWS_PER_WARP * WARP;
constexpr int HELD = 2 * FRAGMENTS;  // rows of a product in one thread
constexpr int COLUMNS = STRIP / LANES_PER_ROW;  // of scores (ROWS, STRIP) in one thread, for each row
constexpr int CHANNELS = HEAD_SIZE / LANES_PER_ROW;  // of sums (ROWS, HEAD_SIZE) likewise

__device__ inline int lane_of() { return threadIdx.x % WARP; }
__device__ inline int first_row_of_warp() { return threadIdx.x / WARP * ROWS_PER_WARP; }
// The parts of these sums have no bit in common: written with | the compiler knows it.
__device__ inline int row_of(int r) { return first_row_of_warp() | 8 * r | lane_of() / 4; }
__device__ inline int column_of(int c) { return c / 2 * 8 | lane_of() % 4 * 2 | c % 2; }
__device__ inline int channel_of(int c) { return column_of(c); }

// Exponentials are powers of 2, one instruction each; BASE turns logarithms to base e into theirs.
constexpr float BASE = 1.44269504f;
__device__ inline float power(float logarithm) { return exp2f(logarithm); }
