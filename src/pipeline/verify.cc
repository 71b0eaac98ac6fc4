#include "circlet/pipeline/verify.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "circlet/circle/export.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/io/names.h"
#include "circlet/io/safetensors.h"
#include "circlet/ops/matmul.h"
#include "circlet/quant/affine.h"
#include "circlet/quant/dialect.h"
#include "circlet/report/terminal.h"
#include "ops/integer_product.h"
#include "pipeline/stored_codes.h"
#include "pipeline/units.h"

namespace circlet {
namespace fs = std::filesystem;
namespace {

constexpr char kNoInputs[] = "no input codes";

std::string IndexText(const Shape& shape, int64_t flat) {
  std::vector<int64_t> index(shape.Rank());
  for (int axis = shape.Rank() - 1; axis >= 0; --axis) {
    index[axis] = flat % shape[axis];
    flat /= shape[axis];
  }
  return Shape(index).ToString();
}

// How many values lie beyond the ends of a tensor's grid, which a run moves to the nearest end; a NaN has no nearest
// end.
int64_t CountOutside(const circle::Tensor& tensor, const Tensor& values, const std::string& place) {
  const std::span<const float> all = values.F32();
  const auto nan = std::ranges::find_if(all, [](float value) { return std::isnan(value); });
  if (nan != all.end())
    Fail("{}: value {} is NaN; give numbers", place, IndexText(values.GetShape(), nan - all.begin()));
  if (!tensor.qparams || tensor.qparams->PerChannel()) return 0;
  const double scale = tensor.qparams->scale[0], zero = tensor.qparams->zero_point[0];
  const CodeRange codes = CodesOf(tensor.qparams->dtype);
  // Half a step is rounding.
  const double least = (codes.min - zero - 0.5) * scale, greatest = (codes.max - zero + 0.5) * scale;
  return std::ranges::count_if(all, [&](float value) { return value < least || value > greatest; });
}

// Codes of a stored reference as float32 values of the tensor's grid; ids and floats pass. `place` stands in front of
// errors; values out of the grid are told in `outside`.
Tensor ValuesOf(const circle::Tensor& tensor, const Tensor& stored, const std::string& place,
                std::vector<std::string>& outside) {
  Tensor values = stored;
  if (tensor.qparams && stored.GetDType() != DType::kF32) {
    // Safetensors has no 4-bit types; such codes stand in bytes.
    const DType expected = tensor.type.dtype == DType::kI4   ? DType::kI8
                           : tensor.type.dtype == DType::kU4 ? DType::kU8
                                                             : tensor.type.dtype;
    if (stored.GetDType() != expected)
      Fail("{}: is {}, expected {} codes or float32 values", place, stored.Type().ToString(), Name(expected));
    circle::Tensor constant = tensor;
    constant.type = stored.Type();
    constant.data = stored;
    values = circle::DequantizedConstant(constant);
  }
  if (values.GetDType() != DType::kF32) return values;
  if (const int64_t count = CountOutside(tensor, values, place); count > 0) {
    const QParams& grid = *tensor.qparams;
    const CodeRange codes = CodesOf(grid.dtype);
    outside.push_back(fmt::format("{}: {} of {} values are out of the grid ({} to {}) and were moved to its ends",
                                  place, count, values.Elements(), (codes.min - grid.zero_point[0]) * grid.scale[0],
                                  (codes.max - grid.zero_point[0]) * grid.scale[0]));
  }
  return values;
}

// The elements of two tensors of one type, as codes where they have a grid. A float that no code stands for, such as a
// NaN, is further away than any code.
class Elements {
 public:
  Elements(const Tensor& tensor, const QParams* grid) : tensor_(tensor), grid_(grid) {}
  // Less the zero point.
  int64_t Code(int64_t i) const {
    if (tensor_.GetDType() != DType::kF32) return Integer(i);
    const double code =
        std::nearbyint(static_cast<double>(tensor_.F32()[i]) / (grid_ != nullptr ? grid_->scale[0] : 1));
    constexpr double kFar = 1e15;
    return std::isnan(code) ? static_cast<int64_t>(kFar) : static_cast<int64_t>(std::clamp(code, -kFar, kFar));
  }
  bool Equal(const Elements& other, int64_t i) const {
    if (tensor_.GetDType() == DType::kF32) return tensor_.F32()[i] == other.tensor_.F32()[i];
    return Integer(i) == other.Integer(i);
  }

