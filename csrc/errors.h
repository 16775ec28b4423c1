// Exceptions that cross into Python. bind.cpp registers the translators.
//   OsError    -> OSError(errno, message)
//   CheckError -> AssertionError
//   std::invalid_argument -> ValueError (pybind11's own rule)
#pragma once
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

namespace kvo {

class OsError : public std::runtime_error {
  public:
    OsError(int err, const std::string& what)
        : std::runtime_error(what + ": " + std::strerror(err)), err_(err) {}
    int err() const { return err_; }

  private:
    int err_;
};

class CheckError : public std::logic_error {
  public:
    using std::logic_error::logic_error;
};

}  // namespace kvo
