// Stop strings in a stream of text, with the least hold-back that leaks none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mlx_serving {

// The stop string that is complete first ends the text right before it; if two end together, the
// longer does. One Knuth-Morris-Pratt automaton a stop string: its state is the length of the
// longest end of the text that the string begins with, which is exactly what must be held back.
class StopMatcher {
 public:
  // Throws std::invalid_argument for an empty stop string. All are well-formed UTF-8.
  explicit StopMatcher(std::vector<std::string> stops);

  // Feeds text (whole characters), appends what may be released. True once a stop string is
  // complete; nothing may be fed after that.
  bool feed(std::string_view text, std::string& out);
  // Ends the text: what is held was no stop string after all.
  void flush(std::string& out);

 private:
  struct Pattern {
    std::string text;
    std::vector<std::uint32_t> fallback;  // KMP failure function, by matched length
    std::uint32_t matched = 0;
  };
  static void advance(Pattern& pattern, char byte);

  std::vector<Pattern> patterns_;
  std::string held_;
};

}  // namespace mlx_serving
