#include "fiber.h"

#include <sys/mman.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "fiber.cpp: the emulator switches stacks on x86-64 alone"
#endif

// Saves the registers that a call must preserve on the current stack, notes that stack in *from, and takes up `to`,
// which was left the same way. swapcontext() would cost twenty times as much: it asks the kernel for the signal mask.
extern "C" void sparseops_emulation_switch(void** from, void* to);
asm(R"(
.text
.type sparseops_emulation_switch, @function
sparseops_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sparseops_emulation_switch, . - sparseops_emulation_switch
)");

namespace sparseops_emulation {

Stack::Stack()
    : base_(static_cast<std::byte*>(
          mmap(nullptr, kGuard + kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
  if (base_ == MAP_FAILED || mprotect(base_, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
}

Stack::~Stack() { munmap(base_, kGuard + kBytes); }

bool Stack::guards(const void* address) const { return address >= base_ && address < base_ + kGuard; }

void Stack::wipe() const {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(bottom(), kBytes);
#endif
}

void* Stack::prepare(void (*entry)()) const {
#if defined(__SANITIZE_ADDRESS__)
  constexpr std::size_t kEntry = 4096;  // a fiber ends within its entry, which does not return
  __asan_unpoison_memory_region(base_ + kGuard + kBytes - kEntry, kEntry);
#endif
  auto top = reinterpret_cast<void**>(base_ + kGuard + kBytes);
  top[-1] = nullptr;  // the entry's return address; its stack is aligned as after a call
  top[-2] = reinterpret_cast<void*>(entry);
  return top - 8;  // six registers below it
}

void jump(void** from, void* to, [[maybe_unused]] const void* bottom, [[maybe_unused]] std::size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, bottom, size);
  sparseops_emulation_switch(from, to);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  sparseops_emulation_switch(from, to);
#endif
}

void arrived([[maybe_unused]] MainStack& main) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  std::size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (main.bottom) return;  // of later fibers, the one before is another fiber
  main.bottom = bottom;
  main.size = size;
#endif
}

}  // namespace sparseops_emulation
