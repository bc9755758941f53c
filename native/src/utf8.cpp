#include "mlx_serving/utf8.hpp"

#include <algorithm>

namespace mlx_serving {

void append_utf8(std::string& out, std::uint32_t code_point) {
  const auto push = [&out](std::uint32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) {
    push(code_point);
  } else if (code_point < 0x800) {
    push(0xC0 | (code_point >> 6));
    push(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    push(0xE0 | (code_point >> 12));
    push(0x80 | ((code_point >> 6) & 0x3F));
    push(0x80 | (code_point & 0x3F));
  } else {
    push(0xF0 | (code_point >> 18));
    push(0x80 | ((code_point >> 12) & 0x3F));
    push(0x80 | ((code_point >> 6) & 0x3F));
    push(0x80 | (code_point & 0x3F));
  }
}

void Utf8Stream::feed(std::string_view bytes, std::string& out) {
  std::size_t at = 0;
  while (at < bytes.size()) {
    if (need_ == 0) {  // the common case: copy a stretch of ASCII at once
      std::size_t end = at;
      while (end < bytes.size() && static_cast<unsigned char>(bytes[end]) < 0x80) ++end;
      out.append(bytes.substr(at, end - at));
      at = end;
      if (at == bytes.size()) return;
    }
    feed_byte(static_cast<unsigned char>(bytes[at++]), out);
  }
}

void Utf8Stream::flush(std::string& out) {
  if (need_ > 0) out.append(kReplacement);
  size_ = need_ = 0;
}

void Utf8Stream::feed_byte(unsigned char byte, std::string& out) {
  if (need_ == 0) {
    start(byte, out);
    return;
  }
  if (byte < low_ || byte > high_) {  // the held part is ill-formed; this byte starts anew
    flush(out);
    start(byte, out);
    return;
  }
  held_[size_++] = byte;
  low_ = 0x80;
  high_ = 0xBF;
  if (--need_ == 0) {
    out.append(reinterpret_cast<const char*>(held_), size_);
    size_ = 0;
  }
}

// Table 3-7 of the Unicode standard: what may follow a leading byte.
void Utf8Stream::start(unsigned char byte, std::string& out) {
  low_ = 0x80;
  high_ = 0xBF;
  if (byte < 0x80) {
    out.push_back(static_cast<char>(byte));
    return;
  }
  if (byte < 0xC2 || byte > 0xF4) {
    out.append(kReplacement);
    return;
  }
  need_ = byte < 0xE0 ? 1 : byte < 0xF0 ? 2 : 3;
  if (byte == 0xE0) low_ = 0xA0;
  if (byte == 0xED) high_ = 0x9F;
  if (byte == 0xF0) low_ = 0x90;
  if (byte == 0xF4) high_ = 0x8F;
  held_[0] = byte;
  size_ = 1;
}

bool is_utf8(std::string_view bytes) {
  // A real U+FFFD in the input comes out unchanged, so equality decides.
  std::string out;
  out.reserve(bytes.size() + kReplacement.size());
  Utf8Stream stream;
  stream.feed(bytes, out);
  stream.flush(out);
  return out == bytes;
}

}  // namespace mlx_serving
