/* Stacks of CUDA threads and the switch between them (x86-64, System V).
 *
 * Knows nothing of blocks.  A fiber never returns from its entry function: it leaves by a switch.
 * AddressSanitizer is told of every switch. */
#ifndef IFKV_EMU_FIBER_H
#define IFKV_EMU_FIBER_H

#include <stddef.h>

struct emu_fiber {
    void *sp = nullptr;             // where it stands, while it does not run
    unsigned char *stack = nullptr; // lowest address; nullptr: the OS thread's own stack
    size_t stack_bytes = 0;
    void *fake_stack = nullptr; // AddressSanitizer's
};

/* Map `fiber`'s stack above a guard page (aborts with a message if the system has no memory left),
 * and unmap it. */
void emu_fiber_create(emu_fiber *fiber);
void emu_fiber_destroy(emu_fiber *fiber);

/* Set the fiber up so that the first switch to it calls `entry`, whatever it ran before. */
void emu_fiber_reset(emu_fiber *fiber, void (*entry)());

/* Leave `from` standing here and go on where `to` stands; `is_last` when `from` never runs again.
 * Returns when somebody switches back. */
void emu_fiber_switch(emu_fiber *from, emu_fiber *to, bool is_last);

/* First statement of an entry function; `native` is the fiber the run was started from. */
void emu_fiber_begin(emu_fiber *native);

#endif
