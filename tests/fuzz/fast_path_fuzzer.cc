// libFuzzer target: a stream of arbitrary bytes, split anywhere, through the router's fast path.
//
// The client's bytes, the marks and the unread rest must equal those of a second decoder, which sees all bytes at
// once. The target calls the functions of the fast path directly, without its thread.
#include <sys/ioctl.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#define private public
#include "../../daemon/router/http/fast_path.cc"
#undef private

namespace {

void require(bool condition, const char* what) {
    if (condition) return;
    fprintf(stderr, "%s\n", what);
    abort();
}

struct Decoded {
    string client, marks;
    size_t consumed = 0;
};

// Decodes the chunks of `data`, up to the first that is incomplete or not an ordinary event.
Decoded decode(const string& data) {
    Decoded found;
    for (;;) {
        size_t line_end = data.find("\r\n", found.consumed);
        if (line_end == string::npos || line_end == found.consumed || line_end - found.consumed > 6) return found;
        string digits = data.substr(found.consumed, line_end - found.consumed);
        if (digits.find_first_not_of("0123456789abcdefABCDEF") != string::npos) return found;
        size_t length = strtoul(digits.c_str(), nullptr, 16), end = line_end + 2 + length + 2;
        if (length == 0 || end > data.size() || data.compare(end - 2, 2, "\r\n") != 0) return found;
        string event = data.substr(line_end + 2, length);
        if (event != ":\n\n") {
            std::vector<string> lines;
            for (size_t at = 0, next; at <= event.size(); at = next + 1) {
                next = std::min(event.find('\n', at), event.size());
                lines.push_back(event.substr(at, next - at));
            }
            bool is_usual = lines.size() == 4 && lines[0].rfind("data: {", 0) == 0 && lines[2].empty() && lines[3].empty() &&
                            lines[0].rfind("data: {\"error\"", 0) != 0 && lines[1].rfind(": fd ", 0) == 0;
            if (!is_usual) return found;
            found.client += lines[0] + "\n\n";
            found.marks += lines[1].substr(5) + "\n";
        }
        found.consumed = end;
    }
}

string read_all(int descriptor) {
    string all;
    char buffer[1 << 16];
    for (ssize_t size; (size = recv(descriptor, buffer, sizeof buffer, MSG_DONTWAIT)) > 0;) all.append(buffer, size);
    return all;
}

string unchunk(const string& data) {
    string all;
    for (size_t at = 0; at < data.size();) {
        size_t line_end = data.find("\r\n", at);
        require(line_end != string::npos, "a chunk without its size");
        size_t length = strtoul(data.c_str() + at, nullptr, 16);
        require(length > 0 && line_end + 2 + length + 2 <= data.size(), "an incomplete chunk");
        all += data.substr(line_end + 2, length);
        at = line_end + 2 + length + 2;
    }
    return all;
}

// Half of the inputs are used as contents of chunks, so that more of them are valid events.
string stream_of(const uint8_t* data, size_t size, bool is_content) {
    string text(reinterpret_cast<const char*>(data), size);
    if (!is_content) return text;
    string chunks;
    for (size_t at = 0, next; at < text.size(); at = next + 1) {
        next = std::min(text.find('\xff', at), text.size());
        char head[20];
        snprintf(head, sizeof head, "%zx\r\n", next - at);
        chunks += head + text.substr(at, next - at) + "\r\n";
    }
    return chunks;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static FastPath& path = *new FastPath(1);
    if (size < 2) return 0;
    string stream = stream_of(data + 2, size - 2, data[0] & 1);
    size_t piece = data[1] == 255 ? stream.size() + 1 : data[1] + 1;
    int replica[2], client[2];
    require(socketpair(AF_UNIX, SOCK_STREAM, 0, replica) == 0, "no sockets");
    require(socketpair(AF_UNIX, SOCK_STREAM, 0, client) == 0, "no sockets");
    int slot = path.take(replica[0], client[0]);
    require(slot >= 0, "no slot");
    Stream& taken = path.streams_[slot];
    uint64_t key = uint64_t(taken.generation) << 32 | uint64_t(slot) << 1;
    string sent, got;
    for (size_t at = 0; at < stream.size() && taken.is_taken; at += piece) {
        string next = stream.substr(at, piece);
        ssize_t written = send(replica[1], next.data(), next.size(), MSG_DONTWAIT);
        if (written <= 0) break;
        sent += next.substr(0, written);
        for (int unread = 1; taken.is_taken && unread > 0;) {
            path.handle(key);
            got += read_all(client[1]);
            ioctl(replica[0], FIONREAD, &unread);
        }
    }
    path.handle(key | 1);
    require(!taken.is_taken && path.next_given_back() == slot, "the stream is not returned");
    fd_given_back found;
    fd_fast_path_take_back(&path, slot, &found);
    got += string(found.unsent.data, found.unsent.size);
    string unread = string(found.unread.data, found.unread.size) + read_all(replica[0]);
    Decoded expected = decode(sent);
    require(unchunk(got) == expected.client, "the client's bytes differ");
    require(int64_t(expected.client.size()) == found.sent_bytes, "the number of sent bytes differs");
    require(string(found.marks.data, found.marks.size) == expected.marks, "the marks differ");
    require(unread == sent.substr(expected.consumed), "the unread rest differs");
    path.release(slot);
    for (int descriptor : {replica[0], replica[1], client[0], client[1]}) close(descriptor);
    return 0;
}
