// A test framework of one macro: CHECK prints what failed and where, main returns failures().
#pragma once

#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace check {

inline int& failures() {
  static int count = 0;
  return count;
}

inline void that(bool holds, const char* expression, const char* file, int line) {
  if (holds) return;
  ++failures();
  std::cerr << file << ':' << line << ": " << expression << '\n';
}

// The message of the std::invalid_argument that `action` throws; "" if it throws none.
template <typename Action>
std::string rejection(Action action) {
  try {
    action();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

inline int result() { return failures() == 0 ? EXIT_SUCCESS : EXIT_FAILURE; }

}  // namespace check

#define CHECK(expression) check::that((expression), #expression, __FILE__, __LINE__)
