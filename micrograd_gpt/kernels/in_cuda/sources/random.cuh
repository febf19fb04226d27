// Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): random
// numbers that are a function of a counter and a key, so that no mask has to be kept.

#pragma once

struct FourNumbers {
    unsigned words[4];
};

__device__ inline FourNumbers philox(FourNumbers counter, unsigned long long key) {
    unsigned low = unsigned(key), high = unsigned(key >> 32);
    for (int round = 0; round < 10; round++) {
        unsigned* c = counter.words;
        unsigned product0 = 0xD2511F53u * c[0], carry0 = __umulhi(0xD2511F53u, c[0]);
        unsigned product1 = 0xCD9E8D57u * c[2], carry1 = __umulhi(0xCD9E8D57u, c[2]);
        counter = {carry1 ^ c[1] ^ low, product1, carry0 ^ c[3] ^ high, product0};
        low += 0x9E3779B9u;
        high += 0xBB67AE85u;
    }
    return counter;
}

// 0 with probability p, else 1 / (1 - p); compares 24 random bits with p.
__device__ inline float dropout_factor(unsigned random, float p) {
    return (random >> 8) * 0x1p-24f < p ? 0.0f : 1.0f / (1.0f - p);
}
