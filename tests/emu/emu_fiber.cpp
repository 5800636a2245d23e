/* The switch is a function call that returns on another stack (System V x86-64). */
#include "emu_fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
constexpr size_t stack_bytes = 256 * 1024; // its frames are larger
#else
constexpr size_t stack_bytes = 64 * 1024;
#endif

// Saves what the calling convention lets a callee keep, and nothing else: a switch is a call.
extern "C" void emu_switch_stack(void **from_sp, void *to_sp);
asm(R"(
    .text
    .globl emu_switch_stack
    .type emu_switch_stack, @function
emu_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emu_switch_stack, .-emu_switch_stack
)");

static size_t page_bytes() {
    return static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

void emu_fiber_create(emu_fiber *fiber) {
    const size_t guard = page_bytes();
    void *base = mmap(nullptr, guard + stack_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED || mprotect(base, guard, PROT_NONE) != 0) {
        perror("emu: no memory for a thread's stack");
        abort();
    }
    fiber->stack = static_cast<unsigned char *>(base) + guard;
    fiber->stack_bytes = stack_bytes;
}

void emu_fiber_destroy(emu_fiber *fiber) {
    if (fiber->stack) munmap(fiber->stack - page_bytes(), page_bytes() + fiber->stack_bytes);
    fiber->stack = nullptr;
}

void emu_fiber_reset(emu_fiber *fiber, void (*entry)()) {
#ifdef __SANITIZE_ADDRESS__
    // an abandoned run leaves the marks of its frames behind
    __asan_unpoison_memory_region(fiber->stack, fiber->stack_bytes);
#endif
    // six saved registers, the entry as return address, and a null return address below which no
    // frame lies
    // stacks lie whole pages apart: without a shift of their own their tops would share a few sets
    // of the cache
    const size_t shift = (reinterpret_cast<uintptr_t>(fiber->stack) / stack_bytes) % 31 * 128;
    void **top = reinterpret_cast<void **>(fiber->stack + fiber->stack_bytes - shift) - 8;
    memset(top, 0, 8 * sizeof *top);
    top[6] = reinterpret_cast<void *>(entry);
    fiber->sp = top;
    fiber->fake_stack = nullptr;
}

void emu_fiber_switch(emu_fiber *from, emu_fiber *to, bool is_last) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(is_last ? nullptr : &from->fake_stack, to->stack,
                                   to->stack_bytes);
#endif
    (void)is_last;
    emu_switch_stack(&from->sp, to->sp);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

void emu_fiber_begin(emu_fiber *native) {
#ifdef __SANITIZE_ADDRESS__
    const void *bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (!native->stack) { // the first fiber of a run comes from the OS thread's stack
        native->stack = static_cast<unsigned char *>(const_cast<void *>(bottom));
        native->stack_bytes = bytes;
    }
#endif
    (void)native;
}
