// Which blocks of the KV cache hold which tokens: a radix tree whose digits are blocks of tokens,
// one tree a salt. The Python twin, with the reasons, is
// mlx_serving/worker/engine/kv/prefix/index.py.
#pragma once

#include <cstdint>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace mlx_serving {

using BlockId = std::int64_t;

// A known prefix: its blocks, in order, and how many tokens it has. The prefix may end within
// its last block.
struct Prefix {
  std::vector<BlockId> blocks;
  std::size_t tokens = 0;
};

// Not thread-safe.
class PrefixIndex {
 public:
  // Throws std::invalid_argument for blocks of no tokens.
  explicit PrefixIndex(std::int64_t block_tokens);

  // Blocks that nothing holds: as many can be evicted.
  [[nodiscard]] std::size_t idle() const noexcept { return idle_; }
  [[nodiscard]] std::size_t size() const noexcept { return by_block_.size(); }

  // The longest known prefix. `tokens` are native int32s.
  [[nodiscard]] Prefix match(std::string_view salt, std::string_view tokens) const;
  // Takes in the blocks of a prefix, in order; returns those that are new, which are held. Stops
  // at the end of the tokens or of the blocks, or at a prefix that another block holds. Throws
  // std::invalid_argument for a block that is known by other tokens, and changes nothing then.
  std::vector<BlockId> insert(std::string_view salt, std::string_view tokens,
                              std::span<const BlockId> blocks);
  // Keeps blocks from eviction. Unknown ones are ignored, here and in release().
  void hold(std::span<const BlockId> blocks);
  // Notes that blocks are used no more, as of now.
  void release(std::span<const BlockId> blocks);
  // Forgets up to `count` idle blocks, the least recently released first; returns them.
  std::vector<BlockId> evict(std::int64_t count);
  // Forgets a path from its end up to the first block that another path shares; returns these.
  std::vector<BlockId> forget(std::span<const BlockId> blocks);
  // Calls block blocks[n] n from now on. They are in rising order; no other is known. Throws
  // std::invalid_argument if a known block is missing, and changes nothing then.
  void renumber(std::span<const BlockId> blocks);
  // Every block, and whether it is held.
  [[nodiscard]] std::vector<std::pair<BlockId, bool>> blocks() const;
  // Throws std::runtime_error if the index contradicts itself.
  void check() const;

 private:
  using NodeId = std::uint32_t;
  static constexpr NodeId kNone = 0xFFFFFFFF;

  struct Node {
    BlockId block = -1;  // -1: a root, or free
    NodeId parent = kNone;
    std::vector<NodeId> children;  // in the order of their digits' bytes
    std::uint64_t released_at = 0;
    bool held = true;
  };

  [[nodiscard]] std::string_view digit(NodeId node) const;
  [[nodiscard]] NodeId root(std::string_view salt) const;
  // The place of the first child whose digit is not before these bytes.
  [[nodiscard]] std::size_t place(const Node& parent, std::string_view bytes) const;
  [[nodiscard]] NodeId child(NodeId parent, std::string_view digit) const;
  void add_nearest(NodeId parent, std::string_view tokens, Prefix& prefix) const;
  [[nodiscard]] NodeId find(BlockId block) const;
  [[nodiscard]] bool is_idle_leaf(const Node& node) const {
    return !node.held && node.children.empty();
  }
  void require_unknown(std::span<const BlockId> blocks) const;
  NodeId make_node();
  NodeId add_child(NodeId parent, std::string_view digit, BlockId block);
  void remove(NodeId node);
  void check_node(NodeId id) const;

  std::size_t block_bytes_;
  std::uint64_t clock_ = 0;
  std::size_t idle_ = 0;
  std::vector<Node> nodes_;
  std::string digits_;        // of each node, end to end
  std::vector<NodeId> free_;  // nodes to use again
  std::unordered_map<BlockId, NodeId> by_block_;
  std::unordered_map<std::string, NodeId> roots_;
  std::unordered_map<NodeId, std::string> salts_;  // of the roots
  // Idle leaves, the least recently released first: (released_at, block).
  std::set<std::pair<std::uint64_t, BlockId>> leaves_;
};

}  // namespace mlx_serving
