# shellcheck shell=bash
# What the batch scripts of this folder share; to be sourced.
#
# run_ranks COMMAND ARG...: `ifkv COMMAND ARG...` on every task of the job, by srun, or by mpirun with IFKV_LAUNCHER=mpirun.  Before
# the time limit Slurm sends USR1 to the batch shell (--signal=B:USR1@...), which passes it on: ifkv finishes the stage under way and
# ends with 75, and so does run_ranks.
# finish CODE: put the job back into the queue after 75, then exit with CODE.
#
# IFKV_BIN names the program; default: build/ifkv of the directory that sbatch was called in.

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 66
ifkv=${IFKV_BIN:-$PWD/build/ifkv}
if [ ! -x "$ifkv" ]; then
    printf 'job: error: no program %s; build it, or name one by IFKV_BIN\n' "$ifkv" >&2
    exit 66
fi
launcher=${IFKV_LAUNCHER:-srun}
export -n IFKV_BIN IFKV_LAUNCHER # ifkv warns of names that are none of its options
# Network file systems often have no working locks; ifkv's own lock file is not HDF5's.
export HDF5_USE_FILE_LOCKING="${HDF5_USE_FILE_LOCKING-BEST_EFFORT}"
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY-passive}"

run_ranks() {
    local pid rc
    case $launcher in
        srun) srun --mpi=pmix --kill-on-bad-exit=1 "$ifkv" "$@" & ;;
        # 15 s between mpirun's TERM and its KILL instead of 1: time to end by itself
        mpirun) mpirun --mca odls_base_sigkill_timeout 15 "$ifkv" "$@" & ;;
        *)
            printf 'job: error: IFKV_LAUNCHER: got %s, expected srun or mpirun\n' "$launcher" >&2
            return 2
            ;;
    esac
    pid=$!
    trap 'kill -USR1 "$pid"' USR1
    rc=0
    wait "$pid" || rc=$?
    # a trapped signal ends the first wait, not the command
    if [ "$rc" -gt 128 ] && kill -0 "$pid" 2>/dev/null; then
        rc=0
        wait "$pid" || rc=$?
    fi
    trap - USR1
    return "$rc"
}

finish() {
    if [ "$1" = 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
        printf 'job: stopped before the end; back into the queue\n' >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$1"
}
