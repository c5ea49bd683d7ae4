// See shared_memory.h.
#include "shared_memory.h"

#include <link.h>

#include "block.h"
#include "cuda_emulation.h"

namespace sparseops_emulation {
namespace {

// Dynamic shared memory does not begin at 0, so that an address without its base fails. __shared__ variables lie far
// from it, at their distance from an anchor.
constexpr std::uint32_t kDynamicBase = 1024;
constexpr std::uint32_t kVariables = 0x80000000;
constexpr std::ptrdiff_t kReach = 1 << 30;
const std::byte anchor{};

const std::byte* variables_anchor() {
  const std::byte* begin = shared_variables().begin;
  return begin ? begin : &anchor;
}

}  // namespace

unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(block().dynamic_shared()); }

std::uint32_t shared_address(const void* pointer) {
  Block& b = block();
  const auto p = static_cast<const std::byte*>(pointer);
  if (p >= b.dynamic_shared() && p <= b.dynamic_shared() + b.shared_bytes())
    return kDynamicBase + static_cast<std::uint32_t>(p - b.dynamic_shared());
  const std::ptrdiff_t distance = p - variables_anchor();
  b.self().site = EMU_SITE;
  if (distance <= -kReach || distance >= kReach || (shared_variables().begin && !shared_variables().holds(p, 0)))
    b.fail("shared_address: %p does not lie in shared memory", pointer);
  return kVariables + static_cast<std::uint32_t>(distance);
}

std::byte* shared_pointer(std::uint32_t address, std::size_t bytes, std::size_t alignment, const char* what,
                          unsigned rank) {
  Block& b = block();
  if (address % alignment) b.fail("%s: the shared address 0x%x is no multiple of %zu", what, address, alignment);
  if (rank >= b.cluster()) b.fail("%s: block %u of a cluster of %u", what, rank, b.cluster());
  if (b.has_ended(rank)) b.fail("%s: shared memory of block %u of the cluster, which has ended", what, rank);
  if (address >= kVariables - kReach) {
    if (b.cluster() > 1) b.fail("%s: a __shared__ variable, which blocks of a cluster may not have here", what);
    const auto p = const_cast<std::byte*>(variables_anchor() + (std::ptrdiff_t{address} - std::ptrdiff_t{kVariables}));
    if (shared_variables().begin && !shared_variables().holds(p, bytes))
      b.fail("%s: the shared address 0x%x lies outside the __shared__ variables", what, address);
    return p;
  }
  if (address < kDynamicBase || address + bytes > kDynamicBase + b.shared_bytes())
    b.fail("%s: the shared address 0x%x lies outside the %zu bytes of dynamic shared memory from 0x%x", what, address,
           b.shared_bytes(), kDynamicBase);
  return b.dynamic_shared(rank) + (address - kDynamicBase);
}

std::byte* shared_pointer(std::uint32_t address, std::size_t bytes, std::size_t alignment, const char* what) {
  return shared_pointer(address, bytes, alignment, what, block().self().rank);
}

void require_global(const void* address, std::size_t bytes, std::size_t alignment, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignment)
    block().fail("%s: the global address %p is no multiple of %zu", what, address, alignment);
  if (!memory::is_global(address, bytes))
    block().fail("%s: %zu bytes at %p lie outside every global buffer", what, bytes, address);
}

// They are thread_local (cuda_emulation.h), and the program has no other such variables: all that its image brings.
memory::Range shared_variables() {
#if defined(EMU_SHARED_VARIABLES_KNOWN)
  const auto look = [](dl_phdr_info* module, std::size_t, void* found) {
    const auto here = reinterpret_cast<ElfW(Addr)>(&shared_variables);
    const ElfW(Phdr)* variables = nullptr;
    bool is_ours = false;
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const ElfW(Phdr) & part = module->dlpi_phdr[i];
      if (part.p_type == PT_TLS) variables = &part;
      const ElfW(Addr) begin = module->dlpi_addr + part.p_vaddr;
      if (part.p_type == PT_LOAD && here >= begin && here < begin + part.p_memsz) is_ours = true;
    }
    if (is_ours && variables && module->dlpi_tls_data) {
      const auto begin = static_cast<const std::byte*>(module->dlpi_tls_data);
      *static_cast<memory::Range*>(found) = {begin, begin + variables->p_memsz};
    }
    return int(is_ours);
  };
  static const memory::Range range = [&] {
    memory::Range found;
    dl_iterate_phdr(look, &found);
    return found;
  }();
  return range;
#else
  return {};
#endif
}

}  // namespace sparseops_emulation
