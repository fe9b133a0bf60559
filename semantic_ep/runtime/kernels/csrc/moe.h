// Dispatch and combine. Five kernels a layer pass and one more for the gradients:
//
//   layout   where each token and each route goes (counting, so that every place is deterministic)
//   send     one copy of a row a (token, destination rank), with its routes; rows for the own rank stay
//   receive  waits for all senders, turns their counts into places of expanded rows
//   expand   one row a route, sorted by (slot, source rank, token)
//   reduce   weighted sum of a token's expert outputs on this rank, left in this rank's heap
//   pull     sum over ranks, in rank order
//   expand_grad  the gradient of reduce: what expand does, scaled, and the gradient of the weights
//
// Those after send can work on a part of the rows, so that this rank's own, which need no peer, come first.
//
// One slot a (token, rank) and de-duplication in the warp follow DeepEP; places are counted there by atomics.
#pragma once
#include "rows.h"

// A row's routes in the heap: source token, then (local slot, entry, weight) a route. Weights are in the
// accumulator of the combined rows; kernels that do not compute move them as words.
SEP_DEVICE int route_words(const SepMoe& a) { return 2 + a.weight_words; }
SEP_DEVICE int record_words(const SepMoe& a) { return 1 + route_words(a) * a.topk; }
SEP_DEVICE int32_t* record(const SepMoe& a, int owner, int64_t row) {
  return reinterpret_cast<int32_t*>(a.group.heap[owner] + a.record_offset) + row * record_words(a);
}
SEP_DEVICE int32_t* heap_slot_count(const SepMoe& a, int owner, int source) {
  return reinterpret_cast<int32_t*>(a.group.heap[owner] + a.slot_count_offset) +
         static_cast<int64_t>(source) * a.slots_per_rank;
}
SEP_DEVICE char* heap_row(const SepMoe& a, int owner, int64_t row) {
  return a.group.heap[owner] + a.row_offset + row * a.row_stride;
}
SEP_DEVICE char* heap_scale(const SepMoe& a, int owner, int64_t row) {
  return a.group.heap[owner] + a.scale_offset + row * a.scale_stride;
}
template <class T>
SEP_DEVICE T* heap_partial(const SepMoe& a, int owner, int64_t row) {
  return reinterpret_cast<T*>(a.group.heap[owner] + a.partial_offset + row * a.partial_stride);
}
template <class Weight>
SEP_DEVICE Weight* heap_grad(const SepMoe& a, int owner, int64_t row) {
  return reinterpret_cast<Weight*>(a.group.heap[owner] + a.grad_offset) + row * a.topk;
}
SEP_DEVICE void copy_weight(const SepMoe& a, const void* from, int64_t from_index, void* to, int64_t to_index) {
  for (int i = 0; i < a.weight_words; i++)
    static_cast<int32_t*>(to)[to_index * a.weight_words + i] =
        static_cast<const int32_t*>(from)[from_index * a.weight_words + i];
}

// Whether the rows of this source rank are in the part that a kernel works on.
SEP_DEVICE bool in_part(const SepMoe& a, int source) {
  return a.part == SEP_ALL || (source == a.group.rank) == (a.part == SEP_OWN);
}

// Sum of `warp_total` over the warps before this one, and over all. Called by whole blocks.
SEP_DEVICE int block_offset(int warp_total, int* block_total) {
  SEP_SHARED(int, totals, 32);
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) totals[warp] = warp_total;
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < warps; w++) {
    if (w < warp) before += totals[w];
    all += totals[w];
  }
  __syncthreads();
  *block_total = all;
  return before;
}

// Whether a candidate chose a target. Target v < G is a rank, and candidates are tokens; the others are slots,
// and candidates are routes.
SEP_DEVICE bool chose(const SepMoe& a, int target, int candidate) {
  const int ranks = a.group.num_ranks;
  if (target >= ranks) return a.slot[candidate] == target - ranks;
  const int first = target * a.slots_per_rank;
  bool hit = false;
  for (int k = 0; k < a.topk; k++) {
    const int slot = a.slot[static_cast<int64_t>(candidate) * a.topk + k];
    hit |= slot >= first && slot < first + a.slots_per_rank;
    if (target == 0 && (slot >= ranks * a.slots_per_rank || slot < -1))
      fail(a.group, SEP_BAD_SLOT, SEP_DISPATCH, a.group.rank, slot);
  }
  return hit;
}

