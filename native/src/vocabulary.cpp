#include "mlx_serving/vocabulary.hpp"

#include <array>
#include <optional>
#include <stdexcept>

#include "mlx_serving/utf8.hpp"

namespace mlx_serving {
namespace {

constexpr std::uint32_t kAlphabetEnd = 0x144;  // one past the last character of the alphabet
constexpr std::string_view kWordBoundary = "\xE2\x96\x81";  // U+2581, SentencePiece's space

// GPT-2's byte alphabet (`bytes_to_unicode` in openai/gpt-2, src/encoder.py), turned round:
// character -> byte, or -1. Printable bytes spell themselves, the rest come from U+0100 on.
constexpr std::array<std::int16_t, kAlphabetEnd> make_alphabet() {
  std::array<std::int16_t, kAlphabetEnd> byte_of{};
  byte_of.fill(-1);
  std::size_t next = 0x100;
  for (std::int16_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
    byte_of[printable ? static_cast<std::size_t>(byte) : next++] = byte;
  }
  return byte_of;
}

constexpr auto kByteOf = make_alphabet();

// The first character of well-formed UTF-8 that is not empty; shortens `text` by it. Only
// characters up to U+07FF matter here: anything longer is reported as kAlphabetEnd.
std::uint32_t take_character(std::string_view& text) {
  const auto lead = static_cast<unsigned char>(text[0]);
  if (lead < 0x80) {
    text.remove_prefix(1);
    return lead;
  }
  if (lead >= 0xE0) {
    text.remove_prefix(lead < 0xF0 ? 3 : 4);
    return kAlphabetEnd;
  }
  const auto next = static_cast<unsigned char>(text[1]);
  text.remove_prefix(2);
  return (static_cast<std::uint32_t>(lead & 0x1F) << 6) | (next & 0x3F);
}

int hex_digit(char digit) {
  if (digit >= '0' && digit <= '9') return digit - '0';
  if (digit >= 'a' && digit <= 'f') return digit - 'a' + 10;
  if (digit >= 'A' && digit <= 'F') return digit - 'A' + 10;
  return -1;
}

// The value of `<0xAB>`. The reference's parser (Rust's from_str_radix) takes `<0x+B>` too.
std::optional<char> byte_token(std::string_view spelling) {
  if (spelling.size() != 6 || !spelling.starts_with("<0x") || spelling[5] != '>') return {};
  const int high = spelling[3] == '+' ? 0 : hex_digit(spelling[3]);
  const int low = hex_digit(spelling[4]);
  if (high < 0 || low < 0) return {};
  return static_cast<char>(high * 16 + low);
}

}  // namespace

Vocabulary::Vocabulary(std::span<const std::string_view> spellings, VocabularyKind kind,
                       std::span<const std::int64_t> special_ids, bool strip_leading_space)
    : kind_(kind), strip_leading_space_(strip_leading_space) {
  offsets_.reserve(spellings.size() + 1);
  types_.reserve(spellings.size());
  offsets_.push_back(0);
  for (const auto spelling : spellings) {
    if (!is_utf8(spelling)) {
      throw std::invalid_argument("tokens[" + std::to_string(types_.size()) +
                                  "]: the spelling is not UTF-8");
    }
    types_.push_back(kind == VocabularyKind::kByteLevel ? append_byte_level(spelling)
                                                        : append_byte_fallback(spelling));
    offsets_.push_back(static_cast<std::uint32_t>(bytes_.size()));
  }
  for (const auto token : special_ids) {
    if (token < 0 || static_cast<std::size_t>(token) >= size()) {
      throw std::invalid_argument("special_ids: " + std::to_string(token) +
                                  " is not an id of a vocabulary of " + std::to_string(size()));
    }
    types_[static_cast<std::size_t>(token)] = PieceType::kNothing;
  }
}

// A token with any character outside the alphabet is literal text, as for the reference.
PieceType Vocabulary::append_byte_level(std::string_view spelling) {
  const auto begin = bytes_.size();
  for (auto rest = spelling; !rest.empty();) {
    const auto character = take_character(rest);
    const auto byte = character < kAlphabetEnd ? kByteOf[character] : std::int16_t{-1};
    if (byte < 0) {
      bytes_.replace(begin, std::string::npos, spelling);
      break;
    }
    bytes_.push_back(static_cast<char>(byte));
  }
  return spelling.empty() ? PieceType::kNothing : PieceType::kText;
}

PieceType Vocabulary::append_byte_fallback(std::string_view spelling) {
  if (const auto byte = byte_token(spelling)) {
    bytes_.push_back(*byte);
    return PieceType::kByte;
  }
  while (!spelling.empty()) {
    const auto at = std::min(spelling.find(kWordBoundary), spelling.size());
    bytes_.append(spelling.substr(0, at));
    spelling.remove_prefix(at);
    if (!spelling.empty()) {
      bytes_.push_back(' ');
      spelling.remove_prefix(kWordBoundary.size());
    }
  }
  return bytes_.size() == offsets_.back() ? PieceType::kNothing : PieceType::kText;
}

}  // namespace mlx_serving
