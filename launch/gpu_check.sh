#!/usr/bin/env bash
# Builds ifkv on a machine with an NVIDIA GPU, checks the CUDA half on it and times it; one call, no network.
#   launch/gpu_check.sh [--out DIR] [--model DIR] [--bundle FILE] [--built DIR] [--limit S] [--commit NAME] [--emulated] [PART...]
# Parts, in this order unless named:
#   build         from source, against the packages of launch/packages.txt, else against FILE of launch/bundle.sh
#   attention     both kernels against float64, then against each other; a one-hot fetch comes before everything else
#   instructions  every instruction check of the host model, on the device beside the model
#   conformance   back end, products, whole prefills and communicators over device memory
#   pipeline      prefills of one to four ranks against the CPU: two tiny models, and the model in DIR
#   time          products, attention, element-wise operations, movement and whole prefills at the shapes of Qwen3-14B and
#                 Llama-3.1-8B, attention at those of SmolLM2-135M (d_head 64), beside torch; left out when a check before it failed
#   nccl          one rank; two and four ranks on one GPU over sockets; a rank for each GPU where there are several
#   sanitizer     compute-sanitizer: memcheck, racecheck, synccheck on tiny shapes; slow, so it takes the time that is left
# --out (default: $OUT, else out/gpu_check) gets gpu_check.json, gpu_check.log, bench.jsonl and bench.tar.gz, each whole after
# every step; --built takes a build as it is; --limit (530) is the time for all parts, in seconds; --commit says which one this
# is, where git does not.  The table comes last.  --emulated runs the same on the host model of the device: nothing it says,
# least of all a time, is about a GPU.
# Exit: 0 what could run passed, 1 something failed, 2 usage, 69 no GPU, no compiler or no CMake.  What cannot run is absent,
# with a reason, and neither passes nor fails.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
all_parts='build attention instructions conformance pipeline time nccl sanitizer'
out=${OUT:-$root/out/gpu_check} model='' bundle=$root/.cache/ifkv-bundle.tar.gz built='' limit_s=530 commit='' is_emulated=0 parts=''

refuse() { # EXIT TEXT
    printf 'gpu_check: error: %s\n' "$2" >&2
    exit "$1"
}
while [ $# -gt 0 ]; do
    case $1 in
        --emulated) is_emulated=1 ;;
        --out | --model | --bundle | --built | --limit | --commit)
            [ $# -gt 1 ] || refuse 2 "$1 needs a value"
            case $1 in
                --out) out=$2 ;;
                --model) model=$2 ;;
                --bundle) bundle=$2 ;;
                --built) built=$2 ;;
                --limit) limit_s=$2 ;;
                --commit) commit=$2 ;;
            esac
            shift
            ;;
        -h | --help)
            sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *)
            case " $all_parts " in
                *" $1 "*) parts="$parts $1" ;;
                *) refuse 2 "got \"$1\", expected one of: $all_parts" ;;
            esac
            ;;
    esac
    shift
done
case $limit_s in '' | *[!0-9]*) refuse 2 "--limit: got \"$limit_s\", expected seconds" ;; esac
parts=${parts:-$all_parts}

ask_gpu() { timeout 30 nvidia-smi "$@" 2>/dev/null; }
n_gpu=$(ask_gpu -L | grep -c '^GPU')
[ "$is_emulated" = 1 ] || [ "$n_gpu" -gt 0 ] ||
    refuse 69 'nvidia-smi lists no GPU on this machine; --emulated runs the same parts on the host model'
command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
[ -n "$built" ] || [ "$is_emulated" = 1 ] || command -v nvcc >/dev/null || refuse 69 'no nvcc, neither in PATH nor in /usr/local/cuda/bin'
[ -n "$built" ] || command -v cmake >/dev/null || refuse 69 'no cmake in PATH'

mkdir -p "$out" || refuse 69 "$out cannot be made"
out=$(cd "$out" && pwd)
build=${built:-$root/build-gpu}
[ "$is_emulated" = 0 ] || build=${built:-$root/build-gpu-emulated}
[ -z "$built" ] || build=$(cd "$built" && pwd) || exit 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$out/gpu_check.log last=$work/last
: >"$log"
: >"$out/bench.jsonl"
deadline=$((SECONDS + limit_s)) rows=() n_failed=0 n_passed=0 failed_check=0
# shellcheck source=/dev/null  # checked on its own
. "$root/launch/env.sh"

