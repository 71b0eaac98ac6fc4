#include "circlet/quant/dialect.h"

#include "circlet/base/error.h"

namespace circlet {

const Dialect& DialectFromName(std::string_view name) {
  if (name == kDefault.name) return kDefault;
  if (name == kTico.name) return kTico;
  Fail("unknown dialect \"{}\"; known are {}, {}", name, kDefault.name, kTico.name);
}

}  // namespace circlet
