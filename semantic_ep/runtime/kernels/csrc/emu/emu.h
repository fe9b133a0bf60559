// Runs SIMT kernels on a CPU: one fiber a CUDA thread, one OS thread, a seeded adversarial scheduler.
//
// This is not a CUDA clone. It provides what the kernels of this folder use and nothing else: one-dimensional
// grids, block barriers, warp collectives, atomics, shared memory and streams. Threads hand over control only
// at synchronisation points, so a run is a pure function of its seed (one process) and a failing schedule can
// be replayed. What it reports: deadlocks (which kernel, how many blocks), divergent barriers, and warp
// collectives whose mask or line differ between lanes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace emu {

struct Index {
  unsigned x;
};
struct Geometry {
  Index block_index, block_dim, grid_dim;
};
struct Thread {
  Index index;
  const Geometry* geometry;
};
struct Stream;

extern Thread* current;  // the CUDA thread that runs now

// `line` identifies the call site: lanes that meet at different sites are a divergence bug.
void block_barrier(int line);
const uint64_t* warp_exchange(uint32_t mask, uint64_t value, int line);  // the 32 deposited values
void* shared_memory(const void* key, size_t bytes);

enum class Point { atomic, flag, spin, bounded_spin };  // bounded: the wait ends by itself (time-out)
void yield_point(Point point);
void note_progress();
uint64_t clock_ns();

void enqueue(Stream* stream, unsigned blocks, unsigned threads, std::function<void()> body, const char* name);

// The collectives' own bookkeeping is not what ThreadSanitizer should look at.
#if defined(__SANITIZE_THREAD__)
#define EMU_UNCHECKED __attribute__((no_sanitize("thread"), noinline))
#else
#define EMU_UNCHECKED
#endif

template <class T>
inline uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "warp collectives carry at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
inline T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned lane() { return current->index.x & 31; }

template <class T>
EMU_UNCHECKED inline T shuffle(uint32_t mask, T value, int source, int line) {
  return from_bits<T>(warp_exchange(mask, to_bits(value), line)[source & 31]);
}
template <class T>
EMU_UNCHECKED inline T shuffle_up(uint32_t mask, T value, unsigned delta, int line) {
  const uint64_t* all = warp_exchange(mask, to_bits(value), line);
  return lane() >= delta ? from_bits<T>(all[lane() - delta]) : value;
}
EMU_UNCHECKED inline uint32_t ballot(uint32_t mask, bool predicate, int line) {
  const uint64_t* all = warp_exchange(mask, predicate, line);
  uint32_t result = 0;
  for (int i = 0; i < 32; i++)
    if (((mask >> i) & 1) && all[i]) result |= 1u << i;
  return result;
}
template <class T>
EMU_UNCHECKED inline uint32_t match_any(uint32_t mask, T value, int line) {
  const uint64_t* all = warp_exchange(mask, to_bits(value), line);
  uint32_t result = 0;
  for (int i = 0; i < 32; i++)
    if (((mask >> i) & 1) && all[i] == to_bits(value)) result |= 1u << i;
  return result;
}

}  // namespace emu

#define threadIdx (emu::current->index)
#define blockIdx (emu::current->geometry->block_index)
#define blockDim (emu::current->geometry->block_dim)
#define gridDim (emu::current->geometry->grid_dim)
#define __syncthreads() emu::block_barrier(__LINE__)
#define __syncwarp() ((void)emu::warp_exchange(0xffffffffu, 0, __LINE__))
#define __shfl_sync(mask, value, source) emu::shuffle((mask), (value), (source), __LINE__)
#define __shfl_xor_sync(mask, value, bits) emu::shuffle((mask), (value), (int)(emu::lane() ^ (bits)), __LINE__)
#define __shfl_up_sync(mask, value, delta) emu::shuffle_up((mask), (value), (delta), __LINE__)
#define __ballot_sync(mask, predicate) emu::ballot((mask), (predicate), __LINE__)
#define __match_any_sync(mask, value) emu::match_any((mask), (value), __LINE__)
inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline int __popcll(uint64_t value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
