// Reads and writes safetensors files: eight bytes with the header's length, a JSON header, then the tensors' bytes.
//
// https://github.com/huggingface/safetensors describes the format. Every size is checked against the file before
// anything is read, so a truncated file is an error and never a wrong tensor.
#pragma once

#include <torch/torch.h>

#include <cctype>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace safetensors {

using Tensors = std::map<std::string, at::Tensor>;  // in the order of the names' bytes, which stages rely on

struct Entry {
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<int64_t> offsets;
};

// The part of JSON that a header consists of: objects of strings, of whole numbers, and of lists of them.
class HeaderParser {
 public:
  HeaderParser(std::string text, std::string path) : text_(std::move(text)), path_(std::move(path)) {}

  std::map<std::string, Entry> parse() {
    std::map<std::string, Entry> entries;
    object([&](const std::string& name) {
      if (name == "__metadata__") {
        object([&](const std::string&) { string(); });
        return;
      }
      Entry& entry = entries[name];
      object([&](const std::string& field) {
        if (field == "dtype") {
          entry.dtype = string();
        } else if (field == "shape") {
          entry.shape = numbers();
        } else if (field == "data_offsets") {
          entry.offsets = numbers();
        } else {
          fail("unknown field " + field);
        }
      });
    });
    return entries;
  }

 private:
  [[noreturn]] void fail(const std::string& why) const {
    throw std::runtime_error(path_ + " must be a safetensors file, got a header that is none: " + why);
  }

  char next() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
    if (at_ >= text_.size()) fail("it ends early");
    return text_[at_];
  }

  void expect(char wanted) {
    if (next() != wanted) fail(std::string("expected ") + wanted);
    ++at_;
  }

  bool take(char wanted) {
    if (next() != wanted) return false;
    ++at_;
    return true;
  }

  std::string string() {
    expect('"');
    std::string value;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] == '\\') {
        ++at_;
        if (at_ >= text_.size() || (text_[at_] != '"' && text_[at_] != '\\' && text_[at_] != '/')) {
          fail("an escape that names of tensors have no need of");
        }
      }
      value += text_[at_++];
    }
    expect('"');
    return value;
  }

  int64_t number() {
    next();
    int64_t value = 0;
    const size_t start = at_;
    while (at_ < text_.size() && std::isdigit(static_cast<unsigned char>(text_[at_]))) {
      if (value > (INT64_MAX - 9) / 10) fail("a number out of range");
      value = 10 * value + (text_[at_++] - '0');
    }
    if (at_ == start) fail("expected a number");
    return value;
  }

  std::vector<int64_t> numbers() {
    std::vector<int64_t> values;
    expect('[');
    if (take(']')) return values;
    do {
      values.push_back(number());
    } while (take(','));
    expect(']');
    return values;
  }

  template <typename Field>
  void object(Field field) {
    expect('{');
    if (take('}')) return;
    do {
      const std::string name = string();
      expect(':');
      field(name);
    } while (take(','));
    expect('}');
  }

  std::string text_, path_;
  size_t at_ = 0;
};

inline const std::map<std::string, at::ScalarType>& dtypes() {
  static const std::map<std::string, at::ScalarType> known = {
      {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf},
      {"BF16", at::kBFloat16}, {"I64", at::kLong}, {"I32", at::kInt}};
  return known;
}

// Returns the bytes that a tensor of this shape has, or -1 where that is beyond any file.
inline int64_t num_bytes(const std::vector<int64_t>& shape, int64_t item) {
  int64_t bytes = item;
  for (const int64_t size : shape) {
    if (size != 0 && bytes > INT64_MAX / size) return -1;
    bytes *= size;
  }
  return bytes;
}

inline Tensors load(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error(path + " must be a file that can be read; check the path");
  const int64_t size = file.tellg();
  file.seekg(0);
  uint64_t length = 0;  // little-endian, as is every machine that torch runs on
  if (size < 8 || !file.read(reinterpret_cast<char*>(&length), 8) || length > static_cast<uint64_t>(size - 8)) {
    throw std::runtime_error(path + " must be a safetensors file, got " + std::to_string(size) +
                             " bytes, fewer than its header tells; copy it again");
  }
  std::string header(length, '\0');
  file.read(header.data(), static_cast<std::streamsize>(length));
  const int64_t start = 8 + static_cast<int64_t>(length);
  Tensors tensors;
  for (const auto& [name, entry] : HeaderParser(header, path).parse()) {
    const auto dtype = dtypes().find(entry.dtype);
    if (dtype == dtypes().end()) {
      throw std::runtime_error(path + ": " + name + " must be of F64, F32, F16, BF16, I64 or I32, got " + entry.dtype);
    }
    const int64_t bytes = num_bytes(entry.shape, static_cast<int64_t>(c10::elementSize(dtype->second)));
    const auto& at = entry.offsets;
    if (at.size() != 2 || at[0] > at[1] || at[1] > size - start || at[1] - at[0] != bytes) {
      throw std::runtime_error(path + ": " + name + " must lie within the file in its own length; copy it again");
    }
    at::Tensor tensor = at::empty(entry.shape, dtype->second);
    file.seekg(start + at[0]);
    if (bytes > 0 && !file.read(static_cast<char*>(tensor.data_ptr()), bytes)) {
      throw std::runtime_error(path + ": " + name + " cannot be read; copy the file again");
    }
    tensors.emplace(name, tensor);
  }
  return tensors;
}

inline void save(const std::string& path, const Tensors& tensors) {
  std::string header = "{";
  std::vector<at::Tensor> contents;
  int64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    contents.push_back(tensor.cpu().contiguous());
    std::string dtype;
    for (const auto& [known, type] : dtypes()) {
      if (type == tensor.scalar_type()) dtype = known;
    }
    std::string shape;
    for (const int64_t size : tensor.sizes()) shape += (shape.empty() ? "" : ",") + std::to_string(size);
    const int64_t end = offset + static_cast<int64_t>(contents.back().nbytes());
    header += (header.size() > 1 ? "," : "") + ("\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[" + shape) +
              "],\"data_offsets\":[" + std::to_string(offset) + "," + std::to_string(end) + "]}";
    offset = end;
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  std::ofstream file(path, std::ios::binary);
  const uint64_t length = header.size();
  file.write(reinterpret_cast<const char*>(&length), 8);
  file.write(header.data(), static_cast<std::streamsize>(length));
  for (const auto& tensor : contents) {
    file.write(static_cast<const char*>(tensor.data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
  }
  if (!file) throw std::runtime_error(path + " must be a file that can be written; check the folder and the disk");
}

}  // namespace safetensors
