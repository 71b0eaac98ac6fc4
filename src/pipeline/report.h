#pragma once

// Figures of a report that more than one report has.

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "circlet/pipeline/quantize.h"

namespace circlet {

// A number that JSON may lack: null for NaN and infinities.
nlohmann::json Number(double value);
nlohmann::json ToJson(const Agreement& agreement);

// "34.02 ± 0.53": a mean with its standard error, where there is one.
std::string WithError(const std::string& mean, double error);
// "KL(float || quantized) 0.0123 ± 0.0004 nats a token, same top-1 at 91.20 % of 765 tokens"
std::string AgreementText(const Agreement& agreement, const std::string& reference, const std::string& other);

}  // namespace circlet
