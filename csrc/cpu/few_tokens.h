// nm24_linear for up to kFewTokens tokens; see few_tokens.cpp.
#pragma once
#include "panel.h"

namespace sparseops {
namespace SPARSEOPS_ISA {

constexpr int kFewTokens = 8;

template <class T>
void linear_few_tokens(const NM24Linear& op, const Block<T>& w);

}  // namespace SPARSEOPS_ISA
}  // namespace sparseops
