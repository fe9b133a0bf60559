#include "emu.h"

#include <sched.h>
#include <time.h>

#include <array>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"

namespace emu {
namespace {

struct Block;
struct Grid;

enum class State { ready, at_barrier, at_warp, done };

struct Fiber : Thread {
  Context context;
  State state = State::ready;
  Block* block = nullptr;
  bool spins = false, spin_is_bounded = false;
};

// Lanes that wait for each other in one warp collective; a warp has one for each mask in use.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  int line = 0;
  uint64_t in[32], out[32];
};

constexpr size_t kSharedBytes = 1024;  // of one shared array
constexpr int kSharedArrays = 4, kMasks = 4;

// Everything a block needs is allocated by the host when it starts: ThreadSanitizer takes an allocation for a
// write of the thread that makes it.
struct Block {
  Grid* grid;
  Geometry geometry;
  unsigned live, waiting = 0;
  int barrier_line = 0;
  char barrier_key = 0;
  std::vector<std::unique_ptr<Fiber>> threads;
  std::vector<std::array<Meeting, kMasks>> warps;
  std::array<std::unique_ptr<char[]>, kSharedArrays> shared;
  std::array<const void*, kSharedArrays> shared_keys{};
};

struct Grid {
  Stream* stream;
  unsigned blocks, threads;
  std::function<void()> body;
  std::string name;
  unsigned started = 0, finished = 0;
  std::vector<Context> spent;  // stacks (and TSan fibers) to hand to the next kernel of the stream
};

}  // namespace

struct Stream {
  int device;
  char order_key = 0;
  std::deque<std::unique_ptr<Grid>> queue;
  std::vector<Context> pool;
};

Thread* current = nullptr;

namespace {

struct Settings {
  unsigned max_resident_blocks = 1u << 30;  // of one device
  unsigned yield_percent = 25;
  bool foreign_ranks = false;  // other ranks are other processes: an idle spin is no deadlock
};

class Scheduler {
 public:
  Settings settings;
  std::string error;

  void seed(uint64_t value) { random_ = 88172645463325252ull ^ (0x9E3779B97F4A7C15ull * (value + 1)); }
  Stream* new_stream(int device) {
    streams_.push_back(std::make_unique<Stream>());
    streams_.back()->device = device;
    return streams_.back().get();
  }
  int run();
  void yield(Point point);
  void barrier(int line);
  const uint64_t* exchange(uint32_t mask, uint64_t value, int line);
  void* shared(const void* key, size_t bytes);
  void progress() { progress_++; }
  [[noreturn]] void fail(const char* format, ...);
  [[noreturn]] void finish_current();
  void abandon();

 private:
  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<Fiber*> ready_;
  std::vector<std::unique_ptr<Block>> blocks_;  // those of finished grids are freed when run() returns
  std::vector<std::unique_ptr<Grid>> finished_;
  std::map<int, unsigned> resident_;
  std::vector<Context> free_stacks_;
  Context host_;
  uint64_t random_ = 88172645463325252ull, progress_ = 0, seen_ = 0, idle_spins_ = 0;
  int favoured_device_ = 0;
  long favour_left_ = 0;
  unsigned favour_percent_ = 0;

  uint64_t random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    return random_ ^= random_ << 17;
  }
  static Fiber* self() { return static_cast<Fiber*>(current); }
  void to_host() { switch_context(&self()->context, &host_, self()->state == State::done); }
  void wake(Fiber* fiber) {
    fiber->state = State::ready;
    fiber->spins = false;
    ready_.push_back(fiber);
  }
  void release_barrier(Block* block);
  void start_blocks();
  void start_block(Grid* grid);
  Context take_context(Stream* stream);
  Fiber* pick();
  void retire(Fiber* fiber);
  bool stuck(const Fiber* last);
  void report(const char* what);
};

Scheduler scheduler;

