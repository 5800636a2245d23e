/* What every C test includes first: cmocka behind the headers it needs, and assertions that print
 * both sides.
 */
#ifndef IFKV_TESTS_TEST_H
#define IFKV_TESTS_TEST_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "ifkv.h"

/* A call that must succeed; prints the library's error where it does not. */
#define assert_ok(call)                                                                            \
    do {                                                                                           \
        ifkv_status status_ = (call);                                                              \
        if (status_ != IFKV_OK)                                                                    \
            fail_msg("%s: %s [E%04d]", #call, ifkv_last_error()->text, ifkv_last_error()->code);   \
    } while (0)

/* A call that must fail with this status, this cause number and a message that contains `part`. */
#define assert_fails(call, want_status, want_code, part)                                           \
    do {                                                                                           \
        ifkv_status status_ = (call);                                                              \
        const ifkv_error *error_ = ifkv_last_error();                                              \
        if (status_ != (want_status) || error_->code != (want_code) ||                             \
            !strstr(error_->text, (part)))                                                         \
            fail_msg("%s: got status %d E%04d '%s', want status %d E%04d with '%s'", #call,        \
                     (int)status_, status_ ? error_->code : 0, status_ ? error_->text : "",        \
                     (int)(want_status), (want_code), (part));                                     \
    } while (0)

#endif
