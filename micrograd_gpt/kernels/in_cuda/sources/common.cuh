// What all kernels share: the activation type, 16-byte loads, sums over a warp and over a block.
//
// A source is compiled once for each activation type (-DACTIVATION=Float, Half or BFloat16), the
// type that linear, gelu and attention take and return. Arithmetic is float32 throughout; a value
// is rounded to the activation type only where it is stored. The two-byte types are plain bits with
// two conversions, so that no header of the CUDA toolkit is needed.

#pragma once

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

using Float = float;
struct Half {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};
using Activation = ACTIVATION;

// These are written in PTX; tests/cuda_on_cpu defines the same for a CPU.
#ifndef CUDA_ON_CPU
__device__ inline float to_float(Half x) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
    return result;
}
__device__ inline Half to_half(float x) {
    Half result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
}
__device__ inline BFloat16 to_bfloat16(float x) {
    BFloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
}
#endif

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

template <class T> __device__ inline T rounded(float x);
template <> __device__ inline float rounded<float>(float x) { return x; }
template <> __device__ inline Half rounded<Half>(float x) { return to_half(x); }
template <> __device__ inline BFloat16 rounded<BFloat16>(float x) { return to_bfloat16(x); }

__device__ inline float infinity() { return __uint_as_float(0x7f800000u); }
__device__ inline float nan() { return __uint_as_float(0x7fc00000u); }

// -------------------------------------------------------------- rows of memory, 16 bytes at a time

// One thread loads PACK neighbouring elements at once: 16 bytes of activations.
constexpr int PACK = 16 / sizeof(Activation);

struct alignas(16) SixteenBytes {
    unsigned words[4];
};

__device__ inline bool is_aligned(const void* p) {
    return reinterpret_cast<unsigned long long>(p) % 16 == 0;
}

// Elements first … first + PACK - 1 of a row as float32; those outside the row read as `outside`.
// They are loaded 16 bytes at a time where all are in the row and aligned, else one by one.
template <class T>
__device__ inline void load_pack(
    const T* row, long long first, long long width, float (&values)[PACK], float outside = 0.0f
) {
    constexpr int PER_LOAD = 16 / sizeof(T);
    if (first >= 0 && first + PACK <= width && is_aligned(row + first)) {
        for (int start = 0; start < PACK; start += PER_LOAD) {
            alignas(16) T part[PER_LOAD];
            *reinterpret_cast<SixteenBytes*>(part) =
                *reinterpret_cast<const SixteenBytes*>(row + first + start);
            for (int i = 0; i < PER_LOAD; i++) values[start + i] = to_float(part[i]);
        }
    } else {
        for (int i = 0; i < PACK; i++) {
            bool inside = first + i >= 0 && first + i < width;
            values[i] = inside ? to_float(row[first + i]) : outside;
        }
    }
}

template <class T>
__device__ inline void store_pack(
    T* row, long long first, long long width, const float (&values)[PACK]
) {
    constexpr int PER_STORE = 16 / sizeof(T);
    if (first >= 0 && first + PACK <= width && is_aligned(row + first)) {
        for (int start = 0; start < PACK; start += PER_STORE) {
            alignas(16) T part[PER_STORE];
            for (int i = 0; i < PER_STORE; i++) part[i] = rounded<T>(values[start + i]);
            *reinterpret_cast<SixteenBytes*>(row + first + start) =
                *reinterpret_cast<const SixteenBytes*>(part);
        }
    } else {
        for (int i = 0; i < PACK; i++) {
            if (first + i >= 0 && first + i < width) row[first + i] = rounded<T>(values[i]);
        }
    }
}

// ------------------------------------------------------------------------------ sums and maxima

struct Sum {
    __device__ static float identity() { return 0.0f; }
    template <class T> __device__ static T join(T a, T b) { return a + b; }
};
struct Max {
    __device__ static float identity() { return -infinity(); }
    __device__ static float join(float a, float b) { return fmaxf(a, b); }
};

// Joins a value of each of `lanes` neighbouring lanes (a power of two); all of them get the result.
template <class How, class T> __device__ inline T over_lanes(T value, int lanes = WARP) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
        value = How::join(value, __shfl_xor_sync(ALL_LANES, value, distance));
    }
    return value;
}

// Joins a value of each thread of a block, up to 32 whole warps, always in the same order; every
// thread gets the result.
template <class How, class T> __device__ inline T over_block(T value) {
    __shared__ T of_warp[WARP];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    value = over_lanes<How>(value);
    if (lane == 0) of_warp[warp] = value;
    __syncthreads();
    value = lane < int(blockDim.x) / WARP ? of_warp[lane] : How::identity();
    value = over_lanes<How>(value);
    __syncthreads();  // of_warp may be written again
    return value;
}
