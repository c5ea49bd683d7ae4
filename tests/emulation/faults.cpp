#include "faults.h"

#include <signal.h>
#include <ucontext.h>

#include <cstdint>

#include "block.h"

namespace sparseops_emulation {

#if defined(__SANITIZE_ADDRESS__)

FaultHandler::FaultHandler() = default;
FaultHandler::~FaultHandler() = default;

#else

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
struct sigaction before[3];
stack_t stack_before;
alignas(16) std::byte handler_stack[64 << 10];  // the thread's own may be the one that ran over
alignas(16) std::byte report_stack[256 << 10];

struct {
  int signal;
  const void* address;
  const void* site;
} fault;

// Where the faulting thread goes on, on a stack of its own.
[[noreturn]] void report() {
  Block& b = block();
  b.self().site = fault.site;
  if (fault.signal == SIGFPE) b.fail("an integer division by zero");
  if (b.on_guard_page(fault.address)) b.fail("more than %zu KiB of stack", Stack::kBytes >> 10);
  b.fail("an invalid or misaligned address: %p", fault.address);
}

void handle(int signal, siginfo_t* info, void* context) {
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  if (!in_kernel()) {  // not ours: meets the handler of before, once this one returns
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &before[i], nullptr);
    return;
  }
  fault = {signal, info->si_addr, reinterpret_cast<const void*>(registers[REG_RIP] + 1)};
  registers[REG_RIP] = reinterpret_cast<greg_t>(&report);
  registers[REG_RSP] = reinterpret_cast<greg_t>(report_stack + sizeof report_stack - 8);  // as after a call
}

}  // namespace

FaultHandler::FaultHandler() {
  stack_t stack{};
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof handler_stack;
  sigaltstack(&stack, &stack_before);
  struct sigaction action{};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &before[i]);
}

FaultHandler::~FaultHandler() {
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
}

#endif

}  // namespace sparseops_emulation
