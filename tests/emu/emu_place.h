/* Where in the source something happened: what a report of the model names. */
#ifndef IFKV_EMU_PLACE_H
#define IFKV_EMU_PLACE_H

struct emu_place {
    const char *file;
    int line;
};

/* As a default argument: the place of the call that leaves it out. */
constexpr emu_place emu_here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
}

#endif
