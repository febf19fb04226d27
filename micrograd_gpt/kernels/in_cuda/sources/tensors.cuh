// Many tensors in one launch: their table is passed by value with it.

#pragma once

constexpr int TENSORS_AT_ONCE = 48;
constexpr int ROLES = 4;

struct TensorTable {
    long long sizes[TENSORS_AT_ONCE];
    unsigned long long arrays[ROLES][TENSORS_AT_ONCE];  // addresses, by what an array is for
    float decays[TENSORS_AT_ONCE];
};
