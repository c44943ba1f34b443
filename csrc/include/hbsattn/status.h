#pragma once

#include <string>
#include <utility>

namespace hbsattn {

enum class StatusCode {
  kOk = 0,
  kInvalidValue,  // an argument's value is not accepted (ValueError in Python)
  kInvalidType,   // an argument's type is not accepted (TypeError in Python)
  kNotSupported,  // valid, but this build or this device has no kernel for it (ValueError in Python)
  kCudaError,     // the CUDA runtime or driver refused (RuntimeError in Python)
};

// The message of a failure names the argument, its value and what is accepted.
struct [[nodiscard]] Status {
  StatusCode code = StatusCode::kOk;
  std::string message;

  bool ok() const { return code == StatusCode::kOk; }

  static Status Ok() { return {}; }
  static Status InvalidValue(std::string m) { return {StatusCode::kInvalidValue, std::move(m)}; }
  static Status InvalidType(std::string m) { return {StatusCode::kInvalidType, std::move(m)}; }
  static Status NotSupported(std::string m) { return {StatusCode::kNotSupported, std::move(m)}; }
  static Status CudaError(std::string m) { return {StatusCode::kCudaError, std::move(m)}; }
};

}  // namespace hbsattn

// Returns early from a function that itself returns a Status.
#define HBSATTN_RETURN_IF_ERROR(expression)            \
  do {                                                 \
    ::hbsattn::Status hbsattn_status_ = (expression);  \
    if (!hbsattn_status_.ok()) return hbsattn_status_; \
  } while (0)
