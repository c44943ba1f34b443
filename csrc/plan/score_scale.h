#pragma once

// From a product of a query and a key to its score.

#include <cmath>

#include "hbsattn/params.h"

namespace hbsattn {

// tanh(scale * product), where there is a softcap. Up to kNearCap of scale * product it is the polynomial of degree 5
// of least relative error, 4e-7 (Remez), whose coefficients take the scale in: validate_problem refuses what they
// cannot hold.
struct ScoreCap {
  float scale;  // 0: there is no cap
  float near;   // |product| up to which the polynomial holds
  float linear, cubic, fifth;
};

// A score is natural * product or, with a softcap, natural * tanh(cap.scale * product).
struct ScoreScale {
  float natural, log2;  // log2: log2(e) times as much
  ScoreCap cap;
};

inline ScoreCap make_score_cap(const ForwardParams& params) {
  if (params.softcap == 0.f) return {};
  constexpr double kNearCap = 0.25;
  constexpr double kLinear = 0.9999996043, kCubic = -0.3332190823, kFifth = 0.1284161343;
  const double scale = double{params.softmax_scale} / double{params.softcap};
  return {static_cast<float>(scale), static_cast<float>(kNearCap / scale), static_cast<float>(kLinear * scale),
          static_cast<float>(kCubic * std::pow(scale, 3)), static_cast<float>(kFifth * std::pow(scale, 5))};
}

inline ScoreScale make_score_scale(const ForwardParams& params) {
  const float natural = params.softcap > 0.f ? params.softcap : params.softmax_scale;
  return {natural, static_cast<float>(natural * M_LOG2E), make_score_cap(params)};
}

}  // namespace hbsattn
