// Which numbers of a product on tensor cores a thread holds. With every type of operands, a warp's
// sums (16 × 8) are laid out alike: lane 4g + t holds rows g and g + 8, columns 2t and 2t + 1.

#pragma once

constexpr int LANES_PER_ROW = 4, THREADS = ROWS / 16 * WARP;
constexpr int COLUMNS = TILE / LANES_PER_ROW;  // of scores (ROWS, TILE) in one thread, for each row
constexpr int CHANNELS = HEAD_SIZE / LANES_PER_ROW;  // of sums (ROWS, HEAD_SIZE) likewise

__device__ inline int lane_of() { return threadIdx.x % WARP; }
__device__ inline int row_of(int r) { return threadIdx.x / WARP * 16 + lane_of() / 4 + 8 * r; }
__device__ inline int column_of(int c) { return c / 2 * 8 + lane_of() % 4 * 2 + c % 2; }
__device__ inline int channel_of(int c) { return column_of(c); }
