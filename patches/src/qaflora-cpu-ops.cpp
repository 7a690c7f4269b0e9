// shapes: numpy order, last axis contiguous

#include "qaflora-cpu-ops.h"

#include "qaflora-cpu-store.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <functional>
#include <memory>
#include <utility>

// weights [n_layer, n_slot, n_adapter] and slots of the rows
static qaflora_cpu_rows rows_of(int64_t n_row, const ggml_tensor * weights, const ggml_tensor * slot, int32_t il) {
    qaflora_cpu_rows rows;
    rows.n_row     = n_row;
    rows.slot      = slot ? (const int32_t *) slot->data : nullptr;
    rows.n_adapter = weights->ne[0];
    rows.weights   = (const float *) ((const char *) weights->data + il*weights->nb[2]);
    return rows;
}

void qaflora_op_product(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & g = *(const qaflora_cpu_module *) userdata;
    const qaflora_cpu_segments p = { g.segments.data(), (int64_t) g.segments.size(), g.n_in, 0, g.n_rank };
    g.kernels->rank_product(p, rows_of(ggml_nrows(dst), dst->src[1], dst->src[2], g.il),
                            (const float *) dst->src[0]->data, (float *) dst->data, ith, nth);
}

static void op_delta(ggml_tensor * dst, int64_t n_row, int64_t n_base, int ith, int nth, void * userdata) {
    const auto & m = *(const qaflora_cpu_module *) userdata;
    const qaflora_cpu_segments d = { m.segments.data(), (int64_t) m.segments.size(), 0, m.n_out, m.n_rank };
    m.kernels->add_delta(d, rows_of(n_row, dst->src[2], dst->src[3], m.il), (const float *) dst->src[1]->data,
                         (const float *) dst->src[0]->data, (float *) dst->data, n_base, ith, nth);
}

void qaflora_op_delta(ggml_tensor * dst, int ith, int nth, void * userdata) {
    op_delta(dst, ggml_nrows(dst), 0, ith, nth, userdata);
}

// pairs of a row and a place in its choice, row*n_used + place: those of an expert follow each other, so that it is read once
static std::vector<int32_t> pairs_by_expert(const ggml_tensor * experts, int64_t n_expert) {
    const auto expert_of = [&](int64_t row, int64_t place) {
        return *(const int32_t *) ((const char *) experts->data + row*experts->nb[1] + place*experts->nb[0]);
    };
    std::vector<int64_t> begin(n_expert + 1, 0);
    for (int64_t row = 0; row < experts->ne[1]; ++row) {
        for (int64_t place = 0; place < experts->ne[0]; ++place) {
            begin[expert_of(row, place) + 1]++;
        }
    }
    for (int64_t e = 0; e < n_expert; ++e) {
        begin[e + 1] += begin[e];
    }
    std::vector<int32_t> pairs(ggml_nelements(experts));
    for (int64_t row = 0; row < experts->ne[1]; ++row) {
        for (int64_t place = 0; place < experts->ne[0]; ++place) {
            pairs[begin[expert_of(row, place)]++] = (int32_t) (row*experts->ne[0] + place);
        }
    }
    return pairs;
}

void qaflora_op_delta_experts(ggml_tensor * dst, int ith, int nth, void * userdata) try {
    const auto & m = *(const qaflora_cpu_module *) userdata;
    const ggml_tensor * y       = dst->src[0];
    const ggml_tensor * x       = dst->src[1];
    const ggml_tensor * experts = dst->src[2];
    const int64_t n_used = experts->ne[0];
    const qaflora_cpu_rows all = rows_of(1, dst->src[3], dst->src[4], m.il);
    const auto pairs = pairs_by_expert(experts, m.n_expert);
    std::vector<float> t(m.n_rank);
    std::vector<qaflora_cpu_segment> segments(m.segments);
    const qaflora_cpu_segments both = { segments.data(), (int64_t) segments.size(), m.n_in, m.n_out, m.n_rank };
    const int64_t n_pair = (int64_t) pairs.size();
    for (int64_t i = n_pair*ith/nth; i < n_pair*(ith + 1)/nth; ++i) {
        const int64_t row    = pairs[i]/n_used;
        const int64_t place  = pairs[i] % n_used;
        const int64_t expert = *(const int32_t *) ((const char *) experts->data + row*experts->nb[1] + place*experts->nb[0]);
        for (size_t is = 0; is < segments.size(); ++is) {
            auto & s = segments[is];
            s.a = m.segments[is].a + expert*s.rank*qaflora_row_size(s.type_a, m.n_in);
            s.b = m.segments[is].b + expert*qaflora_panel_size(s.type_b, m.n_out, s.rank);
        }
        qaflora_cpu_rows rows = all;
        rows.slot = all.slot ? all.slot + row : nullptr;
        const auto * xi = (const float *) ((const char *) x->data + row*x->nb[2] + place % x->ne[1]*x->nb[1]);
        const auto * yi = (const float *) ((const char *) y->data + row*y->nb[2] + place*y->nb[1]);
        m.kernels->rank_product(both, rows, xi, t.data(), 0, 1);
        m.kernels->add_delta(both, rows, t.data(), yi, (float *) ((char *) dst->data + row*dst->nb[2] + place*dst->nb[1]), 0, 0, 1);
    }
} catch (const std::exception &) {
    qaflora_n_failed_op++;
}

