// Reads and writes safetensors files: eight bytes with the header's length, a JSON header, then the tensors' bytes.
//
// https://github.com/huggingface/safetensors describes the format. Every size is checked against the file before
// anything is read, so a truncated file is an error and never a wrong tensor.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstring>
#include <filesystem>
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
      if (entries.count(name) > 0) fail(name + " is there twice");
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
    skip_spaces();
    if (at_ != text_.size()) fail("more follows it");
    return entries;
  }

 private:
  [[noreturn]] void fail(const std::string& why) const {
    throw std::runtime_error(path_ + " must be a safetensors file, got a header that is none: " + why);
  }

  void skip_spaces() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  }

  char next() {
    skip_spaces();
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
        value += escaped();
      } else {
        value += text_[at_++];
      }
    }
    expect('"');
    return value;
  }

  // Metadata is free text, so that every escape of JSON may occur in it.
  std::string escaped() {
    static const std::string letters = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
    if (at_ >= text_.size()) fail("it ends early");
    const char letter = text_[at_++];
    if (letter == 'u') return utf8(code_point());
    const size_t which = letters.find(letter);
    if (which == std::string::npos) fail("an unknown escape");
    return std::string(1, meanings[which]);
  }

  uint32_t code_point() {
    const uint32_t high = code_unit();
    if (high < 0xD800 || high > 0xDFFF) return high;
    if (high > 0xDBFF || text_.compare(at_, 2, "\\u") != 0) fail("half of a surrogate pair");
    at_ += 2;
    const uint32_t low = code_unit();
    if (low < 0xDC00 || low > 0xDFFF) fail("half of a surrogate pair");
    return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
  }

  uint32_t code_unit() {
    uint32_t unit = 0;
    for (int digit = 0; digit < 4; ++digit, ++at_) {
      if (at_ >= text_.size() || !std::isxdigit(static_cast<unsigned char>(text_[at_]))) fail("an unknown escape");
      unit = 16 * unit + static_cast<uint32_t>(std::stoi(text_.substr(at_, 1), nullptr, 16));
    }
    return unit;
  }

  static std::string utf8(uint32_t point) {
    const auto byte = [&](uint32_t mark, int shift, uint32_t mask) {
      return static_cast<char>(mark | ((point >> shift) & mask));
    };
    if (point < 0x80) return {byte(0, 0, 0x7F)};
    if (point < 0x800) return {byte(0xC0, 6, 0x1F), byte(0x80, 0, 0x3F)};
    if (point < 0x10000) return {byte(0xE0, 12, 0x0F), byte(0x80, 6, 0x3F), byte(0x80, 0, 0x3F)};
    return {byte(0xF0, 18, 0x07), byte(0x80, 12, 0x3F), byte(0x80, 6, 0x3F), byte(0x80, 0, 0x3F)};
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

// Returns the number of bytes of a tensor of this shape, or -1 if no file could be that large.
inline int64_t num_bytes(const std::vector<int64_t>& shape, int64_t item) {
  int64_t bytes = item;
  for (const int64_t size : shape) {
    if (bytes > INT64_MAX / std::max<int64_t>(size, 1)) return -1;
    bytes *= std::max<int64_t>(size, 1);  // torch computes strides like this, and refuses overflows
  }
  return std::count(shape.begin(), shape.end(), 0) > 0 ? 0 : bytes;
}

inline Tensors load(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file || !std::filesystem::is_regular_file(path)) {
    throw std::runtime_error(path + " must be a file that can be read, got none; check the path");
  }
  const int64_t size = file.tellg();
  file.seekg(0);
  uint64_t length = 0;  // little-endian, like every machine that torch runs on
  if (size < 8 || !file.read(reinterpret_cast<char*>(&length), 8) || length > static_cast<uint64_t>(size - 8)) {
    throw std::runtime_error(path + " must be a safetensors file, got " + std::to_string(size) +
                             " bytes, fewer than its header says; copy it again");
  }
  std::string header(length, '\0');
  if (!file.read(header.data(), static_cast<std::streamsize>(length))) {
    throw std::runtime_error(path + " must be a file that can be read, got an error in its header; copy it again");
  }
  const int64_t start = 8 + static_cast<int64_t>(length);
  Tensors tensors;
  for (const auto& [name, entry] : HeaderParser(header, path).parse()) {
    const auto dtype = dtypes().find(entry.dtype);
    if (dtype == dtypes().end()) {
      throw std::runtime_error(path + ": " + name + " must be of F64, F32, F16, BF16, I64 or I32, got " +
                               (entry.dtype.empty() ? "none" : entry.dtype) + "; convert it");
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
  file.close();  // buffered data is written here, and fails if the disk is full
  if (!file) throw std::runtime_error(path + " must be a file that can be written; check the folder and the disk");
}

}  // namespace safetensors
