/* What the model does when a kernel breaks a rule.
 *
 * A report is one text: what is wrong, kernel, block and thread, and the places in the source.  By
 * default it goes to stderr and the process aborts.  With a handler the handler gets the text, the
 * grid is abandoned where it stands (its threads never resume), and the program goes on. */
#ifndef IFKV_EMU_REPORT_H
#define IFKV_EMU_REPORT_H

/* nullptr restores the default.  Reports of blocks on different OS threads come one at a time. */
void emu_on_report(void (*handler)(const char *text));

/* Choose the time as IFKV_EMU_TIME does ("early", "late", "random:SEED") for launches from now on;
 * false if `text` is none of these. */
bool emu_set_time(const char *text);

/* The name of the time in force, for test output. */
const char *emu_time_name();

#endif
