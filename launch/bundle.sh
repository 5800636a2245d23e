#!/usr/bin/env bash
# Packs the libraries that ifkv is built against into one relocatable file, for machines where they cannot be installed:
# headers and shared libraries of OpenBLAS, HDF5 (serial), jansson, xxHash, CMocka and Open MPI, what these need in turn,
# and pkg-config.  Not in it: compiler, CMake, the C library, CUDA, NCCL.
#   launch/bundle.sh [FILE]      FILE: default .cache/ifkv-bundle.tar.gz
# There: tar xzf FILE && cmake -C ifkv-bundle/ifkv.cmake -S . -B build, and ifkv-bundle/bin/mpirun for several ranks on one
# machine.  Programs so built find the libraries where the folder lay.  ifkv-bundle/README says which C library it needs.
# Runs on Debian 12, x86-64, and calls launch/setup.sh bundle first.  Exit: 0 done, 2 usage, 69 something is missing here.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
file=${1:-$root/.cache/ifkv-bundle.tar.gz}
if [ $# -gt 1 ] || [ "${file#-}" != "$file" ]; then
    printf 'usage: launch/bundle.sh [FILE]\n' >&2
    exit 2
fi
fail() {
    printf 'bundle: error: %s\n' "$1" >&2
    exit 69
}
[ "$(dpkg --print-architecture 2>/dev/null)" = amd64 ] || fail 'this is no x86-64 machine with Debian packages'
"$root/launch/setup.sh" bundle
dpkg -s openmpi-bin >/dev/null 2>&1 || fail "mpirun is here without package openmpi-bin, whose orterun fits the packed library"

system=/usr/lib/x86_64-linux-gnu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bundle=$work/ifkv-bundle
mkdir -p "$bundle"/{bin,libexec,lib/pkgconfig,include,share,licences}

# needs FILE...: paths of the shared libraries they need, but for those of the C library and the compiler
needs() {
    ldd "$@" | awk '/=> \//{print $3}' | sort -u |
        grep -vE '/(ld-linux-x86-64|lib(c|m|dl|rt|pthread|resolv|util|gcc_s|stdc\+\+|gomp))\.so'
}
add_library() {
    cp -L "$1" "$bundle/lib/$(basename "$1")"
    packed+=("*/$(basename "$(readlink -f "$1")")") # listed under /lib or /usr/lib
}
packed=()

# library NAME SONAME MODULE HEADERS...: with its headers, below include/MODULE, and what finds both
library() {
    local name=$1 soname=$2 module=$3
    shift 3
    add_library "$soname"
    ln -s "$(basename "$soname")" "$bundle/lib/lib$name.so"
    mkdir -p "$bundle/include/$module"
    cp -RL "$@" "$bundle/include/$module/"
    # shellcheck disable=SC2016  # the variables are pkg-config's
    printf 'prefix=${pcfiledir}/../..\nName: %s\nDescription: from Debian 12\nVersion: %s\nLibs: -L${prefix}/lib -l%s\nCflags: -I${prefix}/include/%s\n' \
        "$name" "$(pkg-config --modversion "$module")" "$name" "$module" >"$bundle/lib/pkgconfig/$module.pc"
}
library openblas $system/openblas-pthread/libopenblas.so.0 openblas /usr/include/x86_64-linux-gnu/openblas-pthread/*
library hdf5_serial $system/libhdf5_serial.so.103 hdf5-serial /usr/include/hdf5/serial/*
library jansson $system/libjansson.so.4 jansson /usr/include/jansson*.h
library xxhash $system/libxxhash.so.0 libxxhash /usr/include/xxh*.h
library cmocka $system/libcmocka.so.0 cmocka /usr/include/cmocka*.h
library mpi $system/libmpi.so.40 ompi-c $system/openmpi/include/mpi.h $system/openmpi/include/mpi_portable_platform.h

# Open MPI within one machine: plug-ins for networks and what only they need stay behind
mpi=lib/x86_64-linux-gnu/openmpi/lib/openmpi3
mkdir -p "$bundle/$mpi"
for plugin in "/usr/$mpi"/*.so; do
    needed=$(ldd "$plugin")
    grep -qE 'lib(oshmem|uc[pst]|fabric|ibverbs|psm.*|nl-3|mca_common_monitoring)\.so' <<<"$needed" || cp "$plugin" "$bundle/$mpi/"
done
cp -RL /usr/share/openmpi "$bundle/share/"
cp /usr/bin/orterun "$bundle/libexec/orterun"
cp "$(readlink -f "$(command -v pkg-config)")" "$bundle/libexec/pkgconf"

while read -r path; do
    [ -e "$bundle/lib/$(basename "$path")" ] || add_library "$path"
done < <(needs "$bundle"/lib/*.so.* "$bundle/$mpi"/*.so "$bundle"/libexec/*)

# one search: each reads the lists of all packages
dpkg -S "${packed[@]}" | sed 's/:.*//' | sort -u | while read -r package; do
    cp -L "/usr/share/doc/$package/copyright" "$bundle/licences/$package"
done

# All find each other by where they lie.
# shellcheck disable=SC2016  # the variable is the loader's
{
    patchelf --set-rpath '$ORIGIN' "$bundle"/lib/*.so.*
    patchelf --set-rpath '$ORIGIN/../../../..' "$bundle/$mpi"/*.so
    patchelf --set-rpath '$ORIGIN/../lib' "$bundle"/libexec/*
}
cat >"$bundle/bin/mpirun" <<EOF
#!/bin/sh
root=\$(cd "\$(dirname "\$0")/.." && pwd)
export OPAL_PREFIX="\$root" PMIX_MCA_pcompress_base_silence_warning=1
exec "\$root/libexec/orterun" "\$@"
EOF
chmod +x "$bundle/bin/mpirun"
ln -s ../libexec/pkgconf "$bundle/bin/pkg-config"

cat >"$bundle/ifkv.cmake" <<'EOF'
# Initial cache of a build against this folder: cmake -C .../ifkv.cmake -S . -B build
get_filename_component(bundle "${CMAKE_CURRENT_LIST_DIR}" REALPATH)
set(CMAKE_PREFIX_PATH "${bundle}" CACHE PATH "")
set(PKG_CONFIG_EXECUTABLE "${bundle}/bin/pkg-config" CACHE FILEPATH "")
set(CMAKE_EXE_LINKER_FLAGS "-Wl,-rpath,\"${bundle}/lib\"" CACHE STRING "") # also when a link resolves libraries of libraries
set(MPI_SKIP_COMPILER_WRAPPER ON CACHE BOOL "")
set(MPI_C_LIB_NAMES mpi CACHE STRING "")
set(MPI_mpi_LIBRARY "${bundle}/lib/libmpi.so" CACHE FILEPATH "")
set(MPI_C_HEADER_DIR "${bundle}/include/ompi-c" CACHE PATH "")
set(MPIEXEC_EXECUTABLE "${bundle}/bin/mpirun" CACHE FILEPATH "")
EOF

glibc=$(find "$bundle" -type f \( -name '*.so*' -o -path '*/libexec/*' \) -exec objdump -T {} + 2>/dev/null |
    grep -o 'GLIBC_2\.[0-9.]*' | sort -uV | tail -n 1)
cat >"$bundle/README" <<EOF
Libraries of Debian 12 (x86-64) that ifkv is built against; made by launch/bundle.sh.  Licences: licences/.
Needs on the machine: C library ${glibc#GLIBC_} or later, libgcc, a C compiler with OpenMP, CMake 3.22 or later and make or ninja.
    cmake -C $(basename "$bundle")/ifkv.cmake -S . -B build
    $(basename "$bundle")/bin/mpirun -n 4 build/ifkv ...      ranks of one machine only
EOF
mkdir -p "$(dirname "$file")"
tar -C "$work" -czf "$file.part" "$(basename "$bundle")"
mv "$file.part" "$file"
printf 'bundle: %s, %s MiB packed, %s MiB unpacked, C library %s or later\n' "$file" "$(($(stat -c %s "$file") >> 20))" \
    "$(du -sm "$bundle" | cut -f 1)" "${glibc#GLIBC_}"
