// How ranks agree on who may read and write which part of a symmetric heap.
//
// One exchange on a channel, for each ordered pair (sender, receiver):
//   sender    waits for the receiver's FREE flag of the epoch before, writes into the receiver's heap (or its
//             own, for exchanges that are pulled), then stores READY = epoch | value with release;
//   receiver  waits for READY of this epoch with acquire, reads, then stores FREE = epoch with release.
// Epochs in the flags mean that nothing is reset and that no barrier is needed between exchanges. Epochs live
// in device memory, so a captured CUDA graph can be replayed. No block ever waits for a block of its own grid.
//
// MUTANT_* are bugs that the tests plant to prove that they would find them; no build defines one.
//
// A rank that fails (time-out, overflow, bad input) stores POISON instead of values: its peers fail as soon as
// they look, and no rank takes a partial result for a whole one.
#pragma once
#include "abi.h"
#include "portable.h"

constexpr int kWarp = 32;
constexpr uint32_t kFullMask = 0xffffffffu;
constexpr uint32_t kPoison = 0xffffffffu;

enum Phase { READY, FREE };

struct WarpIndex {
  int lane, warp, num_warps;  // warp: of the grid
};
SEP_DEVICE WarpIndex warp_index() {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  return {thread % kWarp, thread / kWarp, static_cast<int>(gridDim.x * blockDim.x / kWarp)};
}

SEP_DEVICE uint64_t* flag(const SepGroup& g, int owner, int channel, Phase phase, int peer) {
  return reinterpret_cast<uint64_t*>(g.heap[owner]) + (channel * 2 + phase) * SEP_MAX_RANKS + peer;
}

// The first failure of this rank is the one that the host sees.
SEP_DEVICE void fail(const SepGroup& g, SepError error, int channel, int peer, int detail) {
  if (exchange_relaxed_device(&g.state->failed, 1)) return;
  g.status->channel = channel;
  g.status->peer = peer;
  g.status->detail = detail;
  store_release_host(&g.status->error, error);
}
SEP_DEVICE bool has_failed(const SepGroup& g) { return load_relaxed_device(&g.state->failed) != 0; }

// The same answer in all lanes, so that they may branch on it around warp collectives.
SEP_DEVICE bool warp_has_failed(const SepGroup& g) { return __shfl_sync(kFullMask, has_failed(g) ? 1 : 0, 0) != 0; }

// Returns the value that `peer` stored with this epoch, or POISON when this rank has failed (here or before).
SEP_DEVICE uint32_t wait_flag(const SepGroup& g, int channel, Phase phase, int peer, uint32_t epoch) {
  const uint64_t* address = flag(g, g.rank, channel, phase, peer);
  const bool bounded = g.timeout_ns > 0;
  uint64_t deadline = 0;
  for (int spins = 0;; spins++) {
    const uint64_t seen = load_acquire_system(address);
    const uint32_t value = static_cast<uint32_t>(seen);
    const int32_t ahead = static_cast<int32_t>(static_cast<uint32_t>(seen >> 32) - epoch);
    // A rank that has failed waits for nobody, so its poison may be of a later epoch.
    if (value == kPoison && ahead >= 0) {
      fail(g, SEP_PEER_FAILED, channel, peer, 0);
      return kPoison;
    }
#ifdef MUTANT_ANY_EPOCH
    if (seen >> 32 || epoch == 0) return value;
#else
    if (ahead == 0) return value;
#endif
    if (spins % 64 == 63) {
      if (has_failed(g)) return kPoison;
      if (bounded) {
        const uint64_t now = clock_ns();
        if (!deadline) deadline = now + g.timeout_ns;
        if (now > deadline) {
          fail(g, SEP_TIMEOUT, channel, peer, 0);
          return kPoison;
        }
      }
    }
    spin_pause(bounded);
  }
}

// Called by whole blocks. Afterwards every thread of the block may rely on what the flags announce.
SEP_DEVICE void wait_all(const SepGroup& g, int channel, Phase phase, uint32_t epoch) {
  for (int peer = threadIdx.x; peer < g.num_ranks; peer += blockDim.x) wait_flag(g, channel, phase, peer, epoch);
  __syncthreads();
}

// Called by whole blocks at the end of a kernel: true in the last block to arrive, which then sees what all
// blocks wrote and may publish it.
SEP_DEVICE bool last_block(const SepGroup& g, int channel, Phase phase) {
  SEP_SHARED(int, is_last, 1);
#ifndef MUTANT_NO_BARRIER_BEFORE_PUBLISH
  __syncthreads();
#endif
  if (threadIdx.x == 0) {
    int* counter = &g.state->finished[channel][phase];
#ifdef MUTANT_RELAXED_FINISH_COUNTER
    const int before = add_relaxed_device(counter, 1);
#else
    const int before = add_acquire_release_device(counter, 1);
#endif
    is_last[0] = before == static_cast<int>(gridDim.x) - 1;
    if (is_last[0]) *counter = 0;
  }
  __syncthreads();
  return is_last[0] != 0;
}

// READY for every peer, with a value each; ends the epoch of the sending side. Called by whole blocks.
template <class Value>
SEP_DEVICE void publish_ready(const SepGroup& g, int channel, uint32_t epoch, Value value) {
  if (!last_block(g, channel, READY)) return;
#ifdef MUTANT_NO_POISON
  const bool poisoned = false;
#else
  const bool poisoned = has_failed(g);
#endif
  for (int peer = threadIdx.x; peer < g.num_ranks; peer += blockDim.x) {
    const uint64_t word = static_cast<uint64_t>(epoch) << 32 | (poisoned ? kPoison : value(peer));
#ifdef MUTANT_RELAXED_READY_FLAG
    store_relaxed_system(flag(g, peer, channel, READY, g.rank), word);
#else
    store_release_system(flag(g, peer, channel, READY, g.rank), word);
#endif
  }
  if (threadIdx.x == 0) g.state->epoch[channel] = epoch;
}

// FREE for every peer: this rank has read what it was sent. Called by whole blocks.
SEP_DEVICE void publish_free(const SepGroup& g, int channel, uint32_t epoch) {
#ifdef MUTANT_FREE_BEFORE_LAST_BLOCK
  __syncthreads();
  const bool last = blockIdx.x == 0;
#else
  const bool last = last_block(g, channel, FREE);
#endif
  if (!last) return;
  const uint64_t word = static_cast<uint64_t>(epoch) << 32 | (has_failed(g) ? kPoison : 0);
  for (int peer = threadIdx.x; peer < g.num_ranks; peer += blockDim.x)
#ifdef MUTANT_RELAXED_FREE_FLAG
    store_relaxed_system(flag(g, peer, channel, FREE, g.rank), word);
#else
    store_release_system(flag(g, peer, channel, FREE, g.rank), word);
#endif
}

// The epoch that this rank's next send begins. The caller may write into peers' heaps afterwards.
SEP_DEVICE uint32_t begin_send(const SepGroup& g, int channel) {
  const uint32_t epoch = g.state->epoch[channel] + 1;
#ifndef MUTANT_NO_WAIT_FOR_FREE
  wait_all(g, channel, FREE, epoch - 1);
#endif
  return epoch;
}
// The epoch that this rank sent last, once every peer's share of it has arrived.
SEP_DEVICE uint32_t begin_receive(const SepGroup& g, int channel) {
  const uint32_t epoch = g.state->epoch[channel];
#ifndef MUTANT_NO_WAIT_FOR_READY
  wait_all(g, channel, READY, epoch);
#endif
  return epoch;
}
