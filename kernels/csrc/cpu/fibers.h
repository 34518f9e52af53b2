// CUDA's execution model on one CPU thread, for tests: each CUDA thread of a block is a fiber,
// blocks run one after the other.  A barrier or shuffle suspends the fiber until all of the
// block, or of the warp, have come to it; a barrier that some threads never reach is an error.
//
// A warp runs until all of it wait at a barrier or are done, before the next warp runs at all: no
// real device lets them drift further apart.  Two schedules: blocks, warps and threads in ascending
// order, or, with MEGAGROW_EMULATOR_REVERSE=1, in descending order.  What wants a barrier gives
// another result in one of them.  Shared memory is filled with NaN patterns before every block.
#pragma once
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>
#include <ucontext.h>

#define MG_KERNEL static void
#define MG_DEVICE inline
#define MG_BOTH inline
#define MG_EMULATED 1
#define MG_GRID_CONSTANT
#define MG_THREADS(device, emulated) (emulated)
#define MG_SHARED(type, name, count)                              \
  static mg::emu::Shared<type, count> name##_memory;              \
  type* const name = name##_memory.values
#define MG_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), mg::emu::run(grid, block, true, [=] { kernel(__VA_ARGS__); }))
#define MG_LAUNCH_FLAT(kernel, grid, block, stream, ...) \
  ((void)(stream), mg::emu::run(grid, block, false, [=] { kernel(__VA_ARGS__); }))
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace mg {
using Stream = void*;
namespace emu {

enum class State { ready, at_barrier, at_shuffle, done };

struct Fiber {
  ucontext_t start;
  jmp_buf place;  // where it was suspended
  std::unique_ptr<char[]> stack;
  State state;
  bool alive = false;
};

inline constexpr size_t kStack = 64 << 10;
inline dim3 grid_dim, block_dim, block_index, thread_index;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline jmp_buf scheduler_place;
inline int current = 0;
inline bool with_fibers = false;
inline std::function<void()> body;
inline std::vector<uint64_t> slots;
inline std::mutex one_launch;

// All shared memory of all kernels that ran so far: (address, bytes).
inline std::vector<std::pair<void*, size_t>>& shared_memory() {
  static std::vector<std::pair<void*, size_t>> all;
  return all;
}

template <class T, size_t N> struct Shared {
  T values[N];
  Shared() {
    shared_memory().emplace_back(values, sizeof values);
    std::memset((void*)values, 0xff, sizeof values);
  }
};

// Switching by ucontext asks the kernel for the signal mask each time, which costs microseconds;
// jumps do not.  AddressSanitizer knows the former only.
#if defined(__SANITIZE_ADDRESS__)
inline void suspend() { swapcontext(&fibers[current].start, &scheduler); }
inline void resume(int t) {
  fibers[t].alive = true;
  swapcontext(&scheduler, &fibers[t].start);
}
#else
inline void suspend() {
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler_place, 1);
}
inline void resume(int t) {
  if (_setjmp(scheduler_place)) return;
  if (fibers[t].alive) _longjmp(fibers[t].place, 1);
  fibers[t].alive = true;
  setcontext(&fibers[t].start);
}
#endif

// A fiber lives on after its block, and runs the same thread of the next ones.
inline void trampoline() {
  for (;;) {
    body();
    fibers[current].state = State::done;
    suspend();
  }
}

inline void make_fiber(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, trampoline, 0);
}

inline void wait(State state) {
  if (!with_fibers) throw std::logic_error("emulator: a kernel with barriers was launched flat");
  fibers[current].state = state;
  suspend();
}

// Runs a warp as far as it goes; returns how many of its threads are done.
inline int run_warp(int first, int last, bool reverse) {
  for (;;) {
    int done = 0, at_shuffle = 0;
    for (int i = 0; i < last - first; ++i) {
      const int t = reverse ? last - 1 - i : first + i;
      if (fibers[t].state == State::ready) {
        current = t;
        thread_index = dim3(t, 0, 0);
        resume(t);
      }
      done += fibers[t].state == State::done;
      at_shuffle += fibers[t].state == State::at_shuffle;
    }
    if (at_shuffle < last - first) return at_shuffle ? -1 : done;
    for (int t = first; t < last; ++t) fibers[t].state = State::ready;
  }
}

inline void run_block(int n, bool reverse) {
  for (auto [address, bytes] : shared_memory()) std::memset(address, 0xff, bytes);
  for (int t = 0; t < n; ++t) {
    if (!fibers[t].alive) make_fiber(fibers[t]);
    fibers[t].state = State::ready;
  }
  const int warps = (n + 31) / 32;
  for (;;) {
    int done = 0;
    for (int i = 0; i < warps; ++i) {
      const int first = 32 * (reverse ? warps - 1 - i : i);
      const int ended = run_warp(first, first + 32 < n ? first + 32 : n, reverse);
      done = ended < 0 || done < 0 ? -1 : done + ended;
    }
    if (done == n) return;
    if (done != 0) {
      fibers.clear();  // they hang in the middle of the kernel
      throw std::runtime_error("emulator: some threads never reach a barrier or shuffle");
    }
    for (int t = 0; t < n; ++t) fibers[t].state = State::ready;
  }
}

inline void run(dim3 grid, dim3 block, bool barriers, std::function<void()> kernel) {
  std::lock_guard<std::mutex> lock(one_launch);
  if (grid.x == 0 || grid.y == 0) throw std::runtime_error("emulator: empty grid");
  if (grid.y > 65535) throw std::runtime_error("emulator: grid.y above CUDA's limit");
  const char* order = std::getenv("MEGAGROW_EMULATOR_REVERSE");
  const bool reverse = order && *order == '1';
  const int n = (int)block.x;
  grid_dim = grid, block_dim = block, body = std::move(kernel), with_fibers = barriers;
  if ((int)fibers.size() < n) fibers = std::vector<Fiber>(n), slots.resize(n);
  const int64_t blocks = (int64_t)grid.x * grid.y;
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t b = reverse ? blocks - 1 - k : k;
    block_index = dim3((unsigned)(b % grid.x), (unsigned)(b / grid.x), 0);
    if (barriers) {
      run_block(n, reverse);
    } else {
      for (int i = 0; i < n; ++i) {
        thread_index = dim3(reverse ? n - 1 - i : i, 0, 0);
        body();
      }
    }
  }
}
}  // namespace emu
}  // namespace mg

#define gridDim mg::emu::grid_dim
#define blockDim mg::emu::block_dim
#define blockIdx mg::emu::block_index
#define threadIdx mg::emu::thread_index

inline void __syncthreads() { mg::emu::wait(mg::emu::State::at_barrier); }

template <class T> inline T __shfl_xor_sync(unsigned, T value, int mask) {
  using namespace mg::emu;
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int me = current;
  std::memcpy(&slots[me], &value, sizeof value);
  wait(State::at_shuffle);
  T other;
  std::memcpy(&other, &slots[(me & ~31) | ((me & 31) ^ mask)], sizeof other);
  wait(State::at_shuffle);  // nobody may write its slot anew before all have read
  return other;
}
