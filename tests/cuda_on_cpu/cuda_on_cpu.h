// Enough of CUDA for g++ to compile the kernels' sources as C++ and to run them, for tests.
//
// Each CUDA thread of a block is a fiber with its own stack. It runs until it waits: at a barrier
// of its block or, in a shuffle or a matrix instruction, for the other lanes of its warp. A warp
// runs as far ahead as it can before the next one has its turn, in an order the test chooses, so
// that a barrier forgotten in the source shows as a wrong result in one order or another. Blocks
// run one after another.
//
// Waiting for what cannot come (a lane that has returned, or waits elsewhere) is an error here,
// as it is undefined on a GPU.

#pragma once
#define CUDA_ON_CPU

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

namespace cuda_on_cpu {

struct Dim3 {
    unsigned x, y, z;
};

constexpr int WARP_SIZE = 32;
constexpr size_t STACK = 128 * 1024;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Copy {
    void* to;
    const void* from;  // nullptr: zeros
    size_t bytes;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    State state;
    Dim3 index;
    int number;            // within the block
    unsigned exchanges = 0;  // how many values it has given to its warp
    std::vector<Copy> copies;  // those it has started and not waited for
};

// Two buffers in turns: a lane may give its next value while others still read the last one.
struct alignas(16) Exchange {
    char values[2][WARP_SIZE][64];
};

inline Dim3 grid_size, block_size, block_index;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Exchange> exchanges;
inline Fiber* current;
inline ucontext_t scheduler;
inline std::string error;

inline void wait(State where) {
    current->state = where;
    swapcontext(&current->context, &scheduler);
}

// Every lane gives a value and sees all 32.
template <class T> auto exchange(const T& value) {
    static_assert(sizeof(T) <= 64);
    auto& buffer = exchanges[current->number / WARP_SIZE].values[current->exchanges++ % 2];
    std::memcpy(buffer[current->number % WARP_SIZE], &value, sizeof(T));
    wait(State::at_warp_barrier);
    return [&buffer](int lane) {
        T given;
        std::memcpy(&given, buffer[lane], sizeof(T));
        return given;
    };
}

inline int lane() { return current->number % WARP_SIZE; }

// Let those go on who all wait at one place. False where some wait for what cannot come.
inline bool release(size_t first, size_t end, State place, bool the_done_count) {
    size_t there = 0, done = 0;
    for (size_t i = first; i < end; i++) {
        there += fibers[i]->state == place;
        done += fibers[i]->state == State::done;
    }
    if (!there || there + (the_done_count ? done : 0) < end - first) return false;
    for (size_t i = first; i < end; i++) {
        if (fibers[i]->state == place) fibers[i]->state = State::ready;
    }
    return true;
}

// 0 … count-1 in the order the test chose: upwards, downwards, else shuffled by it.
inline std::vector<size_t> turns(size_t count, unsigned order) {
    std::vector<size_t> numbers(count);
    for (size_t i = 0; i < count; i++) numbers[i] = order == 1 ? count - 1 - i : i;
    if (order > 1) std::shuffle(numbers.begin(), numbers.end(), std::mt19937(order));
    return numbers;
}

// Run the lanes of a warp until all have returned or wait for the block.
inline void run_warp(size_t first, size_t threads, const std::vector<size_t>& lanes) {
    bool whole = first + WARP_SIZE <= threads;  // half a warp cannot exchange anything
    do {
        for (size_t lane : lanes) {
            if (first + lane >= threads || fibers[first + lane]->state != State::ready) continue;
            current = fibers[first + lane].get();
            swapcontext(&scheduler, &current->context);
        }
    } while (whole && release(first, first + WARP_SIZE, State::at_warp_barrier, false));
}

template <class Body> void run_block(Body body, size_t threads, unsigned order) {
    static Body* the_body;
    the_body = &body;
    while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
    exchanges.resize((threads + WARP_SIZE - 1) / WARP_SIZE);
    for (size_t i = 0; i < threads; i++) {
        Fiber& fiber = *fibers[i];
        fiber.state = State::ready;
        fiber.number = int(i);
        fiber.exchanges = 0;
        fiber.copies.clear();
        unsigned n = unsigned(i);
        fiber.index = {n % block_size.x, n / block_size.x % block_size.y,
                       n / block_size.x / block_size.y};
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, +[] {
            (*the_body)();
            current->state = State::done;
        }, 0);
    }
    auto warps = turns(exchanges.size(), order), lanes = turns(WARP_SIZE, order);
    do {
        for (size_t warp : warps) run_warp(warp * WARP_SIZE, threads, lanes);
    } while (release(0, threads, State::at_block_barrier, true));
    for (size_t i = 0; i < threads; i++) {
        if (fibers[i]->state == State::done) continue;
        error = "threads wait for others that have returned or wait elsewhere";
    }
}

template <class... Args, size_t... I>
void run(void (*kernel)(Args...), void** args, unsigned order, std::index_sequence<I...>) {
    error.clear();
    size_t threads = size_t(block_size.x) * block_size.y * block_size.z;
    for (unsigned z = 0; z < grid_size.z; z++)
        for (unsigned y = 0; y < grid_size.y; y++)
            for (unsigned x = 0; x < grid_size.x; x++) {
                block_index = {x, y, z};
                run_block([&] { kernel(*static_cast<Args*>(args[I])...); }, threads, order);
                if (!error.empty()) return;
            }
}

// Run a kernel; the message of what went wrong, or nullptr.
template <class... Args>
const char* launch(
    void (*kernel)(Args...), const unsigned* grid, const unsigned* block, void** args, unsigned order
) {
    grid_size = {grid[0], grid[1], grid[2]};
    block_size = {block[0], block[1], block[2]};
    run(kernel, args, order, std::index_sequence_for<Args...>());
    return error.empty() ? nullptr : error.c_str();
}

}  // namespace cuda_on_cpu

// One line for each kernel, behind its source: what the test calls.
#define LAUNCHABLE(kernel)                                                                     \
    extern "C" const char* launch_##kernel(                                                    \
        const unsigned* grid, const unsigned* block, void** args, unsigned order) {            \
        return cuda_on_cpu::launch(kernel, grid, block, args, order);                          \
    }

#define threadIdx (cuda_on_cpu::current->index)
#define blockIdx cuda_on_cpu::block_index
#define blockDim cuda_on_cpu::block_size
#define gridDim cuda_on_cpu::grid_size

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::State::at_block_barrier); }
inline void __syncwarp(unsigned = 0xffffffffu) { cuda_on_cpu::exchange(0); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
    return cuda_on_cpu::exchange(value)(cuda_on_cpu::lane() ^ mask);
}
template <class T> T __shfl_sync(unsigned, T value, int source) {
    return cuda_on_cpu::exchange(value)(source);
}

inline bool __any_sync(unsigned, bool value) {
    auto lanes = cuda_on_cpu::exchange(value);
    for (int lane = 0; lane < cuda_on_cpu::WARP_SIZE; lane++) {
        if (lanes(lane)) return true;
    }
    return false;
}

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
using std::max;
using std::min;

// Rounding to nearest, ties to even, as cvt.rn does.
struct Half;
struct BFloat16;
float to_float(Half x);
Half to_half(float x);
BFloat16 to_bfloat16(float x);
