#!/bin/sh
# Runs a compiler (nvcc, by CMake) and fails where ptxas only informs: wgmma serialised or setmaxnreg ignored
# (C7504, C7508 to C7511, C7515, C7520: all that say "serialized"), and registers spilled by a kernel of
# attention or refit.  ptxas itself exits 0 on all of them.
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
"$@" >"$log" 2>&1
status=$?
grep -vE '^ptxas info|^ *[0-9]+ bytes stack frame|^$' "$log" >&2
[ "$status" -eq 0 ] || exit "$status"
if grep -E 'C75(04|08|09|10|11|15)|serialized' "$log" >&2; then
    echo "nvcc_strict: error: ptxas gave up on wgmma or setmaxnreg" >&2
    exit 1
fi
case $* in
*attention* | *refit*)
    if grep -E ' [1-9][0-9]* bytes spill' "$log" >&2; then
        echo "nvcc_strict: error: a kernel of attention or refit spills registers" >&2
        exit 1
    fi
    ;;
esac
