// A collective of an expert-parallel group in its parts: tokens go to their experts, results come back.
//
// Between each send and its receive something else may be computed. Rows are of `element` bytes, 2 (bfloat16) or 4
// (float32), the same on all ranks.
#pragma once

#include "expert_group.h"

namespace fd {

// Publishes x [tokens, hidden] and where the picks [tokens, k] of each go; -1 drops a pick. False, here and below, if the
// group is interrupted: its status says why.
bool ep_dispatch_send(ExpertGroup& group, int layer, const void* x, const int32_t* picks, int tokens, int element);

// Waits for all others. The rows are where they were published until `ep_gather`.
bool ep_dispatch_receive(ExpertGroup& group, int layer, int element, Workspace& workspace, Received& received);
void ep_gather(const ExpertGroup& group, const Received& received, int element, void* rows);

// Publishes the results of the received rows, in their order.
bool ep_combine_send(ExpertGroup& group, const void* rows, int count, int element);

// Waits for all others: out [tokens, hidden] = each token's results, summed by weights [tokens, k] in the order of its
// picks, in float32.
bool ep_combine_receive(ExpertGroup& group, const float* weights, int tokens, int element, float* out);

}  // namespace fd
