// The open groups of this process, by the handle that is passed to operations.
#pragma once

#include <cstdint>

#include "expert_group.h"

namespace fd {

// Returns the open group with this handle; null if there is none.
ExpertGroup* find_expert_group(int64_t handle);

}  // namespace fd
