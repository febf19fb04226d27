// The matrix instruction of tensor cores: mma.sync m16n8k16, two-byte operands, float32 sums. The PTX
// ISA says which lane holds what ("Matrix Fragments for mma.m16n8k16"): lane = 4 g + t holds
//     of A (16 × 16)  rows g and g + 8, columns 2t, 2t + 1 and the same + 8: words {g, g+8} × {2t, 2t+8}
//     of B (16 × 8)   rows 2t, 2t + 1 and the same + 8, column g
//     of C (16 × 8)   rows g and g + 8, columns 2t, 2t + 1
// with two neighbours in a word, the first in its lower half.

#pragma once

// It is written in PTX; tests/cuda_on_cpu defines the same for a CPU.
#ifdef CUDA_ON_CPU
void mma(float& d0, float& d1, float& d2, float& d3, const unsigned (&a)[4], unsigned b0, unsigned b1);
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
#endif
