#include "mlx_serving/detokenizer.hpp"

#include <thread>
#include <vector>

#include "check.hpp"

namespace {

using mlx_serving::Detokenizer;
using mlx_serving::Vocabulary;
using enum mlx_serving::VocabularyKind;

using Ids = std::vector<std::int64_t>;

// 0 a · 1 b · 2 ▁ · 3-6 the bytes of U+1F642 · 7 special
std::shared_ptr<const Vocabulary> byte_fallback() {
  const std::vector<std::string_view> spellings{"a",      "b",      "\xE2\x96\x81", "<0xF0>",
                                                "<0x9F>", "<0x99>", "<0x82>",       "<s>"};
  return std::make_shared<Vocabulary>(spellings, kByteFallback, Ids{7}, true);
}

void a_run_is_released_whole_or_replaced_whole() {
  Detokenizer detokenizer(byte_fallback());
  const auto good = detokenizer.open({});
  const auto bad = detokenizer.open({});
  CHECK(detokenizer.replay(static_cast<std::int64_t>(good), Ids{3, 4, 7, 5, 6, 0}).text ==
        "\xF0\x9F\x99\x82" "a");
  CHECK(detokenizer.replay(static_cast<std::int64_t>(bad), Ids{3, 4, 0}).text ==
        "\xEF\xBF\xBD\xEF\xBF\xBD" "a");
}

void one_leading_space_is_stripped() {
  Detokenizer detokenizer(byte_fallback());
  detokenizer.open({});
  CHECK(detokenizer.replay(0, Ids{2, 2, 0, 2}).text == " a ");
}

void a_bad_push_feeds_nothing() {
  Detokenizer detokenizer(byte_fallback());
  detokenizer.open({"ab"});
  const auto push = [&](Ids slots, Ids tokens) {
    return check::rejection([&] { detokenizer.push(slots, tokens); });
  };
  CHECK(push({0, 1}, {0, 0}) == "slot 1 is not open");
  CHECK(push({0, 0}, {0, 0}) == "slots: a slot occurs twice");
  CHECK(push({0}, {-1}) == "tokens[0]: -1 is negative");
  CHECK(push({0}, {}) == "tokens: 0 for 1 slots");
  CHECK(detokenizer.push(Ids{0}, Ids{1})[0].text == "b");  // no "a" is held from before
}

// The sanitizers watch; what counts here is that no slot sees another's text.
void threads_may_share_a_detokenizer() {
  Detokenizer detokenizer(byte_fallback());
  const auto work = [&] {
    for (int round = 0; round < 200; ++round) {
      const auto slot = static_cast<std::int64_t>(detokenizer.open({"b"}));
      auto text = detokenizer.replay(slot, Ids{0, 0, 0}).text;
      text += detokenizer.finish(slot);
      if (text != "aaa") std::abort();
      detokenizer.close(slot);
    }
  };
  std::thread other(work);
  work();
  other.join();
  CHECK(detokenizer.open({}) == 0);
}

}  // namespace

int main() {
  a_run_is_released_whole_or_replaced_whole();
  one_leading_space_is_stripped();
  a_bad_push_feeds_nothing();
  threads_may_share_a_detokenizer();
  return check::result();
}