if [ "$is_emulated" = 1 ]; then
    tool=$build/ifkv-emu suffix=_emu device='emulated device' capability=9.0
    export IFKV_EMU_DEVICES=1
else
    tool=$build/ifkv suffix=''
    device=$(ask_gpu --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv,noheader | head -n 1)
    capability=$(ask_gpu --query-gpu=compute_cap --format=csv,noheader | head -n 1)
fi
commit=${commit:-$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)}

# ---- rows of the table ----

row() { # PART STEP VERDICT SECONDS TEXT
    case $3 in
        fail) n_failed=$((n_failed + 1)) ;;
        pass) n_passed=$((n_passed + 1)) ;;
    esac
    rows+=("$1"$'\t'"$2"$'\t'"$3"$'\t'"$4"$'\t'"${5//$'\t'/ }")
    write_json
    printf 'gpu_check: %s: %s: %s (%s s) %s\n' "$1" "$2" "$3" "$4" "$5" >&2
}
retract() { # the last row, a failure
    unset 'rows[-1]'
    n_failed=$((n_failed - 1))
}
absent() { row "$1" "$2" absent 0 "$3"; }

# What a step's output says in a few words: counts of tests or claims, else its last line.
figure() {
    awk '/^\[  PASSED  \]/ { tests += $4 } /SKIPPED/ { skipped++ } / claims held/ { claims = $0 } NF { line = $0 }
        END { text = claims ? claims : tests ? tests " tests" : line
              print substr(text (skipped ? ", " skipped " times something skipped" : ""), 1, 160) }' "$last"
}
reason() { # CMake says where in one line, and what in the next; of a test the words come before its name, but ranks mix them
    awk 'found ~ /^CMake Error.*:$/ && NF { found = found " " $0 }
        !found && /rror:|ERROR: |CMake Error/ { found = $0 }
        !test && /error|ERROR|did not|FAIL/ { test = $0 }
        NF { line = $0 }
        END { gsub(/  +/, " ", found); print substr(found ? found : test ? test : line, 1, 160) }' "$last"
}

# step PART NAME LIMIT_S PATTERN COMMAND...: passes if COMMAND ends in time, exits 0 and prints a line of PATTERN, without which
# a program that ran no test would pass.  Leaves the exit code in rc, nothing where COMMAND was not run.
step() {
    local part=$1 name=$2 limit=$3 pattern=$4 begin seconds word
    rc=''
    shift 4
    local left=$((deadline - SECONDS))
    if [ $left -lt 2 ]; then
        absent "$part" "$name" "no time left of $limit_s s"
        return 1
    fi
    for word in "$@"; do # programs that did not compile
        case $word in "$build"/*) [ -e "$word" ] || { absent "$part" "$name" "not built: ${word##*/}"; return 1; } ;; esac
    done
    [ "$is_emulated" = 0 ] || limit=$((4 * limit))
    [ "$limit" -le $left ] || limit=$left
    printf '\n==== %s: %s: %s\n' "$part" "$name" "$*" >>"$log"
    begin=$EPOCHREALTIME
    timeout -k 5 "$limit" "$@" >"$last" 2>&1 </dev/null
    rc=$?
    seconds=$(awk -v a="$begin" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }')
    tail -c 200000 "$last" >>"$log" # of sixty steps: the machine may hand back no file of more than 16 MiB
    if [ $rc = 124 ] || [ $rc = 137 ]; then
        row "$part" "$name" fail "$seconds" "no end within $limit s"
    elif [ $rc != 0 ]; then
        row "$part" "$name" fail "$seconds" "exit $rc: $(reason)"
    elif ! grep -qE "$pattern" "$last"; then
        row "$part" "$name" fail "$seconds" "nothing like \"$pattern\" in its output"
    else
        row "$part" "$name" pass "$seconds" "$(figure)"
        return 0
    fi
    return 1
}
readonly tests_ran='^\[  PASSED  \] [1-9]' claims_held='^[1-9][0-9]* claims held, 0 did not'

