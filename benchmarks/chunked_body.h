// Decoder of `Transfer-Encoding: chunked`.
#pragma once

#include <ctype.h>
#include <stdlib.h>

#include <algorithm>
#include <string>
#include <string_view>

// Decodes the body of a chunked response from arbitrary pieces.
class Chunks {
   public:
    // Appends the part of the body in `piece`. Returns false if it is not chunked.
    bool take(std::string_view piece, std::string& body) {
        while (!piece.empty() && state_ != END) {
            if (state_ == DATA) {
                size_t size = std::min(left_, piece.size());
                body.append(piece.substr(0, size));
                piece.remove_prefix(size);
                if ((left_ -= size) == 0) state_ = AFTER_DATA;
                continue;
            }
            char c = piece.front();
            piece.remove_prefix(1);
            if (c != '\n') {
                if (c != '\r' && line_.size() < 64) line_ += c;
                continue;
            }
            if (!take_line()) return false;
            line_.clear();
        }
        return piece.empty();
    }

    bool ended() const { return state_ == END; }

   private:
    enum State { SIZE, DATA, AFTER_DATA, TRAILER, END };

    bool take_line() {
        if (state_ == SIZE) {
            if (line_.empty() || !isxdigit(line_[0])) return false;
            left_ = strtoul(line_.c_str(), nullptr, 16);
            state_ = left_ ? DATA : TRAILER;
        } else if (state_ == AFTER_DATA) {
            if (!line_.empty()) return false;
            state_ = SIZE;
        } else if (line_.empty()) {
            state_ = END;
        }
        return true;
    }

    State state_ = SIZE;
    size_t left_ = 0;
    std::string line_;
};
