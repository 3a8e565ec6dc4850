// Readers of event streams: `sse_load PORT BODY_FILE STREAMS EVENTS ROUNDS RAMP_MS LIMIT_S`.
//
// Opens STREAMS connections. Each posts the body ROUNDS times in sequence and reads EVENTS events and [DONE] each
// time; the first posts are spread over RAMP_MS. The events are those of mock_engine.cc, with their number and the
// time at which they were sent. Prints "begun" when each connection has received an event, and one line of JSON at
// the end. An invalid stream counts as an error and ends its connection. Ends early at the end of standard input.

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "chunked_body.h"
#include "epoll_net.h"

namespace {

using std::string;
using std::string_view;

struct Connection {
    int fd = -1;
    int rounds = 0;
    bool head_read = false, done_seen = false, closes = false;
    int events = 0;
    int64_t posted = 0, last_event = 0;
    string head, text;
    Chunks chunks;
};

// Samples in milliseconds, for quantiles.
class Times {
   public:
    void add(int64_t nanoseconds) { values_.push_back(nanoseconds / 1e6f); }

    string json() {
        std::sort(values_.begin(), values_.end());
        char text[128];
        snprintf(text, sizeof text, "{\"p50\": %.4f, \"p99\": %.4f, \"max\": %.4f}", at(0.50), at(0.99), at(1));
        return text;
    }

   private:
    float at(double quantile) const {
        if (values_.empty()) return 0;
        return values_[std::min(values_.size() - 1, size_t(quantile * values_.size()))];
    }

    std::vector<float> values_;
};

class Load {
   public:
    Load(int port, string request, int streams, int events, int rounds, int64_t ramp, int64_t limit)
        : address_(loopback(port)), request_(std::move(request)), events_(events), rounds_(rounds), limit_(limit) {
        epoll_ = epoll_create1(0);
        watch(epoll_, STDIN_FILENO, EPOLLIN);
        connections_.resize(streams);
        for (Connection& connection : connections_) open(connection);
        started_ = now_ns();
        for (int i = 0; i < streams; i++) starts_.push_back(started_ + ramp * i / streams);
        waiting_ = streams;
    }

    void run() {
        epoll_event ready[512];
        while (finished_ < int(connections_.size()) && !given_up()) {
            int found = epoll_wait(epoll_, ready, 512, milliseconds_to_next());
            post_what_is_due();
            for (int i = 0; i < found; i++) {
                if (ready[i].data.fd == STDIN_FILENO) {
                    char byte;
                    if (read(STDIN_FILENO, &byte, 1) <= 0) return;
                } else {
                    read_from(connection_of_[ready[i].data.fd]);
                }
            }
        }
    }

    void report() {
        double seconds = (now_ns() - started_) / 1e9;
        if (finished_ < int(connections_.size())) {
            errors_ += int(connections_.size()) - finished_;
            if (why_.empty()) why_ = given_up() ? "time is up" : "standard input has ended";
        }
        for (char& c : why_)
            if (c < ' ' || c == '"' || c == '\\' || c > '~') c = ' ';
        printf("{\"streams\": %ld, \"chunks\": %ld, \"errors\": %d, \"why\": \"%s\", \"seconds\": %.3f, "
               "\"ttft_ms\": %s, \"delay_ms\": %s, \"gap_ms\": %s}\n",
               streams_, chunks_, errors_, why_.c_str(), seconds, ttft_.json().c_str(), delay_.json().c_str(),
               gap_.json().c_str());
    }

   private:
    bool given_up() const { return now_ns() > started_ + limit_; }

    // May block until the connection is accepted, because the measurement has not begun.
    void open(Connection& connection) {
        connection.fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connection.fd < 0) fail("socket");
        if (connect(connection.fd, (sockaddr*)&address_, sizeof address_) != 0) fail("connect");
        send_at_once(connection.fd);
        if (size_t(connection.fd) >= connection_of_.size()) connection_of_.resize(2 * connection.fd + 1);
        connection_of_[connection.fd] = int(&connection - connections_.data());
        watch(epoll_, connection.fd, EPOLLIN);
    }

