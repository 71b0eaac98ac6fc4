#include "circle/bounds.h"

#include "circlet/base/error.h"

namespace circlet::circle {
namespace {

using flatbuffers::String;
using flatbuffers::Verifier;

// Where the walk stands; text only when it fails.
struct Place {
  const Place* parent;
  std::string_view name;
  int64_t index = -1;

  std::string Text() const {
    std::string text = parent != nullptr ? fmt::format("{}.{}", parent->Text(), name) : std::string(name);
    if (index >= 0) text += fmt::format("[{}]", index);
    return text;
  }
};

void Require(bool inside, const Place& place) {
  if (!inside) Fail("{}: reaches outside the file, or does not begin at a multiple of its size", place.Text());
}

void Walk(Verifier& verifier, const Table& table, const TableSchema& schema, const Place& place);

template <typename T>
void CheckScalar(const Verifier& verifier, const Table& table, int id, const Place& place) {
  Require(table.VerifyField<T>(verifier, Slot(id), sizeof(T)), place);
}

template <typename T>
void CheckVector(const Verifier& verifier, const Table& table, int id, const Place& place) {
  Require(table.VerifyOffset(verifier, Slot(id)) && verifier.VerifyVector(table.GetPointer<const Vector<T>*>(Slot(id))),
          place);
}

void CheckTables(Verifier& verifier, const Table& table, const FieldSchema& field, const Place& place) {
  CheckVector<Offset<Table>>(verifier, table, field.id, place);
  const auto* children = table.GetPointer<const Tables*>(Slot(field.id));
  for (uint32_t i = 0; children != nullptr && i < children->size(); ++i)
    Walk(verifier, *children->Get(i), *field.table, {place.parent, field.name, static_cast<int64_t>(i)});
}

void CheckField(Verifier& verifier, const Table& table, const FieldSchema& field, const Place& place) {
  switch (field.kind) {
    case FieldKind::kBool:
    case FieldKind::kInt8:
    case FieldKind::kUint8:
      return CheckScalar<uint8_t>(verifier, table, field.id, place);
    case FieldKind::kInt32:
    case FieldKind::kUint32:
    case FieldKind::kFloat:
      return CheckScalar<uint32_t>(verifier, table, field.id, place);
    case FieldKind::kUint64:
      return CheckScalar<uint64_t>(verifier, table, field.id, place);
    case FieldKind::kString:
      return Require(table.VerifyOffset(verifier, Slot(field.id)) &&
                         verifier.VerifyString(table.GetPointer<const String*>(Slot(field.id))),
                     place);
    case FieldKind::kBytes:
      return CheckVector<uint8_t>(verifier, table, field.id, place);
    case FieldKind::kInt32s:
    case FieldKind::kFloats:
      return CheckVector<uint32_t>(verifier, table, field.id, place);
    case FieldKind::kInt64s:
      return CheckVector<uint64_t>(verifier, table, field.id, place);
    case FieldKind::kTable:
      Require(table.VerifyOffset(verifier, Slot(field.id)), place);
      if (const auto* child = table.GetPointer<const Table*>(Slot(field.id)); child != nullptr)
        Walk(verifier, *child, *field.table, place);
      return;
    case FieldKind::kTables:
      return CheckTables(verifier, table, field, place);
    case FieldKind::kUnion:
      return Require(table.VerifyOffset(verifier, Slot(field.id)), place);
  }
}

void Walk(Verifier& verifier, const Table& table, const TableSchema& schema, const Place& place) {
  Require(table.VerifyTableStart(verifier), place);
  for (const FieldSchema& field : schema.fields) CheckField(verifier, table, field, {&place, field.name});
  verifier.EndTable();
}

}  // namespace

void CheckBounds(Verifier& verifier, const Table& table, const TableSchema& schema, std::string_view place) {
  Walk(verifier, table, schema, {nullptr, place});
}

}  // namespace circlet::circle