void fiber_entry() {
  on_first_entry();
  Fiber* fiber = static_cast<Fiber*>(current);
  Grid* grid = fiber->block->grid;
  // The launch, and every kernel before it in the stream, happen before this thread. Nothing else does.
  EMU_ACQUIRE(fiber->block);
  EMU_ACQUIRE(&grid->stream->order_key);
  grid->body();
  EMU_RELEASE(&grid->stream->order_key);
  scheduler.finish_current();
}

void Scheduler::finish_current() {
  self()->state = State::done;
  progress();
  to_host();
  __builtin_unreachable();
}

void Scheduler::fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  error = std::string(self()->block->grid->name) + ": " + text;
  to_host();  // run() sees the error and never comes back here
  __builtin_unreachable();
}

void Scheduler::yield(Point point) {
  Fiber* fiber = self();
  if (point == Point::spin || point == Point::bounded_spin) {
    fiber->spins = true;
    fiber->spin_is_bounded = point == Point::bounded_spin;
  } else {
    // Reading a flag again is part of spinning.
    if (point == Point::atomic) fiber->spins = false;
    if (random() % 100 >= settings.yield_percent) return;
  }
  to_host();
}

void Scheduler::release_barrier(Block* block) {
  for (auto& thread : block->threads)
    if (thread->state == State::at_barrier) wake(thread.get());
  block->waiting = 0;
  progress();
}

void Scheduler::barrier(int line) {
  Fiber* fiber = self();
  Block* block = fiber->block;
  if (block->live != block->threads.size())
    fail("divergent barrier: threads of the block have returned before the one at line %d", line);
  if (block->waiting && block->barrier_line != line)
    fail("divergent barrier: __syncthreads at line %d meets one at line %d", line, block->barrier_line);
  block->barrier_line = line;
  EMU_RELEASE(&block->barrier_key);
  if (++block->waiting == block->live) {
    release_barrier(block);
  } else {
    fiber->state = State::at_barrier;
    to_host();
  }
  EMU_ACQUIRE(&block->barrier_key);
}

const uint64_t* Scheduler::exchange(uint32_t mask, uint64_t value, int line) {
  Fiber* fiber = self();
  Block* block = fiber->block;
  const unsigned warp = fiber->index.x >> 5, lane = fiber->index.x & 31;
  if (!((mask >> lane) & 1)) fail("lane %u calls a warp collective at line %d with mask %08x", lane, line, mask);
  Meeting* meeting = nullptr;
  for (auto& candidate : block->warps[warp])
    if (!meeting && (candidate.mask == mask || !candidate.mask)) meeting = &candidate;
  if (!meeting) fail("more than %d masks in one warp at line %d", kMasks, line);
  meeting->mask = mask;
  if (meeting->arrived && meeting->line != line)
    fail("divergent warp: a collective at line %d meets one at line %d (mask %08x)", line, meeting->line, mask);
  meeting->line = line;
  meeting->in[lane] = value;
  meeting->arrived |= 1u << lane;
  EMU_RELEASE(meeting);
  if (meeting->arrived == mask) {
    memcpy(meeting->out, meeting->in, sizeof meeting->out);
    meeting->arrived = 0;
    progress();
    for (unsigned i = 0; i < 32; i++)
      if (((mask >> i) & 1) && i != lane) wake(block->threads[warp * 32 + i].get());
  } else {
    fiber->state = State::at_warp;
    to_host();
  }
  EMU_ACQUIRE(meeting);
  return meeting->out;
}

void* Scheduler::shared(const void* key, size_t bytes) {
  Block* block = self()->block;
  int index = 0;
  while (index < kSharedArrays && block->shared_keys[index] && block->shared_keys[index] != key) index++;
  if (index == kSharedArrays || bytes > kSharedBytes) fail("shared memory: more than 4 arrays, or %zu bytes in one", bytes);
  block->shared_keys[index] = key;
  // At the end of its allocation, so that AddressSanitizer sees an overrun.
  return block->shared[index].get() + kSharedBytes - (bytes + 15) / 16 * 16;
}

