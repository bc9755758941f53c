// Bindings only: Python objects in, Python objects out. The GIL is released around work that
// takes long enough; the prefix index, whose calls are short, counts on it instead of a lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "mlx_serving/detokenizer.hpp"
#include "mlx_serving/prefix_index.hpp"
#include "mlx_serving/sampler.hpp"
#include "mlx_serving/vocabulary.hpp"

namespace py = pybind11;
using mlx_serving::BlockId;
using mlx_serving::Detokenizer;
using mlx_serving::LogitsType;
using mlx_serving::PrefixIndex;
using mlx_serving::Release;
using mlx_serving::Vocabulary;
using mlx_serving::VocabularyKind;

namespace {

VocabularyKind parse_kind(const std::string& kind) {
  if (kind == "byte_level") return VocabularyKind::kByteLevel;
  if (kind == "byte_fallback") return VocabularyKind::kByteFallback;
  throw py::value_error("kind: must be byte_level or byte_fallback, not '" + kind + "'");
}

std::shared_ptr<Vocabulary> make_vocabulary(const py::sequence& tokens, const std::string& kind,
                                            const py::set& special_ids, bool strip_leading_space) {
  const auto parsed = parse_kind(kind);
  std::vector<py::bytes> owners;  // keeps the bytes alive while the views are read
  std::vector<std::string_view> spellings;
  owners.reserve(tokens.size());
  spellings.reserve(tokens.size());
  for (const auto token : tokens) {
    owners.push_back(token.cast<py::bytes>());
    spellings.emplace_back(owners.back());
  }
  std::vector<std::int64_t> ids;
  for (const auto id : special_ids) ids.push_back(id.cast<std::int64_t>());
  return std::make_shared<Vocabulary>(spellings, parsed, ids, strip_leading_space);
}

// A surrogate in a stop string fails here, by name, rather than inside a type caster.
std::vector<std::string> to_utf8(const py::sequence& stops) {
  std::vector<std::string> texts;
  for (std::size_t at = 0; at < stops.size(); ++at) {
    const py::str stop = stops[at];
    Py_ssize_t size = 0;
    const char* data = PyUnicode_AsUTF8AndSize(stop.ptr(), &size);
    if (data == nullptr) {
      PyErr_Clear();
      throw py::value_error("stops[" + std::to_string(at) + "]: has a lone surrogate");
    }
    texts.emplace_back(data, static_cast<std::size_t>(size));
  }
  return texts;
}

py::tuple to_python(const Release& release) {
  return py::make_tuple(py::str(release.text), py::bool_(release.stopped));
}

py::list push(Detokenizer& self, const std::vector<std::int64_t>& slots,
              const std::vector<std::int64_t>& tokens) {
  std::vector<Release> released;
  {
    const py::gil_scoped_release no_gil;
    released = self.push(slots, tokens);
  }
  py::list out(released.size());
  for (std::size_t at = 0; at < released.size(); ++at) out[at] = to_python(released[at]);
  return out;
}

py::tuple replay(Detokenizer& self, std::int64_t slot, const std::vector<std::int64_t>& tokens) {
  Release released;
  {
    const py::gil_scoped_release no_gil;
    released = self.replay(slot, tokens);
  }
  return to_python(released);
}

// A contiguous buffer of at least `size` elements of 4 bytes (2 for bfloat16's bits).
py::buffer_info view(const py::buffer& buffer, const char* name, std::size_t size, bool writable) {
  auto info = buffer.request(writable);
  py::ssize_t stride = info.itemsize;
  for (py::ssize_t axis = info.ndim - 1; axis >= 0; --axis) {
    if (info.shape[std::size_t(axis)] > 1 && info.strides[std::size_t(axis)] != stride) {
      throw py::value_error(std::string(name) + ": must be contiguous");
    }
    stride *= info.shape[std::size_t(axis)];
  }
  const bool is_logits = std::string_view(name) == "logits";
  if (info.itemsize != 4 && !(is_logits && info.itemsize == 2)) {
    throw py::value_error(std::string(name) + ": elements must have 4 bytes");
  }
  if (std::size_t(info.size) < size) {
    throw py::value_error(std::string(name) + ": holds too few elements");
  }
  return info;
}

void sample(const py::buffer& logits, const py::buffer& table, const py::buffer& state,
            const py::buffer& inputs, const py::buffer& lists, const py::object& mask,
            const std::vector<py::buffer>& outputs, bool by_groups) {
  if (outputs.size() != 6) throw py::value_error("outputs: must be 6 buffers");
  const auto values = view(logits, "logits", 1, false);
  if (values.ndim != 2) throw py::value_error("logits: must have 2 dimensions");
  const auto rows = std::size_t(values.shape[0]);
  const auto states = view(state, "state", rows, false);
  if (states.ndim != 2) throw py::value_error("state: must have 2 dimensions");
  const auto columns = std::size_t(states.shape[1]);
  const auto tables = view(table, "table", rows * mlx_serving::kSamplerColumns, false);
  const auto taken = view(inputs, "inputs", rows, false);
  const auto listed = view(lists, "lists", 1, false);
  py::buffer_info masks;
  if (!mask.is_none()) masks = view(mask.cast<py::buffer>(), "mask", rows, false);
  std::vector<py::buffer_info> given;
  const std::size_t sizes[] = {rows, rows, rows, rows, rows * columns, 1};
  for (std::size_t at = 0; at < 6; ++at) {
    given.push_back(view(outputs[at], "outputs", sizes[at], true));
  }
  const mlx_serving::SamplerInputs in{
      values.itemsize == 2 ? LogitsType::kBFloat16 : LogitsType::kFloat32,
      values.ptr,
      static_cast<const int*>(tables.ptr),
      static_cast<const int*>(states.ptr),
      static_cast<const int*>(taken.ptr),
      static_cast<const int*>(listed.ptr),
      static_cast<const int*>(masks.ptr),
      rows,
      std::size_t(values.shape[1]),
      columns,
      mask.is_none() ? 0 : std::size_t(masks.shape[std::size_t(masks.ndim - 1)])};
  const mlx_serving::SamplerOutputs out{
      static_cast<int*>(given[0].ptr),   static_cast<float*>(given[1].ptr),
      static_cast<int*>(given[2].ptr),   static_cast<float*>(given[3].ptr),
      static_cast<int*>(given[4].ptr),   static_cast<float*>(given[5].ptr)};
  const py::gil_scoped_release no_gil;
  by_groups ? mlx_serving::sample_by_groups(in, out) : mlx_serving::sample(in, out);
}

py::dict blocks(const PrefixIndex& self) {
  py::dict held;
  for (const auto& [block, is_held] : self.blocks()) held[py::int_(block)] = is_held;
  return held;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native pieces of mlx-serving; each has a Python twin.";

  py::class_<Vocabulary, std::shared_ptr<Vocabulary>>(module, "Vocabulary")
      .def(py::init(&make_vocabulary), py::arg("tokens"), py::arg("kind"), py::arg("special_ids"),
           py::arg("strip_leading_space") = false)
      .def("__len__", &Vocabulary::size);

  py::class_<Detokenizer>(module, "Detokenizer")
      .def(py::init<std::shared_ptr<const Vocabulary>>(), py::arg("vocabulary").none(false))
      .def("open", [](Detokenizer& self, const py::sequence& stops) {
             return self.open(to_utf8(stops));
           }, py::arg("stops") = py::tuple())
      .def("push", &push, py::arg("slots"), py::arg("tokens"))
      .def("replay", &replay, py::arg("slot"), py::arg("tokens"))
      .def("finish", &Detokenizer::finish, py::arg("slot"))
      .def("close", &Detokenizer::close, py::arg("slot"));

  module.def("sample", &sample, py::arg("logits"), py::arg("table"), py::arg("state"),
             py::arg("inputs"), py::arg("lists"), py::arg("mask").none(true), py::arg("outputs"),
             py::arg("by_groups") = false);
  using Blocks = std::vector<BlockId>;
  py::class_<PrefixIndex>(module, "PrefixIndex")
      .def(py::init<std::int64_t>(), py::arg("block_tokens"))
      .def_property_readonly("idle", &PrefixIndex::idle)
      .def("__len__", &PrefixIndex::size)
      .def("match", [](const PrefixIndex& self, const py::bytes& salt, const py::bytes& tokens) {
             auto prefix = self.match(salt, tokens);
             return std::pair(std::move(prefix.blocks), prefix.tokens);
           }, py::arg("salt"), py::arg("tokens"))
      .def("insert", [](PrefixIndex& self, const py::bytes& salt, const py::bytes& tokens,
                        const Blocks& blocks) {
             return self.insert(salt, tokens, blocks);
           }, py::arg("salt"), py::arg("tokens"), py::arg("blocks"))
      .def("hold", [](PrefixIndex& self, const Blocks& blocks) { self.hold(blocks); },
           py::arg("blocks"))
      .def("release", [](PrefixIndex& self, const Blocks& blocks) { self.release(blocks); },
           py::arg("blocks"))
      .def("evict", &PrefixIndex::evict, py::arg("count"))
      .def("forget", [](PrefixIndex& self, const Blocks& blocks) { return self.forget(blocks); },
           py::arg("blocks"))
      .def("renumber", [](PrefixIndex& self, const Blocks& blocks) { self.renumber(blocks); },
           py::arg("blocks"))
      .def("blocks", &blocks)
      .def("check", &PrefixIndex::check);
}