# ---- what the parts share ----

# has PART STEP mpi|nccl: whether the tool was built with it, and can be started; else the step is absent.
has() {
    local why
    if [ ! -e "$tool" ]; then
        why="not built: ${tool##*/}"
    elif ! "$tool" version 2>/dev/null | grep -q " $3"; then
        [ "$3" = mpi ] && why='built without MPI' || why='built without NCCL or without MPI'
    elif [ "$3" = mpi ] && ! command -v "$mpirun" >/dev/null; then
        why="no $mpirun"
    else
        return 0
    fi
    absent "$1" "$2" "$why"
    return 1
}
find_mpirun() {
    mpirun=$(sed -n 's/^MPIEXEC_EXECUTABLE:[A-Z]*=//p' "$build/CMakeCache.txt" 2>/dev/null)
    mpirun=${mpirun:-mpirun}
}

# Without the packages, those of the bundle.
find_libraries() {
    local module
    for module in openblas jansson libxxhash hdf5-serial cmocka; do
        pkg-config --exists $module 2>/dev/null && continue
        if [ ! -f "$bundle" ]; then
            row build packages fail 0 "$module is not here, and no $bundle, which launch/bundle.sh makes elsewhere"
            return 1
        fi
        options+=(-C "$build/ifkv-bundle/ifkv.cmake")
        [ "$build/ifkv-bundle.unpacked" -nt "$bundle" ] && return
        rm -rf "$build/ifkv-bundle"
        mkdir -p "$build"
        step build bundle 60 'ifkv\.cmake$' tar -C "$build" -xzvf "$bundle" && touch "$build/ifkv-bundle.unpacked"
        return
    done
}

python_include() { # HEADER: the folder of NVIDIA's Python packages that has it, or nothing
    python3 -c 'import glob, os, site, sys
for path in site.getsitepackages():
    for found in glob.glob(os.path.join(path, "nvidia", "*", "include", sys.argv[1])):
        sys.exit(print(os.path.dirname(found)))' "$1" 2>/dev/null
}
# What the toolkit lacks, from NVIDIA's Python packages, where they are: links to these files alone, since beside them lie
# others that the toolkit has too, of another version.
find_toolkit() {
    local toolkit=/usr/local/cuda header include library links=$build/python-cuda
    if command -v nvcc >/dev/null; then
        toolkit=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
        options+=("-DCMAKE_BUILD_RPATH=$toolkit/lib64;$toolkit/lib") # CMake takes them for folders the loader knows, and nobody may have told it
    fi
    [ ! -f "$toolkit/include/cuda_bf16.h" ] || options+=("-DIFKV_CUDA_INCLUDE_DIR=$toolkit/include") # of the host model
    for header in cublasLt nccl; do
        "${CC:-cc}" -E -I "$toolkit/include" -include $header.h -x c /dev/null >/dev/null 2>&1 && continue
        include=$(python_include $header.h)
        [ -n "$include" ] || continue
        library=$(find "$(dirname "$include")/lib" -name "lib$header.so.*" 2>/dev/null | head -n 1)
        [ -n "$library" ] || continue
        mkdir -p "$links/include"
        ln -sfn "$include/${header%Lt}"* "$links/include/"
        ln -sf "$library" "$links/"
        ln -sf "$library" "$links/lib$header.so"
        export CPATH="$links/include${CPATH:+:$CPATH}"
        case $header in
            cublasLt) options+=("-DCUDA_cublasLt_LIBRARY=$links/libcublasLt.so") ;;
            nccl) options+=("-DNCCL_INCLUDE=$links/include" "-DNCCL_LIBRARY=$links/libnccl.so" "-DIFKV_NCCL_INCLUDE_DIR=$links/include") ;;
        esac
    done
}

