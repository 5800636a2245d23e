#!/bin/sh
# The include tables of the architecture, checked: who may include whom, and where a foreign header may appear.
# A rule that no machine checks is a wish.  Prints every offence, then a count; exits 1 if there is one.
cd "$(dirname "$0")/.." || exit 2
offences=0

offend() {
    echo "includes: $1"
    offences=$((offences + 1))
}

# foreign HEADER_PATTERN ALLOWED_FILES_PATTERN
foreign() {
    for hit in $(grep -rlE "^[[:space:]]*#[[:space:]]*include[[:space:]]*[<\"]($1)" src comm cuda bench tests --include='*.[ch]' --include='*.cu' --include='*.cuh'); do
        echo "$hit" | grep -qE "^($2)$" || offend "$hit includes $1, allowed in $2 only"
    done
}
foreign 'mpi\.h' 'comm/comm_mpi\.c|comm/mpi_check\.h|src/cli\.c|bench/[a-z_]*\.c|tests/[a-z_]*\.c'
foreign 'nccl\.h' 'comm/comm_nccl\.c|comm/nccl_check\.h|tests/emu/.*'
foreign 'cuda_runtime[a-z_]*\.h' 'cuda/.*|comm/comm_nccl\.c|bench/bench\.c|tests/emu/.*'
foreign 'cublas[A-Za-z_]*\.h' 'cuda/cuda_backend\.c|cuda/cuda_matmul\.c|cuda/cuda_check\.h'
foreign 'hdf5\.h' 'src/h5_file\.h|tests/file_fixture\.c' # h5_file.h is private to h5.c and h5_read.c
foreign 'cblas\.h' 'src/cpu_matmul\.[ch]'
foreign 'omp\.h' 'src/cpu_[a-z_]*\.[ch]'
foreign 'jansson\.h' 'src/(json\.[ch]|config[a-z_]*\.[ch]|safetensors[a-z_]*\.[ch]|model_check\.[ch]|request[a-z0-9_]*\.[ch]|manifest\.[ch]|output[a-z_]*\.[ch]|cli[a-z_]*\.[ch])|bench/(quality|bench)[a-z_]*\.[ch]|tests/[a-z0-9_]*\.c'
foreign 'pthread\.h' 'comm/comm_thread\.c|comm/comm_nccl\.c'
foreign 'threads\.h' 'src/store\.c|comm/timeline\.c|tests/memory_store\.[ch]'
foreign 'cmocka\.h' 'tests/test\.h'
foreign 'xxhash\.h' 'src/digest\.c|tests/[a-z_]*\.c'

# Levels: an arrow only points down.  A header's own .c has its level; what is not listed is level 8.
level() {
    case $1 in
    ifkv.h | status.h | error_codes.h | log.h | random.h) echo 0 ;;
    tensor.h | placement.h | cost.h | geometry.h | config.h | config_*.h | rope.h | file.h | json.h | digest.h | convert.h | guard.h) echo 1 ;;
    backend.h | arena.h | comm.h | timeline.h | cpu_*.h | mpi_check.h | nccl_check.h) echo 2 ;;
    h5.h | h5_file.h | safetensors*.h | model.h | model_check.h | store*.h | weights.h | weights_random.h | request.h | kvcache.h | pool.h | publish.h | manifest.h) echo 3 ;;
    exchange.h | exchange_owned.h | exchange_kv_route.h) echo 4 ;;
    layer.h) echo 5 ;;
    select.h | refit.h | engine.h) echo 6 ;;
    auto.h | reorder.h | reuse.h | session.h | prefill.h | output*.h) echo 7 ;;
    cli.h | *) echo 8 ;;
    esac
}
own_header() {
    case $1 in
    exchange_*.c) echo exchange.h ;;
    select_*.c) echo select.h ;;
    session_api.c) echo prefill.h ;;
    session_check.c) echo session.h ;;
    measure.c) echo engine.h ;;
    reuse_*.c) echo reuse.h ;;
    comm_*.c) echo comm.h ;;
    request_*.c) echo request.h ;;
    safetensors_*.c) echo safetensors.h ;;
    config_*.c) echo config.h ;;
    store_*.c) echo store.h ;;
    output_*.c) echo output.h ;;
    *.c) echo "${1%.c}.h" ;;
    *) echo "$1" ;;
    esac
}
for file in src/*.[ch] comm/*.[ch]; do
    base=$(basename "$file")
    mine=$(level "$(own_header "$base")")
    for header in $(sed -n 's/^#include "\([^"]*\)".*/\1/p' "$file"); do
        [ "$(level "$header")" -le "$mine" ] || offend "$file (level $mine) includes $header (level $(level "$header"))"
    done
done

# The tool is the library's first client: it reaches the engine through ifkv.h alone.
for file in src/cli*.[ch]; do
    for header in $(sed -n 's/^#include "\([^"]*\)".*/\1/p' "$file"); do
        case $header in
        cost.h | config.h | placement.h | select.h) [ "$file" = src/cli_plan.c ] || offend "$file includes $header: arithmetic is for plan" ;;
        ifkv.h | status.h | digest.h | json.h | h5.h | request.h | output*.h | store.h | cli.h) ;;
        *) offend "$file includes $header: the tool reaches the engine through ifkv.h" ;;
        esac
    done
done

# Orchestration has no conditionals: the only halves are named in these files.
for hit in $(grep -lE '^#[[:space:]]*if(def)? .*IFKV_HAVE' src/*.c comm/*.c); do
    echo "$hit" | grep -qE '^(src/backend\.c|comm/comm\.c|src/cli\.c)$' || offend "$hit has a conditional on IFKV_HAVE_*"
done

# The library never prints, exits or starts MPI: those belong to the tool.
for file in src/*.c comm/*.c; do
    case $file in src/cli*.c) continue ;; esac
    hits=$(grep -nE '(^|[^a-z_f])(printf|puts|exit|abort|MPI_Init|MPI_Init_thread|MPI_Finalize) ?\(' "$file" | grep -vE '_exit|f?printf\(std|ops->abort|void \(\*abort|comm_abort|thread_abort|self_abort|mpi_abort|[a-z]_abort|\*|^[0-9]+: +(/\*|\*)' || true)
    [ -z "$hits" ] || offend "$file: $hits"
done

# Every header compiles alone.
for header in src/*.h comm/*.h; do
    cc -std=c11 -D_GNU_SOURCE -Isrc -Icomm -fsyntax-only -x c "$header" 2>/dev/null || case $header in
    comm/mpi_check.h | comm/nccl_check.h | src/h5_file.h) ;; # need flags that only CMake finds
    *) offend "$header does not compile alone" ;;
    esac
done

echo "includes: $offences offences"
[ "$offences" -eq 0 ]
