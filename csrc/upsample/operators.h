// upsample_*'s operators, as the library registers them. Each writes into the tensors it is given last
// (apc_kernels/ops/upsample/reference.py says what).
#pragma once

#include "../common/tensor.h"

void upsample_cross_entropy(const Tensor& logits, const Tensor& target, const MaybeTensor& weight, int64_t ignore_index,
                            double label_smoothing, bool align_corners, bool per_pixel, const Tensor& normalizer,
                            const Tensor& losses, const Tensor& sums);
void upsample_cross_entropy_backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                                     const MaybeTensor& weight, int64_t ignore_index, double label_smoothing,
                                     bool align_corners, const Tensor& normalizer, const Tensor& grad_logits);
void upsample_argmax(const Tensor& logits, const std::vector<int64_t>& size, bool align_corners, const Tensor& labels);
void upsample_confusion(const Tensor& logits, const Tensor& target, int64_t ignore_index, bool align_corners,
                        const Tensor& counts, const Tensor& invalid);
void upsample_softmax(const Tensor& logits, bool flip, bool align_corners, bool add, const Tensor& out);