build_all() {
    local targets='test_emu ifkv_cli_emulated test_backend_emu test_backend_refit_emu test_attention_emu test_attention_cuda_emu test_device_emu
        test_cuda_matmul_emu test_comm_device_emu'
    [ "$is_emulated" = 1 ] || targets='ifkv_cli test_backend test_backend_refit test_attention test_attention_cuda test_device test_cuda_matmul
        test_comm_device test_instructions_sm80 test_instructions_sm90'
    local options=(-DCMAKE_BUILD_TYPE=Release -DIFKV_TESTS=ON) go_on=(-k)
    find_libraries || return
    find_toolkit
    if [ "$is_emulated" = 1 ]; then options+=(-DIFKV_CUDA_EMU=ON -DIFKV_WITH_CUDA=OFF); else options+=(-DIFKV_WITH_CUDA=ON); fi
    [ -f "$build/CMakeCache.txt" ] || command -v make >/dev/null || options+=(-G Ninja)
    if ! step build configure 240 'ifkv: MPI' cmake -S "$root" -B "$build" "${options[@]}"; then
        rm -f "$build/CMakeCache.txt" # what it did not find would stay not found
        return 1
    fi
    grep -q '^CMAKE_GENERATOR:.*=Ninja' "$build/CMakeCache.txt" && go_on=(-k 0)
    local has_model=0
    grep -q 'tests of the CUDA half 1' "$last" && has_model=1
    # shellcheck disable=SC2086  # targets are words; what else fails, a program that compiled is worth running
    step build compile 300 . cmake --build "$build" -j "$(nproc)" --target $targets -- "${go_on[@]}" || failed_check=1
    if [ "$is_emulated" = 0 ] && [ $has_model = 1 ] && [ $failed_check = 0 ]; then
        step build 'host model' 120 . cmake --build "$build" -j "$(nproc)" --target test_emu
    fi
    return 0
}

# ---- parts ----

part_attention() {
    local kernel d is_right all_right=1
    for kernel in sm80 sm90; do
        if [ $kernel = sm90 ] && [ "${capability%.*}" != 9 ]; then
            absent attention sm90 "compute capability $capability, expected 9.x"
            return
        fi
        is_right=1
        for d in 64 128; do
            step attention "$kernel $d, one-hot" 40 "$tests_ran" \
                "$build/test_attention_cuda$suffix" $kernel $d one_hot_queries_fetch_their_value || is_right=0
        done
        if [ $is_right = 1 ]; then
            step attention "$kernel against float64" 60 "$tests_ran" "$build/test_attention_cuda$suffix" $kernel
        else
            absent attention "$kernel against float64" 'the one-hot fetch did not pass'
            all_right=0
        fi
    done
    if [ $all_right = 1 ]; then
        step attention 'sm80 against sm90' 60 "$tests_ran" "$build/test_attention_cuda$suffix" both
    else
        absent attention 'sm80 against sm90' 'a one-hot fetch did not pass'
    fi
}

part_instructions() {
    local model_says=''
    if [ -x "$build/test_emu" ]; then
        step instructions 'host model' 60 "$claims_held" "$build/test_emu" && model_says=$(grep ' claims held' "$last")
    else
        absent instructions 'host model' 'not built'
    fi
    if [ "$is_emulated" = 1 ]; then
        absent instructions device 'needs a GPU'
        return
    fi
    step instructions 'device, from sm_80 on' 60 "$claims_held" "$build/test_instructions_sm80"
    if [ "${capability%.*}" != 9 ]; then
        absent instructions 'device, sm_90a' "compute capability $capability, expected 9.x"
    else # as many claims as on the model
        step instructions 'device, sm_90a' 60 "${model_says:-$claims_held}" "$build/test_instructions_sm90"
    fi
}

part_conformance() {
    step conformance 'back end' 60 "$tests_ran" "$build/test_backend$suffix" cuda
    step conformance refit 60 "$tests_ran" "$build/test_backend_refit$suffix" cuda
    step conformance attention 60 "$tests_ran" "$build/test_attention$suffix" cuda
    step conformance products 60 "$tests_ran" "$build/test_cuda_matmul$suffix"
    step conformance 'tiny prefills' 90 "$tests_ran" "$build/test_device$suffix" cuda
    step conformance 'ranks as threads' 60 "$tests_ran" "$build/test_comm_device$suffix"
    has conformance '2 ranks over MPI' mpi &&
        step conformance '2 ranks over MPI' 60 "$tests_ran" "$mpirun" -n 2 "$build/test_comm_device$suffix" mpi
    absent conformance 'failing calls' 'planned on the host model only (test_comm_nccl, test_device_faults)'
}

