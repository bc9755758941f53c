#include "mlx_serving/vocabulary.hpp"

#include <vector>

#include "check.hpp"

namespace {

using mlx_serving::PieceType;
using mlx_serving::Vocabulary;
using enum mlx_serving::VocabularyKind;

using Spellings = std::vector<std::string_view>;
using Ids = std::vector<std::int64_t>;

void byte_level_tokens_are_bytes() {
  const Spellings spellings{"a", "\xC4\xA0the", "\xC3\xA4\xC2\xBD\xC5\x82", "<tool call>", ""};
  const Vocabulary vocabulary(spellings, kByteLevel, Ids{}, false);
  CHECK(vocabulary[0].bytes == "a");
  CHECK(vocabulary[1].bytes == " the");
  CHECK(vocabulary[2].bytes == "\xE4\xBD\xA0");
  CHECK(vocabulary[3].bytes == "<tool call>");  // a space is outside the alphabet: literal
  CHECK(vocabulary[4].type == PieceType::kNothing);
  CHECK(vocabulary[99].type == PieceType::kNothing);
}

void byte_fallback_tokens_are_text_or_a_byte() {
  const Spellings spellings{"\xE2\x96\x81" "a\xE2\x96\x81", "<0xe4>", "<0x4>", "<0xABC>", "\xE2\x96\x81"};
  const Vocabulary vocabulary(spellings, kByteFallback, Ids{}, true);
  CHECK(vocabulary[0].bytes == " a ");
  CHECK(vocabulary[1].type == PieceType::kByte);
  CHECK(vocabulary[1].bytes == "\xE4");
  CHECK(vocabulary[2].bytes == "<0x4>");
  CHECK(vocabulary[3].type == PieceType::kText);
  CHECK(vocabulary[4].bytes == " ");
  CHECK(vocabulary.strip_leading_space());
}

void special_tokens_are_nothing() {
  const Vocabulary vocabulary(Spellings{"a", "<s>"}, kByteLevel, Ids{1}, false);
  CHECK(vocabulary[0].type == PieceType::kText);
  CHECK(vocabulary[1].type == PieceType::kNothing);
}

void bad_arguments_are_named() {
  const auto make = [](Spellings spellings, Ids special) {
    return check::rejection([&] { Vocabulary(spellings, kByteLevel, special, false); });
  };
  CHECK(make({"a"}, {1}) == "special_ids: 1 is not an id of a vocabulary of 1");
  CHECK(make({"a"}, {-1}) == "special_ids: -1 is not an id of a vocabulary of 1");
  CHECK(make({"a", "\xFF"}, {}) == "tokens[1]: the spelling is not UTF-8");
}

}  // namespace

int main() {
  byte_level_tokens_are_bytes();
  byte_fallback_tokens_are_text_or_a_byte();
  special_tokens_are_nothing();
  bad_arguments_are_named();
  return check::result();
}
