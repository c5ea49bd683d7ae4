// Shared memory as instructions address it: by 32 bits, the same in every block of a cluster.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparseops_emulation {

unsigned char* dynamic_shared();
std::uint32_t shared_address(const void* pointer);

// Where the running thread's block has these bytes, or block `rank` of its cluster. Fails, in the name of `what`, for
// an address that is no multiple of `alignment`, for bytes that lie outside shared memory, and where that block has
// ended. The first is for the running thread alone; work in the background names the rank.
std::byte* shared_pointer(std::uint32_t address, std::size_t bytes, std::size_t alignment, const char* what);
std::byte* shared_pointer(std::uint32_t address, std::size_t bytes, std::size_t alignment, const char* what,
                          unsigned rank);

// Fails unless [address, address + bytes) lies within one global buffer and begins at a multiple of `alignment`.
void require_global(const void* address, std::size_t bytes, std::size_t alignment, const char* what);

}  // namespace sparseops_emulation
