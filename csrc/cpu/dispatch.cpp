// Chooses among the instruction sets that were built, by what the processor has.
#include <cstring>

#define SPARSEOPS_ISA portable
#include "kernels.h"
#undef SPARSEOPS_ISA
#if defined(SPARSEOPS_HAS_AVX2)
#define SPARSEOPS_ISA avx2
#include "kernels.h"
#undef SPARSEOPS_ISA
#endif
#if defined(SPARSEOPS_HAS_AVX512)
#define SPARSEOPS_ISA avx512
#include "kernels.h"
#undef SPARSEOPS_ISA
#endif
#if defined(SPARSEOPS_HAS_AVX512_BF16)
#define SPARSEOPS_ISA avx512_bf16
#include "kernels.h"
#undef SPARSEOPS_ISA
#endif

namespace sparseops {

namespace {

struct Isa {
  const char* name;
  bool (*on_this_processor)();
  void (*linear)(const NM24Linear&);
  void (*conv)(const NM24Conv&);
  void (*copy)(const ChannelCopy&);
};

#if defined(SPARSEOPS_HAS_AVX2)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
#if defined(SPARSEOPS_HAS_AVX512)
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
#if defined(SPARSEOPS_HAS_AVX512_BF16)
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// From the best to the one that runs anywhere.
const Isa kIsas[] = {
#if defined(SPARSEOPS_HAS_AVX512_BF16)
    {"avx512_bf16", has_avx512_bf16, avx512_bf16::nm24_linear, avx512_bf16::nm24_conv, avx512_bf16::channel_copy},
#endif
#if defined(SPARSEOPS_HAS_AVX512)
    {"avx512", has_avx512, avx512::nm24_linear, avx512::nm24_conv, avx512::channel_copy},
#endif
#if defined(SPARSEOPS_HAS_AVX2)
    {"avx2", has_avx2, avx2::nm24_linear, avx2::nm24_conv, avx2::channel_copy},
#endif
    {"portable", [] { return true; }, portable::nm24_linear, portable::nm24_conv, portable::channel_copy},
};

const Isa* best() {
  const Isa* isa = kIsas;
  while (!isa->on_this_processor()) ++isa;
  return isa;
}

const Isa*& in_use() {
  static const Isa* isa = best();
  return isa;
}

const Isa* find(const char* name) {
  for (const Isa& isa : kIsas)
    if (!std::strcmp(isa.name, name)) return &isa;
  return nullptr;
}

}  // namespace

void cpu_nm24_linear(const NM24Linear& op) { in_use()->linear(op); }
void cpu_nm24_conv(const NM24Conv& op) { in_use()->conv(op); }
void cpu_channel_copy(const ChannelCopy& op) { in_use()->copy(op); }

const char* cpu_isa() { return in_use()->name; }
bool cpu_built(const char* isa) { return find(isa); }
bool cpu_supports(const char* isa) {
  const Isa* found = find(isa);
  return found && found->on_this_processor();
}
void cpu_use_isa(const char* isa) { in_use() = find(isa); }

}  // namespace sparseops
