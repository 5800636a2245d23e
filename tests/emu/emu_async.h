/* What is in flight in a block, and who may touch the shared memory it concerns.  Read by the
 * model's own files only. */
#ifndef IFKV_EMU_ASYNC_H
#define IFKV_EMU_ASYNC_H

#include "emu_block.h"
#include "emu_tensor_box.h"

/* A bulk copy into shared memory; complete when its bytes have arrived at the mbarrier. */
struct emu_bulk_load {
    emu_tensor_box box;
    uint32_t to, barrier;              // offsets in the window
    std::vector<unsigned char> before; // the source when it was issued
    int flight;
};

/* A bulk copy out of shared memory: first read, later written. */
struct emu_bulk_store {
    emu_tensor_box box;
    uint32_t from;
    std::vector<unsigned char> before; // shared memory when it was issued
    uint32_t group;
    bool is_read, is_written; // as the kernel may know: read waited for, written
    int flight;
};

int emu_flight_begin(emu_block *block, const char *what, emu_place at);
void emu_flight_end(emu_block *block, int flight);
std::string emu_flight_text(emu_block *block, int flight);

/* Offset of `bytes` of shared memory at `address`; reports what lies outside or is not aligned. */
uint32_t emu_shared_offset(const void *address, uint32_t bytes, uint32_t alignment,
                           const char *what, emu_place at);

/* Bookkeeping of granules, all in whole granules [offset, offset + bytes). */
void emu_write_begin(emu_block *block, uint32_t offset, uint32_t bytes, int flight);
void emu_write_end(emu_block *block, uint32_t offset, uint32_t bytes, int flight);
void emu_read_begin(emu_block *block, uint32_t offset, uint32_t bytes);
void emu_read_end(emu_block *block, uint32_t offset, uint32_t bytes);
/* An instruction is about to read (write) these bytes: reports what is still being written, was
 * never written, or is still being read. */
void emu_check_read(emu_block *block, uint32_t offset, uint32_t bytes, const char *what,
                    emu_place at);
void emu_check_write(emu_block *block, uint32_t offset, uint32_t bytes, const char *what,
                     emu_place at);
/* The flight that reads the granule at `offset`, for a report; -1 if none is found. */
int emu_reader_of(emu_block *block, uint32_t offset);

/* Generic and async proxy (PTX ISA, "Proxies"): what a thread wrote is seen by bulk copies and
 * wgmma after its fence. */
void emu_proxy_barrier(emu_thread *thread);
void emu_proxy_check(emu_thread *self, uint32_t offset, uint32_t bytes, const char *what,
                     emu_place at);

/* mbarrier at `offset`: `bytes` of expected data have come. */
void emu_mbarrier_complete_tx(emu_block *block, uint32_t offset, uint32_t bytes, emu_place at);
emu_mbarrier *emu_mbarrier_at(emu_block *block, uint32_t offset, const char *what, emu_place at);

/* Complete one bulk load, chosen by the time in force; false if none is in flight. */
bool emu_complete_load(emu_block *block);

/* Checks when a thread leaves. */
void emu_copies_leave(emu_thread *self);
void emu_wgmma_leave(emu_thread *self);

/* Forget the block before; find the wgmma in flight that reads the granule at `offset`. */
void emu_wgmma_reset(emu_block *block);
bool emu_wgmma_reads(emu_block *block, uint32_t offset, int *flight);

#endif
