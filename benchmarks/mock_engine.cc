// Mock replicas, fast enough not to affect measurements of routers: `mock_engine COUNT INTERVAL_MS`.
//
// One thread serves all of them. It prints their ports and ends at the end of standard input. A POST with
// "stream": true gets max_tokens events, the first at once and then one per INTERVAL_MS; with `X-FD-Marks: 1`
// they carry the marks for resumption. Any other POST gets 300 bytes of JSON. An event contains its number and
// the time at which it was sent, so that the reader can compute the latency and detect missing events.

#include <algorithm>
#include <queue>
#include <string>
#include <string_view>
#include <vector>

#include "epoll_net.h"
#include "mock_event.h"

namespace {

using std::string;
using std::string_view;

struct Connection {
    int engine = -1;
    // Timers identify a connection by descriptor and generation, because descriptors are reused.
    uint32_t generation = 0;
    bool marked = false, closing = false;
    int events = 0, sent = 0;
    string in, out;

    bool streaming() const { return sent < events; }
};

struct Timer {
    int64_t due;
    int fd;
    uint32_t generation;

    bool operator<(const Timer& other) const { return due > other.due; }
};

string padded(string text, size_t length) {
    text.resize(std::max(length, text.size()), ' ');
    return text;
}

string json_answer(const char* status, const string& body) {
    return string("HTTP/1.1 ") + status + "\r\nContent-Type: application/json\r\nContent-Length: " +
           std::to_string(body.size()) + "\r\n\r\n" + body;
}

// ---- requests -------------------------------------------------------------------------------------------

struct Head {
    string_view method, path;
    size_t content_length = 0;
    bool marks = false, chunked = false;
};

bool named(string_view line, const char* name, size_t length) {
    return line.size() > length && line[length] == ':' && strncasecmp(line.data(), name, length) == 0;
}

// `text` ends with the line end of the last header.
Head parse(string_view text) {
    Head head;
    size_t end = text.find("\r\n");
    string_view line = text.substr(0, end);
    size_t space = line.find(' ');
    head.method = line.substr(0, space);
    head.path = line.substr(std::min(space + 1, line.size()));
    head.path = head.path.substr(0, head.path.find_first_of(" ?"));
    for (size_t begin = end + 2; begin < text.size(); begin = end + 2) {
        end = text.find("\r\n", begin);
        line = text.substr(begin, end - begin);
        if (named(line, "content-length", 14)) head.content_length = strtoul(line.data() + 15, nullptr, 10);
        if (named(line, "x-fd-marks", 10)) head.marks = line.find('1', 11) != line.npos;
        if (named(line, "transfer-encoding", 17)) head.chunked = true;
    }
    return head;
}

// Returns the text after `"key":` in a JSON body, without leading spaces; empty without the key.
string_view value_of(string_view body, string_view key) {
    size_t at = body.find(key);
    if (at == body.npos) return {};
    at = body.find_first_not_of(" :", at + key.size());
    return at == body.npos ? string_view{} : body.substr(at);
}

int events_asked_for(string_view body) {
    for (string_view key : {"\"max_tokens\"", "\"max_completion_tokens\""})
        if (string_view value = value_of(body, key); !value.empty())
            return std::clamp(atoi(string(value.substr(0, 9)).c_str()), 2, 99999);
    return 16;
}

class Engines {
   public:
    Engines(int count, int64_t interval) : interval_(interval), requests_(count) {
        epoll_ = epoll_create1(0);
        watch(epoll_, STDIN_FILENO, EPOLLIN);
        printf("[");
        for (int i = 0; i < count; i++) {
            int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
            sockaddr_in address = loopback(0);
            socklen_t length = sizeof address;
            if (bind(fd, (sockaddr*)&address, length) || listen(fd, 4096)) fail("listen");
            getsockname(fd, (sockaddr*)&address, &length);
            printf("%s%d", i ? ", " : "", ntohs(address.sin_port));
            engine_of_listener_.resize(fd + 1, -1);
            engine_of_listener_[fd] = i;
            watch(epoll_, fd, EPOLLIN);
            string body = R"({"id":"chatcmpl-0","object":"chat.completion","created":1700000000,"model":"mock",)"
                          R"("system_fingerprint":"engine-)" + std::to_string(i) +
                          R"(","choices":[{"index":0,"message":{"role":"assistant","content":"Hello."},)"
                          R"("finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":2}})";
            answers_.push_back(json_answer("200 OK", padded(body, 300)));
        }
        printf("]\n");
        fflush(stdout);
    }

    void run() {
        epoll_event events[512];
        while (true) {
            int found = epoll_wait(epoll_, events, 512, milliseconds_to_next());
            for (int i = 0; i < found; i++) {
                int fd = events[i].data.fd;
                if (fd == STDIN_FILENO) {
                    char byte;
                    if (read(fd, &byte, 1) <= 0) return;
                } else if (size_t(fd) < engine_of_listener_.size() && engine_of_listener_[fd] >= 0) {
                    accept_from(fd);
                } else {
                    if (events[i].events & EPOLLOUT) write_out(fd);
                    if (events[i].events & ~EPOLLOUT) read_from(fd);
                }
            }
            send_what_is_due();
        }
    }

