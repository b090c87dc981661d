// The lock of what holds for a whole call: the instruction set and the form of products.
#pragma once

#include <shared_mutex>

namespace flashmoe {

// Held shared by every call from its first step to its last, alone by whoever changes a setting.
std::shared_mutex& settings();

}  // namespace flashmoe
