// What the operations have in common: checks, and the way to a device.
#pragma once

#include <stdexcept>

#include "device/device.h"

namespace fd {

inline int refuse(const char* message) { return fail(FD_BAD_ARGUMENT, message); }

// Checks enqueued work. A condition that is false breaks the device.
inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

template <class Args>
int enqueue(void* stream, void (*operation)(const fd_device&, const Args&), const Args& args) {
  fd_device* const device = static_cast<fd_device*>(stream);
  return device->enqueue([device, operation, args] { operation(*device, args); });
}

}  // namespace fd