// Calls visit(candidate, hit, hits before it) for the candidates of a warp; returns its hits.
constexpr int kChoicesAhead = 4;  // read by a lane before the first is counted
template <class Visit>
SEP_DEVICE int count_hits(const SepMoe& a, int target, int first, int last, int lane, Visit visit) {
  const uint32_t lanes_before = (1u << lane) - 1;
  int hits = 0;
  for (int base = first; base < last; base += kChoicesAhead * kWarp) {
    bool hit[kChoicesAhead];
    SEP_UNROLL
    for (int j = 0; j < kChoicesAhead; j++) {
      const int i = base + j * kWarp + lane;
      hit[j] = i < last && chose(a, target, i);
    }
    SEP_UNROLL
    for (int j = 0; j < kChoicesAhead; j++) {
      const int i = base + j * kWarp + lane;
      const uint32_t all = __ballot_sync(kFullMask, hit[j]);
      if (i < last) visit(i, hit[j], hits + __popc(all & lanes_before));
#ifndef MUTANT_NO_CARRY_BETWEEN_CHUNKS
      hits += __popc(all);
#endif
    }
  }
  return hits;
}

// A candidate's place is the number of candidates before it that chose the same target. A block counts for a
// target: each warp its own run of candidates, then again with the hits of the warps before it. Nothing is
// waited for, so any number of blocks will do.
__global__ void __launch_bounds__(1024, 1) layout(const __grid_constant__ SepMoe a) {
  const int ranks = a.group.num_ranks, slots = ranks * a.slots_per_rank;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int target = blockIdx.x; target < ranks + slots; target += gridDim.x) {
    const bool is_rank = target < ranks;
    const int candidates = is_rank ? a.tokens : a.tokens * a.topk;
    const int run = (candidates + warps - 1) / warps, first = warp * run;
    const int last = first + run < candidates ? first + run : candidates;
    const int hits = count_hits(a, target, first, last, lane, [](int, bool, int) {});
    int chosen;
    const int before = block_offset(hits, &chosen);
    count_hits(a, target, first, last, lane, [&](int i, bool hit, int place) {
      place += before;
      if (is_rank)
        a.rank_position[static_cast<int64_t>(i) * ranks + target] = hit && place < a.capacity ? place : -1;
      else if (hit)
        a.entry_position[i] = place;
    });
    if (threadIdx.x) continue;
    if (!is_rank) {
      a.slot_count[target - ranks] = chosen;
      continue;
    }
    a.rank_count[target] = chosen;
    if (chosen > a.capacity) fail(a.group, SEP_CAPACITY, SEP_DISPATCH, target, chosen);
  }
}

