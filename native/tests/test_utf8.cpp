#include "mlx_serving/utf8.hpp"

#include "check.hpp"

namespace {

using mlx_serving::Utf8Stream;

std::string decode(std::string_view bytes) {
  std::string out;
  Utf8Stream stream;
  stream.feed(bytes, out);
  stream.flush(out);
  return out;
}

std::string decode_bytewise(std::string_view bytes) {
  std::string out;
  Utf8Stream stream;
  for (const char byte : bytes) stream.feed({&byte, 1}, out);
  stream.flush(out);
  return out;
}

void every_scalar_value_passes_unchanged() {
  for (std::uint32_t code_point = 0; code_point <= 0x10FFFF; ++code_point) {
    if (code_point >= 0xD800 && code_point <= 0xDFFF) continue;
    std::string encoded;
    mlx_serving::append_utf8(encoded, code_point);
    CHECK(mlx_serving::is_utf8(encoded));
    CHECK(decode_bytewise(encoded) == encoded);
  }
}

void ill_formed_parts_are_replaced_maximally() {
  // Unicode 16, section 3.9, table 3-8 and its neighbours.
  const std::string r(mlx_serving::kReplacement);
  CHECK(decode("\xC0\xAF") == r + r);                                // overlong
  CHECK(decode("\xE0\x80\xAF") == r + r + r);                        // overlong
  CHECK(decode("\xED\xA0\x80") == r + r + r);                        // a surrogate
  CHECK(decode("\xF4\x90\x80\x80") == r + r + r + r);                // past U+10FFFF
  CHECK(decode("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41") == r + r + r + r + "A");
  CHECK(decode("\xF0\x9F\x98") == r);                                // unfinished
  CHECK(decode("a\x80z") == "a" + r + "z");                          // a stray continuation
}

void an_unfinished_character_waits() {
  std::string out;
  Utf8Stream stream;
  stream.feed("a\xF0\x9F", out);
  CHECK(out == "a");
  stream.feed("\x99\x82", out);
  CHECK(out == "a\xF0\x9F\x99\x82");
}

void chunks_make_no_difference() {
  const std::string_view bytes = "x\xE4\xBD\xA0\xE4\xBDy\xFF\xF0\x9F\x99\x82\xC3";
  for (std::size_t cut = 0; cut <= bytes.size(); ++cut) {
    std::string out;
    Utf8Stream stream;
    stream.feed(bytes.substr(0, cut), out);
    stream.feed(bytes.substr(cut), out);
    stream.flush(out);
    CHECK(out == decode(bytes));
  }
}

}  // namespace

int main() {
  every_scalar_value_passes_unchanged();
  ill_formed_parts_are_replaced_maximally();
  an_unfinished_character_waits();
  chunks_make_no_difference();
  return check::result();
}