// y of a differential product may have rows more: the rest of base rows that were split. Returns how many it has apart from them.
static int64_t add_rest(const qaflora_kernels & kernels, ggml_tensor * dst, const ggml_tensor * rows, int ith, int nth) {
    const ggml_tensor * src = dst->src[0];
    const int64_t n_rest = rows ? ggml_nelements(rows) : 0;
    const int64_t n_row  = dst->view_src ? ggml_nrows(dst) : ggml_nrows(src) - n_rest; // in place, src leaves out the rest
    if (rows) {
        float * y = (float *) src->data;
        kernels.add_rows(y, y + n_row*dst->ne[0], (const int32_t *) rows->data, n_rest, dst->ne[0], ith, nth);
    }
    return n_row;
}

// rows from n_row on are the base's, where x_j = x_0; threads divide n_out as in add_delta
static void copy_base(ggml_tensor * dst, int64_t n_row, int ith, int nth) {
    const int64_t n_out   = dst->ne[0];
    const int64_t n_panel = (n_out + QAFLORA_PANEL - 1)/QAFLORA_PANEL;
    const int64_t begin   = n_panel*ith/nth*QAFLORA_PANEL;
    const int64_t end     = std::min(n_out, n_panel*(ith + 1)/nth*QAFLORA_PANEL);
    float * y = (float *) dst->data;
    for (int64_t row = n_row; row < ggml_nrows(dst); ++row) {
        std::copy(y + row % dst->ne[1]*n_out + begin, y + row % dst->ne[1]*n_out + end, y + row*n_out + begin);
    }
}

void qaflora_op_delta_differential(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const int64_t n_row = add_rest(*((const qaflora_cpu_module *) userdata)->kernels, dst, dst->src[4], ith, nth);
    op_delta(dst, n_row, dst->ne[1], ith, nth, userdata);
    copy_base(dst, n_row, ith, nth);
}

void qaflora_op_base_differential(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & kernels = *(const qaflora_kernels *) userdata;
    qaflora_cpu_segments d;
    d.n_out = dst->ne[0];
    qaflora_cpu_rows rows;
    rows.n_row = add_rest(kernels, dst, dst->src[1], ith, nth);
    kernels.add_delta(d, rows, nullptr, (const float *) dst->src[0]->data, (float *) dst->data, dst->ne[1], ith, nth);
    copy_base(dst, rows.n_row, ith, nth);
}

qaflora_matrix qaflora_matrix_of(const ggml_tensor * w) {
    const auto type = w->type == GGML_TYPE_Q4_0 ? QAFLORA_MATRIX_Q4_0
                    : w->type == GGML_TYPE_Q4_1 ? QAFLORA_MATRIX_Q4_1
                    : w->type == GGML_TYPE_Q5_0 ? QAFLORA_MATRIX_Q5_0
                    : w->type == GGML_TYPE_Q4_K ? QAFLORA_MATRIX_Q4_K
                    : w->type == GGML_TYPE_Q5_K ? QAFLORA_MATRIX_Q5_K
                    : w->type == GGML_TYPE_Q6_K ? QAFLORA_MATRIX_Q6_K
                    : w->type == GGML_TYPE_Q8_0 ? QAFLORA_MATRIX_Q8_0 : QAFLORA_MATRIX_OTHER;
    return { ggml_is_contiguous(w) ? type : QAFLORA_MATRIX_OTHER, (const uint8_t *) w->data, w->ne[0] };
}

void qaflora_op_round(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const ggml_tensor * x = dst->src[0];
    ((const qaflora_kernels *) userdata)->matmul_round((const float *) x->data, ggml_nrows(x), x->ne[0], dst->data, ith, nth);
}

