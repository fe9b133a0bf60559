// The C ABI between the kernels and their callers: plain structs, no framework. `abi.py` mirrors them, and
// refuses a library whose version or struct sizes differ.
//
// Shapes: T tokens here, K routes a token, S physical slots a rank, G ranks, C capacity (rows that one rank
// may send to one other), N = G * C rows of a receive buffer, R rows after expansion, sorted by slot.
#pragma once
#include <cstdint>

#define SEP_ABI_VERSION 2
#define SEP_MAX_RANKS 64
#define SEP_MAX_TOPK 16
#define SEP_FLAG_BYTES 4096  // at the start of every heap: [channel][ready, free][rank] flags of 8 bytes

// A channel carries one kind of exchange. Each has its own epochs, so exchanges need no global order.
enum SepChannel { SEP_DISPATCH, SEP_COMBINE, SEP_SCATTER, SEP_GATHER, SEP_CHANNELS };

// Which received rows a kernel works on. With SEP_OWN it needs no peer: it neither waits for flags nor stores any.
// Rows of a part are numbered from 0, in the same order.
enum SepPart { SEP_ALL, SEP_OWN, SEP_OTHERS };  // of all ranks' tokens, of this rank's, of the others'

enum SepDtype { SEP_F32, SEP_F16, SEP_BF16, SEP_F64 };

enum SepError {
  SEP_OK = 0,
  SEP_TIMEOUT = 1,           // detail: unused
  SEP_PEER_FAILED = 2,       // a peer had an error and said so in its flag
  SEP_CAPACITY = 3,          // detail: rows that a rank wanted to send to `peer`
  SEP_ROWS = 4,              // detail: rows received after expansion
  SEP_BAD_SLOT = 5,          // detail: the slot
  SEP_SHUFFLE_MISMATCH = 6,  // `peer` shuffles by another permutation
};

// The rank's own memory, on the device, zeroed once.
struct SepState {
  uint32_t epoch[SEP_CHANNELS];  // exchanges begun; lives on the device so that a CUDA graph can be replayed
  int32_t finished[SEP_CHANNELS][2];  // blocks that reached the end of the sending / of the receiving kernel
  int32_t failed;
};

// Visible to the host without synchronising (pinned memory), zeroed once. `error` is written last.
struct SepStatus {
  int32_t error, channel, peer, detail;
};

struct SepGroup {
  int32_t rank, num_ranks;
  int64_t timeout_ns;         // 0: wait for ever
  char* heap[SEP_MAX_RANKS];  // every rank's symmetric heap, as this rank maps it
  SepState* state;
  SepStatus* status;
};

struct SepLaunch {
  int32_t blocks, threads;  // threads: a multiple of 32
  void* stream;
};

struct SepMoe {
  SepGroup group;
  int32_t tokens, topk, slots_per_rank, capacity;
  int32_t row_bytes, scale_bytes;  // of one dispatched row, and of its scales (0: none)
  int32_t row_stride, scale_stride, partial_stride;  // bytes in the heap, multiples of 16
  int32_t hidden;                  // elements of a combined row
  int32_t max_rows;                // rows that `rows`, `row_weight` can hold
  int32_t dtype;                   // SepDtype of the combined rows
  int32_t weight_words;            // 4-byte words of a weight and of its gradient: 2 (double) with SEP_F64, else 1 (float)
  int32_t part;                    // SepPart
  int64_t slot_count_offset, record_offset, row_offset, scale_offset, partial_offset, grad_offset;  // in a heap

  const int32_t* slot;       // [T, K] global physical slot, rank * S + local slot; -1: dropped route
  const void* weight;        // [T, K]
  const char* x;             // [T] rows of row_bytes
  const char* scales;        // [T] rows of scale_bytes
  int32_t* rank_position;    // [T, G] place of the token among the rows sent to that rank, -1: not sent
  int32_t* entry_position;   // [T, K] place of the route among all routes of this rank to that slot
  int32_t* rank_count;       // [G] rows sent to each rank
  int32_t* slot_count;       // [G * S] routes to each slot
  int32_t* recv_count;       // [G] rows received from each rank
  int32_t* tokens_per_slot;  // [S]
  int32_t* slot_base;        // [G, S] first expanded row of (source rank, local slot)
  int32_t* total_rows;       // [1] R
  int32_t* expanded_row;     // [N, K] row in `rows` of each route of a received row, -1: not for this rank
  int32_t* source_token;     // [N] token on the source rank
  char* rows;                // [R] rows of row_bytes, sorted by (slot, source rank, token)
  char* row_scales;          // [R] rows of scale_bytes
  void* row_weight;          // [R]; null in combine: weight 1

  const void* y;               // [R, hidden] expert outputs
  const void* row_grad;        // [R] gradient of row_weight, null: none is returned
  void* out;                   // [T, hidden]
  void* route_grad;            // [T, K] gradient of weight
  void* y_grad;                // [R, hidden]
  void* row_weight_grad;       // [R]
};

struct SepShuffle {
  SepGroup group;
  int32_t rows_per_rank, num_rows;  // num_rows: rows of the gathered matrix
  int32_t hidden, row_bytes, row_stride, dtype;
  int64_t scatter_offset, gather_offset, fingerprint_offset;
  const int32_t* permutation;  // [G * rows_per_rank] gathered row of each scattered row, -1: padding
  const void* x;
  void* out;
};
