// A tokenizer's tokens as the bytes they stand for, decoded once and shared by all slots.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace mlx_serving {

using TokenId = std::uint32_t;

enum class VocabularyKind : std::uint8_t {
  kByteLevel,     // GPT-2's byte alphabet: a token is bytes, spelled in printable characters
  kByteFallback,  // SentencePiece: a token is text with U+2581 for a space, or a byte `<0xAB>`
};

enum class PieceType : std::uint8_t {
  kNothing,  // special, unknown or empty: releases no text
  kText,     // bytes; of a byte-fallback vocabulary always whole characters
  kByte,     // one byte of a byte-fallback run
};

struct Piece {
  PieceType type = PieceType::kNothing;
  std::string_view bytes;
};

// Immutable after construction, so any number of threads may read it.
class Vocabulary {
 public:
  // `spellings`: each id's token as the tokenizer lists it, UTF-8, empty for an id without one.
  // `special_ids`: ids that release no text. `strip_leading_space`: drop one space at the start
  // of every text (Llama's decoder). Throws std::invalid_argument naming the bad field.
  Vocabulary(std::span<const std::string_view> spellings, VocabularyKind kind,
             std::span<const std::int64_t> special_ids, bool strip_leading_space);

  // The piece of any id; an id outside the vocabulary is nothing, as for the reference.
  [[nodiscard]] Piece operator[](TokenId token) const noexcept {
    if (token >= types_.size()) return {};
    const auto begin = offsets_[token];
    return {types_[token], std::string_view(bytes_).substr(begin, offsets_[token + 1] - begin)};
  }

  [[nodiscard]] std::size_t size() const noexcept { return types_.size(); }
  [[nodiscard]] VocabularyKind kind() const noexcept { return kind_; }
  [[nodiscard]] bool strip_leading_space() const noexcept { return strip_leading_space_; }

 private:
  PieceType append_byte_level(std::string_view spelling);
  PieceType append_byte_fallback(std::string_view spelling);

  VocabularyKind kind_;
  bool strip_leading_space_;
  std::string bytes_;                   // all pieces, end to end
  std::vector<std::uint32_t> offsets_;  // size() + 1
  std::vector<PieceType> types_;
};

}  // namespace mlx_serving
