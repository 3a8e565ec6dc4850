// The groups that this process has open, by the number that operations are given.
#pragma once

#include <cstdint>

#include "expert_group.h"

namespace fd {

// Null if there is none.
ExpertGroup* find_expert_group(int64_t handle);

}  // namespace fd
