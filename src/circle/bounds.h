#pragma once

// FlatBuffers' bounds checks, driven by the schema tables instead of generated code.

#include <flatbuffers/flatbuffers.h>

#include <string>
#include <string_view>

#include "circle/schema.h"

namespace circlet::circle {

using flatbuffers::Offset;
using flatbuffers::Table;
using flatbuffers::Vector;
using Tables = Vector<Offset<Table>>;

inline flatbuffers::voffset_t Slot(int id) { return static_cast<flatbuffers::voffset_t>(4 + 2 * id); }

// Checks that a table and all its fields of the schema lie inside the buffer, vectors and child tables included; after
// that every accessor of them is safe. Throws Error "PLACE.tensors[3].shape: reaches outside the file". Unions are not
// entered: what they hold depends on the operator.
void CheckBounds(flatbuffers::Verifier& verifier, const Table& table, const TableSchema& schema,
                 std::string_view place);

}  // namespace circlet::circle
