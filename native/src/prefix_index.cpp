#include "mlx_serving/prefix_index.hpp"

#include <algorithm>
#include <cstring>
#include <random>
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

// The finalizer of MurmurHash3 (Austin Appleby, public domain).
std::uint64_t mix(std::uint64_t value) {
  value = (value ^ (value >> 33)) * 0xFF51AFD7ED558CCD;
  value = (value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53;
  return value ^ (value >> 33);
}

// Not guessable from outside, so that no tenant can make all prefixes collide.
std::uint64_t random_seed() {
  std::random_device device;
  return (static_cast<std::uint64_t>(device()) << 32) | device();
}

}  // namespace

PrefixIndex::PrefixIndex(std::int64_t block_tokens)
    : block_bytes_(bytes_of_block(block_tokens)), seed_(random_seed()) {}

std::vector<BlockId> PrefixIndex::match(std::string_view salt, std::string_view tokens) const {
  std::vector<BlockId> found;
  NodeId node = root(salt);
  for (; node != kNone && tokens.size() >= block_bytes_; tokens.remove_prefix(block_bytes_)) {
    const auto next = tokens.substr(0, block_bytes_);
    node = child(node, next, hash(node, next));
    if (node != kNone) found.push_back(nodes_[node].block);
  }
  return found;
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
    const auto next = child(node, digit_at(known), hash(node, digit_at(known)));
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
    if (nodes_[id].children != 0) break;
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

PrefixIndex::NodeId PrefixIndex::child(NodeId parent, std::string_view digit,
                                       std::uint64_t hash) const {
  const auto first = by_hash_.find(hash);
  if (first == by_hash_.end()) return kNone;
  // A hash may be anybody's: only the parent and the tokens themselves count.
  for (auto id = first->second; id != kNone; id = nodes_[id].next) {
    if (nodes_[id].parent == parent && this->digit(id) == digit) return id;
  }
  return kNone;
}

std::uint64_t PrefixIndex::hash(NodeId parent, std::string_view digit) const {
  std::uint64_t value = seed_ ^ mix(parent + 1ULL);
  for (; digit.size() >= sizeof(std::uint64_t); digit.remove_prefix(sizeof(std::uint64_t))) {
    std::uint64_t word = 0;
    std::memcpy(&word, digit.data(), sizeof(word));
    value = (value ^ word) * 0x9E3779B97F4A7C15;
    value ^= value >> 32;
  }
  std::uint64_t rest = 0;
  std::memcpy(&rest, digit.data(), digit.size());
  return mix(value ^ rest);
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
  auto& node = nodes_[id];
  node.block = block;
  node.parent = parent;
  node.hash = hash(parent, digit);
  const auto [first, is_first] = by_hash_.try_emplace(node.hash, id);
  if (!is_first) node.next = std::exchange(first->second, id);
  by_block_.emplace(block, id);
  if (auto& above = nodes_[parent]; is_idle_leaf(above)) {
    leaves_.erase({above.released_at, above.block});
  }
  ++nodes_[parent].children;
  return id;
}

void PrefixIndex::unlink(NodeId id) {
  const auto first = by_hash_.find(nodes_[id].hash);
  if (first->second == id && nodes_[id].next == kNone) {
    by_hash_.erase(first);
    return;
  }
  auto* link = &first->second;
  while (*link != id) link = &nodes_[*link].next;
  *link = nodes_[id].next;
}

void PrefixIndex::remove(NodeId id) {
  const auto node = nodes_[id];
  unlink(id);
  by_block_.erase(node.block);
  if (!node.held) --idle_;
  leaves_.erase({node.released_at, node.block});
  nodes_[id].block = -1;
  free_.push_back(id);
  auto& parent = nodes_[node.parent];
  if (--parent.children != 0) return;
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
    if (nodes_[id].children == 0) throw std::runtime_error("an empty tree is kept");
  }
}

void PrefixIndex::check_node(NodeId id) const {
  const auto& node = nodes_[id];
  const auto& parent = nodes_[node.parent];
  if (child(node.parent, digit(id), node.hash) != id) throw std::runtime_error("a block is lost");
  if (node.held && parent.block >= 0 && !parent.held) {
    throw std::runtime_error("a block is held and its path is not");
  }
  if (is_idle_leaf(node) && !leaves_.contains({node.released_at, node.block})) {
    throw std::runtime_error("an idle block can't be evicted");
  }
}

}  // namespace mlx_serving
