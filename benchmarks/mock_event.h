// A preformatted event of a mock engine's stream, including its chunk framing; only some digits change.
#pragma once

#include <stdint.h>
#include <stdio.h>

#include <string>

inline std::string chunk(const std::string& text) {
    char size[16];
    snprintf(size, sizeof size, "%zx\r\n", text.size());
    return size + text + "\r\n";
}

class Event {
   public:
    enum Kind { FIRST, MIDDLE, LAST };

    Event(Kind kind, bool marked) {
        std::string text =
            R"(data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk",)"
            R"("created":1700000000,"model":"mock","choices":[{"index":0,"delta":{)";
        if (kind == FIRST) text += R"("role":"assistant",)";
        text += R"("content":"TTTTTTTTTTTTTTTTTTTT NNNNN"},"finish_reason":)";
        text += kind == LAST ? "\"length\"}]}\n" : "null}]}\n";
        if (marked) text += kind == FIRST ? ": fd 0\n" : kind == LAST ? ": fd 0 1IIIII .\n" : ": fd 0 1IIIII\n";
        text_ = chunk(text + "\n");
        if (kind == LAST) text_ += chunk("data: [DONE]\n\n") + "0\r\n\r\n";
        time_at_ = text_.find("TTTTT");
        number_at_ = text_.find("NNNNN");
        token_at_ = text_.find("IIIII");
    }

    const std::string& at(int64_t time, int number) {
        write(time_at_, 20, time);
        write(number_at_, 5, number);
        if (token_at_ != std::string::npos) write(token_at_, 5, number);
        return text_;
    }

   private:
    void write(size_t at, int digits, int64_t value) {
        for (int i = digits - 1; i >= 0; i--, value /= 10) text_[at + i] = '0' + value % 10;
    }

    std::string text_;
    size_t time_at_, number_at_, token_at_;
};
