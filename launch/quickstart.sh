#!/usr/bin/env bash
# From a fresh Debian or Ubuntu machine to an answer: packages, build, a small real model, a
# question over the documents in launch/docs, four ranks, and the same through full prefill.
# What exists already is not made again.  Everything made lies in .cache/ and build/.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
question='In which village was the engineer who designed the lighthouse on Gull Point born?'
docs=$root/launch/docs
ranks=4

usage="usage: quickstart.sh [\"QUESTION\"] [--docs DIR] [--ranks N]
  QUESTION    default: $question
  --docs DIR  text files to answer from, one chunk a file (default: launch/docs)
  --ranks N   ranks of the selective run (default: $ranks)"
usage_error() {
    printf 'quickstart: error: %s\n' "$1" >&2
    printf '%s\n' "$usage" >&2
    exit 2
}

n_question=0
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h)
            printf '%s\n' "$usage"
            exit 0
            ;;
        --docs | --ranks)
            [ $# -ge 2 ] || usage_error "$1 needs a value"
            if [ "$1" = --docs ]; then docs=$2; else ranks=$2; fi
            shift
            ;;
        -*) usage_error "unknown option $1" ;;
        *)
            question=$1
            n_question=$((n_question + 1))
            ;;
    esac
    shift
done
[ "$n_question" -le 1 ] || usage_error "got $n_question questions, expected one (quote it)"
[ -n "$question" ] || usage_error "the question is empty"
[[ $ranks =~ ^[1-9][0-9]{0,2}$ ]] || usage_error "--ranks: got $ranks, expected a number from 1 to 999"
[ -e "$docs" ] || usage_error "--docs: $docs does not exist"

say() { printf 'quickstart: %s\n' "$*" >&2; }
# Run a command whose output matters only if it fails: logged NAME COMMAND...
logged() {
    local log=$root/.cache/log/$1.log code=0
    shift
    "$@" >"$log" 2>&1 </dev/null || code=$?
    if [ $code != 0 ]; then
        tail -n 40 "$log" >&2
        printf 'quickstart: error: failed with exit %d: %s (log: %s)\n' "$code" "$*" "$log" >&2
        exit "$code"
    fi
}

say "looking for packages"
"$root/launch/setup.sh" build
# shellcheck source=/dev/null  # checked on its own
. "$root/launch/env.sh"
n_core=$(nproc)
python=$root/.cache/venv/bin/python
model=$root/.cache/models/SmolLM2-135M-Instruct
work=$root/.cache/quickstart
mkdir -p "$work"

say "building build/ifkv"
# A build directory that exists keeps its own settings; an interrupted first configuration is repeated.
[ -f "$root/build/Makefile" ] || [ -f "$root/build/build.ninja" ] ||
    logged configure cmake -S "$root" -B "$root/build" -DCMAKE_BUILD_TYPE=Release
logged build cmake --build "$root/build" -j "$n_core"

say "fetching the model"
"$python" "$root/launch/fetch_model.py" --out "$model"

say "packing the question and the documents"
"$python" "$root/launch/ifkv_text.py" pack --model "$model" --question="$question" --docs="$docs" \
    --instruction 'Answer from the passages above in one sentence.' --max-new 32 --out "$work/requests.jsonl"

# prefill METHOD RANKS THREADS: run the request and leave its results in $work/METHOD.
prefill() {
    logged "quickstart-$1" mpirun -n "$2" "$root/build/ifkv" prefill --model "$model" \
        --requests "$work/requests.jsonl" --out "$work/$1" --method "$1" --threads "$3" --overwrite
}
answer() { "$python" "$root/launch/ifkv_text.py" unpack --model "$model" --results "$work/$1" --plain; }

n_thread=$((n_core > ranks ? n_core / ranks : 1))
say "infoflow on $ranks ranks, $n_thread thread(s) each"
prefill infoflow "$ranks" "$n_thread"
printf '\nquestion   %s\n' "$question"
printf 'infoflow   %s\n' "$(answer infoflow)"

say "full prefill on one rank, $n_core thread(s)"
prefill full 1 "$n_core"
printf 'full       %s\n\n' "$(answer full)"

"$python" "$root/launch/stage_table.py" "$work/infoflow" "$work/full"
