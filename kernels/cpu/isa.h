// The instruction sets that kernels are built for, and which of them this machine runs.
#pragma once

#include <string>
#include <vector>

namespace flashmoe {

struct Kernels;

// Every set that was built and that this machine has, the best first; "portable" is the last.
const std::vector<std::string>& isas();

// The set in use. It is the best unless FLASHMOE_ISA or set_isa names a lower one; set_isa waits
// for calls under way.
std::string isa();
void set_isa(const std::string& name);

// The kernels of the set in use.
const Kernels& kernels();

}  // namespace flashmoe
