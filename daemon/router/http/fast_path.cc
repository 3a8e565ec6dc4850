// Fast path for event streams: one thread that relays events from replicas to clients without Python.
//
// It accepts two kinds of chunk: an event "data: {...}" with a mark (engine/common/resumption.py), which is
// removed, and a keep-alive comment. At the first byte of anything else, at the end of either connection, or when
// a client does not read, it gives the stream back with all unprocessed bytes; the HTTP parser and the router then
// handle what was unusual. A stream that was given back may be taken again.
//
// Locking: each stream has a lock, held while its events are handled, so that streams do not wait for each other.
// The lock of the slot lists is taken last. The Python side is fast_path.py.

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace {

using std::string;
using std::string_view;
using namespace std::literals;

constexpr size_t kReadSize = 64 << 10;
// Bytes of an incomplete chunk; a longer one is left to the HTTP parser.
constexpr size_t kMaxUnread = 64 << 10;
// Bytes of marks after which a stream is given back, so that they are parsed into token ids.
constexpr size_t kMaxMarks = 16 << 10;
// Hexadecimal digits of a chunk's length.
constexpr size_t kMaxLengthDigits = 6;
// Events per epoll_wait.
constexpr int kMaxEvents = 64;

enum class Side : uint64_t { kReplica = 0, kClient = 1 };

struct Stream {
  std::mutex lock;
  // Set from `take` to `give_back` or `take_back`.
  bool is_taken = false;
  // Distinguishes late epoll events of an earlier stream in this slot.
  uint32_t generation = 0;
  int replica = -1, client = -1;
  // Bytes of body, without chunk framing.
  int64_t sent_bytes = 0;
  string marks, unread, unsent;
};

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  c |= 0x20;
  return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

enum class ChunkKind { kComplete, kPartial, kUnusual };

// Finds the first chunk of `data`: its content, and its size with framing.
ChunkKind first_chunk(string_view data, string_view& content, size_t& size) {
  size_t length = 0, at = 0;
  for (; at < data.size() && data[at] != '\r'; at++) {
    int digit = hex_digit(data[at]);
    if (digit < 0 || at == kMaxLengthDigits) return ChunkKind::kUnusual;
    length = length << 4 | digit;
  }
  if (at == data.size()) return ChunkKind::kPartial;
  if (at == 0 || length == 0) return ChunkKind::kUnusual;
  size = at + 2 + length + 2;
  // Check the bytes of the two line ends that have arrived.
  if (at + 1 < data.size() && data[at + 1] != '\n') return ChunkKind::kUnusual;
  if (size - 2 < data.size() && data[size - 2] != '\r') return ChunkKind::kUnusual;
  if (size - 1 < data.size() && data[size - 1] != '\n') return ChunkKind::kUnusual;
  if (data.size() < size) return ChunkKind::kPartial;
  content = data.substr(at + 2, length);
  return ChunkKind::kComplete;
}

bool starts_with(string_view text, string_view prefix) { return text.substr(0, prefix.size()) == prefix; }

void append_chunk(string& out, string_view line) {
  char digits[2 * sizeof(size_t)];
  size_t count = 0;
  for (size_t rest = line.size() + 2; rest; rest >>= 4) digits[count++] = "0123456789abcdef"[rest & 15];
  while (count) out += digits[--count];
  out += "\r\n"sv;
  out += line;
  out += "\n\n\r\n"sv;
}

class FastPath {
 public:
  explicit FastPath(int capacity)
      : streams_(capacity),
        heard_at_(capacity),
        events_(capacity),
        epoll_(epoll_create1(EPOLL_CLOEXEC)),
        wakeup_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    for (int slot = capacity - 1; slot >= 0; slot--) free_.push_back(slot);
  }

  ~FastPath() {
    if (epoll_ >= 0) close(epoll_);
    if (wakeup_ >= 0) close(wakeup_);
  }

  bool start() {
    if (epoll_ < 0 || wakeup_ < 0) return false;
    // Python's thread handles signals.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    int error = pthread_create(
        &thread, nullptr,
        [](void* self) -> void* {
          static_cast<FastPath*>(self)->run();
          return nullptr;
        },
        this);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return error == 0 && pthread_detach(thread) == 0;
  }

  int wakeup() const { return wakeup_; }
  const std::atomic<double>* heard_at() const { return heard_at_.data(); }
  const std::atomic<int64_t>* events() const { return events_.data(); }

  int take(int replica, int client) {
    int slot;
    {
      std::lock_guard<std::mutex> lists(lists_);
      if (free_.empty()) return -ENOSPC;
      slot = free_.back();
      free_.pop_back();
    }
    Stream& stream = streams_[slot];
    std::lock_guard<std::mutex> guard(stream.lock);
    // Duplicates: these stay valid, and never mean another connection, if the originals are closed early.
    stream.replica = duplicate(replica);
    stream.client = duplicate(client);
    int error = 0;
    if (stream.replica < 0 || stream.client < 0) {
      error = EMFILE;
    } else if (!watch(slot, stream.replica, Side::kReplica, EPOLLIN) ||
               !watch(slot, stream.client, Side::kClient, EPOLLRDHUP)) {
      error = errno;
    }
    if (error) {
      unwatch(stream);
      std::lock_guard<std::mutex> lists(lists_);
      free_.push_back(slot);
      return -error;
    }
    stream.is_taken = true;
    stream.sent_bytes = 0;
    heard_at_[slot] = now();
    events_[slot] = 0;
    return slot;
  }

  // Returns the slot of a stream that the thread has given back, once each; -1 if there is none.
  int next_given_back() {
    std::lock_guard<std::mutex> lists(lists_);
    if (given_back_.empty()) return -1;
    int slot = given_back_.back();
    given_back_.pop_back();
    return slot;
  }

  // Ends the thread's use of the stream, whether or not it has been given back.
  Stream& take_back(int slot) {
    Stream& stream = streams_[slot];
    std::lock_guard<std::mutex> guard(stream.lock);
    stream.is_taken = false;
    unwatch(stream);
    std::lock_guard<std::mutex> lists(lists_);
    auto place = std::find(given_back_.begin(), given_back_.end(), slot);
    if (place != given_back_.end()) given_back_.erase(place);
    return stream;
  }

  void release(int slot) {
    Stream& stream = streams_[slot];
    std::lock_guard<std::mutex> guard(stream.lock);
    stream.generation++;
    // Swapped rather than cleared to free the memory: most streams need little.
    string().swap(stream.marks);
    string().swap(stream.unread);
    string().swap(stream.unsent);
    std::lock_guard<std::mutex> lists(lists_);
    free_.push_back(slot);
  }

 private:
  static int duplicate(int descriptor) { return fcntl(descriptor, F_DUPFD_CLOEXEC, 3); }

  bool watch(int slot, int descriptor, Side side, uint32_t events) {
    epoll_event event{};
    event.events = events;
    event.data.u64 = uint64_t(streams_[slot].generation) << 32 | uint64_t(slot) << 1 | uint64_t(side);
    return epoll_ctl(epoll_, EPOLL_CTL_ADD, descriptor, &event) == 0;
  }

  void unwatch(Stream& stream) {
    for (int* descriptor : {&stream.replica, &stream.client}) {
      if (*descriptor < 0) continue;
      // Closing a duplicate does not remove it from epoll.
      epoll_ctl(epoll_, EPOLL_CTL_DEL, *descriptor, nullptr);
      close(*descriptor);
      *descriptor = -1;
    }
  }

  void run() {
    pthread_setname_np(pthread_self(), "fast-path");
    epoll_event events[kMaxEvents];
    for (;;) {
      int count = epoll_wait(epoll_, events, kMaxEvents, -1);
      for (int i = 0; i < count; i++) handle(events[i].data.u64);
    }
  }

  void handle(uint64_t key) {
    int slot = uint32_t(key) >> 1;
    Stream& stream = streams_[slot];
    std::lock_guard<std::mutex> guard(stream.lock);
    if (!stream.is_taken || stream.generation != key >> 32) return;
    if (Side(key & 1) == Side::kClient || !relay(stream, slot)) give_back(stream, slot);
  }

  void give_back(Stream& stream, int slot) {
    unwatch(stream);
    stream.is_taken = false;
    {
      std::lock_guard<std::mutex> lists(lists_);
      given_back_.push_back(slot);
    }
    uint64_t one = 1;
    // Fails only if the counter is full, when the reader is being woken anyway.
    if (write(wakeup_, &one, sizeof one) < 0) return;
  }

  // Relays what has arrived from the replica; false if the stream must be given back.
  bool relay(Stream& stream, int slot) {
    ssize_t size = recv(stream.replica, buffer_, sizeof buffer_, MSG_DONTWAIT);
    if (size < 0 && (errno == EAGAIN || errno == EINTR)) return true;
    if (size <= 0) return false;
    heard_at_[slot] = now();
    string_view data(buffer_, size);
    if (!stream.unread.empty()) data = stream.unread.append(data);
    out_.clear();
    size_t done = 0;
    bool is_supported = true;
    while (done < data.size()) {
      string_view content;
      size_t chunk;
      ChunkKind piece = first_chunk(data.substr(done), content, chunk);
      if (piece == ChunkKind::kPartial) break;
      if (piece == ChunkKind::kUnusual || !relay_event(stream, slot, content)) {
        is_supported = false;
        break;
      }
      done += chunk;
    }
    if (data.data() == buffer_) {
      stream.unread.assign(data.substr(done));
    } else {
      stream.unread.erase(0, done);
    }
    return flush(stream) && is_supported && stream.unread.size() <= kMaxUnread && stream.marks.size() <= kMaxMarks;
  }

  bool relay_event(Stream& stream, int slot, string_view event) {
    if (event == ":\n\n"sv) return true;
    // The type of an event may stand in a line before its data.
    size_t data = starts_with(event, "event: "sv) ? event.find('\n') + 1 : 0;
    string_view content = event.substr(data);
    if (!starts_with(content, "data: {"sv) || starts_with(content, "data: {\"error\""sv)) return false;
    size_t line = event.find('\n', data);
    if (line == string_view::npos || !starts_with(event.substr(line), "\n: fd "sv)) return false;
    size_t end = event.find('\n', line + 1);
    if (end == string_view::npos || event.substr(end) != "\n\n"sv) return false;
    stream.marks += event.substr(line + 6, end + 1 - (line + 6));
    append_chunk(out_, event.substr(0, line));
    stream.sent_bytes += line + 2;
    events_[slot]++;
    return true;
  }

  bool flush(Stream& stream) {
    if (out_.empty()) return true;
    ssize_t size = send(stream.client, out_.data(), out_.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    size_t sent = std::max<ssize_t>(size, 0);
    if (sent == out_.size()) return true;
    stream.unsent.assign(out_, sent);
    return false;
  }

  std::vector<Stream> streams_;
  // By slot, read from Python without the lock: the time of the last bytes from the replica, and the number of
  // events relayed.
  std::vector<std::atomic<double>> heard_at_;
  std::vector<std::atomic<int64_t>> events_;
  std::mutex lists_;
  std::vector<int> free_, given_back_;
  int epoll_, wakeup_;
  string out_;
  char buffer_[kReadSize];
};

