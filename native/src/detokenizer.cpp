#include "mlx_serving/detokenizer.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

namespace mlx_serving {
namespace {

[[noreturn]] void reject(const std::string& message) { throw std::invalid_argument(message); }

void check_tokens(std::span<const std::int64_t> tokens) {
  for (std::size_t at = 0; at < tokens.size(); ++at) {
    if (tokens[at] < 0) {
      reject("tokens[" + std::to_string(at) + "]: " + std::to_string(tokens[at]) + " is negative");
    }
  }
}

TokenId to_id(std::int64_t token) {
  constexpr std::int64_t kUnknown = std::numeric_limits<TokenId>::max();  // in no vocabulary
  return static_cast<TokenId>(std::min(token, kUnknown));
}

// A run of byte tokens is judged as a whole: one bad byte, and each byte becomes U+FFFD.
// Source: ByteFallback in huggingface/tokenizers, decoders/byte_fallback.rs.
void resolve_run(std::string& run, std::string& out) {
  if (is_utf8(run)) {
    out.append(run);
  } else {
    for (std::size_t n = 0; n < run.size(); ++n) out.append(kReplacement);
  }
  run.clear();
}

}  // namespace

Detokenizer::Detokenizer(std::shared_ptr<const Vocabulary> vocabulary)
    : vocabulary_(std::move(vocabulary)) {}

std::size_t Detokenizer::open(std::vector<std::string> stops) {
  Slot slot(StopMatcher(std::move(stops)), vocabulary_->strip_leading_space());
  const std::lock_guard lock(mutex_);
  const auto free = std::find(slots_.begin(), slots_.end(), std::nullopt);
  const auto number = static_cast<std::size_t>(free - slots_.begin());
  if (free == slots_.end()) slots_.emplace_back();
  slots_[number].emplace(std::move(slot));
  return number;
}

std::vector<Release> Detokenizer::push(std::span<const std::int64_t> slots,
                                       std::span<const std::int64_t> tokens) {
  if (slots.size() != tokens.size()) {
    reject("tokens: " + std::to_string(tokens.size()) + " for " + std::to_string(slots.size()) +
           " slots");
  }
  const std::lock_guard lock(mutex_);
  for (const auto slot : slots) open_slot(slot);
  ++pushes_;
  for (const auto slot : slots) {
    if (std::exchange(open_slot(slot).last_push, pushes_) == pushes_) {
      reject("slots: a slot occurs twice");
    }
  }
  check_tokens(tokens);
  std::vector<Release> released(slots.size());
  for (std::size_t at = 0; at < slots.size(); ++at) {
    auto& slot = open_slot(slots[at]);
    feed(slot, to_id(tokens[at]), released[at].text);
    released[at].stopped = slot.stopped;
  }
  return released;
}

Release Detokenizer::replay(std::int64_t slot, std::span<const std::int64_t> tokens) {
  const std::lock_guard lock(mutex_);
  auto& row = open_slot(slot);
  check_tokens(tokens);
  Release released;
  for (const auto token : tokens) feed(row, to_id(token), released.text);
  released.stopped = row.stopped;
  return released;
}

std::string Detokenizer::finish(std::int64_t slot) {
  const std::lock_guard lock(mutex_);
  auto& row = open_slot(slot);
  row.finished = true;
  std::string out;
  std::string characters;
  row.characters.flush(characters);
  resolve_run(row.run, characters);
  release(row, characters, out);
  if (!row.stopped) row.matcher.flush(out);
  return out;
}

void Detokenizer::close(std::int64_t slot) {
  const std::lock_guard lock(mutex_);
  if (slot < 0 || static_cast<std::size_t>(slot) >= slots_.size() ||
      !slots_[static_cast<std::size_t>(slot)]) {
    reject("slot " + std::to_string(slot) + " is not open");
  }
  slots_[static_cast<std::size_t>(slot)].reset();
}

Detokenizer::Slot& Detokenizer::open_slot(std::int64_t slot) {
  const auto number = static_cast<std::size_t>(slot);
  if (slot < 0 || number >= slots_.size() || !slots_[number]) {
    reject("slot " + std::to_string(slot) + " is not open");
  }
  if (slots_[number]->finished) reject("slot " + std::to_string(slot) + " is finished");
  return *slots_[number];
}

void Detokenizer::feed(Slot& slot, TokenId token, std::string& out) {
  const auto piece = (*vocabulary_)[token];
  if (piece.type == PieceType::kNothing || slot.stopped) return;
  if (piece.type == PieceType::kByte) {
    slot.run.append(piece.bytes);
    return;
  }
  if (vocabulary_->kind() == VocabularyKind::kByteFallback && slot.run.empty()) {
    release(slot, piece.bytes, out);
    return;
  }
  characters_.clear();
  if (vocabulary_->kind() == VocabularyKind::kByteLevel) {
    slot.characters.feed(piece.bytes, characters_);
  } else {
    resolve_run(slot.run, characters_);
    characters_.append(piece.bytes);
  }
  release(slot, characters_, out);
}

void Detokenizer::release(Slot& slot, std::string_view text, std::string& out) const {
  if (text.empty() || slot.stopped) return;
  if (std::exchange(slot.strip, false) && text.front() == ' ') text.remove_prefix(1);
  slot.stopped = slot.matcher.feed(text, out);
}

}  // namespace mlx_serving
