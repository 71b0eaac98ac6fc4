#pragma once

// The main job: a checkpoint goes in, verified quantized Circle files come out (docs/architecture.md).

#include <cstdio>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "circlet/exec/executor.h"
#include "circlet/preprocess/samples.h"
#include "circlet/quant/widening.h"
#include "circlet/report/metrics.h"
#include "circlet/report/statistics.h"

namespace circlet {

struct ProgressInfo {
  std::string stage;           // that has just ended
  int number = 0, stages = 0;  // it is the number-th, from 1
  double done = 0;             // share of the run's work, 0..1
  double seconds_left = 0;     // of the run, as far as its pace so far tells
};

struct QuantizeOptions {
  std::filesystem::path model;   // Hugging Face checkpoint directory; empty: the recipe's model.name_or_path
  std::filesystem::path output;  // new directory; empty: nothing is written
  bool exports = false;          // an empty output is the recipe's export.output_dir, and an Error when it has none
  bool force = false;            // replace what an earlier run wrote there

  // Samples: exactly one of these.
  std::filesystem::path data;     // JSON lines (calib.jsonl), or "-": those of standard input
  std::filesystem::path samples;  // safetensors: calib.N.* and eval.N.*
  std::string random_samples;     // "NxLENGTH"
  int64_t random_images = 0;      // as many random samples with one picture each beside them

  // Built-in name or YAML file; empty: "default", or "as-checkpoint" where the checkpoint holds codes with grids of
  // activations.
  std::string recipe;
  std::vector<std::string> set;    // recipe assignments "a.b.c=value"
  std::string dialect = "default";
  std::filesystem::path qparams;  // frozen grids instead of calibration
  std::optional<int64_t> max_seq_len;
  LongSamples long_samples = LongSamples::kRefuse;  // what becomes of calibration samples longer than that
  bool save_stages = false;

  std::filesystem::path eval_data;      // evaluation samples, JSON lines; not beside those of `samples`
  std::filesystem::path eval_text;      // perplexity
  std::optional<int64_t> eval_windows;  // only the first N windows
  std::filesystem::path eval_captions;  // caption exact match

  enum class Units { kAuto, kDeployment, kAll } units = Units::kAuto;
  std::string widen;                     // of the residual stream: "auto", "off", or a number; empty: the recipe's
  bool text_only = false;                // leave samples with pictures out
  bool strict = false;                   // an Error where data is measured that was calibrated on; else a note
  // Of checkpoints that hold codes with grids of activations (docs/packed.md).
  bool requantize = false;               // round anew where the recipe says otherwise than the checkpoint
  bool int16_twin = false;               // int16 grids of 256 steps for each step of the checkpoint's int8 ones
  bool kv_scales = false;                // the checkpoint's int8 grids for the caches of keys and values too
  bool elsewhere_float = false;          // what the checkpoint gives no grid stays float; only without `output`
  std::string vision_profile;            // named profile or JSON file; default: the most frequent of the samples

  // Bytes that the process may take for itself, pages of mapped files apart; activations past it go to files. Below
  // what a stage needs it is an Error.
  int64_t memory_limit = 3'000'000'000;
  bool resume = false;    // go on with an unfinished run in `output`; not with `force`
  double save_every = 2;  // seconds between saved states; 0: after every stage
  // Precision of the matrix products of calibration and measurement. The verification sample is always float32, so that
  // the files are held to codes that do not depend on this.
  Compute compute = Compute::kFloat32;
  std::string command;   // how to ask for the same run again, for manifest.json; empty: it is left out there
  bool timings = false;  // measure the run's matrix products alone, for result.products