 private:
  int64_t Integer(int64_t i) const {
    const DType type = tensor_.GetDType();
    if (BitWidth(type) % 8 != 0) Fail("{} values cannot be compared one by one", Name(type));
    const size_t bytes = BitWidth(type) / 8;
    int64_t value = 0;
    std::memcpy(&value, tensor_.Raw() + i * bytes, bytes);
    const int unused = 64 - 8 * static_cast<int>(bytes);
    const bool is_signed = type == DType::kI8 || type == DType::kI16 || type == DType::kI32 || type == DType::kI64;
    return is_signed ? static_cast<int64_t>(static_cast<uint64_t>(value) << unused) >> unused : value;
  }
  const Tensor& tensor_;
  const QParams* grid_;
};

void Compare(const circle::Model& model, int output, const Tensor& found, const Tensor& expected,
             UnitVerdict& verdict) {
  const circle::Tensor& tensor = model.tensors[model.outputs[output]];
  const QParams* grid = tensor.qparams ? &*tensor.qparams : nullptr;
  const int64_t zero = grid == nullptr ? 0 : grid->zero_point[0];
  const std::string place = fmt::format("{}.out.{}", verdict.unit, output);
  const Tensor reference = ValuesOf(tensor, expected, place, verdict.outside);
  if (reference.Type() != found.Type())
    Fail("{}: the stored codes are {}, {} computes {}; quantize again", place, expected.Type().ToString(), verdict.file,
         found.Type().ToString());
  const Elements a(found, grid), b(reference, grid);
  for (int64_t i = 0; i < found.Elements(); ++i) {
    ++verdict.values;
    const int64_t wanted = b.Code(i);
    verdict.largest_code = std::max<int64_t>(verdict.largest_code, std::abs(wanted));
    verdict.least = std::min(verdict.least, wanted);
    verdict.greatest = std::max(verdict.greatest, wanted);
    if (a.Equal(b, i)) continue;
    const int64_t code = a.Code(i);
    if (verdict.different++ == 0)
      verdict.first_difference = fmt::format("out.{}{}: code {}, expected {} (tensor \"{}\")", output,
                                             IndexText(found.GetShape(), i), code + zero, wanted + zero, tensor.name);
    const uint64_t step = code > wanted ? static_cast<uint64_t>(code) - static_cast<uint64_t>(wanted)
                                        : static_cast<uint64_t>(wanted) - static_cast<uint64_t>(code);
    verdict.largest_step = std::max(verdict.largest_step, static_cast<int64_t>(std::min<uint64_t>(step, INT64_MAX)));
  }
}

// The codes of a unit's ends, following the metadata for those that equal others.
class StoredCodes {
 public:
  explicit StoredCodes(const fs::path& path) : file_(SafetensorsFile::Open(path)) {}
  const Tensor* Find(const std::string& name) const {
    if (const Tensor* tensor = file_.Find(name); tensor != nullptr) return tensor;
    const auto same = file_.Metadata().find(name);
    return same == file_.Metadata().end() ? nullptr : file_.Find(same->second);
  }
  std::vector<std::string> Names() const {
    std::vector<std::string> names;
    for (const auto& [name, tensor] : file_.Tensors()) names.push_back(name);
    // Other metadata ("format": "pt") names no tensor.
    for (const auto& [name, same] : file_.Metadata())
      if (file_.Find(same) != nullptr) names.push_back(name);
    return names;
  }
  std::string Path() const { return file_.Path().string(); }

