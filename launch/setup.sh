#!/usr/bin/env bash
# Makes this machine able to build and run ifkv (`build`, the default), also to test it (`test`), also to pack its libraries
# (`bundle`, for launch/bundle.sh).
# Installs what launch/packages.txt and launch/requirements.txt name and nothing else; a second
# call finds everything there, touches no network and returns at once.
# Exit: 0 all there, 2 usage, 69 something is missing and cannot be installed from here.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
packages_file=$root/launch/packages.txt
requirements_file=$root/launch/requirements.txt
venv=$root/.cache/venv
venv_mark=$venv/requirements.sha256

say() { printf 'setup: %s\n' "$*" >&2; }
fail() {
    printf 'setup: error: %s\n' "$1" >&2
    exit 69
}

# Print `package<TAB>stand-in<TAB>why` for each line of the named sections.
list_packages() {
    awk -v wanted=" $* " '
        /^[ \t]*(#|$)/ { next }
        /^\[/ { section = substr($1, 2, length($1) - 2); next }
        index(wanted, " " section " ") {
            why = $0
            sub(/^[^#]*#[ \t]*/, "", why)
            printf "%s\t%s\t%s\n", $1, $2, why
        }' "$packages_file"
}

stand_in_works() {
    case $1 in
        -) return 1 ;;
        python:*) command -v python3 >/dev/null 2>&1 && python3 -c "import ${1#python:}" 2>/dev/null ;;
        *) command -v "$1" >/dev/null 2>&1 ;;
    esac
}

# Fills `missing` with the lines of list_packages that neither dpkg nor a stand-in satisfies.
find_missing() {
    local installed package stand_in why
    missing=()
    # One query for all; dpkg-query fails if a name is unknown to it, which is an answer too.
    # shellcheck disable=SC2046  # package names hold no spaces
    installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' $(list_packages "$@" | cut -f 1) 2>/dev/null || true)
    while IFS=$'\t' read -r package stand_in why; do
        case $'\n'$installed$'\n' in *$'\n'"installed $package"$'\n'*) continue ;; esac
        stand_in_works "$stand_in" || missing+=("$package"$'\t'"$why")
    done < <(list_packages "$@")
}

install_missing() {
    local entry names=() as_root=() command
    for entry in "${missing[@]}"; do names+=("${entry%%$'\t'*}"); done
    command="apt-get install --no-install-recommends ${names[*]}"

    command -v apt-get >/dev/null 2>&1 || fail "no apt-get here; please provide: ${names[*]}"
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || fail "${#names[@]} packages are missing and need root; please run: sudo $command"
        # sudo drops the environment, so the front end is named behind it.
        as_root=(sudo -n)
    fi
    as_root+=(env DEBIAN_FRONTEND=noninteractive)
    # A fresh machine may be busy with its own unattended upgrade.
    local patiently=(-qq -y -o DPkg::Lock::Timeout=300)

    for entry in "${missing[@]}"; do say "installing ${entry%%$'\t'*} (${entry#*$'\t'})"; done
    if ! { "${as_root[@]}" apt-get "${patiently[@]}" update &&
        "${as_root[@]}" apt-get "${patiently[@]}" --no-install-recommends install "${names[@]}"; } >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        fail "apt-get failed (log: $log); please run: $command"
    fi
}

# The mark is written last, so an interrupted installation is done again.
make_venv() {
    local digest
    digest=$(sha256sum <"$requirements_file")
    if [ -x "$venv/bin/python" ] && [ "$(cat "$venv_mark" 2>/dev/null)" = "$digest" ]; then return; fi
    say "installing the Python packages of launch/requirements.txt into .cache/venv"
    if ! { python3 -m venv --clear "$venv" &&
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements_file"; } >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        fail "the Python packages could not be installed (log: $log)"
    fi
    printf '%s\n' "$digest" >"$venv_mark"
}

case ${1-build} in
    build) sections=(build) ;;
    test) sections=(build test) ;;
    bundle) sections=(build test bundle) ;;
    *)
        printf 'usage: %s [build|test|bundle]\n' "$0" >&2
        exit 2
        ;;
esac

mkdir -p "$root/.cache/log"
log=$root/.cache/log/setup.log
# Two callers at once (a test run beside a quick start) must not both fill the same directory.
exec 9>"$root/.cache/setup.lock"
flock 9

find_missing "${sections[@]}"
[ ${#missing[@]} = 0 ] || install_missing
make_venv
