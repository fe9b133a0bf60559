// Switching between fibers, and telling the sanitizers about it. This file and emu.cpp are compiled without
// -fsanitize=thread: ThreadSanitizer must see the kernels, not their scheduler.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#if defined(EMU_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#define EMU_ACQUIRE(address) __tsan_acquire(address)
#define EMU_RELEASE(address) __tsan_release(address)
#else
#define EMU_ACQUIRE(address) ((void)(address))
#define EMU_RELEASE(address) ((void)(address))
#endif
#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

constexpr size_t kStackBytes = 128 << 10;

struct Context {
  char* stack = nullptr;  // null: the host's own stack
  void* tsan = nullptr;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t ucontext;
#endif
};

#if defined(__x86_64__)
// Saves the callee-saved registers on the old stack and restores them from the new one.
asm(R"(
.text
.globl emu_switch_stacks
.hidden emu_switch_stacks
.type emu_switch_stacks,@function
emu_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch_stacks,.-emu_switch_stacks
)");
extern "C" void emu_switch_stacks(void** from, void* to);
#endif

inline void prepare(Context* context, void (*entry)()) {
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(context->stack + kStackBytes);
  *--top = nullptr;  // keeps the stack 16-byte aligned at entry
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  context->stack_pointer = top;
#else
  getcontext(&context->ucontext);
  context->ucontext.uc_stack.ss_sp = context->stack;
  context->ucontext.uc_stack.ss_size = kStackBytes;
  context->ucontext.uc_link = nullptr;
  makecontext(&context->ucontext, entry, 0);
#endif
}

// `leaves_for_ever`: the fiber that is left has ended.
inline void switch_context(Context* from, Context* to, bool leaves_for_ever) {
#if defined(EMU_TSAN)
  __tsan_switch_to_fiber(to->tsan, 1);  // 1: the switch itself orders nothing
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(leaves_for_ever ? nullptr : &fake_stack, to->stack,
                                 to->stack ? kStackBytes : 8 << 20);
#else
  (void)leaves_for_ever;
#endif
#if defined(__x86_64__)
  emu_switch_stacks(&from->stack_pointer, to->stack_pointer);
#else
  swapcontext(&from->ucontext, &to->ucontext);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

inline void on_first_entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace emu
