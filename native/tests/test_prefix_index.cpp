#include "mlx_serving/prefix_index.hpp"

#include <random>
#include <string>
#include <vector>

#include "check.hpp"

using mlx_serving::BlockId;
using mlx_serving::PrefixIndex;
using Blocks = std::vector<BlockId>;

namespace {

// Blocks of two tokens, one digit a block.
std::string spelled(const std::vector<std::int32_t>& digits) {
  std::string bytes;
  for (const auto digit : digits) {
    for (int copy = 0; copy < 2; ++copy) {
      bytes.append(reinterpret_cast<const char*>(&digit), sizeof(digit));
    }
  }
  return bytes;
}

void a_prefix_is_found_under_its_own_salt() {
  PrefixIndex index(2);
  CHECK((index.insert("a", spelled({1, 2}), Blocks{10, 11}) == Blocks{10, 11}));
  CHECK((index.match("a", spelled({1, 2, 3})).blocks == Blocks{10, 11}));
  CHECK((index.match("a", spelled({1, 3})).blocks == Blocks{10}));
  CHECK(index.match("b", spelled({1, 2})).blocks.empty());
  CHECK(index.match("a", spelled({1}).substr(0, 4)).tokens == 1);
  CHECK((index.match("a", spelled({1}).substr(0, 4)).blocks == Blocks{10}));
}

void insertion_ends_where_another_block_is() {
  PrefixIndex index(2);
  index.insert("", spelled({1}), Blocks{10});
  CHECK(index.insert("", spelled({1, 2}), Blocks{20, 21}).empty());
  CHECK((index.insert("", spelled({1, 2}), Blocks{10, 21}) == Blocks{21}));
}

void bad_blocks_are_refused_and_change_nothing() {
  PrefixIndex index(2);
  index.insert("", spelled({1}), Blocks{10});
  const auto refusal = [&](Blocks blocks) {
    return check::rejection([&] { index.insert("", spelled({5, 6}), blocks); });
  };
  CHECK(refusal({11, 10}) == "blocks: 10 holds other tokens");
  CHECK(refusal({3, 3}) == "blocks: one is given twice");
  CHECK(index.match("", spelled({5})).blocks.empty());
  CHECK(index.size() == 1);
  CHECK(check::rejection([] { PrefixIndex(0); }) == "block_tokens: must be at least 1, not 0");
}

void idle_leaves_go_least_recent_first() {
  PrefixIndex index(2);
  index.insert("", spelled({1, 2}), Blocks{10, 11});
  index.insert("", spelled({9}), Blocks{19});
  CHECK(index.evict(3).empty());
  index.release(Blocks{19});
  index.release(Blocks{10, 11});
  index.hold(Blocks{19});
  index.release(Blocks{19});
  CHECK(index.idle() == 3);
  CHECK((index.evict(9) == Blocks{11, 10, 19}));
  CHECK(index.size() == 0);
  index.check();
}

void a_forgotten_path_is_gone_from_its_end() {
  PrefixIndex index(2);
  index.insert("", spelled({1, 2}), Blocks{10, 11});
  index.insert("", spelled({1, 3}), Blocks{10, 12});
  CHECK((index.forget(Blocks{10, 11}) == Blocks{11}));
  CHECK((index.match("", spelled({1, 3})).blocks == Blocks{10, 12}));
}

void blocks_can_be_renumbered() {
  PrefixIndex index(2);
  index.insert("", spelled({1, 2}), Blocks{10, 12});
  index.release(Blocks{10, 12});
  CHECK(check::rejection([&] { index.renumber(Blocks{10, 11}); }) ==
        "blocks: a known one is missing");
  index.renumber(Blocks{10, 11, 12});
  CHECK((index.match("", spelled({1, 2})).blocks == Blocks{0, 2}));
  CHECK((index.evict(2) == Blocks{2, 0}));
}

// Churn under the sanitizers: nodes are freed, used again, and their collision chains cut.
void churn_keeps_the_index_whole() {
  PrefixIndex index(2);
  std::mt19937 chance(1);
  BlockId next = 0;
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::int32_t> digits(chance() % 6);
    for (auto& digit : digits) digit = static_cast<std::int32_t>(chance() % 3);
    const std::string salt(chance() % 2, 's');
    auto blocks = index.match(salt, spelled(digits)).blocks;
    index.hold(blocks);
    while (blocks.size() < digits.size()) blocks.push_back(next++);
    index.insert(salt, spelled(digits), blocks);
    CHECK(index.match(salt, spelled(digits)).blocks == blocks);
    index.release(blocks);
    if (round % 7 == 0) index.evict(chance() % 40);
    if (round % 50 == 0) index.check();
  }
  index.check();
}

}  // namespace

int main() {
  a_prefix_is_found_under_its_own_salt();
  insertion_ends_where_another_block_is();
  bad_blocks_are_refused_and_change_nothing();
  idle_leaves_go_least_recent_first();
  a_forgotten_path_is_gone_from_its_end();
  blocks_can_be_renumbered();
  churn_keeps_the_index_whole();
  return check::result();
}
