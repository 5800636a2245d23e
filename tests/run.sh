#!/usr/bin/env bash
# Runs every test from a fresh clone: installs what is missing, builds with warnings as errors, runs CTest, then the C tests of one
# process again under AddressSanitizer and UndefinedBehaviorSanitizer.  Prints the counts last.
#   tests/run.sh [--quick]     --quick leaves the sanitizer build out
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
is_quick=0
case ${1-} in
    '') ;;
    --quick) is_quick=1 ;;
    *)
        printf 'usage: tests/run.sh [--quick]\n' >&2
        exit 2
        ;;
esac

"$root/launch/setup.sh" test
# shellcheck source=/dev/null  # checked on its own
. "$root/launch/env.sh"
mkdir -p .cache/log

# build DIR OPTION...: configure and build, the log shown only where it fails.
build() {
    local dir=$1 log
    shift
    log=.cache/log/$(basename "$dir").log
    printf 'tests: building %s\n' "$dir"
    if ! { cmake -S . -B "$dir" -DIFKV_TESTS=ON -DIFKV_WERROR=ON "$@" && cmake --build "$dir" -j "$(nproc)"; } >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        printf 'tests: error: the build failed (log: %s)\n' "$log" >&2
        exit 1
    fi
}

status=0
jobs=3 # on two cores: some programs wait most of their time
build build-test -DCMAKE_BUILD_TYPE=Release
ctest --test-dir build-test --output-on-failure --no-tests=error -j "$jobs" || status=1
if [ "$is_quick" = 0 ]; then
    # the emulated device at random times only, and attention kernel by kernel only: it takes ten times as long here
    build build-sanitize -DCMAKE_BUILD_TYPE=RelWithDebInfo -DIFKV_SANITIZE=ON -DIFKV_WITH_CUDA=OFF
    ctest --test-dir build-sanitize --output-on-failure --no-tests=error -j "$jobs" -R '^test_' -E '_(early|late)$|^test_attention_cuda(_both)?_random$' || status=1
fi
exit $status