  std::FILE* progress = nullptr;  // where progress goes; null = nowhere
  // Called behind each stage, in each process. False ends the run there with an Error; what was saved stays, as behind
  // a kill, and another run may go on with `resume`.
  std::function<bool(const ProgressInfo&)> on_progress;
  // Called when the first `done` of `stages` are saved, `stage` the last of them: a run that ends from here on goes on
  // behind it.
  std::function<void(const std::string& stage, int done, int stages)> saved;
};

struct StageError {
  std::string stage;
  ErrorMetrics alone;        // float inputs into the fake-quantized stage
  ErrorMetrics accumulated;  // fake-quantized from the first stage on
  PositionSummary alone_by_position, accumulated_by_position;
};

// A linear whose weight a rounding method has made (quant/weight_rounding.h). Losses are sums over the calibration
// positions of squared errors of its outputs.
struct RoundedLinear {
  std::string name;
  int64_t rows = 0, columns = 0;
  int64_t positions = 0;     // that the moments are taken from
  int64_t dead_columns = 0;  // whose inputs are all zero
  double damping = 0;        // that was used
  double loss = 0;           // from what each row was rounded for, corrected or not
  double nearest_loss = 0;   // of rounding to the nearest
  int64_t rows_to_nearest = 0, rows_corrected = 0;
};

// A point whose grid the checkpoint gives.
struct GivenPoint {
  std::string name;
  QParams grid;
  int64_t values = 0, beyond = 0;  // of the calibration samples: all, and those beyond the grid
};

// A parameter that the checkpoint holds as codes, which the files hold as well: SHA-256 of the signed codes, a byte
// each, row by row, and of the scales as float32; empty where no file is written.
struct CodesChecksum {
  std::string parameter;
  int bits = 0;
  int64_t codes = 0;
  std::string codes_sha256, scales_sha256;
};

// A weight that had been rounded before the run rounded it: in groups (compressed-tensors) or on a Q4_0 grid.
struct SecondRounding {
  std::string parameter, form;
  double relative_error = 0;  // norm of what rounding changes, in parts of the weight's
};

struct UnitFile {
  std::string name;  // "decoder_layer_prefill_0"
  std::string file;  // "decoder_layer_prefill_0.q.circle"
  int64_t bytes = 0;
  int64_t operators = 0;
  int64_t parameters = 0;       // values of the checkpoint's parameters in it
  int64_t parameter_bytes = 0;  // what those take there, without their scales
};

// Of a text in windows. Standard errors take the tokens of a window as one cluster.
struct Perplexity {
  int64_t windows = 0;
  int64_t tokens = 0;
  double float_value = 0, float_error = 0;  // exp(mean negative log-likelihood), its standard error
  double quantized_value = 0, quantized_error = 0;
  Mean log_loss_difference;  // of the mean negative log-likelihoods, quantized - float: paired, window by window
};

// How near the fake-quantized model's predictions of the next token are to the float model's. Of a text each window is
// a cluster, of captions each answer.
struct Agreement {
  int64_t tokens = 0;
  Mean divergence;  // KL(float || quantized) over the whole vocabulary, nats a token
  Mean same_top;    // share of tokens whose most likely one is the same
};

// Pictures whose greedy answer is the caption, to the letter.
struct Captions {
  int64_t pictures = 0;
  int64_t float_exact = 0;
  int64_t quantized_exact = 0;
  Agreement agreement;  // over the tokens of the answers
};

// What bf16 products change: one calibration sample, with a picture if there is one, runs in float32 beside the bf16
// run.
struct ComputeChange {
  std::string sample;
  int64_t points = 0;            // observed in both
  double mean_range_change = 0;  // of the larger move of a range's ends, in parts of the float32 range
  double max_range_change = 0;
  std::string max_point;  // where
  ErrorMetrics logits;    // bf16 against float32, both without quantization
};

// The run's matrix products, and how long they take alone in oneDNN on the same machine.
struct ProductTimes {
  double flops = 0;
  double alone_seconds = 0;
  double run_seconds = 0;  // of all stages and files
  // Of a run that rounds with second moments, what it is held against: two float32 forward runs of the calibration
  // samples and the moments as they are defined, sum x x^T and sum (x_f - x) x^T, each as one plain product.
  double plain_flops = 0, plain_seconds = 0;
};

// Where the grids of a run with QuantizeOptions::qparams come from.
struct FrozenGrids {
  std::string file;    // its name
  std::string recipe;  // that it was made with; empty: the file does not say
};

struct QuantizeResult {
  std::string model, recipe, dialect;
  std::optional<FrozenGrids> grids;
  std::string output_directory;
  int64_t calibration_samples = 0, evaluation_samples = 0;
  bool random_data = false;
  std::vector<std::string> skipped;   // samples left out, with the reason
  std::string shortened;              // "3 of 32 samples cut to 64 tokens"
  std::string dated;                  // "chat_template.jinja:3": the prompts hold the date, written there
  std::vector<StageError> stages;     // in order of computation
  std::vector<RoundedLinear> linears;  // in order of rounding
  std::vector<GivenPoint> given;       // by name
  std::vector<std::string> unused_scales;          // of the checkpoint: "NAME: reason"
  std::vector<std::string> modules_without_scale;  // "NAME: input, output"
  std::vector<CodesChecksum> stored_codes;
  std::vector<SecondRounding> second_roundings;
  ErrorMetrics output;                // of the last stage's output
  PositionSummary output_by_position;
  bool output_on_calibration_data = false;
  std::string output_name;            // "logits"
  std::vector<int64_t> output_shape;
  std::vector<std::pair<float, float>> scatter;  // float, quantized: some of the output's values
  std::optional<Perplexity> perplexity;
  std::optional<Agreement> agreement;  // over the tokens of the perplexity text
  std::optional<Captions> captions;
  int64_t pictures = 0;         // that ran through the vision tower
  std::string vision_profile;   // layout of the exported vision units: "24x24 patches, 64 tokens from position 5"
  std::vector<UnitFile> units;
  int64_t weight_bytes = 0;  // of the checkpoint's tensors that the run reads, as stored
  int64_t points = 0;
  int64_t max_seq_len = 0;
  std::optional<Widening> widening;  // of the residual stream, when one was asked for; it may have none to widen
  std::vector<std::string> unused_tensors, unknown_keys;  // "NAME: reason"
  std::vector<std::string> notes;  // what was not used or had to be assumed, a line each
  std::optional<ComputeChange> compute_change;            // with Compute::kBf16
  // Not part of the deterministic outputs.
  std::map<std::string, double> seconds;  // by phase
  int64_t spilled_bytes = 0;              // activations that did not fit in memory
  int64_t activation_bytes = 0;           // that lived at a time at most, in memory or in files
  int64_t own_bytes = 0, memory_limit = 0;  // the process's own memory, the most that a stage left; what was allowed
  std::optional<ProductTimes> products;
  int resumed_phases = 0, phases = 0;
  bool done_already = false;  // with `resume`: the result was there, nothing else of this struct is filled
};

// Runs everything and fills options.output: the units' .q.circle files, pipeline.json, qparams.json, report.json,
// manifest.json, verify.safetensors, effective_config.yaml, timings.json and, when asked, stages.safetensors. The directory
// appears whole, under its final name, or not at all. Throws Error for anything that a user can mend; everything cheap is
// checked before anything slow starts.
QuantizeResult Quantize(const QuantizeOptions& options);

// What Quantize would do: stages with their sizes, time, memory and disk. Reads the checkpoint's headers and the data,
// computes nothing and writes nothing. Throws what Quantize throws before its first stage.
std::string DryRun(const QuantizeOptions& options);

// The report as text: summary box, scatter plot, stage table (largest median error alone on top), agreement,
// perplexity, files.
std::string ReportText(const QuantizeResult& result, int columns = 0);
// A line of it: that the run went past its memory limit. Empty: it did not.
std::string MemoryNote(const QuantizeResult& result);
// The same as JSON, "schema_version" 1 (docs/report.md).
std::string ReportJson(const QuantizeResult& result);

}  // namespace circlet
