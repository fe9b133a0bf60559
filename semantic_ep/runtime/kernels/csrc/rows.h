// Moving and summing rows, a warp a row.
#pragma once
#include "numeric.h"
#include "protocol.h"

// Loads of a lane that are under way before their first store.
template <class Unit>
constexpr int kInFlight = sizeof(Unit) == 16 ? 8 : 4;

// Copies one row to every target: `target(i)` for i < num_targets is called by the whole warp. The row is
// loaded once, however many targets there are.
template <class Unit, class Target>
SEP_DEVICE void copy_row(int lane, const char* from, int bytes, int num_targets, bool from_input, Target target) {
  const Unit* source = reinterpret_cast<const Unit*>(from);
  const int units = bytes / static_cast<int>(sizeof(Unit));
  for (int base = 0; base < units; base += kInFlight<Unit> * kWarp) {
    Unit buffer[kInFlight<Unit>];
    SEP_UNROLL
    for (int j = 0; j < kInFlight<Unit>; j++) {
      const int i = base + j * kWarp + lane;
      if (i < units) buffer[j] = from_input ? load_input(source + i) : load(source + i);
    }
    for (int t = 0; t < num_targets; t++) {
      Unit* to = reinterpret_cast<Unit*>(target(t));
      SEP_UNROLL
      for (int j = 0; j < kInFlight<Unit>; j++) {
        const int i = base + j * kWarp + lane;
        if (i < units) store(to + i, buffer[j]);
      }
    }
  }
}

// out = sum of scale * row over the set bits of `sources`, lowest bit first: a fixed order, one accumulator,
// one rounding. `row_of(bit)` and `scale_of(bit)` are called by the whole warp. The next row is on its way
// while one is added.
template <class T, int N, class RowOf, class ScaleOf>
SEP_DEVICE void sum_rows(int lane, uint64_t sources, int hidden, T* out, RowOf row_of, ScaleOf scale_of) {
  using Accumulator = typename Element<T>::Accumulator;
  constexpr int kPacks = sizeof(T) == 2 && N > 1 ? 4 : 2;  // of a lane; bounded by registers
  const int packs = hidden / N;
  for (int base = 0; base < packs; base += kPacks * kWarp) {
    Accumulator sum[kPacks][N] = {};
    Pack<T, N> next[kPacks] = {};
    auto fetch = [&](int bit) {
      const T* row = row_of(bit);
      SEP_UNROLL
      for (int j = 0; j < kPacks; j++) {
        const int i = base + j * kWarp + lane;
        if (i < packs) next[j] = load_pack<T, N>(row + static_cast<int64_t>(i) * N);
      }
    };
    uint64_t left = sources;
    if (left) fetch(__ffsll(left) - 1);
    while (left) {
      const Accumulator scale = scale_of(__ffsll(left) - 1);
      Pack<T, N> row[kPacks];
      SEP_UNROLL
      for (int j = 0; j < kPacks; j++) row[j] = next[j];
      left &= left - 1;
      if (left) fetch(__ffsll(left) - 1);
      SEP_UNROLL
      for (int j = 0; j < kPacks; j++) {
        SEP_UNROLL
        for (int n = 0; n < N; n++) sum[j][n] += scale * Element<T>::widen(row[j].element[n]);
      }
    }
    SEP_UNROLL
    for (int j = 0; j < kPacks; j++) {
      const int i = base + j * kWarp + lane;
      if (i >= packs) continue;
      Pack<T, N> rounded;
      SEP_UNROLL
      for (int n = 0; n < N; n++) rounded.element[n] = Element<T>::round(sum[j][n]);
      store_pack<T, N>(out + static_cast<int64_t>(i) * N, rounded);
    }
  }
}
