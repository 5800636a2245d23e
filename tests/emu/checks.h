/* Every instruction of ptx.cuh and every warp and block function, against tables and plain loops.
 *
 * The same kernels and claims on the model and, compiled by nvcc, on a GPU: where both are at hand
 * the GPU is the judge.  Written from the PTX ISA, sharing no line with the model.  IFKV_CHECK_SM90
 * adds what needs sm_90a. */
#ifndef IFKV_EMU_CHECKS_H
#define IFKV_EMU_CHECKS_H

#if defined(IFKV_EMU) && !defined(IFKV_CHECK_SM90)
#define IFKV_CHECK_SM90
#endif

void check_warp();
void check_matrix();
void check_copy();
#ifdef IFKV_CHECK_SM90
void check_bulk();
void check_wgmma();
#endif

#endif