 private:
  SafetensorsFile file_;
};

// What Verify needs of manifest.json and pipeline.json. Both may come from anywhere.
struct Listing {
  std::string dialect, instruction_set;
  std::map<std::string, std::string> sha256;  // by file
  struct Checksums {
    std::string codes, scales;
  };
  std::map<std::string, Checksums> stored_codes;  // of a packed checkpoint, by parameter
  struct Unit {
    std::string name, file;
    bool whole_graph = false;
    std::vector<std::string> inputs, outputs;  // grids: "int16 scale 0.1 zero point 0"
  };
  std::vector<Unit> units;
  std::map<std::string, std::string> grids;  // the same by end, "lm_head.in.0"
  struct Boundary {
    std::string key, producer, consumer;
  };
  std::vector<Boundary> boundaries;
};

// Whether the file is listed; throws Error when it is not the listed one.
bool CheckHash(const Listing& listing, const fs::path& path) {
  const auto hash = listing.sha256.find(path.filename());
  if (hash == listing.sha256.end()) return false;
  if (hash->second != Sha256File(path))
    Fail("{}: differs from the file that {} lists (SHA-256); quantize again", path.string(), kManifestFile);
  return true;
}

std::string GridText(const JsonObject& end) {
  return fmt::format("{} scale {} zero point {}", end.Required<std::string>("dtype"), end.Raw("scale").dump(),
                     end.Raw("zero_point").dump());
}

std::string GridText(const circle::Tensor& tensor) {
  const nlohmann::json end =
      ToJson(UnitEnd{.type = tensor.type, .signature = tensor.signature, .grid = tensor.qparams});
  return GridText(JsonObject(end, tensor.name));
}

// What was given instead of an output directory of quantize.
void CheckDirectory(const fs::path& directory) {
  const std::string name = directory.string();
  std::error_code error;
  const bool exists = fs::exists(directory, error);
  if (error) Fail("{}: cannot be opened: {}; give the directory that quantize wrote", name, error.message());
  if (!exists) Fail("{}: there is no such directory; give the one that quantize wrote", name);
  if (!fs::is_directory(directory, error))
    Fail("{}: is a file; give the directory that quantize wrote (`circlet show` lists a file, `circlet run` runs one)",
         name);
  if (fs::exists(directory / kManifestFile, error)) return;
  if (directory.extension() == ".partial" || directory.parent_path().extension() == ".partial")
    Fail("{}: is an unfinished run of quantize; go on with it (--resume), then verify the result", name);
  if (fs::exists(directory / "config.json", error))
    Fail("{}: is a checkpoint; give the directory that quantize wrote", name);
  Fail("{}: is no output of quantize, it has no {}", name, kManifestFile);
}

Listing ReadListing(const fs::path& directory, std::vector<std::string>& notes) {
  Listing listing;
  CheckDirectory(directory);
  const nlohmann::json manifest_json = ReadJson(directory / kManifestFile);
  const JsonObject manifest(manifest_json, (directory / kManifestFile).string());
  listing.dialect = manifest.Required<std::string>("dialect");
  Within((directory / kManifestFile).string(), [&] { DialectFromName(listing.dialect); });
  listing.instruction_set = manifest.Required<std::string>("instruction_set");
  for (const JsonObject& output : manifest.Objects("outputs"))
    listing.sha256[output.Required<std::string>("file")] = output.Required<std::string>("sha256");

  if (const std::optional<JsonObject> stored = manifest.OptionalObject(kStoredCodes))
    for (const std::string& parameter : stored->Keys()) {
      const JsonObject sums = stored->Object(parameter);
      listing.stored_codes[parameter] = {sums.Required<std::string>("codes_sha256"),
                                         sums.Required<std::string>("scales_sha256")};
    }

  if (!CheckHash(listing, directory / kPipelineFile))
    notes.push_back(fmt::format("{} is not listed in {}: its hash was not compared", kPipelineFile, kManifestFile));
  const nlohmann::json pipeline_json = ReadJson(directory / kPipelineFile);
  const JsonObject pipeline(pipeline_json, (directory / kPipelineFile).string());
  if (const auto version = pipeline.Optional<int64_t>("schema_version", 1); version < 1 || version > kPipelineVersion)
    pipeline.FailAt("schema_version", fmt::format("{}; this circlet reads 1 to {}", version, kPipelineVersion));
  for (const JsonObject& unit : pipeline.Objects("units")) {
    Listing::Unit listed{.name = unit.Required<std::string>("name"),
                         .file = unit.Required<std::string>("file"),
                         .whole_graph = unit.Optional<std::string>("kind", "part") == kWholeGraph};
    if (fs::path(listed.file).filename() != listed.file)
      unit.FailAt("file", fmt::format("\"{}\" is no plain file name; a unit's file lies beside {}", listed.file,
                                      kPipelineFile));
    for (const auto& [side, mark, grids] :
         {std::tuple{"inputs", "in", &listed.inputs}, std::tuple{"outputs", "out", &listed.outputs}}) {
      for (const JsonObject& end : unit.Objects(side)) {
        listing.grids[fmt::format("{}.{}.{}", listed.name, mark, grids->size())] = GridText(end);
        grids->push_back(GridText(end));
      }
    }
    listing.units.push_back(std::move(listed));
  }
  if (listing.units.empty()) pipeline.FailAt("units", "lists no unit; is it the output of quantize?");
  for (const JsonObject& boundary : pipeline.Objects("boundaries"))
    listing.boundaries.push_back({boundary.Required<std::string>("key"), boundary.Required<std::string>("producer"),
                                  boundary.Required<std::string>("consumer")});
  return listing;
}

std::vector<std::string> BrokenBoundaries(const Listing& listing) {
  std::vector<std::string> broken;
  const auto grid = [&](const std::string& end) {
    const auto it = listing.grids.find(end);
    return it == listing.grids.end() ? std::string("missing") : it->second;
  };
  for (const Listing::Boundary& boundary : listing.boundaries)
    if (grid(boundary.producer) != grid(boundary.consumer) || !listing.grids.contains(boundary.producer))
      broken.push_back(fmt::format("{}: {} is {}, {} expects {}", boundary.key, boundary.producer,
                                   grid(boundary.producer), boundary.consumer, grid(boundary.consumer)));
  return broken;
}

// Boundaries are checked between the ends that pipeline.json states, so the file's ends must be those.
void CompareEnds(const Listing::Unit& unit, const circle::Model& model, std::vector<std::string>& broken) {
  for (const auto& [mark, stated, tensors] :
       {std::tuple{"in", &unit.inputs, &model.inputs}, std::tuple{"out", &unit.outputs, &model.outputs}}) {
    if (stated->size() != tensors->size())
      broken.push_back(fmt::format("{}.{}: the file has {}, {} lists {}", unit.name, mark, tensors->size(),
                                   kPipelineFile, stated->size()));
    for (size_t k = 0; k < std::min(stated->size(), tensors->size()); ++k)
      if (const std::string own = GridText(model.tensors[(*tensors)[k]]); own != (*stated)[k])
        broken.push_back(
            fmt::format("{}.{}.{}: the file has {}, {} says {}", unit.name, mark, k, own, kPipelineFile, (*stated)[k]));
  }
}

// Keys that no unit reads are misspelt ones.
void CheckKeys(const Listing& listing, const StoredCodes& codes) {
  std::vector<std::string> known;
  for (const auto& [end, grid] : listing.grids) known.push_back(end);
  for (const std::string& name : codes.Names())
    if (!listing.grids.contains(name))
      Fail("{}: \"{}\" is no end of a unit{}; keys are UNIT.in.K and UNIT.out.K of {}", codes.Path(), name,
           NearestHint(name, known), kPipelineFile);
}

// Whether the file's weights are the codes that the checkpoint held. `found`: those that are, by name.
void CompareStoredCodes(const Listing& listing, const std::string& file, const circle::Model& model,
                        std::set<std::string>& found, std::vector<std::string>& lost) {
  for (const circle::Tensor& tensor : model.tensors) {
    const auto stored = listing.stored_codes.find(tensor.name);
    if (stored == listing.stored_codes.end() || tensor.data.Empty()) continue;
    if (!tensor.qparams || !tensor.qparams->PerChannel() || BitWidth(tensor.type.dtype) > 8) {
      lost.push_back(
          fmt::format("{}: {} has it as {} without a scale a row", tensor.name, file, tensor.type.ToString()));
      continue;
    }
    const CodesChecksum sums = DescribeCodes(tensor.name, 0, tensor.data.WithGrid(&*tensor.qparams));
    const bool codes = sums.codes_sha256 == stored->second.codes, scales = sums.scales_sha256 == stored->second.scales;
    if (codes && scales) {
      found.insert(tensor.name);
    } else {
      lost.push_back(fmt::format("{}: its {} in {} are not the checkpoint's (SHA-256 in {}); quantize again",
                                 tensor.name, codes ? "scales" : "codes", file, kManifestFile));
    }
  }
}

void RunUnit(const circle::Model& model, const StoredCodes& codes, UnitVerdict& verdict) {
  std::map<std::string, Tensor> inputs;
  for (size_t k = 0; k < model.inputs.size(); ++k) {
    const std::string name = fmt::format("{}.in.{}", verdict.unit, k);
    const Tensor* stored = codes.Find(name);
    if (stored == nullptr) {
      verdict.uncompared = k == 0 ? kNoInputs : fmt::format("no codes of in.{}", k);
      return;
    }
    const circle::Tensor& tensor = model.tensors[model.inputs[k]];
    inputs[tensor.name] = ValuesOf(tensor, *stored, name, verdict.outside);
  }
  const std::map<std::string, Tensor> outputs = Within(verdict.file, [&] { return circle::RunModel(model, inputs); });
  for (size_t k = 0; k < model.outputs.size(); ++k) {
    const Tensor* stored = codes.Find(fmt::format("{}.out.{}", verdict.unit, k));
    if (stored == nullptr)
      verdict.uncompared = fmt::format("no codes of out.{}", k);
    else
      Compare(model, static_cast<int>(k), outputs.at(model.tensors[model.outputs[k]].name), *stored, verdict);
  }
}

// Largest steps, in shares of a unit's largest code, on another instruction set than the files were made with. Float
// sums differ in their last bits there; a value that then falls on the other side of a tie is one code off, and that
// moves what follows. Measured (docs/verification.md): 0.03 % in a layer and 0.24 % in a whole graph with 16-bit ends,
// 3 % with 8-bit ends. A product that lacks a part of its terms is off by more than the bounds.
constexpr double kOtherSetShare = 0.01, kOtherSetShareOfBytes = 0.08;

bool NearOnAnotherSet(const UnitVerdict& unit) {
  const double share = unit.largest_code <= 255 ? kOtherSetShareOfBytes : kOtherSetShare;
  return unit.largest_step <= std::max(1.0, share * static_cast<double>(unit.largest_code));
}

// Whether a linear of the file is no sum of integers, and so depends on oneDNN's kernels.
bool HasFloatProducts(const circle::Model& model) {
  return std::ranges::any_of(model.operators, [&](const circle::Operator& op) {
    if (op.code != FullyConnected::kCircleCode || op.inputs.size() < 2 || op.inputs[0] < 0 || op.inputs[1] < 0)
      return false;
    const circle::Tensor &x = model.tensors[op.inputs[0]], &w = model.tensors[op.inputs[1]];
    if (!x.qparams || !w.qparams) return true;
    return !SummedInIntegers(&*x.qparams, &*w.qparams, w.type.shape[-1]);
  });
}

VerifyResult::Verdict VerdictOf(const VerifyResult& result) {
  using Verdict = VerifyResult::Verdict;
  const auto any = [&](const auto& test) { return std::ranges::any_of(result.units, test); };
  if (any([](const UnitVerdict& unit) { return !unit.fault.empty(); })) return Verdict::kDamaged;
  if (!result.lost_codes.empty()) return Verdict::kDamaged;
  const bool exact_files = DialectFromName(result.dialect).exact_files;
  if (exact_files && !result.broken_boundaries.empty()) return Verdict::kDifferent;
  const bool same_set = result.made_with == result.this_set;
  const bool same_own = SameOwnSums(result.made_with, result.this_set);
  if (any([&](const UnitVerdict& unit) {
        if (!exact_files) return unit.judged && !unit.Within();
        const bool exact = same_set || (same_own && !unit.float_products);
        return exact ? unit.different > 0 : !NearOnAnotherSet(unit);
      }))
    return Verdict::kDifferent;
  if (!any([](const UnitVerdict& unit) { return unit.values > 0 && unit.judged; })) return Verdict::kNothingCompared;
  return any([](const UnitVerdict& unit) { return unit.different > 0; }) ? Verdict::kWithinBounds : Verdict::kExact;
}

const char* Name(VerifyResult::Verdict verdict) {
  switch (verdict) {
    case VerifyResult::Verdict::kExact:
      return "exact";
    case VerifyResult::Verdict::kWithinBounds:
      return "within bounds";
    case VerifyResult::Verdict::kDifferent:
      return "different";
    case VerifyResult::Verdict::kDamaged:
      return "damaged";
    case VerifyResult::Verdict::kNothingCompared:
      return "nothing compared";
  }
  return "";
}

const char* Sentence(VerifyResult::Verdict verdict, bool all, bool exact_files) {
  switch (verdict) {
    case VerifyResult::Verdict::kExact:
      return all ? "every file computes what was simulated, to the last code"
                 : "every compared file computes what was simulated, to the last code";
    case VerifyResult::Verdict::kWithinBounds:
      return exact_files ? "the files compute what was simulated, but for rounding"
                         : "the files differ from the simulation within the reference's bounds";
    case VerifyResult::Verdict::kDifferent:
      return "the files do not compute what was simulated";
    case VerifyResult::Verdict::kDamaged:
      return "files are missing or damaged; quantize again";
    case VerifyResult::Verdict::kNothingCompared:
      return "nothing was compared, so nothing is known; give codes whose keys are UNIT.in.K and UNIT.out.K";
  }
  return "";
}

}  // namespace

bool UnitVerdict::Within() const {
  // The reference differs from its own files by ties. Measured: mostly fewer than a fifth of a unit's codes; where
  // more, flips that add up over the operators of a layer, by 2 % of what the codes span at 16 bits and by 7 % at 8.
  constexpr double kShare = 0.2, kSpan = 0.1;
  return static_cast<double>(different) <= kShare * static_cast<double>(values) ||
         static_cast<double>(largest_step) <= kSpan * static_cast<double>(greatest - least);
}

VerifyResult Verify(const VerifyOptions& options) {
  VerifyResult result;
  const Listing listing = ReadListing(options.directory, result.notes);
  const bool own_codes = options.codes.empty();
  const fs::path codes_path = own_codes ? options.directory / kCodesFile : options.codes;
  if (own_codes && !CheckHash(listing, codes_path))
    result.notes.push_back(fmt::format("{} is not listed in {}: its hash was not compared", kCodesFile, kManifestFile));
  const StoredCodes codes(codes_path);
  CheckKeys(listing, codes);
  result.dialect = listing.dialect;
  const bool exact_files = DialectFromName(listing.dialect).exact_files;
  result.broken_boundaries = BrokenBoundaries(listing);
  result.made_with = listing.instruction_set;
  result.this_set = InstructionSets();

  std::set<std::string> stored;
  Progress progress(options.progress);
  progress.Begin("verify", static_cast<int64_t>(listing.units.size()));
  for (const Listing::Unit& unit : listing.units) {
    UnitVerdict verdict{.unit = unit.name, .file = unit.file};
    // Where files are not exact, flips add up over a whole model or vision tower.
    verdict.judged = exact_files || !unit.whole_graph;
    try {
      const fs::path path = options.directory / verdict.file;
      if (!CheckHash(listing, path))
        result.notes.push_back(
            fmt::format("{} is not listed in {}: its hash was not compared", unit.file, kManifestFile));
      const circle::Model model = circle::Read(path);
      verdict.operators = static_cast<int64_t>(model.operators.size());
      verdict.float_products = HasFloatProducts(model);
      CompareEnds(unit, model, result.broken_boundaries);
      CompareStoredCodes(listing, unit.file, model, stored, result.lost_codes);
      RunUnit(model, codes, verdict);
    } catch (const Error& error) {
      verdict.fault = error.what();
    }
    result.units.push_back(std::move(verdict));
    progress.Advance();
  }
  for (const auto& entry : listing.stored_codes) {
    const std::string& parameter = entry.first;
    const bool judged = std::ranges::any_of(result.lost_codes,
                                            [&](const std::string& lost) { return lost.starts_with(parameter + ":"); });
    if (!stored.contains(parameter) && !judged)
      result.lost_codes.push_back(fmt::format("{}: no file holds its codes; quantize again", parameter));
  }
  result.stored_codes = static_cast<int64_t>(stored.size());
  result.verdict = VerdictOf(result);
  result.exact = std::ranges::any_of(result.units, [](const UnitVerdict& unit) { return unit.values > 0; }) &&
                 std::ranges::all_of(result.units,
                                     [](const UnitVerdict& unit) { return unit.different == 0 && unit.fault.empty(); });
  result.within_bounds =
      result.verdict == VerifyResult::Verdict::kExact || result.verdict == VerifyResult::Verdict::kWithinBounds;
  return result;
}

std::string VerifyText(const VerifyResult& result, int columns) {
  TextTable table({"unit", "operators", "codes", "different", "largest step"});
  std::string notes;
  std::vector<std::string> uncompared, unjudged;
  int64_t compared = 0;
  for (const UnitVerdict& unit : result.units) {
    table.Row({unit.unit, fmt::to_string(unit.operators), fmt::to_string(unit.values), fmt::to_string(unit.different),
               fmt::to_string(unit.largest_step)});
    compared += unit.values > 0;
    if (!unit.fault.empty()) notes += unit.fault + "\n";
    if (!unit.first_difference.empty()) notes += fmt::format("{}: {}\n", unit.unit, unit.first_difference);
    for (const std::string& outside : unit.outside) notes += outside + "\n";
    if (!unit.uncompared.empty())
      uncompared.push_back(unit.uncompared == kNoInputs ? unit.unit
                                                        : fmt::format("{} ({})", unit.unit, unit.uncompared));
    if (!unit.judged && unit.different > 0) unjudged.push_back(unit.unit);
  }
  for (const std::string& boundary : result.broken_boundaries) notes += fmt::format("boundary {}\n", boundary);
  for (const std::string& lost : result.lost_codes) notes += lost + "\n";
  if (result.stored_codes > 0)
    notes += fmt::format("{} weights have the checkpoint's codes and scales (SHA-256)\n", result.stored_codes);
  for (const std::string& note : result.notes) notes += note + "\n";
  if (!result.exact && result.made_with != result.this_set)
    notes += fmt::format(
        "made with {}, this is {}: codes may differ by the rounding of sums, by up to {:.0f} % of a unit's largest "
        "code "
        "({:.0f} % at 8 bits)\n",
        result.made_with, result.this_set, 100 * kOtherSetShare, 100 * kOtherSetShareOfBytes);
  if (!unjudged.empty())
    notes += fmt::format("not judged, whole graphs of the {} dialect: {}\n", result.dialect, fmt::join(unjudged, ", "));
  if (!uncompared.empty()) notes += fmt::format("not compared, {}: {}\n", kNoInputs, fmt::join(uncompared, ", "));
  const auto files = static_cast<int64_t>(result.units.size());
  return table.ToString(columns) + notes +
         fmt::format("{} files{}: {}\n", files, compared == files ? "" : fmt::format(", {} compared", compared),
                     Sentence(result.verdict, compared == files, DialectFromName(result.dialect).exact_files));
}

std::string VerifyJson(const VerifyResult& result) {
  nlohmann::json units = nlohmann::json::array();
  for (const UnitVerdict& unit : result.units)
    units.push_back({{"unit", unit.unit},
                     {"file", unit.file},
                     {"fault", unit.fault},
                     {"operators", unit.operators},
                     {"values", unit.values},
                     {"uncompared", unit.uncompared},
                     {"different", unit.different},
                     {"largest_step", unit.largest_step},
                     {"judged", unit.judged},
                     {"first_difference", unit.first_difference},
                     {"outside", unit.outside}});
  return DumpJson({{"schema_version", 1},
                   {"verdict", Name(result.verdict)},
                   {"dialect", result.dialect},
                   {"units", units},
                   {"broken_boundaries", result.broken_boundaries},
                   {"stored_codes", result.stored_codes},
                   {"lost_codes", result.lost_codes},
                   {"notes", result.notes}});
}

namespace {

// The stored tensors of a file's inputs, in their order.
std::vector<const Tensor*> InputsOf(const circle::Model& model, const RunOptions& options, const StoredCodes& stored) {
  const std::string prefix = options.unit.empty() ? "" : options.unit + ".";
  std::vector<const Tensor*> inputs;
  std::vector<std::string> known;
  std::set<std::string> used;
  for (size_t k = 0; k < model.inputs.size(); ++k) {
    const circle::Tensor& tensor = model.tensors[model.inputs[k]];
    const std::string numbered = fmt::format("{}in.{}", prefix, k);
    const std::string& name = options.unit.empty() && stored.Find(tensor.name) != nullptr ? tensor.name : numbered;
    inputs.push_back(stored.Find(name));
    used.insert(name);
    known.push_back(numbered);
    if (options.unit.empty()) known.push_back(tensor.name);
    if (inputs.back() != nullptr) continue;
    const std::string file = options.file.filename().string(), unit = file.substr(0, file.find(kUnitSuffix));
    const bool has_unit = stored.Find(fmt::format("{}.in.{}", unit, k)) != nullptr;
    Fail("{}: input {} \"{}\" ({}) is missing in {}: give \"{}\"{}{}", options.file.string(), k, tensor.name,
         tensor.type.ToString(), stored.Path(), options.unit.empty() ? tensor.name : numbered,
         options.unit.empty() ? fmt::format(" or \"in.{}\"", k) : "",
         has_unit ? fmt::format(", or take those of the unit with --unit {}", unit) : "");
  }
  for (const std::string& name : stored.Names()) {
    // Of a file for many units only those of this one are looked at, and its outputs are not needed.
    if (!name.starts_with(prefix) || used.contains(name)) continue;
    if (!options.unit.empty() && name.starts_with(prefix + "out.")) continue;
    if (!options.unit.empty() && !name.starts_with(prefix + "in.")) continue;
    Fail("{}: \"{}\" is no input of {}{}; take it out", stored.Path(), name, options.file.string(),
         NearestHint(name, known));
  }
  return inputs;
}

}  // namespace

RunResult RunFile(const RunOptions& options) {
  const circle::Model model = circle::Read(options.file);
  const StoredCodes stored(options.inputs);
  const std::vector<const Tensor*> given = InputsOf(model, options, stored);
  RunResult result;
  std::map<std::string, Tensor> bound;
  for (size_t k = 0; k < model.inputs.size(); ++k) {
    const circle::Tensor& tensor = model.tensors[model.inputs[k]];
    bound[tensor.name] = ValuesOf(
        tensor, *given[k], fmt::format("{}: input {} \"{}\"", options.inputs.string(), k, tensor.name), result.outside);
  }
  const std::map<std::string, Tensor> outputs =
      Within(options.file.string(), [&] { return circle::RunModel(model, bound); });
  for (size_t k = 0; k < model.outputs.size(); ++k) {
    const circle::Tensor& tensor = model.tensors[model.outputs[k]];
    Tensor& output = result.outputs[fmt::format("out.{}", k)];
    output = outputs.at(tensor.name);
    if (options.codes && tensor.qparams && !tensor.qparams->PerChannel())
      output = QuantizeWeight(output, *tensor.qparams, Rounding::kHalfAwayDivide).codes;
  }
  return result;
}

}  // namespace circlet
