// What g++ -fsanitize=thread calls for each load and store. Linked in place of the ThreadSanitizer's library, compiled
// without that flag.
#include "block.h"

namespace {

using sparseops_emulation::memory::Access;

// `alignment` is what the compiler promises of the access's type.
void on_access(const void* address, std::size_t bytes, std::size_t alignment, Access access, const void* site) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignment && sparseops_emulation::in_kernel()) {
    auto& block = sparseops_emulation::block();
    block.self().site = site;
    block.fail("an access of %zu bytes at an address that is no multiple of %zu", bytes, alignment);
  }
  sparseops_emulation::memory::on_access(address, bytes, access, site);
}

}  // namespace

#define HOOK(name, bytes, alignment, kind) \
  extern "C" void __tsan_##name(void* p) { on_access(p, bytes, alignment, kind, __builtin_return_address(0)); }
#define HOOKS(bytes, alignment)                       \
  HOOK(read##bytes, bytes, alignment, Access::read)   \
  HOOK(write##bytes, bytes, alignment, Access::write) \
  HOOK(unaligned_read##bytes, bytes, 1, Access::read) \
  HOOK(unaligned_write##bytes, bytes, 1, Access::write)
HOOKS(1, 1)
HOOKS(2, 2)
HOOKS(4, 4)
HOOKS(8, 8)
HOOKS(16, 8)  // g++ calls an access of 16 bytes aligned from 8 on

extern "C" void __tsan_read_range(void* p, std::size_t n) {
  on_access(p, n, 1, Access::read, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, std::size_t n) {
  on_access(p, n, 1, Access::write, __builtin_return_address(0));
}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}

// Atomics of the standard library (shared_ptr, guards of static variables): here nothing runs at the same time.
#define ATOMIC_HOOKS(bits, type)                                                         \
  extern "C" type __tsan_atomic##bits##_fetch_add(volatile type* p, type v, int) {       \
    const type old = *p;                                                                 \
    *p = static_cast<type>(old + v);                                                     \
    return old;                                                                          \
  }                                                                                      \
  extern "C" type __tsan_atomic##bits##_load(const volatile type* p, int) { return *p; } \
  extern "C" void __tsan_atomic##bits##_store(volatile type* p, type v, int) { *p = v; }
ATOMIC_HOOKS(8, std::uint8_t)
ATOMIC_HOOKS(32, std::uint32_t)
ATOMIC_HOOKS(64, std::uint64_t)
