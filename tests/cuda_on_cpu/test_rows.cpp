// Runs the source of the CUDA row kernels on CPU fibers and compares with a float64 definition. "mutate" removes each synchronisation
// call in turn; some run must notice.
#include <algorithm>
#include <random>
#include <vector>

#include "buffers.h"
#include "cuda/launchers.h"
#include "harness.h"

namespace {
using namespace kd;

// Under a sanitizer one divergence of each kind of sweep, in two dtypes: synchronisation does not depend on the formula.
#ifdef KD_SOME
constexpr bool kAll = false;
template <class Logit> bool launch_some(const Rows& a, const Launch& l, int divergence, cudaStream_t stream) {
    switch (divergence) {
        case ForwardKL::id: return launch_rows_of<Logit>(ForwardKL{}, a, l, stream);
        case JSD::id: return launch_rows_of<Logit>(JSD{}, a, l, stream);
        case LogitMSE::id: return launch_rows_of<Logit>(LogitMSE{}, a, l, stream);
        default: return false;
    }
}
#else
constexpr bool kAll = true;
#endif

// The launches of a row: all stages together; forward, then the gradient (a backward pass); one by one; the normalisers first.
const std::vector<int> kPlans[] = {{kForward | kGradient}, {kForward, kGradient}, {kNormalisers, kSums, kGradient}, {kNormalisers, kSums | kGradient}};
const char* const kPlanNames[] = {"", " backward", " one by one", " normalisers first"};
constexpr int kTogether = 0, kBackward = 1;

struct Shape { int rows, vocab, clusters, cluster_size, warps, spare_slots; };

// Features of a run, drawn from its seed.
struct Features {
    bool bias = false, softcap = false, scale = false, labels = false, stats = false, weight = false, narrow = false;
    bool mixed = false, unaligned = false, certain = false;  // certain: both sides give the label a probability of almost 1
    int plan = kTogether;               // of kPlans
    bool ramp = false, sparse = false;  // ramp: logits rise or fall by hundreds along a row. sparse: most logits are -inf, and all at the start
    int broken = 0;                     // of kBroken: makes the results of the second row NaN
    float temperature = 1.f, offset = 0.f;  // offset: added to the student's logits, subtracted from the teacher's
    bool plain() const { return !bias && !softcap && !labels && !stats; }
};

const char* const kBroken[] = {"", " NaN", " teacher-NaN", " inf", " teacher-inf", " empty", " teacher-empty"};

// Results of one row by definition, in double. size, dz_size: sums of magnitudes, which rounding errors are relative to.
struct Truth {
    double loss = 0, norm_s = 0, norm_t = 0, slope_sum = 0, lse_ce = 0, columns = 0, stats[5] = {}, size = 0;
    double unit = 0;  // expected relative error of ex2, lg2, sums, and differences of float logits
    std::vector<double> dz, dz_size;
};
double lse(const std::vector<double>& z, double per_t) {
    const double top = *std::max_element(z.begin(), z.end());
    double sum = 0;
    for (double v : z) sum += std::exp((v - top) * per_t);
    return top * per_t + std::log(sum);
}
double entropy(const std::vector<double>& z, double per_t, double norm) {
    double h = 0;
    for (double v : z) if (const double l = v * per_t - norm, p = std::exp(l); p > 0) h -= p * l;
    return h;
}
template <class D> Truth truth_of(const Rows& a, const std::vector<double>& zs, const std::vector<double>& zt, int64_t row) {
    Truth r;
    const int n = a.vocab;
    const double per_t = a.inv_temperature, weight = a.weight ? a.weight[row] : 1.0;
    const bool softmax = a.normalizer == Normalizer::softmax;
    if (softmax) r.norm_s = lse(zs, per_t), r.norm_t = lse(zt, per_t);
    if (a.normalizer == Normalizer::mean) {
        int kept = 0;
        for (int v = 0; v < n; ++v) if (!(std::isinf(zs[v]) && std::isinf(zt[v]))) r.norm_s += zs[v] * per_t, r.norm_t += zt[v] * per_t, ++kept;
        r.norm_s /= std::max(kept, 1), r.norm_t /= std::max(kept, 1), r.columns = kept;
    }
    std::vector<double> slope(n), q(n), formed(n);  // formed: magnitude of the numbers that a slope is the difference of
    double value = 0, largest = 0;
    for (const auto* z : {&zs, &zt}) {
        // A softmax depends on differences from the largest logit, which are exact for logits without a transform.
        const RowSide& side = z == &zs ? a.student : a.teacher;
        const bool untouched = !side.bias && side.scale == 1 && side.softcap == 0;
        const double from = softmax && untouched ? *std::max_element(z->begin(), z->end()) : 0;
        for (double v : *z) if (std::isfinite(v)) largest = std::max(largest, std::abs(v - from) * per_t);
    }
    r.unit = 3e-6 + 0x1p-22 * largest;
    for (int v = 0; v < n; ++v) {
        const double lq = zs[v] * per_t - r.norm_s, lp = zt[v] * per_t - r.norm_t, p = std::exp(lp);
        q[v] = std::exp(lq);
        const Terms<double> t = D::template terms<double>(lq, lp, q[v], p, a.a, a.b);
        value += t.value, slope[v] = t.slope, r.slope_sum += t.slope;
        formed[v] = softmax ? q[v] : largest;
        r.size += std::abs(t.value) + (softmax ? q[v] + p : 2 * largest * (std::abs(t.slope) + largest * 1e-6));
    }
    if (D::knows_slope_sum) r.slope_sum = D::slope_sum;
    const int label = a.labels ? int(a.labels[row]) : -1;
    r.lse_ce = label >= 0 ? lse(zs, 1.0) : 0;
    const double ce = label >= 0 ? r.lse_ce - zs[label] : 0;
    r.loss = weight * (a.value_scale * value + (label >= 0 ? a.ce_weight * ce : 0));
    r.size = std::abs(weight) * (a.value_scale * r.size + std::abs(a.ce_weight) * (1 + std::abs(ce)));
    const double stats[5] = {value, label >= 0 ? ce : NAN, entropy(zs, per_t, lse(zs, per_t)), entropy(zt, per_t, lse(zt, per_t)),
                             double(std::max_element(zs.begin(), zs.end()) - zs.begin() == std::max_element(zt.begin(), zt.end()) - zt.begin())};
    std::copy_n(stats, 5, r.stats);
    r.dz.resize(n), r.dz_size.resize(n);
    for (int v = 0; v < n; ++v) {
        const double center = softmax ? q[v] * r.slope_sum : 0;
        double g = a.slope_scale * (slope[v] - center), size = a.slope_scale * (std::abs(slope[v]) + std::abs(center) + formed[v]);
        if (label >= 0) {
            const double one = std::exp(zs[v] - r.lse_ce);
            g += a.ce_weight * (one - (v == label)), size += a.ce_weight * (one + (v == label));
        }
        const double straight = a.student.scale * weight * a.dz_scale, bend = a.student.softcap != 0 ? zs[v] / a.student.softcap : 0;
        const double outer = straight * (1 - bend * bend);
        // 1 - bend^2 has the absolute error of 1.
        r.dz[v] = g * outer, r.dz_size[v] = size * std::abs(outer) + (bend != 0 ? 0.1 * std::abs(g * straight) : 0);
    }
    return r;
}

template <class Logit> bool launch_of(const Rows& a, const Launch& l, int divergence) {
#ifdef KD_SOME
    return launch_some<Logit>(a, l, divergence, nullptr);
#else
    return (std::is_same_v<Logit, float> ? launch_f32 : std::is_same_v<Logit, bf16> ? launch_bf16 : launch_f16)(a, l, divergence, nullptr);
#endif
}

// Returns the largest ratio of an error to its tolerance; above 1 is wrong.
template <class Logit, class D> double run(bool one_read, const Shape& s, Features f, unsigned seed, emu::Launch launch) {
    std::mt19937 random(seed * 31 + s.vocab + 7 * D::id);
    std::normal_distribution<float> normal;
    constexpr Dtype kLogit = kDtype<Logit>;
    const Dtype teacher_dtype = f.mixed ? (kLogit == Dtype::f32 ? Dtype::bf16 : Dtype::f32) : kLogit;
    const Dtype dz_dtype = kLogit == Dtype::f32 && f.narrow ? (seed % 2 ? Dtype::bf16 : Dtype::f16) : kLogit;
    const bool softmax = D::id != LogitMSE::id;
    if (!softmax) f.broken = 0;
    const auto stride_of = [&](Dtype d) { const int vec = 16 / size_of(d); return f.unaligned ? int64_t(s.vocab) : (s.vocab + vec - 1) / vec * int64_t(vec) + (seed % 2) * vec; };
    const int64_t student_stride = stride_of(kLogit), teacher_stride = stride_of(teacher_dtype);
    Buffer student(s.rows * student_stride * sizeof(Logit)), teacher(s.rows * teacher_stride * size_of(teacher_dtype));
    std::vector<float> state(kStateRows * s.rows, NAN), loss(s.rows, NAN), stats(5 * s.rows, NAN), weight(s.rows), bias_s(s.vocab), bias_t(s.vocab);
    std::vector<int64_t> labels(s.rows);
    for (float& b : bias_s) b = .5f * normal(random);
    for (float& b : bias_t) b = .5f * normal(random);

    Rows a{};
    a.student = {student.data, f.bias ? bias_s.data() : nullptr, student_stride, kLogit, f.scale ? seed % 2 ? -.5f : .7f : 1.f, f.softcap ? 6.f : 0.f};
    a.teacher = {teacher.data, f.bias ? bias_t.data() : nullptr, teacher_stride, teacher_dtype, f.scale ? 1.5f : 1.f, f.softcap ? 9.f : 0.f};
    a.rows = s.rows, a.vocab = s.vocab, a.state_stride = a.stats_stride = s.rows;
    a.state = state.data(), a.loss = loss.data(), a.stats = f.stats ? stats.data() : nullptr;
    a.labels = f.labels ? labels.data() : nullptr, a.weight = f.weight ? weight.data() : nullptr;
    a.dz_dtype = dz_dtype, a.dz_stride = student_stride * int64_t(sizeof(Logit)) / size_of(dz_dtype);
    a.inv_temperature = 1 / f.temperature;
    a.value_scale = .8f * f.temperature * f.temperature, a.slope_scale = .8f * f.temperature, a.ce_weight = f.labels ? .7f : 0.f;
    a.dz_scale = dz_dtype == Dtype::f16 && softmax ? 4.f : 1.f;
    a.normalizer = softmax ? Normalizer::softmax : seed % 2 ? Normalizer::mean : Normalizer::none;
    a.aligned = !f.unaligned;
    a.a = D::id == AlphaDivergence::id ? .4f : .3f, a.b = D::id == ABDivergence::id ? .7f : 1 - a.a;

    std::vector<std::vector<double>> zs(s.rows, std::vector<double>(s.vocab)), zt = zs;
    const float spread = seed % 2 ? 4.f : 1.f;
    const bool holes = s.vocab > 4 && !f.softcap && !f.scale;
    for (int r = 0; r < s.rows; ++r) {
        weight[r] = .5f + r, labels[r] = random() % s.vocab;
        for (int64_t c = 0; c < s.vocab; ++c) {
            float x = spread * normal(random), u = x + .3f * spread * normal(random);
            if (kLogit == Dtype::f32) x += f.offset;
            if (teacher_dtype == Dtype::f32) u -= f.offset;
            if (f.certain && c == labels[r]) x += 30 * f.temperature / a.student.scale, u += 30 * f.temperature / a.teacher.scale;
            if (f.ramp) x += (seed % 2 ? 300.f : -300.f) * f.temperature * float(c) / float(s.vocab), u += 250.f * f.temperature * float(c) / float(s.vocab);
            if (f.sparse && (c % 19 || c < s.vocab / 2) && c != labels[r]) x = u = -INFINITY;
            if (r == 1 && f.broken) {
                float& side = f.broken % 2 ? x : u;
                if (f.broken > 4) side = -INFINITY;
                else if (c == labels[r]) side = f.broken > 2 ? INFINITY : NAN;
            }
            if (holes && c % 97 == 5 && c != labels[r]) x = u = -INFINITY;  // a column that both sides exclude
            if (holes && !f.sparse && c % 97 == 3 && (D::id == 0 || D::id == 3)) u = -INFINITY;  // and one that only the teacher excludes
            put(student.data, r * student_stride + c, kLogit, x), put(teacher.data, r * teacher_stride + c, teacher_dtype, u);
            const auto z = [&](const RowSide& side, const void* p, int64_t at) {
                double v = (get(p, at, side.dtype) + (side.bias ? side.bias[c] : 0.f)) * side.scale;
                return side.softcap != 0 ? side.softcap * std::tanh(v / side.softcap) : v;
            };
            zs[r][c] = z(a.student, student.data, r * student_stride + c), zt[r][c] = z(a.teacher, teacher.data, r * teacher_stride + c);
        }
    }
    std::vector<Truth> truths;
    for (int r = 0; r < s.rows; ++r) truths.push_back(truth_of<D>(a, zs[r], zt[r], r));

    Launch two{false, 1, 0, 32 * s.warps, s.rows, two_read_shared_bytes(32 * s.warps)}, one = two;
    const int owners = s.cluster_size * s.warps, slots = Span(s.vocab, 0, owners, sizeof(Logit)).chunks + s.spare_slots;
    one = {true, s.cluster_size, slots, 32 * s.warps, s.clusters * s.cluster_size, one_read_shared_bytes(s.warps, slots, s.cluster_size)};
    Driver::run = [&](const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
        launch.cluster_size = config.numAttrs ? int(config.attrs->val.clusterDim.x) : 1;
        launch.clusters = int(config.gridDim.x) / launch.cluster_size, launch.threads = int(config.blockDim.x);
        launch.shared_bytes = config.dynamicSmemBytes;
        emu::launch(launch, kernel);
    };
    for (const int stages : kPlans[f.plan]) {
        a.stages = stages;
        a.dz = stages & kGradient ? student.data : nullptr;  // over the logits
        if (f.plan == kBackward && stages == kGradient) {
            // The saved numbers may be rounded differently, as by another compiler. Slopes that jump are then summed again.
            for (int r = 0; f.certain && r < s.rows; ++r) state[kExpSumS * s.rows + r] *= r % 2 ? 1 + 1e-7f : 1 - 1e-7f;
            if (D::slope_jumps) a.stages |= kSums;
            a.loss = a.stats = nullptr;
        }
        if (!launch_of<Logit>(a, one_read && (stages & kForward) == kForward ? one : two, D::id)) throw emu::Fault("not launched");
    }

    double worst = 0;
    auto judge = [&](double got, double want, double tolerance) {
        if (std::isnan(want) && std::isnan(got)) return;
        if (std::isnan(want)) worst = INFINITY;
        const double e = std::abs(got - want) / tolerance;
        worst = std::max(worst, e == e ? e : INFINITY);
    };
    for (int r = 0; r < s.rows; ++r) {
        const Truth& t = truths[r];
        if (r == 1 && f.broken) {
            judge(loss[r], NAN, 1);
            for (int c = 0; c < s.vocab; ++c) judge(get(student.data + r * student_stride * sizeof(Logit), c, dz_dtype), NAN, 1);
            continue;
        }
        judge(loss[r], t.loss, t.unit * (t.size + std::abs(t.loss)));
        const auto at = [&](StateRow i) { return double(state[i * s.rows + r]); };
        const auto judge_lse = [&](StateRow top, StateRow sum, double per_t, double want) {
            judge(at(top) * per_t + std::log(at(sum)), want, 2e-6 * (1 + std::abs(want)));
        };
        if (softmax) judge_lse(kTopS, kExpSumS, a.inv_temperature, t.norm_s), judge_lse(kTopT, kExpSumT, a.inv_temperature, t.norm_t);
        if (a.normalizer == Normalizer::mean) {
            const auto judge_mean = [&](double got, double want) { judge(got, want, t.unit * (1 + std::abs(want))); };
            judge_mean(at(kMeanS) * a.inv_temperature, t.norm_s), judge_mean(at(kMeanT) * a.inv_temperature, t.norm_t);
            judge(at(kColumns), t.columns, 1e-6);
        }
        judge(at(kValueSum), t.stats[0], 2 * t.unit * (1 + t.size + std::abs(t.stats[0])));
        if (!D::knows_slope_sum && !(D::slope_jumps && f.certain)) judge(at(kSlopeSum), t.slope_sum, t.unit * (1 + std::abs(t.slope_sum)));
        if (f.labels) judge_lse(kTopS, kExpSumOne, 1, t.lse_ce), judge(at(kTarget), zs[r][labels[r]], 1e-5 * (1 + std::abs(zs[r][labels[r]])));
        for (int i = 0; f.stats && i < 5; ++i) judge(stats[i * s.rows + r], t.stats[i], i == 4 ? 1e-6 : 2 * t.unit * (1 + t.size + std::abs(t.stats[i])));
        const auto judge_best = [&](StateRow best, const std::vector<double>& z) {
            const double top = *std::max_element(z.begin(), z.end()), column = at(best);
            judge(column >= 0 && column < s.vocab ? z[size_t(column)] : INFINITY, top, 1e-6 * (1 + std::abs(top)));
        };
        if (f.stats) judge_best(kBestS, zs[r]), judge_best(kBestT, zt[r]);
        // If both sides are certain, rounding decides the sign of q - p, and the gradient of the other tokens with it.
        const double unsure = D::slope_jumps && f.certain ? 1e-4 : 0;
        for (int c = 0; c < s.vocab; ++c)
            judge(get(student.data + r * student_stride * sizeof(Logit), c, dz_dtype), t.dz[c],
                  unit(dz_dtype) * std::abs(t.dz[c]) + t.unit * (1 + std::abs(t.slope_sum)) * t.dz_size[c] + unsure + (dz_dtype == Dtype::f16 ? 1e-7 : 1e-9));
    }
    return worst;
}

template <class Logit> double run(int divergence, bool one_read, const Shape& s, const Features& f, unsigned seed, emu::Launch launch = {}) {
    launch.seed = seed;
    double worst = 0;
    with_divergence(divergence, [&](auto d) {
        using D = decltype(d);
        if constexpr (kAll || D::id == ForwardKL::id || D::id == JSD::id || D::id == LogitMSE::id)
            worst = run<Logit, D>(one_read, s, f, seed, launch);
    });
    return worst;
}
double run(int dtype, int divergence, bool one_read, const Shape& s, const Features& f, unsigned seed, const emu::Launch& launch = {}) {
    if constexpr (!kAll) dtype %= 2;
    if constexpr (kAll)
        if (dtype == 2) return run<half>(divergence, one_read, s, f, seed, launch);
    return dtype == 0 ? run<bf16>(divergence, one_read, s, f, seed, launch) : run<float>(divergence, one_read, s, f, seed, launch);
}

Features draw(unsigned seed, int salt, bool one_read) {
    std::mt19937 random(seed * 977 + salt);
    const auto coin = [&](int of) { return random() % of == 0; };
    Features f;
    f.weight = coin(2), f.narrow = coin(2), f.temperature = coin(2) ? 1.f : coin(2) ? 2.f : .7f;
    if (coin(2)) f.bias = coin(2), f.softcap = coin(3), f.labels = coin(2), f.stats = coin(2);
    f.scale = coin(4), f.offset = coin(3) && !f.softcap ? 3000.f : 0.f;
    f.plan = one_read ? (coin(6) ? kBackward : kTogether) : int(random() % std::size(kPlans));
    if (!one_read) f.mixed = coin(3), f.unaligned = coin(3);
    f.certain = coin(2) && !f.softcap;
    if (coin(4) && !f.bias && !f.softcap && !f.scale) f.temperature = 1e-10f;  // only for logits without a transform
    if (f.unaligned) f.narrow = false;
    if (!f.softcap && !f.scale && !f.certain && f.temperature > 1e-3f) f.ramp = coin(6), f.sparse = coin(6);
    if (!f.softcap && !f.scale && coin(6)) f.broken = 1 + int(random() % 6);
    return f;
}

// Vocabularies that are odd, below a chunk, one chunk, and above; one and two clusters of up to 8 CTAs and 2 warps; rings with one or more spare
// chunks.
const Shape kShapes[] = {{3, 7, 1, 1, 1, 1}, {3, 127, 1, 2, 1, 1}, {4, 1000, 2, 2, 2, 1}, {2, 512, 1, 1, 1, 2}, {3, 1031, 1, 4, 1, 2}, {5, 2053, 2, 2, 2, 2}, {2, 4099, 1, 8, 1, 1}};

// Compares value and slope of one column in float, base 2, and the slope computed alone, with the definition in double. Returns the largest
// ratio of an error to its tolerance.
template <class D> double column_error(double log2_q, double log2_p) {
    Rows a{};
    a.a = D::id == AlphaDivergence::id ? .4f : .3f, a.b = D::id == ABDivergence::id ? .7f : 1 - a.a;
    const float float_q = float(log2_q), float_p = float(log2_p);
    const double lq = float_q * std::log(2.0), lp = float_p * std::log(2.0), q = std::exp(lq), p = std::exp(lp);
    const Terms<double> want = D::template terms<double>(lq, lp, q, p, a.a, a.b);
    const Terms<float> got = column_terms<D>(a, float_q, float_p, exp2_fast(float_q));
    const float alone = column_slope<D>(a, float_q, float_p, exp2_fast(float_q));
    // ex2 and lg2 have an error of 2^-22, logarithms one of 2^-22 times their size. Probabilities below float32's range are 0.
    const double larger = D::id == ABDivergence::id ? std::exp((a.a + a.b) * std::max(lq, lp)) : std::max(q, p);
    const double known = larger > 0 ? 1 - std::max(lq, lp) : 1;
    const double tolerance = 3e-6 * larger * known + 1e-30;
    const auto off = [](double got, double want, double by) { return std::isinf(want) ? 0 : std::abs(got - want) / by; };
    const double jump = D::slope_jumps && std::abs(q - p) < tolerance ? 2 * q : 0;  // rounding decides the sign of q - p
    double worst = 0;
    for (const double e : {off(got.value, want.value, tolerance + 4e-7 * std::abs(want.value)),
                           off(got.slope, want.slope, tolerance + 4e-7 * std::abs(want.slope) + jump),
                           off(alone, got.slope, tolerance + 4e-7 * std::abs(want.slope))})
        worst = std::max(worst, e == e ? e : INFINITY);
    return worst;
}

// The same for the value of a mixture that is nearly q or nearly p, relative to the value, which is as small as the weight or its square.
template <class D> double light_error(double log2_q, double log2_p, double weight) {
    Rows a{};
    a.a = float(weight), a.b = float(1 - weight);
    const float float_q = float(log2_q), float_p = float(log2_p);
    const double lq = float_q * std::log(2.0), lp = float_p * std::log(2.0), q = std::exp(lq), p = std::exp(lp);
    const double light = std::min(a.a, a.b), of_a = weight < .5 ? light : 1 - light;  // the floats do not sum to exactly 1
    const double want = D::template terms<double>(lq, lp, q, p, of_a, 1 - of_a).value;
    const double got = column_terms<D>(a, float_q, float_p, exp2_fast(float_q)).value;
    // The value of JSD is a difference of two terms, each about the light weight times q - p.
    const double terms = D::id == JSD::id ? light * std::abs(q - p) : 0;
    return std::abs(got - want) / (2e-6 * terms + 2e-5 * std::abs(want) + 1e-30);
}

void test_columns(Tests& tests) {
    const double logs[] = {-1e-4, -.03, -.5, -1, -1.001, -3, -9.7, -24, -60, -119, -121, -127.5, -140, -300, -5000, -INFINITY};
    for (const double weight : {.9, .99, .999, .1, .01, .001})
        for (const double log2_q : logs)
            for (const double log2_p : logs)
                tests([&] {
                    const double jsd = light_error<JSD>(log2_q, log2_p, weight);
                    return weight < .5 ? jsd : std::max({jsd, light_error<SkewKL>(log2_q, log2_p, weight), light_error<SkewReverseKL>(log2_q, log2_p, weight)});
                }, [&] { return text("column of a light mixture: log2 q %g, log2 p %g, weight %g", log2_q, log2_p, weight); });
    for (int divergence = 0; divergence < 9; ++divergence)
        for (const double log2_q : logs)
            for (const double log2_p : logs)
                tests([&] {
                    double worst = 0;
                    with_divergence(divergence, [&](auto d) { worst = column_error<decltype(d)>(log2_q, log2_p); });
                    return worst;
                }, [&] { return text("column of divergence %d: log2 q %g, log2 p %g", divergence, log2_q, log2_p); });
}

// Runs two reads with each feature alone, in rows that end within a vector, aligned and not.
void test_features(Tests& tests) {
    for (const int vocab : {263, 1031, 2048})
        for (const int feature : {0, 1, 2, 3, 4})
            for (const bool unaligned : {false, true})
                for (unsigned seed = 0; seed < 3; ++seed) {
                    Features f;
                    f.bias = feature == 1, f.softcap = feature == 2, f.scale = feature == 3, f.mixed = feature == 4;
                    f.unaligned = unaligned;
                    const int divergence = seed == 2 ? ReverseKL::id : seed == 1 ? JSD::id : ForwardKL::id;
                    tests([&] { return run(int(seed), divergence, false, {2, vocab, 1, 1, 1, 0}, f, seed); }, [&] {
                        return text("two-read vocab %d feature %d%s seed %u", vocab, feature, unaligned ? " unaligned" : "", seed);
                    });
                }
}

int test(int seeds) {
    Tests tests;
    test_columns(tests);
    test_features(tests);
    for (const Shape& s : kShapes)
        for (const bool one_read : {true, false})
            for (int divergence = 0; divergence < (one_read ? 9 : 10); ++divergence)
                for (unsigned seed = 0; seed <= unsigned(seeds); ++seed) {
                    const int dtype = int(seed + divergence) % 3;
                    const Features f = draw(seed, divergence + s.vocab, one_read);
                    tests([&] { return run(dtype, divergence, one_read, s, f, seed); }, [&] {
                        return text("%s divergence %d dtype %d rows %d vocab %d clusters %d x %d x %d warps, seed %u:%s%s%s%s%s%s%s%s%s%s%s%s%s%s T %g offset %g",
                                    one_read ? "one-read" : "two-read", divergence, dtype, s.rows, s.vocab, s.clusters, s.cluster_size, s.warps, seed,
                                    f.bias ? " bias" : "", f.softcap ? " softcap" : "", f.scale ? " scale" : "", f.labels ? " labels" : "", f.stats ? " stats" : "",
                                    f.weight ? " weight" : "", kPlanNames[f.plan], f.narrow ? " narrow" : "",
                                    f.mixed ? " mixed" : "", f.unaligned ? " unaligned" : "", f.certain ? " certain" : "",
                                    f.ramp ? " ramp" : "", f.sparse ? " sparse" : "", kBroken[f.broken], double(f.temperature), double(f.offset));
                    });
                }
    return tests.status();
}

// Mutates both kernels in turn.
int mutate(int seeds) {
    Features f;
    f.labels = f.stats = f.narrow = true, f.temperature = 2.f;
    Mutations mutations{seeds};
    for (const bool one_read : {true, false}) {
        const Shape s = one_read ? Shape{7, 5021, 1, 2, 2, 1} : Shape{3, 5021, 1, 1, 4, 0};
        mutations(one_read ? "one-read" : "two-read", [&](const emu::Launch& launch, unsigned seed) {
            return std::max(run(0, JSD::id, one_read, s, f, seed, launch), run(1, JSD::id, one_read, s, f, seed, launch));
        });
    }
    return mutations.status();
}
}  // namespace

int main(int argc, char** argv) { return run_main(argc, argv, test, 11, mutate); }
