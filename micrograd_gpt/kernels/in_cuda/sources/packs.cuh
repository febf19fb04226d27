// Loads that are asked for well before their numbers are needed, as they take much longer than the
// arithmetic: load_pack converts at once, and so waits at once.

#pragma once

// PACK elements of a row as they lie in memory; those outside of it are 0.
struct Pack {
    alignas(16) Activation elements[PACK];

    // `aligned` says that the row can be loaded 16 bytes at a time, to its end.
    __device__ inline void load(const Activation* row, int first, int width, bool aligned) {
        if (aligned) {
            *reinterpret_cast<SixteenBytes*>(elements) =
                first < width ? *reinterpret_cast<const SixteenBytes*>(row + first)
                              : SixteenBytes{};
        } else {
#pragma unroll
            for (int j = 0; j < PACK; j++) {
                elements[j] = first + j < width ? row[first + j] : Activation{};
            }
        }
    }

    __device__ inline float operator[](int j) const { return to_float(elements[j]); }
    __device__ inline unsigned word(int i) const {
        return reinterpret_cast<const SixteenBytes*>(elements)->words[i];
    }
};
