/* A back end that has the memory of a CUDA device and no arithmetic: what tests of communicators
 * move. */
#ifndef IFKV_TESTS_EMU_DEVICE_BACKEND_H
#define IFKV_TESTS_EMU_DEVICE_BACKEND_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Local.  The caller owns *backend_p; every rank of a node has the device of its number. */
ifkv_status device_backend_open(int node_rank, ifkv_backend **backend_p);
/* Put work into the stream of a back end that changes nothing, but ends when the adversary likes.
 */
void device_backend_delay(ifkv_backend *backend);
/* How many devices there are. */
int device_backend_count(void);

#ifdef __cplusplus
}
#endif
#endif
