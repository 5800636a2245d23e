/* Element types of weight files into the element type of a back end.
 *
 * Exact where the target holds the value (subnormals included, whatever the host's flush-to-zero
 * mode), else rounded to nearest even.  Finding a NaN or infinity is part of the same pass, for one
 * more comparison an element.  Knows nothing of files. */
#ifndef IFKV_SRC_CONVERT_H
#define IFKV_SRC_CONVERT_H

#include "tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Convert n elements; from and to do not overlap and are aligned to their elements.  `from_dtype`
 * is F32, BF16 or F16. Returns true if all n results are finite. */
bool ifkv_convert(ifkv_dtype from_dtype, const void *from, ifkv_dtype to_dtype, void *to,
                  int64_t n);
/* True if all n elements are finite. */
bool ifkv_is_finite(ifkv_dtype dtype, const void *data, int64_t n);

float ifkv_bf16_to_f32(uint16_t value);
float ifkv_f16_to_f32(uint16_t value);
uint16_t ifkv_f32_to_bf16(float value);
uint16_t ifkv_f32_to_f16(float value);

#ifdef __cplusplus
}
#endif
#endif
