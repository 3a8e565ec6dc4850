// The parts of a collective of an expert-parallel group: dispatch tokens to their experts, combine the results.
//
// Other work may run between a send and its receive. Elements have `element` bytes, 2 (bfloat16) or 4 (float32), the
// same on all ranks. Functions that return bool return false if the group was interrupted; its status says why.
#pragma once

#include "expert_group.h"

namespace fd {

// Publishes x [tokens, hidden] and the targets of topk_ids [tokens, k]; an id of -1 is dropped.
bool ep_dispatch_send(ExpertGroup& group, int layer, const void* x, const int32_t* topk_ids, int tokens, int element);

// Waits for all other ranks. The rows stay in the memory of their senders; `ep_gather` copies them.
bool ep_dispatch_receive(ExpertGroup& group, int layer, int element, Workspace& workspace, Received& received);
void ep_gather(const ExpertGroup& group, const Received& received, int element, void* rows);

// Publishes the results of the received rows, in the order in which they were received.
bool ep_combine_send(ExpertGroup& group, const void* rows, int count, int element);

// Waits for all other ranks. out [tokens, hidden] = the results of each token, weighted by topk_weights [tokens, k] and
// summed in float32 in top-k order.
bool ep_combine_receive(ExpertGroup& group, const float* topk_weights, int tokens, int element, float* out);

}  // namespace fd