template <class Unit>
SEP_DEVICE void send_token(const SepMoe& a, int token, int lane, bool with_routes) {
  const int ranks = a.group.num_ranks, me = a.group.rank;
  int slot = -1, rank = -1, place = -1;
  if (lane < a.topk) {
    slot = a.slot[static_cast<int64_t>(token) * a.topk + lane];
    if (slot >= 0 && slot < ranks * a.slots_per_rank) rank = slot / a.slots_per_rank;
    if (rank >= 0) place = a.rank_position[static_cast<int64_t>(token) * ranks + rank];
  }
  const uint32_t same = __match_any_sync(kFullMask, rank);
  const bool leader = place >= 0 && __ffs(static_cast<int>(same)) - 1 == lane;
  const uint32_t leaders = __ballot_sync(kFullMask, leader);
  if (with_routes) {
    const int64_t route = static_cast<int64_t>(token) * a.topk + lane;
    const int entry = rank >= 0 ? a.entry_position[route] : 0;
    for (uint32_t left = leaders; left; left &= left - 1) {
      const int first = __ffs(static_cast<int>(left)) - 1;
      const int to = __shfl_sync(kFullMask, rank, first), row = __shfl_sync(kFullMask, place, first);
      int32_t* words = record(a, to, static_cast<int64_t>(me) * a.capacity + row);
      if (lane == 0) words[0] = token;
      if (lane < a.topk) {
        int32_t* fields = words + 1 + route_words(a) * lane;
        fields[0] = rank == to ? slot - to * a.slots_per_rank : -1;
        fields[1] = entry;
        copy_weight(a, a.weight, route, fields + 2, 0);
      }
    }
  }
  // Lane j keeps the j-th remote destination, so that the copy loop finds it by one shuffle.
  const uint32_t remote = __ballot_sync(kFullMask, leader && rank != me);
  const int num_remote = __popc(remote);
  int source_lane = 0;
  for (uint32_t left = remote, j = 0; left; left &= left - 1, j++)
    if (static_cast<int>(j) == lane) source_lane = __ffs(static_cast<int>(left)) - 1;
  const int to = __shfl_sync(kFullMask, rank, source_lane), row = __shfl_sync(kFullMask, place, source_lane);
  const int64_t heap_index = static_cast<int64_t>(me) * a.capacity + row;
  const uintptr_t row_target = lane < num_remote ? reinterpret_cast<uintptr_t>(heap_row(a, to, heap_index)) : 0;
  copy_row<Unit>(lane, a.x + static_cast<int64_t>(token) * a.row_bytes, a.row_bytes, num_remote, true,
                 [&](int t) { return __shfl_sync(kFullMask, row_target, t); });
  if (!a.scale_bytes) return;
  const uintptr_t scale_target = lane < num_remote ? reinterpret_cast<uintptr_t>(heap_scale(a, to, heap_index)) : 0;
  copy_row<uint32_t>(lane, a.scales + static_cast<int64_t>(token) * a.scale_bytes, a.scale_bytes, num_remote, true,
                     [&](int t) { return __shfl_sync(kFullMask, scale_target, t); });
}

// with_routes: false when only rows travel, along routes that the receivers already know (a gradient).
template <class Unit>
SEP_DEVICE void send_rows(const SepMoe& a, bool with_routes) {
  const WarpIndex w = warp_index();
  const int ranks = a.group.num_ranks;
  const uint32_t epoch = begin_send(a.group, SEP_DISPATCH);
  if (!warp_has_failed(a.group)) {
    if (with_routes)
      for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < ranks * a.slots_per_rank; i += gridDim.x * blockDim.x)
        heap_slot_count(a, i / a.slots_per_rank, a.group.rank)[i % a.slots_per_rank] = a.slot_count[i];
    for (int token = w.warp; token < a.tokens; token += w.num_warps) send_token<Unit>(a, token, w.lane, with_routes);
  }
  publish_ready(a.group, SEP_DISPATCH, epoch, [&](int peer) { return static_cast<uint32_t>(a.rank_count[peer]); });
}
template <class Unit>
__global__ void __launch_bounds__(512, 1) send(const __grid_constant__ SepMoe a) {
  send_rows<Unit>(a, true);
}
template <class Unit>
__global__ void __launch_bounds__(512, 1) send_along(const __grid_constant__ SepMoe a) {
  send_rows<Unit>(a, false);
}

