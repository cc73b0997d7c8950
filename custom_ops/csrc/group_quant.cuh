// The launches of group quantization, of usual rules (see is_usual) or of any.
#pragma once

#include "activations.cuh"
#include "rows.cuh"

namespace custom_ops {

template <typename T, bool Usual>
cudaError_t launch_group_quant(const Source& source, int64_t rows, int64_t cols, const Quantized& out,
                               cudaStream_t stream) {
  return for_row_slices(rows, cols, [&](int64_t first, int64_t count) {
    ToGroups<T, Usual> to{out};
    to.skip_rows(first, cols);
    const Source slice = rows_from(source, first);
    if (source.activation == Activation::none) return launch_plain<T>(slice, to, count, cols, stream);
    return launch_activation<T>(slice, to, count, cols, stream);
  });
}

}  // namespace custom_ops