void qaflora_op_matmul(ggml_tensor * dst, int ith, int nth, void * userdata) try {
    const auto & kernels = *(const qaflora_kernels *) userdata;
    const qaflora_matrix m = qaflora_matrix_of(dst->src[1]);
    const int64_t n_out   = dst->ne[0];
    const int64_t n_panel = (n_out + QAFLORA_PANEL - 1)/QAFLORA_PANEL;
    const int64_t begin   = n_panel*ith/nth*QAFLORA_PANEL;
    const int64_t end     = std::min(n_out, n_panel*(ith + 1)/nth*QAFLORA_PANEL);
    const std::unique_ptr<uint8_t[]> room(new uint8_t[kernels.matmul_room_size(m.n_in)]); // 0.6 MB for 8B: not zeroed
    kernels.matmul(m, begin, end, dst->src[0]->data, dst->ne[1], (float *) dst->data + begin, n_out, room.get());
} catch (const std::exception &) {
    qaflora_n_failed_op++;
}

static qaflora_strided strided(const ggml_tensor * t) {
    return { (const uint8_t *) t->data, t->nb[3], t->nb[2], t->nb[1] };
}

void qaflora_op_attend(ggml_tensor * dst, int ith, int nth, void * userdata) try {
    const auto & how = *(const qaflora_cpu_attention *) userdata;
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const qaflora_attention a = { strided(q), strided(k), strided(v), strided(dst->src[3]), (float *) dst->data,
                                  q->ne[3], q->ne[2], k->ne[2], q->ne[1], k->ne[1], k->ne[0], v->ne[1], how.scale, k->type == GGML_TYPE_F16 };
    const std::unique_ptr<uint8_t[]> room(new uint8_t[how.kernels->attend_room_size(a)]);
    how.kernels->attend(a, room.get(), ith, nth);
} catch (const std::exception &) {
    qaflora_n_failed_op++;
}

void qaflora_op_subtract_base(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & diff = *(const qaflora_cpu_difference *) userdata;
    const ggml_tensor * src  = dst->src[0];
    const ggml_tensor * rows = dst->src[1];
    const int64_t n      = src->ne[0];
    const int64_t n_base = src->ne[1];
    const int64_t n_row  = ggml_nrows(src);
    const float * x = (const float *) src->data;
    float * d = (float *) dst->data;
    diff.kernels->subtract_base(x, d, n, n_row, n_base, ith, nth);
    for (int64_t i = 0; rows && i < ggml_nelements(rows); ++i) {
        const int32_t row = ((const int32_t *) rows->data)[i];
        // the thread that wrote the row
        if (row >= n_row*ith/nth && row < n_row*(ith + 1)/nth) {
            diff.kernels->split(diff.rounding, d + row*n, d + row*n, d + (n_row + i)*n, n);
        }
    }
}

// Of Qwen2.5-0.5B and its four trained adapters, errors of a weight on 20 queries (worst / mean, lens norm): without splitting
// 0.353 / 0.0055. With all products split: eight rows of the base 0.063 / 0.0030, and the last one of each adapter
// 0.028 / 0.0018. With the products that rounding_of() chooses: 0.028 / 0.0019.
int64_t qaflora_n_split(const qaflora_cpu_difference & how, int64_t slot, int64_t n_base) {
    return std::min<int64_t>(n_base, slot == 0 ? how.n_split : 1);
}

void qaflora_op_coarsest_rows(ggml_tensor * dst, int ith, int nth, void * userdata) try {
    const auto & diff = *(const qaflora_cpu_difference *) userdata;
    const ggml_tensor * src = dst->src[0];
    const int64_t n      = src->ne[0];
    const int64_t n_base = src->ne[1];
    const float * x = (const float *) src->data;
    std::vector<float> d(n);
    std::vector<std::pair<float, int32_t>> power(n_base);
    const int64_t n_first = qaflora_n_split(diff, 0, n_base);
    const int64_t n_other = qaflora_n_split(diff, 1, n_base);
    for (int64_t is = ith; is < src->ne[2]; is += nth) {
        for (int64_t i = 0; i < n_base; ++i) {
            const int64_t row = is*n_base + i;
            const float * xi = x + row*n;
            if (is > 0) {
                std::transform(xi, xi + n, x + i*n, d.begin(), std::minus<>());
                xi = d.data();
            }
            power[i] = { diff.kernels->rounding_power(diff.rounding, xi, n), (int32_t) row };
        }
        power.back().first = INFINITY; // the last row of a query is the one whose state is asked for
        const int64_t n_split = is == 0 ? n_first : n_other;
        std::partial_sort(power.begin(), power.begin() + n_split, power.end(), [](const auto & a, const auto & b) {
            return a.first != b.first ? a.first > b.first : a.second < b.second;
        });
        for (int64_t i = 0; i < n_split; ++i) {
            ((int32_t *) dst->data)[(is == 0 ? 0 : n_first + (is - 1)*n_other) + i] = power[i].second;
        }
    }
} catch (const std::exception &) {
    qaflora_n_failed_op++;
}