// One block: the counts of all senders become the first row of each (slot, source rank). For its own rows a rank
// needs the counts of layout only.
__global__ void __launch_bounds__(1024) receive(const __grid_constant__ SepMoe a) {
  const int ranks = a.group.num_ranks, lane = threadIdx.x % kWarp;
  const bool own = a.part == SEP_OWN;
  if (!own) {
    const uint32_t epoch = a.group.state->epoch[SEP_DISPATCH];
    for (int peer = threadIdx.x; peer < ranks; peer += blockDim.x) {
      const uint32_t count = wait_flag(a.group, SEP_DISPATCH, READY, peer, epoch);
      a.recv_count[peer] = count == kPoison ? 0 : static_cast<int>(count);
    }
  }
  __syncthreads();
  const bool failed = has_failed(a.group);
  int rows = 0;
  for (int base = 0; base < ranks * a.slots_per_rank; base += blockDim.x) {
    const int i = base + threadIdx.x, slot = i / ranks, source = i % ranks;
    int count = 0;
    if (!failed && slot < a.slots_per_rank && in_part(a, source))
      count = own ? a.slot_count[source * a.slots_per_rank + slot] : heap_slot_count(a, a.group.rank, source)[slot];
    int inclusive = count;
    for (int step = 1; step < kWarp; step *= 2) {
      const int left = __shfl_up_sync(kFullMask, inclusive, step);
      if (lane >= step) inclusive += left;
    }
    int total;
    const int before = rows + block_offset(__shfl_sync(kFullMask, inclusive, kWarp - 1), &total);
    if (slot < a.slots_per_rank) a.slot_base[source * a.slots_per_rank + slot] = before + inclusive - count;
    rows += total;
  }
  __syncthreads();
  for (int slot = threadIdx.x; slot < a.slots_per_rank; slot += blockDim.x)
    a.tokens_per_slot[slot] = (slot + 1 < a.slots_per_rank ? a.slot_base[slot + 1] : rows) - a.slot_base[slot];
  if (threadIdx.x == 0) {
    a.total_rows[0] = rows;
    if (a.max_rows >= 0 && rows > a.max_rows) fail(a.group, SEP_ROWS, SEP_DISPATCH, a.group.rank, rows);
  }
}

// Walks the received rows of a part, a warp a row: visit(source rank, row of the heap).
template <class Visit>
SEP_DEVICE void for_each_received_row(const SepMoe& a, const WarpIndex& w, Visit visit) {
  int source = 0, first = 0;
  for (int n = w.warp;; n += w.num_warps) {
    for (; source < a.group.num_ranks; source++) {
      const int rows = in_part(a, source) ? a.recv_count[source] : 0;
      if (n < first + rows) break;
      first += rows;
    }
    if (source == a.group.num_ranks) return;
    visit(source, static_cast<int64_t>(source) * a.capacity + (n - first));
  }
}

// One row of the heap, or of this rank; each lane brings one of its routes, with slot -1 where there is none.
struct Route {
  int slot, entry;  // local slot, place among the source's routes to it
  const void* weight;
};
template <class Unit>
SEP_DEVICE void expand_row(const SepMoe& a, int source, int64_t row, int token, const Route& route, int lane) {
  int target = -1;
  if (lane < a.topk) {
    if (route.slot >= 0) target = a.slot_base[source * a.slots_per_rank + route.slot] + route.entry;
    if (target >= a.max_rows) target = -1;  // reported by receive
    a.expanded_row[row * a.topk + lane] = target;
    if (target >= 0) copy_weight(a, route.weight, 0, a.row_weight, target);
  }
  if (lane == 0) a.source_token[row] = token;
  const uint32_t wanted = __ballot_sync(kFullMask, target >= 0);
  const int targets = __popc(wanted);
  int source_lane = 0;
  for (uint32_t left = wanted, j = 0; left; left &= left - 1, j++)
    if (static_cast<int>(j) == lane) source_lane = __ffs(static_cast<int>(left)) - 1;
  const int64_t to = __shfl_sync(kFullMask, target, source_lane);
  const bool own = source == a.group.rank;  // rows of this rank never went through the heap
  copy_row<Unit>(lane, own ? a.x + static_cast<int64_t>(token) * a.row_bytes : heap_row(a, a.group.rank, row),
                 a.row_bytes, targets, own,
                 [&](int t) { return a.rows + __shfl_sync(kFullMask, to, t) * a.row_bytes; });
  if (!a.scale_bytes) return;
  copy_row<uint32_t>(lane, own ? a.scales + static_cast<int64_t>(token) * a.scale_bytes : heap_scale(a, a.group.rank, row),
                     a.scale_bytes, targets, own,
                     [&](int t) { return a.row_scales + __shfl_sync(kFullMask, to, t) * a.scale_bytes; });
}
template <class Unit>
__global__ void __launch_bounds__(512, 1) expand(const __grid_constant__ SepMoe a) {
  const WarpIndex w = warp_index();
  const uint32_t epoch = a.group.state->epoch[SEP_DISPATCH];
  if (!warp_has_failed(a.group))
    for_each_received_row(a, w, [&](int source, int64_t row) {
      const int32_t* words = record(a, a.group.rank, row);
      const int32_t* fields = words + 1 + route_words(a) * w.lane;
      Route route{-1, 0, nullptr};
      if (w.lane < a.topk) route = {fields[0], fields[1], fields + 2};
      expand_row<Unit>(a, source, row, words[0], route, w.lane);
    });
  publish_free(a.group, SEP_DISPATCH, epoch);
}

