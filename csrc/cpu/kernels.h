// The kernels that every instruction set offers; dispatch.cpp includes this once for each and chooses among them.
#include "ops.h"

namespace sparseops {
namespace SPARSEOPS_ISA {
void nm24_linear(const NM24Linear& op);
void nm24_conv(const NM24Conv& op);
void channel_copy(const ChannelCopy& op);
}  // namespace SPARSEOPS_ISA
}  // namespace sparseops
