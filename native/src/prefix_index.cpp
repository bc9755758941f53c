#include "mlx_serving/prefix_index.hpp"

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <unordered_set>
#include <utility>

namespace mlx_serving {

namespace {

constexpr std::size_t kTokenBytes = 4;

std::size_t bytes_of_block(std::int64_t block_tokens) {
  if (block_tokens < 1) {
    throw std::invalid_argument("block_tokens: must be at least 1, not " +
                                std::to_string(block_tokens));
  }
  return static_cast<std::size_t>(block_tokens) * kTokenBytes;
}

std::size_t common_tokens(std::string_view one, std::string_view other) {
  const auto size = std::min(one.size(), other.size()) / kTokenBytes * kTokenBytes;
  const auto end = one.begin() + static_cast<std::ptrdiff_t>(size);
  const auto differs = std::mismatch(one.begin(), end, other.begin()).first;
  return static_cast<std::size_t>(differs - one.begin()) / kTokenBytes;
}

}  // namespace

PrefixIndex::PrefixIndex(std::int64_t block_tokens)
    : block_bytes_(bytes_of_block(block_tokens)) {}

Prefix PrefixIndex::match(std::string_view salt, std::string_view tokens) const {
  Prefix prefix;
  auto node = root(salt);
  if (node == kNone) return prefix;
  prefix.blocks.reserve(tokens.size() / block_bytes_ + 1);
  for (; tokens.size() >= block_bytes_; tokens.remove_prefix(block_bytes_)) {
    const auto next = child(node, tokens.substr(0, block_bytes_));
    if (next == kNone) break;
    node = next;
    prefix.blocks.push_back(nodes_[node].block);
  }
  prefix.tokens = prefix.blocks.size() * (block_bytes_ / kTokenBytes);
  add_nearest(node, tokens.substr(0, block_bytes_), prefix);
  return prefix;
}

std::vector<BlockId> PrefixIndex::insert(std::string_view salt, std::string_view tokens,
                                         std::span<const BlockId> blocks) {
  const auto depth = std::min(tokens.size() / block_bytes_, blocks.size());
  const auto digit_at = [&](std::size_t at) {
    return tokens.substr(at * block_bytes_, block_bytes_);
  };
  NodeId node = root(salt);
  std::size_t known = 0;
  for (; node != kNone && known < depth; ++known) {
    const auto next = child(node, digit_at(known));
    if (next == kNone) break;
    if (nodes_[next].block != blocks[known]) return {};
    node = next;
  }
  const auto fresh = blocks.subspan(known, depth - known);
  require_unknown(fresh);
  if (fresh.empty()) return {};
  if (node == kNone) {
    node = make_node();
    roots_.emplace(salt, node);
    salts_.emplace(node, salt);
  }
  for (; known < depth; ++known) node = add_child(node, digit_at(known), blocks[known]);
  return {fresh.begin(), fresh.end()};
}

void PrefixIndex::hold(std::span<const BlockId> blocks) {
  for (const auto block : blocks) {
    const auto id = find(block);
    if (id == kNone || nodes_[id].held) continue;
    leaves_.erase({nodes_[id].released_at, block});
    nodes_[id].held = true;
    --idle_;
  }
}

void PrefixIndex::release(std::span<const BlockId> blocks) {
  ++clock_;
  for (const auto block : blocks) {
    const auto id = find(block);
    if (id == kNone || !nodes_[id].held) continue;
    nodes_[id].held = false;
    nodes_[id].released_at = clock_;
    ++idle_;
    if (is_idle_leaf(nodes_[id])) leaves_.emplace(clock_, block);
  }
}

std::vector<BlockId> PrefixIndex::evict(std::int64_t count) {
  std::vector<BlockId> evicted;
  for (; count > 0 && !leaves_.empty(); --count) {
    const auto block = leaves_.begin()->second;
    remove(find(block));
    evicted.push_back(block);
  }
  return evicted;
}

std::vector<BlockId> PrefixIndex::forget(std::span<const BlockId> blocks) {
  std::vector<BlockId> gone;
  for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
    const auto id = find(*block);
    if (id == kNone) continue;
    if (!nodes_[id].children.empty()) break;
    remove(id);
    gone.push_back(*block);
  }
  return gone;
}

void PrefixIndex::renumber(std::span<const BlockId> blocks) {
  std::unordered_map<BlockId, NodeId> moved;
  for (std::size_t at = 0; at < blocks.size(); ++at) {
    const auto id = find(blocks[at]);
    if (id != kNone) moved.emplace(static_cast<BlockId>(at), id);
  }
  if (moved.size() != by_block_.size()) {
    throw std::invalid_argument("blocks: a known one is missing");
  }
  by_block_ = std::move(moved);
  leaves_.clear();
  for (const auto& [block, id] : by_block_) {
    nodes_[id].block = block;
    if (is_idle_leaf(nodes_[id])) leaves_.emplace(nodes_[id].released_at, block);
  }
}

std::vector<std::pair<BlockId, bool>> PrefixIndex::blocks() const {
  std::vector<std::pair<BlockId, bool>> all;
  for (const auto& [block, id] : by_block_) all.emplace_back(block, nodes_[id].held);
  return all;
}

