// Shuffled reduce-scatter and shuffled all-gather: the permutation is part of the exchange, so no row is moved
// only to be sorted. Scattered row m of the group belongs to rank m / rows_per_rank and is row permutation[m] of
// the gathered matrix; -1 is padding. Each is the other's gradient.
#pragma once
#include "rows.h"

SEP_DEVICE char* scatter_row(const SepShuffle& a, int owner, int source, int row) {
  return a.group.heap[owner] + a.scatter_offset +
         (static_cast<int64_t>(source) * a.rows_per_rank + row) * a.row_stride;
}
SEP_DEVICE char* gather_row(const SepShuffle& a, int owner, int row) {
  return a.group.heap[owner] + a.gather_offset + static_cast<int64_t>(row) * a.row_stride;
}
SEP_DEVICE const char* input_row(const SepShuffle& a, int row) {
  return static_cast<const char*>(a.x) + static_cast<int64_t>(row) * a.row_bytes;
}

// All ranks must shuffle alike, or rows would be mixed up without a trace: flags carry a fingerprint.
SEP_DEVICE uint32_t fingerprint_term(int index, int value) {
  uint32_t hash = static_cast<uint32_t>(value + 1) * 0x9E3779B1u ^ static_cast<uint32_t>(index + 1) * 0x85EBCA77u;
  hash ^= hash >> 15;
  hash *= 0x2C1B3C6Du;
  return hash ^ hash >> 13;
}
SEP_DEVICE uint32_t* fingerprint(const SepShuffle& a) {
  return reinterpret_cast<uint32_t*>(a.group.heap[a.group.rank] + a.fingerprint_offset);
}
// One block, before the exchange. Sums of terms do not depend on the order.
__global__ void __launch_bounds__(1024) shuffle_fingerprint(const __grid_constant__ SepShuffle a) {
  SEP_SHARED(int, sum, 1);
  if (threadIdx.x == 0) sum[0] = 0;
  __syncthreads();
  uint32_t mine = 0;
  for (int m = threadIdx.x; m < a.group.num_ranks * a.rows_per_rank; m += blockDim.x) {
    const int row = a.permutation[m];
    if (row >= a.num_rows || row < -1) fail(a.group, SEP_BAD_SLOT, SEP_SCATTER, a.group.rank, row);
    mine += fingerprint_term(m, row);
  }
  add_relaxed_block(sum, static_cast<int>(mine));
  __syncthreads();
  if (threadIdx.x == 0) *fingerprint(a) = static_cast<uint32_t>(sum[0]) & 0x7fffffffu;  // never POISON
}
SEP_DEVICE void check_fingerprints(const SepShuffle& a, int channel, uint32_t epoch) {
  for (int peer = threadIdx.x; peer < a.group.num_ranks; peer += blockDim.x) {
    const uint32_t theirs = wait_flag(a.group, channel, READY, peer, epoch);
    if (theirs != kPoison && theirs != *fingerprint(a)) fail(a.group, SEP_SHUFFLE_MISMATCH, channel, peer, 0);
  }
  __syncthreads();
}

template <class Unit>
__global__ void __launch_bounds__(512, 1) scatter_send(const __grid_constant__ SepShuffle a) {
  const WarpIndex w = warp_index();
  const int ranks = a.group.num_ranks, me = a.group.rank;
  const uint32_t epoch = begin_send(a.group, SEP_SCATTER);
  if (!warp_has_failed(a.group))
    for (int m = w.warp; m < ranks * a.rows_per_rank; m += w.num_warps) {
      const int owner = (m + me) % ranks, row = m / ranks;  // starts with another owner on each rank
      const int from = a.permutation[owner * a.rows_per_rank + row];
      if (from < 0 || owner == me) continue;
      copy_row<Unit>(w.lane, input_row(a, from), a.row_bytes, 1, true,
                     [&](int) { return scatter_row(a, owner, me, row); });
    }
  publish_ready(a.group, SEP_SCATTER, epoch, [&](int) { return *fingerprint(a); });
}

template <class T, int N>
__global__ void __launch_bounds__(512, 1) scatter_sum(const __grid_constant__ SepShuffle a) {
  using Accumulator = typename Element<T>::Accumulator;
  const WarpIndex w = warp_index();
  const int ranks = a.group.num_ranks, me = a.group.rank;
  const uint32_t epoch = a.group.state->epoch[SEP_SCATTER];
  check_fingerprints(a, SEP_SCATTER, epoch);
  const uint64_t everyone = ranks == 64 ? ~0ull : (1ull << ranks) - 1;
  if (!warp_has_failed(a.group))
    for (int row = w.warp; row < a.rows_per_rank; row += w.num_warps) {
      const int from = a.permutation[me * a.rows_per_rank + row];
      sum_rows<T, N>(
          w.lane, from < 0 ? 0 : everyone, a.hidden, static_cast<T*>(a.out) + static_cast<int64_t>(row) * a.hidden,
          [&](int rank) {
            return reinterpret_cast<const T*>(rank == me ? input_row(a, from) : scatter_row(a, me, rank, row));
          },
          [](int) { return Accumulator(1); });
    }
  publish_free(a.group, SEP_SCATTER, epoch);
}

template <class Unit>
__global__ void __launch_bounds__(512, 1) gather_send(const __grid_constant__ SepShuffle a) {
  const WarpIndex w = warp_index();
  const int ranks = a.group.num_ranks, me = a.group.rank;
  const uint32_t epoch = begin_send(a.group, SEP_GATHER);
  if (!warp_has_failed(a.group))
    for (int row = w.warp; row < a.rows_per_rank; row += w.num_warps) {
      const int to = a.permutation[me * a.rows_per_rank + row];
      if (to < 0) continue;
      copy_row<Unit>(w.lane, input_row(a, row), a.row_bytes, ranks - 1, true,
                     [&](int t) { return gather_row(a, (me + 1 + t) % ranks, to); });
    }
  publish_ready(a.group, SEP_GATHER, epoch, [&](int) { return *fingerprint(a); });
}

template <class Unit>
__global__ void __launch_bounds__(512, 1) gather_copy(const __grid_constant__ SepShuffle a) {
  const WarpIndex w = warp_index();
  const int me = a.group.rank;
  const uint32_t epoch = a.group.state->epoch[SEP_GATHER];
  check_fingerprints(a, SEP_GATHER, epoch);
  if (!warp_has_failed(a.group))
    for (int m = w.warp; m < a.group.num_ranks * a.rows_per_rank; m += w.num_warps) {
      const int to = a.permutation[m];
      if (to < 0) continue;
      const bool own = m / a.rows_per_rank == me;
      copy_row<Unit>(w.lane, own ? input_row(a, m - me * a.rows_per_rank) : gather_row(a, me, to), a.row_bytes, 1, own,
                     [&](int) { return static_cast<char*>(a.out) + static_cast<int64_t>(to) * a.row_bytes; });
    }
  publish_free(a.group, SEP_GATHER, epoch);
}
