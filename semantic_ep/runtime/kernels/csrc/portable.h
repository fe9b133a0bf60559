// The only primitives that the kernels use, once for CUDA and once for the emulator.
//
// Ordering between ranks rests on acquire and release operations, never on stand-alone fences: those are
// easier to get wrong, and ThreadSanitizer cannot see them.
#pragma once
#include <cstdint>
#include <cstring>

struct alignas(16) Vec16 {
  uint32_t word[4];
};

#if defined(__CUDACC__)

#include <cuda_runtime.h>
#define SEP_DEVICE __device__ __forceinline__
#define SEP_SHARED(T, name, n) __shared__ T name[n]
#define SEP_UNROLL _Pragma("unroll")

// .nc is allowed only for memory that no kernel in flight writes: a rank's own inputs.
SEP_DEVICE Vec16 load_input(const Vec16* p) {
  Vec16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
  return v;
}
SEP_DEVICE Vec16 load(const Vec16* p) {
  Vec16 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p)
               : "memory");
  return v;
}
SEP_DEVICE void store(Vec16* p, Vec16 v) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
               "r"(v.word[3])
               : "memory");
}
SEP_DEVICE uint64_t load_acquire_system(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
SEP_DEVICE void store_release_system(uint64_t* p, uint64_t v) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
SEP_DEVICE void store_relaxed_system(uint64_t* p, uint64_t v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
SEP_DEVICE void store_release_host(int32_t* p, int32_t v) {
  asm volatile("st.release.sys.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
SEP_DEVICE int add_acquire_release_device(int* p, int v) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
SEP_DEVICE int add_relaxed_device(int* p, int v) {
  int old;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
SEP_DEVICE int exchange_relaxed_device(int* p, int v) { return atomicExch(p, v); }
SEP_DEVICE void add_relaxed_block(int* shared, int v) { atomicAdd_block(shared, v); }
SEP_DEVICE int load_relaxed_device(const int* p) {
  int v;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
SEP_DEVICE void spin_pause(bool) { __nanosleep(20); }
SEP_DEVICE uint64_t clock_ns() {
  uint64_t v;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(v));
  return v;
}
#define SEP_LAUNCH(launch, kernel, arguments) \
  kernel<<<(launch).blocks, (launch).threads, 0, (cudaStream_t)(launch).stream>>>(arguments)

#else

#include "emu/emu.h"
#define SEP_DEVICE inline
#define SEP_SHARED(T, name, n)        \
  static const char name##_key = 0;   \
  T* name = static_cast<T*>(emu::shared_memory(&name##_key, sizeof(T) * (n)))
#define SEP_UNROLL

SEP_DEVICE Vec16 load_input(const Vec16* p) { return *p; }
SEP_DEVICE Vec16 load(const Vec16* p) { return *p; }
SEP_DEVICE void store(Vec16* p, Vec16 v) { *p = v; }
SEP_DEVICE uint64_t load_acquire_system(const uint64_t* p) {
  emu::yield_point(emu::Point::flag);
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
SEP_DEVICE void store_release_system(uint64_t* p, uint64_t v) {
  emu::yield_point(emu::Point::flag);
  emu::note_progress();
  __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
SEP_DEVICE void store_relaxed_system(uint64_t* p, uint64_t v) {
  emu::yield_point(emu::Point::flag);
  emu::note_progress();
  __atomic_store_n(p, v, __ATOMIC_RELAXED);
}
SEP_DEVICE void store_release_host(int32_t* p, int32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
SEP_DEVICE int add_acquire_release_device(int* p, int v) {
  emu::yield_point(emu::Point::atomic);
  emu::note_progress();
  return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
SEP_DEVICE int add_relaxed_device(int* p, int v) {
  emu::yield_point(emu::Point::atomic);
  emu::note_progress();
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
SEP_DEVICE int exchange_relaxed_device(int* p, int v) {
  emu::yield_point(emu::Point::atomic);
  emu::note_progress();
  return __atomic_exchange_n(p, v, __ATOMIC_RELAXED);
}
SEP_DEVICE void add_relaxed_block(int* shared, int v) { add_relaxed_device(shared, v); }
SEP_DEVICE int load_relaxed_device(const int* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
SEP_DEVICE void spin_pause(bool bounded) {
  emu::yield_point(bounded ? emu::Point::bounded_spin : emu::Point::spin);
}
SEP_DEVICE uint64_t clock_ns() { return emu::clock_ns(); }
#define SEP_LAUNCH(launch, kernel, arguments)                                                            \
  emu::enqueue(static_cast<emu::Stream*>((launch).stream), (launch).blocks, (launch).threads,            \
               [copy = (arguments)] { kernel(copy); }, #kernel)

#endif

// Narrow units, for rows whose size or address is not a multiple of 16 bytes.
template <class Unit>
SEP_DEVICE Unit load_input(const Unit* p) {
  return *p;
}
template <class Unit>
SEP_DEVICE Unit load(const Unit* p) {
  return *p;
}
template <class Unit>
SEP_DEVICE void store(Unit* p, Unit v) {
  *p = v;
}