// A stack is reused along its stream only: ThreadSanitizer would otherwise see an order between ranks that
// the kernels do not establish.
Context Scheduler::take_context(Stream* stream) {
  Context context;
  if (!stream->pool.empty()) {
    context = stream->pool.back();
    stream->pool.pop_back();
  } else if (!free_stacks_.empty()) {
    context = free_stacks_.back();
    free_stacks_.pop_back();
  } else {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) {
      error = "no memory for another fiber";
      return context;
    }
    context.stack = static_cast<char*>(stack);
  }
#if defined(EMU_TSAN)
  if (!context.tsan) context.tsan = __tsan_create_fiber(0);
#endif
  prepare(&context, fiber_entry);
  return context;
}

void Scheduler::start_block(Grid* grid) {
  blocks_.push_back(std::make_unique<Block>());
  Block* block = blocks_.back().get();
  block->grid = grid;
  block->geometry = {{grid->started++}, {grid->threads}, {grid->blocks}};
  block->live = grid->threads;
  block->warps.resize((grid->threads + 31) / 32);
  for (auto& array : block->shared) {
    array.reset(new char[kSharedBytes]);
    memset(array.get(), 0xCD, kSharedBytes);  // uninitialised shared memory must not look like zeros
  }
  for (unsigned i = 0; i < grid->threads; i++) {
    auto fiber = std::make_unique<Fiber>();
    fiber->index = {i};
    fiber->geometry = &block->geometry;
    fiber->block = block;
    fiber->context = take_context(grid->stream);
    ready_.push_back(fiber.get());
    block->threads.push_back(std::move(fiber));
  }
  EMU_RELEASE(block);
  resident_[grid->stream->device]++;
}

void Scheduler::start_blocks() {
  for (auto& stream : streams_) {
    if (stream->queue.empty()) continue;
    Grid* grid = stream->queue.front().get();
    while (error.empty() && grid->started < grid->blocks &&
           resident_[stream->device] < settings.max_resident_blocks)
      start_block(grid);
  }
}

// Adversarial, not fair: for a while one device gets nearly all the turns, so that it runs ahead of its peers
// as far as the protocol lets it.
Fiber* Scheduler::pick() {
  if (favour_left_-- <= 0) {
    favour_left_ = random() % 20000;
    favoured_device_ = streams_[random() % streams_.size()]->device;
    favour_percent_ = random() % 3 ? 0 : 97;
  }
  size_t index = random() % ready_.size();
  for (int tries = 0; tries < 16 && favour_percent_; tries++) {
    if (ready_[index]->block->grid->stream->device == favoured_device_) break;
    if (random() % 100 >= favour_percent_) break;
    index = random() % ready_.size();
  }
  Fiber* fiber = ready_[index];
  ready_[index] = ready_.back();
  ready_.pop_back();
  return fiber;
}

void Scheduler::retire(Fiber* fiber) {
  Block* block = fiber->block;
  Grid* grid = block->grid;
  grid->spent.push_back(fiber->context);
  block->live--;
  if (block->waiting) {
    error = grid->name + ": divergent barrier: threads of the block have returned while others wait at line " +
            std::to_string(block->barrier_line);
    return;
  }
  if (block->live) return;
  Stream* stream = grid->stream;
  resident_[stream->device]--;
  if (++grid->finished < grid->blocks) return;
  stream->pool.insert(stream->pool.end(), grid->spent.begin(), grid->spent.end());
  finished_.push_back(std::move(stream->queue.front()));
  stream->queue.pop_front();
}

void Scheduler::report(const char* what) {
  error = what;
  for (auto& stream : streams_)
    if (!stream->queue.empty()) {
      const Grid& grid = *stream->queue.front();
      char line[160];
      snprintf(line, sizeof line, "; device %d: %s, %u of %u blocks started, %u finished", stream->device,
               grid.name.c_str(), grid.started, grid.blocks, grid.finished);
      error += line;
    }
}

