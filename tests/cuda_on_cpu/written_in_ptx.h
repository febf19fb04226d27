// The functions that the sources write in PTX, for a CPU. Included after the source.

#pragma once

float to_float(Half x) { return float(std::bit_cast<_Float16>(x.bits)); }
Half to_half(float x) { return {std::bit_cast<unsigned short>(_Float16(x))}; }
BFloat16 to_bfloat16(float x) {
    unsigned bits = __float_as_uint(x);
    if (x != x) return {(unsigned short)(bits >> 16 | 0x40)};  // stays a NaN
    return {(unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

#if defined(HEAD_SIZE) && defined(ACTIVATION_IS_FLOAT) && defined(TF32)

// To the nearest number of 11 bits of precision, ties away from zero, as cvt.rna does.
unsigned to_tf32(float x) {
    unsigned bits = __float_as_uint(x);
    return x != x ? bits : (bits + 0x1000) & 0xffffe000;
}

// D += A · B, from the fragments as the PTX ISA lays them out (see tiles_tf32.cuh). What is not TF32
// in an operand, its last 13 bits, a tensor core may or may not read: here it is an error.
void mma(float& d0, float& d1, float& d2, float& d3, const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Operands {
        unsigned a[4], b[2];
    } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    for (unsigned word : {a[0], a[1], a[2], a[3], b0, b1}) {
        float x = __uint_as_float(word);
        if (word & 0x1fff && x == x) cuda_on_cpu::error = "mma: an operand is not TF32";
    }
    auto lanes = cuda_on_cpu::exchange(mine);
    int g = cuda_on_cpu::lane() / 4, t = cuda_on_cpu::lane() % 4;
    auto a_at = [&](int row, int column) {
        return __uint_as_float(lanes(row % 8 * 4 + column % 4).a[row / 8 + column / 4 * 2]);
    };
    auto b_at = [&](int row, int column) {
        return __uint_as_float(lanes(column * 4 + row % 4).b[row / 4]);
    };
    float* d[4] = {&d0, &d1, &d2, &d3};
    for (int i = 0; i < 4; i++) {
        float sum = *d[i];
        for (int k = 0; k < 8; k++) sum += a_at(g + i / 2 * 8, k) * b_at(k, 2 * t + i % 2);
        *d[i] = sum;
    }
}

#endif

#ifndef ACTIVATION_IS_FLOAT

inline float element(unsigned word, int i) {
    Activation x;
    x.bits = (unsigned short)(word >> 16 * i);
    return to_float(x);
}

// D += A · B, from the fragments as the PTX ISA lays them out (see tiles_mma.cuh): here all lanes
// give theirs, and each computes the four elements that it holds.
void mma(float& d0, float& d1, float& d2, float& d3, const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Operands {
        unsigned a[4], b[2];
    } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    auto lanes = cuda_on_cpu::exchange(mine);
    int g = cuda_on_cpu::lane() / 4, t = cuda_on_cpu::lane() % 4;
    auto a_at = [&](int row, int column) {
        Operands holder = lanes(row % 8 * 4 + column % 8 / 2);
        return element(holder.a[row / 8 + column / 8 * 2], column % 2);
    };
    auto b_at = [&](int row, int column) {
        Operands holder = lanes(column * 4 + row % 8 / 2);
        return element(holder.b[row / 8], row % 2);
    };
    float* d[4] = {&d0, &d1, &d2, &d3};
    for (int i = 0; i < 4; i++) {
        float sum = *d[i];
        for (int k = 0; k < 16; k++) sum += a_at(g + i / 2 * 8, k) * b_at(k, 2 * t + i % 2);
        *d[i] = sum;
    }
}

#ifdef HEAD_SIZE

inline void load_8x8(unsigned (&words)[4], const Activation* row, bool transposed) {
    if (reinterpret_cast<size_t>(row) % 16) cuda_on_cpu::error = "ldmatrix: a row is not aligned";
    auto rows = cuda_on_cpu::exchange(row);
    int g = cuda_on_cpu::lane() / 4, t = cuda_on_cpu::lane() % 4;
    for (int i = 0; i < 4; i++) {
        auto at = [&](int r, int c) { return unsigned(rows(8 * i + r)[c].bits); };
        words[i] = transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16
                              : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
    }
}
void load_matrices(unsigned (&words)[4], const Activation* row) { load_8x8(words, row, false); }
void load_matrices_transposed(unsigned (&words)[4], const Activation* row) { load_8x8(words, row, true); }

unsigned pair(float first, float second) {
    return rounded<Activation>(first).bits | unsigned(rounded<Activation>(second).bits) << 16;
}

// Nothing is copied before the thread waits, so that to read it any earlier is to read what was
// there before.
template <int BYTES> void copy(void* to, const void* from, bool wanted) {
    size_t addresses = reinterpret_cast<size_t>(to) | (wanted ? reinterpret_cast<size_t>(from) : 0);
    if (addresses % BYTES) cuda_on_cpu::error = "cp.async: an address is not aligned";
    cuda_on_cpu::current->copies.push_back({to, wanted ? from : nullptr, BYTES});
}
void wait_for_copies() {
    for (auto [to, from, bytes] : cuda_on_cpu::current->copies) {
        if (from) std::memcpy(to, from, bytes);
        else std::memset(to, 0, bytes);
    }
    cuda_on_cpu::current->copies.clear();
}

#endif
#endif
