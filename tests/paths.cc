#include "paths.h"

namespace circlet {

const char kSourceDirectory[] = CIRCLET_SOURCE_DIR;
const char kCircletBinary[] = CIRCLET_BINARY;

}  // namespace circlet
