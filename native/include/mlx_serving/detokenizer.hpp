// Streams of tokens to streams of text, one slot a stream, the whole batch in one call.
//
// A token passes three stages: bytes to whole characters, the leading space that Llama's decoder
// strips, stop strings. The released text, joined, equals what the tokenizer's own decode gives
// for all tokens, special ones skipped, up to the stop string. The Python twin, with the reasons,
// is mlx_serving/worker/engine/text/detokenizer.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "mlx_serving/stop_matcher.hpp"
#include "mlx_serving/utf8.hpp"
#include "mlx_serving/vocabulary.hpp"

namespace mlx_serving {

struct Release {
  std::string text;
  bool stopped = false;  // a stop string was met, now or before
};

// Thread-safe. Every method throws std::invalid_argument, naming the argument, for a slot that is
// not open or is finished, and changes nothing then.
class Detokenizer {
 public:
  explicit Detokenizer(std::shared_ptr<const Vocabulary> vocabulary);

  // Opens the lowest free slot. `stops` are well-formed UTF-8, none empty.
  std::size_t open(std::vector<std::string> stops);
  // Feeds tokens[i] to slots[i]; each slot at most once. All are fed or, on an error, none.
  std::vector<Release> push(std::span<const std::int64_t> slots,
                            std::span<const std::int64_t> tokens);
  // Feeds many tokens to one slot, to rebuild its state.
  Release replay(std::int64_t slot, std::span<const std::int64_t> tokens);
  // Releases what a slot still holds; an unfinished character becomes U+FFFD.
  std::string finish(std::int64_t slot);
  // Frees a slot, finished or not.
  void close(std::int64_t slot);

 private:
  struct Slot {
    explicit Slot(StopMatcher stops, bool strips) : matcher(std::move(stops)), strip(strips) {}
    Utf8Stream characters;  // byte-level: bytes of an unfinished character
    std::string run;        // byte-fallback: the bytes of a run that has not ended
    StopMatcher matcher;
    bool strip;  // the first character is still to come and is dropped if it is a space
    bool stopped = false;
    bool finished = false;
    std::uint64_t last_push = 0;  // the push that fed this slot last: finds a slot given twice
  };

  Slot& open_slot(std::int64_t slot);
  void feed(Slot& slot, TokenId token, std::string& out);
  void release(Slot& slot, std::string_view text, std::string& out) const;

  std::shared_ptr<const Vocabulary> vocabulary_;
  std::vector<std::optional<Slot>> slots_;
  std::uint64_t pushes_ = 0;
  std::string characters_;  // scratch of feed()
  std::mutex mutex_;
};

}  // namespace mlx_serving