   private:
    int milliseconds_to_next() const {
        if (timers_.empty()) return -1;
        return int(std::max<int64_t>(0, (timers_.top().due - now_ns() + 999'999) / 1'000'000));
    }

    void accept_from(int listener) {
        int fd;
        while ((fd = accept4(listener, nullptr, nullptr, SOCK_NONBLOCK)) >= 0) {
            send_at_once(fd);
            if (size_t(fd) >= connections_.size()) connections_.resize(2 * fd + 1);
            connections_[fd].engine = engine_of_listener_[listener];
            watch(epoll_, fd, EPOLLIN | EPOLLRDHUP);
        }
    }

    void read_from(int fd) {
        static char buffer[1 << 16];
        Connection& connection = connections_[fd];
        if (connection.engine < 0) return;  // closed earlier in this round
        ssize_t size = recv(fd, buffer, sizeof buffer, 0);
        if (size < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (size <= 0) return drop(fd);
        connection.in.append(buffer, size);
        answer_requests(fd);
    }

    // Serves all complete requests, up to one that is answered with a stream.
    void answer_requests(int fd) {
        Connection& connection = connections_[fd];
        while (connection.engine >= 0 && !connection.closing && !connection.streaming()) {
            size_t end = connection.in.find("\r\n\r\n");
            if (end == string::npos) return;
            Head head = parse(string_view(connection.in).substr(0, end + 2));
            size_t total = end + 4 + head.content_length;
            if (connection.in.size() < total) return;
            answer(fd, head, string_view(connection.in).substr(end + 4, head.content_length));
            connection.in.erase(0, total);
        }
    }

    void answer(int fd, const Head& head, string_view body) {
        Connection& connection = connections_[fd];
        if (head.chunked) {
            connection.closing = true;
            return send(fd, json_answer("411 Length Required", "{}"));
        }
        if (head.method == "GET") return send(fd, json_answer("200 OK", facts(head.path)));
        if (head.path.substr(0, 4) != "/v1/") return send(fd, json_answer("409 Conflict", "{}"));
        requests_[connection.engine]++;
        if (value_of(body, "\"stream\"").substr(0, 4) != "true") return send(fd, answers_[connection.engine]);
        connection.marked = head.marks;
        connection.events = events_asked_for(body);
        connection.sent = 0;
        streams_++;
        marked_streams_ += head.marks;
        int64_t now = now_ns();
        send(fd,
             "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
             "Transfer-Encoding: chunked\r\n\r\n" + events_[Event::FIRST][head.marks].at(now, 0));
        if (connection.engine < 0) return;  // the client has disconnected
        connection.sent = 1;
        timers_.push({now + interval_, fd, connection.generation});
    }

    string facts(string_view path) const {
        if (path == "/v1/models") return R"({"object":"list","data":[{"id":"mock","object":"model"}]})";
        if (path != "/stats") return R"({"status":"ready"})";
        string text = "{\"requests\": [";
        for (size_t i = 0; i < requests_.size(); i++) text += (i ? ", " : "") + std::to_string(requests_[i]);
        return text + "], \"streams\": " + std::to_string(streams_) +
               ", \"marked_streams\": " + std::to_string(marked_streams_) + "}";
    }

    void send_what_is_due() {
        int64_t now = now_ns();
        while (!timers_.empty() && timers_.top().due <= now) {
            Timer timer = timers_.top();
            timers_.pop();
            Connection& connection = connections_[timer.fd];
            if (connection.generation != timer.generation) continue;
            bool last = connection.sent + 1 == connection.events;
            Event& event = events_[last ? Event::LAST : Event::MIDDLE][connection.marked];
            send(timer.fd, event.at(now_ns(), connection.sent));
            if (connection.generation != timer.generation) continue;
            connection.sent++;
            if (last) {
                answer_requests(timer.fd);
            } else {
                timers_.push({timer.due + interval_, timer.fd, timer.generation});
            }
        }
    }

    void send(int fd, const string& text) {
        Connection& connection = connections_[fd];
        size_t sent = 0;
        if (connection.out.empty()) {
            ssize_t size = ::send(fd, text.data(), text.size(), MSG_NOSIGNAL);
            if (size < 0 && errno != EAGAIN) return drop(fd);
            sent = std::max<ssize_t>(size, 0);
        }
        if (sent < text.size()) {
            connection.out.append(text, sent);
            watch(epoll_, fd, EPOLLIN | EPOLLRDHUP | EPOLLOUT, EPOLL_CTL_MOD);
        } else if (connection.closing) {
            drop(fd);
        }
    }

    void write_out(int fd) {
        Connection& connection = connections_[fd];
        if (connection.engine < 0) return;
        ssize_t size = ::send(fd, connection.out.data(), connection.out.size(), MSG_NOSIGNAL);
        if (size < 0 && errno != EAGAIN) return drop(fd);
        connection.out.erase(0, std::max<ssize_t>(size, 0));
        if (!connection.out.empty()) return;
        watch(epoll_, fd, EPOLLIN | EPOLLRDHUP, EPOLL_CTL_MOD);
        if (connection.closing) drop(fd);
    }

    void drop(int fd) {
        uint32_t generation = connections_[fd].generation + 1;
        connections_[fd] = Connection{};
        connections_[fd].generation = generation;
        close(fd);
    }

    int epoll_;
    int64_t interval_;
    std::vector<int> engine_of_listener_;
    std::vector<Connection> connections_;
    std::vector<string> answers_;
    std::priority_queue<Timer> timers_;
    Event events_[3][2] = {{{Event::FIRST, false}, {Event::FIRST, true}},
                           {{Event::MIDDLE, false}, {Event::MIDDLE, true}},
                           {{Event::LAST, false}, {Event::LAST, true}}};
    std::vector<int64_t> requests_;
    int64_t streams_ = 0, marked_streams_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: mock_engine COUNT INTERVAL_MS\n");
        return 2;
    }
    allow_open_files();
    Engines(atoi(argv[1]), atoll(argv[2]) * 1'000'000).run();
}
