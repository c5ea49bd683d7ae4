// Turns what would end the process (SIGSEGV, SIGBUS, SIGFPE within a kernel) into an Error that names the line.
#pragma once

namespace sparseops_emulation {

// While it lives, faults of kernels are caught. In AddressSanitizer's builds it does nothing: that reports more.
class FaultHandler {
 public:
  FaultHandler();
  ~FaultHandler();
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;
};

}  // namespace sparseops_emulation