find_python() { # fails if none has both packages
    for python in python3 "$root/.cache/venv/bin/python"; do
        "$python" -c 'import h5py, numpy' 2>/dev/null && return
    done
    return 1
}

part_pipeline() {
    local name
    if ! find_python; then
        absent pipeline 'CUDA against CPU' 'python has no h5py or no numpy'
        return
    fi
    for name in llama qwen3; do
        step pipeline "$name, 1 2 4 ranks" 90 '^bound' "$python" "$root/launch/gpu_compare.py" "$tool" $name
    done
    if [ -z "$model" ]; then
        absent pipeline 'a real model' 'no --model given'
    elif [ "$is_emulated" = 1 ]; then
        absent pipeline "$(basename "$model")" 'the host model takes hours'
    else
        step pipeline "$(basename "$model"), 1 2 4 ranks" 120 '^bound' "$python" "$root/launch/gpu_compare.py" "$tool" "$model"
    fi
}

# NCCL takes two ranks of one GPU for an error unless each is a process that claims a host of its own; then only sockets connect.
# shellcheck disable=SC2016  # the variables are the rank's
readonly own_host='export NCCL_HOSTID=rank$OMPI_COMM_WORLD_RANK NCCL_NET=Socket NCCL_SOCKET_IFNAME=lo
    export NCCL_IB_DISABLE=1 NCCL_MNNVL_ENABLE=0 NCCL_MAX_CTAS=2
    exec "$0" "$@"'
part_nccl() {
    has nccl all nccl || return
    local ranks
    step nccl 'ranks as threads' 60 "$tests_ran" "$build/test_comm_device$suffix" nccl
    has nccl 'ranks as processes' mpi || return
    [ "$is_emulated" = 0 ] || export IFKV_EMU_DEVICES=4
    for ranks in 2 4; do
        step nccl "$ranks ranks on one GPU" 45 "$tests_ran" "$mpirun" -n $ranks sh -c "$own_host" "$build/test_comm_device$suffix" nccl_mpi || break
    done
    if find_python; then
        step nccl '2 ranks on one GPU, prefill' 60 '^bound' "$python" "$root/launch/gpu_compare.py" "$tool" llama \
            --nccl "$mpirun" -n 2 sh -c "$own_host"
    else
        absent nccl '2 ranks on one GPU, prefill' 'python has no h5py or no numpy'
    fi
    if [ "$n_gpu" -gt 1 ]; then
        step nccl "$n_gpu ranks, a GPU each" 60 "$tests_ran" "$mpirun" -n "$n_gpu" "$build/test_comm_device$suffix" nccl_mpi
    else
        absent nccl 'a GPU for each rank' "$n_gpu GPU"
    fi
    [ "$is_emulated" = 0 ] || export IFKV_EMU_DEVICES=1
}

part_sanitizer() {
    local sanitizer kernel
    sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer)
    if [ "$is_emulated" = 1 ] || [ -z "$sanitizer" ]; then
        absent sanitizer all "$([ "$is_emulated" = 1 ] && echo 'needs a GPU' || echo 'no compute-sanitizer here')"
        return
    fi
    local kernels='sm80 sm90' instructions=$build/test_instructions_sm90
    [ "${capability%.*}" = 9 ] || kernels=sm80 instructions=$build/test_instructions_sm80
    check() { # TOOL LIMIT_S WHAT PATTERN COMMAND...
        local tool_name=$1 limit=$2 what=$3 pattern=$4
        shift 4
        step sanitizer "$tool_name, $what" "$limit" "$pattern" "$sanitizer" --tool "$tool_name" --error-exitcode 9 "$@"
    }
    if ! check memcheck 60 instructions "$claims_held" "$instructions" && grep -q 'Device not supported' "$last"; then
        retract
        absent sanitizer all 'compute-sanitizer: Device not supported'
        return
    fi
    check memcheck 60 'back end' "$tests_ran" "$build/test_backend" cuda
    check memcheck 60 refit "$tests_ran" "$build/test_backend_refit" cuda
    for kernel in $kernels; do
        check memcheck 40 "$kernel" "$tests_ran" "$build/test_attention_cuda" "$kernel" 0 '*key*'
        check racecheck 40 "$kernel" "$tests_ran" "$build/test_attention_cuda" "$kernel" 0 'one_key*'
        check synccheck 40 "$kernel" "$tests_ran" "$build/test_attention_cuda" "$kernel" 0 'one_*'
    done
}