std::string_view PrefixIndex::digit(NodeId node) const {
  return std::string_view(digits_).substr(node * block_bytes_, block_bytes_);
}

PrefixIndex::NodeId PrefixIndex::root(std::string_view salt) const {
  const auto found = roots_.find(std::string(salt));
  return found == roots_.end() ? kNone : found->second;
}

std::size_t PrefixIndex::place(const Node& parent, std::string_view bytes) const {
  const auto first = std::lower_bound(
      parent.children.begin(), parent.children.end(), bytes,
      [this](NodeId node, std::string_view wanted) { return digit(node) < wanted; });
  return static_cast<std::size_t>(first - parent.children.begin());
}

PrefixIndex::NodeId PrefixIndex::child(NodeId parent, std::string_view digit) const {
  const auto& children = nodes_[parent].children;
  const auto at = children.size() == 1 ? 0 : place(nodes_[parent], digit);
  return at < children.size() && this->digit(children[at]) == digit ? children[at] : kNone;
}

void PrefixIndex::add_nearest(NodeId parent, std::string_view tokens, Prefix& prefix) const {
  const auto& children = nodes_[parent].children;
  const auto at = place(nodes_[parent], tokens);
  // In order, the nearest is one of two neighbours.
  const auto after = at < children.size() ? common_tokens(digit(children[at]), tokens) : 0;
  const auto before = at > 0 ? common_tokens(digit(children[at - 1]), tokens) : 0;
  if (std::max(after, before) == 0) return;
  prefix.blocks.push_back(nodes_[children[before > after ? at - 1 : at]].block);
  prefix.tokens += std::max(after, before);
}

PrefixIndex::NodeId PrefixIndex::find(BlockId block) const {
  const auto found = by_block_.find(block);
  return found == by_block_.end() ? kNone : found->second;
}

void PrefixIndex::require_unknown(std::span<const BlockId> blocks) const {
  std::unordered_set<BlockId> seen;
  for (const auto block : blocks) {
    if (block < 0 || by_block_.contains(block)) {
      throw std::invalid_argument("blocks: " + std::to_string(block) + " holds other tokens");
    }
    if (!seen.insert(block).second) throw std::invalid_argument("blocks: one is given twice");
  }
}

PrefixIndex::NodeId PrefixIndex::make_node() {
  if (!free_.empty()) {
    const auto id = free_.back();
    free_.pop_back();
    nodes_[id] = Node{};
    return id;
  }
  nodes_.emplace_back();
  digits_.resize(nodes_.size() * block_bytes_);
  return static_cast<NodeId>(nodes_.size() - 1);
}

PrefixIndex::NodeId PrefixIndex::add_child(NodeId parent, std::string_view digit, BlockId block) {
  const auto id = make_node();
  digits_.replace(id * block_bytes_, block_bytes_, digit);
  nodes_[id].block = block;
  nodes_[id].parent = parent;
  by_block_.emplace(block, id);
  auto& above = nodes_[parent];
  if (is_idle_leaf(above)) leaves_.erase({above.released_at, above.block});
  const auto at = static_cast<std::ptrdiff_t>(place(above, digit));
  above.children.insert(above.children.begin() + at, id);
  return id;
}

void PrefixIndex::remove(NodeId id) {
  auto& node = nodes_[id];
  auto& parent = nodes_[node.parent];
  std::erase(parent.children, id);
  by_block_.erase(node.block);
  if (!node.held) --idle_;
  leaves_.erase({node.released_at, node.block});
  node.block = -1;
  free_.push_back(id);
  if (!parent.children.empty()) return;
  if (parent.block >= 0) {
    if (!parent.held) leaves_.emplace(parent.released_at, parent.block);
    return;
  }
  roots_.erase(salts_.at(node.parent));
  salts_.erase(node.parent);
  free_.push_back(node.parent);
}

void PrefixIndex::check() const {
  std::size_t idle = 0;
  std::size_t leaves = 0;
  for (const auto& [block, id] : by_block_) {
    if (nodes_[id].block != block) throw std::runtime_error("a block is known twice");
    check_node(id);
    if (!nodes_[id].held) ++idle;
    if (is_idle_leaf(nodes_[id])) ++leaves;
  }
  if (idle != idle_) throw std::runtime_error("the idle blocks are miscounted");
  if (leaves != leaves_.size()) throw std::runtime_error("an idle block can't be evicted");
  if (roots_.size() + by_block_.size() + free_.size() != nodes_.size()) {
    throw std::runtime_error("a block is lost");
  }
  for (const auto& [salt, id] : roots_) {
    if (nodes_[id].children.empty()) throw std::runtime_error("an empty tree is kept");
  }
}

void PrefixIndex::check_node(NodeId id) const {
  const auto& node = nodes_[id];
  const auto& parent = nodes_[node.parent];
  if (child(node.parent, digit(id)) != id) throw std::runtime_error("a block is lost");
  if (node.held && parent.block >= 0 && !parent.held) {
    throw std::runtime_error("a block is held and its path is not");
  }
  if (is_idle_leaf(node) && !leaves_.contains({node.released_at, node.block})) {
    throw std::runtime_error("an idle block can't be evicted");
  }
}

}  // namespace mlx_serving
