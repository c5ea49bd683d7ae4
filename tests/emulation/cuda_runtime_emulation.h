// What the emulated CUDA runtime and the launch share: the failure of a launch, kept as CUDA keeps it.
#pragma once
#include "block.h"

namespace sparseops_emulation {

// A launch that CUDA would not have started.
struct Refused : Error {
  using Error::Error;
};

}  // namespace sparseops_emulation