# bench NAME LIMIT_S COMMAND...: rows of JSON into bench.jsonl, and what they come to.  Rows that were written before a limit count.
bench() {
    local name=$1 limit=$2 text
    shift 2
    step time "$name" "$limit" '^\{' "$@"
    case $rc in 0 | 124 | 137) ;; *) return ;; esac
    grep '^{.*}$' "$last" >"$work/rows" || return
    cat "$work/rows" >>"$out/bench.jsonl"
    text=$(sum_up "$work/rows" 2>/dev/null) || text="$(wc -l <"$work/rows") rows"
    [ "$rc" = 0 ] || text="no end within its limit; $text"
    rows[-1]=${rows[-1]%$'\t'*}$'\t'$text
    write_json
    tar -C "$work" -czf "$out/bench.tar.gz" bench
}
# Of each label the fastest row, but every whole prefill; of element-wise operations the one that is slowest beside a copy; and
# the worst error of all.  Times of the host model are null.
sum_up() {
    python3 - "$1" <<'EOF'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
def rate(row):
    return row.get("tflops") or row.get("gb_per_s") or row.get("busbw_gbytes_per_s") or 0
def worth(row):
    return row["ttft_ms"] or 0 if "ttft_ms" in row else rate(row)
def text(row):
    size = row.get("tokens", row.get("bytes", ""))
    value = f"{row['ttft_ms']:.1f} ms" if "ttft_ms" in row else f"{rate(row):.0f} " + ("TFLOP/s" if "tflops" in row else "GB/s")
    share = f"{100 * row['copy_share']:.0f} % of copy" if row.get("copy_share") and row["label"] != "copy" else ""
    return " ".join(str(x) for x in (row.get("label"), row.get("way", ""), size, value, share) if x != "")
best = {}
for row in rows:
    key = row.get("label"), row.get("way"), row["tokens"] if "ttft_ms" in row else None
    if worth(row) and (key not in best or worth(row) > worth(best[key])):
        best[key] = row
words = [text(row) for row in best.values()] or [f"{len(rows)} rows, whose times mean nothing"]
shares = [(row["copy_share"], row["label"]) for row in best.values() if row.get("copy_share") and row["label"] != "copy"]
words += ["at least {:.0f} % of copy ({})".format(100 * min(shares)[0], min(shares)[1])] if shares else []
errors = [row["error"] for row in rows if row.get("error") is not None]
words += [f"error at most {max(errors):.1e}"] if errors else []
words += [f"{sum(row['wrong'] for row in rows if 'wrong' in row)} wrong"] if any("wrong" in row for row in rows) else []
print("; ".join(words))
EOF
}

part_time() {
    local name shape=''
    if [ $failed_check = 1 ]; then
        absent time all 'a check before it failed'
        return
    fi
    if [ "$is_emulated" = 1 ]; then # another shape, only to see every bench run
        mkdir -p "$work/shape"
        printf '{"model_type": "llama", "hidden_act": "silu", "num_hidden_layers": 2, "vocab_size": 101, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "rope_theta": 1e4, "tie_word_embeddings": true, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "hidden_size": 64, "intermediate_size": 96}\n' >"$work/shape/config.json"
        shape=$work/shape
    fi
    mkdir -p "$work/bench"
    local lengths=2048,4096,8192,16384,32768 products=512,2048,4096,8192,32768 passes=8192,32768 prefills=2048,8192,16384,32768 chunk=2048
    local warm_up=2 # batches: the first is one call, which pays for what is done once and is no measure of how many fill the next
    [ "$is_emulated" = 0 ] || lengths=96 products=96 passes=96 prefills=96 chunk=32 warm_up=0
    operation() { # NAME LIMIT_S KIND MODEL LENGTHS
        bench "$1, $4" "$2" "$tool" bench "$3" --backend cuda --model "${shape:-$root/configs/models/$4}" --lengths "$5" --warm-up $warm_up \
            --json --out "$work/bench/$3-$4"
    }
    for name in Qwen3-14B Llama-3.1-8B; do
        operation products 60 gemm $name $products
        operation attention 60 attention $name $lengths
        operation element-wise 40 elementwise $name $passes
        bench "prefill, $name" 100 "$tool" bench prefill --backend cuda --model "${shape:-$root/configs/models/$name}" --random-weights 1 \
            --lengths $prefills --chunk $chunk --methods full,infoflow --json --out "$work/bench/prefill-$name"
    done
    operation attention 40 attention SmolLM2-135M $lengths
    bench 'movement of 2 ranks as threads' 40 "$tool" bench comm --backend cuda --comm thread --ranks 2 --json --out "$work/bench/comm"
    if [ "$is_emulated" = 1 ]; then
        absent time torch 'needs a GPU'
    elif python3 -c 'import torch' 2>/dev/null; then
        bench torch 90 python3 "$root/bench/sdpa_torch.py" --lengths $lengths --json
    else
        absent time torch 'python3 has no torch'
    fi
}

