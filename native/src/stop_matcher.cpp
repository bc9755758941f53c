#include "mlx_serving/stop_matcher.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace mlx_serving {
namespace {

// fallback[n]: the longest proper prefix of the first n bytes that is also their suffix.
// Source: Knuth, Morris, Pratt, "Fast pattern matching in strings" (1977).
std::vector<std::uint32_t> failure_function(std::string_view text) {
  std::vector<std::uint32_t> fallback(text.size() + 1, 0);
  std::uint32_t length = 0;
  for (std::size_t at = 1; at < text.size(); ++at) {
    while (length > 0 && text[at] != text[length]) length = fallback[length];
    if (text[at] == text[length]) ++length;
    fallback[at + 1] = length;
  }
  return fallback;
}

}  // namespace

StopMatcher::StopMatcher(std::vector<std::string> stops) {
  patterns_.reserve(stops.size());
  for (auto& stop : stops) {
    if (stop.empty()) {
      throw std::invalid_argument("stops[" + std::to_string(patterns_.size()) +
                                  "]: must not be empty");
    }
    auto fallback = failure_function(stop);
    patterns_.push_back({std::move(stop), std::move(fallback)});
  }
}

bool StopMatcher::feed(std::string_view text, std::string& out) {
  if (patterns_.empty()) {
    out.append(text);
    return false;
  }
  // Bytes are matched, not characters: UTF-8 is self-synchronising, so both find the same.
  for (const char byte : text) {
    held_.push_back(byte);
    std::size_t hold = 0;
    std::size_t complete = 0;
    for (auto& pattern : patterns_) {
      advance(pattern, byte);
      hold = std::max<std::size_t>(hold, pattern.matched);
      if (pattern.matched == pattern.text.size()) complete = std::max(complete, pattern.text.size());
    }
    if (complete > 0) {
      out.append(held_, 0, held_.size() - complete);
      held_.clear();
      return true;
    }
    if (held_.size() > hold) {
      out.append(held_, 0, held_.size() - hold);
      held_.erase(0, held_.size() - hold);
    }
  }
  return false;
}

void StopMatcher::flush(std::string& out) {
  out.append(held_);
  held_.clear();
}

void StopMatcher::advance(Pattern& pattern, char byte) {
  auto& matched = pattern.matched;
  while (matched > 0 && pattern.text[matched] != byte) matched = pattern.fallback[matched];
  if (pattern.text[matched] == byte) ++matched;
}

}  // namespace mlx_serving