// The own part of expand: what send would have written into the heap comes from layout.
template <class Unit>
__global__ void __launch_bounds__(512, 1) expand_own(const __grid_constant__ SepMoe a) {
  const WarpIndex w = warp_index();
  const int me = a.group.rank, tokens = warp_has_failed(a.group) ? 0 : a.tokens;
  for (int token = w.warp; token < tokens; token += w.num_warps) {
    const int place = a.rank_position[static_cast<int64_t>(token) * a.group.num_ranks + me];
    if (place < 0) continue;
    Route route{-1, 0, nullptr};
    if (w.lane < a.topk) {
      const int64_t i = static_cast<int64_t>(token) * a.topk + w.lane;
      const int slot = a.slot[i] - me * a.slots_per_rank;
      if (slot >= 0 && slot < a.slots_per_rank)
        route = {slot, a.entry_position[i], static_cast<const int32_t*>(a.weight) + i * a.weight_words};
    }
    expand_row<Unit>(a, me, static_cast<int64_t>(me) * a.capacity + place, token, route, w.lane);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(512, 1) reduce(const __grid_constant__ SepMoe a) {
  using Accumulator = typename Element<T>::Accumulator;
  const WarpIndex w = warp_index();
  const T* y = static_cast<const T*>(a.y);
  const uint32_t epoch = a.part == SEP_OWN ? 0 : begin_send(a.group, SEP_COMBINE);
  for_each_received_row(a, w, [&](int, int64_t row) {
    const int expanded = w.lane < a.topk ? a.expanded_row[row * a.topk + w.lane] : -1;
    Accumulator weight = 1;
    if (a.row_weight && expanded >= 0) weight = static_cast<const Accumulator*>(a.row_weight)[expanded];
    sum_rows<T, N>(
        w.lane, __ballot_sync(kFullMask, expanded >= 0), a.hidden, heap_partial<T>(a, a.group.rank, row),
        [&](int k) { return y + static_cast<int64_t>(__shfl_sync(kFullMask, expanded, k)) * a.hidden; },
        [&](int k) { return __shfl_sync(kFullMask, weight, k); });
    if (a.row_grad && expanded >= 0)
      heap_grad<Accumulator>(a, a.group.rank, row)[w.lane] = static_cast<const Accumulator*>(a.row_grad)[expanded];
  });
  if (a.part != SEP_OWN) publish_ready(a.group, SEP_COMBINE, epoch, [](int) { return 0u; });
}

template <class T, int N>
__global__ void __launch_bounds__(512, 1) pull(const __grid_constant__ SepMoe a) {
  using Accumulator = typename Element<T>::Accumulator;
  const WarpIndex w = warp_index();
  const int ranks = a.group.num_ranks;
  const int64_t mine = static_cast<int64_t>(a.group.rank) * a.capacity;
  const uint32_t epoch = a.part == SEP_OWN ? 0 : begin_receive(a.group, SEP_COMBINE);
  const int tokens = warp_has_failed(a.group) ? 0 : a.tokens;
  for (int token = w.warp; token < tokens; token += w.num_warps) {
    const int32_t* position = a.rank_position + static_cast<int64_t>(token) * ranks;
    auto place = [&](int rank) { return rank < ranks && in_part(a, rank) ? position[rank] : -1; };
    const int low = place(w.lane), high = place(w.lane + kWarp);
    const uint64_t from = __ballot_sync(kFullMask, low >= 0) |
                          static_cast<uint64_t>(__ballot_sync(kFullMask, high >= 0)) << kWarp;
    sum_rows<T, N>(
        w.lane, from, a.hidden, static_cast<T*>(a.out) + static_cast<int64_t>(token) * a.hidden,
        [&](int rank) {
          const int row = __shfl_sync(kFullMask, rank < kWarp ? low : high, rank % kWarp);
          return heap_partial<T>(a, rank, mine + row);
        },
        [](int) { return Accumulator(1); });
    if (a.route_grad && w.lane < a.topk) {
      const int64_t route = static_cast<int64_t>(token) * a.topk + w.lane;
      const int slot = a.slot[route], rank = slot < 0 ? 0 : slot / a.slots_per_rank;
      static_cast<Accumulator*>(a.route_grad)[route] =
          slot < 0 || !in_part(a, rank) ? Accumulator(0) : heap_grad<Accumulator>(a, rank, mine + position[rank])[w.lane];
    }
  }
  if (a.part != SEP_OWN) publish_free(a.group, SEP_COMBINE, epoch);
}

// For each route of a received gradient row g: y_grad = weight * g, row_weight_grad = <g, y>.
template <class T, int N>
SEP_DEVICE void expand_grad_row(const SepMoe& a, const T* gradient, int expanded, int lane) {
  using Accumulator = typename Element<T>::Accumulator;
  const uint32_t routes = __ballot_sync(kFullMask, expanded >= 0);
  for (uint32_t left = routes; left; left &= left - 1) {
    const int64_t row = __shfl_sync(kFullMask, expanded, __ffs(static_cast<int>(left)) - 1);
    const T* y = static_cast<const T*>(a.y) + row * a.hidden;
    T* y_grad = static_cast<T*>(a.y_grad) + row * a.hidden;
    const Accumulator weight = a.row_weight ? static_cast<const Accumulator*>(a.row_weight)[row] : Accumulator(1);
    Accumulator dot = 0;
    for (int i = lane * N; i < a.hidden; i += kWarp * N) {
      const Pack<T, N> g = load_pack<T, N>(gradient + i);
      Pack<T, N> scaled;
      SEP_UNROLL
      for (int n = 0; n < N; n++) scaled.element[n] = Element<T>::round(weight * Element<T>::widen(g.element[n]));
      store_pack<T, N>(y_grad + i, scaled);
      if (!a.row_weight_grad) continue;
      const Pack<T, N> value = load_pack<T, N>(y + i);
      SEP_UNROLL
      for (int n = 0; n < N; n++)
        dot += Element<T>::widen(g.element[n]) * Element<T>::widen(value.element[n]);
    }
    if (!a.row_weight_grad) continue;
    for (int bits = kWarp / 2; bits; bits /= 2) dot += __shfl_xor_sync(kFullMask, dot, bits);
    if (lane == 0) static_cast<Accumulator*>(a.row_weight_grad)[row] = dot;
  }
}
template <class T, int N>
__global__ void __launch_bounds__(512, 1) expand_grad(const __grid_constant__ SepMoe a) {
  const WarpIndex w = warp_index();
  const uint32_t epoch = a.part == SEP_OWN ? 0 : begin_receive(a.group, SEP_DISPATCH);
  if (!warp_has_failed(a.group))
    for_each_received_row(a, w, [&](int source, int64_t row) {
      const bool own = source == a.group.rank;
      const T* gradient = own ? reinterpret_cast<const T*>(a.x) + static_cast<int64_t>(a.source_token[row]) * a.hidden
                              : reinterpret_cast<const T*>(heap_row(a, a.group.rank, row));
      expand_grad_row<T, N>(a, gradient, w.lane < a.topk ? a.expanded_row[row * a.topk + w.lane] : -1, w.lane);
    });
  if (a.part != SEP_OWN) publish_free(a.group, SEP_DISPATCH, epoch);
}