    int milliseconds_to_next() const {
        int64_t now = now_ns(), next = started_ + limit_;
        if (begun_ < starts_.size()) next = std::min(next, starts_[begun_]);
        return int(std::max<int64_t>(0, (next - now + 999'999) / 1'000'000));
    }

    void post_what_is_due() {
        for (int64_t now = now_ns(); begun_ < starts_.size() && starts_[begun_] <= now; begun_++)
            post(connections_[begun_]);
    }

    void post(Connection& connection) {
        if (connection.fd < 0) return;  // closed before its first use, and already counted
        connection.head_read = connection.done_seen = connection.closes = false;
        connection.events = 0;
        connection.head.clear();
        connection.text.clear();
        connection.chunks = Chunks();
        connection.posted = now_ns();
        if (send(connection.fd, request_.data(), request_.size(), MSG_NOSIGNAL) != ssize_t(request_.size()))
            fault(connection, "the request could not be sent");
    }

    void read_from(int index) {
        static char buffer[1 << 16];
        Connection& connection = connections_[index];
        if (connection.fd < 0) return;
        ssize_t size = recv(connection.fd, buffer, sizeof buffer, MSG_DONTWAIT);
        if (size < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (size <= 0) return fault(connection, size == 0 ? "closed within a stream" : strerror(errno));
        int64_t now = now_ns();
        string_view piece(buffer, size);
        if (!connection.head_read && !take_head(connection, piece)) return;
        if (!connection.chunks.take(piece, connection.text)) return fault(connection, "not a chunked body");
        if (!take_events(connection, now)) return;
        if (connection.chunks.ended()) end_stream(connection);
    }

    // Returns true if the head is complete; `piece` is then the rest.
    bool take_head(Connection& connection, string_view& piece) {
        connection.head += piece;
        size_t end = connection.head.find("\r\n\r\n");
        if (end == string::npos) return false;
        if (connection.head.compare(0, 13, "HTTP/1.1 200 ") != 0) {
            fault(connection, connection.head.substr(0, connection.head.find("\r\n")) + " " +
                                  connection.head.substr(end + 4, 200));
            return false;
        }
        piece.remove_prefix(piece.size() - (connection.head.size() - end - 4));
        connection.head.resize(end + 2);
        std::transform(connection.head.begin(), connection.head.end(), connection.head.begin(), tolower);
        if (connection.head.find("\r\ntransfer-encoding: chunked\r\n") == string::npos) {
            fault(connection, "the answer is not chunked");
            return false;
        }
        connection.closes = connection.head.find("\r\nconnection: close\r\n") != string::npos;
        return connection.head_read = true;
    }

    bool take_events(Connection& connection, int64_t now) {
        string_view text = connection.text;
        for (size_t end; (end = text.find("\n\n")) != text.npos; text.remove_prefix(end + 2)) {
            if (!take_event(connection, text.substr(0, end), now)) return false;
        }
        connection.text.erase(0, connection.text.size() - text.size());
        return true;
    }

    bool take_event(Connection& connection, string_view block, int64_t now) {
        if (block.substr(0, 5) != "data:") {
            if (!block.empty() && block[0] == ':' && block.substr(0, 4) != ": fd") return true;  // a comment
            fault(connection, "not an event: " + string(block));
            return false;
        }
        if (block == "data: [DONE]") return connection.done_seen = true;
        if (block.find("\n: fd") != block.npos) {
            fault(connection, "a mark has come through: " + string(block));
            return false;
        }
        size_t at = block.find("\"content\":\"");
        if (at == block.npos || block.size() < at + 37 || atoi(&block[at + 32]) != connection.events) {
            fault(connection, "event " + std::to_string(connection.events) + " is " + string(block));
            return false;
        }
        delay_.add(now - strtoll(&block[at + 11], nullptr, 10));
        if (connection.events++ == 0) {
            ttft_.add(now - connection.posted);
            if (connection.rounds == 0) first_has_come();
        } else {
            gap_.add(now - connection.last_event);
        }
        connection.last_event = now;
        chunks_++;
        return true;
    }

    void end_stream(Connection& connection) {
        if (connection.events != events_ || !connection.done_seen || !connection.text.empty())
            return fault(connection, "ended after event " + std::to_string(connection.events));
        streams_++;
        if (++connection.rounds == rounds_) {
            finished_++;
            close(connection.fd);
            connection.fd = -1;
            return;
        }
        if (connection.closes) {
            close(connection.fd);
            open(connection);
        }
        post(connection);
    }

    void fault(Connection& connection, const string& why) {
        if (errors_++ == 0) why_ = why.substr(0, 300);
        if (connection.rounds == 0 && connection.events == 0) first_has_come();
        finished_++;
        close(connection.fd);
        connection.fd = -1;
    }

    void first_has_come() {
        if (--waiting_ > 0) return;
        printf("begun\n");
        fflush(stdout);
    }

    int epoll_;
    sockaddr_in address_;
    string request_;
    int events_, rounds_;
    int64_t limit_, started_;
    std::vector<int64_t> starts_;
    size_t begun_ = 0;
    std::vector<Connection> connections_;
    std::vector<int> connection_of_;
    int waiting_, finished_ = 0, errors_ = 0;
    long streams_ = 0, chunks_ = 0;
    string why_;
    Times ttft_, delay_, gap_;
};

string request_with(const char* body_file, int port) {
    FILE* file = fopen(body_file, "r");
    if (!file) fail(body_file);
    string body(1 << 16, 0);
    body.resize(fread(body.data(), 1, body.size(), file));
    return "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:" + std::to_string(port) +
           "\r\nContent-Type: application/json\r\nAccept: text/event-stream\r\nContent-Length: " +
           std::to_string(body.size()) + "\r\n\r\n" + body;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 8) {
        fprintf(stderr, "usage: sse_load PORT BODY_FILE STREAMS EVENTS ROUNDS RAMP_MS LIMIT_S\n");
        return 2;
    }
    allow_open_files();
    auto number = [argv](int at) { return atoll(argv[at]); };
    Load load(number(1), request_with(argv[2], number(1)), number(3), number(4), number(5), number(6) * 1'000'000,
              number(7) * 1'000'000'000);
    load.run();
    load.report();
}