// True when nothing can ever move again. Waits that end by a time-out, and waits for other processes, are
// given the processor's time instead.
bool Scheduler::stuck(const Fiber* last) {
  if (progress_ != seen_ || !last->spins) {
    seen_ = progress_;
    idle_spins_ = 0;
    return false;
  }
  if (++idle_spins_ <= 64 * ready_.size() + 1024) return false;
  idle_spins_ = 0;
  bool may_end = settings.foreign_ranks;
  for (const Fiber* fiber : ready_) may_end |= !fiber->spins || fiber->spin_is_bounded;
  if (!may_end) return true;
  sched_yield();
  return false;
}

int Scheduler::run() {
#if defined(EMU_TSAN)
  host_.tsan = __tsan_get_current_fiber();
#endif
  for (auto& stream : streams_) EMU_RELEASE(&stream->order_key);
  while (error.empty()) {
    start_blocks();
    if (!error.empty()) break;
    if (ready_.empty()) {
      bool idle = true;
      for (auto& stream : streams_) idle &= stream->queue.empty();
      if (idle) break;
      report("deadlock: every thread waits at a barrier or in a warp collective");
      break;
    }
    Fiber* fiber = pick();
    current = fiber;
    switch_context(&host_, &fiber->context, false);
    if (!error.empty()) break;
    if (fiber->state == State::ready) {
      ready_.push_back(fiber);
      if (stuck(fiber)) report("deadlock: every thread spins on a flag that nobody will set");
    } else if (fiber->state == State::done) {
      retire(fiber);
    }
  }
  for (auto& stream : streams_) {
    EMU_ACQUIRE(&stream->order_key);  // the host has waited for the device
    for (Context& context : stream->pool) {
#if defined(EMU_TSAN)
      __tsan_destroy_fiber(context.tsan);
      context.tsan = nullptr;
#endif
      free_stacks_.push_back(context);
    }
    stream->pool.clear();
  }
  const bool failed = !error.empty();
  if (failed) abandon();
  blocks_.clear();
  finished_.clear();
  return failed;
}

// After an error: forget what was running. Stacks of fibers that never ended are given back to the system.
void Scheduler::abandon() {
  for (auto& block : blocks_)
    for (auto& thread : block->threads)
      if (thread->state != State::done && thread->context.stack) munmap(thread->context.stack, kStackBytes);
  ready_.clear();
  resident_.clear();
  for (auto& stream : streams_) {
    for (auto& grid : stream->queue) free_stacks_.insert(free_stacks_.end(), grid->spent.begin(), grid->spent.end());
    stream->queue.clear();
  }
}

}  // namespace

void block_barrier(int line) { scheduler.barrier(line); }
const uint64_t* warp_exchange(uint32_t mask, uint64_t value, int line) { return scheduler.exchange(mask, value, line); }
void* shared_memory(const void* key, size_t bytes) { return scheduler.shared(key, bytes); }
void yield_point(Point point) { scheduler.yield(point); }
void note_progress() { scheduler.progress(); }
uint64_t clock_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000ull + now.tv_nsec;
}
void enqueue(Stream* stream, unsigned blocks, unsigned threads, std::function<void()> body, const char* name) {
  auto grid = std::make_unique<Grid>();
  grid->stream = stream;
  grid->blocks = blocks;
  grid->threads = threads;
  grid->body = std::move(body);
  grid->name = name;
  stream->queue.push_back(std::move(grid));
}

}  // namespace emu

extern "C" {
void* sep_emu_new_stream(int device) { return emu::scheduler.new_stream(device); }
// Runs everything that is queued. 0, or 1 and a text in sep_emu_error().
int sep_emu_synchronize() {
  emu::scheduler.error.clear();
  return emu::scheduler.run();
}
const char* sep_emu_error() { return emu::scheduler.error.c_str(); }
void sep_emu_configure(uint64_t seed, int max_resident_blocks, int yield_percent, int foreign_ranks) {
  emu::scheduler.seed(seed);
  emu::scheduler.settings.max_resident_blocks = max_resident_blocks > 0 ? max_resident_blocks : 1u << 30;
  emu::scheduler.settings.yield_percent = yield_percent;
  emu::scheduler.settings.foreign_ranks = foreign_ranks != 0;
}
}
