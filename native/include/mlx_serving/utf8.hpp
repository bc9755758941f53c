// UTF-8, streamed: bytes in, whole characters out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace mlx_serving {

inline constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// Appends a code point's UTF-8 bytes; the code point must be a Unicode scalar value.
void append_utf8(std::string& out, std::uint32_t code_point);

// True if every byte belongs to a well-formed character (no surrogates, no overlong forms).
[[nodiscard]] bool is_utf8(std::string_view bytes);

// Turns a stream of bytes into well-formed UTF-8. Each maximal part of an ill-formed sequence
// becomes one U+FFFD (Unicode 3.9, "substitution of maximal subparts"), as Rust's
// String::from_utf8_lossy does it. At most three bytes of an unfinished character are held.
class Utf8Stream {
 public:
  // Appends to `out` every character that `bytes` completes.
  void feed(std::string_view bytes, std::string& out);
  // Ends the stream: an unfinished character becomes one U+FFFD.
  void flush(std::string& out);

 private:
  void feed_byte(unsigned char byte, std::string& out);
  void start(unsigned char byte, std::string& out);

  unsigned char held_[4] = {};
  std::uint8_t size_ = 0;      // bytes held
  std::uint8_t need_ = 0;      // continuation bytes still to come
  unsigned char low_ = 0x80;   // bounds of the next continuation byte
  unsigned char high_ = 0xBF;
};

}  // namespace mlx_serving
