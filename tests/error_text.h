#pragma once

#include <gtest/gtest.h>

#include <string>

#include "circlet/base/error.h"

namespace circlet {

// The text of the Error that `body` throws; fails the test when it throws none.
template <typename Body>
std::string ErrorText(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "no Error was thrown";
  return "";
}

}  // namespace circlet