# ---- what is left behind ----

json_text() { # VARIABLE TEXT: as a JSON string; no process for it, since the file is written after every row
    local escaped=${2//\\/\\\\}
    escaped=${escaped//\"/\\\"}
    printf -v "$1" '"%s"' "${escaped//[[:cntrl:]]/ }"
}
json_about() {
    local name version nvcc hash is_true=false
    [ "$is_emulated" = 0 ] || is_true=true
    json_text name "$device"
    json_text version "$capability"
    json_text nvcc "$(nvcc --version 2>/dev/null | tail -n 1)"
    json_text hash "$commit"
    printf '{"emulated": %s, "device": %s, "capability": %s, "gpus": %d, "commit": %s, "date": "%s", "cores": %d, "nvcc": %s' \
        $is_true "$name" "$version" "$n_gpu" "$hash" "$(date -u +%FT%TZ)" "$(nproc)" "$nvcc"
}
write_json() {
    local entry part name verdict seconds text comma=''
    {
        printf '%s, "rows": [' "$about"
        for entry in "${rows[@]}"; do
            IFS=$'\t' read -r part name verdict seconds text <<<"$entry"
            json_text part "$part"
            json_text name "$name"
            json_text text "$text"
            printf '%s\n {"part": %s, "step": %s, "verdict": "%s", "seconds": %s, "text": %s}' "$comma" "$part" "$name" "$verdict" \
                "$seconds" "$text"
            comma=,
        done
        printf '\n]}\n'
    } >"$out/gpu_check.json.part" && mv "$out/gpu_check.json.part" "$out/gpu_check.json" # whole, whenever the end comes
}
table() {
    local entry part name verdict seconds text
    printf '\n%s, commit %s%s\n' "$device" "$commit" "$([ "$is_emulated" = 0 ] || echo '; no GPU: no time here means anything')"
    for entry in "${rows[@]}"; do
        IFS=$'\t' read -r part name verdict seconds text <<<"$entry"
        printf '%-12s %-32s %-6s %6s s  %s\n' "$part" "$name" "$verdict" "$seconds" "$text"
    done
    printf '%d passed, %d failed, %d absent, %d s; %s\n' $n_passed $n_failed $((${#rows[@]} - n_passed - n_failed)) $SECONDS "$out"
}

about=$(json_about) is_built=1
if [ -z "$built" ]; then
    build_all || is_built=0
    case " $parts " in *' build '*) ;; *) [ $n_failed != 0 ] || rows=() n_passed=0 ;; esac
elif [[ " $parts " == *' build '* ]]; then
    absent build all "--built $built"
fi
find_mpirun
for part in $parts; do
    [ "$part" != build ] || continue
    if [ $is_built = 0 ]; then
        absent "$part" all 'the build failed'
        continue
    fi
    before=$n_failed
    "part_$part"
    case $part in attention | instructions | conformance | pipeline) [ $n_failed = $before ] || failed_check=1 ;; esac
done
write_json
table | tee -a "$log"
[ $n_failed = 0 ] && [ $n_passed -gt 0 ]