static_assert(sizeof(std::atomic<double>) == 8 && std::atomic<double>::is_always_lock_free);
static_assert(sizeof(std::atomic<int64_t>) == 8 && std::atomic<int64_t>::is_always_lock_free);

}  // namespace

// ---- C interface, for fast_path.py

struct fd_text {
  const char* data;
  size_t size;
};

struct fd_given_back {
  fd_text marks, unread, unsent;
  int64_t sent_bytes;
};

extern "C" {

// Returns null if the system has no more descriptors or threads. Never freed: the thread lives as long as the
// process.
FastPath* fd_fast_path_start(int capacity) {
  FastPath* path = new FastPath(capacity);
  if (!path->start()) {
    delete path;
    return nullptr;
  }
  return path;
}

int fd_fast_path_wakeup(FastPath* path) { return path->wakeup(); }
const void* fd_fast_path_heard_at(FastPath* path) { return path->heard_at(); }
const void* fd_fast_path_events(FastPath* path) { return path->events(); }

// Returns the slot, or a negative errno.
int fd_fast_path_take(FastPath* path, int replica, int client) { return path->take(replica, client); }
int fd_fast_path_next(FastPath* path) { return path->next_given_back(); }

// The pointers in `found` are valid until `release`.
void fd_fast_path_take_back(FastPath* path, int slot, fd_given_back* found) {
  const Stream& stream = path->take_back(slot);
  auto text = [](const string& from) { return fd_text{from.data(), from.size()}; };
  *found = {text(stream.marks), text(stream.unread), text(stream.unsent), stream.sent_bytes};
}

void fd_fast_path_release(FastPath* path, int slot) { path->release(slot); }

}  // extern "C"
